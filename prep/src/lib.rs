//! Offline converter: a ReLU-sparse Hugging Face checkpoint becomes one `.sinf` file.
#![forbid(unsafe_code)]

pub mod arch;
pub mod calibrate;
pub mod checkpoint;
pub mod cli;
pub mod convert;
pub mod error;
pub mod eval;
mod import;
pub mod inspect;
mod output;
pub mod pack;
mod predict;
pub mod progress;
pub mod report;
mod stream;
pub mod synth;
pub mod tokenizer;
pub mod verify;

pub use calibrate::{CalibrationOptions, LowRankOptions, Target};
pub use convert::{ConvertOptions, ConvertReport, Predictor, convert};
pub use error::PrepError;
pub use eval::{Contender, EvalOptions, Evaluation, eval};
pub use inspect::{Inspection, inspect};
pub use predict::Kind;
pub use progress::Progress;
pub use report::{ReportOptions, report};
pub use verify::{Verification, verify};
