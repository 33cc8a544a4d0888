//! A masked pass against the dense one, position by position.

use kernels::{Cpu, Limits, Rows, Thresholds};
use runtime::perplexity::{
    Distance, LayerQuality, Likelihood, RowObserver, negative_log_likelihoods, separations,
};
use runtime::{LayerPrediction, MlpBatch, MlpObserver, PredictionLimit, Session};

use super::{Factors, Fit, Kind, Setting};
use crate::{PrepError, Progress};

/// Most bytes of dense logits that are kept to compare with.
const MAX_LOGITS_BYTES: usize = 256 << 20;

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
    /// None.
    Dense,
    /// Those that the file's records leave out.
    Stored,
    /// Those that a setting of fitted predictors leaves out.
    Setting(&'a Fit<'a>, &'a Setting),
    /// Those that a setting leaves out, of position t in layer t modulo the number of layers alone.
    OneLayerEach(&'a Fit<'a>, &'a Setting),
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
    /// Mean divergence over the positions t of each residue modulo the number of layers.
    #[serde(skip)]
    pub(crate) kl_by_residue: Vec<f64>,
}

impl Reference {
    /// Runs `windows` densely, for `observer` to see, and keeps the logits of the first of them, as many as fit into
    /// memory and one at least.
    ///
    /// # Errors
    /// A failed pass, [`PrepError::Interrupted`].
    pub(crate) fn new(
        session: &mut Session<'_>,
        windows: &[Vec<u32>],
        mut observer: Option<&mut dyn MlpObserver>,
        progress: &Progress,
    ) -> Result<Self, PrepError> {
        let vocab_size = session.model().config().vocab_size as usize;
        let cpu = Cpu::new(session.n_threads());
        let (mut kept, mut likelihood) = (Vec::new(), Likelihood::default());
        let (mut logits, mut of_window) = (Vec::new(), Vec::new());
        for window in windows {
            let n_kept = (window.len() - 1) * vocab_size;
            let keeps = kept.is_empty() || 4 * (logits.len() + n_kept) <= MAX_LOGITS_BYTES;
            if !keeps && observer.is_none() {
                break;
            }
            of_window.resize(window.len() * vocab_size, 0.0);
            session.reset();
            let observer = observer.as_mut().map(|observer| &mut **observer as &mut dyn MlpObserver);
            session.forward_batch(window, false, keeps.then_some(&mut of_window), observer)?;
            if keeps {
                let nlls = negative_log_likelihoods(&cpu, &of_window, &window[1..], vocab_size);
                nlls.into_iter().for_each(|nll| likelihood.add(nll));
                // The last position predicts nothing of this window.
                logits.extend_from_slice(&of_window[..n_kept]);
                kept.push(window.clone());
            }
            progress.advance(window.len() as u64)?;
        }
        Ok(Self { windows: kept, logits, vocab_size, dense_ppl: likelihood.mean().exp() })
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
    let n_layers = session.model().config().num_hidden_layers as usize;
    let cpu = Cpu::new(session.n_threads());
    let mut observer =
        Observer { masking, n_layers, cpu: &cpu, rows: RowObserver::new(session.model(), &cpu) };
    let mut distance = Distance::default();
    let mut own = Likelihood::default();
    let mut divergences = Vec::with_capacity(reference.n_tokens());
    let mut residues = vec![(0.0, 0.0); n_layers];
    let mut dense = &reference.logits[..];
    let mut logits = Vec::new();
    for window in &reference.windows {
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        logits.resize(inputs.len() * vocab_size, 0.0);
        session.reset();
        let is_masked = !matches!(masking, Masking::Dense);
        session.forward_batch(inputs, is_masked, Some(&mut logits), Some(&mut observer))?;
        let (of_window, rest) = dense.split_at(logits.len());
        dense = rest;
        let nlls = negative_log_likelihoods(&cpu, &logits, targets, vocab_size);
        nlls.into_iter().for_each(|nll| own.add(nll));
        for (idx, separation) in separations(&cpu, of_window, &logits, vocab_size).into_iter().enumerate() {
            distance.add(separation);
            let (sum, n) = &mut residues[idx % n_layers];
            *sum += separation.kl;
            *n += 1.0;
            divergences.push(separation.kl);
        }
        progress.check()?;
    }
    divergences.sort_by(f64::total_cmp);
    let divergence = distance.divergence(reference.dense_ppl);
    Ok(Measured {
        ppl: own.mean().exp(),
        kl_mean: divergence.kl_mean,
        kl_p99: divergences.get(divergences.len() * 99 / 100).copied().unwrap_or(0.0),
        kl_max: divergence.kl_max,
        top1_agreement: divergence.top1_agreement,
        layers: observer.rows.layers(session, 1.0),
        kl_by_residue: residues.into_iter().map(|(sum, n)| if n > 0.0 { sum / n } else { 0.0 }).collect(),
    })
}

/// What decoding needs to leave out the rows of `setting`.
pub(crate) fn decoded<'a>(fit: &'a Fit<'a>, setting: &Setting) -> Vec<LayerPrediction<'a>> {
    let layers = setting.layers.iter().enumerate().map(|(layer, setting)| {
        let limit = match setting.kind {
            Kind::Exact => PredictionLimit::Exact,
            Kind::Sign => PredictionLimit::Signs(setting.effect.limit),
            _ => PredictionLimit::Scores(thresholds(setting.limit(), fit.offsets(layer, setting.kind))),
        };
        let low_rank = fit.factors(layer, setting.kind).map(Factors::view);
        let has_planes = setting.kind != Kind::Exact && low_rank.is_none();
        let planes = has_planes.then(|| fit.planes(layer, setting.kind));
        LayerPrediction { planes, low_rank, limit }
    });
    layers.collect()
}

/// The least score of each row.
fn thresholds(threshold: f32, offsets: &[f32]) -> Vec<f32> {
    offsets.iter().map(|offset| threshold + offset).collect()
}

struct Observer<'a> {
    masking: &'a Masking<'a>,
    n_layers: usize,
    cpu: &'a Cpu,
    rows: RowObserver<'a>,
}

impl MlpObserver for Observer<'_> {
    fn mask(&mut self, layer: usize, n_tokens: usize, x: &[f32], skip: &mut [bool]) -> bool {
        let (fit, setting) = match self.masking {
            Masking::Dense | Masking::Stored => return false,
            Masking::Setting(fit, setting) | Masking::OneLayerEach(fit, setting) => (fit, setting),
        };
        let setting = &setting.layers[layer];
        let planes = || fit.planes(layer, setting.kind);
        let of_rows: Vec<f32>;
        let rows = match setting.kind {
            Kind::Exact => Rows::Active,
            Kind::Sign => {
                Rows::Predicted { signs: planes().signs, limits: Limits::Layer(setting.effect.limit) }
            }
            Kind::SignX8 | Kind::W2 | Kind::W3 => {
                of_rows = thresholds(setting.limit(), fit.offsets(layer, setting.kind));
                Rows::Scored { planes: planes(), thresholds: Thresholds::PerRow(&of_rows) }
            }
            Kind::LowRank | Kind::LowRankRelu | Kind::LowRankSign => {
                of_rows = thresholds(setting.limit(), fit.offsets(layer, setting.kind));
                let factors = fit.factors(layer, setting.kind).expect("fitted, as a setting has it").view();
                Rows::LowRank { factors, thresholds: Thresholds::PerRow(&of_rows) }
            }
        };
        self.cpu.predict(&rows, n_tokens, x, skip).expect("planes and factors are of this layer");
        if let Masking::OneLayerEach(..) = self.masking {
            let n_rows = skip.len() / n_tokens;
            let others = skip.chunks_exact_mut(n_rows).enumerate();
            others.filter(|(token, _)| token % self.n_layers != layer).for_each(|(_, skip)| skip.fill(false));
        }
        true
    }

    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        self.rows.mlp(batch);
    }
}
