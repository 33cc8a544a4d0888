//! Offline converter: a ReLU-sparse Hugging Face checkpoint becomes one `.sinf` file.
#![forbid(unsafe_code)]

pub mod arch;
pub mod calibrate;
pub mod checkpoint;
pub mod cli;
pub mod convert;
pub mod error;
pub mod inspect;
pub mod pack;
pub mod progress;
mod stream;
pub mod synth;
pub mod tokenizer;
pub mod verify;

pub use calibrate::CalibrationOptions;
pub use convert::{ConvertOptions, ConvertReport, Predictor, convert};
pub use error::PrepError;
pub use inspect::{Inspection, inspect};
pub use progress::Progress;
pub use verify::{Verification, verify};
