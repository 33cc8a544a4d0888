//! Predictor records: which rows a layer skips, and how that was found.

/// How a layer decides which rows of W_gate to leave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum PredictorKind {
    /// No prediction: every gate row is computed.
    Off = 0,
    /// Skip row i when n_neg(i) > limit, one limit for the layer (SparseInfer, arXiv 2411.12692).
    Sign = 1,
    /// Skip row i when n_neg(i) > limit(i), limits in the layer's `GateLimits` section.
    SignPerRow = 2,
}

/// One layer's predictor with the statistics it was chosen by. NaN statistics mean "not measured".
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictorRecord {
    /// How rows are chosen.
    pub kind: PredictorKind,
    /// Largest n_neg that is still computed, 0 to hidden_size; hidden_size keeps every row.
    pub limit: u32,
    /// The ratio that folds into `limit`: a row is skipped when n_neg > alpha * n_pos.
    pub alpha: f32,
    /// Share of (token, row) pairs whose activation is not zero, 0 to 1.
    pub rows_active: f32,
    /// Share kept by the limit, 0 to 1.
    pub rows_kept: f32,
    /// Share of active pairs that the limit keeps, 0 to 1.
    pub recall: f32,
    /// Share of MLP output energy in the pairs left out, 0 to 1.
    pub missed_energy: f32,
    /// Calibration tokens behind the statistics; 0 when none.
    pub n_tokens: u32,
}

/// One point of a layer's trade-off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// Limit on n_neg.
    pub limit: u32,
    /// Share of rows kept at that limit.
    pub rows_kept: f32,
    /// Share of active rows kept.
    pub recall: f32,
    /// Share of MLP output energy missed.
    pub missed_energy: f32,
}

/// A layer's trade-off, limits ascending. Every layer of a file has the same number of points.
pub type CalibrationCurve = Vec<CurvePoint>;

/// The integer limit that `alpha` folds into: `n_neg > alpha * n_pos` with `n_pos = hidden_size - n_neg` is
/// `n_neg > floor(alpha * hidden_size / (1 + alpha))`.
///
/// Computed in f64. `alpha` that is negative or NaN gives 0; infinity gives `hidden_size` (keep all).
pub fn limit_from_alpha(alpha: f64, hidden_size: u32) -> u32 {
    if alpha.is_infinite() && alpha > 0.0 {
        return hidden_size;
    }
    let limit = (alpha * f64::from(hidden_size) / (1.0 + alpha)).floor();
    if limit > 0.0 { (limit as u32).min(hidden_size) } else { 0 }
}

/// An alpha that folds into exactly `limit`: the middle of the interval that does.
pub fn alpha_from_limit(limit: u32, hidden_size: u32) -> f64 {
    if limit >= hidden_size {
        return f64::INFINITY;
    }
    (f64::from(limit) + 0.5) / (f64::from(hidden_size - limit) - 0.5)
}
