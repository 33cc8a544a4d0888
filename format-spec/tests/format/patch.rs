//! Good files with single fields changed, at the offsets that FORMAT.md states.

use format_spec::{FormatError, Layout, SectionKind};
use xxhash_rust::xxh3::xxh3_64;

/// Fields of the header.
pub(crate) mod header {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const MAJOR: usize = 8;
    pub(crate) const MINOR: usize = 10;
    pub(crate) const ENDIANNESS: usize = 12;
    pub(crate) const HEADER_LEN: usize = 16;
    pub(crate) const ALIGNMENT: usize = 20;
    pub(crate) const TOTAL_LEN: usize = 24;
    pub(crate) const TABLE_OFFSET: usize = 32;
    pub(crate) const N_SECTIONS: usize = 40;
    pub(crate) const FLAGS: usize = 44;
    pub(crate) const HIDDEN_SIZE: usize = 48;
    pub(crate) const INTERMEDIATE_SIZE: usize = 52;
    pub(crate) const NUM_HIDDEN_LAYERS: usize = 56;
    pub(crate) const NUM_ATTENTION_HEADS: usize = 60;
    pub(crate) const NUM_KEY_VALUE_HEADS: usize = 64;
    pub(crate) const HEAD_DIM: usize = 68;
    pub(crate) const VOCAB_SIZE: usize = 72;
    pub(crate) const MAX_POSITION_EMBEDDINGS: usize = 76;
    pub(crate) const ROPE_THETA: usize = 80;
    pub(crate) const ROPE_SCALING_FACTOR: usize = 88;
    pub(crate) const ROPE_SCALING: usize = 96;
    pub(crate) const RMS_NORM_EPS: usize = 100;
    pub(crate) const ACTIVATION: usize = 104;
    pub(crate) const ACTIVATION_THRESHOLD: usize = 108;
    pub(crate) const BOS_TOKEN_ID: usize = 112;
    pub(crate) const EOS_TOKEN_IDS: usize = 116;
    pub(crate) const RESERVED: usize = 132;
    pub(crate) const DIGEST: usize = 216;
    pub(crate) const CHECKSUM: usize = 248;
}

/// Fields of a row of the section table.
pub(crate) mod row {
    pub(crate) const KIND: usize = 0;
    pub(crate) const LAYER: usize = 4;
    pub(crate) const DTYPE: usize = 8;
    pub(crate) const ENCODING: usize = 12;
    pub(crate) const FLAGS: usize = 16;
    pub(crate) const N_DIMS: usize = 20;
    pub(crate) const DIMS: usize = 24;
    pub(crate) const OFFSET: usize = 56;
    pub(crate) const LEN: usize = 64;
    pub(crate) const RESERVED: usize = 80;
    pub(crate) const ROW_LEN: usize = 96;
}

/// Fields of a predictor record.
pub(crate) mod record {
    pub(crate) const KIND: usize = 0;
    pub(crate) const LIMIT: usize = 4;
    pub(crate) const ALPHA: usize = 8;
    pub(crate) const RECALL: usize = 20;
    pub(crate) const RESERVED: usize = 32;
    pub(crate) const RECORD_LEN: usize = 64;
}

/// A file under change.
#[derive(Clone)]
pub(crate) struct Patch {
    pub(crate) bytes: Vec<u8>,
}

impl Patch {
    pub(crate) fn u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn f32(&mut self, at: usize, value: f32) {
        self.u32(at, value.to_bits());
    }

    pub(crate) fn f64(&mut self, at: usize, value: f64) {
        self.u64(at, value.to_bits());
    }

    pub(crate) fn get_u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("4 bytes"))
    }

    pub(crate) fn get_u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    /// Start of a section's row.
    pub(crate) fn row(&self, kind: SectionKind, layer: Option<u32>) -> usize {
        let first = self.get_u64(header::TABLE_OFFSET) as usize;
        let layer = layer.unwrap_or(u32::MAX);
        let is_it = |at: &usize| {
            (self.get_u32(at + row::KIND), self.get_u32(at + row::LAYER)) == (kind.code(), layer)
        };
        (first..self.bytes.len()).step_by(row::ROW_LEN).find(is_it).expect("the section is there")
    }

    /// Start of a section's bytes.
    pub(crate) fn section(&self, kind: SectionKind, layer: Option<u32>) -> usize {
        self.get_u64(self.row(kind, layer) + row::OFFSET) as usize
    }

    /// Makes the header's checksum right again.
    pub(crate) fn reseal(&mut self) {
        let checksum = xxh3_64(&self.bytes[..header::CHECKSUM]);
        self.u64(header::CHECKSUM, checksum);
    }
}

/// Why `good` is refused once `change` has been applied and the header resealed. Both the structure and the
/// compressed records are looked at.
#[track_caller]
pub(crate) fn refused(good: &[u8], change: impl FnOnce(&mut Patch)) -> FormatError {
    let mut patch = Patch { bytes: good.to_vec() };
    change(&mut patch);
    patch.reseal();
    read_all(&patch.bytes).expect_err("a broken rule")
}

/// Everything but checksums.
pub(crate) fn read_all(file: &[u8]) -> Result<Layout, FormatError> {
    let layout = Layout::parse(file)?;
    layout.tokenizer(file)?;
    layout.provenance(file)?;
    layout.calibration_curves(file)?;
    Ok(layout)
}

/// The error is of the variant and its text holds the words: what is wrong, where, and what was expected.
macro_rules! assert_refused {
    ($error:expr, $variant:pat, $($word:expr),+) => {{
        let error: format_spec::FormatError = $error;
        let text = error.to_string();
        assert!(matches!(error, $variant), "another rule: {error:?}");
        $(assert!(text.contains(&$word.to_string()), "no {:?} in: {text}", $word.to_string());)+
    }};
}
pub(crate) use assert_refused;
