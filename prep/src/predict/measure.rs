//! A masked pass against the dense one, position by position.

use kernels::{Cpu, Limits, Rows, Thresholds};
use runtime::perplexity::{Distance, LayerQuality, Likelihood, RowObserver};
use runtime::{MlpBatch, MlpObserver, Session};

use super::{Fit, Kind, Setting};
use crate::{PrepError, Progress};

/// A text with the dense model's logits.
#[derive(Debug)]
pub(crate) struct Reference {
    /// BOS, where the model has one, and the tokens that follow.
    windows: Vec<Vec<u32>>,
    /// `(positions of all windows but the last of each, vocab_size)`.
    logits: Vec<f32>,
    vocab_size: usize,
    /// Perplexity of the dense model.
    pub(crate) dense_ppl: f64,
}

/// Which rows a measured pass leaves out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Masking<'a> {
    /// Those that the file's records leave out.
    Stored,
    /// Those that a setting of fitted predictors leaves out.
    Setting(&'a Fit<'a>, &'a Setting),
}

/// Quality of a masked pass.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Measured {
    /// Perplexity.
    pub(crate) ppl: f64,
    /// Mean over positions of KL(dense || masked), in nats.
    pub(crate) kl_mean: f64,
    /// Its 99th percentile.
    pub(crate) kl_p99: f64,
    /// Its maximum.
    pub(crate) kl_max: f64,
    /// Share of positions whose most probable token is the dense one.
    pub(crate) top1_agreement: f64,
    /// By layer.
    pub(crate) layers: Vec<LayerQuality>,
}

impl Reference {
    /// Runs `windows` densely.
    ///
    /// # Errors
    /// A failed pass, [`PrepError::Interrupted`].
    pub(crate) fn new(
        session: &mut Session<'_>,
        windows: &[Vec<u32>],
        progress: &Progress,
    ) -> Result<Self, PrepError> {
        let vocab_size = session.model().config().vocab_size as usize;
        let n_positions: usize = windows.iter().map(|window| window.len() - 1).sum();
        let mut logits = vec![0.0; n_positions * vocab_size];
        let (mut rest, mut likelihood) = (&mut logits[..], Likelihood::default());
        for window in windows {
            let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
            let (out, after) = rest.split_at_mut(inputs.len() * vocab_size);
            session.reset();
            session.forward_batch(inputs, false, Some(out), None)?;
            for (logits, &target) in out.chunks_exact(vocab_size).zip(targets) {
                likelihood.add(logits, target);
            }
            rest = after;
            progress.check()?;
        }
        Ok(Self { windows: windows.to_vec(), logits, vocab_size, dense_ppl: likelihood.mean().exp() })
    }

    /// Tokens predicted.
    pub(crate) fn n_tokens(&self) -> usize {
        self.logits.len() / self.vocab_size
    }
}

/// Runs the text of `reference` with the rows of `masking` left out.
///
/// # Errors
/// A failed pass, [`PrepError::Interrupted`].
pub(crate) fn measure(
    session: &mut Session<'_>,
    reference: &Reference,
    masking: &Masking<'_>,
    progress: &Progress,
) -> Result<Measured, PrepError> {
    let vocab_size = reference.vocab_size;
    let mut observer = Observer { masking, cpu: Cpu::new(0), rows: RowObserver::new(session.model()) };
    let (mut distance, mut likelihood) = (Distance::default(), Likelihood::default());
    let mut divergences = Vec::with_capacity(reference.n_tokens());
    let mut dense = reference.logits.chunks_exact(vocab_size);
    let mut logits = Vec::new();
    for window in &reference.windows {
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        logits.resize(inputs.len() * vocab_size, 0.0);
        session.reset();
        session.forward_batch(inputs, true, Some(&mut logits), Some(&mut observer))?;
        for ((logits, dense), &target) in logits.chunks_exact(vocab_size).zip(&mut dense).zip(targets) {
            likelihood.add(logits, target);
            divergences.push(distance.add(dense, logits));
        }
        progress.check()?;
    }
    divergences.sort_by(f64::total_cmp);
    let divergence = distance.divergence(&likelihood);
    Ok(Measured {
        ppl: likelihood.mean().exp(),
        kl_mean: divergence.kl_mean,
        kl_p99: divergences.get(divergences.len() * 99 / 100).copied().unwrap_or(0.0),
        kl_max: divergence.kl_max,
        top1_agreement: divergence.top1_agreement,
        layers: observer.rows.layers(session, 1.0),
    })
}

struct Observer<'a> {
    masking: &'a Masking<'a>,
    cpu: Cpu,
    rows: RowObserver,
}

impl MlpObserver for Observer<'_> {
    fn mask(&mut self, layer: usize, n_tokens: usize, x: &[f32], skip: &mut [bool]) -> bool {
        let Masking::Setting(fit, setting) = self.masking else { return false };
        let setting = &setting.layers[layer];
        let planes = fit.planes(layer, setting.kind);
        let thresholds: Vec<f32>;
        let rows = match setting.kind {
            Kind::Exact => Rows::Active,
            Kind::Sign => {
                Rows::Predicted { signs: planes.signs, limits: Limits::Layer(setting.effect.limit) }
            }
            Kind::SignX8 | Kind::W2 | Kind::W3 => {
                let (threshold, offsets) = (setting.limit(), fit.offsets(layer, setting.kind));
                thresholds = offsets.iter().map(|offset| threshold + offset).collect();
                Rows::Scored { planes, thresholds: Thresholds::PerRow(&thresholds) }
            }
        };
        self.cpu.predict(&rows, n_tokens, x, skip).expect("the planes are of this layer");
        true
    }

    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        self.rows.mlp(batch);
    }
}
