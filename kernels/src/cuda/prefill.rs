//! One checked function for each kernel over a batch of tokens: lengths and grid, then the launch.
//!
//! Inputs of products are rounded to the type of the weights ([`rounded_bytes`]); everything else is f32. Argument
//! structs mirror those at the top of each `prefill_*.cu` file, field by field.

use super::gemm::check_grid;
use super::launch::{RowsArgs, activation_args, check_cache, check_floats, check_limits, x_planes_bytes};
use super::{
    CudaError, Device, DeviceLimits, DeviceMatrix, DevicePlanes, DeviceRows, DeviceThresholds, Dtype, View,
};
use crate::shape::check;
use crate::{Activation, AttentionShape};

const THREADS: usize = 256;
/// Columns of a block that takes four for each thread.
const COLS: usize = 4 * THREADS;
/// Rows and tokens of a block of `prefill_skip` and of `prefill_skip_scores`.
const SKIP_TILE: usize = 64;
/// Head widths that `prefill_attention` has on tensor cores.
const TENSOR_HEAD_DIMS: [usize; 5] = [32, 64, 80, 96, 128];
/// Queries and keys of a block on tensor cores.
const TENSOR_TILE: usize = 64;
/// Queries of a block without.
const PLAIN_QUERIES: usize = 8;
/// Widest head without.
const PLAIN_HEAD_DIM_MAX: usize = 256;
const WARP: usize = 32;

/// Bytes of a batched input of products with weights of `dtype`: `(n_tokens, width)` of that type, and for bf16 twice,
/// the rounded values and then the rounded rests.
pub fn rounded_bytes(dtype: Dtype, n_tokens: usize, width: usize) -> usize {
    let n_planes = if dtype == Dtype::Bf16 { 2 } else { 1 };
    n_planes * n_tokens * width * dtype.n_bytes()
}

/// Bytes of the planes of [`Quantised`] for `n_tokens` inputs of `n_cols` columns.
pub fn quantised_bytes(n_tokens: usize, n_cols: usize) -> usize {
    n_tokens * x_planes_bytes(n_cols.div_ceil(WARP))
}

/// Inputs of a batch in 8 bits, for scores of rows.
#[derive(Clone, Copy, Debug)]
pub struct Quantised<'a> {
    /// In the order of scores.cuh, [`quantised_bytes`] of them.
    pub planes: View<'a>,
    /// `127 / max |x|` of each input or 0, `(n_tokens,)` f32.
    pub scales: View<'a>,
}

/// Rows of f32 that may lie apart, such as the queries in a product with stacked weights.
#[derive(Clone, Copy, Debug)]
pub struct FloatRows<'a> {
    data: View<'a>,
    first_col: usize,
    n_rows: usize,
    n_cols: usize,
    stride: usize,
}

impl<'a> FloatRows<'a> {
    /// All of `data`, `(n_rows, n_cols)`.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when the length does not fit.
    pub fn new(data: View<'a>, n_rows: usize, n_cols: usize) -> Result<Self, CudaError> {
        check_floats("rows", n_rows * n_cols, data)?;
        Ok(Self { data, first_col: 0, n_rows, n_cols, stride: n_cols })
    }

    /// Columns `first_col..first_col + n_cols` of every row.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn columns(self, first_col: usize, n_cols: usize) -> Self {
        assert!(first_col + n_cols <= self.n_cols, "columns {first_col} + {n_cols} of {}", self.n_cols);
        Self { first_col: self.first_col + first_col, n_cols, ..self }
    }

    fn address(&self) -> u64 {
        self.data.address() + (self.first_col * size_of::<f32>()) as u64
    }

    fn check(&self, what: &'static str, n_rows: usize, n_cols: usize) -> Result<(), CudaError> {
        check(what, n_rows, self.n_rows)?;
        Ok(check(what, n_cols, self.n_cols)?)
    }
}

/// RMSNorm of a batch.
#[derive(Clone, Copy, Debug)]
pub struct PrefillNormCall<'a> {
    /// `(n_tokens, n_cols)` f32.
    pub x: View<'a>,
    /// `(n_cols,)` f32.
    pub weight: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// Tokens.
    pub n_tokens: usize,
    /// Type of the weights that read the result.
    pub dtype: Dtype,
    /// `(n_tokens, n_cols)`, rounded; written.
    pub out: View<'a>,
    /// Sign words of the result, `(n_tokens, ceil(n_cols / 32))` u32; written.
    pub signs: Option<View<'a>>,
}

/// Rotation of queries and keys, and the way of keys and values into the cache.
#[derive(Clone, Copy, Debug)]
pub struct PrefillRopeCall<'a> {
    /// Heads and cache.
    pub shape: AttentionShape,
    /// Tokens.
    pub n_tokens: usize,
    /// Position of the first.
    pub first_position: usize,
    /// `(n_tokens, n_heads * head_dim)`.
    pub q: FloatRows<'a>,
    /// `(n_tokens, n_kv_heads * head_dim)`.
    pub k: FloatRows<'a>,
    /// `(n_tokens, n_kv_heads * head_dim)`.
    pub v: FloatRows<'a>,
    /// `(n_positions_max, head_dim / 2)` f32.
    pub cos: View<'a>,
    /// `(n_positions_max, head_dim / 2)` f32.
    pub sin: View<'a>,
    /// Element type of the cache, f16 or f32.
    pub cache: Dtype,
    /// Rotated queries, `(n_tokens, n_heads, head_dim)` of the cache's type; written.
    pub rotated: View<'a>,
    /// Keys of the layer, `(n_kv_heads, n_positions_max, head_dim)`; `n_tokens` positions written.
    pub k_cache: View<'a>,
    /// Values of the layer, likewise.
    pub v_cache: View<'a>,
}

/// Causal attention of a batch.
#[derive(Clone, Copy, Debug)]
pub struct PrefillAttentionCall<'a> {
    /// Heads and cache.
    pub shape: AttentionShape,
    /// Tokens.
    pub n_tokens: usize,
    /// Position of the first.
    pub first_position: usize,
    /// Rotated queries, `(n_tokens, n_heads, head_dim)` of the cache's type.
    pub q: View<'a>,
    /// Keys of the layer, `(n_kv_heads, n_positions_max, head_dim)`, those of this batch among them.
    pub k_cache: View<'a>,
    /// Values of the layer, likewise.
    pub v_cache: View<'a>,
    /// Type of the weights that read the result; the cache is of [`Dtype::cache`].
    pub dtype: Dtype,
    /// `(n_tokens, n_heads * head_dim)`, rounded; written.
    pub out: View<'a>,
}

/// What stands between the products of a batched MLP.
#[derive(Clone, Copy, Debug)]
pub struct PrefillGatedCall<'a> {
    /// `(n_tokens, n_rows)`.
    pub gate: FloatRows<'a>,
    /// `(n_tokens, n_rows)`; its rows lie as far apart as those of `gate`.
    pub up: FloatRows<'a>,
    /// Of the gate.
    pub activation: Activation,
    /// Rows left out, `(n_tokens, n_rows)` u8, not zero where they are.
    pub skip: Option<View<'a>>,
    /// Type of the weights that read the result.
    pub dtype: Dtype,
    /// `(n_tokens, n_rows)`, rounded; written.
    pub h: View<'a>,
}

/// The predictor over a batch.
#[derive(Clone, Copy, Debug)]
pub struct PrefillSkipCall<'a> {
    /// Tokens.
    pub n_tokens: usize,
    /// Rows of the gate.
    pub n_rows: usize,
    /// Sign words of a row.
    pub n_words: usize,
    /// Signs of the batch, `(n_tokens, n_words)` u32.
    pub x_signs: View<'a>,
    /// Signs of W_gate, `(n_rows, n_words)` u32.
    pub w_signs: View<'a>,
    /// Limits on n_neg.
    pub limits: DeviceLimits<'a>,
    /// `(n_tokens, n_rows)` u8; written.
    pub skip: View<'a>,
}

/// RMSNorm of every token, in 8 bits.
#[derive(Clone, Copy, Debug)]
pub struct PrefillQuantiseCall<'a> {
    /// `(n_tokens, n_cols)` f32.
    pub x: View<'a>,
    /// `(n_cols,)` f32.
    pub weight: View<'a>,
    /// Of the norm.
    pub eps: f32,
    /// Tokens.
    pub n_tokens: usize,
    /// Written.
    pub out: Quantised<'a>,
}

/// The predictor of scores over a batch.
#[derive(Clone, Copy, Debug)]
pub struct PrefillSkipScoresCall<'a> {
    /// Tokens.
    pub n_tokens: usize,
    /// Rows of the gate.
    pub n_rows: usize,
    /// Columns of the gate.
    pub n_cols: usize,
    /// The batch.
    pub x: Quantised<'a>,
    /// W_gate.
    pub planes: DevicePlanes<'a>,
    /// Thresholds on the score.
    pub thresholds: DeviceThresholds<'a>,
    /// `(n_tokens, n_rows)` u8; written.
    pub skip: View<'a>,
}

#[repr(C)]
struct PrefillEmbedArgs {
    tokens: u64,
    w: u64,
    x: u64,
    n_rows: i32,
    n_cols: i32,
}

#[repr(C)]
struct PrefillNormArgs {
    x: u64,
    weight: u64,
    out: u64,
    signs: u64,
    n_tokens: i32,
    n_cols: i32,
    eps: f32,
}

#[repr(C)]
struct PrefillRopeArgs {
    q: u64,
    k: u64,
    v: u64,
    cos: u64,
    sin: u64,
    rotated: u64,
    k_cache: u64,
    v_cache: u64,
    q_stride: i64,
    k_stride: i64,
    v_stride: i64,
    n_heads: i32,
    n_kv_heads: i32,
    head_dim: i32,
    n_positions_max: i32,
    first_position: i32,
}

#[repr(C)]
struct PrefillAttentionArgs {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    n_tokens: i32,
    n_heads: i32,
    n_kv_heads: i32,
    head_dim: i32,
    n_positions_max: i32,
    first_position: i32,
    scale: f32,
}

#[repr(C)]
struct PrefillGatedArgs {
    gate: u64,
    up: u64,
    skip: u64,
    h: u64,
    stride: i64,
    n_tokens: i32,
    n_rows: i32,
    activation: u32,
    threshold: f32,
}

#[repr(C)]
struct PrefillSkipArgs {
    x_signs: u64,
    w_signs: u64,
    limits: u64,
    skip: u64,
    n_tokens: i32,
    n_rows: i32,
    n_words: i32,
    limit: u32,
}

#[repr(C)]
struct PrefillQuantiseArgs {
    x: u64,
    weight: u64,
    planes: u64,
    scales: u64,
    n_cols: i32,
    eps: f32,
}

#[repr(C)]
struct PrefillSkipScoresArgs {
    planes: u64,
    scales: u64,
    signs: u64,
    low: u64,
    limits: u64,
    skip: u64,
    n_tokens: i32,
    n_rows: i32,
    n_words: i32,
    limit: u32,
    n_planes: u32,
}

impl Quantised<'_> {
    pub(super) fn check(&self, n_tokens: usize, n_cols: usize) -> Result<(), CudaError> {
        check("bytes of inputs in 8 bits", quantised_bytes(n_tokens, n_cols), self.planes.len_bytes())?;
        check_floats("scales of inputs", n_tokens, self.scales)
    }
}

impl Device {
    /// `x[t] = w[tokens[t]]`. Shapes: `tokens (n_tokens,)` u32, `x (n_tokens, n_cols)` f32. A token outside of `w`
    /// reads its last row.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn prefill_embed(
        &self,
        w: &DeviceMatrix<'_>,
        tokens: View<'_>,
        x: View<'_>,
    ) -> Result<(), CudaError> {
        let n_tokens = tokens.len_bytes() / size_of::<u32>();
        check("bytes of tokens", n_tokens * size_of::<u32>(), tokens.len_bytes())?;
        check_floats("embedded batch", n_tokens * w.n_cols(), x)?;
        let args = PrefillEmbedArgs {
            tokens: tokens.address(),
            w: w.data().address(),
            x: x.address(),
            n_rows: w.n_rows() as i32,
            n_cols: w.n_cols() as i32,
        };
        // SAFETY: every length was checked above; the kernel keeps to the rows of w.
        unsafe { self.launch_rows("prefill_embed", w.dtype(), w.n_cols(), n_tokens, &args) }
    }

    /// `out = rmsnorm(x)` of every token, and its signs.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn prefill_norm(&self, call: &PrefillNormCall<'_>) -> Result<(), CudaError> {
        let n_tokens = call.n_tokens;
        let n_cols = call.weight.len_bytes() / size_of::<f32>();
        check_floats("norm weight", n_cols, call.weight)?;
        check_floats("norm input", n_tokens * n_cols, call.x)?;
        check("norm output bytes", rounded_bytes(call.dtype, n_tokens, n_cols), call.out.len_bytes())?;
        if let Some(signs) = call.signs {
            check("bytes of signs", n_tokens * n_cols.div_ceil(WARP) * size_of::<u32>(), signs.len_bytes())?;
        }
        if n_tokens == 0 {
            return Ok(());
        }
        let args = PrefillNormArgs {
            x: call.x.address(),
            weight: call.weight.address(),
            out: call.out.address(),
            signs: call.signs.map_or(0, View::address),
            n_tokens: n_tokens as i32,
            n_cols: n_cols as i32,
            eps: call.eps,
        };
        let kernel = format!("prefill_norm_{}", call.dtype.suffix());
        // SAFETY: every length was checked above.
        unsafe { self.launch(&kernel, [n_tokens, 1, 1], THREADS, 0, &args) }
    }

    /// Rotates queries and keys, and appends keys and values to the cache.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn prefill_rope(&self, call: &PrefillRopeCall<'_>) -> Result<(), CudaError> {
        let PrefillRopeCall { shape, n_tokens, cache, .. } = *call;
        let AttentionShape { n_heads, n_kv_heads, head_dim, n_positions_max } = shape;
        check("head_dim, even", head_dim / 2 * 2, head_dim)?;
        check_positions(&shape, call.first_position, n_tokens)?;
        call.q.check("query rows and columns", n_tokens, n_heads * head_dim)?;
        call.k.check("key rows and columns", n_tokens, n_kv_heads * head_dim)?;
        call.v.check("value rows and columns", n_tokens, n_kv_heads * head_dim)?;
        for angles in [call.cos, call.sin] {
            check_floats("rope angles", n_positions_max * head_dim / 2, angles)?;
        }
        check_queries(&shape, cache, n_tokens, call.rotated)?;
        check_cache(&shape, cache, [call.k_cache, call.v_cache])?;
        let args = PrefillRopeArgs {
            q: call.q.address(),
            k: call.k.address(),
            v: call.v.address(),
            cos: call.cos.address(),
            sin: call.sin.address(),
            rotated: call.rotated.address(),
            k_cache: call.k_cache.address(),
            v_cache: call.v_cache.address(),
            q_stride: call.q.stride as i64,
            k_stride: call.k.stride as i64,
            v_stride: call.v.stride as i64,
            n_heads: n_heads as i32,
            n_kv_heads: n_kv_heads as i32,
            head_dim: head_dim as i32,
            n_positions_max: n_positions_max as i32,
            first_position: call.first_position as i32,
        };
        let n_pairs = (n_heads + 2 * n_kv_heads) * head_dim / 2;
        // SAFETY: every length was checked above.
        unsafe { self.launch_rows("prefill_rope", cache.cache(), n_pairs, n_tokens, &args) }
    }

    /// Attention of every token of the batch over the positions up to its own.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn prefill_attention(&self, call: &PrefillAttentionCall<'_>) -> Result<(), CudaError> {
        let PrefillAttentionCall { shape, n_tokens, dtype, .. } = *call;
        let AttentionShape { n_heads, n_kv_heads, head_dim, n_positions_max } = shape;
        check("query heads of whole groups", n_heads / n_kv_heads * n_kv_heads, n_heads)?;
        check_positions(&shape, call.first_position, n_tokens)?;
        check_queries(&shape, dtype.cache(), n_tokens, call.q)?;
        check_cache(&shape, dtype.cache(), [call.k_cache, call.v_cache])?;
        let out_bytes = rounded_bytes(dtype, n_tokens, n_heads * head_dim);
        check("attention output bytes", out_bytes, call.out.len_bytes())?;
        check_grid("query heads", n_heads, 1)?;
        if n_tokens == 0 {
            return Ok(());
        }
        let args = PrefillAttentionArgs {
            q: call.q.address(),
            k: call.k_cache.address(),
            v: call.v_cache.address(),
            out: call.out.address(),
            n_tokens: n_tokens as i32,
            n_heads: n_heads as i32,
            n_kv_heads: n_kv_heads as i32,
            head_dim: head_dim as i32,
            n_positions_max: n_positions_max as i32,
            first_position: call.first_position as i32,
            scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
        };
        let aligned = [call.q, call.k_cache, call.v_cache].iter().all(|view| view.address() % 16 == 0);
        let (kernel, tile, n_threads, shared_bytes) =
            if dtype != Dtype::F32 && aligned && TENSOR_HEAD_DIMS.contains(&head_dim) {
                // Two tiles of keys and two of values, as `AttentionTiles` lays them out.
                let shared_bytes = 4 * TENSOR_TILE * (head_dim + 8) * Dtype::F16.n_bytes();
                let kernel = format!("prefill_attention_{}_{head_dim}", dtype.suffix());
                (kernel, TENSOR_TILE, 2 * TENSOR_TILE, shared_bytes)
            } else if head_dim <= PLAIN_HEAD_DIM_MAX {
                (format!("prefill_attention_plain_{}", dtype.suffix()), PLAIN_QUERIES, THREADS, 0)
            } else {
                return Err(CudaError::Unsupported {
                    what: "head_dim",
                    found: head_dim,
                    max: PLAIN_HEAD_DIM_MAX,
                });
            };
        let grid = [n_tokens.div_ceil(tile), n_heads, 1];
        // SAFETY: every length was checked above.
        unsafe { self.launch(&kernel, grid, n_threads, shared_bytes, &args) }
    }

    /// `h = act(gate) * up`, zero where a row is left out.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn prefill_gated(&self, call: &PrefillGatedCall<'_>) -> Result<(), CudaError> {
        let FloatRows { n_rows: n_tokens, n_cols: n_rows, stride, .. } = call.gate;
        call.up.check("up rows and columns", n_tokens, n_rows)?;
        check("distance of up rows", stride, call.up.stride)?;
        if let Some(skip) = call.skip {
            check("bytes of rows left out", n_tokens * n_rows, skip.len_bytes())?;
        }
        check("bytes of h", rounded_bytes(call.dtype, n_tokens, n_rows), call.h.len_bytes())?;
        let (activation, threshold) = activation_args(call.activation);
        let args = PrefillGatedArgs {
            gate: call.gate.address(),
            up: call.up.address(),
            skip: call.skip.map_or(0, View::address),
            h: call.h.address(),
            stride: stride as i64,
            n_tokens: n_tokens as i32,
            n_rows: n_rows as i32,
            activation,
            threshold,
        };
        // SAFETY: every length was checked above.
        unsafe { self.launch_rows("prefill_gated", call.dtype, n_rows, n_tokens, &args) }
    }

    /// `skip[t, row] = n_neg(t, row) > limit(row)`.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn prefill_skip(&self, call: &PrefillSkipCall<'_>) -> Result<(), CudaError> {
        let PrefillSkipCall { n_tokens, n_rows, n_words, .. } = *call;
        check("bytes of signs of a batch", n_tokens * n_words * size_of::<u32>(), call.x_signs.len_bytes())?;
        check("sign bytes", n_rows * n_words * size_of::<u32>(), call.w_signs.len_bytes())?;
        check("bytes of rows left out", n_tokens * n_rows, call.skip.len_bytes())?;
        let (limits, limit) = check_limits(call.limits, n_rows)?;
        let grid = [n_rows.div_ceil(SKIP_TILE), n_tokens.div_ceil(SKIP_TILE), 1];
        check_grid("tokens of a batch", grid[1], SKIP_TILE)?;
        if n_tokens == 0 || n_rows == 0 {
            return Ok(());
        }
        let args = PrefillSkipArgs {
            x_signs: call.x_signs.address(),
            w_signs: call.w_signs.address(),
            limits,
            skip: call.skip.address(),
            n_tokens: n_tokens as i32,
            n_rows: n_rows as i32,
            n_words: n_words as i32,
            limit,
        };
        // SAFETY: every length was checked above.
        unsafe { self.launch("prefill_skip", grid, THREADS, 0, &args) }
    }

    /// `out = rmsnorm(x)` of every token, in 8 bits.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn prefill_quantise(&self, call: &PrefillQuantiseCall<'_>) -> Result<(), CudaError> {
        let n_cols = call.weight.len_bytes() / size_of::<f32>();
        check_floats("norm weight", n_cols, call.weight)?;
        check_floats("norm input", call.n_tokens * n_cols, call.x)?;
        call.out.check(call.n_tokens, n_cols)?;
        if call.n_tokens == 0 {
            return Ok(());
        }
        let args = PrefillQuantiseArgs {
            x: call.x.address(),
            weight: call.weight.address(),
            planes: call.out.planes.address(),
            scales: call.out.scales.address(),
            n_cols: n_cols as i32,
            eps: call.eps,
        };
        // SAFETY: every length was checked above.
        unsafe { self.launch("prefill_quantise", [call.n_tokens, 1, 1], THREADS, 0, &args) }
    }

    /// `skip[t, row] = score(t, row) < threshold(row) * scale(t)`.
    ///
    /// # Errors
    /// [`CudaError::Shape`], [`CudaError::Unsupported`].
    pub fn prefill_skip_scores(&self, call: &PrefillSkipScoresCall<'_>) -> Result<(), CudaError> {
        let PrefillSkipScoresCall { n_tokens, n_rows, n_cols, planes, thresholds, .. } = *call;
        let n_words = n_cols.div_ceil(WARP);
        call.x.check(n_tokens, n_cols)?;
        check("bytes of rows left out", n_tokens * n_rows, call.skip.len_bytes())?;
        let rows = RowsArgs::new(&DeviceRows::Scored { planes, thresholds }, n_rows, n_cols)?;
        let grid = [n_rows.div_ceil(SKIP_TILE), n_tokens.div_ceil(SKIP_TILE), 1];
        check_grid("tokens of a batch", grid[1], SKIP_TILE)?;
        if n_tokens == 0 || n_rows == 0 {
            return Ok(());
        }
        let args = PrefillSkipScoresArgs {
            planes: call.x.planes.address(),
            scales: call.x.scales.address(),
            signs: rows.signs,
            low: rows.low,
            limits: rows.limits,
            skip: call.skip.address(),
            n_tokens: n_tokens as i32,
            n_rows: n_rows as i32,
            n_words: n_words as i32,
            limit: rows.limit,
            n_planes: rows.n_planes,
        };
        // SAFETY: every length was checked above.
        unsafe { self.launch("prefill_skip_scores", grid, THREADS, 0, &args) }
    }

    /// Launches `kernel` of type `dtype` over `n_cols` columns of `n_tokens` tokens.
    ///
    /// # Safety
    /// As [`Device::launch`].
    unsafe fn launch_rows<A>(
        &self,
        kernel: &str,
        dtype: Dtype,
        n_cols: usize,
        n_tokens: usize,
        args: &A,
    ) -> Result<(), CudaError> {
        check_grid("tokens of a batch", n_tokens, 1)?;
        if n_tokens == 0 || n_cols == 0 {
            return Ok(());
        }
        let kernel = format!("{kernel}_{}", dtype.suffix());
        // SAFETY: the caller's promise.
        unsafe { self.launch(&kernel, [n_cols.div_ceil(COLS), n_tokens, 1], THREADS, 0, args) }
    }
}

fn check_positions(shape: &AttentionShape, first_position: usize, n_tokens: usize) -> Result<(), CudaError> {
    let needed = first_position + n_tokens;
    Ok(check("positions of the cache", needed.max(shape.n_positions_max), shape.n_positions_max)?)
}

fn check_queries(
    shape: &AttentionShape,
    cache: Dtype,
    n_tokens: usize,
    queries: View<'_>,
) -> Result<(), CudaError> {
    let n_bytes = n_tokens * shape.n_heads * shape.head_dim * cache.n_bytes();
    Ok(check("bytes of rotated queries", n_bytes, queries.len_bytes())?)
}
