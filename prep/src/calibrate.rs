//! Finds each layer's limit on sign disagreements from the dense forward pass over a text.
//!
//! For every pair of token and neuron the pass gives n_neg, whether the neuron is active, and the energy it adds to
//! the MLP's output, `(h_i * |W_down[:, i]|)^2`. Sums of these by n_neg are all that is kept:
//!
//! ```text
//! rows_kept(limit)     = pairs with n_neg <= limit / pairs
//! recall(limit)        = active pairs with n_neg <= limit / active pairs
//! missed_energy(limit) = energy of pairs with n_neg > limit / energy
//! limit of the layer   = the smallest whose missed_energy is at most the target
//! ```
//!
//! Source of the rule: SparseInfer, arXiv 2411.12692; its alpha is found by search there, by this curve here.
//! Sums run over tokens and neurons in order, on one thread, so that they do not depend on the number of threads; the
//! forward pass before them is hundreds of times more work.

use format_spec::calibration::alpha_from_limit;
use format_spec::{CalibrationCurve, CurvePoint, PredictorKind, PredictorRecord};
use kernels::Activation;

/// Most points of a stored curve.
const N_CURVE_POINTS: usize = 65;
/// Share of rows kept at the first point of a stored curve.
const FIRST_ROWS_KEPT: f64 = 1e-3;

/// Sums over (token, neuron) pairs by n_neg.
#[derive(Clone, Debug)]
pub(crate) struct SignHistogram {
    /// Indexed by n_neg, `0..=hidden_size`.
    bins: Vec<Bin>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bin {
    n_pairs: u64,
    n_active: u64,
    energy: f64,
}

/// What one limit on n_neg does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LimitEffect {
    pub(crate) limit: u32,
    pub(crate) rows_kept: f64,
    pub(crate) recall: f64,
    pub(crate) missed_energy: f64,
    n_active_missed: u64,
}

impl SignHistogram {
    pub(crate) fn new(hidden_size: u32) -> Self {
        Self { bins: vec![Bin::default(); hidden_size as usize + 1] }
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
            for (((&n_neg, &gate), &h), squared_norm) in n_neg.iter().zip(gate).zip(h).zip(squared_norms) {
                let bin = &mut self.bins[n_neg as usize];
                bin.n_pairs += 1;
                if activation.apply(gate) != 0.0 {
                    bin.n_active += 1;
                    bin.energy += f64::from(h) * f64::from(h) * squared_norm;
                }
            }
        }
    }

    /// Share of pairs that are active.
    fn rows_active(&self) -> f64 {
        let n_active: u64 = self.bins.iter().map(|bin| bin.n_active).sum();
        let n_pairs: u64 = self.bins.iter().map(|bin| bin.n_pairs).sum();
        n_active as f64 / n_pairs as f64
    }

    /// The effect of every limit, `0..=hidden_size`. With nothing active, nothing is missed.
    pub(crate) fn curve(&self) -> Vec<LimitEffect> {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        // From the largest n_neg down, so that what is missed is exactly zero where nothing active lies above.
        let mut missed = Bin::default();
        let mut points: Vec<(u32, Bin)> = Vec::with_capacity(self.bins.len());
        for (n_neg, bin) in self.bins.iter().enumerate().rev() {
            points.push((n_neg as u32, missed));
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
}

/// The smallest limit that misses at most `target` of the energy; for a target of 0 none of the active pairs either,
/// however little they add. A layer without an active pair keeps every row, as the text says nothing about it.
fn choose(curve: &[LimitEffect], target: f64, any_active: bool) -> LimitEffect {
    let last = curve[curve.len() - 1];
    if !any_active {
        return last;
    }
    let good = |effect: &&LimitEffect| {
        effect.missed_energy <= target && (target > 0.0 || effect.n_active_missed == 0)
    };
    curve.iter().find(good).copied().unwrap_or(last)
}

/// At most `n_points` limits, evenly spaced from where rows begin to be kept to where all are, `chosen` among them.
fn thin(curve: &[LimitEffect], chosen: u32, n_points: usize) -> CalibrationCurve {
    let last = curve.len() - 1;
    let n_points = n_points.min(curve.len());
    let first_kept = curve.partition_point(|effect| effect.rows_kept < FIRST_ROWS_KEPT).saturating_sub(1);
    let all_kept = curve.partition_point(|effect| effect.rows_kept < 1.0).min(last);
    let (mut begin, mut end) = (first_kept.min(chosen as usize), all_kept.max(chosen as usize));
    // Room for distinct limits in narrow models.
    end = end.max(begin + n_points - 1).min(last);
    begin = begin.min(end + 1 - n_points);
    let mut limits: Vec<usize> = (0..n_points)
        .map(|i| begin + ((end - begin) * i + (n_points - 1) / 2) / (n_points - 1).max(1))
        .collect();
    let nearest = (0..n_points)
        .min_by_key(|&i| limits[i].abs_diff(chosen as usize))
        .expect("a curve has at least one point");
    limits[nearest] = chosen as usize;
    limits
        .into_iter()
        .map(|limit| CurvePoint {
            limit: limit as u32,
            rows_kept: curve[limit].rows_kept as f32,
            recall: curve[limit].recall as f32,
            missed_energy: curve[limit].missed_energy as f32,
        })
        .collect()
}
