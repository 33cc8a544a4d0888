//! What prediction misses, estimated while a text is decoded.
//!
//! The rows that a predictor leaves out are not known, so a few of them are computed in some tokens, without a change to
//! the tokens' results:
//!
//! ```text
//! tokens   one of every N, at a random place among the N
//! rows     in each layer that predicts one of every ROW_BLOCK neighbours, at random; those that were left out are read
//! ```
//!
//! For one token of one layer let k be the energy of the kept rows, `sum (h_i |W_down[:, i]|)^2`, which is known, and m
//! that of the rows left out, the share of which is what calibration calls missed energy. A row is in the sample with
//! probability 1 / ROW_BLOCK, so `ROW_BLOCK` times the energy found estimates m without bias (Horvitz and Thompson, A
//! Generalization of Sampling Without Replacement From a Finite Universe, JASA 1952). Over n audited tokens
//!
//! ```text
//! R  = sum m_t / sum (k_t + m_t)                                    missed energy, a ratio estimator
//! d_t = m_t - R (k_t + m_t)
//! V  = n / (n - 1) sum d_t^2 / (sum (k_t + m_t))^2                  its variance
//! ```
//!
//! (Cochran, Sampling Techniques, 3rd edition 1977, chapter 6; the differences between tokens hold what the rows' draw
//! adds, chapter 11, so that the interval is one for all decoded tokens.) Recall is one less the same ratio of counts of
//! active rows. Over layers both are the mean of the layers' ratios, whose residuals are added by token. Shares near 0 are
//! skewed, so the 95 % interval is that of Student's t with n - 1 degrees of freedom for log(R / (1 - R)):
//!
//! ```text
//! logit(R) +- t sqrt(V) / (R (1 - R))
//! ```
//!
//! Where nothing was found in s rows looked at, the rule of three says how many there may be (Hanley and Lippman-Hand, If
//! Nothing Goes Wrong, Is Everything All Right?, JAMA 1983): at most a share of `1 - 0.05^(1/s)` of the rows left out,
//! each taken to be worth an average kept one.
//!
//! All draws are ChaCha8 blocks addressed by (seed, token, layer): they depend on nothing that was drawn before, and are
//! the same on every backend.

use std::fmt;
use std::io::{self, Write};

use kernels::{Activation, MlpAudit, MlpCounts};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;

use crate::adaptive::{AdaptiveLayer, AdaptiveReport};
use crate::stats::ratio;
use crate::{MlpBatch, MlpObserver, Model};

/// Rows of which one is drawn: a power of two. With N = 32 an audit reads less than a hundredth of what decoding reads.
pub(crate) const ROW_BLOCK: usize = 4;
/// Bits of a random word that a block of rows takes.
const BLOCK_BITS: u32 = ROW_BLOCK.ilog2();
const _: () = assert!(ROW_BLOCK.is_power_of_two());
/// Upper 97.5 % quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;
/// Fewest tokens with an interval.
const N_TOKENS_MIN: usize = 3;
/// What the rule of three leaves to chance.
const CHANCE: f64 = 0.05;

/// How a session audits its predictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditOptions {
    /// One token of so many is audited, at least 1.
    pub every: usize,
    /// Start of the random draws.
    pub seed: u64,
    /// Moves the limits so that the stored missed energy is held.
    pub adaptive: bool,
}

/// A share with its 95 % interval, all 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The estimate.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Estimates of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerAudit {
    /// Layer.
    pub layer: usize,
    /// Share of active rows that were kept.
    pub recall: Estimate,
    /// Share of the MLP's output energy in the rows left out.
    pub missed_energy: Estimate,
}

/// What the audits of a session found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AuditReport {
    /// One token of so many was audited.
    pub every: usize,
    /// Start of the random draws.
    pub seed: u64,
    /// Tokens decoded.
    pub n_tokens: u64,
    /// Tokens audited.
    pub n_audited: usize,
    /// Rows left out that were looked at.
    pub n_rows: u64,
    /// Mean over the layers that predict.
    pub recall: Estimate,
    /// Mean over the layers that predict.
    pub missed_energy: Estimate,
    /// The layer with the largest estimate of missed energy; its interval is its own, so that the largest of many
    /// estimates tends to be too large.
    pub worst_layer: LayerAudit,
    /// Layers that predict.
    pub layers: Vec<LayerAudit>,
    /// What moved the limits, where something does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adaptive: Option<AdaptiveReport>,
}

/// The sums of one token in one layer.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    n_looked_at: f64,
    n_kept_active: f64,
    /// Estimated number of active rows left out.
    n_missed: f64,
    kept_energy: f64,
    /// Estimated energy of the rows left out.
    missed_energy: f64,
}

/// The audits of a session.
#[derive(Debug)]
pub(crate) struct Audit {
    options: AuditOptions,
    n_rows: usize,
    /// Layers that predict.
    predicting: Vec<bool>,
    rng: ChaCha8Rng,
    /// Tokens seen.
    n_tokens: u64,
    /// Those audited.
    audited: Vec<u64>,
    /// `(audited tokens, layers)`.
    sums: Vec<Sums>,
    sample: Vec<u32>,
    residuals: Vec<f64>,
}

impl Audit {
    /// For MLPs of `n_rows` rows in as many layers as `predicting` has. Decoding `n_positions_max` tokens allocates
    /// nothing more.
    pub(crate) fn new(
        options: AuditOptions,
        predicting: Vec<bool>,
        n_rows: usize,
        n_positions_max: usize,
    ) -> Self {
        let n_audited_max = n_positions_max.div_ceil(options.every) + 1;
        Self {
            rng: ChaCha8Rng::seed_from_u64(options.seed),
            audited: Vec::with_capacity(n_audited_max),
            sums: Vec::with_capacity(n_audited_max * predicting.len()),
            sample: Vec::with_capacity(n_rows.div_ceil(ROW_BLOCK)),
            residuals: Vec::with_capacity(n_audited_max),
            n_tokens: 0,
            options,
            n_rows,
            predicting,
        }
    }

    /// As it was made.
    pub(crate) fn options(&self) -> &AuditOptions {
        &self.options
    }

    /// Forgets all audits, for limits that are another choice of rows.
    pub(crate) fn restart(&mut self, predicting: impl Iterator<Item = bool>) {
        self.predicting.clear();
        self.predicting.extend(predicting);
        self.n_tokens = 0;
        self.audited.clear();
        self.sums.clear();
    }

    /// Tokens audited.
    pub(crate) fn n_audited(&self) -> usize {
        self.audited.len()
    }

    /// True where `layer` predicts.
    pub(crate) fn predicts(&self, layer: usize) -> bool {
        self.predicting[layer]
    }

    /// True if the next token is audited.
    fn is_due(&mut self) -> bool {
        self.n_to_due() == Some(0)
    }

    /// Tokens before the next audited one, if that is among this and the next block of tokens; none where no layer
    /// predicts.
    fn n_to_due(&mut self) -> Option<u64> {
        if !self.predicting.contains(&true) {
            return None;
        }
        let block = self.n_tokens / self.options.every as u64;
        let mut due = |block| self.due_of(block).checked_sub(self.n_tokens);
        due(block).or_else(|| due(block + 1))
    }

    /// The token of `block` that is audited.
    fn due_of(&mut self, block: u64) -> u64 {
        let every = self.options.every as u64;
        self.seek(block, 0);
        let place = (u128::from(self.rng.next_u64()) * u128::from(every)) >> 64;
        block * every + place as u64
    }

    /// Counts the next token; if it is audited, begins its audit and returns the number of that.
    pub(crate) fn next_token(&mut self) -> Option<usize> {
        let is_due = self.is_due();
        self.n_tokens += 1;
        is_due.then(|| {
            self.sums.resize(self.sums.len() + self.predicting.len(), Sums::default());
            self.audited.push(self.n_tokens - 1);
            self.audited.len() - 1
        })
    }

    /// The most tokens of the next `n_tokens` that end with an audited one or hold none.
    pub(crate) fn n_to_audit(&mut self, n_tokens: usize) -> usize {
        self.n_to_due().map_or(n_tokens, |n_before| n_tokens.min(n_before as usize + 1))
    }

    /// The rows of `layer` that audit `audit` looks at, ascending.
    pub(crate) fn draw(&mut self, audit: usize, layer: usize) -> &[u32] {
        self.seek(self.audited[audit], 1 + layer as u64);
        self.sample.clear();
        let (mut word, mut n_bits) = (0_u32, 0);
        for first in (0..self.n_rows).step_by(ROW_BLOCK) {
            if n_bits < BLOCK_BITS {
                (word, n_bits) = (self.rng.next_u32(), u32::BITS);
            }
            let row = first + word as usize % ROW_BLOCK;
            (word, n_bits) = (word >> BLOCK_BITS, n_bits - BLOCK_BITS);
            // The last block may be cut: a place beyond it is drawn like any other, and then nothing is looked at.
            if row < self.n_rows {
                self.sample.push(row as u32);
            }
        }
        &self.sample
    }

    /// Takes what audit `audit` found in `layer`.
    pub(crate) fn record(&mut self, audit: usize, layer: usize, counts: &MlpCounts, found: &MlpAudit) {
        self.sums[audit * self.predicting.len() + layer] = Sums {
            n_looked_at: found.n_skipped as f64,
            n_kept_active: counts.n_active as f64,
            n_missed: (found.n_missed * ROW_BLOCK) as f64,
            kept_energy: found.kept_energy,
            missed_energy: found.missed_energy * ROW_BLOCK as f64,
        };
    }

    /// Points the generator to the draws of `(token, layer)`. Stream 0 is the sampler's.
    fn seek(&mut self, token: u64, layer: u64) {
        let n_streams = self.predicting.len() as u64 + 1;
        self.rng.set_stream(1 + token * n_streams + layer);
        self.rng.set_word_pos(0);
    }

    /// Missed energy of `layer` over the audited tokens from `first` on.
    pub(crate) fn missed_energy(&mut self, layer: usize, first: usize) -> Estimate {
        let first = first * self.predicting.len();
        let tokens = self.sums[first..].chunks_exact(self.predicting.len());
        estimate(tokens, layer..layer + 1, Sums::energy, &mut self.residuals)
    }

    /// What was found; none where nothing was audited.
    pub(crate) fn report(&self, adaptive: Option<AdaptiveReport>) -> Option<AuditReport> {
        let predicting = || (0..self.predicting.len()).filter(|&layer| self.predicting[layer]);
        let tokens = || self.sums.chunks_exact(self.predicting.len().max(1));
        let mut residuals = Vec::new();
        let mut of_layers = |layers: &[usize]| {
            let layers = layers.iter().copied();
            let recall = estimate(tokens(), layers.clone(), Sums::active, &mut residuals).complement();
            (recall, estimate(tokens(), layers, Sums::energy, &mut residuals))
        };
        let layers: Vec<LayerAudit> = predicting()
            .map(|layer| {
                let (recall, missed_energy) = of_layers(&[layer]);
                LayerAudit { layer, recall, missed_energy }
            })
            .collect();
        let worst = layers.iter().max_by(|a, b| a.missed_energy.value.total_cmp(&b.missed_energy.value));
        let worst_layer = *worst.filter(|_| self.n_audited() > 0)?;
        let (recall, missed_energy) = of_layers(&predicting().collect::<Vec<_>>());
        Some(AuditReport {
            every: self.options.every,
            seed: self.options.seed,
            n_tokens: self.n_tokens,
            n_audited: self.n_audited(),
            n_rows: self.sums.iter().map(|sums| sums.n_looked_at as u64).sum(),
            recall,
            missed_energy,
            worst_layer,
            layers,
            adaptive,
        })
    }
}

impl AuditReport {
    /// The lines of the statistics for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "audit   {} of {} tokens, {} rows left out looked at, seed {}; in brackets 95 % intervals",
            self.n_audited, self.n_tokens, self.n_rows, self.seed
        )?;
        let (recall, missed_energy) = (&self.recall, &self.missed_energy);
        writeln!(out, "        missed energy {missed_energy}, recall {recall}, mean of layers")?;
        let LayerAudit { layer, recall, missed_energy } = &self.worst_layer;
        writeln!(out, "        missed energy {missed_energy}, recall {recall}, worst layer {layer}")?;
        let Some(adaptive) = &self.adaptive else { return Ok(()) };
        writeln!(
            out,
            "adapt   {} steps of {} layers; {} keep the most rows that their bounds allow, {} the fewest",
            adaptive.n_steps,
            adaptive.layers.len(),
            adaptive.n_loosest,
            adaptive.n_tightest
        )
    }

    /// One line for each layer that predicts, for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_layers(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "layer  missed energy, audited          recall, audited               target   limit  steps"
        )?;
        for LayerAudit { layer, recall, missed_energy } in &self.layers {
            write!(out, "{layer:>5}  {:<29}  {:<27}", missed_energy.to_string(), recall.to_string())?;
            let mut moved = self.adaptive.iter().flat_map(|adaptive| &adaptive.layers);
            match moved.find(|adaptive| adaptive.layer == *layer) {
                Some(AdaptiveLayer { target, limit, n_steps, .. }) => {
                    writeln!(out, "  {:>6.4} %  {limit:>6.2}  {n_steps:>5}", 100.0 * target)?;
                }
                None => writeln!(out, "         -       -      -")?,
            }
        }
        Ok(())
    }
}

/// `0.051 % (0.021 to 0.12 %)`.
impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| 100.0 * share;
        // Three digits of what is near 0.
        let n_digits = if self.value < 0.1 { 3 } else { 1 };
        let (value, low, high) = (percent(self.value), percent(self.low), percent(self.high));
        write!(f, "{value:.n_digits$} % ({low:.n_digits$} to {high:.n_digits$} %)")
    }
}

impl Sums {
    /// Energy missed and kept.
    fn energy(&self) -> (f64, f64) {
        (self.missed_energy, self.kept_energy)
    }

    /// Active rows missed and kept.
    fn active(&self) -> (f64, f64) {
        (self.n_missed, self.n_kept_active)
    }
}

impl Estimate {
    /// The share of the rest.
    fn complement(self) -> Self {
        Self { value: 1.0 - self.value, low: 1.0 - self.high, high: 1.0 - self.low }
    }
}

/// Audits tokens of a batch, of which every row is computed, as decoding would.
pub(crate) struct BatchAudit<'a, 'o> {
    pub(crate) audit: &'a mut Audit,
    pub(crate) model: &'a Model,
    pub(crate) activation: Activation,
    /// Tokens of the batch that are audited, with the numbers of their audits.
    pub(crate) due: &'a [(usize, usize)],
    /// Whoever else watches.
    pub(crate) observer: Option<&'a mut (dyn MlpObserver + 'o)>,
}

impl MlpObserver for BatchAudit<'_, '_> {
    fn wants_n_neg(&self) -> bool {
        self.observer.as_ref().is_some_and(|observer| observer.wants_n_neg())
    }

    fn mask(&mut self, layer: usize, n_tokens: usize, x: &[f32], skip: &mut [bool]) -> bool {
        self.observer.as_mut().is_some_and(|observer| observer.mask(layer, n_tokens, x, skip))
    }

    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        if self.audit.predicts(batch.layer) {
            for &(token, audit) in self.due {
                self.token(batch, token, audit);
            }
        }
        if let Some(observer) = &mut self.observer {
            observer.mlp(batch);
        }
    }
}

impl BatchAudit<'_, '_> {
    fn token(&mut self, batch: &MlpBatch<'_>, token: usize, audit: usize) {
        let n_rows = batch.h.len() / batch.n_tokens;
        let at = token * n_rows;
        let energy = |row: usize| {
            f64::from(batch.h[at + row]).powi(2) * self.model.down_squared_norm(batch.layer, row)
        };
        let is_active = |row: &usize| self.activation.apply(batch.gate[at + row]) != 0.0;
        let is_kept = |row: &usize| !batch.skip[at + row];
        let (mut counts, mut found) = (MlpCounts::default(), MlpAudit::default());
        for row in (0..n_rows).filter(is_kept) {
            counts.n_kept += 1;
            if is_active(&row) {
                counts.n_active += 1;
                found.kept_energy += energy(row);
            }
        }
        let sample = self.audit.draw(audit, batch.layer).iter().map(|&row| row as usize);
        for row in sample.filter(|row| !is_kept(row)) {
            found.n_skipped += 1;
            if is_active(&row) {
                found.n_missed += 1;
                found.missed_energy += energy(row);
            }
        }
        self.audit.record(audit, batch.layer, &counts, &found);
    }
}

/// The mean over `layers` of the ratio missed / (missed + kept), each summed over `tokens`, which have the sums of all
/// layers; `of` gives the two. `residuals` is a buffer.
fn estimate<'a>(
    tokens: impl ExactSizeIterator<Item = &'a [Sums]> + Clone,
    layers: impl ExactSizeIterator<Item = usize> + Clone,
    of: impl Fn(&Sums) -> (f64, f64),
    residuals: &mut Vec<f64>,
) -> Estimate {
    let (n_tokens, n_layers) = (tokens.len(), layers.len() as f64);
    residuals.clear();
    residuals.resize(n_tokens, 0.0);
    let (mut value, mut n_looked_at, mut n_kept_active) = (0.0, 0.0, 0.0);
    for layer in layers {
        let sums = tokens.clone().map(|token| &token[layer]);
        let (missed, kept) = sums.clone().map(&of).fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        let share = ratio(missed, missed + kept);
        value += share / n_layers;
        for (residual, sums) in residuals.iter_mut().zip(sums) {
            let (missed_t, kept_t) = of(sums);
            *residual += ratio(missed_t - share * (missed_t + kept_t), missed + kept) / n_layers;
            n_looked_at += sums.n_looked_at;
            n_kept_active += sums.n_kept_active;
        }
    }
    if value == 0.0 {
        // Nothing missed was found.
        let missed = (1.0 - CHANCE.powf(n_looked_at.recip())) * n_looked_at * ROW_BLOCK as f64;
        let high = if n_looked_at > 0.0 { missed / (missed + n_kept_active) } else { 0.0 };
        return Estimate { value, low: 0.0, high };
    }
    if n_tokens < N_TOKENS_MIN {
        return Estimate { value, low: 0.0, high: 1.0 };
    }
    let n = n_tokens as f64;
    if value >= 1.0 {
        // Nothing was kept: the rule of three, over tokens.
        return Estimate { value, low: CHANCE.powf(n.recip()), high: 1.0 };
    }
    let variance = n / (n - 1.0) * residuals.iter().map(|residual| residual * residual).sum::<f64>();
    let half_width = student_t(n - 1.0) * variance.sqrt() / (value * (1.0 - value));
    let logit = (value / (1.0 - value)).ln();
    let share_of = |logit: f64| 1.0 / (1.0 + (-logit).exp());
    Estimate { value, low: share_of(logit - half_width), high: share_of(logit + half_width) }
}

/// Upper 97.5 % quantile of Student's t, within 1 % from 2 degrees of freedom on.
/// Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
fn student_t(n_degrees: f64) -> f64 {
    let power = |n| Z.powi(n);
    let terms = [
        (power(3) + Z) / 4.0,
        (5.0 * power(5) + 16.0 * power(3) + 3.0 * Z) / 96.0,
        (3.0 * power(7) + 19.0 * power(5) + 17.0 * power(3) - 15.0 * Z) / 384.0,
        (79.0 * power(9) + 776.0 * power(7) + 1482.0 * power(5) - 1920.0 * power(3) - 945.0 * Z) / 92_160.0,
    ];
    (1..).zip(terms).fold(Z, |t, (n, term)| t + term / n_degrees.powi(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    const N_ROWS: usize = 203;
    const N_LAYERS: usize = 3;

    /// A text in which the last two layers predict: for every token and row of a layer whether it is kept, and its energy,
    /// 0 where it is not active. Energies are skewed, as real ones are, and tokens differ.
    struct Text {
        rows: Vec<[Vec<(bool, f64)>; N_LAYERS]>,
    }

    impl Text {
        fn new(n_tokens: usize, seed: u64) -> Self {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let mut uniform = || f64::from(rng.next_u32()) / 2_f64.powi(32);
            let mut layer = |layer: usize| {
                let level = (2.0 * uniform()).exp();
                let mut row = || {
                    let (is_kept, is_active) = (uniform() < 0.3, uniform() < 0.3);
                    // Kept rows have more.
                    let scale = if is_kept { 1.0 } else { 0.02 + 0.02 * layer as f64 };
                    (is_kept, if is_active { level * scale * (3.0 * uniform()).exp() } else { 0.0 })
                };
                (0..N_ROWS).map(|_| row()).collect()
            };
            Self { rows: (0..n_tokens).map(|_| [layer(0), layer(1), layer(2)]).collect() }
        }

        /// Missed energy and recall of `layer`, over all tokens and rows.
        fn truth(&self, layer: usize) -> [f64; 2] {
            let rows = || self.rows.iter().flat_map(|token| &token[layer]);
            let energy = |is_kept| rows().filter(|row| row.0 == is_kept).map(|row| row.1).sum::<f64>();
            let active = |is_kept| rows().filter(|row| row.0 == is_kept && row.1 > 0.0).count() as f64;
            let missed_energy = energy(false) / (energy(false) + energy(true));
            [missed_energy, active(true) / (active(false) + active(true))]
        }

        fn audit(&self, every: usize, seed: u64) -> AuditReport {
            let options = AuditOptions { every, seed, adaptive: false };
            let mut audit = Audit::new(options, vec![false, true, true], N_ROWS, self.rows.len());
            for token in &self.rows {
                let Some(number) = audit.next_token() else { continue };
                for (layer, rows) in token.iter().enumerate().skip(1) {
                    let kept = || rows.iter().filter(|row| row.0);
                    let sample = audit.draw(number, layer).iter().map(|&row| rows[row as usize]);
                    let skipped: Vec<f64> = sample.filter(|row| !row.0).map(|row| row.1).collect();
                    let counts = MlpCounts {
                        n_kept: kept().count(),
                        n_active: kept().filter(|row| row.1 > 0.0).count(),
                    };
                    let found = MlpAudit {
                        n_skipped: skipped.len(),
                        n_missed: skipped.iter().filter(|&&energy| energy > 0.0).count(),
                        missed_energy: skipped.iter().sum(),
                        kept_energy: kept().map(|row| row.1).sum(),
                    };
                    audit.record(number, layer, &counts, &found);
                }
            }
            audit.report(None).expect("tokens were audited")
        }
    }

    #[test]
    fn estimates_are_those_of_a_full_count_and_intervals_hold_it() {
        let text = Text::new(640, 1);
        const N_RUNS: u64 = 400;
        let reports: Vec<AuditReport> = (0..N_RUNS).map(|seed| text.audit(16, seed)).collect();
        let mean_truth = |of: usize| (text.truth(1)[of] + text.truth(2)[of]) / 2.0;
        let of_layer = |idx: usize, of: usize| {
            move |report: &AuditReport| {
                let layer = &report.layers[idx];
                [layer.missed_energy, layer.recall][of]
            }
        };
        type Of<'a> = &'a dyn Fn(&AuditReport) -> Estimate;
        let cases: [(f64, Of<'_>); 6] = [
            (text.truth(1)[0], &of_layer(0, 0)),
            (text.truth(1)[1], &of_layer(0, 1)),
            (text.truth(2)[0], &of_layer(1, 0)),
            (text.truth(2)[1], &of_layer(1, 1)),
            (mean_truth(0), &|report| report.missed_energy),
            (mean_truth(1), &|report| report.recall),
        ];
        for (case, (truth, of)) in cases.into_iter().enumerate() {
            let estimates: Vec<Estimate> = reports.iter().map(of).collect();
            let values: Vec<f64> = estimates.iter().map(|estimate| estimate.value).collect();
            let (mean, deviation) = crate::stats::mean_and_deviation(&values);
            // Four standard errors of the mean of the runs; a ratio's bias is of order 1/n below its deviation.
            let bound = 4.0 * deviation / (N_RUNS as f64).sqrt() + deviation / 40.0;
            assert!((mean - truth).abs() < bound, "case {case}: {mean} for {truth}, bound {bound}");
            let covers = |estimate: &&Estimate| estimate.low <= truth && truth <= estimate.high;
            let coverage = estimates.iter().filter(covers).count() as f64 / N_RUNS as f64;
            // Of 95 %, four deviations of a share of 400 are 4.4 %.
            assert!((0.90..=0.994).contains(&coverage), "case {case}: {coverage} of the intervals hold");
        }
    }

    #[test]
    fn every_row_and_every_place_is_drawn_as_often_and_a_seed_repeats_them() {
        let audit = |seed| {
            let options = AuditOptions { every: 5, seed, adaptive: false };
            Audit::new(options, vec![true; 2], N_ROWS, 0)
        };
        const N_AUDITS: usize = 2000;
        let draws = |seed| {
            let (mut audit, mut tokens, mut rows) = (audit(seed), Vec::new(), [vec![], vec![]]);
            for token in 0..5 * N_AUDITS {
                if let Some(number) = audit.next_token() {
                    tokens.push(token);
                    for (layer, rows) in rows.iter_mut().enumerate() {
                        rows.extend_from_slice(audit.draw(number, layer));
                    }
                }
            }
            (tokens, rows)
        };
        let (tokens, rows) = draws(3);
        assert!(tokens.iter().enumerate().all(|(block, token)| token / 5 == block), "one of every five");
        for place in 0..5 {
            let n = tokens.iter().filter(|&&token| token % 5 == place).count() as f64;
            // Binomial: 400 and a deviation of 18.
            assert!((n - 400.0).abs() < 80.0, "place {place}: {n}");
        }
        for rows in &rows {
            let mut counts = [0_i32; N_ROWS];
            rows.iter().for_each(|&row| counts[row as usize] += 1);
            // Binomial: 500 and a deviation of 19.4.
            assert!(counts.iter().all(|n| (n - 500).abs() < 97), "{counts:?}");
        }
        assert_ne!(rows[0], rows[1], "layers draw their own");
        assert_eq!((tokens.clone(), rows.clone()), draws(3));
        assert_ne!((tokens, rows), draws(4));
    }

    #[test]
    fn batches_end_at_audited_tokens() {
        let options = AuditOptions { every: 8, seed: 9, adaptive: true };
        let mut one_by_one = Audit::new(options, vec![true], N_ROWS, 0);
        let due: Vec<bool> = (0..200).map(|_| one_by_one.next_token().is_some()).collect();
        let mut cut = Audit::new(options, vec![true], N_ROWS, 0);
        let mut token = 0;
        while token < 200 {
            let n_tokens = cut.n_to_audit(200 - token);
            for _ in 1..n_tokens {
                assert!(cut.next_token().is_none() && !due[token]);
                token += 1;
            }
            assert_eq!(cut.next_token().is_some(), due[token]);
            token += 1;
        }
        assert_eq!(cut.n_audited(), due.iter().filter(|&&is_due| is_due).count());
    }

    #[test]
    fn shares_at_the_ends_and_of_few_tokens_have_honest_intervals() {
        let of = |tokens: &[[f64; 3]]| {
            let sums: Vec<[Sums; 1]> = tokens
                .iter()
                .map(|&[missed_energy, kept_energy, n_looked_at]| {
                    let n_kept_active = if kept_energy > 0.0 { 50.0 } else { 0.0 };
                    [Sums { missed_energy, kept_energy, n_looked_at, n_kept_active, ..Sums::default() }]
                })
                .collect();
            estimate(sums.iter().map(|token| &token[..]), 0..1, Sums::energy, &mut Vec::new())
        };
        let nothing_found = of(&[[0.0, 1.0, 100.0]; 10]);
        assert_eq!((nothing_found.value, nothing_found.low), (0.0, 0.0));
        // Three of 1000 rows looked at, times four, to 500 kept ones.
        assert!((nothing_found.high - 12.0 / 512.0).abs() < 0.001, "{nothing_found:?}");
        assert_eq!(of(&[[1.0, 3.0, 9.0]; 2]), Estimate { value: 0.25, low: 0.0, high: 1.0 });
        let nothing_kept = of(&[[1.0, 0.0, 9.0]; 30]);
        assert!(nothing_kept.value == 1.0 && nothing_kept.high == 1.0, "{nothing_kept:?}");
        assert!(nothing_kept.low > 0.9 && nothing_kept.low < 0.95, "{nothing_kept:?}");
        assert_eq!(of(&[[0.0, 0.0, 0.0]; 5]), Estimate { value: 0.0, low: 0.0, high: 0.0 });
    }

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (n_degrees, quantile) in [(2.0, 4.303), (3.0, 3.182), (5.0, 2.571), (10.0, 2.228), (30.0, 2.042)]
        {
            let found = student_t(n_degrees);
            assert!((found / quantile - 1.0).abs() < 0.01, "{n_degrees} degrees: {found} for {quantile}");
        }
    }
}
