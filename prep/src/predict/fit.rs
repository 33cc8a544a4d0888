//! The dense pass that tells what each kind of prediction would keep and miss.

use std::collections::HashMap;

use half::f16;
use kernels::{BitPlanes, Cpu};
use runtime::{MlpBatch, MlpObserver, Model, Session};

use super::histogram::{Activity, bin_of_score};
use super::low_rank::{Factors, LowRankSource, rank_of, third_of};
use super::offsets::RowLines;
use super::planes::{Inputs, LowPlanes};
use super::{Histogram, Kind, LimitEffect, MlpBytes, Reference};
use crate::calibrate::Windows;
use crate::{PrepError, Progress};

/// Most bytes of inputs that planes are fitted to.
const MAX_INPUTS_BYTES: usize = 256 << 20;

/// What the dense pass found.
#[derive(Debug)]
pub(crate) struct Fit<'m> {
    pub(crate) model: &'m Model,
    pub(crate) bytes: MlpBytes,
    pub(crate) layers: Vec<LayerFit>,
    /// The logits of the pass, of as many of its windows as fit into memory.
    pub(crate) reference: Reference,
}

/// What it found in one layer.
#[derive(Debug)]
pub(crate) struct LayerFit {
    /// Share of (token, row) pairs that are active.
    pub(crate) rows_active: f64,
    /// For each kind, what its limits do, by rows kept.
    pub(crate) curves: HashMap<Kind, Vec<LimitEffect>>,
    /// The bits below the signs that each kind reads.
    low: HashMap<Kind, LowPlanes>,
    /// What each kind with scores adds to the threshold of a row, `(intermediate_size,)`.
    offsets: HashMap<Kind, Vec<f32>>,
    /// Of the kinds of low rank.
    factors: HashMap<Kind, Factors>,
}

impl<'m> Fit<'m> {
    /// Runs `windows` through `session`, and fits `kinds`, with factors from `source` where one is of low rank.
    ///
    /// # Errors
    /// A failed pass, [`PrepError::NotFinite`], [`PrepError::Interrupted`].
    pub(crate) fn run(
        session: &mut Session<'m>,
        windows: &Windows,
        kinds: &[Kind],
        source: &LowRankSource,
        n_threads: usize,
        progress: &Progress,
    ) -> Result<Self, PrepError> {
        let model = session.model();
        let n_prefix = windows.n_prefix;
        let mut observer = Observer::new(model, n_prefix, kinds, n_threads);
        observer.fit_planes(session, &windows.planes, kinds, progress)?;
        let of_low_rank: Vec<Kind> = kinds.iter().copied().filter(|kind| kind.has_factors()).collect();
        match source {
            _ if of_low_rank.is_empty() => {}
            LowRankSource::Fitted { rank } => {
                // As planes, for other windows than limits are fitted to: these would be too tight for any other text.
                let mut gates = Gates { n_prefix, layers: vec![Vec::new(); observer.layers.len()] };
                for window in &windows.planes {
                    session.reset();
                    session.forward_batch(window, false, None, Some(&mut gates))?;
                    progress.check()?;
                }
                for (layer, (sums, gates)) in observer.layers.iter_mut().zip(gates.layers).enumerate() {
                    let w_gate = model.w_gate(layer);
                    let whole = rank_of(w_gate.n_rows, w_gate.n_cols);
                    for &kind in &of_low_rank {
                        let has_residual = kind == Kind::LowRankSign;
                        let default = if has_residual { third_of(whole) } else { whole };
                        let rank = rank.unwrap_or(default);
                        let mut factors = Factors::fitted(&observer.cpu, &w_gate, &gates, rank);
                        if has_residual {
                            factors = factors.with_residual(&observer.cpu, &w_gate);
                        }
                        sums.factors.insert(kind, factors);
                        progress.check()?;
                    }
                }
            }
            LowRankSource::Imported(layers) => {
                for (sums, factors) in observer.layers.iter_mut().zip(layers) {
                    sums.factors.extend(of_low_rank.iter().map(|&kind| (kind, factors.clone())));
                }
            }
        }
        let reference = Reference::new(session, &windows.fit, Some(&mut observer), progress)?;
        let energy = |sums: &LayerSums| sums.kinds[0].histogram.energy();
        if let Some(layer) = observer.layers.iter().position(|sums| !energy(sums).is_finite()) {
            return Err(PrepError::NotFinite { layer: layer as u32 });
        }
        let layers = observer.layers.into_iter().map(LayerSums::finish).collect();
        Ok(Self { model, bytes: MlpBytes::new(model), layers, reference })
    }

    /// What `kind` adds to the threshold of each row of `layer`, `(intermediate_size,)`; empty for kinds without scores.
    pub(crate) fn offsets(&self, layer: usize, kind: Kind) -> &[f32] {
        self.layers[layer].offsets.get(&kind).map_or(&[], Vec::as_slice)
    }

    /// The factors of `kind` in `layer`, where it has some.
    pub(crate) fn factors(&self, layer: usize, kind: Kind) -> Option<&Factors> {
        self.layers[layer].factors.get(&kind)
    }

    /// Their rank; 0 for kinds without.
    pub(crate) fn rank(&self, layer: usize, kind: Kind) -> usize {
        self.factors(layer, kind).map_or(0, |factors| factors.rank)
    }

    /// The bits of W_gate that `kind` reads in `layer`.
    pub(crate) fn planes(&self, layer: usize, kind: Kind) -> BitPlanes<'_> {
        planes_of(self.model, layer, self.layers[layer].low.get(&kind))
    }
}

/// The signs of `layer`, and `low` below them.
fn planes_of<'a>(model: &'a Model, layer: usize, low: Option<&'a LowPlanes>) -> BitPlanes<'a> {
    let signs = model.gate_planes(layer).expect("a file made for prediction").signs;
    low.map_or(BitPlanes { signs, low: &[] }, |low| low.with(signs))
}

/// Gates of every layer, `(n_tokens, intermediate_size)`.
struct Gates {
    n_prefix: usize,
    layers: Vec<Vec<f32>>,
}

impl MlpObserver for Gates {
    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        let n_rows = batch.gate.len() / batch.n_tokens;
        self.layers[batch.layer].extend_from_slice(&batch.gate[self.n_prefix * n_rows..]);
    }
}

/// Inputs of every layer's MLP, `(n_tokens, hidden_size)`.
struct Seen {
    n_prefix: usize,
    layers: Vec<Vec<f16>>,
}

impl MlpObserver for Seen {
    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        let n_cols = batch.x.len() / batch.n_tokens;
        let x = batch.x[self.n_prefix * n_cols..].iter().map(|&x| f16::from_f32(x));
        self.layers[batch.layer].extend(x);
    }
}

/// Fills the sums while the pass runs.
struct Observer<'m> {
    model: &'m Model,
    cpu: Cpu,
    n_prefix: usize,
    layers: Vec<LayerSums>,
    /// Of a token in 8 bits of x.
    scores: Vec<i32>,
    scales: Vec<f32>,
}

struct LayerSums {
    kinds: Vec<KindSums>,
    low: HashMap<Kind, LowPlanes>,
    factors: HashMap<Kind, Factors>,
}

/// What one kind's limits would do.
struct KindSums {
    kind: Kind,
    histogram: Histogram,
    /// From the first window, of kinds with scores.
    offsets: Option<Vec<f32>>,
}

impl<'m> Observer<'m> {
    fn new(model: &'m Model, n_prefix: usize, kinds: &[Kind], n_threads: usize) -> Self {
        let of_kind = |&kind: &Kind| {
            let histogram = match kind {
                // Without a limit, what is active does not depend on the bin.
                Kind::Exact => Histogram::new(0),
                Kind::Sign => Histogram::new(model.config().hidden_size),
                _ => Histogram::of_scores(),
            };
            KindSums { kind, histogram, offsets: None }
        };
        let layer = |_| LayerSums {
            kinds: kinds.iter().map(of_kind).collect(),
            low: HashMap::new(),
            factors: HashMap::new(),
        };
        Self {
            model,
            cpu: Cpu::new(n_threads),
            n_prefix,
            layers: (0..model.config().num_hidden_layers as usize).map(layer).collect(),
            scores: Vec::new(),
            scales: Vec::new(),
        }
    }

    /// Makes the planes of `kinds` for the inputs that each layer gets from as many of `windows` as fit into memory, one
    /// at least.
    fn fit_planes(
        &mut self,
        session: &mut Session<'m>,
        windows: &[Vec<u32>],
        kinds: &[Kind],
        progress: &Progress,
    ) -> Result<(), PrepError> {
        let of_planes: Vec<Kind> = kinds.iter().copied().filter(|kind| kind.n_planes() > 1).collect();
        if of_planes.is_empty() {
            return Ok(());
        }
        let n_planes: Vec<usize> = of_planes.iter().map(|kind| kind.n_planes()).collect();
        let mut seen = Seen { n_prefix: self.n_prefix, layers: vec![Vec::new(); self.layers.len()] };
        let n_of_token = self.layers.len() * self.model.config().hidden_size as usize;
        let mut n_bytes = 0;
        for (idx, window) in windows.iter().enumerate() {
            n_bytes += size_of::<f16>() * n_of_token * window.len();
            if idx > 0 && n_bytes > MAX_INPUTS_BYTES {
                break;
            }
            session.reset();
            session.forward_batch(window, false, None, Some(&mut seen))?;
            progress.check()?;
        }
        for (layer, (sums, x)) in self.layers.iter_mut().zip(seen.layers).enumerate() {
            let w_gate = self.model.w_gate(layer);
            let x = x.into_iter().map(f16::to_f32).collect();
            let inputs = Inputs::new(&self.cpu, x, w_gate.n_cols);
            let planes = LowPlanes::of(&self.cpu, &w_gate, &n_planes, inputs.as_ref());
            sums.low.extend(of_planes.iter().copied().zip(planes));
            progress.check()?;
        }
        Ok(())
    }
}

impl MlpObserver for Observer<'_> {
    fn wants_n_neg(&self) -> bool {
        self.layers[0].kinds.iter().any(|sums| sums.kind == Kind::Sign)
    }

    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        let of_kinds: Vec<Kind> = self.layers[batch.layer].kinds.iter().map(|sums| sums.kind).collect();
        let scores: Vec<Vec<f32>> = of_kinds
            .into_iter()
            .map(|kind| if kind.has_score() { self.scores(kind, batch) } else { Vec::new() })
            .collect();
        let squared_norms = &self.model.down_squared_norms(&self.cpu)[batch.layer];
        let (n_prefix, activation) = (self.n_prefix, self.model.activation());
        let LayerSums { kinds, factors, .. } = &mut self.layers[batch.layer];
        // Sums have an order, but kinds none.
        self.cpu.for_each(kinds.iter_mut().zip(&scores), |(sums, scores)| {
            let factors = factors.get(&sums.kind);
            sums.add(batch, n_prefix, scores, factors, squared_norms, activation);
        });
    }
}

impl KindSums {
    /// Adds the tokens of `batch` from `n_prefix` on, whose scores, of a kind that has some, are
    /// `(n_tokens, intermediate_size)`.
    fn add(
        &mut self,
        batch: &MlpBatch<'_>,
        n_prefix: usize,
        scores: &[f32],
        factors: Option<&Factors>,
        squared_norms: &[f64],
        activation: kernels::Activation,
    ) {
        let n_rows = squared_norms.len();
        let tokens = (n_prefix..batch.n_tokens).map(|token| token * n_rows..(token + 1) * n_rows);
        if self.kind.has_score() && self.offsets.is_none() {
            let mut lines = RowLines::new(n_rows);
            for rows in tokens.clone().filter(|rows| !scores[rows.start].is_nan()) {
                let (gate, h) = (&batch.gate[rows.clone()], &batch.h[rows.clone()]);
                lines.add_token(scores[rows].iter().copied(), gate, h, squared_norms);
            }
            let mut offsets = lines.offsets(squared_norms, threshold_of(activation));
            if let Some(factors) = factors {
                // A bias is on the other side of the comparison.
                offsets.iter_mut().zip(&factors.bias).for_each(|(offset, bias)| *offset -= bias);
            }
            self.offsets = Some(offsets);
        }
        let Self { kind, histogram, offsets } = self;
        let offsets = offsets.as_deref().unwrap_or_default();
        let bias: &[f32] = factors.map_or(&[], |factors| &factors.bias);
        for rows in tokens {
            let activity = Activity {
                gate: &batch.gate[rows.clone()],
                h: &batch.h[rows.clone()],
                squared_norms,
                activation,
            };
            match kind {
                Kind::Exact => histogram.add_token(std::iter::repeat_n(0, n_rows), &activity),
                Kind::Sign => histogram.add_token(batch.n_neg[rows].iter().copied(), &activity),
                _ => {
                    let bias = bias.iter().copied().chain(std::iter::repeat(0.0));
                    let scores = scores[rows].iter().zip(offsets).zip(bias);
                    // A row without a score is kept.
                    let bin = |((score, offset), bias): ((&f32, &f32), f32)| match score.is_nan() {
                        true => 0,
                        false => bin_of_score(score - bias - offset),
                    };
                    histogram.add_token(scores.map(bin), &activity);
                }
            }
        }
    }
}

impl Observer<'_> {
    /// Scores of `kind`, `(n_tokens, intermediate_size)`, in units of the input and with their bias; NaN where a token has
    /// none.
    fn scores(&mut self, kind: Kind, batch: &MlpBatch<'_>) -> Vec<f32> {
        let LayerSums { low, factors, .. } = &self.layers[batch.layer];
        if let Some(factors) = factors.get(&kind) {
            return factors.scores(&self.cpu, batch.n_tokens, batch.x);
        }
        let n_rows = batch.gate.len() / batch.n_tokens;
        let planes = planes_of(self.model, batch.layer, low.get(&kind));
        self.scores.resize(batch.n_tokens * n_rows, 0);
        self.scales.resize(batch.n_tokens, 0.0);
        let result = self.cpu.scores(&planes, batch.n_tokens, batch.x, &mut self.scores, &mut self.scales);
        result.expect("the planes are of this layer");
        let mut in_units = vec![0.0; self.scores.len()];
        let tokens =
            in_units.chunks_exact_mut(n_rows).zip(self.scores.chunks_exact(n_rows)).zip(&self.scales);
        self.cpu.for_each(tokens, |((in_units, scores), &scale)| {
            for (in_units, &score) in in_units.iter_mut().zip(scores) {
                *in_units = if scale > 0.0 { score as f32 / scale } else { f32::NAN };
            }
        });
        in_units
    }
}

impl LayerSums {
    fn finish(self) -> LayerFit {
        LayerFit {
            rows_active: self.kinds[0].histogram.rows_active(),
            curves: self.kinds.iter().map(|sums| (sums.kind, sums.histogram.steps())).collect(),
            offsets: self.kinds.into_iter().filter_map(|sums| Some((sums.kind, sums.offsets?))).collect(),
            low: self.low,
            factors: self.factors,
        }
    }
}

/// The gate from which on a row is active.
fn threshold_of(activation: kernels::Activation) -> f64 {
    match activation {
        kernels::Activation::FatRelu(threshold) => f64::from(threshold),
        kernels::Activation::Relu | kernels::Activation::Silu => 0.0,
    }
}
