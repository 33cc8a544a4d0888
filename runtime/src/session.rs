//! A context being filled: weights by reference, cache and buffers of its own.

use format_spec::calibration::{alpha_from_limit, limit_from_alpha};
use format_spec::{PredictorKind, SectionKind};
use kernels::ShapeError;

use crate::device::Device;
use crate::engine::{Batch, BatchLogits, Engine, RowChoice};
use crate::engine_cuda::CudaEngine;
use crate::forward::CpuEngine;
use crate::sampler::{SampleError, Sampler, SamplerOptions};
use crate::{Model, RuntimeError};

/// What a session needs to know up front.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Positions that the cache holds; at most `max_position_embeddings`.
    pub n_positions_max: usize,
    /// Most tokens of one batch.
    pub n_batch_max: usize,
    /// Threads; 0 takes one for each available core.
    pub n_threads: usize,
    /// Rows that decode reads.
    pub mode: MlpMode,
    /// Factor on every layer's alpha; 1 leaves the stored limits as they are.
    pub alpha_scale: f64,
}

/// Rows that an MLP reads while decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpMode {
    /// As the file's predictor records say.
    Stored,
    /// Every gate row, up and down where active.
    Exact,
    /// Everything.
    Dense,
}

/// What one layer's MLP saw for a batch of tokens. All row-major.
#[derive(Clone, Copy, Debug)]
pub struct MlpBatch<'a> {
    /// Layer.
    pub layer: usize,
    /// Tokens.
    pub n_tokens: usize,
    /// Input after RMSNorm, `(n_tokens, hidden_size)`.
    pub x: &'a [f32],
    /// Gate projections before the activation, `(n_tokens, intermediate_size)`.
    pub gate: &'a [f32],
    /// `act(gate) * up` before any mask, `(n_tokens, intermediate_size)`.
    pub h: &'a [f32],
    /// Sign disagreements of every row with `x`, `(n_tokens, intermediate_size)`; empty unless
    /// [`MlpObserver::wants_n_neg`], and in files that have no sign words.
    pub n_neg: &'a [u32],
    /// Rows that the mask leaves out, `(n_tokens, intermediate_size)`; empty when the pass is not masked or the
    /// layer predicts nothing.
    pub skip: &'a [bool],
}

/// Sees every layer's MLP of a batch, in layer order.
pub trait MlpObserver {
    /// True if [`MlpBatch::n_neg`] is to be filled.
    fn wants_n_neg(&self) -> bool {
        false
    }

    /// Called once for each layer of each batch, before the down projection.
    fn mlp(&mut self, batch: &MlpBatch<'_>);
}

/// What decoding has read since [`Session::reset_usage`]; prompts are not counted.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Tokens decoded.
    pub n_tokens: u64,
    /// Bytes needed: weights, sign words and cache that the decoded tokens used, each once per token.
    pub n_bytes: u64,
    /// By layer.
    pub layers: Vec<LayerUsage>,
}

/// Gate rows that decoding computed in one layer, summed over tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerUsage {
    /// Gate rows computed.
    pub n_kept: u64,
    /// Rows whose activation was not zero.
    pub n_active: u64,
}

/// A context being filled.
#[derive(Debug)]
pub struct Session<'m> {
    model: &'m Model,
    engine: Box<dyn Engine + 'm>,
    n_positions: usize,
    n_positions_max: usize,
    n_batch_max: usize,
    limits: Vec<Option<u32>>,
    usage: Usage,
}

impl<'m> Session<'m> {
    /// Allocates everything that decoding needs.
    ///
    /// # Errors
    /// [`RuntimeError::ContextTooLong`].
    pub fn new(model: &'m Model, options: &SessionOptions) -> Result<Self, RuntimeError> {
        Self::on(Device::Cpu, model, options, &mut |_, _| {})
    }

    /// As [`Session::new`], on `device`; [`Device::Auto`] takes the first CUDA device that has room for the model, else
    /// the CPU, and [`Session::backend`] says which. `progress` hears how many bytes of how many are on their way to a
    /// device with memory of its own.
    ///
    /// # Errors
    /// As [`Session::new`]; [`RuntimeError::Cuda`].
    pub fn on(
        device: Device,
        model: &'m Model,
        options: &SessionOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, RuntimeError> {
        let max = model.config().max_position_embeddings as usize;
        if options.n_positions_max > max {
            return Err(RuntimeError::ContextTooLong { wanted: options.n_positions_max, max });
        }
        let options = SessionOptions { n_batch_max: options.n_batch_max.max(1), ..options.clone() };
        let engine: Box<dyn Engine + 'm> = match device {
            Device::Cpu => Box::new(CpuEngine::new(model, &options)),
            Device::Cuda(index) => Box::new(CudaEngine::new(model, index as usize, &options, progress)?),
            Device::Auto => match CudaEngine::first_that_fits(model, &options, progress) {
                Some(engine) => Box::new(engine),
                None => Box::new(CpuEngine::new(model, &options)),
            },
        };
        let mut session = Self {
            model,
            engine,
            n_positions: 0,
            n_positions_max: options.n_positions_max,
            n_batch_max: options.n_batch_max,
            limits: Vec::new(),
            usage: Usage::default(),
        };
        session.set_mode(options.mode, options.alpha_scale);
        session.reset_usage();
        Ok(session)
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Forgets all positions.
    pub fn reset(&mut self) {
        self.n_positions = 0;
    }

    /// Changes the rows that decode reads; the context stays.
    pub fn set_mode(&mut self, mode: MlpMode, alpha_scale: f64) {
        let n_layers = self.model.config().num_hidden_layers;
        let choice = |layer| RowChoice::new(mode, stored_rows(self.model, layer, alpha_scale));
        self.set_rows((0..n_layers).map(choice).collect());
    }

    /// Has decode keep the gate rows whose n_neg is at most the layer's limit, `(num_hidden_layers,)`, whatever the
    /// file's predictor says; the context stays.
    ///
    /// # Errors
    /// [`RuntimeError::NoSigns`] where a layer has no sign words; [`RuntimeError::Shape`] for limits of another length.
    pub fn set_limits(&mut self, limits: &[u32]) -> Result<(), RuntimeError> {
        let n_layers = self.model.config().num_hidden_layers as usize;
        if limits.len() != n_layers {
            return Err(ShapeError { what: "limits", expected: n_layers, found: limits.len() }.into());
        }
        let has_signs =
            |layer: usize| self.model.layout().find(SectionKind::GateSigns, Some(layer as u32)).is_some();
        if let Some(layer) = (0..n_layers).find(|&layer| !has_signs(layer)) {
            return Err(RuntimeError::NoSigns { path: self.model.path().to_owned(), layer });
        }
        self.set_rows(limits.iter().map(|&limit| RowChoice::Limit(limit)).collect());
        Ok(())
    }

    fn set_rows(&mut self, rows: Vec<RowChoice>) {
        self.limits = rows
            .iter()
            .map(|choice| match choice {
                RowChoice::All | RowChoice::Active => None,
                RowChoice::Limit(limit) => Some(*limit),
                RowChoice::RowLimits(limits) => limits.iter().max().copied(),
            })
            .collect();
        self.engine.set_rows(rows);
    }

    /// Positions filled.
    pub fn n_positions(&self) -> usize {
        self.n_positions
    }

    /// Positions that the cache holds.
    pub fn n_positions_max(&self) -> usize {
        self.n_positions_max
    }

    /// Tokens of a batch that the backend is fastest with; at most `n_batch_max`.
    pub fn n_batch(&self) -> usize {
        self.engine.n_batch()
    }

    /// What runs the model, for people: `cpu (avx512, 2 threads)`.
    pub fn backend(&self) -> String {
        self.engine.describe()
    }

    /// The limits on n_neg that decoding uses, one per layer (the largest where rows have their own); `None` where a
    /// layer predicts nothing.
    pub fn limits(&self) -> &[Option<u32>] {
        &self.limits
    }

    /// What decoding has read since the last [`Session::reset_usage`].
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Starts counting anew.
    pub fn reset_usage(&mut self) {
        let n_layers = self.model.config().num_hidden_layers as usize;
        self.usage = Usage { n_tokens: 0, n_bytes: 0, layers: vec![LayerUsage::default(); n_layers] };
    }

    /// Plain read bandwidth of the backend over fresh memory, in GB/s (10^9), now.
    pub fn measure_read_gb_per_s(&self) -> f64 {
        self.engine.measure_read_gb_per_s()
    }

    /// Dense pass over `tokens` in batches, appended to the context; logits of the last one, `(vocab_size,)`.
    /// Without tokens: the logits of the last call.
    ///
    /// # Errors
    /// [`RuntimeError::ContextFull`] and [`RuntimeError::TokenId`], before anything is computed.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32], RuntimeError> {
        self.check(tokens)?;
        let n_batch = self.engine.n_batch();
        let n_batches = tokens.len().div_ceil(n_batch);
        for (idx, tokens) in tokens.chunks(n_batch).enumerate() {
            let logits = if idx + 1 == n_batches { BatchLogits::Last } else { BatchLogits::None };
            self.append(tokens, false, logits, None)?;
        }
        Ok(self.engine.logits())
    }

    /// One token through all layers, reading the rows that the mode selects; logits of the next, `(vocab_size,)`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: u32) -> Result<&[f32], RuntimeError> {
        self.check(&[token])?;
        self.engine.decode(token, self.n_positions, &mut self.usage)?;
        self.n_positions += 1;
        Ok(self.engine.logits())
    }

    /// Has [`Session::decode_and_choose`] draw on the device as a [`Sampler`] of these options would, which the CPU's
    /// engine does not, nor any with a repeat penalty.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`].
    pub fn set_sampler(&mut self, options: &SamplerOptions, excluded: &[u32]) -> Result<(), RuntimeError> {
        self.engine.set_sampler(options, excluded)
    }

    /// As [`Session::decode`], and the next token: drawn on the device after [`Session::set_sampler`], which leaves the
    /// logits there, else by `sampler`.
    ///
    /// # Errors
    /// As [`Session::decode`]; the inner one where the logits are of no use.
    pub fn decode_and_choose(
        &mut self,
        token: u32,
        sampler: &mut Sampler,
    ) -> Result<Result<u32, SampleError>, RuntimeError> {
        self.check(&[token])?;
        match self.engine.decode_and_choose(token, self.n_positions, &mut self.usage)? {
            Some(chosen) => {
                self.n_positions += 1;
                Ok(chosen)
            }
            None => Ok(sampler.sample(self.decode(token)?)),
        }
    }

    /// One batch (at most `n_batch_max` tokens) appended to the context. With `masked`, rows that the session's mode
    /// would skip contribute nothing, as in decode. `logits`, where wanted: `(n_tokens, vocab_size)`.
    ///
    /// # Errors
    /// As [`Session::prefill`]; [`RuntimeError::BatchTooLarge`]; [`RuntimeError::Shape`] for logits of another length.
    pub fn forward_batch(
        &mut self,
        tokens: &[u32],
        masked: bool,
        logits: Option<&mut [f32]>,
        observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError> {
        self.check(tokens)?;
        if tokens.len() > self.n_batch_max {
            return Err(RuntimeError::BatchTooLarge {
                n_tokens: tokens.len(),
                n_batch_max: self.n_batch_max,
            });
        }
        self.append(tokens, masked, logits.map_or(BatchLogits::None, BatchLogits::All), observer)
    }

    fn append(
        &mut self,
        tokens: &[u32],
        masked: bool,
        logits: BatchLogits<'_>,
        observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError> {
        let first_position = self.n_positions;
        self.engine.forward_batch(Batch { tokens, first_position, masked, logits }, observer)?;
        self.n_positions += tokens.len();
        Ok(())
    }

    /// The error for `wanted` positions, more than the context holds.
    pub(crate) fn context_full(&self, wanted: usize) -> RuntimeError {
        let max = self.model.config().max_position_embeddings as usize;
        RuntimeError::ContextFull { wanted, n_positions_max: self.n_positions_max, max }
    }

    /// That `tokens` are tokens and that the context has room for them.
    fn check(&self, tokens: &[u32]) -> Result<(), RuntimeError> {
        let wanted = self.n_positions + tokens.len();
        if wanted > self.n_positions_max {
            return Err(self.context_full(wanted));
        }
        let vocab_size = self.model.config().vocab_size;
        match tokens.iter().find(|&&id| id >= vocab_size) {
            Some(&id) => Err(RuntimeError::TokenId { id, vocab_size }),
            None => Ok(()),
        }
    }
}

/// What the file's record for `layer` keeps, its alpha multiplied by `alpha_scale`; `None` where it predicts nothing.
fn stored_rows(model: &Model, layer: u32, alpha_scale: f64) -> Option<RowChoice> {
    let hidden_size = model.config().hidden_size;
    let scaled = |limit: u32, alpha: f64| {
        if alpha_scale == 1.0 { limit } else { limit_from_alpha(alpha * alpha_scale, hidden_size) }
    };
    let record = &model.layout().predictors()[layer as usize];
    match record.kind {
        PredictorKind::Off => None,
        PredictorKind::Sign => Some(RowChoice::Limit(scaled(record.limit, f64::from(record.alpha)))),
        PredictorKind::SignPerRow => {
            let limits = model.words(SectionKind::GateLimits, Some(layer as usize)).iter();
            let scaled = limits.map(|&limit| scaled(limit, alpha_from_limit(limit, hidden_size)));
            Some(RowChoice::RowLimits(scaled.collect()))
        }
    }
}
