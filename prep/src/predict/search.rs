//! The kinds and limits that read the fewest bytes.
//!
//! The KL divergence from the dense model is taken as a sum over layers of a sensitivity times the energy missed there:
//!
//! ```text
//! KL = sum_l w_l m_l        w_l = KL / m_l where rows are left out in layer l alone
//! ```
//!
//! and each layer takes the kind and limit with the least `bytes + price * w_l * m_l`: at one price, a byte saved costs
//! the same divergence in every layer. One pass gives all the sensitivities: each of its positions leaves out rows in one
//! layer, its neighbours in others. The price is found for a wanted sum; how far the sum is from the divergence that a
//! masked pass measures corrects what is wanted, until both agree.

use runtime::Session;
use runtime::perplexity::LayerQuality;

use super::histogram::threshold_of_bin;
use super::{Fit, Kind, LimitEffect, Masking, Measured, Reference, measure};
use crate::{PrepError, Progress};

/// Energy missed where a layer's sensitivity is measured: enough to rise over rounding, little enough to be linear.
const PROBED_MISSED_ENERGY: f64 = 0.01;
/// Masked passes that find the budget.
const N_STEPS: usize = 4;
/// A measured divergence this far below the wanted one is near enough: another text differs by more.
const NEAR_ENOUGH: f64 = 0.85;

/// A kind and a limit for each layer.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    pub(crate) layers: Vec<LayerSetting>,
}

/// One layer's kind, and its limit with what that does to the fitted half.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerSetting {
    pub(crate) kind: Kind,
    pub(crate) effect: LimitEffect,
}

impl LayerSetting {
    /// The limit on n_neg, or the threshold on the score; 0 for an exact layer.
    pub(crate) fn limit(&self) -> f32 {
        match self.kind {
            Kind::Exact => 0.0,
            Kind::Sign => self.effect.limit as f32,
            _ => threshold_of_bin(self.effect.limit),
        }
    }
}

impl Setting {
    /// Every gate row of every layer.
    pub(crate) fn exact(fit: &Fit<'_>) -> Self {
        let layer = |_| LayerSetting { kind: Kind::Exact, effect: LimitEffect::KEEP_ALL };
        Self { layers: fit.layers.iter().map(layer).collect() }
    }

    /// In each layer the kind and limit that reads the fewest bytes and misses at most its target of the energy; for a
    /// target of 0 none of the active pairs either, however little they add. A layer without an active pair keeps every
    /// row, as the text says nothing about it.
    pub(crate) fn for_missed_energy(fit: &Fit<'_>, kinds: &[Kind], targets: &[f64]) -> Self {
        let layers = targets.iter().enumerate().map(|(layer, &target)| {
            let is_good = |effect: &LimitEffect| {
                effect.missed_energy <= target && (target > 0.0 || effect.n_active_missed == 0)
            };
            if fit.layers[layer].rows_active == 0.0 {
                return LayerSetting::last(fit, layer, kinds);
            }
            LayerSetting::cheapest(
                fit,
                layer,
                kinds,
                |effect| if is_good(effect) { 0.0 } else { f64::INFINITY },
            )
        });
        Self { layers: layers.collect() }
    }

    /// In each layer the least `bytes + price * sensitivity * missed energy`.
    fn for_price(fit: &Fit<'_>, kinds: &[Vec<Kind>], price: f64, sensitivities: &[f64]) -> Self {
        let layers = sensitivities.iter().enumerate().map(|(layer, sensitivity)| {
            if fit.layers[layer].rows_active == 0.0 {
                return LayerSetting::last(fit, layer, &kinds[layer]);
            }
            let penalty = |effect: &LimitEffect| price * sensitivity * effect.missed_energy;
            LayerSetting::cheapest(fit, layer, &kinds[layer], penalty)
        });
        Self { layers: layers.collect() }
    }

    /// Bytes of the MLPs that a token reads, over those of a dense pass, on the fitted half.
    pub(crate) fn mlp_share(&self, fit: &Fit<'_>) -> f64 {
        let shares = self.layers.iter().enumerate().map(|(layer, setting)| setting.mlp_share(fit, layer));
        shares.sum::<f64>() / self.layers.len() as f64
    }

    fn expected_divergence(&self, sensitivities: &[f64]) -> f64 {
        self.layers.iter().zip(sensitivities).map(|(layer, w)| w * layer.effect.missed_energy).sum()
    }
}

impl LayerSetting {
    fn mlp_share(&self, fit: &Fit<'_>, layer: usize) -> f64 {
        let (rank, rows_active) = (fit.rank(layer, self.kind), fit.layers[layer].rows_active);
        fit.bytes.mlp_share(self.kind, rank, self.effect.rows_kept, rows_active * self.effect.recall)
    }

    /// The least bytes and penalty; of equal ones the first kind and the fewest rows.
    fn cheapest(fit: &Fit<'_>, layer: usize, kinds: &[Kind], penalty: impl Fn(&LimitEffect) -> f64) -> Self {
        let fitted = &fit.layers[layer];
        let settings = kinds
            .iter()
            .flat_map(|&kind| fitted.curves[&kind].iter().map(move |&effect| Self { kind, effect }));
        let priced =
            settings.map(|setting| (setting.mlp_share(fit, layer) + penalty(&setting.effect), setting));
        let cheapest = priced.min_by(|a, b| a.0.total_cmp(&b.0));
        cheapest.expect("a kind, and a curve with a point").1
    }

    /// The first kind with every row kept.
    fn last(fit: &Fit<'_>, layer: usize, kinds: &[Kind]) -> Self {
        let kind = kinds[0];
        let curve = &fit.layers[layer].curves[&kind];
        Self { kind, effect: *curve.last().expect("a curve has a point") }
    }
}

/// Settings for budgets of divergence.
#[derive(Debug)]
pub(crate) struct Search<'f, 'm> {
    fit: &'f Fit<'m>,
    sensitivities: Vec<f64>,
    /// Measured divergence over the sum that was expected, as last seen.
    correction: f64,
}

impl<'f, 'm> Search<'f, 'm> {
    /// Measures each layer's sensitivity on `probe`, with the first of `kinds` that predicts.
    ///
    /// # Errors
    /// A failed pass, [`PrepError::Interrupted`].
    pub(crate) fn new(
        fit: &'f Fit<'m>,
        kinds: &[Kind],
        session: &mut Session<'m>,
        probe: &Reference,
        progress: &Progress,
    ) -> Result<Self, PrepError> {
        let probing = Setting::for_missed_energy(fit, kinds, &vec![PROBED_MISSED_ENERGY; fit.layers.len()]);
        let measured = measure(session, probe, &Masking::OneLayerEach(fit, &probing), progress)?;
        let n_layers = fit.layers.len() as f64;
        let of_layer = |(kl, layer): (&f64, &LayerQuality)| {
            // The other positions of the layer missed nothing.
            let missed = layer.missed_energy * n_layers;
            if missed > 0.0 { kl / missed } else { 0.0 }
        };
        let mut sensitivities: Vec<f64> =
            measured.kl_by_residue.iter().zip(&measured.layers).map(of_layer).collect();
        // A layer that missed nothing on the probe is as sensitive as the others are on average.
        let n_known = sensitivities.iter().filter(|w| **w > 0.0).count();
        let mean = sensitivities.iter().sum::<f64>() / n_known.max(1) as f64;
        for w in sensitivities.iter_mut().filter(|w| **w == 0.0) {
            *w = if mean > 0.0 { mean } else { 1.0 };
        }
        Ok(Self { fit, sensitivities, correction: 1.0 })
    }

    /// The setting of `kinds` (one list for each layer) whose divergence on `reference` is `target` or a little less.
    ///
    /// # Errors
    /// A failed pass, [`PrepError::Interrupted`].
    pub(crate) fn for_divergence(
        &mut self,
        kinds: &[Vec<Kind>],
        target: f64,
        session: &mut Session<'m>,
        reference: &Reference,
        progress: &Progress,
    ) -> Result<(Setting, Measured), PrepError> {
        let mut best: Option<(Setting, Measured)> = None;
        for _ in 0..N_STEPS {
            let setting = self.expecting(kinds, target);
            let measured = measure(session, reference, &Masking::Setting(self.fit, &setting), progress)?;
            let expected = setting.expected_divergence(&self.sensitivities);
            let found = measured.kl_mean;
            if found > 0.0 && expected > 0.0 {
                self.correction = found / expected;
            }
            let nothing_is_missed = expected == 0.0;
            let is_better = match &best {
                None => true,
                // The largest that keeps to the target, or else the smallest.
                Some((_, best)) if best.kl_mean <= target => found <= target && found > best.kl_mean,
                Some((_, best)) => found < best.kl_mean,
            };
            if is_better {
                best = Some((setting, measured));
            }
            if nothing_is_missed || (NEAR_ENOUGH * target..=target).contains(&found) {
                break;
            }
            // Aims at the middle of what is near enough.
            self.correction *= 2.0 / (1.0 + NEAR_ENOUGH);
        }
        Ok(best.expect("at least one step"))
    }

    /// The setting of `kinds` that is expected to have the divergence `target`.
    pub(crate) fn expecting(&self, kinds: &[Vec<Kind>], target: f64) -> Setting {
        let wanted = target / self.correction;
        // Prices per byte share; the ends keep nearly nothing and nearly everything.
        let (mut low, mut high) = (-20.0_f64, 60.0_f64);
        for _ in 0..60 {
            let middle = f64::midpoint(low, high);
            let setting = Setting::for_price(self.fit, kinds, middle.exp(), &self.sensitivities);
            if setting.expected_divergence(&self.sensitivities) > wanted {
                low = middle
            } else {
                high = middle
            }
        }
        Setting::for_price(self.fit, kinds, high.exp(), &self.sensitivities)
    }
}

/// Targets around `target` for a curve over budgets.
pub(crate) fn budgets(target: f64) -> impl Iterator<Item = f64> {
    [-1, 1, 2, 3].into_iter().map(move |power| target * 4_f64.powi(power))
}
