//! The `.sinf` file, version 1: one mmap-able container that holds everything needed to generate text
//! with an activation-sparse language model.
//!
//! `FORMAT.md` is the normative text; this crate writes ([`writer`]) and validates ([`reader`]) it. It is the only
//! contract between `prep` and `runtime` on disk. Deliberately absent: kernels, checkpoints, memory maps and `unsafe`.
#![forbid(unsafe_code)]

pub mod calibration;
mod checksum;
pub mod dtype;
pub mod error;
mod field;
#[cfg(test)]
mod format_text;
#[doc(hidden)]
pub mod fuzzing;
pub mod header;
pub mod metadata;
pub mod partial;
pub mod reader;
pub mod section;
pub mod signs;
mod table;
pub mod writer;

pub use calibration::{
    BudgetCurve, BudgetPoint, CalibrationCurve, CurvePoint, PredictorKind, PredictorRecord,
};
pub use dtype::DType;
pub use error::FormatError;
pub use header::{Activation, ModelConfig, Rope, RopeScaling};
pub use metadata::{
    AddedToken, CalibrationText, DummyPrefix, Piece, PieceKind, Provenance, SourceFile, Tokenizer,
};
pub use reader::Layout;
pub use section::{Encoding, Section, SectionKind, Shape};
pub use writer::{SectionSpec, Tail, Writer};

/// `(major, minor)` written by this crate. A reader refuses a newer major and accepts any minor of its own major.
pub const FORMAT_VERSION: (u16, u16) = (1, 2);
