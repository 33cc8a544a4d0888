//! Writes sections in order to `OUT.partial`, then the tail, the table and the header; renames at the end.
//!
//! The weights are streamed once. [`Writer::seal`] then writes everything that may still change (predictors,
//! curves, tokenizer, provenance), so that a converter can seal an exact file, run a calibration over it, and seal
//! again without touching the weights.

use std::path::{Path, PathBuf};

use crate::{
    CalibrationCurve, DType, Encoding, FormatError, ModelConfig, PredictorRecord, Provenance, SectionKind,
    Shape, Tokenizer,
};

/// What a section will hold, known before its bytes.
#[derive(Clone, Debug)]
pub struct SectionSpec {
    /// What it holds.
    pub kind: SectionKind,
    /// Layer, for the per-layer kinds.
    pub layer: Option<u32>,
    /// Element type.
    pub dtype: DType,
    /// Dimensions in elements.
    pub shape: Shape,
    /// How its bytes are to be read.
    pub encoding: Encoding,
    /// A reader that does not know the kind must refuse the file.
    pub required: bool,
}

/// Everything after the weights.
#[derive(Clone, Debug)]
pub struct Tail<'a> {
    /// One record per layer.
    pub predictors: &'a [PredictorRecord],
    /// One curve per layer, or none.
    pub curves: Option<&'a [CalibrationCurve]>,
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Where the file came from.
    pub provenance: Option<&'a Provenance>,
}

/// Streams one file. Dropped before [`Writer::commit`], it removes `OUT.partial`.
#[derive(Debug)]
pub struct Writer {}

impl Writer {
    /// Creates `OUT.partial` beside `out`. `alignment_bytes`: a power of two, 64 to 65536 (4096 for shipped files).
    ///
    /// # Errors
    /// `out` exists and `force` is false; the folder cannot be written.
    pub fn create(
        out: &Path,
        config: &ModelConfig,
        alignment_bytes: u32,
        force: bool,
    ) -> Result<Self, FormatError> {
        let _ = (out, config, alignment_bytes, force);
        todo!()
    }

    /// Path of the unfinished file.
    pub fn partial_path(&self) -> PathBuf {
        todo!()
    }

    /// Starts the next weight section; the one before must be complete.
    pub fn begin(&mut self, spec: SectionSpec) -> Result<(), FormatError> {
        let _ = spec;
        todo!()
    }

    /// Appends bytes to the section begun last.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let _ = bytes;
        todo!()
    }

    /// Writes (or writes again) the tail, table and header, and flushes: `OUT.partial` is then a valid file.
    pub fn seal(&mut self, tail: &Tail<'_>) -> Result<(), FormatError> {
        let _ = tail;
        todo!()
    }

    /// Syncs the sealed file and renames it to `out`. Returns its length in bytes.
    pub fn commit(self) -> Result<u64, FormatError> {
        todo!()
    }
}
