//! One checked function for each kernel: lengths, grid and shared memory, then the launch.
//!
//! Argument structs mirror those at the top of each `.cu` file, field by field. Kernels guard what lies on the device
//! (the position, the token), so that no state of it reaches outside of a buffer.

use super::{Buffer, CudaError, Device, View};
use crate::shape::check;
use crate::{Activation, AttentionShape, Elements, PLANES_MAX};

/// Threads of a block that multiplies rows.
const DOT_THREADS: usize = 512;
/// `SEG_LOADS` of common.cuh: most 16-byte loads of a lane in a segment.
const SEG_LOADS: usize = 8;
const WARP: usize = 32;
/// Columns and threads of a block of `down`.
const DOWN_COLS: usize = 256;
/// Blocks of `down` that fit an SM at once.
const DOWN_BLOCKS_PER_SM: usize = 2;
const DOWN_CHUNKS_MAX: usize = 64;
const ATTENTION_THREADS: usize = 256;
/// `SCORE_ROWS`, `STEP_WORDS` and `X_PLANES` of scores.cuh.
pub(super) const SCORE_ROWS: usize = 8;
const STEP_WORDS: usize = 16;
const X_PLANES: usize = 8;
/// Blocks of `attention` for each SM, over all key/value heads.
const ATTENTION_BLOCKS_PER_SM: usize = 2;
/// Widest head that `attention` holds in registers.
const HEAD_DIM_MAX: usize = 256;

/// Element type of weights or of a cache on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// binary32.
    F32,
    /// binary16.
    F16,
    /// Upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// The type of `elements`.
    pub fn of(elements: &Elements<'_>) -> Self {
        match elements {
            Elements::F32(_) => Self::F32,
            Elements::F16(_) => Self::F16,
            Elements::Bf16(_) => Self::Bf16,
        }
    }

    /// Bytes of one element.
    pub fn n_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The type of a cache beside weights of this type: f32 for f32, else f16.
    pub fn cache(self) -> Self {
        match self {
            Self::F32 => Self::F32,
            Self::F16 | Self::Bf16 => Self::F16,
        }
    }

    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// A row-major matrix of weights on the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMatrix<'a> {
    data: View<'a>,
    dtype: Dtype,
    n_rows: usize,
    n_cols: usize,
}

impl<'a> DeviceMatrix<'a> {
    /// A view of `data` as `(n_rows, n_cols)`.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when the length does not fit; [`CudaError::Unsupported`] past 2^31 rows or columns.
    pub fn new(data: View<'a>, dtype: Dtype, n_rows: usize, n_cols: usize) -> Result<Self, CudaError> {
        let max = i32::MAX as usize;
        for (what, found) in [("rows of a matrix", n_rows), ("columns of a matrix", n_cols)] {
            if found > max {
                return Err(CudaError::Unsupported { what, found, max });
            }
        }
        check("matrix bytes", n_rows * n_cols * dtype.n_bytes(), data.len_bytes())?;
        Ok(Self { data, dtype, n_rows, n_cols })
    }

    /// One matrix of all the rows of `matrices`, where they lie one after the other, of one type and width: what reads
    /// the same input is then one product.
    pub fn stacked(matrices: &[Self]) -> Option<Self> {
        let (first, rest) = matrices.split_first()?;
        rest.iter().try_fold(*first, |stack, next| {
            let fits = (stack.dtype, stack.n_cols) == (next.dtype, next.n_cols);
            let data = stack.data.joined(next.data).filter(|_| fits)?;
            Self::new(data, stack.dtype, stack.n_rows + next.n_rows, stack.n_cols).ok()
        })
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Bytes of all rows.
    pub fn n_bytes(&self) -> u64 {
        self.data.len_bytes() as u64
    }

    pub(super) fn data(&self) -> View<'a> {
        self.data
    }

    /// True if every row starts at a multiple of 16 bytes and is one long.
    pub(super) fn is_wide(&self) -> bool {
        self.data.address().is_multiple_of(16) && (self.n_cols * self.dtype.n_bytes()).is_multiple_of(16)
    }
}

/// Keys and values of one token. Shapes as in qkv.cu.
#[derive(Clone, Copy, Debug)]
pub struct QkvCall<'a> {
    /// Heads and cache.
    pub shape: AttentionShape,
    /// `(n_heads * head_dim, n_cols)`.
    pub w_q: DeviceMatrix<'a>,
    /// `(n_kv_heads * head_dim, n_cols)`.
    pub w_k: DeviceMatrix<'a>,
    /// `(n_kv_heads * head_dim, n_cols)`.
    pub w_v: DeviceMatrix<'a>,
    /// Residual stream, `(n_cols,)` f32.
    pub x: View<'a>,
    /// RMSNorm weight, `(n_cols,)` f32.
    pub norm: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// `(n_positions_max, head_dim / 2)` f32.
    pub cos: View<'a>,
    /// `(n_positions_max, head_dim / 2)` f32.
    pub sin: View<'a>,
    /// Rotated queries, `(n_heads, head_dim)` f32; written.
    pub q: View<'a>,
    /// Keys of the layer, `(n_kv_heads, n_positions_max, head_dim)` of [`Dtype::cache`]; one position written.
    pub k_cache: View<'a>,
    /// Values of the layer, likewise.
    pub v_cache: View<'a>,
    /// Token and position, two u32.
    pub state: View<'a>,
}

/// Attention of one token. Shapes as in attention.cu.
#[derive(Clone, Copy, Debug)]
pub struct AttentionCall<'a> {
    /// Heads and cache.
    pub shape: AttentionShape,
    /// `(n_heads, head_dim)` f32.
    pub q: View<'a>,
    /// Keys of the layer, `(n_kv_heads, n_positions_max, head_dim)`.
    pub k_cache: View<'a>,
    /// Values of the layer, likewise.
    pub v_cache: View<'a>,
    /// Element type of the cache.
    pub cache: Dtype,
    /// `(n_heads, head_dim)` f32; written.
    pub out: View<'a>,
    /// Room for the chunks' parts.
    pub scratch: &'a AttentionScratch,
    /// Token and position, two u32.
    pub state: View<'a>,
}

/// Buffers of [`Device::attention`], made once per session.
#[derive(Debug)]
pub struct AttentionScratch {
    shape: AttentionShape,
    n_splits_max: usize,
    maxima: Buffer,
    sums: Buffer,
    tickets: Buffer,
}

/// One product with a vector. Shapes as in matvec.cu.
#[derive(Clone, Copy, Debug)]
pub struct MatvecCall<'a> {
    /// `(n_rows, n_cols)`.
    pub w: DeviceMatrix<'a>,
    /// `(n_cols,)` f32.
    pub x: View<'a>,
    /// RMSNorm of x before the product: weight `(n_cols,)` f32 and epsilon.
    pub norm: Option<(View<'a>, f32)>,
    /// `(n_rows,)` f32; written.
    pub y: View<'a>,
    /// Adds to `y` instead of replacing it.
    pub accumulate: bool,
}

/// Rows of an MLP that one token reads.
#[derive(Clone, Copy, Debug)]
pub enum DeviceRows<'a> {
    /// Every row of gate, up and down.
    All,
    /// Every gate row, up and down rows where the activation is not zero.
    Active,
    /// Gate rows whose signs pass the limit.
    Predicted {
        /// Sign words of W_gate, `(n_rows, ceil(n_cols / 32))` u32.
        signs: View<'a>,
        /// Limits on n_neg.
        limits: DeviceLimits<'a>,
    },
    /// Gate rows whose product in few bits passes the threshold.
    Scored {
        /// W_gate.
        planes: DevicePlanes<'a>,
        /// Thresholds on the score.
        thresholds: DeviceThresholds<'a>,
    },
    /// Gate rows whose score of low rank passes the threshold.
    LowRank {
        /// The factors.
        factors: DeviceLowRank<'a>,
        /// Thresholds on the score.
        thresholds: DeviceThresholds<'a>,
    },
    /// Gate rows that a mask keeps.
    Masked {
        /// `(n_rows,)` u8, 1 where a row is left out.
        mask: View<'a>,
    },
}

/// [`crate::LowRank`] on the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceLowRank<'a> {
    /// `(rank, n_cols)` f16.
    pub fc1: DeviceMatrix<'a>,
    /// `(n_rows, rank)` f16.
    pub fc2: DeviceMatrix<'a>,
    /// Elements of `fc1 x` below zero count as 0.
    pub relu: bool,
    /// Added to the score.
    pub residual: Option<DeviceResidual<'a>>,
}

/// [`crate::Residual`] on the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceResidual<'a> {
    /// `(n_rows, ceil(n_cols / 32))` u32.
    pub signs: View<'a>,
    /// `(n_rows,)` f32.
    pub scales: View<'a>,
}

/// [`crate::BitPlanes`] of W_gate.
#[derive(Clone, Copy, Debug)]
pub struct DevicePlanes<'a> {
    /// Plane 0, `(n_rows, ceil(n_cols / 32))` u32.
    pub signs: View<'a>,
    /// The planes below, `(P - 1, n_rows, ceil(n_cols / 32))` u32; none for signs alone.
    pub low: Option<View<'a>>,
}

/// Largest n_neg that is still computed.
#[derive(Clone, Copy, Debug)]
pub enum DeviceLimits<'a> {
    /// One for all rows.
    Layer(u32),
    /// One for each row, `(n_rows,)` u32.
    PerRow(View<'a>),
}

/// Smallest score that is still computed, in the units of [`crate::Thresholds`].
#[derive(Clone, Copy, Debug)]
pub enum DeviceThresholds<'a> {
    /// One for all rows.
    Layer(f32),
    /// One for each row, `(n_rows,)` f32.
    PerRow(View<'a>),
}

/// The predictor of scores alone. Shapes as in gate_up.cu, `predict_scores`.
#[derive(Clone, Copy, Debug)]
pub struct PredictScoresCall<'a> {
    /// Rows in bits.
    pub planes: DevicePlanes<'a>,
    /// Thresholds on the score.
    pub thresholds: DeviceThresholds<'a>,
    /// Input, `(n_cols,)` f32.
    pub x: View<'a>,
    /// `(n_rows,)` i32; written.
    pub scores: View<'a>,
    /// Scale of x in 8 bits, one f32; written.
    pub scale: View<'a>,
    /// `(n_rows,)` u8, 1 where a row is left out; written.
    pub skip: View<'a>,
}

/// Gate and up projections of one token. Shapes as in gate_up.cu.
#[derive(Clone, Copy, Debug)]
pub struct GateUpCall<'a> {
    /// `(n_rows, n_cols)`.
    pub w_gate: DeviceMatrix<'a>,
    /// `(n_rows, n_cols)`.
    pub w_up: DeviceMatrix<'a>,
    /// Rows that are read.
    pub rows: DeviceRows<'a>,
    /// What stands between the two.
    pub activation: Activation,
    /// Residual stream, `(n_cols,)` f32.
    pub x: View<'a>,
    /// RMSNorm weight, `(n_cols,)` f32.
    pub norm: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// `(n_rows,)` f32; written.
    pub h: View<'a>,
    /// Rows kept and rows active, two u64; added to.
    pub counts: View<'a>,
    /// Where x goes after its norm, `(n_cols,)` f32; written.
    pub normed: Option<View<'a>>,
    /// `(n_rows,)` u8, 1 where the predictor left a row out; written.
    pub skip: Option<View<'a>>,
}

/// Down projection of one token. Shapes as in down.cu.
#[derive(Clone, Copy, Debug)]
pub struct DownCall<'a> {
    /// `(n_rows, n_cols)`.
    pub w_down_t: DeviceMatrix<'a>,
    /// `(n_rows,)` f32.
    pub h: View<'a>,
    /// Reads rows whose h is zero as well.
    pub dense: bool,
    /// Residual stream, `(n_cols,)` f32; added to.
    pub x: View<'a>,
    /// Room for the chunks' parts.
    pub scratch: &'a DownScratch,
}

/// Buffers of [`Device::down`], made once per session.
#[derive(Debug)]
pub struct DownScratch {
    n_cols: usize,
    n_chunks: usize,
    partials: Buffer,
    tickets: Buffer,
}

/// `RowCut` of dot.cuh.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct RowCut {
    n_cols: i32,
    n_segs: i32,
    seg_loads: i32,
    wide: i32,
    n_ahead: i32,
}

impl RowCut {
    /// How the rows of `matrices`, all of one type and width, are cut.
    pub(super) fn new(device: &Device, matrices: &[DeviceMatrix<'_>]) -> Self {
        let w = matrices[0];
        let cols_per_load = WARP * 16 / w.dtype.n_bytes();
        let n_loads = w.n_cols.div_ceil(cols_per_load).max(1);
        let n_segs = n_loads.div_ceil(SEG_LOADS);
        Self {
            n_cols: w.n_cols as i32,
            n_segs: n_segs as i32,
            seg_loads: n_loads.div_ceil(n_segs) as i32,
            wide: matrices.iter().all(DeviceMatrix::is_wide).into(),
            n_ahead: device.n_ahead() as i32,
        }
    }

    /// Segments in a row.
    pub(super) fn n_segs(&self) -> usize {
        self.n_segs as usize
    }

    /// Bytes of the vector in shared memory.
    pub(super) fn slot_bytes(&self, dtype: Dtype) -> usize {
        (self.n_segs * self.seg_loads) as usize * WARP * 16 / dtype.n_bytes() * size_of::<f32>()
    }
}

#[repr(C)]
struct QkvArgs {
    cut: RowCut,
    w_q: u64,
    w_k: u64,
    w_v: u64,
    x: u64,
    norm: u64,
    cos: u64,
    sin: u64,
    q: u64,
    k_cache: u64,
    v_cache: u64,
    state: u64,
    n_heads: i32,
    n_kv_heads: i32,
    head_dim: i32,
    n_positions_max: i32,
    eps: f32,
}

#[repr(C)]
struct AttentionArgs {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    maxima: u64,
    sums: u64,
    tickets: u64,
    state: u64,
    n_heads: i32,
    n_kv_heads: i32,
    head_dim: i32,
    n_positions_max: i32,
    scale: f32,
}

#[repr(C)]
struct MatvecArgs {
    cut: RowCut,
    w: u64,
    x: u64,
    norm: u64,
    y: u64,
    n_rows: i32,
    accumulate: i32,
    eps: f32,
}

#[repr(C)]
struct GateUpArgs {
    cut: RowCut,
    w_gate: u64,
    w_up: u64,
    x: u64,
    norm: u64,
    signs: u64,
    low: u64,
    limits: u64,
    mask: u64,
    h: u64,
    counts: u64,
    n_rows: i32,
    n_words: i32,
    limit: u32,
    rows: u32,
    n_planes: u32,
    activation: u32,
    threshold: f32,
    eps: f32,
    n_rows_max: i32,
    normed: u64,
    skip: u64,
}

#[repr(C)]
struct PredictArgs {
    x: u64,
    signs: u64,
    limits: u64,
    skip: u64,
    n_rows: i32,
    n_cols: i32,
    limit: u32,
}

#[repr(C)]
struct PredictScoresArgs {
    x: u64,
    signs: u64,
    low: u64,
    limits: u64,
    scores: u64,
    scale: u64,
    skip: u64,
    n_rows: i32,
    n_cols: i32,
    limit: u32,
    n_planes: u32,
}

#[repr(C)]
struct DownArgs {
    w_down_t: u64,
    h: u64,
    x: u64,
    partials: u64,
    tickets: u64,
    n_rows: i32,
    n_cols: i32,
    wide: i32,
    dense: i32,
    n_rows_max: i32,
}

#[repr(C)]
struct EmbedArgs {
    w: u64,
    x: u64,
    state: u64,
    n_rows: i32,
    n_cols: i32,
}

#[repr(C)]
struct GreedyArgs {
    logits: u64,
    ids: u64,
    state: u64,
    n: i32,
    n_ids: i32,
}

#[repr(C)]
struct SetStateArgs {
    state: u64,
    token: u32,
    position: u32,
}

#[repr(C)]
struct ReadAllArgs {
    memory: u64,
    sum: u64,
    n: i64,
}

impl Device {
    /// Queries, keys and values of the token in `state`; keys and values go to the cache.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::MixedTypes`], [`CudaError::Unsupported`].
    pub fn qkv(&self, call: &QkvCall<'_>) -> Result<(), CudaError> {
        let QkvCall { shape, w_q, w_k, w_v, .. } = call;
        same_type("query, key and value weights", &[w_q, w_k, w_v])?;
        let (n_cols, head_dim) = (w_q.n_cols, shape.head_dim);
        check("head_dim, even", head_dim / 2 * 2, head_dim)?;
        check("query rows", shape.n_heads * head_dim, w_q.n_rows)?;
        for w in [w_k, w_v] {
            check("key and value rows", shape.n_kv_heads * head_dim, w.n_rows)?;
            check("key and value columns", n_cols, w.n_cols)?;
        }
        check_floats("qkv input", n_cols, call.x)?;
        check_floats("qkv norm", n_cols, call.norm)?;
        for angles in [call.cos, call.sin] {
            check_floats("rope angles", shape.n_positions_max * head_dim / 2, angles)?;
        }
        check_floats("queries", shape.n_heads * head_dim, call.q)?;
        check_cache(shape, w_q.dtype.cache(), [call.k_cache, call.v_cache])?;
        check_state(call.state)?;
        let cut = RowCut::new(self, &[*w_q, *w_k, *w_v]);
        let n_pairs = (shape.n_heads + 2 * shape.n_kv_heads) * head_dim / 2;
        let (n_blocks, shared_bytes) = self.dot_grid(&cut, w_q.dtype, n_pairs, 2 * cut.n_segs() * 4, 0)?;
        let args = QkvArgs {
            cut,
            w_q: w_q.data.address(),
            w_k: w_k.data.address(),
            w_v: w_v.data.address(),
            x: call.x.address(),
            norm: call.norm.address(),
            cos: call.cos.address(),
            sin: call.sin.address(),
            q: call.q.address(),
            k_cache: call.k_cache.address(),
            v_cache: call.v_cache.address(),
            state: call.state.address(),
            n_heads: shape.n_heads as i32,
            n_kv_heads: shape.n_kv_heads as i32,
            head_dim: head_dim as i32,
            n_positions_max: shape.n_positions_max as i32,
            eps: call.eps,
        };
        let kernel = format!("qkv_{}", w_q.dtype.suffix());
        // SAFETY: every length was checked above.
        unsafe { self.launch(&kernel, [n_blocks, 1, 1], DOT_THREADS, shared_bytes, &args) }
    }

    /// Room for attention of `shape`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn attention_scratch(&self, shape: &AttentionShape) -> Result<AttentionScratch, CudaError> {
        if shape.head_dim > HEAD_DIM_MAX {
            return Err(CudaError::Unsupported {
                what: "head_dim",
                found: shape.head_dim,
                max: HEAD_DIM_MAX,
            });
        }
        check("head_dim, even", shape.head_dim / 2 * 2, shape.head_dim)?;
        check(
            "query heads of whole groups",
            shape.n_heads / shape.n_kv_heads * shape.n_kv_heads,
            shape.n_heads,
        )?;
        let n_splits_max = (ATTENTION_BLOCKS_PER_SM * self.n_multiprocessors()).div_ceil(shape.n_kv_heads);
        let n_parts = shape.n_heads * n_splits_max;
        Ok(AttentionScratch {
            shape: *shape,
            n_splits_max,
            maxima: self.alloc(n_parts * 2 * size_of::<f32>())?,
            sums: self.alloc(n_parts * shape.head_dim * size_of::<f32>())?,
            tickets: self.alloc(shape.n_kv_heads * size_of::<u32>())?,
        })
    }

    /// Attention of the token in `state` over the cache up to its position.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn attention(&self, call: &AttentionCall<'_>) -> Result<(), CudaError> {
        let AttentionCall { shape, scratch, .. } = call;
        let head_dim = shape.head_dim;
        check("attention scratch heads", scratch.shape.n_heads, shape.n_heads)?;
        check("attention scratch key heads", scratch.shape.n_kv_heads, shape.n_kv_heads)?;
        check("attention scratch head_dim", scratch.shape.head_dim, head_dim)?;
        check_floats("attention queries", shape.n_heads * head_dim, call.q)?;
        check_floats("attention output", shape.n_heads * head_dim, call.out)?;
        check_cache(shape, call.cache, [call.k_cache, call.v_cache])?;
        check_state(call.state)?;
        let args = AttentionArgs {
            q: call.q.address(),
            k: call.k_cache.address(),
            v: call.v_cache.address(),
            out: call.out.address(),
            maxima: scratch.maxima.view().address(),
            sums: scratch.sums.view().address(),
            tickets: scratch.tickets.view().address(),
            state: call.state.address(),
            n_heads: shape.n_heads as i32,
            n_kv_heads: shape.n_kv_heads as i32,
            head_dim: head_dim as i32,
            n_positions_max: shape.n_positions_max as i32,
            scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
        };
        let n_lanes = head_dim.div_ceil(8).next_power_of_two().max(4);
        let group = match shape.n_heads / shape.n_kv_heads {
            group if group.is_multiple_of(4) => 4,
            group if group.is_multiple_of(2) => 2,
            _ => 1,
        };
        let kernel = format!("attention_{}_{n_lanes}_{group}", call.cache.cache().suffix());
        let grid = [shape.n_kv_heads, scratch.n_splits_max, 1];
        // SAFETY: every length was checked above; the scratch was made for these heads.
        unsafe { self.launch(&kernel, grid, ATTENTION_THREADS, 0, &args) }
    }

    /// `y = W x`, `y += W x`, or either over `rmsnorm(x)`.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn matvec(&self, call: &MatvecCall<'_>) -> Result<(), CudaError> {
        let w = &call.w;
        check_floats("matvec input", w.n_cols, call.x)?;
        check_floats("matvec output", w.n_rows, call.y)?;
        if let Some((norm, _)) = call.norm {
            check_floats("matvec norm", w.n_cols, norm)?;
        }
        let cut = RowCut::new(self, &[*w]);
        let (n_blocks, shared_bytes) = self.dot_grid(&cut, w.dtype, w.n_rows, cut.n_segs() * 4, 0)?;
        let args = MatvecArgs {
            cut,
            w: w.data.address(),
            x: call.x.address(),
            norm: call.norm.map_or(0, |(norm, _)| norm.address()),
            y: call.y.address(),
            n_rows: w.n_rows as i32,
            accumulate: call.accumulate.into(),
            eps: call.norm.map_or(0.0, |(_, eps)| eps),
        };
        let kernel = format!("matvec_{}", w.dtype.suffix());
        // SAFETY: every length was checked above.
        unsafe { self.launch(&kernel, [n_blocks, 1, 1], DOT_THREADS, shared_bytes, &args) }
    }

    /// `h = act(W_gate n) * (W_up n)` with `n = rmsnorm(x)`, over the rows that `call.rows` selects; zero elsewhere.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::MixedTypes`], [`CudaError::Unsupported`], the latter for rows of low rank as
    /// well: [`Device::prefill_skip_low_rank`] makes the mask that is read in their place.
    pub fn gate_up(&self, call: &GateUpCall<'_>) -> Result<(), CudaError> {
        let GateUpCall { w_gate, w_up, .. } = call;
        same_type("gate and up weights", &[w_gate, w_up])?;
        let (n_rows, n_cols) = (w_gate.n_rows, w_gate.n_cols);
        check("up rows", n_rows, w_up.n_rows)?;
        check("up columns", n_cols, w_up.n_cols)?;
        check_floats("gate input", n_cols, call.x)?;
        check_floats("gate norm", n_cols, call.norm)?;
        check_floats("gate output", n_rows, call.h)?;
        check("bytes of counts", 16, call.counts.len_bytes())?;
        if let Some(normed) = call.normed {
            check_floats("normed input of gate", n_cols, normed)?;
        }
        if let Some(skip) = call.skip {
            check("rows left out", n_rows, skip.len_bytes())?;
        }
        let n_words = n_cols.div_ceil(WARP);
        let rows = RowsArgs::new(&call.rows, n_rows, n_cols)?;
        if rows.factors.rank > 0 {
            let (what, found) = ("rank of a predictor inside gate_up", rows.factors.rank as usize);
            return Err(CudaError::Unsupported { what, found, max: 0 });
        }
        let (activation, threshold) = activation_args(call.activation);
        let cut = RowCut::new(self, &[*w_gate, *w_up]);
        // h, both queues, and two rows of partial sums; the sign words or planes come beside the vector.
        let row_bytes = 3 * 4 + 2 * cut.n_segs() * 4;
        let sign_bytes =
            if rows.n_planes > 0 { x_planes_bytes(n_words) } else { cut.slot_bytes(w_gate.dtype) / WARP };
        let (n_blocks, shared_bytes) = self.dot_grid(&cut, w_gate.dtype, n_rows, row_bytes, sign_bytes)?;
        let args = GateUpArgs {
            cut,
            w_gate: w_gate.data.address(),
            w_up: w_up.data.address(),
            x: call.x.address(),
            norm: call.norm.address(),
            signs: rows.signs,
            low: rows.low,
            limits: rows.limits,
            mask: rows.mask,
            h: call.h.address(),
            counts: call.counts.address(),
            n_rows: n_rows as i32,
            n_words: n_words as i32,
            limit: rows.limit,
            rows: rows.rows,
            n_planes: rows.n_planes,
            activation,
            threshold,
            eps: call.eps,
            n_rows_max: n_rows.div_ceil(n_blocks) as i32,
            normed: call.normed.map_or(0, View::address),
            skip: call.skip.map_or(0, View::address),
        };
        let kernel = format!("gate_up_{}", w_gate.dtype.suffix());
        // SAFETY: every length was checked above.
        unsafe { self.launch(&kernel, [n_blocks, 1, 1], DOT_THREADS, shared_bytes, &args) }
    }

    /// The predictor alone: `skip[row] = n_neg(row) > limit(row)` as bytes. Shapes: `signs (n_rows, ceil(n_cols / 32))`
    /// u32, `x (n_cols,)` f32, `skip (n_rows,)` u8.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn predict(
        &self,
        signs: View<'_>,
        limits: DeviceLimits<'_>,
        x: View<'_>,
        skip: View<'_>,
    ) -> Result<(), CudaError> {
        let (n_rows, n_cols) = (skip.len_bytes(), x.len_bytes() / size_of::<f32>());
        check_floats("predictor input", n_cols, x)?;
        let n_words = n_cols.div_ceil(WARP);
        check("sign bytes", n_rows * n_words * 4, signs.len_bytes())?;
        let (limits, limit) = check_limits(limits, n_rows)?;
        let shared_bytes = self.check_shared(n_words.next_multiple_of(4) * 4)?;
        let args = PredictArgs {
            x: x.address(),
            signs: signs.address(),
            limits,
            skip: skip.address(),
            n_rows: n_rows as i32,
            n_cols: n_cols as i32,
            limit,
        };
        let n_blocks = self.n_multiprocessors().min(n_rows.div_ceil(DOT_THREADS / WARP)).max(1);
        // SAFETY: every length was checked above.
        unsafe { self.launch("predict", [n_blocks, 1, 1], DOT_THREADS, shared_bytes, &args) }
    }

    /// The predictor of scores alone: `skip[row] = score(row) < threshold(row) * scale` as bytes, with what it compares.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn predict_scores(&self, call: &PredictScoresCall<'_>) -> Result<(), CudaError> {
        let (n_rows, n_cols) = (call.skip.len_bytes(), call.x.len_bytes() / size_of::<f32>());
        check_floats("predictor input", n_cols, call.x)?;
        check_floats("scores", n_rows, call.scores)?;
        check_floats("scale of the input", 1, call.scale)?;
        let n_words = n_cols.div_ceil(WARP);
        let rows = DeviceRows::Scored { planes: call.planes, thresholds: call.thresholds };
        let rows = RowsArgs::new(&rows, n_rows, n_cols)?;
        // The planes, and the input in f32 for the second pass over it.
        let shared_bytes = self.check_shared(x_planes_bytes(n_words) * (1 + size_of::<f32>()))?;
        let args = PredictScoresArgs {
            x: call.x.address(),
            signs: rows.signs,
            low: rows.low,
            limits: rows.limits,
            scores: call.scores.address(),
            scale: call.scale.address(),
            skip: call.skip.address(),
            n_rows: n_rows as i32,
            n_cols: n_cols as i32,
            limit: rows.limit,
            n_planes: rows.n_planes,
        };
        let n_blocks = self.n_multiprocessors().min(n_rows.div_ceil(SCORE_ROWS)).max(1);
        // SAFETY: every length was checked above.
        unsafe { self.launch("predict_scores", [n_blocks, 1, 1], DOT_THREADS, shared_bytes, &args) }
    }

    /// Room for the down projection of `n_rows` rows to `n_cols` columns.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn down_scratch(&self, n_rows: usize, n_cols: usize) -> Result<DownScratch, CudaError> {
        let n_col_blocks = n_cols.div_ceil(DOWN_COLS);
        let n_slots = DOWN_BLOCKS_PER_SM * self.n_multiprocessors();
        // The number of chunks that takes the least time: rounds of blocks over work for each. Of equals the fewest.
        let rounds = |n_chunks: usize| (n_col_blocks * n_chunks).div_ceil(n_slots);
        let n_chunks = (1..=DOWN_CHUNKS_MAX.min(n_rows.max(1)))
            .min_by(|&a, &b| (rounds(a) * b).cmp(&(rounds(b) * a)))
            .expect("at least one chunk");
        Ok(DownScratch {
            n_cols,
            n_chunks,
            partials: self.alloc(n_chunks * n_cols * size_of::<f32>())?,
            tickets: self.alloc(n_col_blocks * size_of::<u32>())?,
        })
    }

    /// `x += sum_i h[i] * w_down_t[i]` over the rows whose h is not zero.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn down(&self, call: &DownCall<'_>) -> Result<(), CudaError> {
        let DownCall { w_down_t, scratch, .. } = call;
        let (n_rows, n_cols) = (w_down_t.n_rows, w_down_t.n_cols);
        check("down scratch columns", scratch.n_cols, n_cols)?;
        check_floats("down input", n_rows, call.h)?;
        check_floats("down output", n_cols, call.x)?;
        let n_rows_max = n_rows.div_ceil(scratch.n_chunks);
        let shared_bytes = self.check_shared(n_rows_max * 2 * 4)?;
        let args = DownArgs {
            w_down_t: w_down_t.data.address(),
            h: call.h.address(),
            x: call.x.address(),
            partials: scratch.partials.view().address(),
            tickets: scratch.tickets.view().address(),
            n_rows: n_rows as i32,
            n_cols: n_cols as i32,
            wide: w_down_t.is_wide().into(),
            dense: call.dense.into(),
            n_rows_max: n_rows_max as i32,
        };
        let kernel = format!("down_{}", w_down_t.dtype.suffix());
        let grid = [n_cols.div_ceil(DOWN_COLS), scratch.n_chunks, 1];
        // SAFETY: every length was checked above; the scratch was made for these columns.
        unsafe { self.launch(&kernel, grid, DOWN_COLS, shared_bytes, &args) }
    }

    /// `x = w[token]` for the token in `state`.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn embed(&self, w: &DeviceMatrix<'_>, state: View<'_>, x: View<'_>) -> Result<(), CudaError> {
        check_floats("embedding", w.n_cols, x)?;
        check_state(state)?;
        let args = EmbedArgs {
            w: w.data.address(),
            x: x.address(),
            state: state.address(),
            n_rows: w.n_rows as i32,
            n_cols: w.n_cols as i32,
        };
        let kernel = format!("embed_{}", w.dtype.suffix());
        // SAFETY: every length was checked above.
        unsafe { self.launch(&kernel, [w.n_cols.div_ceil(256), 1, 1], 256, 0, &args) }
    }

    /// The largest logit's id becomes the token of `state`, is noted in `ids` at the position, and the position moves
    /// on. Shapes: `logits (vocab_size,)` f32, `ids` u32, one for each position.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn greedy(&self, logits: View<'_>, ids: View<'_>, state: View<'_>) -> Result<(), CudaError> {
        check_state(state)?;
        let args = GreedyArgs {
            logits: logits.address(),
            ids: ids.address(),
            state: state.address(),
            n: (logits.len_bytes() / 4) as i32,
            n_ids: (ids.len_bytes() / 4) as i32,
        };
        // SAFETY: the kernel keeps to the lengths it is given.
        unsafe { self.launch("greedy", [1, 1, 1], 1024, 0, &args) }
    }

    /// `state` becomes `token` at `position`.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn set_state(&self, state: View<'_>, token: u32, position: usize) -> Result<(), CudaError> {
        check_state(state)?;
        let args = SetStateArgs { state: state.address(), token, position: position as u32 };
        // SAFETY: the state was checked.
        unsafe { self.launch("set_state", [1, 1, 1], 1, 0, &args) }
    }

    /// The position of `state` moves on.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn advance(&self, state: View<'_>) -> Result<(), CudaError> {
        check_state(state)?;
        // SAFETY: the state was checked.
        unsafe { self.launch("advance", [1, 1, 1], 1, 0, &state.address()) }
    }

    /// Reads all of `memory` and does nothing else, for its time.
    ///
    /// # Errors
    /// [`CudaError::Shape`] with less than 4 bytes for `sum`, which may be written.
    pub fn read_all(&self, memory: View<'_>, sum: View<'_>) -> Result<(), CudaError> {
        check("bytes of a sum", 4, sum.len_bytes())?;
        let args =
            ReadAllArgs { memory: memory.address(), sum: sum.address(), n: (memory.len_bytes() / 16) as i64 };
        let grid = [2 * self.n_multiprocessors(), 1, 1];
        // SAFETY: the kernel keeps to the lengths it is given.
        unsafe { self.launch("read_all", grid, 512, 0, &args) }
    }

    /// Blocks and shared memory of a kernel that deals `n_units` to its blocks, each of which needs `unit_bytes` of
    /// shared memory beside the vector and `more_bytes`: a block for each SM, or as many times that as memory asks for.
    fn dot_grid(
        &self,
        cut: &RowCut,
        dtype: Dtype,
        n_units: usize,
        unit_bytes: usize,
        more_bytes: usize,
    ) -> Result<(usize, usize), CudaError> {
        let fixed_bytes = cut.slot_bytes(dtype) + more_bytes;
        let shared_bytes = |n_blocks: usize| fixed_bytes + n_units.div_ceil(n_blocks) * unit_bytes;
        // Half of an SM's memory for a block, so that the next kernel's block fits beside it.
        let aim = (self.shared_bytes_max() / 2).max(fixed_bytes + 64 * unit_bytes);
        let mut n_blocks = self.n_multiprocessors().clamp(1, n_units.max(1));
        while shared_bytes(n_blocks) > aim && n_blocks < n_units {
            n_blocks = (n_blocks + self.n_multiprocessors()).min(n_units);
        }
        Ok((n_blocks, self.check_shared(shared_bytes(n_blocks))?))
    }

    pub(super) fn check_shared(&self, shared_bytes: usize) -> Result<usize, CudaError> {
        // Static shared memory takes part of what a block may have.
        let max = self.shared_bytes_max() - (10 << 10);
        if shared_bytes > max {
            return Err(CudaError::Unsupported {
                what: "bytes of shared memory for these widths",
                found: shared_bytes,
                max,
            });
        }
        Ok(shared_bytes)
    }
}

pub(super) fn same_type(what: &'static str, matrices: &[&DeviceMatrix<'_>]) -> Result<(), CudaError> {
    if matrices.iter().all(|w| w.dtype == matrices[0].dtype) {
        Ok(())
    } else {
        Err(CudaError::MixedTypes { what })
    }
}

pub(super) fn check_floats(what: &'static str, expected: usize, view: View<'_>) -> Result<(), CudaError> {
    Ok(check(what, expected * size_of::<f32>(), view.len_bytes())?)
}

pub(super) fn check_state(state: View<'_>) -> Result<(), CudaError> {
    Ok(check("bytes of a state", 8, state.len_bytes())?)
}

pub(super) fn check_cache(
    shape: &AttentionShape,
    dtype: Dtype,
    views: [View<'_>; 2],
) -> Result<(), CudaError> {
    let n_bytes = shape.n_kv_heads * shape.n_positions_max * shape.head_dim * dtype.n_bytes();
    views.into_iter().try_for_each(|view| Ok(check("bytes of keys or values", n_bytes, view.len_bytes())?))
}

/// `Activation` of common.cuh, and its threshold.
pub(super) fn activation_args(activation: Activation) -> (u32, f32) {
    match activation {
        Activation::Relu => (0, 0.0),
        Activation::FatRelu(threshold) => (1, threshold),
        Activation::Silu => (2, 0.0),
    }
}

/// `x_planes_words` of scores.cuh, in bytes: an input in 8 bits.
pub(super) fn x_planes_bytes(n_words: usize) -> usize {
    n_words.next_multiple_of(STEP_WORDS) * X_PLANES * size_of::<u32>()
}

/// `LowRank` of low_rank.cuh; all zero where there is none.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct LowRankArgs {
    pub(super) fc1: u64,
    fc2: u64,
    scales: u64,
    pub(super) rank: i32,
    pub(super) relu: u32,
}

impl LowRankArgs {
    pub(super) const NONE: Self = Self { fc1: 0, fc2: 0, scales: 0, rank: 0, relu: 0 };

    /// Checks `factors` for `n_rows` rows and `n_cols` columns.
    fn new(factors: &DeviceLowRank<'_>, n_rows: usize, n_cols: usize) -> Result<Self, CudaError> {
        let DeviceLowRank { fc1, fc2, relu, residual } = factors;
        if [fc1, fc2].iter().any(|w| w.dtype != Dtype::F16) {
            return Err(CudaError::MixedTypes { what: "factors of a predictor, f16, and these" });
        }
        check("columns of the first factor", n_cols, fc1.n_cols)?;
        check("rows of the second factor", n_rows, fc2.n_rows)?;
        check("columns of the second factor", fc1.n_rows, fc2.n_cols)?;
        check("rows of the first factor, at least one", fc1.n_rows.max(1), fc1.n_rows)?;
        check_aligned(fc1.data.address())?;
        check_aligned(fc2.data.address())?;
        if let Some(residual) = residual {
            check(
                "sign bytes",
                n_rows * n_cols.div_ceil(WARP) * size_of::<u32>(),
                residual.signs.len_bytes(),
            )?;
            check_floats("scales of a residual", n_rows, residual.scales)?;
        }
        Ok(Self {
            fc1: fc1.data.address(),
            fc2: fc2.data.address(),
            scales: residual.map_or(0, |residual| residual.scales.address()),
            rank: fc1.n_rows as i32,
            relu: (*relu).into(),
        })
    }
}

/// The rows that are read, as kernels take them.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowsArgs {
    /// `Rows` of common.cuh.
    pub(super) rows: u32,
    /// 0 where rows are not predicted by their score in planes.
    pub(super) n_planes: u32,
    /// Of W_gate, or of a residual.
    pub(super) signs: u64,
    pub(super) low: u64,
    /// Zero where one limit is that of all rows.
    pub(super) limits: u64,
    /// A threshold as its bits.
    pub(super) limit: u32,
    /// In place of a prediction.
    pub(super) mask: u64,
    pub(super) factors: LowRankArgs,
}

impl RowsArgs {
    const ALL: Self = Self {
        rows: 0,
        n_planes: 0,
        signs: 0,
        low: 0,
        limits: 0,
        limit: 0,
        mask: 0,
        factors: LowRankArgs::NONE,
    };

    /// Checks `rows` of an MLP of `n_rows` rows of `n_cols` columns.
    pub(super) fn new(rows: &DeviceRows<'_>, n_rows: usize, n_cols: usize) -> Result<Self, CudaError> {
        let n_words = n_cols.div_ceil(WARP);
        let plane_bytes = n_rows * n_words * size_of::<u32>();
        let predicted = Self { rows: 2, ..Self::ALL };
        let args = match *rows {
            DeviceRows::All => Self::ALL,
            DeviceRows::Active => Self { rows: 1, ..Self::ALL },
            DeviceRows::Predicted { signs, limits } => {
                check("sign bytes", plane_bytes, signs.len_bytes())?;
                let (limits, limit) = check_limits(limits, n_rows)?;
                Self { signs: signs.address(), limits, limit, ..predicted }
            }
            DeviceRows::Scored { planes: DevicePlanes { signs, low }, thresholds } => {
                check("sign bytes", plane_bytes, signs.len_bytes())?;
                let low_bytes = low.map_or(0, View::len_bytes);
                let n_low = low_bytes.checked_div(plane_bytes).unwrap_or(0);
                check("bytes of lower planes", n_low * plane_bytes, low_bytes)?;
                check("bit planes", (1 + n_low).min(PLANES_MAX), 1 + n_low)?;
                let (limits, limit) = check_thresholds(thresholds, n_rows)?;
                let low = low.map_or(0, View::address);
                let n_planes = 1 + n_low as u32;
                Self { n_planes, signs: signs.address(), low, limits, limit, ..predicted }
            }
            DeviceRows::LowRank { factors, thresholds } => {
                let (limits, limit) = check_thresholds(thresholds, n_rows)?;
                let signs = factors.residual.map_or(0, |residual| residual.signs.address());
                let factors = LowRankArgs::new(&factors, n_rows, n_cols)?;
                Self { signs, limits, limit, factors, ..predicted }
            }
            DeviceRows::Masked { mask } => {
                check("bytes of a mask", n_rows, mask.len_bytes())?;
                Self { mask: mask.address(), ..predicted }
            }
        };
        if n_words.is_multiple_of(4) {
            check_aligned(args.signs)?;
            check_aligned(args.low)?;
        }
        Ok(args)
    }
}

/// That 16 bytes can be read at a time from `address` on.
pub(super) fn check_aligned(address: u64) -> Result<(), CudaError> {
    match (address % 16) as usize {
        0 => Ok(()),
        found => Err(CudaError::Unsupported { what: "bytes past alignment", found, max: 0 }),
    }
}

/// Address of the rows' thresholds, or zero, and the bits of the layer's.
fn check_thresholds(thresholds: DeviceThresholds<'_>, n_rows: usize) -> Result<(u64, u32), CudaError> {
    match thresholds {
        DeviceThresholds::Layer(threshold) => Ok((0, threshold.to_bits())),
        DeviceThresholds::PerRow(thresholds) => {
            check_floats("thresholds", n_rows, thresholds)?;
            Ok((thresholds.address(), 0))
        }
    }
}

/// Address of the rows' limits, or zero, and the layer's.
pub(super) fn check_limits(limits: DeviceLimits<'_>, n_rows: usize) -> Result<(u64, u32), CudaError> {
    match limits {
        DeviceLimits::Layer(limit) => Ok((0, limit)),
        DeviceLimits::PerRow(limits) => {
            check("bytes of limits", n_rows * size_of::<u32>(), limits.len_bytes())?;
            Ok((limits.address(), 0))
        }
    }
}
