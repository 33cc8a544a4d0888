//! A whole token in one kernel (decode.cu): what it needs, how its work is cut, and its launch.

use std::array;

use super::launch::{
    LowRankArgs, RowsArgs, check_aligned, check_cache, check_floats, check_state, same_type, x_planes_bytes,
};
use super::{Buffer, CudaError, Device, DeviceMatrix, DeviceRows, MlpTrace, View};
use crate::shape::{DOT_CHAINS, DOT_SEGMENT, check};
use crate::{Activation, AttentionShape, PLANES_MAX};

/// Warps that compute, and all: of the others one loads.
const WARPS: usize = 8;
const BLOCK_WARPS: usize = WARPS + 4;
const WARP: usize = 32;
/// Columns of a vector that the threads of a block load at a time, four each.
const LOAD_COLS: usize = 4 * WARPS * WARP;
/// How many times they do, by kernel: the first that has room for the widest vector. Of f32 there is the last alone.
const VEC_LOADS: [usize; 5] = [1, 2, 4, 5, 8];
const D_MAX: usize = VEC_LOADS[VEC_LOADS.len() - 1] * LOAD_COLS;
const LAYERS_MAX: usize = 128;
/// Most slots of the ring, and bytes that its slots begin at a multiple of.
const SLOTS_MAX: usize = 64;
const RING_ALIGN: usize = 128;
/// Bytes that a block has on their way through the ring, enough for an H100's bandwidth and latency, but no fewer rows than
/// a product takes; and where nobody waits for them yet, so that what the block does wait for does not come behind them.
const IN_FLIGHT_BYTES: usize = 64 << 10;
const IN_FLIGHT_IDLE_BYTES: usize = 24 << 10;
/// Bytes of the next layer that a block asks L2 for while memory has nothing to do.
const AHEAD_BYTES: usize = 48 << 10;
/// Most rows of a product, and columns of a warp's chunk of the vector.
const PRODUCT_ROWS: usize = 8;
const CHUNK_COLS: usize = 128;
/// Rows of sign words in a slot.
const UNIT_ROWS: usize = 16;
/// Most rows whose partial sums are kept at a time, those of a product for each warp.
const TILE_ROWS_MAX: usize = 256;
/// Most chunks of positions: every block merges all.
const SPLITS_MAX: usize = 16;
/// Shared memory that the compiler lays out itself.
const STATIC_BYTES: usize = 2 << 10;

/// What a token's clocks are spent on, in the order of `Step` of decode.cu. A wait is for the other blocks.
pub const DECODE_STEPS: [&str; 20] = [
    "norm of qkv",
    "qkv",
    "wait for qkv",
    "attention",
    "wait for attention",
    "merge of attention",
    "output",
    "wait for output",
    "norm of MLP",
    "predictor",
    "MLP, all gate rows",
    "MLP, kept gate rows",
    "MLP, active up rows",
    "down",
    "wait for down",
    "sum of down",
    "wait for x",
    "norm of lm_head",
    "lm_head",
    "next token",
];

/// The steps of [`DECODE_STEPS`] that read weights or the cache, as indexes into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadingStep {
    /// Rows of q, k and v.
    Qkv = 1,
    /// Keys and values of the positions so far.
    Attention = 3,
    /// Rows of the projection after attention.
    Output = 6,
    /// Sign words or planes of W_gate.
    Predictor = 9,
    /// All rows of W_gate; where a layer reads every row, those of W_up as well.
    AllGateRows = 10,
    /// Rows of W_gate that the predictor keeps.
    KeptGateRows = 11,
    /// Rows of W_up whose activation is not zero.
    ActiveUpRows = 12,
    /// Rows of W_down of the same neurons.
    Down = 13,
    /// All rows of lm_head.
    LmHead = 18,
}

/// Microseconds that one step of a token takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTime {
    /// Over all blocks.
    pub mean_us: f64,
    /// Of the block that spent the least.
    pub lowest_us: f64,
    /// Of the block that spent the most.
    pub highest_us: f64,
}

/// The time of each step by `clocks`, those of [`DecodeCall::clocks`] after any number of tokens: scaled so that the
/// means add up to `token_us`. All 0 where no clock was counted.
pub fn step_times(clocks: &[u64], token_us: f64) -> [StepTime; DECODE_STEPS.len()] {
    let n_blocks = clocks.len() as f64 / DECODE_STEPS.len() as f64;
    let total: u64 = clocks.iter().sum();
    if total == 0 {
        return Default::default();
    }
    let us_per_clock = token_us * n_blocks / total as f64;
    array::from_fn(|step| {
        let of_blocks = || clocks.iter().skip(step).step_by(DECODE_STEPS.len());
        let us = |clocks: u64| clocks as f64 * us_per_clock;
        StepTime {
            mean_us: us(of_blocks().sum()) / n_blocks,
            lowest_us: us(of_blocks().min().copied().unwrap_or(0)),
            highest_us: us(of_blocks().max().copied().unwrap_or(0)),
        }
    })
}

/// One layer's weights and cache.
#[derive(Clone, Copy, Debug)]
pub struct DecodeLayer<'a> {
    /// `(n_heads * head_dim, d)`.
    pub w_q: DeviceMatrix<'a>,
    /// `(n_kv_heads * head_dim, d)`.
    pub w_k: DeviceMatrix<'a>,
    /// `(n_kv_heads * head_dim, d)`.
    pub w_v: DeviceMatrix<'a>,
    /// `(d, n_heads * head_dim)`.
    pub w_o: DeviceMatrix<'a>,
    /// `(f, d)`.
    pub w_gate: DeviceMatrix<'a>,
    /// `(f, d)`.
    pub w_up: DeviceMatrix<'a>,
    /// `(f, d)`.
    pub w_down_t: DeviceMatrix<'a>,
    /// Rows of the MLP that are read.
    pub rows: DeviceRows<'a>,
    /// RMSNorm weight before attention, `(d,)` f32.
    pub attn_norm: View<'a>,
    /// RMSNorm weight before the MLP, `(d,)` f32.
    pub mlp_norm: View<'a>,
    /// Keys, `(n_kv_heads, n_positions_max, head_dim)` of [`super::Dtype::cache`]; one position written.
    pub keys: View<'a>,
    /// Values, likewise.
    pub values: View<'a>,
}

/// One token through all layers.
#[derive(Clone, Debug)]
pub struct DecodeCall<'a> {
    /// Heads and cache.
    pub shape: AttentionShape,
    /// `(vocab_size, d)`.
    pub embedding: DeviceMatrix<'a>,
    /// `(vocab_size, d)`.
    pub lm_head: DeviceMatrix<'a>,
    /// RMSNorm weight before lm_head, `(d,)` f32.
    pub final_norm: View<'a>,
    /// In order.
    pub layers: &'a [DecodeLayer<'a>],
    /// `(n_positions_max, head_dim / 2)` f32.
    pub cos: View<'a>,
    /// `(n_positions_max, head_dim / 2)` f32.
    pub sin: View<'a>,
    /// What stands between gate and up.
    pub activation: Activation,
    /// Epsilon of the norms.
    pub eps: f32,
    /// Token and position, two u32; the position moves on, the token too if `greedy`.
    pub state: View<'a>,
    /// The token that followed each position, u32; written.
    pub ids: View<'a>,
    /// `(vocab_size,)` f32; written.
    pub logits: View<'a>,
    /// `(n_layers, 2)` u64: rows kept and rows active; added to.
    pub counts: View<'a>,
    /// The largest logit's id (the smallest id among equals) becomes the token.
    pub greedy: bool,
    /// Clocks of each block by step, `(DecodeScratch::n_blocks, DECODE_STEPS)` u64; added to.
    pub clocks: Option<View<'a>>,
    /// What an audit looks at.
    pub trace: Option<MlpTrace<'a>>,
    /// Room for what passes between blocks.
    pub scratch: &'a DecodeScratch,
}

/// Buffers of [`Device::decode`], made once per session.
#[derive(Debug)]
pub struct DecodeScratch {
    plan: Plan,
    x_out: Buffer,
    q: Buffer,
    part_sums: Buffer,
    part_maxima: Buffer,
    down_parts: Buffer,
    inner: Buffer,
    best: Buffer,
    sync: Buffer,
}

/// How the work is cut; the same for every token.
#[derive(Clone, Copy, Debug)]
struct Plan {
    shape: AttentionShape,
    d: usize,
    f: usize,
    /// One of [`VEC_LOADS`].
    vec_loads: usize,
    head_lanes: usize,
    n_splits_max: usize,
    slot_bytes: usize,
    n_slots: usize,
    product_rows: usize,
    vec_floats: usize,
    tile_rows: usize,
    own_cols: usize,
    list_rows: usize,
    rank_max: usize,
    ringed_signs: bool,
    n_blocks: usize,
    shared_bytes: usize,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct LayerArgs {
    w_q: u64,
    w_k: u64,
    w_v: u64,
    w_o: u64,
    w_gate: u64,
    w_up: u64,
    w_down_t: u64,
    signs: u64,
    low: u64,
    limits: u64,
    attn_norm: u64,
    mlp_norm: u64,
    keys: u64,
    values: u64,
    limit: u32,
    rows: u32,
    n_planes: u32,
    factors: LowRankArgs,
}

#[repr(C)]
struct DecodeArgs {
    embedding: u64,
    lm_head: u64,
    final_norm: u64,
    cos: u64,
    sin: u64,
    state: u64,
    ids: u64,
    x_out: u64,
    q: u64,
    part_sums: u64,
    part_maxima: u64,
    down_parts: u64,
    inner: u64,
    logits: u64,
    best: u64,
    sync: u64,
    counts: u64,
    clocks: u64,
    d: i32,
    q_cols: i32,
    n_layers: i32,
    n_heads: i32,
    n_kv_heads: i32,
    head_dim: i32,
    head_lanes: i32,
    n_splits_max: i32,
    n_rows: i32,
    vocab_size: i32,
    n_positions_max: i32,
    n_ids: i32,
    slot_bytes: i32,
    n_slots: i32,
    in_flight: i32,
    in_flight_idle: i32,
    ahead_rows: i32,
    product_rows: i32,
    vec_floats: i32,
    tile_rows: i32,
    own_cols: i32,
    list_rows: i32,
    ringed_signs: i32,
    greedy: i32,
    activation: u32,
    threshold: f32,
    eps: f32,
    scale: f32,
    heads_per_pair: f32,
    mlp_x: u64,
    mlp_h: u64,
    mlp_skip: u64,
    layers: [LayerArgs; LAYERS_MAX],
}

/// `Vector` of vector.cuh: 16-bit types hold three terms, each half a line of [`RING_ALIGN`] bytes after the last.
fn vector_bytes(n_cols: usize, element_bytes: usize) -> usize {
    let n_terms = if element_bytes == 2 { 3 } else { 1 };
    n_terms * (n_cols.next_multiple_of(CHUNK_COLS) * element_bytes + RING_ALIGN / 2)
}

impl Plan {
    /// `None` where rows do not divide into 16-byte pieces, or shared memory has no room for a few rows.
    fn new(
        device: &Device,
        shape: &AttentionShape,
        d: usize,
        f: usize,
        rank_max: usize,
        element_bytes: usize,
    ) -> Option<Self> {
        let q_cols = shape.n_heads * shape.head_dim;
        let widest = d.max(q_cols);
        let divides = [d, q_cols].iter().all(|n_cols| (n_cols * element_bytes).is_multiple_of(16));
        if !divides || !shape.head_dim.is_multiple_of(8) || shape.head_dim > 8 * WARP {
            return None;
        }
        let has_room = |loads: &usize| {
            widest <= loads * LOAD_COLS && (element_bytes == 2 || *loads * LOAD_COLS == D_MAX)
        };
        let vec_loads = VEC_LOADS.into_iter().find(has_room)?;
        let head_lanes = (shape.head_dim / 8).next_power_of_two();
        let n_blocks = device.n_multiprocessors();
        let attention_bytes = (WARPS * head_lanes * 8 + 2 * WARPS) * size_of::<f32>();
        let vec_bytes = vector_bytes(widest, element_bytes).max(attention_bytes).next_multiple_of(16);
        let n_pairs = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim / 2;
        let n_splits_max = (n_blocks / shape.n_kv_heads).clamp(1, SPLITS_MAX);
        // The weights of attention's chunks lie there as well, before a maximum and a total for each, and where rows are
        // predicted by factors, the terms of a product with the first and their sums, and then all such products.
        let chunk_floats = 3 * shape.n_heads * n_splits_max + 1;
        let product_floats = d + d.div_ceil(DOT_SEGMENT) * DOT_CHAINS;
        let shared_floats =
            if rank_max > 0 { chunk_floats.max(product_floats).max(rank_max) } else { chunk_floats };
        let tile_rows = (2 * n_pairs.max(f).div_ceil(n_blocks).clamp(WARP / 2, TILE_ROWS_MAX / 2))
            .max(shared_floats.div_ceil(WARPS).next_multiple_of(2));
        let own_cols = d.div_ceil(n_blocks).next_multiple_of(4);
        let list_rows = f.div_ceil(n_blocks).next_multiple_of(4);
        let row_bytes = d.div_ceil(WARP) * 4;
        let slot_bytes = (widest * element_bytes).max(UNIT_ROWS * row_bytes).next_multiple_of(RING_ALIGN);
        let lists_bytes = (tile_rows * WARPS + own_cols + 4 * list_rows) * size_of::<f32>();
        // The ring begins at its first multiple of RING_ALIGN after the rest.
        let fixed_bytes = vec_bytes + lists_bytes + x_planes_bytes(d.div_ceil(WARP)) + RING_ALIGN;
        let ring_bytes = device.shared_bytes_max().checked_sub(STATIC_BYTES + fixed_bytes)?;
        let n_slots = (ring_bytes / slot_bytes).min(SLOTS_MAX);
        // All planes of a unit lie there at once.
        (n_slots >= PLANES_MAX).then(|| Self {
            shape: *shape,
            d,
            f,
            vec_loads,
            head_lanes,
            n_splits_max,
            slot_bytes,
            n_slots,
            product_rows: (n_slots / 2).min(PRODUCT_ROWS),
            vec_floats: vec_bytes / size_of::<f32>(),
            tile_rows,
            own_cols,
            list_rows,
            rank_max,
            ringed_signs: row_bytes.is_multiple_of(16),
            n_blocks,
            shared_bytes: fixed_bytes + n_slots * slot_bytes,
        })
    }

    /// Slots for so many bytes, at most all.
    fn rows_of(&self, n_bytes: usize) -> usize {
        n_bytes.div_ceil(self.slot_bytes).min(self.n_slots)
    }
}

impl DecodeScratch {
    /// Blocks of the kernel, each with clocks of its own.
    pub fn n_blocks(&self) -> usize {
        self.plan.n_blocks
    }
}

impl Device {
    /// Room for tokens of `shape` over `d` inputs, `f` neurons and weights of `element_bytes` each, with predictors of at
    /// most rank `rank_max`, 0 for none; `None` where the kernel does not take these widths, and a token is a run of the
    /// single kernels.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn decode_scratch(
        &self,
        shape: &AttentionShape,
        d: usize,
        f: usize,
        rank_max: usize,
        element_bytes: usize,
    ) -> Result<Option<DecodeScratch>, CudaError> {
        let Some(plan) = Plan::new(self, shape, d, f, rank_max, element_bytes) else {
            return Ok(None);
        };
        let floats = |n: usize| self.alloc(n * size_of::<f32>());
        let n_parts = shape.n_heads * plan.n_splits_max;
        Ok(Some(DecodeScratch {
            plan,
            x_out: floats(d)?,
            q: floats(shape.n_heads * shape.head_dim)?,
            part_sums: floats(n_parts * shape.head_dim)?,
            part_maxima: floats(2 * n_parts)?,
            down_parts: floats(plan.n_blocks * d)?,
            inner: floats(rank_max)?,
            best: floats(2 * plan.n_blocks)?,
            sync: floats(2)?,
        }))
    }

    /// The token in `call.state` through all layers.
    ///
    /// # Errors
    /// [`CudaError::Shape`]; [`CudaError::MixedTypes`] unless all matrices have one type; [`CudaError::Unsupported`]
    /// past 128 layers or the scratch's rank, for rows that a mask keeps, or where addresses are not multiples of 16.
    pub fn decode(&self, call: &DecodeCall<'_>) -> Result<(), CudaError> {
        let plan = &call.scratch.plan;
        let (d, f, shape) = (plan.d, plan.f, plan.shape);
        let q_width = shape.n_heads * shape.head_dim;
        let kv_width = shape.n_kv_heads * shape.head_dim;
        if call.layers.len() > LAYERS_MAX {
            return Err(CudaError::Unsupported { what: "layers", found: call.layers.len(), max: LAYERS_MAX });
        }
        check("decode layers, at least one", call.layers.len().max(1), call.layers.len())?;
        check("decode query heads", shape.n_heads, call.shape.n_heads)?;
        check("decode key heads", shape.n_kv_heads, call.shape.n_kv_heads)?;
        check("decode head_dim", shape.head_dim, call.shape.head_dim)?;
        let (dtype, vocab_size) = (call.embedding.dtype(), call.lm_head.n_rows());
        let matrix = |what, w: &DeviceMatrix<'_>, n_rows, n_cols| -> Result<u64, CudaError> {
            same_type("the model's weights", &[&call.embedding, w])?;
            check(what, n_rows, w.n_rows())?;
            check(what, n_cols, w.n_cols())?;
            let address = w.data().address();
            check_aligned(address)?;
            Ok(address)
        };
        let floats = |what, view: View<'_>, n| -> Result<u64, CudaError> {
            check_floats(what, n, view)?;
            Ok(view.address())
        };
        check_state(call.state)?;
        check("bytes of counts", call.layers.len() * 16, call.counts.len_bytes())?;
        let mut layers = [const { LayerArgs::NONE }; LAYERS_MAX];
        for (args, w) in layers.iter_mut().zip(call.layers) {
            check_cache(&call.shape, dtype.cache(), [w.keys, w.values])?;
            let rows = RowsArgs::new(&w.rows, f, d)?;
            let rank = rows.factors.rank as usize;
            if rank > plan.rank_max {
                return Err(CudaError::Unsupported { what: "rank", found: rank, max: plan.rank_max });
            }
            if let DeviceRows::Masked { mask } = w.rows {
                let (what, found) = ("bytes of a mask inside decode", mask.len_bytes());
                return Err(CudaError::Unsupported { what, found, max: 0 });
            }
            *args = LayerArgs {
                w_q: matrix("query weights", &w.w_q, q_width, d)?,
                w_k: matrix("key weights", &w.w_k, kv_width, d)?,
                w_v: matrix("value weights", &w.w_v, kv_width, d)?,
                w_o: matrix("output weights", &w.w_o, d, q_width)?,
                w_gate: matrix("gate weights", &w.w_gate, f, d)?,
                w_up: matrix("up weights", &w.w_up, f, d)?,
                w_down_t: matrix("down weights", &w.w_down_t, f, d)?,
                signs: rows.signs,
                low: rows.low,
                limits: rows.limits,
                attn_norm: floats("attention norm", w.attn_norm, d)?,
                mlp_norm: floats("MLP norm", w.mlp_norm, d)?,
                keys: w.keys.address(),
                values: w.values.address(),
                limit: rows.limit,
                rows: rows.rows,
                n_planes: rows.n_planes,
                factors: rows.factors,
            };
        }
        let clocks = call.clocks.map_or(Ok(0), |view| -> Result<u64, CudaError> {
            check("bytes of clocks", plan.n_blocks * DECODE_STEPS.len() * 8, view.len_bytes())?;
            Ok(view.address())
        })?;
        let [mlp_x, mlp_h, mlp_skip] =
            call.trace.map_or(Ok([0; 3]), |trace| trace.addresses(call.layers.len(), d, f))?;
        let n_angles = call.shape.n_positions_max * shape.head_dim / 2;
        let (activation, threshold) = super::launch::activation_args(call.activation);
        let scratch = call.scratch;
        let args = DecodeArgs {
            embedding: matrix("embedding", &call.embedding, vocab_size, d)?,
            lm_head: matrix("lm_head", &call.lm_head, vocab_size, d)?,
            final_norm: floats("final norm", call.final_norm, d)?,
            cos: floats("rope angles", call.cos, n_angles)?,
            sin: floats("rope angles", call.sin, n_angles)?,
            state: call.state.address(),
            ids: call.ids.address(),
            x_out: scratch.x_out.view().address(),
            q: scratch.q.view().address(),
            part_sums: scratch.part_sums.view().address(),
            part_maxima: scratch.part_maxima.view().address(),
            down_parts: scratch.down_parts.view().address(),
            inner: scratch.inner.view().address(),
            logits: floats("logits", call.logits, vocab_size)?,
            best: scratch.best.view().address(),
            sync: scratch.sync.view().address(),
            counts: call.counts.address(),
            clocks,
            d: d as i32,
            q_cols: q_width as i32,
            n_layers: call.layers.len() as i32,
            n_heads: shape.n_heads as i32,
            n_kv_heads: shape.n_kv_heads as i32,
            head_dim: shape.head_dim as i32,
            head_lanes: plan.head_lanes as i32,
            n_splits_max: plan.n_splits_max as i32,
            n_rows: f as i32,
            vocab_size: vocab_size as i32,
            n_positions_max: call.shape.n_positions_max as i32,
            n_ids: (call.ids.len_bytes() / size_of::<u32>()) as i32,
            slot_bytes: plan.slot_bytes as i32,
            n_slots: plan.n_slots as i32,
            in_flight: plan.rows_of(IN_FLIGHT_BYTES).max(plan.product_rows) as i32,
            in_flight_idle: plan.rows_of(IN_FLIGHT_IDLE_BYTES) as i32,
            ahead_rows: plan.rows_of(AHEAD_BYTES) as i32,
            product_rows: plan.product_rows as i32,
            vec_floats: plan.vec_floats as i32,
            tile_rows: plan.tile_rows as i32,
            own_cols: plan.own_cols as i32,
            list_rows: plan.list_rows as i32,
            ringed_signs: plan.ringed_signs.into(),
            greedy: call.greedy.into(),
            activation,
            threshold,
            eps: call.eps,
            scale: std::f32::consts::LOG2_E / (shape.head_dim as f32).sqrt(),
            heads_per_pair: 2.0 / shape.head_dim as f32,
            mlp_x,
            mlp_h,
            mlp_skip,
            layers,
        };
        let has_factors = call.layers.iter().any(|w| matches!(w.rows, DeviceRows::LowRank { .. }));
        let kernel = if has_factors || call.trace.is_some() {
            format!("decode_{}_any", dtype.suffix())
        } else {
            format!("decode_{}_{}", dtype.suffix(), plan.vec_loads)
        };
        // SAFETY: every length was checked above; the scratch was made for these widths.
        unsafe {
            self.launch_together(&kernel, plan.n_blocks, BLOCK_WARPS * WARP, plan.shared_bytes, false, &args)
        }
    }
}

impl LayerArgs {
    const NONE: Self = Self {
        w_q: 0,
        w_k: 0,
        w_v: 0,
        w_o: 0,
        w_gate: 0,
        w_up: 0,
        w_down_t: 0,
        signs: 0,
        low: 0,
        limits: 0,
        attn_norm: 0,
        mlp_norm: 0,
        keys: 0,
        values: 0,
        limit: 0,
        rows: 0,
        n_planes: 0,
        factors: LowRankArgs::NONE,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_of_all_blocks_are_scaled_to_the_time_of_a_token() {
        // Two blocks, each with 1000 clocks, of two tokens of 30 us.
        let mut clocks = [0; 2 * DECODE_STEPS.len()];
        let (first, second) = clocks.split_at_mut(DECODE_STEPS.len());
        (first[0], first[1]) = (300, 700);
        (second[0], second[1]) = (100, 900);
        let times = step_times(&clocks, 30.0);
        assert_eq!(times[0], StepTime { mean_us: 6.0, lowest_us: 3.0, highest_us: 9.0 });
        assert_eq!(times[1], StepTime { mean_us: 24.0, lowest_us: 21.0, highest_us: 27.0 });
        assert!(times[2..].iter().all(|time| *time == StepTime::default()));
    }

    #[test]
    fn without_clocks_no_step_takes_time() {
        for clocks in [&[0; 3 * DECODE_STEPS.len()][..], &[]] {
            assert_eq!(step_times(clocks, 30.0), [StepTime::default(); DECODE_STEPS.len()]);
        }
    }

    #[test]
    fn steps_that_read_have_the_indexes_of_their_names() {
        for (step, name) in [
            (ReadingStep::Qkv, "qkv"),
            (ReadingStep::Attention, "attention"),
            (ReadingStep::Output, "output"),
            (ReadingStep::Predictor, "predictor"),
            (ReadingStep::AllGateRows, "MLP, all gate rows"),
            (ReadingStep::KeptGateRows, "MLP, kept gate rows"),
            (ReadingStep::ActiveUpRows, "MLP, active up rows"),
            (ReadingStep::Down, "down"),
            (ReadingStep::LmHead, "lm_head"),
        ] {
            assert_eq!(DECODE_STEPS[step as usize], name);
        }
    }
}
