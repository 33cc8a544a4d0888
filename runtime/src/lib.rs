//! Maps a `.sinf` file and generates text with it; `prep` borrows the dense forward pass from here.

mod adaptive;
mod audit;
pub mod bench;
pub mod chat;
pub mod device;
mod engine;
mod engine_cuda;
mod error;
mod forward;
pub mod generate;
pub mod interrupt;
mod keep_share;
mod kv_cache;
mod map;
mod model;
pub mod perplexity;
pub mod sampler;
mod session;
pub mod stats;
pub mod steps;
mod text;
mod tokenizer;

pub use adaptive::{AdaptiveLayer, AdaptiveReport};
pub use audit::{AuditOptions, AuditReport, Estimate, LayerAudit};
pub use error::RuntimeError;
pub use model::Model;
pub use session::{
    LayerPrediction, LayerUsage, MlpBatch, MlpMode, MlpObserver, N_THREADS_MAX, PredictionLimit, Session,
    SessionOptions, Usage,
};
pub use text::{Ready, TextStream};
pub use tokenizer::{Tokenizer, TokenizerError};
