//! Makes the tensors one after the other and moves the sample through them.

use std::path::Path;
use std::time::Instant;

use format_spec::Activation;
use kernels::{Cpu, Matrix, SignMatrix};

use super::SynthError;
use super::options::SynthOptions;
use super::plan::{BOS, RMS_NORM_EPS, layer_name};
use super::random::{Element, GateTable, NormalTable, Quantiles, Stream, normal_quantile};
use super::report::{LayerReport, SynthReport, sign_rule_point};
use super::sample::{MeanInput, Sample};
use super::shards::ShardWriter;
use super::vocabulary;
use crate::predict::Histogram;

/// Magnitude of the common part of an embedding against the rest.
const MEAN_TO_NOISE: f64 = 0.7;
/// Spread of the rows' mean projections, in deviations of one row's projection from token to token.
const ROW_SPREAD: f64 = 1.5;
/// What all MLP (and all attention) outputs together add to the residual stream, as a share of its deviation.
const RESIDUAL_GROWTH: f64 = 0.7;
/// Largest difference from the asked share of zeros that the bisection may leave.
const SPARSITY_TOLERANCE: f64 = 0.005;
/// Shares of rows for which the report says what the sign rule misses.
const REPORTED_SHARES: [f64; 2] = [0.20, 0.35];
/// Bytes generated at once where no whole matrix is needed.
const BLOCK_BYTES: usize = 32 << 20;

/// One checkpoint being made.
pub(super) struct Generator<'a, T> {
    options: &'a SynthOptions,
    folder: &'a Path,
    progress: &'a mut dyn FnMut(u64, u64),
    cpu: Cpu,
    quantiles: Quantiles,
    shards: ShardWriter,
    bytes_done: u64,
    /// The matrix at hand.
    weights: Vec<T>,
    sample: Sample,
}

/// Kinds of rows, each with random streams of its own.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Common,
    Embedding,
    AttnNorm,
    Q,
    K,
    V,
    O,
    MlpNorm,
    GateBias,
    Gate,
    Up,
    Down,
    FinalNorm,
    LmHead,
    Sample,
}

impl<'a, T: Element> Generator<'a, T> {
    pub(super) fn new(
        options: &'a SynthOptions,
        folder: &'a Path,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let cpu = Cpu::new(options.n_threads);
        let element_bytes = size_of::<T>();
        let shards =
            ShardWriter::new(folder, options.tensors(), T::SAFETENSORS, element_bytes, options.shard_bytes);
        let sample = Sample::new(options);
        Self {
            options,
            folder,
            progress,
            cpu,
            quantiles: Quantiles::new(),
            shards,
            bytes_done: 0,
            weights: Vec::new(),
            sample,
        }
    }

    pub(super) fn run(mut self) -> Result<SynthReport, SynthError> {
        let start = Instant::now();
        self.write_json("config.json", &self.options.config_json(T::TORCH))?;
        self.write_json("tokenizer.json", &vocabulary::tokenizer_json(self.options.vocab_size))?;
        let tokenizer_config = vocabulary::tokenizer_config_json(self.options.max_position_embeddings);
        self.write_json("tokenizer_config.json", &tokenizer_config)?;

        self.embedding()?;
        let layers =
            (0..self.options.num_hidden_layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        self.lm_head()?;

        let weight_bytes = self.shards.total_bytes();
        let n_files = self.shards.n_files();
        self.shards.finish().map_err(|source| SynthError::Io { path: self.folder.to_owned(), source })?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(SynthReport {
            n_parameters: weight_bytes / size_of::<T>() as u64,
            weight_bytes,
            n_files,
            seconds,
            mb_per_s: weight_bytes as f64 / 1e6 / seconds,
            sparsity: self.options.is_sparse().then_some(self.options.sparsity),
            n_tokens: self.sample.group(2).len(),
            layers,
        })
    }

    fn write_json(&self, name: &str, value: &serde_json::Value) -> Result<(), SynthError> {
        let path = self.folder.join(name);
        std::fs::write(&path, format!("{value:#}\n")).map_err(|source| SynthError::Io { path, source })
    }

    /// The embedding, and the sample's rows of it.
    fn embedding(&mut self) -> Result<(), SynthError> {
        let d = self.options.hidden_size as usize;
        let noise = 1.0 / (1.0 + MEAN_TO_NOISE * MEAN_TO_NOISE).sqrt();
        let mut common = vec![0.0_f32; d];
        GateTable::new((noise * MEAN_TO_NOISE) as f32, 0.0).fill(
            self.stream(Kind::Common, 0, 0),
            0.5,
            &vec![false; d],
            &mut common,
        );
        let normal = self.quantiles.scaled::<f32>(noise as f32);
        let seed = self.options.seed;
        let fill = |row: usize, out: &mut [T], buffer: &mut Vec<f32>| {
            buffer.resize(d, 0.0);
            normal.fill(Stream::new(seed, tensor_key(Kind::Embedding, 0), row as u64), buffer);
            for ((out, &noise), &common) in out.iter_mut().zip(buffer.iter()).zip(&common) {
                *out = T::from_f32(common + noise);
            }
        };

        let mut row = vec![T::zeroed(); d];
        let mut buffer = Vec::new();
        let mut ids = self.stream(Kind::Sample, 0, 0);
        let n_ordinary = self.options.vocab_size - 3;
        for (token, hidden) in self.sample.hidden.chunks_exact_mut(d).enumerate() {
            let first = token % self.sample.sequence_len == 0;
            let id = if first { BOS } else { 3 + ids.next_below(n_ordinary) };
            fill(id as usize, &mut row, &mut buffer);
            hidden.iter_mut().zip(&row).for_each(|(hidden, weight)| *hidden = weight.to_f32());
        }
        let vocab_size = self.options.vocab_size as usize;
        self.write_rows("model.embed_tokens.weight", vocab_size, d, fill)
    }

    /// One layer: its tensors in the order of the plan, the sample moved on through it.
    fn layer(&mut self, layer: u32) -> Result<LayerReport, SynthError> {
        let d = self.options.hidden_size as usize;
        let f = self.options.intermediate_size as usize;
        let kv = (self.options.num_key_value_heads * self.options.head_dim()) as usize;
        let n_tokens = self.sample.n_tokens();
        let growth = RESIDUAL_GROWTH / f64::from(self.options.num_hidden_layers).sqrt();
        let unit = 1.0 / (d as f64).sqrt();

        self.norm(&layer_name(layer, "input_layernorm"), Kind::AttnNorm, layer)?;
        let x = std::mem::take(&mut self.sample.x);
        let mut q = vec![0.0; n_tokens * d];
        let mut k = vec![0.0; n_tokens * kv];
        let mut v = vec![0.0; n_tokens * kv];
        for (name, kind, n_rows, y) in [
            ("self_attn.q_proj", Kind::Q, d, &mut q),
            ("self_attn.k_proj", Kind::K, kv, &mut k),
            ("self_attn.v_proj", Kind::V, kv, &mut v),
        ] {
            self.normal_weights(kind, layer, n_rows, d, unit);
            self.emit(&layer_name(layer, name), n_rows, d, &x, y, false)?;
        }
        let attended = self.sample.attention(&self.cpu, &mut q, &mut k, &v)?;
        drop((q, k, v));
        let mut hidden = std::mem::take(&mut self.sample.hidden);
        self.normal_weights(Kind::O, layer, d, d, unit * growth);
        self.emit(&layer_name(layer, "self_attn.o_proj"), d, d, &attended, &mut hidden, true)?;
        self.sample.hidden = hidden;
        self.sample.x = x;

        self.norm(&layer_name(layer, "post_attention_layernorm"), Kind::MlpNorm, layer)?;
        let x = std::mem::take(&mut self.sample.x);
        let mean = MeanInput::of(&x[..self.sample.group(0).end * d], d);
        let mut gate = vec![0.0; n_tokens * f];
        self.gate(layer, &mean, &x, &mut gate)?;
        let signs = self.fresh_n_neg(&x)?;

        let mut h = vec![0.0; n_tokens * f];
        self.normal_weights(Kind::Up, layer, f, d, unit);
        self.emit(&layer_name(layer, "mlp.up_proj"), f, d, &x, &mut h, false)?;
        let activation = kernel_activation(self.options.activation);
        h.iter_mut().zip(&gate).for_each(|(h, &gate)| *h *= activation.apply(gate));

        // Outputs of rms `growth`: their mean square is the sum of h squared over a token, times sigma squared.
        let measured = &h[..self.sample.group(1).end * f];
        let energy =
            measured.iter().map(|&h| f64::from(h).powi(2)).sum::<f64>() * f as f64 / measured.len() as f64;
        self.normal_weights(Kind::Down, layer, d, f, growth / energy.max(1e-12).sqrt());
        let squared_norms = self.column_squared_norms(d, f);
        let mut hidden = std::mem::take(&mut self.sample.hidden);
        self.emit(&layer_name(layer, "mlp.down_proj"), d, f, &h, &mut hidden, true)?;

        let fresh = self.sample.group(2);
        let (gate, h) = (&gate[fresh.start * f..fresh.end * f], &h[fresh.start * f..fresh.end * f]);
        let n_active = gate.iter().filter(|&&gate| activation.apply(gate) != 0.0).count();
        let mut sign_rule = Vec::new();
        if self.options.is_sparse() {
            let mut histogram = Histogram::new(self.options.hidden_size);
            histogram.add(&signs, gate, h, &squared_norms, activation);
            sign_rule = REPORTED_SHARES.map(|share| sign_rule_point(&histogram, share)).into();
        }
        let mean_square = hidden.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / hidden.len() as f64;
        self.sample.hidden = hidden;
        self.sample.x = x;
        Ok(LayerReport {
            layer,
            sparsity: 1.0 - n_active as f64 / gate.len() as f64,
            mean_share: mean.share,
            residual_rms: mean_square.sqrt(),
            sign_rule,
        })
    }

    /// W_gate with the asked share of zeros; `gate` gets its products with the sample.
    fn gate(&mut self, layer: u32, mean: &MeanInput, x: &[f32], gate: &mut [f32]) -> Result<(), SynthError> {
        let d = self.options.hidden_size as usize;
        let f = self.options.intermediate_size as usize;
        let name = layer_name(layer, "mlp.gate_proj");
        let sigma = 1.0 / (d as f64).sqrt();
        if !self.options.is_sparse() {
            self.normal_weights(Kind::Gate, layer, f, d, sigma);
            return self.emit(&name, f, d, x, gate, false);
        }
        let centre = -normal_quantile(self.options.sparsity) * (1.0 + ROW_SPREAD * ROW_SPREAD).sqrt();
        let deviation = mean.noise * (d as f64).sqrt();
        let mut biases = self.stream(Kind::GateBias, layer, 0);
        let p_agree: Vec<f64> = (0..f)
            .map(|_| {
                let bias = centre + ROW_SPREAD * f64::from(self.quantiles.draw(&mut biases));
                (0.5 + 0.5 * bias * deviation / mean.l1).clamp(0.02, 0.98)
            })
            .collect();

        self.gate_weights(layer, sigma, 0.0, &p_agree, &mean.negative);
        let matrix = Matrix::new(T::elements(&self.weights), f, d)?;
        self.cpu.matmul(&matrix, self.sample.n_tokens(), x, gate, false)?;
        let group = self.sample.group(1);
        let projections = mean.projections(&x[group.start * d..group.end * d]);
        let shift = self.bisect(layer, &gate[group.start * f..group.end * f], &projections)?;

        self.gate_weights(layer, sigma, shift / mean.l1, &p_agree, &mean.negative);
        self.emit(&name, f, d, x, gate, false)
    }

    /// The shift that leaves the asked share of `gate (n_tokens, intermediate_size)` without activation, when each
    /// token's row loses `shift * projections[token]`.
    fn bisect(&self, layer: u32, gate: &[f32], projections: &[f32]) -> Result<f64, SynthError> {
        let f = self.options.intermediate_size as usize;
        let activation = kernel_activation(self.options.activation);
        let sparsity = |shift: f64| {
            let n_active: usize = gate
                .chunks_exact(f)
                .zip(projections)
                .map(|(gate, &projection)| {
                    let loss = shift as f32 * projection;
                    gate.iter().filter(|&&gate| activation.apply(gate - loss) != 0.0).count()
                })
                .sum();
            1.0 - n_active as f64 / gate.len() as f64
        };
        let (mut low, mut high) = (-16.0, 16.0);
        for _ in 0..30 {
            let middle = 0.5 * (low + high);
            if sparsity(middle) < self.options.sparsity { low = middle } else { high = middle }
        }
        let found = sparsity(high);
        if (found - self.options.sparsity).abs() > SPARSITY_TOLERANCE {
            return Err(SynthError::Sparsity { layer, expected: self.options.sparsity, found });
        }
        Ok(high)
    }

    fn gate_weights(&mut self, layer: u32, sigma: f64, shift: f64, p_agree: &[f64], mean_negative: &[bool]) {
        let table = GateTable::<T>::new(sigma as f32, shift as f32);
        let (seed, key) = (self.options.seed, tensor_key(Kind::Gate, layer));
        self.resize_weights(p_agree.len() * mean_negative.len());
        fill_rows(self.cpu.n_threads(), &mut self.weights, mean_negative.len(), 0, |row, out, _| {
            table.fill(Stream::new(seed, key, row as u64), p_agree[row], mean_negative, out);
        });
    }

    fn normal_weights(&mut self, kind: Kind, layer: u32, n_rows: usize, n_cols: usize, sigma: f64) {
        let table: NormalTable<T> = self.quantiles.scaled(sigma as f32);
        let (seed, key) = (self.options.seed, tensor_key(kind, layer));
        self.resize_weights(n_rows * n_cols);
        fill_rows(self.cpu.n_threads(), &mut self.weights, n_cols, 0, |row, out, _| {
            table.fill(Stream::new(seed, key, row as u64), out);
        });
    }

    fn resize_weights(&mut self, n: usize) {
        self.weights.resize(n, T::zeroed());
    }

    /// Writes the matrix at hand while the sample is multiplied with it: `y (+)= x W^T`.
    fn emit(
        &mut self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
        x: &[f32],
        y: &mut [f32],
        accumulate: bool,
    ) -> Result<(), SynthError> {
        let matrix = Matrix::new(T::elements(&self.weights), n_rows, n_cols)?;
        let bytes: &[u8] = bytemuck::cast_slice(&self.weights);
        let (shards, cpu, n_tokens) = (&mut self.shards, &self.cpu, self.sample.n_tokens());
        let (written, multiplied) = std::thread::scope(|scope| {
            let writer = scope.spawn(|| shards.write(name, bytes));
            let multiplied = cpu.matmul(&matrix, n_tokens, x, y, accumulate);
            (writer.join(), multiplied)
        });
        let written = written.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.map_err(|source| SynthError::Io { path: self.folder.to_owned(), source })?;
        multiplied?;
        self.advance(bytes.len());
        Ok(())
    }

    /// A norm of weights in [0.8, 1.2], and `x` of the sample normalised by it.
    fn norm(&mut self, name: &str, kind: Kind, layer: u32) -> Result<(), SynthError> {
        let mut stream = self.stream(kind, layer, 0);
        let weights: Vec<T> = (0..self.options.hidden_size)
            .map(|_| T::from_f32((0.8 + 0.4 * stream.next_unit()) as f32))
            .collect();
        self.write(name, bytemuck::cast_slice(&weights))?;
        let weights: Vec<f32> = weights.into_iter().map(T::to_f32).collect();
        self.cpu.rmsnorm(&self.sample.hidden, &weights, RMS_NORM_EPS, &mut self.sample.x)?;
        Ok(())
    }

    /// The final norm, and an lm_head that does not see the mean: it would give every position the same next token.
    fn lm_head(&mut self) -> Result<(), SynthError> {
        let d = self.options.hidden_size as usize;
        self.norm("model.norm.weight", Kind::FinalNorm, 0)?;
        let x = &self.sample.x[..self.sample.group(0).end * d];
        let mut mean = vec![0.0_f64; d];
        for row in x.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += f64::from(x));
        }
        let norm = mean.iter().map(|m| m * m).sum::<f64>().sqrt();
        let mean: Vec<f32> = mean.iter().map(|m| (m / norm) as f32).collect();
        let normal = self.quantiles.scaled::<f32>(2.0 / (d as f32).sqrt());
        let seed = self.options.seed;
        let fill = |row: usize, out: &mut [T], buffer: &mut Vec<f32>| {
            buffer.resize(d, 0.0);
            normal.fill(Stream::new(seed, tensor_key(Kind::LmHead, 0), row as u64), buffer);
            let along: f32 = buffer.iter().zip(&mean).map(|(w, m)| w * m).sum();
            for ((out, &weight), &mean) in out.iter_mut().zip(buffer.iter()).zip(&mean) {
                *out = T::from_f32(weight - along * mean);
            }
        };
        self.write_rows("lm_head.weight", self.options.vocab_size as usize, d, fill)
    }

    /// Makes and writes a matrix that nothing is multiplied with, in blocks.
    fn write_rows(
        &mut self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
        fill: impl Fn(usize, &mut [T], &mut Vec<f32>) + Sync,
    ) -> Result<(), SynthError> {
        let n_block_rows = (BLOCK_BYTES / (n_cols * size_of::<T>())).max(1);
        let mut block = Vec::new();
        for first_row in (0..n_rows).step_by(n_block_rows) {
            block.resize(n_block_rows.min(n_rows - first_row) * n_cols, T::zeroed());
            fill_rows(self.cpu.n_threads(), &mut block, n_cols, first_row, &fill);
            self.write(name, bytemuck::cast_slice(&block))?;
        }
        Ok(())
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), SynthError> {
        self.shards
            .write(name, bytes)
            .map_err(|source| SynthError::Io { path: self.folder.to_owned(), source })?;
        self.advance(bytes.len());
        Ok(())
    }

    fn advance(&mut self, n_bytes: usize) {
        self.bytes_done += n_bytes as u64;
        (self.progress)(self.bytes_done, self.shards.total_bytes());
    }

    fn stream(&self, kind: Kind, layer: u32, row: u64) -> Stream {
        Stream::new(self.options.seed, tensor_key(kind, layer), row)
    }

    /// Sign disagreements of the gate at hand with the fresh tokens, `(n_tokens, intermediate_size)`.
    fn fresh_n_neg(&self, x: &[f32]) -> Result<Vec<u32>, SynthError> {
        let d = self.options.hidden_size as usize;
        let f = self.options.intermediate_size as usize;
        let n_words = d.div_ceil(32);
        let mut words = vec![0_u32; f * n_words];
        for (words, row) in words.chunks_exact_mut(n_words).zip(self.weights.chunks_exact(d)) {
            for (word, weights) in words.iter_mut().zip(row.chunks(32)) {
                *word = weights
                    .iter()
                    .enumerate()
                    .fold(0, |word, (bit, weight)| word | u32::from(weight.to_f32() < 0.0) << bit);
            }
        }
        let fresh = self.sample.group(2);
        let mut n_neg = vec![0; fresh.len() * f];
        let signs = SignMatrix { words: &words, n_rows: f, n_words };
        self.cpu.n_neg(&signs, fresh.len(), &x[fresh.start * d..fresh.end * d], &mut n_neg)?;
        Ok(n_neg)
    }

    /// Squared norm of each column of the matrix at hand, `(n_rows, n_cols)`.
    fn column_squared_norms(&self, n_rows: usize, n_cols: usize) -> Vec<f64> {
        let mut sums = vec![0.0_f64; n_cols];
        for row in self.weights.chunks_exact(n_cols).take(n_rows) {
            sums.iter_mut().zip(row).for_each(|(sum, weight)| *sum += f64::from(weight.to_f32()).powi(2));
        }
        sums
    }
}

/// Calls `fill(row, row_of_out, buffer)` for every row, over threads; `first_row` is the number of the first one.
fn fill_rows<T: Element>(
    n_threads: usize,
    out: &mut [T],
    n_cols: usize,
    first_row: usize,
    fill: impl Fn(usize, &mut [T], &mut Vec<f32>) + Sync,
) {
    let n_rows_each = (out.len() / n_cols).div_ceil(n_threads).max(1);
    std::thread::scope(|scope| {
        for (part_idx, part) in out.chunks_mut(n_rows_each * n_cols).enumerate() {
            let fill = &fill;
            scope.spawn(move || {
                let mut buffer = Vec::new();
                for (row, out) in part.chunks_exact_mut(n_cols).enumerate() {
                    fill(first_row + part_idx * n_rows_each + row, out, &mut buffer);
                }
            });
        }
    });
}

fn kernel_activation(activation: Activation) -> kernels::Activation {
    match activation {
        Activation::Relu => kernels::Activation::Relu,
        Activation::FatRelu { threshold } => kernels::Activation::FatRelu(threshold),
        Activation::Silu => kernels::Activation::Silu,
    }
}

fn tensor_key(kind: Kind, layer: u32) -> u64 {
    u64::from(layer) << 8 | kind as u64
}
