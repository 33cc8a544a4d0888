//! Maps a `.sinf` file and generates text with it; `prep` borrows the dense forward pass from here.

pub mod chat;
mod engine;
mod error;
mod forward;
mod kv_cache;
mod map;
mod model;
pub mod sampler;
mod session;
mod text;
mod tokenizer;

pub use error::RuntimeError;
pub use model::Model;
pub use session::{LayerUsage, MlpBatch, MlpMode, MlpObserver, Session, SessionOptions, Usage};
pub use text::{Ready, TextStream};
pub use tokenizer::{Tokenizer, TokenizerError};
