//! Shapes and views that every backend shares, and the checks on them.

use half::{bf16, f16};

/// A typed, contiguous run of weights.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary16.
    F16(&'a [f16]),
    /// Upper half of a binary32.
    Bf16(&'a [bf16]),
}

impl Elements<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of one element.
    pub fn element_bytes(&self) -> usize {
        match self {
            Self::F32(_) => 4,
            Self::F16(_) | Self::Bf16(_) => 2,
        }
    }

    /// Element `idx` as f32 (exact).
    pub fn get(&self, idx: usize) -> f32 {
        match self {
            Self::F32(v) => v[idx],
            Self::F16(v) => v[idx].to_f32(),
            Self::Bf16(v) => v[idx].to_f32(),
        }
    }
}

/// A row-major matrix of weights.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// `(n_rows, n_cols)`.
    pub data: Elements<'a>,
    /// Rows.
    pub n_rows: usize,
    /// Columns.
    pub n_cols: usize,
}

impl<'a> Matrix<'a> {
    /// A view of `data` as `(n_rows, n_cols)`.
    ///
    /// # Errors
    /// [`ShapeError`] when the length is not `n_rows * n_cols`.
    pub fn new(data: Elements<'a>, n_rows: usize, n_cols: usize) -> Result<Self, ShapeError> {
        check("matrix elements", n_rows * n_cols, data.len())?;
        Ok(Self { data, n_rows, n_cols })
    }
}

/// Sign words of a matrix: bit `c % 32` of word `c / 32` is 1 iff the element in column `c` is below zero; bits past
/// the last column are 0.
#[derive(Clone, Copy, Debug)]
pub struct SignMatrix<'a> {
    /// `(n_rows, n_words)`, row-major.
    pub words: &'a [u32],
    /// Rows.
    pub n_rows: usize,
    /// `n_cols.div_ceil(32)`.
    pub n_words: usize,
}

/// Largest n_neg that is still computed.
#[derive(Clone, Copy, Debug)]
pub enum Limits<'a> {
    /// One for all rows.
    Layer(u32),
    /// One for each row, `(n_rows,)`.
    PerRow(&'a [u32]),
}

impl Limits<'_> {
    /// The limit of `row`.
    pub fn of(&self, row: usize) -> u32 {
        match self {
            Self::Layer(limit) => *limit,
            Self::PerRow(limits) => limits[row],
        }
    }
}

/// Most planes of [`BitPlanes`].
pub const PLANES_MAX: usize = 3;

/// A matrix in one to [`PLANES_MAX`] bits an element: with P planes and s_p the sign that bit p stands for (1 is -1),
/// an element is the odd number `sum_p 2^(P - 1 - p) s_p`; so 1; 1 and 3; or 1, 3, 5 and 7, with a sign.
#[derive(Clone, Copy, Debug)]
pub struct BitPlanes<'a> {
    /// Plane 0, the elements' signs.
    pub signs: SignMatrix<'a>,
    /// The planes below, `(P - 1, n_rows, n_words)`; bits past the last column are 0.
    pub low: &'a [u32],
}

impl<'a> BitPlanes<'a> {
    /// P: 1 for signs alone.
    pub fn n_planes(&self) -> usize {
        1 + self.low.len().checked_div(self.signs.words.len()).unwrap_or(0)
    }

    /// Words of plane `idx`, `(n_rows, n_words)`.
    ///
    /// # Panics
    /// If there is no such plane.
    pub fn plane(&self, idx: usize) -> &'a [u32] {
        match idx {
            0 => self.signs.words,
            idx => &self.low[(idx - 1) * self.signs.words.len()..][..self.signs.words.len()],
        }
    }
}

/// Smallest score that is still computed, in units of x times an element of [`BitPlanes`], or of a score of [`LowRank`].
#[derive(Clone, Copy, Debug)]
pub enum Thresholds<'a> {
    /// One for all rows.
    Layer(f32),
    /// One for each row, `(n_rows,)`.
    PerRow(&'a [f32]),
}

impl Thresholds<'_> {
    /// The threshold of `row`.
    pub fn of(&self, row: usize) -> f32 {
        match self {
            Self::Layer(threshold) => *threshold,
            Self::PerRow(thresholds) => thresholds[row],
        }
    }
}

/// Sums of a dot product of [`LowRank`]: as many as two of the widest vectors hold.
pub const DOT_CHAINS: usize = 32;

/// Columns of a dot product of [`LowRank`] whose sums are made on their own, so that many can be made at once.
pub const DOT_SEGMENT: usize = 8 * DOT_CHAINS;

/// What factors of low rank leave of a matrix, as signs and a scale for each row.
#[derive(Clone, Copy, Debug)]
pub struct Residual<'a> {
    /// Its signs.
    pub signs: SignMatrix<'a>,
    /// What the elements of a row count, `(n_rows,)`.
    pub scales: &'a [f32],
}

/// A predictor of low rank: `score = fc2 (fc1 x)`, of two thin matrices, and of what they leave out if there is a residual.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// `(rank, n_cols)`.
    pub fc1: Matrix<'a>,
    /// `(n_rows, rank)`.
    pub fc2: Matrix<'a>,
    /// Elements of `fc1 x` below zero count as 0.
    pub relu: bool,
    /// Added to the score: the signs times x in 8 bits, times the row's scale.
    pub residual: Option<Residual<'a>>,
}

/// Which rows of the MLP are read.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// Dense: every row of gate, up and down.
    All,
    /// Exact: every gate row; up and down rows only where the activation is not zero.
    Active,
    /// Predicted: gate rows whose signs pass the limit; up and down rows where the activation is not zero.
    Predicted {
        /// Sign words of W_gate.
        signs: SignMatrix<'a>,
        /// Limits on n_neg.
        limits: Limits<'a>,
    },
    /// Predicted: gate rows whose product in few bits passes the threshold; up and down rows as above.
    Scored {
        /// W_gate.
        planes: BitPlanes<'a>,
        /// Thresholds on the score.
        thresholds: Thresholds<'a>,
    },
    /// Predicted: gate rows whose score of low rank passes the threshold; up and down rows as above.
    LowRank {
        /// The factors.
        factors: LowRank<'a>,
        /// Thresholds on the score.
        thresholds: Thresholds<'a>,
    },
}

impl Rows<'_> {
    /// True if gate rows are left out by prediction.
    pub fn is_predicted(&self) -> bool {
        !matches!(self, Self::All | Self::Active)
    }
}

/// What stands between the gate projection and the product with the up projection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(v, 0)`.
    Relu,
    /// `v if v >= threshold else 0`.
    FatRelu(f32),
    /// `v * sigmoid(v)`.
    Silu,
}

impl Activation {
    /// The activation of `v`.
    pub fn apply(self, v: f32) -> f32 {
        match self {
            Self::Relu => v.max(0.0),
            Self::FatRelu(threshold) => {
                if v >= threshold {
                    v
                } else {
                    0.0
                }
            }
            Self::Silu => v / (1.0 + (-v).exp()),
        }
    }
}

/// The three projections of an MLP; row i of each belongs to neuron i.
#[derive(Clone, Copy, Debug)]
pub struct MlpWeights<'a> {
    /// `(intermediate_size, hidden_size)`.
    pub gate: Matrix<'a>,
    /// `(intermediate_size, hidden_size)`.
    pub up: Matrix<'a>,
    /// `(intermediate_size, hidden_size)`: W_down transposed.
    pub down_t: Matrix<'a>,
}

/// Rows that one MLP call read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MlpCounts {
    /// Gate rows computed.
    pub n_kept: usize,
    /// Rows whose activation was not zero.
    pub n_active: usize,
}

/// What an MLP call missed among the rows of a sample. The energy of row i is `(h_i |w_down_t[i]|)^2`, with `h` as
/// if nothing were left out: what the row adds to the output, squared.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MlpAudit {
    /// Rows of the sample that the call left out.
    pub n_skipped: usize,
    /// Those of them whose activation is not zero.
    pub n_missed: usize,
    /// Their energy.
    pub missed_energy: f64,
    /// Energy of all rows that the call kept, in the sample or not.
    pub kept_energy: f64,
}

/// One matrix-vector product: `y = W x`, or `y += W x`.
#[derive(Debug)]
pub struct Matvec<'a> {
    /// `(n_rows, n_cols)`.
    pub w: Matrix<'a>,
    /// `(n_rows,)`.
    pub y: &'a mut [f32],
    /// Adds to `y` instead of replacing it.
    pub accumulate: bool,
}

/// Shape of an attention call. Keys and values of one layer are each `(n_kv_heads, n_positions_max, head_dim)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`. Query head h reads key/value head `h / (n_heads / n_kv_heads)`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions the cache holds: its stride between heads is `n_positions_max * head_dim`.
    pub n_positions_max: usize,
}

/// A length that does not fit the shapes of a call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: expected {expected}, found {found}")]
pub struct ShapeError {
    /// What was measured.
    pub what: &'static str,
    /// Length that the shapes ask for.
    pub expected: usize,
    /// Length that was given.
    pub found: usize,
}

/// `Ok` when `found` is `expected`.
pub(crate) fn check(what: &'static str, expected: usize, found: usize) -> Result<(), ShapeError> {
    if expected == found { Ok(()) } else { Err(ShapeError { what, expected, found }) }
}
