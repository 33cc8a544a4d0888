//! What each kind of prediction does to a model on a text of one's own.
//!
//! ```text
//! stored        the file's own records
//! exact         every gate row, up and down where active
//! KIND          sign, sign-x8, w2, w3 or auto (chosen for each layer), fitted on the built-in text for several budgets
//! alpha=X       the rule of SparseInfer (arXiv 2411.12692) with one alpha
//! ```
//!
//! All run over the same windows against the model's own dense pass.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use format_spec::calibration::limit_from_alpha;
use runtime::Model;
use runtime::perplexity::LayerQuality;
use serde::Serialize;

use crate::calibrate::{Bench, Text};
use crate::predict::{
    Fit, Kind, LayerSetting, LimitEffect, Masking, Measured, Reference, Search, Setting, measure,
};
use crate::{PrepError, Progress};

/// Divergences that kinds are fitted for.
const TARGETS: [f64; 6] = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.05];

/// What to compare.
#[derive(Clone, Debug, PartialEq)]
pub enum Contender {
    /// The file's own records.
    Stored,
    /// One kind for all layers, for several budgets.
    Kind(Kind),
    /// The best kind for each layer, for several budgets.
    Auto,
    /// The sign rule with one alpha.
    Alpha(f64),
}

impl Contender {
    /// What is compared where nothing is said.
    pub fn defaults() -> Vec<Self> {
        let kinds = Kind::ALL.map(Self::Kind).into_iter();
        let alphas = [1.0, 1.02, 1.05, 1.1].map(Self::Alpha);
        [Self::Stored].into_iter().chain(kinds).chain([Self::Auto]).chain(alphas).collect()
    }

    /// The contender that the command line calls so.
    ///
    /// # Errors
    /// A message that lists the names.
    pub fn parse(name: &str) -> Result<Self, String> {
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        match (name, kind) {
            ("stored", _) => Ok(Self::Stored),
            ("auto", _) => Ok(Self::Auto),
            (_, Some(kind)) => Ok(Self::Kind(kind)),
            (name, None) => {
                let alpha = name.strip_prefix("alpha=").and_then(|alpha| alpha.parse().ok());
                let alpha = alpha.filter(|alpha: &f64| alpha.is_finite() && *alpha >= 0.0);
                alpha.map(Self::Alpha).ok_or_else(|| {
                    format!(
                        "expected stored, exact, sign, sign-x8, w2, w3, auto or alpha=X with X at least 0, \
                         found {name:?}"
                    )
                })
            }
        }
    }
}

/// How to evaluate.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// A UTF-8 text that the model was not calibrated on.
    pub text: PathBuf,
    /// Tokens of it, at most.
    pub n_tokens: u32,
    /// What to compare.
    pub contenders: Vec<Contender>,
    /// Tokens of the built-in text that kinds are fitted on.
    pub calibration_tokens: u32,
    /// Threads; 0 takes one for each available core.
    pub n_threads: usize,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// The file.
    pub path: String,
    /// Tokens predicted.
    pub n_tokens: usize,
    /// Perplexity of the dense model.
    pub dense_ppl: f64,
    /// One row for each contender and budget.
    pub rows: Vec<EvalRow>,
}

/// One contender at one budget.
#[derive(Clone, Debug, Serialize)]
pub struct EvalRow {
    /// As on the command line.
    pub predictor: String,
    /// Divergence that it was fitted for.
    pub target_kl: Option<f64>,
    /// Predictor and gate bytes of a token, over those of a dense W_gate.
    pub gate_bytes: f64,
    /// Predictor, gate, up and down bytes, over those of a dense pass.
    pub mlp_bytes: f64,
    /// Share of rows kept.
    pub rows_kept: f64,
    /// Share of rows that are active.
    pub rows_active: f64,
    /// Perplexity, divergence and rows by layer.
    #[serde(flatten)]
    quality: Measured,
    /// Predictor of each layer.
    pub kinds: Vec<&'static str>,
    /// Wall time of the masked pass, which computes every row.
    pub seconds: f64,
}

/// Evaluates the model in `path`.
///
/// # Errors
/// A file that cannot be read or was made without prediction, a text that is empty, a failed pass.
pub fn eval(path: &Path, options: &EvalOptions, progress: &Progress) -> Result<Evaluation, PrepError> {
    let model = Model::open(path)?;
    let tokenizer = model.layout().tokenizer(model.bytes())?;
    let text = Text::load(Some(&options.text))?;
    let mut own = Bench::new(&model, &tokenizer, &text, options.n_tokens as usize, options.n_threads)?;
    let windows = own.windows.all();
    let reference = own.reference(&windows, progress)?;

    let mut kinds: Vec<Kind> = Vec::new();
    for contender in &options.contenders {
        match contender {
            Contender::Kind(kind) => kinds.push(*kind),
            Contender::Auto => kinds.extend(Kind::ALL),
            Contender::Stored => {
                kinds.extend(model.layout().predictors().iter().map(Kind::of_record));
            }
            Contender::Alpha(_) => kinds.push(Kind::Sign),
        }
    }
    kinds.sort_by_key(|kind| kind.name());
    kinds.dedup();
    if kinds != [Kind::Exact] && model.gate_planes(0).is_none() {
        return Err(PrepError::NoSigns { path: path.to_owned() });
    }

    let built_in = Text::load(None)?;
    let n_fit = options.calibration_tokens as usize;
    let mut fitting = Bench::new(&model, &tokenizer, &built_in, n_fit, options.n_threads)?;
    let (fit_windows, check_windows) = (fitting.windows.fit.clone(), fitting.windows.check.clone());
    let n_prefix = fitting.windows.n_prefix;
    progress.begin("fitting", fit_windows.iter().map(|window| window.len() as u64).sum());
    let session = &mut fitting.session;
    let fit = Fit::run(session, &fit_windows, n_prefix, &kinds, options.n_threads, progress)?;
    let check = fitting.reference(&check_windows, progress)?;
    let probe = Reference::new(&mut fitting.session, &fit_windows[..1], progress)?;

    progress.begin("evaluating", 0);
    let mut rows = Vec::new();
    for contender in &options.contenders {
        let (name, kinds) = match contender {
            Contender::Stored => {
                let stored: Vec<Kind> = model.layout().predictors().iter().map(Kind::of_record).collect();
                let started = Instant::now();
                let measured = measure(&mut own.session, &reference, &Masking::Stored, progress)?;
                let seconds = started.elapsed().as_secs_f64();
                rows.push(EvalRow::new("stored".to_owned(), None, &fit, stored, measured, seconds));
                continue;
            }
            Contender::Alpha(alpha) => {
                let setting = by_alpha(&fit, *alpha);
                rows.push(evaluated(
                    format!("alpha={alpha}"),
                    None,
                    &fit,
                    &setting,
                    &mut own,
                    &reference,
                    progress,
                )?);
                continue;
            }
            Contender::Kind(Kind::Exact) => {
                let setting = Setting::exact(&fit);
                rows.push(evaluated(
                    "exact".to_owned(),
                    None,
                    &fit,
                    &setting,
                    &mut own,
                    &reference,
                    progress,
                )?);
                continue;
            }
            Contender::Kind(kind) => (kind.name(), vec![*kind]),
            Contender::Auto => ("auto", Kind::ALL.to_vec()),
        };
        let mut search = Search::new(&fit, &kinds, &mut fitting.session, &probe, progress)?;
        let kinds = vec![kinds; fit.layers.len()];
        for target in TARGETS {
            let (setting, _) =
                search.for_divergence(&kinds, target, &mut fitting.session, &check, progress)?;
            let name = name.to_owned();
            rows.push(evaluated(name, Some(target), &fit, &setting, &mut own, &reference, progress)?);
        }
    }
    Ok(Evaluation {
        path: path.display().to_string(),
        n_tokens: reference.n_tokens(),
        dense_ppl: reference.dense_ppl,
        rows,
    })
}

/// The sign rule with one alpha.
fn by_alpha(fit: &Fit<'_>, alpha: f64) -> Setting {
    let limit = limit_from_alpha(alpha, fit.model.config().hidden_size);
    let layer = |_| LayerSetting { kind: Kind::Sign, effect: LimitEffect { limit, ..LimitEffect::KEEP_ALL } };
    Setting { layers: fit.layers.iter().map(layer).collect() }
}

fn evaluated(
    predictor: String,
    target_kl: Option<f64>,
    fit: &Fit<'_>,
    setting: &Setting,
    own: &mut Bench<'_>,
    reference: &Reference,
    progress: &Progress,
) -> Result<EvalRow, PrepError> {
    let started = Instant::now();
    let measured = measure(&mut own.session, reference, &Masking::Setting(fit, setting), progress)?;
    let kinds = setting.layers.iter().map(|layer| layer.kind).collect();
    Ok(EvalRow::new(predictor, target_kl, fit, kinds, measured, started.elapsed().as_secs_f64()))
}

impl EvalRow {
    fn new(
        predictor: String,
        target_kl: Option<f64>,
        fit: &Fit<'_>,
        kinds: Vec<Kind>,
        quality: Measured,
        seconds: f64,
    ) -> Self {
        let n_layers = kinds.len() as f64;
        let mean = |of: &dyn Fn(Kind, &LayerQuality) -> f64| {
            kinds.iter().zip(&quality.layers).map(|(&kind, layer)| of(kind, layer)).sum::<f64>() / n_layers
        };
        Self {
            predictor,
            target_kl,
            gate_bytes: mean(&|kind, layer| fit.bytes.gate_share(kind, layer.rows_kept)),
            mlp_bytes: mean(&|kind, layer| {
                fit.bytes.mlp_share(kind, layer.rows_kept, layer.rows_active * layer.recall)
            }),
            rows_kept: mean(&|_, layer| layer.rows_kept),
            rows_active: mean(&|_, layer| layer.rows_active),
            kinds: kinds.iter().map(|kind| kind.name()).collect(),
            quality,
            seconds,
        }
    }
}

impl Evaluation {
    /// A table for people, and the rows by layer of the first contender.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}: {} tokens, dense perplexity {:.4}", self.path, self.n_tokens, self.dense_ppl)?;
        writeln!(
            out,
            "\npredictor      for KL    KL mean     p99     max   top-1  perplexity     kept  gate bytes  MLP bytes"
        )?;
        for row in &self.rows {
            let target = row.target_kl.map_or_else(|| "-".to_owned(), |target| target.to_string());
            let quality = &row.quality;
            writeln!(
                out,
                "{:13}  {target:>6}  {:>9.6}  {:.4}  {:>6.3}  {:>5.2}%  {:>5.4} ({:+.2}%)  {:>5.1}%  {:>9.1}%  {:>8.1}%",
                row.predictor,
                quality.kl_mean,
                quality.kl_p99,
                quality.kl_max,
                100.0 * quality.top1_agreement,
                quality.ppl,
                100.0 * (quality.ppl / self.dense_ppl - 1.0),
                100.0 * row.rows_kept,
                100.0 * row.gate_bytes,
                100.0 * row.mlp_bytes
            )?;
        }
        let Some(row) = self.rows.first() else { return Ok(()) };
        writeln!(out, "\n{}\nlayer  predictor     kept   active   recall  energy missed", row.predictor)?;
        for (idx, (layer, kind)) in row.quality.layers.iter().zip(&row.kinds).enumerate() {
            writeln!(
                out,
                "{idx:5}  {kind:9}  {:6.2}%  {:6.2}%  {:6.2}%  {:12.4}%",
                100.0 * layer.rows_kept,
                100.0 * layer.rows_active,
                100.0 * layer.recall,
                100.0 * layer.missed_energy
            )?;
        }
        Ok(())
    }
}
