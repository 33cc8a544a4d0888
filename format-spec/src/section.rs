//! What each extent of the file holds: kinds with their names, shapes and types.

use crate::calibration::RECORD_LEN;
use crate::{DType, ModelConfig, signs};

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
    /// Bit planes of W_gate below its signs, `(1 or 2, f, w)` u32; present where the predictor kind asks for them.
    GatePlanes = 38,
    /// Per-row offsets on the threshold of a score, `(f,)` f32; a layer with such a predictor may have them.
    GateOffsets = 39,
    /// First factor of a predictor of low rank, `(r, d)` f16; present where the predictor kind asks for it.
    GateFc1 = 40,
    /// Second factor, `(f, r)` f16; present with the first.
    GateFc2 = 41,
    /// Sign words of what the factors leave of W_gate, `(f, w)` u32; present where the predictor kind asks for them.
    ResidualSigns = 42,
    /// What a row's residual signs count, `(f,)` f32; present with them.
    ResidualScales = 43,
    /// One 64-byte predictor record per layer, `(L, 64)` u8.
    Predictors = 64,
    /// Curves of the calibration, `(L, points, 4)` f32; optional.
    CalibrationCurves = 65,
    /// Quality and limits of all layers at several budgets, `(points, 2 + L)` f32; optional.
    BudgetCurve = 66,
    /// Tokenizer, bincode + zstd.
    Tokenizer = 80,
    /// Provenance, bincode + zstd; optional.
    Provenance = 81,
}

impl SectionKind {
    /// Every kind, by code.
    pub const ALL: [Self; 25] = [
        Self::Embedding,
        Self::FinalNorm,
        Self::LmHead,
        Self::AttnNorm,
        Self::WQ,
        Self::WK,
        Self::WV,
        Self::WO,
        Self::MlpNorm,
        Self::GateSigns,
        Self::WGate,
        Self::WUp,
        Self::WDownT,
        Self::GateLimits,
        Self::GatePlanes,
        Self::GateOffsets,
        Self::GateFc1,
        Self::GateFc2,
        Self::ResidualSigns,
        Self::ResidualScales,
        Self::Predictors,
        Self::CalibrationCurves,
        Self::BudgetCurve,
        Self::Tokenizer,
        Self::Provenance,
    ];

    /// Lower-case name, as in messages and `prep inspect`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::FinalNorm => "final_norm",
            Self::LmHead => "lm_head",
            Self::AttnNorm => "attn_norm",
            Self::WQ => "w_q",
            Self::WK => "w_k",
            Self::WV => "w_v",
            Self::WO => "w_o",
            Self::MlpNorm => "mlp_norm",
            Self::GateSigns => "gate_signs",
            Self::WGate => "w_gate",
            Self::WUp => "w_up",
            Self::WDownT => "w_down_t",
            Self::GateLimits => "gate_limits",
            Self::GatePlanes => "gate_planes",
            Self::GateOffsets => "gate_offsets",
            Self::GateFc1 => "gate_fc1",
            Self::GateFc2 => "gate_fc2",
            Self::ResidualSigns => "residual_signs",
            Self::ResidualScales => "residual_scales",
            Self::Predictors => "predictors",
            Self::CalibrationCurves => "calibration_curves",
            Self::BudgetCurve => "budget_curve",
            Self::Tokenizer => "tokenizer",
            Self::Provenance => "provenance",
        }
    }

    /// The code in the file.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The kind of a code.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// True for the kinds that every layer has of its own.
    pub fn is_per_layer(self) -> bool {
        (Self::AttnNorm..=Self::ResidualScales).contains(&self)
    }

    /// True for the kinds that [`crate::Writer::seal`] writes, after the weights.
    pub(crate) fn is_tail(self) -> bool {
        self >= Self::Predictors
    }

    /// The required flag of the kind's sections: false where text can be generated without them.
    pub fn is_required(self) -> bool {
        !matches!(self, Self::CalibrationCurves | Self::BudgetCurve | Self::Provenance)
    }

    /// How the kind's sections are encoded.
    pub fn encoding(self) -> Encoding {
        match self {
            Self::Tokenizer | Self::Provenance => Encoding::BincodeZstd,
            _ => Encoding::Raw,
        }
    }

    /// Element types that the kind's sections may have.
    pub fn dtypes(self) -> &'static [DType] {
        match self {
            Self::FinalNorm
            | Self::AttnNorm
            | Self::MlpNorm
            | Self::GateOffsets
            | Self::ResidualScales
            | Self::CalibrationCurves
            | Self::BudgetCurve => &[DType::F32],
            Self::GateSigns | Self::GateLimits | Self::GatePlanes | Self::ResidualSigns => &[DType::U32],
            Self::GateFc1 | Self::GateFc2 => &[DType::F16],
            Self::Predictors | Self::Tokenizer | Self::Provenance => &[DType::U8],
            Self::Embedding
            | Self::LmHead
            | Self::WQ
            | Self::WK
            | Self::WV
            | Self::WO
            | Self::WGate
            | Self::WUp
            | Self::WDownT => &[DType::F32, DType::F16, DType::Bf16],
        }
    }

    /// The shape that a model's dimensions imply; `None` for kinds whose length is their own.
    pub fn expected_shape(self, config: &ModelConfig) -> Option<Shape> {
        let d = u64::from(config.hidden_size);
        let f = u64::from(config.intermediate_size);
        let vocab_size = u64::from(config.vocab_size);
        let dims: &[u64] = match self {
            Self::Embedding | Self::LmHead => &[vocab_size, d],
            Self::FinalNorm | Self::AttnNorm | Self::MlpNorm => &[d],
            Self::WQ => &[config.q_size(), d],
            Self::WK | Self::WV => &[config.kv_size(), d],
            Self::WO => &[d, config.q_size()],
            Self::GateSigns | Self::ResidualSigns => &[f, u64::from(signs::n_words(config.hidden_size))],
            Self::WGate | Self::WUp | Self::WDownT => &[f, d],
            Self::GateLimits | Self::GateOffsets | Self::ResidualScales => &[f],
            Self::Predictors => &[u64::from(config.num_hidden_layers), RECORD_LEN as u64],
            Self::GatePlanes
            | Self::GateFc1
            | Self::GateFc2
            | Self::CalibrationCurves
            | Self::BudgetCurve
            | Self::Tokenizer
            | Self::Provenance => return None,
        };
        Some(Shape::new(dims))
    }
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

impl Encoding {
    /// Lower-case name, as in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::BincodeZstd => "bincode_zstd",
        }
    }

    /// The code in the file.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The encoding of a code.
    pub fn from_code(code: u32) -> Option<Self> {
        [Self::Raw, Self::BincodeZstd].into_iter().find(|encoding| encoding.code() == code)
    }
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

    /// Number of elements; `None` beyond 2^64 - 1.
    pub fn n_elements(&self) -> Option<u64> {
        self.dims().iter().try_fold(1_u64, |n, &dim| n.checked_mul(dim))
    }

    /// Bytes of elements of `dtype`; `None` beyond 2^64 - 1 and for the reserved block types.
    pub fn len_bytes(&self, dtype: DType) -> Option<u64> {
        self.n_elements()?.checked_mul(dtype.element_bytes()? as u64)
    }

    /// All four stored dimensions, 0 in the unused ones.
    pub(crate) fn stored(&self) -> [u64; 4] {
        self.dims
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
    ///
    /// # Panics
    /// If `file` is shorter than those.
    pub fn bytes<'a>(&self, file: &'a [u8]) -> &'a [u8] {
        &file[self.offset_bytes as usize..(self.offset_bytes + self.len_bytes) as usize]
    }
}
