//! Maps a `.sinf` file and generates text with it; `prep` borrows the dense forward pass from here.

mod engine;
mod error;
mod forward;
mod kv_cache;
mod map;
mod model;
mod session;

pub use error::RuntimeError;
pub use model::Model;
pub use session::{LayerUsage, MlpBatch, MlpMode, MlpObserver, Session, SessionOptions, Usage};
