//! Quality over a text: perplexity, and how far the predicted run is from the model's own dense run.
//!
//! The text is cut into windows of BOS and `window - 1` tokens that do not overlap; every token but BOS is predicted
//! from those before it in its window. With l the logits of a position and t the token that follows,
//!
//! ```text
//! nll = log sum_i exp(l_i) - l_t          ppl = exp(mean nll)
//! KL(dense || predicted) = sum_i p_i (log p_i - log q_i),   p from the dense run, q from the predicted one
//! ```
//!
//! Sums are f64. Logits are held for one batch at a time, never for a window.

use format_spec::calibration::{alpha_from_limit, limit_from_alpha};
use kernels::Cpu;
use serde::Serialize;

use crate::stats::ratio;
use crate::{AuditReport, MlpBatch, MlpObserver, Model, RuntimeError, Session};

/// How a text is measured.
#[derive(Clone, Copy, Debug)]
pub struct PerplexityOptions {
    /// Tokens of a window, BOS included.
    pub window: usize,
    /// Most windows; none: all that the text fills.
    pub n_windows: Option<usize>,
    /// Tokens of a batch; at most what the sessions were made for.
    pub n_batch: usize,
    /// Factor on the stored alphas that the session was made with, to report them.
    pub alpha_scale: f64,
}

/// Quality of a run over a text.
#[derive(Clone, Debug, Serialize)]
pub struct Perplexity {
    /// Windows measured.
    pub n_windows: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens predicted.
    pub n_tokens: u64,
    /// Mean negative log likelihood of them, in nats.
    pub mean_nll: f64,
    /// `exp(mean_nll)`.
    pub ppl: f64,
    /// Mean negative log likelihood by window.
    pub nll_per_window: Vec<f64>,
    /// Against the dense run, where asked for.
    #[serde(flatten)]
    pub divergence: Option<Divergence>,
    /// By layer.
    pub layers: Vec<LayerQuality>,
    /// What audits estimated of it, where the session audits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditReport>,
}

/// Distance from the dense run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Divergence {
    /// Perplexity of the dense run.
    pub dense_ppl: f64,
    /// Mean over positions of KL(dense || predicted), in nats.
    pub kl_mean: f64,
    /// Largest of a position.
    pub kl_max: f64,
    /// Share of positions whose most probable token is the same.
    pub top1_agreement: f64,
}

/// What the predictor did in one layer. Shares are 0 to 1, over all (token, row) pairs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LayerQuality {
    /// Rows computed.
    pub rows_kept: f64,
    /// Rows whose activation is not zero.
    pub rows_active: f64,
    /// Share of active rows that are computed; 1 when none is active.
    pub recall: f64,
    /// Share of the MLP's output energy in rows left out.
    pub missed_energy: f64,
    /// Name of the predictor.
    pub predictor: &'static str,
    /// Largest n_neg, or smallest score, computed; none where nothing is predicted.
    pub limit: Option<f32>,
    /// The ratio that folds into `limit`.
    pub alpha: Option<f64>,
}

/// Why a text cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PerplexityError {
    /// Not even one window.
    #[error("the text has {n_tokens} tokens, one window of {window} needs {n_needed}")]
    TextTooShort {
        /// Tokens of the text.
        n_tokens: usize,
        /// Tokens of a window.
        window: usize,
        /// Tokens of text that a window takes.
        n_needed: usize,
    },
    /// A window in which nothing can be predicted.
    #[error("a window of {0} tokens has nothing to predict")]
    WindowTooSmall(usize),
    /// The logits of a position are not numbers.
    #[error("window {window}, position {position}: the logits give a negative log likelihood of {nll}")]
    NotFinite {
        /// Window, from 0.
        window: usize,
        /// Position in it.
        position: usize,
        /// What came out.
        nll: f64,
    },
    /// The forward pass refused.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

impl PerplexityError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::TextTooShort { .. } => Some("give a longer text or a smaller window with -c/--ctx-size"),
            Self::WindowTooSmall(_) => Some("raise -c/--ctx-size"),
            Self::NotFinite { .. } => None,
            Self::Runtime(error) => error.hint(),
        }
    }
}

/// Documents of a text, separated by lines `<|doc|>`, as one text.
pub fn join_documents(text: &str) -> String {
    text.replace("<|doc|>", "\n")
}

/// Measures `text` (ids without BOS) with the rows that `session` keeps, and against `dense`, where given.
/// `progress` gets the mean negative log likelihood so far after each window.
///
/// # Errors
/// [`PerplexityError`].
pub fn perplexity(
    session: &mut Session<'_>,
    mut dense: Option<&mut Session<'_>>,
    text: &[u32],
    options: &PerplexityOptions,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<Perplexity, PerplexityError> {
    let config = session.model().config();
    let bos = config.bos_token_id;
    let vocab_size = config.vocab_size as usize;
    let n_text = options.window.saturating_sub(usize::from(bos.is_some()));
    if options.window < 2 || n_text == 0 {
        return Err(PerplexityError::WindowTooSmall(options.window));
    }
    if text.len() < n_text {
        let (n_tokens, window) = (text.len(), options.window);
        return Err(PerplexityError::TextTooShort { n_tokens, window, n_needed: n_text });
    }
    let n_windows = (text.len() / n_text).min(options.n_windows.unwrap_or(usize::MAX));
    if let Some(&id) = text.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(RuntimeError::TokenId { id, vocab_size: config.vocab_size }.into());
    }
    let n_batch = options.n_batch.max(1);
    let cpu = Cpu::new(session.n_threads());
    let mut observer = RowObserver::new(session.model(), &cpu);
    let mut own = Likelihood::default();
    let mut reference = Likelihood::default();
    let mut distance = Distance::default();
    let mut logits = vec![0.0; n_batch * vocab_size];
    let mut dense_logits = vec![0.0; if dense.is_some() { logits.len() } else { 0 }];
    let mut nll_per_window = Vec::new();

    for (window_idx, chunk) in text.chunks_exact(n_text).take(n_windows).enumerate() {
        let window: Vec<u32> = bos.into_iter().chain(chunk.iter().copied()).collect();
        // The last token predicts nothing of this window.
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        session.reset();
        dense.iter_mut().for_each(|dense| dense.reset());
        let before = own;
        let mut position = 0;
        for (inputs, targets) in inputs.chunks(n_batch).zip(targets.chunks(n_batch)) {
            let n_logits = inputs.len() * vocab_size;
            session.forward_batch(inputs, true, Some(&mut logits[..n_logits]), Some(&mut observer))?;
            if let Some(dense) = dense.as_deref_mut() {
                dense.forward_batch(inputs, false, Some(&mut dense_logits[..n_logits]), None)?;
            }
            for nll in negative_log_likelihoods(&cpu, &logits, targets, vocab_size) {
                own.add(nll);
                if !nll.is_finite() {
                    return Err(PerplexityError::NotFinite { window: window_idx, position, nll });
                }
                position += 1;
            }
            if dense.is_some() {
                let nlls = negative_log_likelihoods(&cpu, &dense_logits, targets, vocab_size);
                nlls.into_iter().for_each(|nll| reference.add(nll));
                let pairs = separations(&cpu, &dense_logits[..n_logits], &logits[..n_logits], vocab_size);
                pairs.into_iter().for_each(|separation| distance.add(separation));
            }
        }
        nll_per_window.push(ratio(own.sum_nll - before.sum_nll, (own.n_tokens - before.n_tokens) as f64));
        progress(window_idx + 1, own.mean());
    }
    Ok(Perplexity {
        n_windows,
        window: options.window,
        n_tokens: own.n_tokens,
        mean_nll: own.mean(),
        ppl: own.mean().exp(),
        nll_per_window,
        divergence: dense.is_some().then(|| distance.divergence(reference.mean().exp())),
        layers: observer.layers(session, options.alpha_scale),
        audit: session.audit(),
    })
}

/// Sum of negative log likelihoods.
#[derive(Clone, Copy, Debug, Default)]
pub struct Likelihood {
    sum_nll: f64,
    n_tokens: u64,
}

impl Likelihood {
    /// Adds a token of this negative log likelihood.
    pub fn add(&mut self, nll: f64) {
        self.sum_nll += nll;
        self.n_tokens += 1;
    }

    /// Mean over the tokens added, in nats.
    pub fn mean(&self) -> f64 {
        ratio(self.sum_nll, self.n_tokens as f64)
    }
}

/// Sums over positions of what separates two runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Distance {
    sum_kl: f64,
    max_kl: f64,
    n_same_top: u64,
    n_positions: u64,
}

/// What separates two runs at one position.
#[derive(Clone, Copy, Debug, Default)]
pub struct Separation {
    /// KL(dense || predicted), in nats.
    pub kl: f64,
    /// The most probable token is the same.
    pub same_top: bool,
}

impl Separation {
    /// Of the distributions that these logits, `(vocab_size,)` each, make.
    pub fn new(dense: &[f32], predicted: &[f32]) -> Self {
        let (lse_dense, lse_predicted) = (log_sum_exp(dense), log_sum_exp(predicted));
        let kl: f64 = dense
            .iter()
            .zip(predicted)
            .map(|(&dense, &predicted)| {
                let log_p = f64::from(dense) - lse_dense;
                let log_q = f64::from(predicted) - lse_predicted;
                log_p.exp() * (log_p - log_q)
            })
            .sum();
        // Rounding may give a divergence of equal distributions a tiny negative value.
        Self { kl: kl.max(0.0), same_top: top(dense) == top(predicted) }
    }
}

impl Distance {
    /// Adds a position.
    pub fn add(&mut self, position: Separation) {
        self.sum_kl += position.kl;
        self.max_kl = self.max_kl.max(position.kl);
        self.n_same_top += u64::from(position.same_top);
        self.n_positions += 1;
    }

    /// What the positions added come to; `dense_ppl` is the dense run's perplexity over them.
    pub fn divergence(&self, dense_ppl: f64) -> Divergence {
        let n_positions = self.n_positions as f64;
        Divergence {
            dense_ppl,
            kl_mean: ratio(self.sum_kl, n_positions),
            kl_max: self.max_kl,
            top1_agreement: ratio(self.n_same_top as f64, n_positions),
        }
    }
}

/// Counts rows and energy by layer. Counts are made on several threads, and energies added in the order of tokens and rows,
/// so that sums do not depend on the threads.
#[derive(Debug)]
pub struct RowObserver<'a> {
    model: &'a Model,
    cpu: &'a Cpu,
    counts: Vec<RowCounts>,
    parts: Vec<Part>,
}

/// Tokens that a thread counts at a time.
const PART_TOKENS: usize = 8;

/// What some tokens have.
#[derive(Clone, Debug, Default)]
struct Part {
    /// But for the energies.
    counts: RowCounts,
    /// Of each active row, and whether it is left out.
    energies: Vec<(f64, bool)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct RowCounts {
    n_pairs: u64,
    n_kept: u64,
    n_active: u64,
    n_active_kept: u64,
    energy: f64,
    missed_energy: f64,
}

impl<'a> RowObserver<'a> {
    /// For runs of `model`, counted on the threads of `cpu`.
    pub fn new(model: &'a Model, cpu: &'a Cpu) -> Self {
        let n_layers = model.config().num_hidden_layers as usize;
        Self { model, cpu, counts: vec![RowCounts::default(); n_layers], parts: Vec::new() }
    }

    /// What was counted; `alpha_scale` is that of the session's mode.
    pub fn layers(&self, session: &Session<'_>, alpha_scale: f64) -> Vec<LayerQuality> {
        let records = session.model().layout().predictors();
        self.counts
            .iter()
            .zip(session.limits().iter().zip(records))
            .map(|(counts, (&limit, record))| {
                let alpha = limit.filter(|_| !record.kind.has_score()).map(|limit| {
                    let (scaled, limit) = (f64::from(record.alpha) * alpha_scale, limit as u32);
                    let hidden_size = session.model().config().hidden_size;
                    // Budgets and audits move limits away from the record's.
                    let is_own = limit_from_alpha(scaled, hidden_size) == limit;
                    if is_own { scaled } else { alpha_from_limit(limit, hidden_size) }
                });
                counts.quality(record.kind.name(), limit, alpha)
            })
            .collect()
    }
}

impl MlpObserver for RowObserver<'_> {
    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        let squared_norms = &self.model.down_squared_norms(self.cpu)[batch.layer];
        let activation = self.model.activation();
        let n_rows = squared_norms.len();
        self.parts.resize_with(batch.n_tokens.div_ceil(PART_TOKENS), Part::default);
        self.cpu.for_each(self.parts.iter_mut().enumerate(), |(idx, part)| {
            part.clear();
            for token in idx * PART_TOKENS..batch.n_tokens.min((idx + 1) * PART_TOKENS) {
                let rows = token * n_rows..(token + 1) * n_rows;
                let skip = batch.skip.get(rows.clone()).unwrap_or(&[]);
                part.add(&batch.gate[rows.clone()], &batch.h[rows], skip, squared_norms, activation);
            }
        });
        let counts = &mut self.counts[batch.layer];
        self.parts.iter().for_each(|part| counts.add(part));
    }
}

impl Part {
    fn clear(&mut self) {
        self.counts = RowCounts::default();
        self.energies.clear();
    }

    /// Adds one token; all slices are `(intermediate_size,)`, `skip` is empty where nothing is left out.
    fn add(
        &mut self,
        gate: &[f32],
        h: &[f32],
        skip: &[bool],
        squared_norms: &[f64],
        activation: kernels::Activation,
    ) {
        let counts = &mut self.counts;
        for (row, ((&gate, &h), squared_norm)) in gate.iter().zip(h).zip(squared_norms).enumerate() {
            let kept = !skip.get(row).copied().unwrap_or(false);
            let active = activation.apply(gate) != 0.0;
            counts.n_pairs += 1;
            counts.n_kept += u64::from(kept);
            counts.n_active += u64::from(active);
            counts.n_active_kept += u64::from(active && kept);
            // Zeros add nothing.
            if h != 0.0 {
                self.energies.push((f64::from(h).powi(2) * squared_norm, !kept));
            }
        }
    }
}

impl RowCounts {
    fn add(&mut self, part: &Part) {
        self.n_pairs += part.counts.n_pairs;
        self.n_kept += part.counts.n_kept;
        self.n_active += part.counts.n_active;
        self.n_active_kept += part.counts.n_active_kept;
        for &(energy, is_missed) in &part.energies {
            self.energy += energy;
            if is_missed {
                self.missed_energy += energy;
            }
        }
    }

    fn quality(&self, predictor: &'static str, limit: Option<f32>, alpha: Option<f64>) -> LayerQuality {
        let n_pairs = self.n_pairs as f64;
        let n_active_missed = (self.n_active - self.n_active_kept) as f64;
        LayerQuality {
            rows_kept: ratio(self.n_kept as f64, n_pairs),
            rows_active: ratio(self.n_active as f64, n_pairs),
            recall: 1.0 - ratio(n_active_missed, self.n_active as f64),
            missed_energy: ratio(self.missed_energy, self.energy),
            predictor,
            limit,
            alpha,
        }
    }
}

/// Negative log likelihood of the token `target` under `logits (vocab_size,)`, in nats.
pub fn negative_log_likelihood(logits: &[f32], target: u32) -> f64 {
    log_sum_exp(logits) - f64::from(logits[target as usize])
}

/// That of each of `targets` under the logits of its position, on the threads of `cpu`. `logits` are
/// `(targets.len(), vocab_size)`, and may go on.
pub fn negative_log_likelihoods(cpu: &Cpu, logits: &[f32], targets: &[u32], vocab_size: usize) -> Vec<f64> {
    let mut nlls = vec![0.0; targets.len()];
    let positions = logits.chunks_exact(vocab_size).zip(targets);
    cpu.for_each(nlls.iter_mut().zip(positions), |(nll, (logits, &target))| {
        *nll = negative_log_likelihood(logits, target);
    });
    nlls
}

/// What separates two runs at each position, on the threads of `cpu`. Both are `(n_positions, vocab_size)`.
pub fn separations(cpu: &Cpu, dense: &[f32], predicted: &[f32], vocab_size: usize) -> Vec<Separation> {
    let mut separations = vec![Separation::default(); dense.len() / vocab_size];
    let positions = dense.chunks_exact(vocab_size).zip(predicted.chunks_exact(vocab_size));
    cpu.for_each(separations.iter_mut().zip(positions), |(separation, (dense, predicted))| {
        *separation = Separation::new(dense, predicted);
    });
    separations
}

/// `log sum_i exp(logits_i)`.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - f64::from(max)).exp()).sum();
    f64::from(max) + sum.ln()
}

/// Index of the largest logit, the first of equal ones.
fn top(logits: &[f32]) -> usize {
    let mut top = 0;
    for (idx, &logit) in logits.iter().enumerate() {
        if logit > logits[top] {
            top = idx;
        }
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
    }

    /// Logits of probabilities, rounded to f32 and moved by a constant that must not matter.
    fn logits_of(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32 + 7.0).collect()
    }

    #[test]
    fn the_likelihood_is_that_of_the_softmax() {
        assert_close(negative_log_likelihood(&[2.0, 2.0, 2.0, 2.0], 3), 4.0_f64.ln());
        let nlls = negative_log_likelihoods(&Cpu::new(2), &[1e4, 0.0, 1e4, 0.0, 3.0, 3.0], &[0, 1], 2);
        assert_eq!(nlls, [0.0, 1e4]);
        let mut likelihood = Likelihood::default();
        nlls.into_iter().for_each(|nll| likelihood.add(nll));
        assert_close(likelihood.mean(), 1e4 / 2.0);
        assert!(negative_log_likelihood(&[f32::NAN, 0.0], 1).is_nan());
    }

    #[test]
    fn the_divergence_is_the_one_of_the_definition() {
        let mut distance = Distance::default();
        let (p, q) = ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]);
        let (dense, predicted) =
            ([logits_of(&p), logits_of(&p)].concat(), [logits_of(&q), logits_of(&p)].concat());
        let of_both = separations(&Cpu::new(2), &dense, &predicted, 3);
        distance.add(of_both[0]);
        // 0.5 ln 2 - 0.25 ln 2.
        assert!((distance.sum_kl - 0.25 * 2.0_f64.ln()).abs() < 1e-6, "{distance:?}");
        assert_eq!(distance.n_same_top, 0);
        distance.add(of_both[1]);
        let divergence = distance.divergence(Likelihood { sum_nll: 0.0, n_tokens: 2 }.mean().exp());
        assert!((divergence.kl_mean - 0.125 * 2.0_f64.ln()).abs() < 1e-6);
        assert!((divergence.kl_max - 0.25 * 2.0_f64.ln()).abs() < 1e-6);
        assert_close(divergence.top1_agreement, 0.5);
        assert_close(divergence.dense_ppl, 1.0);
    }

    #[test]
    fn rows_and_energy_are_counted_by_hand() {
        let (mut counts, mut part) = (RowCounts::default(), Part::default());
        // Active: rows 0, 2 and 3. Left out: rows 1 and 3. Energies: 4 * 1, 0, 1 * 8, 1 * 4.
        part.add(
            &[1.0, -1.0, 0.5, 2.0],
            &[2.0, 0.0, -1.0, 1.0],
            &[false, true, false, true],
            &[1.0, 100.0, 8.0, 4.0],
            kernels::Activation::Relu,
        );
        counts.add(&part);
        let quality = counts.quality("sign", Some(3.0), Some(1.5));
        assert_close(quality.rows_kept, 0.5);
        assert_close(quality.rows_active, 0.75);
        assert_close(quality.recall, 2.0 / 3.0);
        assert_close(quality.missed_energy, 4.0 / 16.0);
        assert_eq!((quality.limit, quality.alpha), (Some(3.0), Some(1.5)));

        let mut counts = RowCounts::default();
        part.clear();
        part.add(&[-1.0], &[0.0], &[], &[1.0], kernels::Activation::Relu);
        counts.add(&part);
        let quality = counts.quality("off", None, None);
        assert_close(quality.rows_kept, 1.0);
        assert_close(quality.recall, 1.0);
        assert_close(quality.missed_energy, 0.0);
    }

    #[test]
    fn documents_are_joined_by_a_newline() {
        assert_eq!(join_documents("<|doc|>\na\n<|doc|>\nb"), "\n\na\n\n\nb");
    }
}
