//! Holds the missed energy of each layer where calibration put it, by moving the layer's limit.
//!
//! ```text
//! target   the missed energy that the file's record states, or that its curve has at the limit of the chosen budget
//! bounds   the tightest and the loosest limit of the file's budget curve, of the layer's own curve where it has none
//! step     after an audit, with the interval (low, high) of the layer's missed energy since its last step:
//!              low  > target   to where the layer's curve has target / low  times the missed energy it has here
//!              high < target   to where the layer's curve has target / high times the missed energy it has here
//!              else            none
//! ```
//!
//! A step goes as far as the interval rules out, no farther: large while the limit is far off, small near the target,
//! and none while the target is inside the interval. The curve is the one of calibration and need not be right for the
//! text at hand, as it only says how far to go: the next audits see what came of it. Missing too much does harm and keeping
//! too much costs only time, and a sample of a skewed energy is more often too low than too high, so that keeping fewer
//! rows takes more audits than keeping more.

use format_spec::{BudgetPoint, CalibrationCurve, PredictorKind};
use serde::Serialize;

use crate::audit::{Audit, Estimate};
use crate::{Model, RuntimeError};

/// Audits before a step that keeps more rows.
const N_LOOSEN_MIN: usize = 4;
/// Audits before a step that keeps fewer.
const N_TIGHTEN_MIN: usize = 32;
/// Audits that a step looks back on: text changes.
const N_AUDITS_MAX: usize = 64;
/// Missed energy below which a curve is flat: its last points miss nothing.
const MISSED_MIN: f64 = 1e-7;

/// What moved the limits of a session.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdaptiveReport {
    /// Steps of all layers.
    pub n_steps: usize,
    /// Layers at the tight end of their bounds.
    pub n_tightest: usize,
    /// Layers at the loose end of their bounds.
    pub n_loosest: usize,
    /// Layers whose limit can move.
    pub layers: Vec<AdaptiveLayer>,
}

/// A layer whose limit can move.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AdaptiveLayer {
    /// Layer.
    pub layer: usize,
    /// Missed energy to hold.
    pub target: f64,
    /// Limit on n_neg, or threshold on the score, now.
    pub limit: f32,
    /// The bound that keeps the fewest rows.
    pub tightest: f32,
    /// The bound that keeps the most rows.
    pub loosest: f32,
    /// Steps taken.
    pub n_steps: usize,
}

/// Limits of all layers.
#[derive(Debug)]
pub(crate) struct Adaptive {
    layers: Vec<Control>,
}

/// One layer's limit, as what grows when more rows are kept: the limit on n_neg, or a threshold with its sign turned.
#[derive(Clone, Debug)]
struct Control {
    layer: usize,
    has_score: bool,
    target: f64,
    /// Limit and log of the missed energy, limits ascending.
    curve: Vec<(f64, f64)>,
    tightest: f64,
    loosest: f64,
    at: f64,
    n_steps: usize,
    /// The first audit that counts.
    first: usize,
}

impl Adaptive {
    /// For limits that begin at `limits`, one for each layer; those of a `budget` are targets too.
    ///
    /// # Errors
    /// [`RuntimeError::NoTarget`] for a layer whose record states no missed energy, that has no curve, or whose rows have
    /// their own limits; [`RuntimeError::Format`].
    pub(crate) fn new(
        model: &Model,
        limits: &[Option<f32>],
        budget: Option<&[f32]>,
    ) -> Result<Self, RuntimeError> {
        let curves = model.layout().calibration_curves(model.bytes()).map_err(|error| model.error(error))?;
        let points = model.layout().budget_curve(model.bytes()).map_err(|error| model.error(error))?;
        let refuse = |layer: usize, expected, found: String| {
            let path = model.path().to_owned();
            Err(RuntimeError::NoTarget { path, layer, expected, found })
        };
        let mut layers = Vec::new();
        for (layer, (record, limit)) in model.layout().predictors().iter().zip(limits).enumerate() {
            let Some(limit) = limit.filter(|_| record.kind != PredictorKind::Off) else { continue };
            if record.kind == PredictorKind::SignPerRow {
                return refuse(layer, "one limit for all rows", record.kind.name().to_owned());
            }
            let Some(curves) = &curves else {
                return refuse(layer, "a calibration curve", "none".to_owned());
            };
            let stored = if record.kind.has_score() { record.threshold } else { record.limit as f32 };
            let mut control = Control::new(layer, record.kind, &curves[layer], points.as_deref(), stored);
            control.target = match budget {
                None => f64::from(record.missed_energy),
                Some(budget) => control.missed_energy_at(control.place(budget[layer])),
            };
            if control.target.is_nan() {
                return refuse(layer, "a missed energy", "none".to_owned());
            }
            control.target = control.target.max(MISSED_MIN);
            // Rows may have offsets on the threshold, which the widest one above includes.
            let own = |budget: Option<&[f32]>| budget.map_or(stored, |budget| budget[layer]);
            let start = if record.kind.has_score() { own(budget) } else { limit };
            control.at = control.place(start).clamp(control.tightest, control.loosest);
            layers.push(control);
        }
        Ok(Self { layers })
    }

    /// The limits to begin with, by layer.
    pub(crate) fn limits(&self) -> impl Iterator<Item = (usize, f32)> {
        self.layers.iter().map(|control| (control.layer, control.limit()))
    }

    /// Looks at the audits so far and steps; `moved` gets the layers that did with their new limits.
    pub(crate) fn step(&mut self, audit: &mut Audit, mut moved: impl FnMut(usize, f32)) {
        let n_audited = audit.n_audited();
        for control in &mut self.layers {
            control.first = control.first.max(n_audited.saturating_sub(N_AUDITS_MAX));
            let found = audit.missed_energy(control.layer, control.first);
            if control.step(n_audited, &found) {
                moved(control.layer, control.limit());
            }
        }
    }

    pub(crate) fn report(&self) -> AdaptiveReport {
        let count = |is: fn(&Control) -> bool| self.layers.iter().filter(|control| is(control)).count();
        AdaptiveReport {
            n_steps: self.layers.iter().map(|control| control.n_steps).sum(),
            n_tightest: count(|control| control.at <= control.tightest),
            n_loosest: count(|control| control.at >= control.loosest),
            layers: self
                .layers
                .iter()
                .map(|control| AdaptiveLayer {
                    layer: control.layer,
                    target: control.target,
                    limit: control.limit(),
                    tightest: control.limit_of(control.tightest),
                    loosest: control.limit_of(control.loosest),
                    n_steps: control.n_steps,
                })
                .collect(),
        }
    }
}

impl Control {
    /// At the file's own limit, without a target.
    fn new(
        layer: usize,
        kind: PredictorKind,
        curve: &CalibrationCurve,
        points: Option<&[BudgetPoint]>,
        stored: f32,
    ) -> Self {
        let has_score = kind.has_score();
        let mut control = Self {
            layer,
            has_score,
            target: f64::NAN,
            curve: Vec::new(),
            tightest: 0.0,
            loosest: 0.0,
            at: 0.0,
            n_steps: 0,
            first: 0,
        };
        let log = |missed: f32| f64::from(missed).max(MISSED_MIN).ln();
        control.curve =
            curve.iter().map(|point| (control.place(point.limit), log(point.missed_energy))).collect();
        control.at = control.place(stored);
        let bounds: Vec<f64> = match points {
            Some(points) => points.iter().map(|point| control.place(point.limits[layer])).collect(),
            None => control.curve.iter().map(|point| point.0).collect(),
        };
        control.tightest = bounds.iter().copied().fold(control.at, f64::min);
        control.loosest = bounds.iter().copied().fold(control.at, f64::max);
        control
    }

    /// `limit` as what grows when more rows are kept.
    fn place(&self, limit: f32) -> f64 {
        // An infinite threshold keeps every row or none; the largest finite one does the same and can be moved.
        let limit = f64::from(limit.clamp(f32::MIN, f32::MAX));
        if self.has_score { -limit } else { limit }
    }

    fn limit_of(&self, place: f64) -> f32 {
        // Up, on the side that keeps more rows.
        if self.has_score { -place as f32 } else { place.ceil() as f32 }
    }

    fn limit(&self) -> f32 {
        self.limit_of(self.at)
    }

    /// Missed energy on the curve.
    fn missed_energy_at(&self, place: f64) -> f64 {
        interpolate(&self.curve, place, |point| point.0, |point| point.1).exp()
    }

    /// Steps if `found`, of the audits from `self.first` to `n_audited`, rules the target out; true if the limit moved.
    fn step(&mut self, n_audited: usize, found: &Estimate) -> bool {
        let n_audits = n_audited - self.first;
        let factor = if found.low > self.target && n_audits >= N_LOOSEN_MIN {
            self.target / found.low
        } else if found.high < self.target && n_audits >= N_TIGHTEN_MIN {
            self.target / found.high.max(MISSED_MIN)
        } else {
            return false;
        };
        let wanted = self.missed_energy_at(self.at).ln() + factor.ln();
        // The curve descends, so its logs are turned to ascend.
        let place = interpolate(&self.curve, -wanted, |point| -point.1, |point| point.0);
        // Where the curve is flat, its inverse may lie on the other side.
        let place = if factor < 1.0 { place.max(self.at) } else { place.min(self.at) };
        let place = self.place(self.limit_of(place)).clamp(self.tightest, self.loosest);
        if place == self.at {
            return false;
        }
        self.at = place;
        self.n_steps += 1;
        self.first = n_audited;
        true
    }
}

/// The value of `y` at `x` on the line through `points`, which ascend in `x`; the ends' beyond them.
fn interpolate(
    points: &[(f64, f64)],
    x: f64,
    x_of: impl Fn(&(f64, f64)) -> f64,
    y_of: impl Fn(&(f64, f64)) -> f64,
) -> f64 {
    let next = points.partition_point(|point| x_of(point) < x);
    match (next.checked_sub(1).map(|before| &points[before]), points.get(next)) {
        (Some(before), Some(after)) => {
            let share = (x - x_of(before)) / (x_of(after) - x_of(before));
            y_of(before) + share * (y_of(after) - y_of(before))
        }
        (Some(end), None) | (None, Some(end)) => y_of(end),
        (None, None) => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use format_spec::CurvePoint;

    use super::*;

    /// Misses a tenth of the energy at the first limit and a tenth of that at each one after it.
    fn curve(limits: [f32; 5]) -> CalibrationCurve {
        let point = |(idx, limit): (i32, f32)| CurvePoint {
            limit,
            rows_kept: 0.1,
            recall: 0.9,
            missed_energy: 10_f32.powi(-1 - idx),
        };
        (0..).zip(limits).map(point).collect()
    }

    fn control(kind: PredictorKind, limits: [f32; 5], at: f32) -> Control {
        let points = [1, 4].map(|point| BudgetPoint { kl: 0.1, mlp_bytes: 0.5, limits: vec![limits[point]] });
        let mut control = Control::new(0, kind, &curve(limits), Some(&points), at);
        control.target = 0.001;
        control
    }

    fn estimate(low: f64, high: f64) -> Estimate {
        Estimate { value: low.midpoint(high), low, high }
    }

    #[test]
    fn steps_go_as_far_as_the_interval_rules_out() {
        for (kind, limits) in [
            (PredictorKind::Sign, [100.0, 110.0, 120.0, 130.0, 140.0]),
            (PredictorKind::W2, [10.0, 0.0, -10.0, -20.0, -30.0]),
        ] {
            let mut control = control(kind, limits, limits[1]);
            assert_eq!(
                (control.limit_of(control.tightest), control.limit_of(control.loosest)),
                (limits[1], limits[4])
            );
            assert!(!control.step(20, &estimate(0.0005, 0.5)), "the target is inside");
            assert!(!control.step(3, &estimate(0.01, 0.5)), "too few audits");
            // A tenth of what is missed here is missed one point on.
            assert!(control.step(20, &estimate(0.01, 0.5)));
            assert!((control.limit() - limits[2]).abs() <= 1.0, "{kind:?}: {}", control.limit());
            assert_eq!((control.n_steps, control.first), (1, 20));
            assert!(!control.step(22, &estimate(0.01, 0.5)), "the audits count from the step on");
            assert!(control.step(30, &estimate(0.9, 0.99)));
            assert_eq!(control.limit(), limits[4], "no farther than the bound");
            assert!(!control.step(40, &estimate(0.9, 0.99)), "there is nothing left to move");
            assert!(!control.step(40, &estimate(0.0, 0.0001)), "too few audits to keep fewer rows");
            assert!(control.step(100, &estimate(0.0, 0.0001)));
            assert!((control.limit() - limits[3]).abs() <= 1.0, "{kind:?}: {}", control.limit());
            assert!(control.step(200, &estimate(0.0, 0.0)));
            assert_eq!(control.limit(), limits[1], "no farther than the other bound");
        }
    }

    #[test]
    fn without_a_budget_curve_the_bounds_are_the_ends_of_the_layers_own() {
        let limits = [10.0, 0.0, -10.0, -20.0, -30.0];
        let control = Control::new(0, PredictorKind::W2, &curve(limits), None, -5.0);
        assert_eq!((control.limit_of(control.tightest), control.limit_of(control.loosest)), (10.0, -30.0));
        assert!((control.missed_energy_at(control.place(-5.0)) - 10_f64.powf(-2.5)).abs() < 1e-6);
        assert!((control.missed_energy_at(control.place(50.0)) - 0.1).abs() < 1e-6);
    }
}
