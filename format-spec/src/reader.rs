//! One pass over header, table and padding that checks every rule before any weight is touched.

use crate::{
    CalibrationCurve, FormatError, ModelConfig, PredictorRecord, Provenance, Section, SectionKind, Tokenizer,
};

/// A validated file's structure; owns no weights. Offsets in it are safe to slice the validated bytes with.
#[derive(Clone, Debug)]
pub struct Layout {}

impl Layout {
    /// Checks every rule of FORMAT.md over `file`, the whole file's bytes.
    ///
    /// # Errors
    /// One [`FormatError`] variant per rule.
    pub fn parse(file: &[u8]) -> Result<Self, FormatError> {
        let _ = file;
        todo!()
    }

    /// Dimensions and constants.
    pub fn config(&self) -> &ModelConfig {
        todo!()
    }

    /// `(major, minor)` of the file.
    pub fn version(&self) -> (u16, u16) {
        todo!()
    }

    /// Known sections in file order.
    pub fn sections(&self) -> &[Section] {
        todo!()
    }

    /// The section of `kind` for `layer` (`None` for whole-model kinds).
    pub fn find(&self, kind: SectionKind, layer: Option<u32>) -> Option<&Section> {
        let _ = (kind, layer);
        todo!()
    }

    /// One record per layer.
    pub fn predictors(&self) -> &[PredictorRecord] {
        todo!()
    }

    /// BLAKE3 digest of the whole file as the header states it.
    pub fn digest(&self) -> [u8; 32] {
        todo!()
    }

    /// The tokenizer, decompressed under a bound and checked against the vocabulary.
    pub fn tokenizer(&self, file: &[u8]) -> Result<Tokenizer, FormatError> {
        let _ = file;
        todo!()
    }

    /// Where the file came from, if it says so.
    pub fn provenance(&self, file: &[u8]) -> Result<Option<Provenance>, FormatError> {
        let _ = file;
        todo!()
    }

    /// Calibration curves, one per layer, if the file has them.
    pub fn calibration_curves(&self, file: &[u8]) -> Result<Option<Vec<CalibrationCurve>>, FormatError> {
        let _ = file;
        todo!()
    }

    /// Recomputes every section checksum and the whole-file digest; `progress` gets the bytes done so far.
    pub fn verify(&self, file: &[u8], progress: &mut dyn FnMut(u64)) -> Result<(), FormatError> {
        let _ = (file, progress);
        todo!()
    }
}
