//! A whole token in one kernel (decode.cu): what it needs, how its work is cut, and its launch.

use super::launch::{
    RowsArgs, check_aligned, check_cache, check_floats, check_state, same_type, x_planes_bytes,
};
use super::{Buffer, CudaError, Device, DeviceMatrix, DeviceRows, View};
use crate::shape::check;
use crate::{Activation, AttentionShape};

const WARPS: usize = 8;
const WARP: usize = 32;
/// Most 16-byte pieces of a segment: `ITEM_LOADS` for each lane.
const GRANULES_MAX: usize = 8 * WARP;
/// Widest residual stream: `VEC_LOADS` times four columns for each thread.
const D_MAX: usize = 8 * 4 * WARPS * WARP;
const LAYERS_MAX: usize = 128;
/// Slots of a warp's ring that `wait_copies` knows.
const N_SLOTS: [usize; 4] = [9, 5, 3, 2];
/// Most slots where items are bulk copies, from this compute capability on.
const SLOTS_MAX: usize = 16;
const BULK_SINCE: (u32, u32) = (9, 0);
/// Most rows of sign words that a warp counts side by side.
const SIGN_ROWS_MAX: usize = 8;
/// Partial sums of one tile.
const TILE_FLOATS: usize = 1024;
/// Lanes beside each other in the down projection, and rows queued for a warp.
const DOWN_LANES: usize = 16;
const DOWN_QUEUE: usize = 2 * 20 + WARP;
/// Most row chunks of the down projection: every block reads the sums of all.
const CHUNKS_MAX: usize = 8;
/// Most chunks of positions: every block merges all.
const SPLITS_MAX: usize = 16;
/// Bytes that the ring begins at a multiple of.
const RING_ALIGN: usize = 128;
/// Shared memory that the compiler lays out itself.
const STATIC_BYTES: usize = 2 << 10;

/// What a token's clocks are spent on, in the order of `Step` of decode.cu. A wait is for the other blocks.
pub const DECODE_STEPS: [&str; 19] = [
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
    "wait for h",
    "down",
    "wait for down",
    "norm of lm_head",
    "lm_head",
    "next token",
];

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
    h: Buffer,
    down_parts: Buffer,
    best: Buffer,
    sync: Buffer,
}

/// How the work is cut; the same for every token.
#[derive(Clone, Copy, Debug)]
struct Plan {
    shape: AttentionShape,
    d: usize,
    f: usize,
    cut_d: ItemCut,
    cut_q: ItemCut,
    head_lanes: usize,
    n_splits_max: usize,
    n_chunks: usize,
    slot_bytes: usize,
    n_slots: usize,
    /// Rows of sign words in an item of the ring; 0 where they do not divide into 16 bytes.
    sign_rows: usize,
    vec_floats: usize,
    list_rows: usize,
    n_blocks: usize,
    shared_bytes: usize,
}

/// `ItemCut` of decode.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct ItemCut {
    n_cols: i32,
    n_segs: i32,
    seg_bits: i32,
    granules: i32,
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
    h: u64,
    down_parts: u64,
    logits: u64,
    best: u64,
    sync: u64,
    counts: u64,
    clocks: u64,
    cut_d: ItemCut,
    cut_q: ItemCut,
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
    n_chunks: i32,
    slot_bytes: i32,
    n_slots: i32,
    vec_floats: i32,
    tile_floats: i32,
    list_rows: i32,
    greedy: i32,
    activation: u32,
    threshold: f32,
    eps: f32,
    scale: f32,
    heads_per_pair: f32,
    sign_rows: i32,
    layers: [LayerArgs; LAYERS_MAX],
}

impl ItemCut {
    /// `None` where a row does not divide into 16-byte pieces, or into segments for a block's warps.
    fn new(n_cols: usize, element_bytes: usize) -> Option<Self> {
        let n_bytes = n_cols * element_bytes;
        if !n_bytes.is_multiple_of(16) {
            return None;
        }
        let n_segs = (n_bytes / 16).div_ceil(GRANULES_MAX).next_power_of_two();
        let granules = (n_bytes / 16).div_ceil(n_segs);
        (n_segs <= WARPS).then_some(Self {
            n_cols: n_cols as i32,
            n_segs: n_segs as i32,
            seg_bits: n_segs.trailing_zeros() as i32,
            granules: granules as i32,
        })
    }
}

impl Plan {
    fn new(
        device: &Device,
        shape: &AttentionShape,
        d: usize,
        f: usize,
        element_bytes: usize,
    ) -> Option<Self> {
        let cut_d = ItemCut::new(d, element_bytes)?;
        let cut_q = ItemCut::new(shape.n_heads * shape.head_dim, element_bytes)?;
        if !shape.head_dim.is_multiple_of(8) || shape.head_dim > 8 * WARP || d > D_MAX {
            return None;
        }
        let head_lanes = (shape.head_dim / 8).next_power_of_two();
        let n_blocks = device.n_multiprocessors();
        let down_cols = DOWN_LANES * 16 / element_bytes;
        let vec_floats = [
            d,
            shape.n_heads * shape.head_dim,
            WARPS * head_lanes * 8 + 2 * WARPS,
            WARPS * (down_cols + 2 * DOWN_QUEUE),
        ];
        let vec_floats = vec_floats.into_iter().max()?.next_multiple_of(4);
        let list_rows = f.div_ceil(n_blocks).next_multiple_of(4);
        // Whole loads of a warp, two at a time (`multiply`).
        let slot_bytes = (cut_d.granules.max(cut_q.granules) as usize).next_multiple_of(2 * WARP) * 16;
        let row_bytes = d.div_ceil(WARP) * 4;
        let sign_rows = if row_bytes.is_multiple_of(16) {
            // As few rounds as the ring allows, dealt evenly to the warps.
            let each = f.div_ceil(n_blocks).div_ceil(WARPS);
            let n_rounds = each.div_ceil((slot_bytes / row_bytes).clamp(1, SIGN_ROWS_MAX));
            each.div_ceil(n_rounds).min(slot_bytes / row_bytes)
        } else {
            0
        };
        let fixed_floats = d + vec_floats + TILE_FLOATS + 3 * list_rows;
        // The ring begins at its first multiple of RING_ALIGN after the rest.
        let fixed_bytes = fixed_floats * size_of::<f32>() + x_planes_bytes(d.div_ceil(WARP)) + RING_ALIGN;
        let ring_bytes = device.shared_bytes_max().checked_sub(STATIC_BYTES + fixed_bytes)?;
        let room = ring_bytes / WARPS / slot_bytes;
        let bulk = device.info().capability >= BULK_SINCE;
        let n_slots = if bulk && room >= 2 {
            Some(room.min(SLOTS_MAX))
        } else {
            N_SLOTS.into_iter().find(|&n_slots| n_slots <= room)
        };
        n_slots.map(|n_slots| Self {
            shape: *shape,
            d,
            f,
            cut_d,
            cut_q,
            head_lanes,
            n_splits_max: (n_blocks / shape.n_kv_heads).clamp(1, SPLITS_MAX),
            n_chunks: (n_blocks / d.div_ceil(down_cols)).clamp(1, CHUNKS_MAX),
            slot_bytes,
            n_slots,
            sign_rows,
            vec_floats,
            list_rows,
            n_blocks,
            shared_bytes: fixed_bytes + WARPS * n_slots * slot_bytes,
        })
    }
}

impl DecodeScratch {
    /// Blocks of the kernel, each with clocks of its own.
    pub fn n_blocks(&self) -> usize {
        self.plan.n_blocks
    }
}

impl Device {
    /// Room for tokens of `shape` over `d` inputs, `f` neurons and weights of `element_bytes` each; `None` where the
    /// kernel does not take these widths, and a token is a run of the single kernels.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn decode_scratch(
        &self,
        shape: &AttentionShape,
        d: usize,
        f: usize,
        element_bytes: usize,
    ) -> Result<Option<DecodeScratch>, CudaError> {
        let Some(plan) = Plan::new(self, shape, d, f, element_bytes) else {
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
            h: floats(f)?,
            down_parts: floats(plan.n_chunks * d)?,
            best: floats(2 * plan.n_blocks)?,
            sync: floats(2)?,
        }))
    }

    /// The token in `call.state` through all layers.
    ///
    /// # Errors
    /// [`CudaError::Shape`]; [`CudaError::MixedTypes`] unless all matrices have one type; [`CudaError::Unsupported`]
    /// past 128 layers or where addresses are not multiples of 16.
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
            let rows = RowsArgs::new(&w.rows, f, d.div_ceil(WARP))?;
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
            };
        }
        let clocks = call.clocks.map_or(Ok(0), |view| -> Result<u64, CudaError> {
            check("bytes of clocks", plan.n_blocks * DECODE_STEPS.len() * 8, view.len_bytes())?;
            Ok(view.address())
        })?;
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
            h: scratch.h.view().address(),
            down_parts: scratch.down_parts.view().address(),
            logits: floats("logits", call.logits, vocab_size)?,
            best: scratch.best.view().address(),
            sync: scratch.sync.view().address(),
            counts: call.counts.address(),
            clocks,
            cut_d: plan.cut_d,
            cut_q: plan.cut_q,
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
            n_chunks: plan.n_chunks as i32,
            slot_bytes: plan.slot_bytes as i32,
            n_slots: plan.n_slots as i32,
            vec_floats: plan.vec_floats as i32,
            tile_floats: TILE_FLOATS as i32,
            list_rows: plan.list_rows as i32,
            greedy: call.greedy.into(),
            activation,
            threshold,
            eps: call.eps,
            scale: std::f32::consts::LOG2_E / (shape.head_dim as f32).sqrt(),
            heads_per_pair: 2.0 / shape.head_dim as f32,
            sign_rows: plan.sign_rows as i32,
            layers,
        };
        let kernel = format!("decode_{}", dtype.suffix());
        // SAFETY: every length was checked above; the scratch was made for these widths.
        unsafe { self.launch_together(&kernel, plan.n_blocks, WARPS * WARP, plan.shared_bytes, &args) }
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
    };
}
