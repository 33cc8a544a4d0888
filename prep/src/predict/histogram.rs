//! Rows kept and energy missed, for every limit at once.
//!
//! For each pair of token and neuron the dense pass gives the number that a predictor compares with its limit, whether
//! the neuron is active, and the energy that it adds to the MLP's output, `(h_i * |W_down[:, i]|)^2`. Sums of these by
//! that number are all that is kept:
//!
//! ```text
//! rows_kept(limit)     = pairs up to the limit / pairs
//! recall(limit)        = active pairs up to the limit / active pairs
//! missed_energy(limit) = energy of pairs beyond the limit / energy
//! ```
//!
//! The number is n_neg for the sign rule. Scores are floats, and kept from a threshold on: their bin is the upper half
//! of their bits, turned so that bins ascend as scores descend, and the threshold of a bin is the least float in it.

use kernels::Activation;

/// Sums over (token, neuron) pairs by bin.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    bins: Vec<Bin>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bin {
    n_pairs: u64,
    n_active: u64,
    energy: f64,
}

/// What one limit does: the largest bin that is still computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LimitEffect {
    pub(crate) limit: u32,
    pub(crate) rows_kept: f64,
    pub(crate) recall: f64,
    pub(crate) missed_energy: f64,
    pub(crate) n_active_missed: u64,
}

impl LimitEffect {
    /// No limit.
    pub(crate) const KEEP_ALL: Self =
        Self { limit: 0, rows_kept: 1.0, recall: 1.0, missed_energy: 0.0, n_active_missed: 0 };
}

/// One token's activity: `gate` before the activation and `h`, each `(intermediate_size,)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Activity<'a> {
    pub(crate) gate: &'a [f32],
    pub(crate) h: &'a [f32],
    /// `|W_down[:, i]|^2`.
    pub(crate) squared_norms: &'a [f64],
    pub(crate) activation: Activation,
}

impl Histogram {
    /// For bins up to `max`.
    pub(crate) fn new(max: u32) -> Self {
        Self { bins: vec![Bin::default(); max as usize + 1] }
    }

    /// For bins of scores.
    pub(crate) fn of_scores() -> Self {
        Self::new(u32::from(u16::MAX))
    }

    /// Adds a batch. Shapes: `n_neg`, `gate` (before the activation) and `h` `(n_tokens, intermediate_size)`,
    /// `squared_norms` of the columns of W_down `(intermediate_size,)`.
    pub(crate) fn add(
        &mut self,
        n_neg: &[u32],
        gate: &[f32],
        h: &[f32],
        squared_norms: &[f64],
        activation: Activation,
    ) {
        let f = squared_norms.len();
        for ((n_neg, gate), h) in n_neg.chunks_exact(f).zip(gate.chunks_exact(f)).zip(h.chunks_exact(f)) {
            self.add_token(n_neg.iter().copied(), &Activity { gate, h, squared_norms, activation });
        }
    }

    /// Adds a token; `bins` has one for each row.
    pub(crate) fn add_token(&mut self, bins: impl Iterator<Item = u32>, activity: &Activity<'_>) {
        let Activity { gate, h, squared_norms, activation } = *activity;
        for (((bin, &gate), &h), squared_norm) in bins.zip(gate).zip(h).zip(squared_norms) {
            let bin = &mut self.bins[bin as usize];
            bin.n_pairs += 1;
            if activation.apply(gate) != 0.0 {
                bin.n_active += 1;
                bin.energy += f64::from(h) * f64::from(h) * squared_norm;
            }
        }
    }

    /// Energy of all pairs.
    pub(crate) fn energy(&self) -> f64 {
        self.bins.iter().map(|bin| bin.energy).sum()
    }

    /// Share of pairs that are active.
    pub(crate) fn rows_active(&self) -> f64 {
        let n_active: u64 = self.bins.iter().map(|bin| bin.n_active).sum();
        let n_pairs: u64 = self.bins.iter().map(|bin| bin.n_pairs).sum();
        n_active as f64 / n_pairs as f64
    }

    /// The effect of every limit. With nothing active, nothing is missed.
    pub(crate) fn curve(&self) -> Vec<LimitEffect> {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        // From the largest bin down, so that what is missed is exactly zero where nothing active lies above.
        let mut missed = Bin::default();
        let mut points: Vec<(u32, Bin)> = Vec::with_capacity(self.bins.len());
        for (limit, bin) in self.bins.iter().enumerate().rev() {
            points.push((limit as u32, missed));
            missed.n_pairs += bin.n_pairs;
            missed.n_active += bin.n_active;
            missed.energy += bin.energy;
        }
        let total = missed;
        points
            .into_iter()
            .rev()
            .map(|(limit, missed)| LimitEffect {
                limit,
                rows_kept: 1.0 - share(missed.n_pairs as f64, total.n_pairs as f64),
                recall: 1.0 - share(missed.n_active as f64, total.n_active as f64),
                missed_energy: share(missed.energy, total.energy),
                n_active_missed: missed.n_active,
            })
            .collect()
    }

    /// [`Histogram::curve`] without the limits that keep the same pairs as the one before.
    pub(crate) fn steps(&self) -> Vec<LimitEffect> {
        let mut curve = self.curve();
        let mut is_step = self.bins.iter().map(|bin| bin.n_pairs > 0);
        curve.retain(|_| is_step.next().expect("a bin for each limit"));
        curve
    }
}

/// The bin of `score`, a number in units of the input.
pub(crate) fn bin_of_score(score: f32) -> u32 {
    u32::from(u16::MAX) - (ordered(score) >> 16)
}

/// The least score of the bins up to `bin`.
pub(crate) fn threshold_of_bin(bin: u32) -> f32 {
    let bits = (u32::from(u16::MAX) - bin) << 16;
    // The inverse of `ordered`.
    f32::from_bits(if bits >> 31 == 1 { bits ^ 0x8000_0000 } else { !bits })
}

/// Bits that order as floats do.
fn ordered(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 1 { !bits } else { bits ^ 0x8000_0000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three tokens and two neurons over widths of four signs, with exact sums.
    fn histogram() -> Histogram {
        let mut histogram = Histogram::new(4);
        histogram.add(
            &[0, 3, 1, 2, 3, 4],
            &[1.0, -1.0, 2.0, 0.5, 0.0, 1.0],
            &[1.0, 0.0, 2.0, 1.0, 0.0, 1.0],
            &[1.0, 4.0],
            Activation::Relu,
        );
        histogram
    }

    #[test]
    fn curves_count_pairs_and_energy() {
        let histogram = histogram();
        assert_eq!(histogram.rows_active(), 4.0 / 6.0);
        assert_eq!(histogram.energy(), 13.0);
        // By n_neg: pairs 1 1 1 2 1, active 1 1 1 0 1, energy 1 4 4 0 4.
        let expected = [
            (0, 1.0 / 6.0, 1.0 / 4.0, 12.0 / 13.0),
            (1, 2.0 / 6.0, 2.0 / 4.0, 8.0 / 13.0),
            (2, 3.0 / 6.0, 3.0 / 4.0, 4.0 / 13.0),
            (3, 5.0 / 6.0, 3.0 / 4.0, 4.0 / 13.0),
            (4, 1.0, 1.0, 0.0),
        ];
        let curve = histogram.curve();
        assert_eq!(curve.len(), expected.len());
        for (effect, (limit, rows_kept, recall, missed_energy)) in curve.iter().zip(expected) {
            assert_eq!(effect.limit, limit);
            for (found, expected) in [
                (effect.rows_kept, rows_kept),
                (effect.recall, recall),
                (effect.missed_energy, missed_energy),
            ] {
                assert!((found - expected).abs() < 1e-12, "{effect:?}");
            }
        }
    }

    #[test]
    fn steps_leave_out_limits_that_keep_nothing_more() {
        let mut histogram = Histogram::new(9);
        histogram.add(&[2, 7], &[1.0, 1.0], &[1.0, 1.0], &[1.0, 1.0], Activation::Relu);
        let limits: Vec<u32> = histogram.steps().iter().map(|effect| effect.limit).collect();
        assert_eq!(limits, [2, 7]);
    }

    #[test]
    fn a_threshold_keeps_the_bins_up_to_its_own() {
        let scores = [-3e8, -17.3, -17.2, -1.0, -1e-30, 0.0, 2e-20, 0.7, 0.701, 1.0, 250.0, 1e30];
        let bins = scores.map(bin_of_score);
        assert!(bins.is_sorted_by(|a, b| a >= b), "{bins:?}");
        for (&score, bin) in scores.iter().zip(bins) {
            let threshold = threshold_of_bin(bin);
            assert!(
                threshold <= score && score - threshold <= score.abs() / 128.0,
                "{threshold} for {score}"
            );
            assert_eq!(bin_of_score(threshold), bin);
            let below = if bin == 0 { continue } else { threshold_of_bin(bin - 1) };
            assert!(below > score);
        }
    }
}
