//! A token, or a batch of tokens, through all layers on the CPU.
//!
//! ```text
//! x = embedding[token]
//! per layer:  n = rmsnorm(x)                       q, k, v = W n;  q, k = rope(q), rope(k)
//!             append k, v to the cache             x += W_o attention(q, cache)
//!             n = rmsnorm(x)                       x += W_down (act(W_gate n) * (W_up n))
//! logits = lm_head rmsnorm(x)
//! ```
//!
//! Decoding reads the MLP rows that the layer's [`RowChoice`] selects. A batch computes all of them, as the union of
//! active rows over many tokens is nearly everything; masked, it then drops the ones that decoding would not have
//! read. Buffers are made with the engine, so that a decode step allocates nothing.

use format_spec::{ModelConfig, RopeScaling};
use kernels::{
    AttentionScratch, AttentionShape, BitPlanes, Cpu, Elements, Limits, LowRank, Matvec, MlpCounts,
    MlpScratch, Rows, Thresholds, bytes,
};

use crate::RuntimeError;
use crate::audit::Audit;
use crate::engine::{Batch, BatchLogits, Engine, RowChoice};
use crate::kv_cache::KvCache;
use crate::model::{LayerWeights, Model, Weights};
use crate::session::{MlpBatch, MlpObserver, SessionOptions, Usage};

/// Tokens of a prompt's batch: enough for weights to be read rarely, few enough for caches to hold what passes between
/// products.
const N_BATCH: usize = 256;
/// Bytes that a bandwidth measurement reads: far more than a processor caches.
const BANDWIDTH_BYTES: usize = 512 << 20;
/// Passes over them; the best counts.
const BANDWIDTH_PASSES: usize = 3;

/// The CPU's engine.
#[derive(Debug)]
pub(crate) struct CpuEngine<'m> {
    cpu: Cpu,
    weights: Weights<'m>,
    activation: kernels::Activation,
    rms_norm_eps: f32,
    attention: AttentionShape,
    rope: RopeAngles,
    cache: KvCache,
    rows: Vec<RowChoice>,
    buffers: Buffers,
    attention_scratch: AttentionScratch,
    mlp_scratch: MlpScratch,
    logits: Vec<f32>,
}

/// Vectors of a batch, each `(n_batch_max, width)`; decoding uses the first row.
#[derive(Debug)]
struct Buffers {
    n_batch_max: usize,
    /// Residual stream.
    x: Vec<f32>,
    /// Input of a projection after RMSNorm.
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    gate: Vec<f32>,
    h: Vec<f32>,
    /// Filled for observers that ask for it.
    n_neg: Vec<u32>,
    skip: Vec<bool>,
}

/// `cos` and `sin` of the rotations of a position.
#[derive(Debug)]
pub(crate) struct RopeAngles {
    /// Radians per position, `(head_dim / 2,)`.
    frequencies: Vec<f64>,
}

impl<'m> CpuEngine<'m> {
    pub(crate) fn new(model: &'m Model, options: &SessionOptions) -> Self {
        let cpu = Cpu::new(options.n_threads);
        let config = model.config();
        let attention = AttentionShape {
            n_heads: config.num_attention_heads as usize,
            n_kv_heads: config.num_key_value_heads as usize,
            head_dim: config.head_dim as usize,
            n_positions_max: options.n_positions_max,
        };
        let weights = model.weights();
        let wide = matches!(weights.embedding.data, Elements::F32(_));
        let (d, f) = (config.hidden_size as usize, config.intermediate_size as usize);
        Self {
            attention_scratch: AttentionScratch::new(&attention),
            mlp_scratch: MlpScratch::new(f, d),
            cache: KvCache::new(attention, weights.layers.len(), wide),
            buffers: Buffers::new(&attention, d, f, options.n_batch_max),
            rope: RopeAngles::new(config),
            logits: vec![0.0; config.vocab_size as usize],
            rows: vec![RowChoice::All; weights.layers.len()],
            activation: model.activation(),
            rms_norm_eps: config.rms_norm_eps,
            cpu,
            weights,
            attention,
        }
    }

    /// `x += W_o attention(...)` for the tokens in `buffers.x`, whose keys and values are appended.
    fn attention_block(
        &mut self,
        layer: usize,
        n_tokens: usize,
        first_position: usize,
    ) -> Result<(), RuntimeError> {
        let w = &self.weights.layers[layer];
        let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = self.attention;
        let b = self.buffers.first(n_tokens);
        self.cpu.rmsnorm(b.x, w.attn_norm, self.rms_norm_eps, b.normed)?;
        if n_tokens == 1 {
            let job = |w, y| Matvec { w, y, accumulate: false };
            self.cpu.matvec(b.normed, &mut [job(w.w_q, b.q), job(w.w_k, b.k), job(w.w_v, b.v)])?;
        } else {
            self.cpu.matmul(&w.w_q, n_tokens, b.normed, b.q, false)?;
            self.cpu.matmul(&w.w_k, n_tokens, b.normed, b.k, false)?;
            self.cpu.matmul(&w.w_v, n_tokens, b.normed, b.v, false)?;
        }
        self.cpu.rope(b.q, n_heads, head_dim, b.cos, b.sin)?;
        self.cpu.rope(b.k, n_kv_heads, head_dim, b.cos, b.sin)?;
        self.cache.store(layer, first_position, b.k, b.v);
        let (keys, values) = self.cache.layer(layer);
        self.cpu.attention(
            &self.attention,
            n_tokens,
            first_position,
            b.q,
            keys,
            values,
            &mut self.attention_scratch,
            b.attended,
        )?;
        if n_tokens == 1 {
            self.cpu.matvec(b.attended, &mut [Matvec { w: w.w_o, y: b.x, accumulate: true }])?;
        } else {
            self.cpu.matmul(&w.w_o, n_tokens, b.attended, b.x, true)?;
        }
        Ok(())
    }

    /// `x += MLP(rmsnorm(x))` for one token, reading the rows that the layer selects; with an audit, also rows of its
    /// sample that the layer leaves out.
    fn mlp_row(
        &mut self,
        layer: usize,
        audit: Option<(&mut Audit, usize)>,
    ) -> Result<(MlpCounts, u64), RuntimeError> {
        let w = &self.weights.layers[layer];
        let b = self.buffers.first(1);
        let rows = rows_of(&self.rows[layer], w);
        let (activation, scratch) = (self.activation, &mut self.mlp_scratch);
        self.cpu.rmsnorm(b.x, w.mlp_norm, self.rms_norm_eps, b.normed)?;
        let Some((audit, number)) = audit.filter(|(audit, _)| audit.predicts(layer)) else {
            let counts = self.cpu.mlp(&w.mlp, &rows, activation, b.normed, scratch, b.x)?;
            return Ok((counts, bytes::mlp(&w.mlp, &rows, &counts)));
        };
        let sample = audit.draw(number, layer);
        let found = self.cpu.mlp_audited(&w.mlp, &rows, activation, b.normed, sample, scratch, b.x)?;
        let (counts, found) = found;
        audit.record(number, layer, &counts, &found);
        Ok((counts, bytes::mlp(&w.mlp, &rows, &counts) + bytes::audit(&w.mlp, &found)))
    }

    /// One token at `position` through all layers.
    fn step(
        &mut self,
        token: u32,
        position: usize,
        usage: &mut Usage,
        mut audit: Option<(&mut Audit, usize)>,
    ) -> Result<(), RuntimeError> {
        self.begin(&[token], position)?;
        let kv_bytes = bytes::kv(&self.attention, self.cache.element_bytes(), position + 1);
        for layer in 0..self.weights.layers.len() {
            self.attention_block(layer, 1, position)?;
            let audit = audit.as_mut().map(|(audit, number)| (&mut **audit, *number));
            let (counts, mlp_bytes) = self.mlp_row(layer, audit)?;
            let w = &self.weights.layers[layer];
            let projections = [&w.w_q, &w.w_k, &w.w_v, &w.w_o].map(bytes::matrix).iter().sum::<u64>();
            usage.n_bytes += projections + kv_bytes + mlp_bytes;
            usage.layers[layer].n_kept += counts.n_kept as u64;
            usage.layers[layer].n_active += counts.n_active as u64;
        }
        self.head_row(0)?;
        usage.n_bytes += bytes::matrix(&self.weights.lm_head);
        usage.n_tokens += 1;
        Ok(())
    }

    /// `x += MLP(rmsnorm(x))` for a batch, all rows computed; the mask is applied before the down projection.
    fn mlp_batch(
        &mut self,
        layer: usize,
        n_tokens: usize,
        masked: bool,
        mut observer: Option<&mut (dyn MlpObserver + '_)>,
    ) -> Result<(), RuntimeError> {
        let w = &self.weights.layers[layer];
        let b = self.buffers.first(n_tokens);
        self.cpu.rmsnorm(b.x, w.mlp_norm, self.rms_norm_eps, b.normed)?;
        self.cpu.matmul(&w.mlp.gate, n_tokens, b.normed, b.gate, false)?;
        self.cpu.matmul(&w.mlp.up, n_tokens, b.normed, b.h, false)?;
        for (h, &gate) in b.h.iter_mut().zip(&*b.gate) {
            *h *= self.activation.apply(gate);
        }
        let signs = w.signs();
        let wants_n_neg = signs.is_some() && observer.as_ref().is_some_and(|observer| observer.wants_n_neg());
        if let Some(signs) = signs.filter(|_| wants_n_neg) {
            self.cpu.n_neg(&signs, n_tokens, b.normed, b.n_neg)?;
        }
        let has_own_mask = match &mut observer {
            Some(observer) => observer.mask(layer, n_tokens, b.normed, b.skip),
            None => false,
        };
        let rows = rows_of(&self.rows[layer], w);
        let is_masked = has_own_mask || masked && rows.is_predicted();
        if is_masked && !has_own_mask {
            self.cpu.predict(&rows, n_tokens, b.normed, b.skip)?;
        }
        let skip: &[bool] = if is_masked { b.skip } else { &[] };
        if let Some(observer) = observer {
            let n_neg: &[u32] = if wants_n_neg { b.n_neg } else { &[] };
            observer.mlp(&MlpBatch { layer, n_tokens, x: b.normed, gate: b.gate, h: b.h, n_neg, skip });
        }
        for (h, _) in b.h.iter_mut().zip(skip).filter(|(_, skip)| **skip) {
            *h = 0.0;
        }
        self.cpu.matmul_t(&w.mlp.down_t, n_tokens, b.h, b.x, true)?;
        Ok(())
    }

    /// Fills the residual stream with embeddings and the angles with those of the positions.
    fn begin(&mut self, tokens: &[u32], first_position: usize) -> Result<(), RuntimeError> {
        let b = self.buffers.first(tokens.len());
        let d = self.weights.embedding.n_cols;
        for (&token, x) in tokens.iter().zip(b.x.chunks_exact_mut(d)) {
            self.cpu.row(&self.weights.embedding, token as usize, x)?;
        }
        let half = self.rope.frequencies.len();
        for (token, (cos, sin)) in b.cos.chunks_exact_mut(half).zip(b.sin.chunks_exact_mut(half)).enumerate()
        {
            self.rope.fill(first_position + token, cos, sin);
        }
        Ok(())
    }

    /// `logits = lm_head rmsnorm(x[token])`.
    fn head_row(&mut self, token: usize) -> Result<(), RuntimeError> {
        let d = self.weights.embedding.n_cols;
        let normed = &mut self.buffers.normed[..d];
        let x = &self.buffers.x[token * d..][..d];
        self.cpu.rmsnorm(x, self.weights.final_norm, self.rms_norm_eps, normed)?;
        let job = Matvec { w: self.weights.lm_head, y: &mut self.logits, accumulate: false };
        self.cpu.matvec(normed, &mut [job])?;
        Ok(())
    }
}

impl<'m> Engine<'m> for CpuEngine<'m> {
    fn describe(&self) -> String {
        let n_threads = self.cpu.n_threads();
        let plural = if n_threads == 1 { "" } else { "s" };
        format!("cpu ({}, {n_threads} thread{plural})", self.cpu.isa())
    }

    fn n_batch(&self) -> usize {
        self.buffers.n_batch_max.min(N_BATCH)
    }

    fn set_predictors(
        &mut self,
        planes: &[Option<BitPlanes<'m>>],
        factors: &[Option<LowRank<'m>>],
    ) -> Result<(), RuntimeError> {
        self.weights.set_predictors(planes, factors);
        Ok(())
    }

    fn set_rows(&mut self, rows: Vec<RowChoice>) {
        self.rows = rows;
    }

    fn decode(&mut self, token: u32, position: usize, usage: &mut Usage) -> Result<(), RuntimeError> {
        self.step(token, position, usage, None)
    }

    fn decode_audited(
        &mut self,
        token: u32,
        position: usize,
        usage: &mut Usage,
        audit: &mut Audit,
        number: usize,
    ) -> Result<(), RuntimeError> {
        self.step(token, position, usage, Some((audit, number)))
    }

    fn layer_rows_mut(&mut self, layer: usize) -> &mut RowChoice {
        &mut self.rows[layer]
    }

    fn forward_batch(
        &mut self,
        batch: Batch<'_>,
        mut observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError> {
        let n_tokens = batch.tokens.len();
        if n_tokens == 0 {
            return Ok(());
        }
        self.begin(batch.tokens, batch.first_position)?;
        for layer in 0..self.weights.layers.len() {
            self.attention_block(layer, n_tokens, batch.first_position)?;
            self.mlp_batch(layer, n_tokens, batch.masked, observer.as_deref_mut())?;
        }
        match batch.logits {
            BatchLogits::None => Ok(()),
            BatchLogits::Last => self.head_row(n_tokens - 1),
            BatchLogits::All(logits) => {
                let b = self.buffers.first(n_tokens);
                self.cpu.rmsnorm(b.x, self.weights.final_norm, self.rms_norm_eps, b.normed)?;
                self.cpu.matmul(&self.weights.lm_head, n_tokens, b.normed, logits, false)?;
                Ok(())
            }
        }
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }

    fn measure_read_gb_per_s(&self) -> f64 {
        measure_read_gb_per_s(&self.cpu)
    }
}

/// Plain read bandwidth of `cpu` over fresh memory, in GB/s (10^9).
pub(crate) fn measure_read_gb_per_s(cpu: &Cpu) -> f64 {
    // Written first: pages that were never written all are one page of zeros, which caches hold.
    let memory = vec![1_u8; BANDWIDTH_BYTES];
    cpu.measure_read_gb_per_s(&memory, BANDWIDTH_PASSES)
}

/// The rows that `choice` selects of the layer `w`.
pub(crate) fn rows_of<'a>(choice: &'a RowChoice, w: &LayerWeights<'a>) -> Rows<'a> {
    let planes = || w.planes.expect("checked when limits were set: the layer has sign words");
    let predicted = |limits| Rows::Predicted { signs: planes().signs, limits };
    let scored = |thresholds| match w.low_rank {
        Some(factors) => Rows::LowRank { factors, thresholds },
        None => Rows::Scored { planes: planes(), thresholds },
    };
    match choice {
        RowChoice::All => Rows::All,
        RowChoice::Active => Rows::Active,
        RowChoice::Limit(limit) => predicted(Limits::Layer(*limit)),
        RowChoice::RowLimits(limits) => predicted(Limits::PerRow(limits)),
        RowChoice::Threshold(threshold) => scored(Thresholds::Layer(*threshold)),
        RowChoice::RowThresholds(thresholds) => scored(Thresholds::PerRow(thresholds)),
    }
}

/// The rows of [`Buffers`] that a batch uses.
struct BatchBuffers<'a> {
    x: &'a mut [f32],
    normed: &'a mut [f32],
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    attended: &'a mut [f32],
    cos: &'a mut [f32],
    sin: &'a mut [f32],
    gate: &'a mut [f32],
    h: &'a mut [f32],
    n_neg: &'a mut [u32],
    skip: &'a mut [bool],
}

impl Buffers {
    fn new(
        attention: &AttentionShape,
        hidden_size: usize,
        intermediate_size: usize,
        n_batch_max: usize,
    ) -> Self {
        let floats = |width: usize| vec![0.0; n_batch_max * width];
        let q_width = attention.n_heads * attention.head_dim;
        let kv_width = attention.n_kv_heads * attention.head_dim;
        Self {
            n_batch_max,
            x: floats(hidden_size),
            normed: floats(hidden_size),
            q: floats(q_width),
            k: floats(kv_width),
            v: floats(kv_width),
            attended: floats(q_width),
            cos: floats(attention.head_dim / 2),
            sin: floats(attention.head_dim / 2),
            gate: floats(intermediate_size),
            h: floats(intermediate_size),
            n_neg: vec![0; n_batch_max * intermediate_size],
            skip: vec![false; n_batch_max * intermediate_size],
        }
    }

    /// The first `n_tokens` rows of every buffer.
    fn first(&mut self, n_tokens: usize) -> BatchBuffers<'_> {
        fn first<T>(values: &mut [T], n_tokens: usize, n_batch_max: usize) -> &mut [T] {
            let width = values.len() / n_batch_max;
            &mut values[..n_tokens * width]
        }
        let n_max = self.n_batch_max;
        BatchBuffers {
            x: first(&mut self.x, n_tokens, n_max),
            normed: first(&mut self.normed, n_tokens, n_max),
            q: first(&mut self.q, n_tokens, n_max),
            k: first(&mut self.k, n_tokens, n_max),
            v: first(&mut self.v, n_tokens, n_max),
            attended: first(&mut self.attended, n_tokens, n_max),
            cos: first(&mut self.cos, n_tokens, n_max),
            sin: first(&mut self.sin, n_tokens, n_max),
            gate: first(&mut self.gate, n_tokens, n_max),
            h: first(&mut self.h, n_tokens, n_max),
            n_neg: first(&mut self.n_neg, n_tokens, n_max),
            skip: first(&mut self.skip, n_tokens, n_max),
        }
    }
}

impl RopeAngles {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let stretch = match config.rope.scaling {
            RopeScaling::None => 1.0,
            RopeScaling::Linear { factor } => factor,
        };
        let head_dim = f64::from(config.head_dim);
        let frequency = |i| config.rope.theta.powf(-2.0 * f64::from(i) / head_dim) / stretch;
        Self { frequencies: (0..config.head_dim / 2).map(frequency).collect() }
    }

    /// `cos` and `sin` `(head_dim / 2,)` of `position`.
    pub(crate) fn fill(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
            let angle = position as f64 * frequency;
            (*cos, *sin) = (angle.cos() as f32, angle.sin() as f32);
        }
    }
}
