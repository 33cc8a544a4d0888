//! A batch of tokens through all layers, by products of the whole batch.
//!
//! ```text
//! x = embedding[tokens]
//! per layer:  n = rmsnorm(x), rounded              [q k v] = n Wᵀ, in one product where they are neighbours
//!             rotate q and k, append k and v       x += attention W_oᵀ
//!             n = rmsnorm(x), rounded, its signs   [gate up] = n Wᵀ                   (or n in 8 bits)
//!             h = act(gate) * up, rounded          x += h W_down
//! ```
//!
//! Every MLP row is computed; a masked batch then drops the ones that decoding would not have read. Buffers are made
//! with the engine. What an observer sees is computed from copies on the host.

use format_spec::ModelConfig;
use kernels::cuda::{
    Buffer, CudaError, Device, DeviceLowRank, DeviceMatrix, DeviceRows, DeviceThresholds, Dtype, FloatRows,
    Gemm, GemmCall, LowRankCall, MatvecCall, PrefillAttentionCall, PrefillGatedCall, PrefillNormCall,
    PrefillQuantiseCall, PrefillRopeCall, PrefillSkipCall, PrefillSkipScoresCall, Quantised, View,
    quantised_bytes, rounded_bytes,
};
use kernels::{AttentionShape, Cpu};

use super::ModelState;
use crate::RuntimeError;
use crate::engine::{Batch, BatchLogits, RowChoice};
use crate::session::{MlpBatch, MlpObserver, SessionOptions};

/// What batches pass through.
#[derive(Debug)]
pub(super) struct Prompt {
    n_batch_max: usize,
    gemm: Gemm,
    buffers: Buffers,
    n_threads: usize,
    /// Made when the first observer comes.
    copies: Option<Copies>,
}

/// Bytes of each of [`Buffers`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    tokens: usize,
    x: usize,
    normed: usize,
    signs: usize,
    scales: usize,
    qkv: usize,
    rotated: usize,
    attended: usize,
    gate_up: usize,
    inner: usize,
    skip: usize,
    h: usize,
}

/// Matrices of a batch on the device, each with `n_batch_max` rows. Inputs of products have room for every type.
#[derive(Debug)]
struct Buffers {
    tokens: Buffer,
    /// Residual stream, f32.
    x: Buffer,
    /// Rounded.
    normed: Buffer,
    /// Sign words of the norm, or the norm in 8 bits.
    signs: Buffer,
    /// Of the norm in 8 bits, f32.
    scales: Buffer,
    /// f32.
    qkv: Buffer,
    /// Queries, of the cache's type.
    rotated: Buffer,
    /// Rounded.
    attended: Buffer,
    /// f32; logits of some tokens at the end.
    gate_up: Buffer,
    /// Products with the first factor of a predictor of low rank, f32.
    inner: Buffer,
    /// u8.
    skip: Buffer,
    /// Rounded.
    h: Buffer,
}

/// What an observer sees, on the host; each `(n_batch_max, width)`.
#[derive(Debug)]
struct Copies {
    cpu: Cpu,
    x: Vec<f32>,
    normed: Vec<f32>,
    gate_up: Vec<f32>,
    gate: Vec<f32>,
    h: Vec<f32>,
    n_neg: Vec<u32>,
    skipped: Vec<u8>,
    skip: Vec<bool>,
}

/// Products of one input with `N` matrices: side by side in the row of each token where the matrices were stacked,
/// else one whole product after the other.
#[derive(Clone, Copy)]
struct Products<'a, const N: usize> {
    data: View<'a>,
    n_tokens: usize,
    widths: [usize; N],
    stacked: bool,
}

impl Sizes {
    /// Where predictors have at most rank `rank_max`.
    pub(super) fn new(
        config: &ModelConfig,
        shape: &AttentionShape,
        rank_max: usize,
        n_batch_max: usize,
    ) -> Self {
        let (d, f) = (config.hidden_size as usize, config.intermediate_size as usize);
        let q_width = shape.n_heads * shape.head_dim;
        let kv_width = shape.n_kv_heads * shape.head_dim;
        let words = |width: usize| n_batch_max * width * size_of::<u32>();
        // Rounded inputs of either half type take at most the bytes of f32.
        Self {
            tokens: words(1),
            x: words(d),
            normed: words(d),
            // More than the sign words.
            signs: quantised_bytes(n_batch_max, d),
            scales: words(1),
            qkv: words(q_width + 2 * kv_width),
            rotated: words(q_width),
            attended: words(q_width),
            gate_up: words(2 * f).max(config.vocab_size as usize * size_of::<f32>()),
            inner: inner_bytes(n_batch_max, rank_max),
            skip: n_batch_max * f,
            h: words(f),
        }
    }

    /// Bytes of all.
    pub(super) fn n_bytes(&self) -> usize {
        let Self { tokens, x, normed, signs, scales, qkv, rotated, attended, gate_up, inner, skip, h } = self;
        tokens + x + normed + signs + scales + qkv + rotated + attended + gate_up + inner + skip + h
    }
}

/// Bytes of products with the first factors of predictors of rank `rank_max`.
fn inner_bytes(n_batch_max: usize, rank_max: usize) -> usize {
    n_batch_max * rank_max * size_of::<f32>()
}

impl Buffers {
    fn new(device: &Device, sizes: &Sizes) -> Result<Self, CudaError> {
        Ok(Self {
            tokens: device.alloc(sizes.tokens)?,
            x: device.alloc(sizes.x)?,
            normed: device.alloc(sizes.normed)?,
            signs: device.alloc(sizes.signs)?,
            scales: device.alloc(sizes.scales)?,
            qkv: device.alloc(sizes.qkv)?,
            rotated: device.alloc(sizes.rotated)?,
            attended: device.alloc(sizes.attended)?,
            gate_up: device.alloc(sizes.gate_up)?,
            inner: device.alloc(sizes.inner)?,
            skip: device.alloc(sizes.skip)?,
            h: device.alloc(sizes.h)?,
        })
    }

    /// The residual stream, `(n_tokens, hidden_size)`.
    fn x(&self, n_tokens: usize, hidden_size: usize) -> View<'_> {
        self.x.view().slice(0, n_tokens * hidden_size * size_of::<f32>())
    }
}

impl Prompt {
    pub(super) fn new(
        state: &ModelState<'_>,
        config: &ModelConfig,
        options: &SessionOptions,
    ) -> Result<Self, CudaError> {
        let n_batch_max = options.n_batch_max;
        Ok(Self {
            n_batch_max,
            gemm: Gemm::new(&state.device)?,
            buffers: Buffers::new(
                &state.device,
                &Sizes::new(config, &state.shape, state.weights.rank_max(), n_batch_max),
            )?,
            n_threads: options.n_threads,
            copies: None,
        })
    }

    /// Has room for predictors of rank `rank_max`.
    pub(super) fn make_room(&mut self, device: &Device, rank_max: usize) -> Result<(), CudaError> {
        let n_bytes = inner_bytes(self.n_batch_max, rank_max);
        if n_bytes > self.buffers.inner.view().len_bytes() {
            self.buffers.inner = device.alloc(n_bytes)?;
        }
        Ok(())
    }

    /// Most tokens of a batch.
    pub(super) fn n_batch_max(&self) -> usize {
        self.n_batch_max
    }

    /// Appends `batch`, masked by `rows` where it says so. Logits of its last token stay on the device, in `state`.
    pub(super) fn run(
        &mut self,
        state: &ModelState<'_>,
        rows: &[RowChoice],
        batch: Batch<'_>,
        mut observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError> {
        let n_tokens = batch.tokens.len();
        let tokens = self.buffers.tokens.view().slice(0, size_of_val(batch.tokens));
        state.device.write(tokens, batch.tokens)?;
        let embedding = state.matrix(&state.weights.embedding)?;
        state.device.prefill_embed(&embedding, tokens, self.buffers.x(n_tokens, embedding.n_cols()))?;
        for (layer, rows) in rows.iter().enumerate() {
            self.attention_block(state, layer, n_tokens, batch.first_position)?;
            let rows = if batch.masked { state.rows(layer, rows)? } else { DeviceRows::All };
            self.mlp(state, layer, n_tokens, rows, observer.as_deref_mut())?;
        }
        match batch.logits {
            BatchLogits::None => Ok(()),
            BatchLogits::Last => Ok(self.last_logits(state, n_tokens)?),
            BatchLogits::All(logits) => Ok(self.all_logits(state, n_tokens, logits)?),
        }
    }

    /// `x += W_o attention(...)`; keys and values are appended.
    fn attention_block(
        &mut self,
        state: &ModelState<'_>,
        layer: usize,
        n_tokens: usize,
        first_position: usize,
    ) -> Result<(), CudaError> {
        let (device, shape, w) = (&state.device, state.shape, &state.weights.layers[layer]);
        let [k_cache, v_cache] = state.keys_and_values[layer].each_ref().map(Buffer::view);
        let matrices = [state.matrix(&w.w_q)?, state.matrix(&w.w_k)?, state.matrix(&w.w_v)?];
        let w_o = state.matrix(&w.w_o)?;
        let cache = matrices[0].dtype().cache();
        let q_width = shape.n_heads * shape.head_dim;
        let Self { gemm, buffers, .. } = self;
        let x = buffers.x(n_tokens, w_o.n_rows());
        let rotated = buffers.rotated.view().slice(0, n_tokens * q_width * cache.n_bytes());
        let attended = rounded(&buffers.attended, w_o.dtype(), n_tokens, q_width);
        let norm = state.floats(w.attn_norm);
        let qkv = products(gemm, state, &buffers.normed, None, norm, x, matrices, &buffers.qkv)?;
        device.prefill_rope(&PrefillRopeCall {
            shape,
            n_tokens,
            first_position,
            q: qkv.rows(0)?,
            k: qkv.rows(1)?,
            v: qkv.rows(2)?,
            cos: state.cos.view(),
            sin: state.sin.view(),
            cache,
            rotated,
            k_cache,
            v_cache,
        })?;
        device.prefill_attention(&PrefillAttentionCall {
            shape,
            n_tokens,
            first_position,
            q: rotated,
            k_cache,
            v_cache,
            dtype: w_o.dtype(),
            out: attended,
        })?;
        let call = GemmCall { w: w_o, transposed: false, n_tokens, x: attended, y: x, accumulate: true };
        gemm.multiply(device, &call)
    }

    /// `x += MLP(rmsnorm(x))` without the rows that `rows` leaves out.
    fn mlp(
        &mut self,
        state: &ModelState<'_>,
        layer: usize,
        n_tokens: usize,
        rows: DeviceRows<'_>,
        observer: Option<&mut (dyn MlpObserver + '_)>,
    ) -> Result<(), RuntimeError> {
        let (device, w) = (&state.device, &state.weights.layers[layer]);
        let (n_rows, d) = (w.mlp.gate.n_rows, w.mlp.gate.n_cols);
        let matrices = [state.matrix(&w.mlp.gate)?, state.matrix(&w.mlp.up)?];
        let w_down_t = state.matrix(&w.mlp.down_t)?;
        let n_words = d.div_ceil(32);
        let Self { n_batch_max, gemm, buffers, n_threads, copies } = self;
        let x = buffers.x(n_tokens, d);
        let x_signs = buffers.signs.view().slice(0, n_tokens * n_words * size_of::<u32>());
        let wants_signs = matches!(rows, DeviceRows::Predicted { .. });
        let gate_up = products(
            gemm,
            state,
            &buffers.normed,
            wants_signs.then_some(x_signs),
            state.floats(w.mlp_norm),
            x,
            matrices,
            &buffers.gate_up,
        )?;
        let skip_of_batch = buffers.skip.view().slice(0, n_tokens * n_rows);
        let quantised = Quantised {
            planes: buffers.signs.view().slice(0, quantised_bytes(n_tokens, d)),
            scales: buffers.scales.view().slice(0, n_tokens * size_of::<f32>()),
        };
        let weight = state.floats(w.mlp_norm);
        let mut skip = match rows {
            DeviceRows::Predicted { signs: w_signs, limits } => {
                device.prefill_skip(&PrefillSkipCall {
                    n_tokens,
                    n_rows,
                    n_words,
                    x_signs,
                    w_signs,
                    limits,
                    skip: skip_of_batch,
                })?;
                Some(skip_of_batch)
            }
            DeviceRows::Scored { planes, thresholds } => {
                device.prefill_quantise(&PrefillQuantiseCall {
                    x,
                    weight,
                    eps: state.eps,
                    n_tokens,
                    out: quantised,
                })?;
                device.prefill_skip_scores(&PrefillSkipScoresCall {
                    n_tokens,
                    n_rows,
                    n_cols: d,
                    x: quantised,
                    planes,
                    thresholds,
                    skip: skip_of_batch,
                })?;
                Some(skip_of_batch)
            }
            DeviceRows::LowRank { factors, thresholds } => {
                let (eps, dtype) = (state.eps, Dtype::F32);
                // Inputs of products have room for f32.
                let out = rounded(&buffers.normed, dtype, n_tokens, d);
                let norm = PrefillNormCall { x, weight, eps, n_tokens, dtype, out, signs: None };
                let inner = buffers.inner.view().slice(0, n_tokens * factors.fc1.n_rows() * size_of::<f32>());
                let call = state.low_rank_call(norm, quantised, factors, thresholds, skip_of_batch)?;
                device.prefill_skip_low_rank(&call, inner)?;
                Some(skip_of_batch)
            }
            DeviceRows::Masked { mask } => Some(mask),
            DeviceRows::All | DeviceRows::Active => None,
        };
        if let Some(observer) = observer {
            let copies = copies.get_or_insert_with(|| Copies::new(*n_threads, *n_batch_max, d, n_rows));
            if copies.show(state, layer, x, &gate_up, skip, skip_of_batch, observer)? {
                skip = Some(skip_of_batch);
            }
        }
        let h = rounded(&buffers.h, w_down_t.dtype(), n_tokens, n_rows);
        device.prefill_gated(&PrefillGatedCall {
            gate: gate_up.rows(0)?,
            up: gate_up.rows(1)?,
            activation: state.activation,
            skip,
            dtype: w_down_t.dtype(),
            h,
        })?;
        let call = GemmCall { w: w_down_t, transposed: true, n_tokens, x: h, y: x, accumulate: true };
        Ok(gemm.multiply(device, &call)?)
    }

    /// `logits = lm_head rmsnorm(x[n_tokens - 1])`, on the device.
    fn last_logits(&self, state: &ModelState<'_>, n_tokens: usize) -> Result<(), CudaError> {
        let row_bytes = state.weights.embedding.n_cols * size_of::<f32>();
        state.device.matvec(&MatvecCall {
            w: state.matrix(&state.weights.lm_head)?,
            x: self.buffers.x.view().slice((n_tokens - 1) * row_bytes, row_bytes),
            norm: Some((state.floats(state.weights.final_norm), state.eps)),
            y: state.logits.view(),
            accumulate: false,
        })
    }

    /// `logits = rmsnorm(x) lm_headᵀ` on the host, `(n_tokens, vocab_size)`, for as many tokens at a time as a buffer
    /// holds.
    fn all_logits(
        &mut self,
        state: &ModelState<'_>,
        n_tokens: usize,
        logits: &mut [f32],
    ) -> Result<(), CudaError> {
        let lm_head = state.matrix(&state.weights.lm_head)?;
        let final_norm = state.floats(state.weights.final_norm);
        let row_bytes = lm_head.n_cols() * size_of::<f32>();
        let Self { gemm, buffers, .. } = self;
        let x = buffers.x(n_tokens, lm_head.n_cols());
        let n_at_once = buffers.gate_up.view().len_bytes() / (lm_head.n_rows() * size_of::<f32>());
        for (i, logits) in logits.chunks_mut(n_at_once * lm_head.n_rows()).enumerate() {
            let n_tokens = logits.len() / lm_head.n_rows();
            let x = x.slice(i * n_at_once * row_bytes, n_tokens * row_bytes);
            let out = &buffers.gate_up;
            let product = products(gemm, state, &buffers.normed, None, final_norm, x, [lm_head], out)?;
            state.device.read(product.data, logits)?;
        }
        Ok(())
    }
}

impl ModelState<'_> {
    /// What a predictor of low rank needs for `skip` of a batch, its norm made, and in 8 bits where there is a residual.
    pub(super) fn low_rank_call<'a>(
        &self,
        norm: PrefillNormCall<'a>,
        quantised: Quantised<'a>,
        factors: DeviceLowRank<'a>,
        thresholds: DeviceThresholds<'a>,
        skip: View<'a>,
    ) -> Result<LowRankCall<'a>, CudaError> {
        let PrefillNormCall { x, weight, eps, n_tokens, out, .. } = norm;
        self.device.prefill_norm(&norm)?;
        let quantised = factors.residual.map(|_| quantised);
        if let Some(out) = quantised {
            self.device.prefill_quantise(&PrefillQuantiseCall { x, weight, eps, n_tokens, out })?;
        }
        Ok(LowRankCall { n_tokens, x: out, quantised, factors, thresholds, skip })
    }
}

/// Products of `rmsnorm(x)` with `matrices`, in `out`; one product where the matrices lie one after the other. `normed`
/// is overwritten, and `signs` gets the sign words of the norm.
#[expect(clippy::too_many_arguments, reason = "the parts of a norm and a product")]
fn products<'a, const N: usize>(
    gemm: &mut Gemm,
    state: &ModelState<'_>,
    normed: &Buffer,
    signs: Option<View<'_>>,
    weight: View<'_>,
    x: View<'_>,
    matrices: [DeviceMatrix<'_>; N],
    out: &'a Buffer,
) -> Result<Products<'a, N>, CudaError> {
    let n_cols = matrices[0].n_cols();
    let n_tokens = x.len_bytes() / (n_cols * size_of::<f32>());
    let mut multiply = |w: DeviceMatrix<'_>, y: View<'_>| {
        let normed = rounded(normed, w.dtype(), n_tokens, n_cols);
        let (eps, dtype) = (state.eps, w.dtype());
        state.device.prefill_norm(&PrefillNormCall {
            x,
            weight,
            eps,
            n_tokens,
            dtype,
            out: normed,
            signs,
        })?;
        let call = GemmCall { w, transposed: false, n_tokens, x: normed, y, accumulate: false };
        gemm.multiply(&state.device, &call)
    };
    let widths = matrices.map(|w| w.n_rows());
    let n_bytes = n_tokens * widths.iter().sum::<usize>() * size_of::<f32>();
    let data = out.view().slice(0, n_bytes);
    let stack = DeviceMatrix::stacked(&matrices);
    let products = Products { data, n_tokens, widths, stacked: stack.is_some() };
    match stack {
        Some(stack) => multiply(stack, data)?,
        None => {
            for (i, w) in matrices.into_iter().enumerate() {
                multiply(w, products.part(i))?;
            }
        }
    }
    Ok(products)
}

impl<'a, const N: usize> Products<'a, N> {
    /// Columns before those of product `i`.
    fn first_col(&self, i: usize) -> usize {
        self.widths[..i].iter().sum()
    }

    /// Product `i` where they lie one after the other.
    fn part(&self, i: usize) -> View<'a> {
        let bytes = |width: usize| self.n_tokens * width * size_of::<f32>();
        self.data.slice(bytes(self.first_col(i)), bytes(self.widths[i]))
    }

    /// Product `i`, `(n_tokens, widths[i])`.
    fn rows(&self, i: usize) -> Result<FloatRows<'a>, CudaError> {
        if self.stacked {
            let rows = FloatRows::new(self.data, self.n_tokens, self.widths.iter().sum())?;
            Ok(rows.columns(self.first_col(i), self.widths[i]))
        } else {
            FloatRows::new(self.part(i), self.n_tokens, self.widths[i])
        }
    }

    /// The row of token `token` in product `i`, of a copy of `data`.
    fn row_of<'h>(&self, copy: &'h [f32], i: usize, token: usize) -> &'h [f32] {
        let first_col = self.first_col(i);
        let start = if self.stacked {
            token * self.widths.iter().sum::<usize>() + first_col
        } else {
            self.n_tokens * first_col + token * self.widths[i]
        };
        &copy[start..][..self.widths[i]]
    }
}

impl Copies {
    fn new(n_threads: usize, n_batch_max: usize, hidden_size: usize, intermediate_size: usize) -> Self {
        let floats = |width: usize| vec![0.0; n_batch_max * width];
        Self {
            cpu: Cpu::new(n_threads),
            x: floats(hidden_size),
            normed: floats(hidden_size),
            gate_up: floats(2 * intermediate_size),
            gate: floats(intermediate_size),
            h: floats(intermediate_size),
            n_neg: vec![0; n_batch_max * intermediate_size],
            skipped: vec![0; n_batch_max * intermediate_size],
            skip: vec![false; n_batch_max * intermediate_size],
        }
    }

    /// Shows `observer` the MLP of `layer`: its norm and h in f32, as the CPU's engine has them. `skip` are the rows that
    /// the session leaves out, if it does. True if the observer has a mask of its own, which then lies in `own_skip`.
    #[expect(clippy::too_many_arguments, reason = "what an observer sees, and where its answer goes")]
    fn show(
        &mut self,
        state: &ModelState<'_>,
        layer: usize,
        x: View<'_>,
        gate_up: &Products<'_, 2>,
        skip: Option<View<'_>>,
        own_skip: View<'_>,
        observer: &mut (dyn MlpObserver + '_),
    ) -> Result<bool, RuntimeError> {
        let w = &state.weights.layers[layer];
        let n_tokens = gate_up.n_tokens;
        let (n_x, n_h) = (n_tokens * w.mlp.gate.n_cols, n_tokens * w.mlp.gate.n_rows);
        let (normed, gate, h) = (&mut self.normed[..n_x], &mut self.gate[..n_h], &mut self.h[..n_h]);
        state.device.read(x, &mut self.x[..n_x])?;
        state.device.read(gate_up.data, &mut self.gate_up[..2 * n_h])?;
        self.cpu.rmsnorm(&self.x[..n_x], w.mlp_norm, state.eps, normed)?;
        let (n_rows, activation) = (w.mlp.gate.n_rows, state.activation);
        let of_token = |token| [0, 1].map(|i| gate_up.row_of(&self.gate_up, i, token));
        // What a product is on the device does not go to other threads.
        let copies: Vec<[&[f32]; 2]> = (0..n_tokens).map(of_token).collect();
        let tokens = gate.chunks_exact_mut(n_rows).zip(h.chunks_exact_mut(n_rows)).zip(&copies);
        self.cpu.for_each(tokens, |((gate, h), [gate_copy, up])| {
            gate.copy_from_slice(gate_copy);
            for ((h, &gate), up) in h.iter_mut().zip(&*gate).zip(*up) {
                *h = activation.apply(gate) * up;
            }
        });
        let n_neg: &[u32] = match &w.signs() {
            Some(signs) if observer.wants_n_neg() => {
                self.cpu.n_neg(signs, n_tokens, normed, &mut self.n_neg[..n_h])?;
                &self.n_neg[..n_h]
            }
            _ => &[],
        };
        let (skipped, skip_rows) = (&mut self.skipped[..n_h], &mut self.skip[..n_h]);
        let has_own_mask = observer.mask(layer, n_tokens, normed, skip_rows);
        if has_own_mask {
            let tokens = skipped.chunks_exact_mut(n_rows).zip(skip_rows.chunks_exact(n_rows));
            self.cpu.for_each(tokens, |(skipped, skip)| {
                skipped.iter_mut().zip(skip).for_each(|(skipped, &skip)| *skipped = skip.into());
            });
            state.device.write(own_skip, skipped)?;
        } else if let Some(skip) = skip {
            state.device.read(skip, skipped)?;
            let tokens = skip_rows.chunks_exact_mut(n_rows).zip(skipped.chunks_exact(n_rows));
            self.cpu.for_each(tokens, |(skip, skipped)| {
                skip.iter_mut().zip(skipped).for_each(|(skip, &skipped)| *skip = skipped != 0);
            });
        }
        let skip: &[bool] = if has_own_mask || skip.is_some() { skip_rows } else { &[] };
        observer.mlp(&MlpBatch { layer, n_tokens, x: normed, gate, h, n_neg, skip });
        Ok(has_own_mask)
    }
}

/// The part of `buffer` that holds a rounded input `(n_tokens, width)` of products with weights of `dtype`.
fn rounded(buffer: &Buffer, dtype: Dtype, n_tokens: usize, width: usize) -> View<'_> {
    buffer.view().slice(0, rounded_bytes(dtype, n_tokens, width))
}
