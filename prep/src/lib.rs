//! Offline converter: a ReLU-sparse Hugging Face checkpoint becomes one `.sinf` file.
#![forbid(unsafe_code)]

pub mod arch;
pub mod calibrate;
pub mod checkpoint;
pub mod error;
pub mod pack;
pub mod synth;
pub mod tokenizer;

pub use error::PrepError;
