//! The section table: what each extent of the file is, where it lies and what it must hash to.

use crate::DType;

/// What a section holds. Codes are part of the format and never reused.
///
/// Shapes are row-major; `d` is hidden_size, `f` intermediate_size, `q` num_attention_heads x head_dim,
/// `kv` num_key_value_heads x head_dim, `L` num_hidden_layers, `w` = ceil(d / 32).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum SectionKind {
    /// Token embedding, `(vocab_size, d)`.
    Embedding = 1,
    /// RMSNorm weight before lm_head, `(d,)`, always f32.
    FinalNorm = 2,
    /// Output projection, `(vocab_size, d)`; absent when tied.
    LmHead = 3,
    /// RMSNorm weight before attention, `(d,)`, always f32.
    AttnNorm = 16,
    /// Query projection, `(q, d)`.
    WQ = 17,
    /// Key projection, `(kv, d)`.
    WK = 18,
    /// Value projection, `(kv, d)`.
    WV = 19,
    /// Attention output projection, `(d, q)`.
    WO = 20,
    /// RMSNorm weight before the MLP, `(d,)`, always f32.
    MlpNorm = 32,
    /// Sign words of W_gate, `(f, w)` u32.
    GateSigns = 33,
    /// Gate projection, `(f, d)`.
    WGate = 34,
    /// Up projection, `(f, d)`.
    WUp = 35,
    /// Down projection, transposed against the checkpoint: `(f, d)`, one row per neuron.
    WDownT = 36,
    /// Per-row limits on n_neg, `(f,)` u32; present where the layer's predictor kind asks for it.
    GateLimits = 37,
    /// One 64-byte predictor record per layer, `(L, 64)` u8.
    Predictors = 64,
    /// Curves of the calibration, `(L, points, 4)` f32; optional.
    CalibrationCurves = 65,
    /// Tokenizer, bincode + zstd.
    Tokenizer = 80,
    /// Provenance, bincode + zstd; optional.
    Provenance = 81,
}

/// How the bytes of a section are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Encoding {
    /// Little-endian elements, row-major.
    Raw = 0,
    /// A zstd frame around a bincode 2 value (standard configuration).
    BincodeZstd = 1,
}

/// One to four dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    dims: [u64; 4],
    n_dims: usize,
}

impl Shape {
    /// A shape of `dims`.
    ///
    /// # Panics
    /// If there are no dimensions or more than four.
    pub fn new(dims: &[u64]) -> Self {
        assert!((1..=4).contains(&dims.len()), "a shape has one to four dimensions, not {}", dims.len());
        let mut all = [0; 4];
        all[..dims.len()].copy_from_slice(dims);
        Self { dims: all, n_dims: dims.len() }
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[u64] {
        &self.dims[..self.n_dims]
    }
}

/// One validated row of the section table.
#[derive(Clone, Debug, PartialEq)]
pub struct Section {
    /// What it holds.
    pub kind: SectionKind,
    /// Layer it belongs to, for the per-layer kinds.
    pub layer: Option<u32>,
    /// Element type.
    pub dtype: DType,
    /// Dimensions in elements.
    pub shape: Shape,
    /// How its bytes are to be read.
    pub encoding: Encoding,
    /// False: a reader that does not know the kind may leave it out.
    pub required: bool,
    /// Start, from the beginning of the file.
    pub offset_bytes: u64,
    /// Length without padding.
    pub len_bytes: u64,
    /// XXH3-64 of the section's bytes.
    pub xxh3: u64,
}

impl Section {
    /// This section's bytes in `file`, which MUST be the bytes that were validated.
    pub fn bytes<'a>(&self, file: &'a [u8]) -> &'a [u8] {
        &file[self.offset_bytes as usize..(self.offset_bytes + self.len_bytes) as usize]
    }
}
