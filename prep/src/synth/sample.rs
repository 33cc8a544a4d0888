//! The sample of random tokens whose hidden states every layer is made for.

use kernels::{AttentionScratch, AttentionShape, Cpu, ShapeError};

use super::options::SynthOptions;
use super::plan::ROPE_THETA;
use super::random::Element;

/// Hidden states of random tokens on their way through the layers: three groups of the same number of sequences.
pub(super) struct Sample {
    n_sequences: usize,
    pub(super) sequence_len: usize,
    /// `(n_tokens, hidden_size)`.
    pub(super) hidden: Vec<f32>,
    /// `(n_tokens, hidden_size)`.
    pub(super) x: Vec<f32>,
    attention_shape: AttentionShape,
    scratch: AttentionScratch,
    /// `(sequence_len, head_dim / 2)`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Sample {
    pub(super) fn new(options: &SynthOptions) -> Self {
        let sequence_len = options.max_position_embeddings.min(64) as usize;
        // Enough (token, row) pairs in a group for a share good to a tenth of a percent or so.
        let n_group_tokens = (1_usize << 18).div_ceil(options.intermediate_size as usize).clamp(64, 1024);
        let n_sequences = 3 * n_group_tokens.div_ceil(sequence_len);
        let n_values = n_sequences * sequence_len * options.hidden_size as usize;
        let head_dim = options.head_dim() as usize;
        let attention_shape = AttentionShape {
            n_heads: options.num_attention_heads as usize,
            n_kv_heads: options.num_key_value_heads as usize,
            head_dim,
            n_positions_max: sequence_len,
        };
        let angles = (0..sequence_len).flat_map(|position| {
            (0..head_dim / 2)
                .map(move |i| position as f64 / ROPE_THETA.powf(2.0 * i as f64 / head_dim as f64))
        });
        let (sin, cos) = angles.map(|angle| (angle.sin() as f32, angle.cos() as f32)).unzip();
        Self {
            n_sequences,
            sequence_len,
            hidden: vec![0.0; n_values],
            x: vec![0.0; n_values],
            attention_shape,
            scratch: AttentionScratch::new(&attention_shape),
            cos,
            sin,
        }
    }

    pub(super) fn n_tokens(&self) -> usize {
        self.n_sequences * self.sequence_len
    }

    /// Tokens of one group: 0 measures the mean, 1 sets the share of zeros, 2 is fresh.
    pub(super) fn group(&self, group: usize) -> std::ops::Range<usize> {
        let n = self.n_tokens() / 3;
        group * n..(group + 1) * n
    }

    /// Causal attention of every sequence; `q`, `k`, `v` and the result are `(n_tokens, heads x head_dim)`.
    pub(super) fn attention(
        &mut self,
        cpu: &Cpu,
        q: &mut [f32],
        k: &mut [f32],
        v: &[f32],
    ) -> Result<Vec<f32>, ShapeError> {
        let shape = self.attention_shape;
        let (head_dim, n_kv_heads) = (shape.head_dim, shape.n_kv_heads);
        let mut out = vec![0.0; q.len()];
        let q_len = self.sequence_len * shape.n_heads * head_dim;
        let kv_len = self.sequence_len * n_kv_heads * head_dim;
        let mut keys = vec![0.0; kv_len];
        let mut values = vec![0.0; kv_len];
        let sequences = q.chunks_exact_mut(q_len).zip(k.chunks_exact_mut(kv_len)).zip(v.chunks_exact(kv_len));
        for (((q, k), v), out) in sequences.zip(out.chunks_exact_mut(q_len)) {
            cpu.rope(q, shape.n_heads, head_dim, &self.cos, &self.sin)?;
            cpu.rope(k, n_kv_heads, head_dim, &self.cos, &self.sin)?;
            for position in 0..self.sequence_len {
                for head in 0..n_kv_heads {
                    let from = (position * n_kv_heads + head) * head_dim;
                    let to = (head * self.sequence_len + position) * head_dim;
                    keys[to..to + head_dim].copy_from_slice(&k[from..from + head_dim]);
                    values[to..to + head_dim].copy_from_slice(&v[from..from + head_dim]);
                }
            }
            let (keys, values) = (f32::elements(&keys), f32::elements(&values));
            cpu.attention(&shape, self.sequence_len, 0, q, keys, values, &mut self.scratch, out)?;
        }
        Ok(out)
    }
}

/// What the MLP inputs of a layer share.
pub(super) struct MeanInput {
    /// Sign of each column's mean.
    pub(super) negative: Vec<bool>,
    /// Sum of the means' magnitudes.
    pub(super) l1: f64,
    /// Deviation of a column from its mean, root mean square over columns.
    pub(super) noise: f64,
    /// Square of the mean over the mean square.
    pub(super) share: f64,
}

impl MeanInput {
    /// Over the rows of `x (n_tokens, width)`.
    pub(super) fn of(x: &[f32], width: usize) -> Self {
        let n = (x.len() / width) as f64;
        let mut mean = vec![0.0_f64; width];
        for row in x.chunks_exact(width) {
            mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += f64::from(x) / n);
        }
        let mean_square = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
        let square_of_mean = mean.iter().map(|m| m * m).sum::<f64>() / width as f64;
        Self {
            negative: mean.iter().map(|&m| m < 0.0).collect(),
            l1: mean.iter().map(|m| m.abs()).sum(),
            noise: (mean_square - square_of_mean).max(1e-6).sqrt(),
            share: square_of_mean / mean_square,
        }
    }

    /// `sum_j sign(m_j) x_j / sum|m|` of each row of `x`: what a gate loses to a shift of 1. About 1 on average.
    pub(super) fn projections(&self, x: &[f32]) -> Vec<f32> {
        x.chunks_exact(self.negative.len())
            .map(|row| {
                let along: f64 = row
                    .iter()
                    .zip(&self.negative)
                    .map(|(&x, &negative)| f64::from(if negative { -x } else { x }))
                    .sum();
                (along / self.l1) as f32
            })
            .collect()
    }
}
