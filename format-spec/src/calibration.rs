//! Predictor records: which rows a layer skips, and how that was found.

use crate::error::Place;
use crate::field::Field;
use crate::{Activation, FormatError, ModelConfig};

/// Length of a record.
pub(crate) const RECORD_LEN: usize = 64;
/// Bytes of a curve point: limit or threshold, rows_kept, recall, missed_energy as f32.
const POINT_LEN: usize = 16;

const KIND: Field<4> = Field::first("kind");
const LIMIT: Field<4> = KIND.then("limit");
const ALPHA: Field<4> = LIMIT.then("alpha");
const ROWS_ACTIVE: Field<4> = ALPHA.then("rows_active");
const ROWS_KEPT: Field<4> = ROWS_ACTIVE.then("rows_kept");
const RECALL: Field<4> = ROWS_KEPT.then("recall");
const MISSED_ENERGY: Field<4> = RECALL.then("missed_energy");
const N_TOKENS: Field<4> = MISSED_ENERGY.then("n_tokens");
const THRESHOLD: Field<4> = N_TOKENS.then("threshold");
const RESERVED: Field<28> = THRESHOLD.then("reserved");
const _: () = assert!(RESERVED.end() == RECORD_LEN);

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
    /// Skip row i when its signs times the input in 8 bits are below the threshold.
    SignX8 = 3,
    /// Skip row i when `fc2[i] (fc1 x)` is below the threshold, with the factors of `GateFc1` and `GateFc2`.
    LowRank = 4,
    /// As `SignX8`, with W_gate in 2 bits: the signs and one plane of `GatePlanes`.
    W2 = 5,
    /// As `SignX8`, with W_gate in 3 bits: the signs and two planes of `GatePlanes`.
    W3 = 6,
    /// As `LowRank`, with the negative elements of `fc1 x` at 0: the small networks of PowerInfer (arXiv 2312.12456).
    LowRankRelu = 7,
    /// As `LowRank`, with the signs of what the factors leave of W_gate, times a scale for each row, added to the score.
    LowRankSign = 8,
}

impl PredictorKind {
    /// Every kind, by code.
    pub const ALL: [Self; 9] = [
        Self::Off,
        Self::Sign,
        Self::SignPerRow,
        Self::SignX8,
        Self::LowRank,
        Self::W2,
        Self::W3,
        Self::LowRankRelu,
        Self::LowRankSign,
    ];

    /// Lower-case name, as in messages and `prep inspect`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Sign => "sign",
            Self::SignPerRow => "sign_per_row",
            Self::SignX8 => "sign_x8",
            Self::W2 => "w2",
            Self::W3 => "w3",
            Self::LowRank => "low_rank",
            Self::LowRankRelu => "low_rank_relu",
            Self::LowRankSign => "low_rank_sign",
        }
    }

    /// The code in the file.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// Bits of an element of W_gate that a score is made of, signs included; 0 for the kinds without bits or score.
    pub fn n_planes(self) -> u32 {
        match self {
            Self::Off | Self::Sign | Self::SignPerRow => 0,
            Self::LowRank | Self::LowRankRelu | Self::LowRankSign => 0,
            Self::SignX8 => 1,
            Self::W2 => 2,
            Self::W3 => 3,
        }
    }

    /// True for the kinds that skip rows of a low score.
    pub fn has_score(self) -> bool {
        self.n_planes() > 0 || self.has_factors()
    }

    /// True for the kinds whose score is made of two factors.
    pub fn has_factors(self) -> bool {
        matches!(self, Self::LowRank | Self::LowRankRelu | Self::LowRankSign)
    }

    /// True for the kinds whose score has a part made of residual signs.
    pub fn has_residual(self) -> bool {
        self == Self::LowRankSign
    }
}

/// One layer's predictor with the statistics it was chosen by. NaN statistics mean "not measured".
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictorRecord {
    /// How rows are chosen.
    pub kind: PredictorKind,
    /// Largest n_neg that is still computed, 0 to hidden_size; hidden_size keeps every row.
    pub limit: u32,
    /// The ratio that folds into `limit`: a row is skipped when n_neg > alpha * n_pos. Kept for people; `limit`
    /// decides. Infinity keeps every row.
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
    /// Smallest score that is still computed, in units of the input; 0 for kinds without a score, minus infinity keeps
    /// every row. Added to the row's offset where the layer has `GateOffsets`.
    pub threshold: f32,
}

/// One point of a layer's trade-off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// Limit on n_neg; for kinds with a score, the threshold.
    pub limit: f32,
    /// Share of rows kept at that limit.
    pub rows_kept: f32,
    /// Share of active rows kept.
    pub recall: f32,
    /// Share of MLP output energy missed.
    pub missed_energy: f32,
}

/// A layer's trade-off, in the order of rows kept: limits ascending, thresholds descending. Every layer of a file has the same number of points.
pub type CalibrationCurve = Vec<CurvePoint>;

/// What the whole model does at one budget.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetPoint {
    /// Mean KL divergence of the next token's distribution from the dense model's, in nats, over text that neither
    /// limits nor budget were chosen by; NaN for not measured.
    pub kl: f32,
    /// Bytes of predictors, gate, up and down rows that a token reads, over those of a dense pass.
    pub mlp_bytes: f32,
    /// Limit or threshold of each layer, 0 where it predicts nothing.
    pub limits: Vec<f32>,
}

/// A model's trade-off, budgets growing from point to point.
pub type BudgetCurve = Vec<BudgetPoint>;

/// The integer limit that `alpha` folds into: `n_neg > alpha * n_pos` with `n_pos = hidden_size - n_neg` is
/// `n_neg > floor(alpha * hidden_size / (1 + alpha))`.
///
/// Computed in f64. `alpha` that is negative or NaN gives 0; infinity gives `hidden_size` (keep all).
pub fn limit_from_alpha(alpha: f64, hidden_size: u32) -> u32 {
    if alpha.is_nan() || alpha <= 0.0 {
        return 0;
    }
    if alpha.is_infinite() {
        return hidden_size;
    }
    let limit = (alpha * f64::from(hidden_size) / (1.0 + alpha)).floor();
    (limit as u32).min(hidden_size)
}

/// An alpha that folds into exactly `limit`: the middle of the interval that does.
pub fn alpha_from_limit(limit: u32, hidden_size: u32) -> f64 {
    if limit >= hidden_size {
        return f64::INFINITY;
    }
    (f64::from(limit) + 0.5) / (f64::from(hidden_size - limit) - 0.5)
}

impl PredictorRecord {
    /// The record's bytes. NaN is written as one pattern, so that equal records are equal bytes.
    fn encode(&self) -> [u8; RECORD_LEN] {
        let mut record = [0; RECORD_LEN];
        let block = &mut record[..];
        KIND.put(block, self.kind.code().to_le_bytes());
        LIMIT.put(block, self.limit.to_le_bytes());
        ALPHA.put(block, float_bytes(self.alpha));
        ROWS_ACTIVE.put(block, float_bytes(self.rows_active));
        ROWS_KEPT.put(block, float_bytes(self.rows_kept));
        RECALL.put(block, float_bytes(self.recall));
        MISSED_ENERGY.put(block, float_bytes(self.missed_energy));
        N_TOKENS.put(block, self.n_tokens.to_le_bytes());
        THRESHOLD.put(block, float_bytes(self.threshold));
        record
    }

    fn parse(at: RecordPlace, block: &[u8; RECORD_LEN]) -> Result<Self, FormatError> {
        let found = KIND.u32(block);
        let Some(kind) = PredictorKind::ALL.into_iter().find(|kind| kind.code() == found) else {
            return Err(FormatError::UnknownCode { place: at.of(KIND), field: "predictor kind", found });
        };
        if let Some(byte) = RESERVED.first_nonzero(block, 0) {
            return Err(FormatError::Reserved { place: at.byte(byte as usize) });
        }
        Ok(Self {
            kind,
            limit: LIMIT.u32(block),
            alpha: ALPHA.f32(block),
            rows_active: ROWS_ACTIVE.f32(block),
            rows_kept: ROWS_KEPT.f32(block),
            recall: RECALL.f32(block),
            missed_energy: MISSED_ENERGY.f32(block),
            n_tokens: N_TOKENS.u32(block),
            threshold: THRESHOLD.f32(block),
        })
    }

    fn check(&self, at: RecordPlace, config: &ModelConfig) -> Result<(), FormatError> {
        let refuse = |field: Field<4>, found, expected: &str| {
            let (place, expected) = (at.of(field), expected.to_owned());
            Err(FormatError::Predictor { place, layer: at.layer, field: field.name, found, expected })
        };
        if config.activation == Activation::Silu && self.kind != PredictorKind::Off {
            let (place, layer) = (at.of(KIND), at.layer);
            return Err(FormatError::PredictorNotSparse { place, layer, found: self.kind.name() });
        }
        if self.limit > config.hidden_size {
            let expected = format!("at most hidden_size {}", config.hidden_size);
            return refuse(LIMIT, f64::from(self.limit), &expected);
        }
        if self.alpha.is_nan() || self.alpha < 0.0 {
            return refuse(ALPHA, f64::from(self.alpha), "a number that is not negative, or infinity");
        }
        if self.threshold.is_nan() || (self.threshold != 0.0 && !self.kind.has_score()) {
            let expected = if self.kind.has_score() { "a number, or infinity" } else { "0" };
            return refuse(THRESHOLD, f64::from(self.threshold), expected);
        }
        let shares = [
            (ROWS_ACTIVE, self.rows_active),
            (ROWS_KEPT, self.rows_kept),
            (RECALL, self.recall),
            (MISSED_ENERGY, self.missed_energy),
        ];
        match shares.into_iter().find(|&(_, share)| !is_share(share)) {
            Some((field, found)) => refuse(field, f64::from(found), "0 to 1, or NaN for not measured"),
            None => Ok(()),
        }
    }
}

/// Bytes of the `predictors` section: one record per layer.
pub(crate) fn encode_records(records: &[PredictorRecord]) -> Vec<u8> {
    records.iter().flat_map(PredictorRecord::encode).collect()
}

/// Reads and checks the `predictors` section, which lies at `start`.
pub(crate) fn parse_records(
    start: Place,
    bytes: &[u8],
    config: &ModelConfig,
) -> Result<Vec<PredictorRecord>, FormatError> {
    let records = (0..).zip(bytes.as_chunks::<RECORD_LEN>().0);
    records
        .map(|(layer, block)| {
            let at = RecordPlace { start, layer };
            let record = PredictorRecord::parse(at, block)?;
            record.check(at, config)?;
            Ok(record)
        })
        .collect()
}

/// Bytes of the `calibration_curves` section, `(layers, points, 4)` f32.
pub(crate) fn encode_curves(curves: &[CalibrationCurve]) -> Vec<u8> {
    let points = curves.iter().flatten();
    points
        .flat_map(|point| [point.limit, point.rows_kept, point.recall, point.missed_energy])
        .flat_map(float_bytes)
        .collect()
}

/// Reads and checks the `calibration_curves` section of `n_points` points per layer, which lies at `start`.
pub(crate) fn parse_curves(
    start: Place,
    bytes: &[u8],
    n_points: usize,
    records: &[PredictorRecord],
    config: &ModelConfig,
) -> Result<Vec<CalibrationCurve>, FormatError> {
    let points = bytes.as_chunks::<POINT_LEN>().0;
    let layers = (0..).zip(points.chunks_exact(n_points)).zip(records);
    layers
        .map(|((layer, points), record)| {
            let mut curve = CalibrationCurve::with_capacity(n_points);
            for bytes in points {
                let at = CurvePlace { start, layer, n_points, point: curve.len() };
                curve.push(parse_point(at, bytes, curve.last(), record.kind, config)?);
            }
            Ok(curve)
        })
        .collect()
}

fn parse_point(
    at: CurvePlace,
    bytes: &[u8; POINT_LEN],
    previous: Option<&CurvePoint>,
    kind: PredictorKind,
    config: &ModelConfig,
) -> Result<CurvePoint, FormatError> {
    let values = bytes.as_chunks::<4>().0;
    let [limit, rows_kept, recall, missed_energy] =
        [0, 1, 2, 3].map(|value: usize| f32::from_le_bytes(values[value]));
    let follows = |previous: &CurvePoint| match kind.has_score() {
        true => limit < previous.limit,
        false => limit > previous.limit,
    };
    if !is_limit(limit, kind, config) || !previous.is_none_or(follows) {
        let expected = match kind.has_score() {
            true => "a number below the one before",
            false => "a whole number up to hidden_size, above the one before",
        };
        return Err(at.refused(0, "limit", limit, expected));
    }
    let shares = [("rows_kept", rows_kept), ("recall", recall), ("missed_energy", missed_energy)];
    if let Some((value, (field, found))) = (1..).zip(shares).find(|(_, (_, share))| !is_share(*share)) {
        return Err(at.refused(value, field, found, "0 to 1, or NaN for not measured"));
    }
    Ok(CurvePoint { limit, rows_kept, recall, missed_energy })
}

/// Name, offset and length of every field, for the test that compares them with FORMAT.md.
#[cfg(test)]
pub(crate) fn fields() -> Vec<(&'static str, usize, usize)> {
    vec![
        KIND.info(),
        LIMIT.info(),
        ALPHA.info(),
        ROWS_ACTIVE.info(),
        ROWS_KEPT.info(),
        RECALL.info(),
        MISSED_ENERGY.info(),
        N_TOKENS.info(),
        THRESHOLD.info(),
        RESERVED.info(),
    ]
}

/// Bytes of the `budget_curve` section, `(points, 2 + layers)` f32.
pub(crate) fn encode_budget(curve: &[BudgetPoint]) -> Vec<u8> {
    let values = curve.iter().flat_map(|point| [&[point.kl, point.mlp_bytes][..], &point.limits].concat());
    values.flat_map(float_bytes).collect()
}

/// Reads and checks the `budget_curve` section, which lies at `start`.
pub(crate) fn parse_budget(
    start: Place,
    bytes: &[u8],
    records: &[PredictorRecord],
    config: &ModelConfig,
) -> Result<BudgetCurve, FormatError> {
    let width = 2 + records.len();
    let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
    let points = values.chunks_exact(width).enumerate();
    points
        .map(|(point, values)| {
            let refuse = |value: usize, field: String, expected| {
                let place = start.plus((point * width + value) * 4);
                let (point, found) = (point as u64, values[value]);
                Err(FormatError::Budget { place, point, field, found, expected })
            };
            let (kl, mlp_bytes, limits) = (values[0], values[1], &values[2..]);
            if kl < 0.0 || kl.is_infinite() {
                return refuse(0, "kl".to_owned(), "a number that is not negative, or NaN for not measured");
            }
            if !(mlp_bytes >= 0.0 && mlp_bytes.is_finite()) {
                return refuse(1, "mlp_bytes".to_owned(), "a number that is not negative");
            }
            let is_wrong = |(limit, record): (&f32, &PredictorRecord)| !is_limit(*limit, record.kind, config);
            if let Some(layer) = limits.iter().zip(records).position(is_wrong) {
                let expected = "a whole number up to hidden_size, or a threshold";
                return refuse(2 + layer, format!("limit of layer {layer}"), expected);
            }
            Ok(BudgetPoint { kl, mlp_bytes, limits: limits.to_vec() })
        })
        .collect()
}

/// Something that a predictor of `kind` compares with.
fn is_limit(value: f32, kind: PredictorKind, config: &ModelConfig) -> bool {
    match kind.has_score() {
        true => !value.is_nan(),
        false => value >= 0.0 && value <= config.hidden_size as f32 && value.fract() == 0.0,
    }
}

/// A share, or "not measured".
fn is_share(value: f32) -> bool {
    value.is_nan() || (0.0..=1.0).contains(&value)
}

fn float_bytes(value: f32) -> [u8; 4] {
    if value.is_nan() { f32::NAN } else { value }.to_le_bytes()
}

/// A record of the section at `start`.
#[derive(Clone, Copy)]
struct RecordPlace {
    start: Place,
    layer: u32,
}

impl RecordPlace {
    fn of(self, field: Field<4>) -> Place {
        self.byte(field.offset)
    }

    fn byte(self, at: usize) -> Place {
        self.start.plus(self.layer as usize * RECORD_LEN + at)
    }
}

/// A point of the curves in the section at `start`.
#[derive(Clone, Copy)]
struct CurvePlace {
    start: Place,
    layer: u32,
    n_points: usize,
    point: usize,
}

impl CurvePlace {
    fn refused(self, value: usize, field: &'static str, found: f32, expected: &'static str) -> FormatError {
        let point = self.layer as usize * self.n_points + self.point;
        let place = self.start.plus(point * POINT_LEN + value * 4);
        FormatError::Curve { place, layer: self.layer, point: self.point as u64, field, found, expected }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_folds_into_the_rule_it_stands_for() {
        for hidden_size in [1, 7, 256, 352, 4096, 5120] {
            for alpha in [0.0, 0.3, 0.5, 0.75, 1.0, 1.02, 1.25, 1.5, 2.0, 3.0, 1e9] {
                let limit = limit_from_alpha(alpha, hidden_size);
                let is_skipped = |n_neg| f64::from(n_neg) > alpha * f64::from(hidden_size - n_neg);
                assert!(!is_skipped(limit), "alpha {alpha}, {hidden_size} columns: {limit} is too large");
                let is_last = limit == hidden_size || is_skipped(limit + 1);
                assert!(is_last, "alpha {alpha}, {hidden_size} columns: {limit} is too small");
            }
        }
    }

    #[test]
    fn odd_alphas_have_limits() {
        for alpha in [f64::NAN, -0.0, -0.5, -1.0, -2.0, f64::NEG_INFINITY, f64::MIN_POSITIVE] {
            assert_eq!(limit_from_alpha(alpha, 100), 0, "alpha {alpha}");
        }
        for alpha in [f64::INFINITY, f64::MAX] {
            assert_eq!(limit_from_alpha(alpha, 100), 100, "alpha {alpha}");
        }
    }

    #[test]
    fn an_alpha_stored_as_f32_folds_back() {
        for hidden_size in [1, 2, 33, 352, 4096, 5120, 1 << 20] {
            for limit in (0..=hidden_size).step_by(1 + hidden_size as usize / 999).chain([hidden_size]) {
                let alpha = alpha_from_limit(limit, hidden_size) as f32;
                assert_eq!(limit_from_alpha(f64::from(alpha), hidden_size), limit, "{hidden_size} columns");
            }
        }
    }
}
