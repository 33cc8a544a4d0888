//! A context being filled: weights by reference, cache and buffers of its own.

use format_spec::calibration::{alpha_from_limit, limit_from_alpha};
use format_spec::{BudgetPoint, PredictorKind, SectionKind};
use kernels::{BitPlanes, LowRank, ShapeError};

use crate::adaptive::Adaptive;
use crate::audit::{Audit, AuditOptions, AuditReport, BatchAudit};
use crate::device::Device;
use crate::engine::{Batch, BatchLogits, Engine, RowChoice};
use crate::engine_cuda::CudaEngine;
use crate::forward::CpuEngine;
use crate::sampler::{SampleError, Sampler, SamplerOptions};
use crate::steps::Step;
use crate::{Model, RuntimeError};

/// Most threads that the command lines take.
pub const N_THREADS_MAX: usize = 1024;

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
    /// Factor on every layer's alpha in [`MlpMode::Stored`]; 1 leaves the stored limits as they are.
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

/// How a layer predicts, in place of what its record says.
#[derive(Clone, Debug)]
pub struct LayerPrediction<'m> {
    /// W_gate in a few bits; an exact layer needs none.
    pub planes: Option<BitPlanes<'m>>,
    /// Factors of low rank, which scores are then made of in place of planes.
    pub low_rank: Option<LowRank<'m>>,
    /// What is compared with them.
    pub limit: PredictionLimit,
}

/// What decides whether a row is computed.
#[derive(Clone, Debug, PartialEq)]
pub enum PredictionLimit {
    /// Nothing: every gate row is.
    Exact,
    /// The largest n_neg.
    Signs(u32),
    /// The smallest score, for each row.
    Scores(Vec<f32>),
}

/// Sees every layer's MLP of a batch, in layer order.
pub trait MlpObserver {
    /// True if [`MlpBatch::n_neg`] is to be filled.
    fn wants_n_neg(&self) -> bool {
        false
    }

    /// Fills `skip (n_tokens, intermediate_size)` with the rows of `layer` to leave out for the input
    /// `x (n_tokens, hidden_size)`, in place of those that the session would. False leaves the choice to the session.
    fn mask(&mut self, layer: usize, n_tokens: usize, x: &[f32], skip: &mut [bool]) -> bool {
        let _ = (layer, n_tokens, x, skip);
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
    engine: Box<dyn Engine<'m> + 'm>,
    /// Devices that [`Device::Auto`] did not take, and why.
    passed_over: Vec<String>,
    n_positions: usize,
    n_positions_max: usize,
    n_batch_max: usize,
    n_threads: usize,
    limits: Vec<Option<f32>>,
    /// In place of the stored limits and thresholds, one for each layer.
    budget: Option<Vec<f32>>,
    /// The engine has planes and factors of [`Session::set_prediction`].
    has_own_predictors: bool,
    usage: Usage,
    audit: Option<Audit>,
    adaptive: Option<Adaptive>,
    /// Tokens of a batch that are audited, with the numbers of their audits.
    due: Vec<(usize, usize)>,
}

impl<'m> Session<'m> {
    /// Allocates everything that decoding needs.
    ///
    /// # Errors
    /// [`RuntimeError::ContextTooLong`], [`RuntimeError::NoAlpha`].
    pub fn new(model: &'m Model, options: &SessionOptions) -> Result<Self, RuntimeError> {
        Self::on(Device::Cpu, model, options, &mut |_, _| {})
    }

    /// As [`Session::new`], on `device`; [`Device::Auto`] takes the first CUDA device that has room for the model, else
    /// the CPU; [`Session::backend`] says which, [`Session::passed_over`] why not another. `progress` hears how many bytes
    /// of how many are on their way to a device with memory of its own.
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
        let mut passed_over = Vec::new();
        let engine: Box<dyn Engine<'m> + 'm> = match device {
            Device::Cpu => Box::new(CpuEngine::new(model, &options)),
            Device::Cuda(index) => Box::new(CudaEngine::new(model, index as usize, &options, progress)?),
            Device::Auto => match CudaEngine::first_that_fits(model, &options, progress, &mut passed_over) {
                Some(engine) => Box::new(engine),
                None => Box::new(CpuEngine::new(model, &options)),
            },
        };
        let mut session = Self {
            model,
            engine,
            passed_over,
            n_positions: 0,
            n_positions_max: options.n_positions_max,
            n_batch_max: options.n_batch_max,
            n_threads: options.n_threads,
            limits: Vec::new(),
            budget: None,
            has_own_predictors: false,
            usage: Usage::default(),
            audit: None,
            adaptive: None,
            due: Vec::new(),
        };
        session.set_mode(options.mode, options.alpha_scale)?;
        session.reset_usage();
        Ok(session)
    }

    /// Threads that the session was made for; 0 is one for each available core.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// The model.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// Forgets all positions.
    pub fn reset(&mut self) {
        self.n_positions = 0;
    }

    /// Changes the rows that decode reads; the context stays, audits begin anew.
    ///
    /// # Errors
    /// [`RuntimeError::NoAlpha`] for a scale other than 1 where the file's predictors have no alpha;
    /// [`RuntimeError::NothingToAudit`] and [`RuntimeError::NoTarget`] in a session that audits; [`RuntimeError::Cuda`].
    pub fn set_mode(&mut self, mode: MlpMode, alpha_scale: f64) -> Result<(), RuntimeError> {
        let records = self.model.layout().predictors();
        let is_scaled = mode == MlpMode::Stored && alpha_scale != 1.0;
        let without_alpha = records.iter().position(|record| is_scaled && record.kind.has_score());
        if let Some(layer) = without_alpha {
            let (path, found) = (self.model.path().to_owned(), records[layer].kind.name());
            return Err(RuntimeError::NoAlpha { path, layer, found });
        }
        self.return_to_the_files_predictors()?;
        let choice = |layer: usize| {
            let budget = self.budget.as_ref().map(|limits| limits[layer]);
            RowChoice::new(mode, stored_rows(self.model, layer, budget, alpha_scale))
        };
        self.set_rows((0..records.len()).map(choice).collect())
    }

    /// Has decode keep the gate rows whose n_neg is at most the layer's limit, `(num_hidden_layers,)`, whatever the
    /// file's predictor says; the context stays.
    ///
    /// # Errors
    /// [`RuntimeError::NoSigns`] where a layer has no sign words; [`RuntimeError::Shape`] for limits of another length;
    /// [`RuntimeError::NothingToAudit`] and [`RuntimeError::NoTarget`] in a session that audits; [`RuntimeError::Cuda`].
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
        self.return_to_the_files_predictors()?;
        self.set_rows(limits.iter().map(|&limit| RowChoice::Limit(limit)).collect())
    }

    /// Undoes [`Session::set_prediction`], but for the rows.
    fn return_to_the_files_predictors(&mut self) -> Result<(), RuntimeError> {
        if self.has_own_predictors {
            let n_layers = self.model.config().num_hidden_layers as usize;
            let planes: Vec<_> = (0..n_layers).map(|layer| self.model.gate_planes(layer)).collect();
            let factors: Vec<_> = (0..n_layers).map(|layer| self.model.low_rank(layer)).collect();
            self.engine.set_predictors(&planes, &factors)?;
            self.has_own_predictors = false;
        }
        Ok(())
    }

    fn set_rows(&mut self, rows: Vec<RowChoice>) -> Result<(), RuntimeError> {
        self.limits = rows.iter().map(RowChoice::widest).collect();
        if let Some(audit) = &mut self.audit {
            audit.restart(rows.iter().map(RowChoice::is_predicted));
        }
        self.engine.set_rows(rows);
        self.start_adapting()
    }

    /// Audits what prediction leaves out, in decoding and in masked batches, from now on; or no longer. Does not change
    /// results, unless the options ask to adapt.
    ///
    /// # Errors
    /// [`RuntimeError::NothingToAudit`] where nothing is predicted, [`RuntimeError::NoTarget`] where there is nothing to
    /// adapt by.
    pub fn set_audit(&mut self, options: Option<AuditOptions>) -> Result<(), RuntimeError> {
        self.audit = None;
        self.adaptive = None;
        let Some(options) = options else { return Ok(()) };
        let predicting: Vec<bool> = self.limits.iter().map(Option::is_some).collect();
        if !predicting.contains(&true) {
            return Err(RuntimeError::NothingToAudit { path: self.model.path().to_owned() });
        }
        let n_rows = self.model.config().intermediate_size as usize;
        self.audit = Some(Audit::new(options, predicting, n_rows, self.n_positions_max));
        self.start_adapting()
    }

    /// What audits found since [`Session::set_audit`] or [`Session::set_mode`]; none before the first.
    pub fn audit(&self) -> Option<AuditReport> {
        let adaptive = self.adaptive.as_ref().map(Adaptive::report);
        self.audit.as_ref().and_then(|audit| audit.report(adaptive))
    }

    /// Puts the limits where adapting begins.
    fn start_adapting(&mut self) -> Result<(), RuntimeError> {
        self.adaptive = None;
        if !self.audit.as_ref().is_some_and(|audit| audit.options().adaptive) {
            return Ok(());
        }
        let adaptive = Adaptive::new(self.model, &self.limits, self.budget.as_deref())?;
        for (layer, limit) in adaptive.limits() {
            set_limit(self.model, self.engine.as_mut(), &mut self.limits, layer, limit);
        }
        self.adaptive = Some(adaptive);
        Ok(())
    }

    /// Moves limits after an audit.
    fn adapt(&mut self) {
        if let (Some(adaptive), Some(audit)) = (&mut self.adaptive, &mut self.audit) {
            let (model, engine, limits) = (self.model, self.engine.as_mut(), &mut self.limits);
            adaptive.step(audit, |layer, limit| set_limit(model, engine, limits, layer, limit));
        }
    }

    /// Predicts with `layers` in place of the file's records, until the next [`Session::set_mode`] or
    /// [`Session::set_limits`]; audits end. A device with memory of its own gets what is not the file's, for as long.
    ///
    /// # Errors
    /// [`RuntimeError::Shape`] unless there is one for each layer, with what its limit is compared with;
    /// [`RuntimeError::Cuda`], and every gate row is computed for as long.
    pub fn set_prediction(&mut self, layers: Vec<LayerPrediction<'m>>) -> Result<(), RuntimeError> {
        let n_layers = self.model.config().num_hidden_layers as usize;
        for (what, expected, found) in [
            ("layers that predict", n_layers, layers.len()),
            ("layers with planes or factors for their limits", n_layers, n_complete(&layers)),
        ] {
            if found != expected {
                return Err(ShapeError { what, expected, found }.into());
            }
        }
        let planes: Vec<Option<BitPlanes<'m>>> = layers.iter().map(|layer| layer.planes).collect();
        let factors: Vec<Option<LowRank<'m>>> = layers.iter().map(|layer| layer.low_rank).collect();
        self.has_own_predictors = true;
        (self.audit, self.adaptive) = (None, None);
        self.engine.set_predictors(&planes, &factors)?;
        let rows = layers.into_iter().map(|layer| match layer.limit {
            PredictionLimit::Exact => RowChoice::Active,
            PredictionLimit::Signs(limit) => RowChoice::Limit(limit),
            PredictionLimit::Scores(thresholds) => RowChoice::RowThresholds(thresholds),
        });
        self.engine.set_rows(rows.collect());
        Ok(())
    }

    /// Takes the limits and thresholds that the file's budget curve has for a mean KL divergence of `kl` in place of
    /// those of its records, from the next [`Session::set_mode`] on: between the curve's points, a mixture of two.
    ///
    /// # Errors
    /// [`RuntimeError::NoBudget`] for a file without a curve, [`RuntimeError::Format`] for a broken one,
    /// [`RuntimeError::BudgetOutside`] beyond its ends.
    pub fn set_budget(&mut self, kl: f64) -> Result<(), RuntimeError> {
        let path = self.model.path();
        let curve = self.model.layout().budget_curve(self.model.bytes());
        let curve = curve.map_err(|error| RuntimeError::format(path, error))?;
        let curve = curve.ok_or_else(|| RuntimeError::NoBudget { path: path.to_owned() })?;
        let limits = limits_for(&curve, kl).map_err(|(min, max)| RuntimeError::BudgetOutside {
            path: path.to_owned(),
            min,
            max,
            found: kl,
        })?;
        self.budget = Some(limits);
        Ok(())
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

    /// The GPUs that [`Device::Auto`] found and did not take, each with the reason: `cuda:0: out of memory ...`.
    pub fn passed_over(&self) -> &[String] {
        &self.passed_over
    }

    /// The limits on n_neg, or thresholds on scores, that decoding uses, one per layer (the widest where rows have
    /// their own); `None` where a layer predicts nothing.
    pub fn limits(&self) -> &[Option<f32>] {
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
        if !self.decode_if_audited(token)? {
            self.decode_plain(token)?;
        }
        Ok(self.engine.logits())
    }

    fn decode_plain(&mut self, token: u32) -> Result<(), RuntimeError> {
        self.engine.decode(token, self.n_positions, &mut self.usage)?;
        self.n_positions += 1;
        Ok(())
    }

    /// Counts `token` among those of the audits, and decodes it if it is to be audited.
    fn decode_if_audited(&mut self, token: u32) -> Result<bool, RuntimeError> {
        let Some(audit) = &mut self.audit else { return Ok(false) };
        let Some(number) = audit.next_token() else { return Ok(false) };
        self.engine.decode_audited(token, self.n_positions, &mut self.usage, audit, number)?;
        self.n_positions += 1;
        self.adapt();
        Ok(true)
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
    /// logits there, else by `sampler`, as after an audited token. Both draw the same.
    ///
    /// # Errors
    /// As [`Session::decode`]; the inner one where the logits are of no use.
    pub fn decode_and_choose(
        &mut self,
        token: u32,
        sampler: &mut Sampler,
    ) -> Result<Result<u32, SampleError>, RuntimeError> {
        self.check(&[token])?;
        if !self.decode_if_audited(token)? {
            if let Some(chosen) = self.engine.decode_and_choose(token, self.n_positions, &mut self.usage)? {
                self.n_positions += 1;
                return Ok(chosen);
            }
            self.decode_plain(token)?;
        }
        Ok(sampler.sample(self.engine.logits()))
    }

    /// Decodes `tokens` after the context, which stays as it is, and times the steps of a token in the engine's kernel.
    /// Usage does not count them. No steps where the model's widths have a token run as single kernels; `None` on a CPU.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn time_steps(&mut self, tokens: &[u32]) -> Result<Option<Vec<Step>>, RuntimeError> {
        self.check(tokens)?;
        self.engine.time_steps(tokens, self.n_positions)
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
        if masked && self.audit.is_some() {
            return self.append_audited(tokens, logits, observer);
        }
        self.append(tokens, masked, logits.map_or(BatchLogits::None, BatchLogits::All), observer)
    }

    /// A masked batch with audits. Where limits adapt it is cut after each audited token, as the next one may find others.
    fn append_audited(
        &mut self,
        mut tokens: &[u32],
        mut logits: Option<&mut [f32]>,
        mut observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError> {
        let vocab_size = self.model.config().vocab_size as usize;
        while let Some(mut audit) = self.audit.take_if(|_| !tokens.is_empty()) {
            let is_adaptive = self.adaptive.is_some();
            let n_tokens = if is_adaptive { audit.n_to_audit(tokens.len()) } else { tokens.len() };
            let (part, rest) = tokens.split_at(n_tokens);
            let (part_logits, rest_logits) = match logits {
                Some(logits) if !rest.is_empty() && logits.len() >= n_tokens * vocab_size => {
                    let (part, rest) = logits.split_at_mut(n_tokens * vocab_size);
                    (Some(part), Some(rest))
                }
                logits => (logits, None),
            };
            self.due.clear();
            self.due.extend((0..n_tokens).filter_map(|token| Some((token, audit.next_token()?))));
            let due = std::mem::take(&mut self.due);
            let mut watcher = BatchAudit {
                audit: &mut audit,
                model: self.model,
                activation: self.model.activation(),
                due: &due,
                observer: observer.as_deref_mut(),
            };
            let part_logits = part_logits.map_or(BatchLogits::None, BatchLogits::All);
            let appended = self.append(part, true, part_logits, Some(&mut watcher));
            (self.audit, self.due) = (Some(audit), due);
            appended?;
            self.adapt();
            (tokens, logits) = (rest, rest_logits);
        }
        Ok(())
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

/// The limits of `curve` for a divergence of `kl`, or the ends that it lies beyond. Points whose divergence was not measured
/// are left out.
fn limits_for(curve: &[BudgetPoint], kl: f64) -> Result<Vec<f32>, (f32, f32)> {
    let measured = || curve.iter().filter(|point| point.kl.is_finite());
    // In the few digits that an end is printed with it may lie beyond itself.
    if let Some(point) = measured().find(|point| point.kl == kl as f32) {
        return Ok(point.limits.clone());
    }
    let below = measured().filter(|point| f64::from(point.kl) <= kl).max_by(|a, b| a.kl.total_cmp(&b.kl));
    let above = measured().filter(|point| f64::from(point.kl) > kl).min_by(|a, b| a.kl.total_cmp(&b.kl));
    match (below, above) {
        (Some(below), Some(above)) => {
            // Divergences span decades, so the place between two is one of logarithms.
            let place = |point: &BudgetPoint| f64::from(point.kl).max(f64::from(f32::MIN_POSITIVE)).ln();
            let share = ((kl.ln() - place(below)) / (place(above) - place(below))).clamp(0.0, 1.0) as f32;
            let mixed = below.limits.iter().zip(&above.limits);
            Ok(mixed.map(|(below, above)| below + share * (above - below)).collect())
        }
        _ => {
            let kls = || measured().map(|point| point.kl);
            Err((kls().fold(f32::NAN, f32::min), kls().fold(f32::NAN, f32::max)))
        }
    }
}

/// How many of `layers` have what their limit is compared with.
fn n_complete(layers: &[LayerPrediction<'_>]) -> usize {
    let is_complete = |layer: &&LayerPrediction<'_>| match layer.limit {
        PredictionLimit::Exact => true,
        PredictionLimit::Signs(_) => layer.planes.is_some(),
        PredictionLimit::Scores(_) => layer.planes.is_some() || layer.low_rank.is_some(),
    };
    layers.iter().filter(is_complete).count()
}

/// What the file's record for `layer` keeps, with its limit or threshold replaced by that of a `budget` and then its
/// alpha scaled; `None` where it predicts nothing. Thresholds have no alpha.
fn stored_rows(model: &Model, layer: usize, budget: Option<f32>, alpha_scale: f64) -> Option<RowChoice> {
    let hidden_size = model.config().hidden_size;
    let scaled = |limit: u32, alpha: f64| {
        if alpha_scale == 1.0 { limit } else { limit_from_alpha(alpha * alpha_scale, hidden_size) }
    };
    let record = &model.layout().predictors()[layer];
    match record.kind {
        PredictorKind::Off => None,
        PredictorKind::Sign => {
            let stored = (record.limit, f64::from(record.alpha));
            let (limit, alpha) = budget.map_or(stored, |limit| {
                // Up, on the side that keeps more rows.
                let limit = limit.ceil() as u32;
                (limit, alpha_from_limit(limit, hidden_size))
            });
            Some(RowChoice::Limit(scaled(limit, alpha)))
        }
        PredictorKind::SignPerRow => {
            let limits = model.words(SectionKind::GateLimits, Some(layer)).iter();
            let scaled = limits.map(|&limit| scaled(limit, alpha_from_limit(limit, hidden_size)));
            Some(RowChoice::RowLimits(scaled.collect()))
        }
        PredictorKind::SignX8
        | PredictorKind::W2
        | PredictorKind::W3
        | PredictorKind::LowRank
        | PredictorKind::LowRankRelu
        | PredictorKind::LowRankSign => {
            let threshold = budget.unwrap_or(record.threshold);
            Some(match model.gate_offsets(layer) {
                None => RowChoice::Threshold(threshold),
                Some(offsets) => {
                    RowChoice::RowThresholds(offsets.iter().map(|offset| threshold + offset).collect())
                }
            })
        }
    }
}

/// Moves the limit on n_neg, or the threshold, of `layer` in a session's engine and in its `limits`.
fn set_limit<'m>(
    model: &Model,
    engine: &mut (dyn Engine<'m> + 'm),
    limits: &mut [Option<f32>],
    layer: usize,
    moved: f32,
) {
    let rows = engine.layer_rows_mut(layer);
    match rows {
        RowChoice::All | RowChoice::Active | RowChoice::RowLimits(_) => {}
        RowChoice::Limit(limit) => *limit = moved as u32,
        RowChoice::Threshold(threshold) => *threshold = moved,
        RowChoice::RowThresholds(thresholds) => {
            // In place, as a decode step allocates nothing.
            for (threshold, offset) in thresholds.iter_mut().zip(model.gate_offsets(layer).unwrap_or(&[])) {
                *threshold = moved + offset;
            }
        }
    }
    limits[layer] = rows.widest();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_between_points_mix_their_limits() {
        let point = |kl, limit| BudgetPoint { kl, mlp_bytes: 0.5, limits: vec![limit, -limit] };
        let curve = [point(0.001, 200.0), point(f32::NAN, 7.0), point(0.004, 100.0)];
        let limits = |kl: f32| limits_for(&curve, f64::from(kl));
        assert_eq!(limits(0.001), Ok(vec![200.0, -200.0]));
        assert_eq!(limits(0.004), Ok(vec![100.0, -100.0]));
        // As they are printed, which is not what they are in twice the bits.
        assert_eq!(limits_for(&curve, 0.001), Ok(vec![200.0, -200.0]));
        assert_eq!(limits_for(&curve, 0.004), Ok(vec![100.0, -100.0]));
        for outside in [1e-9, 0.000_99, 0.004_01, 1.0] {
            assert_eq!(limits(outside), Err((0.001, 0.004)));
        }
        let middle = limits(0.002).expect("inside");
        assert!((middle[0] - 150.0).abs() < 0.01 && (middle[1] + 150.0).abs() < 0.01, "{middle:?}");
    }
}
