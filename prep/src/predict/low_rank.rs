//! Predictors of low rank: two thin matrices in f16, from a whitened singular value decomposition or imported.
//!
//! Of all matrices of rank r, the decomposition has the least mean square error of the gate over a text (Eckart and Young,
//! applied to the gates instead of the weights, which is what whitening by the inputs' covariance amounts to):
//!
//! ```text
//! g ~ U (V x) + b        U (f, r): principal directions of the gates        V = U^T W_gate        b = mean g - U U^T mean g
//! ```
//!
//! Source: SVDP, arXiv 2603.14110, which predicts with whitened factors of rank 256 and a bias for each row. The directions
//! are found by subspace iteration from the gates of the first tokens. A bias is a part of a row's offset on the threshold.
//!
//! With a residual, what the factors leave of W_gate is stored too, as signs and the mean magnitude of each row, which are
//! of all such pairs the ones with the least squares:
//!
//! ```text
//! R = W_gate - U V        g ~ U (V x) + e_i sum_c sign(R_ic) x_c        e_i = mean |R_i|
//! ```

use half::f16;
use kernels::{Cpu, Elements, Matrix, SignMatrix};

use super::planes::copy_row;

/// Iterations; the subspace turns by the ratio of singular values beyond and within it each time.
const N_ITERATIONS: usize = 8;
/// Rows of W_gate whose residual is computed at a time.
const RESIDUAL_ROWS: usize = 64;

/// Where the factors of a predictor of low rank come from.
#[derive(Clone, Debug)]
pub(crate) enum LowRankSource {
    /// The calibration text; without a rank, that of [`rank_of`].
    Fitted { rank: Option<usize> },
    /// Somebody's training: one for each layer.
    Imported(Vec<Factors>),
}

/// The factors of a layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Factors {
    pub(crate) rank: usize,
    /// `(rank, d)`.
    pub(crate) fc1: Vec<f16>,
    /// `(f, rank)`.
    pub(crate) fc2: Vec<f16>,
    /// What is added to a score, `(f,)`.
    pub(crate) bias: Vec<f32>,
    /// Elements of the product with the first factor count as 0 where they are below zero.
    pub(crate) relu: bool,
    pub(crate) residual: Option<Residual>,
}

/// What the factors leave of W_gate.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Residual {
    /// Sign words, `(f, ceil(d / 32))`.
    pub(crate) signs: Vec<u32>,
    /// Mean magnitudes of rows, `(f,)`.
    pub(crate) scales: Vec<f32>,
}

/// The rank that takes the share of a dense W_gate that rank 256 takes in a 7B Llama (4096 inputs, 11008 rows).
pub(crate) fn rank_of(n_rows: usize, n_cols: usize) -> usize {
    let share = 256.0 * f64::from(4096 + 11008) / (4096.0 * 11008.0);
    let rank = share * n_rows as f64 * n_cols as f64 / (n_rows + n_cols) as f64;
    (rank.round() as usize).max(1)
}

/// A third of a rank, beside the signs of what is left. A wide one in whole 16 bytes of f16, as kernels read them.
pub(crate) fn third_of(rank: usize) -> usize {
    let third = rank.div_ceil(3);
    if third < 32 { third } else { third.next_multiple_of(8) }
}

impl Factors {
    /// From `gates (n_tokens, f)` of `w_gate`; of a lower rank where there are fewer tokens, rows or columns.
    pub(crate) fn fitted(cpu: &Cpu, w_gate: &Matrix<'_>, gates: &[f32], rank: usize) -> Self {
        let (f, d) = (w_gate.n_rows, w_gate.n_cols);
        let n_tokens = gates.len() / f;
        let rank = rank.min(n_tokens).min(f).min(d);
        let mut mean = vec![0.0_f64; f];
        for gate in gates.chunks_exact(f) {
            mean.iter_mut().zip(gate).for_each(|(mean, &g)| *mean += f64::from(g) / n_tokens as f64);
        }
        let centred: Vec<f32> =
            gates.iter().enumerate().map(|(idx, &g)| (f64::from(g) - mean[idx % f]) as f32).collect();
        let centred = Matrix { data: Elements::F32(&centred), n_rows: n_tokens, n_cols: f };

        // The first tokens span a subspace to start from.
        let mut u_t = gates[..rank * f].to_vec();
        orthonormalise(&mut u_t, f);
        let mut coordinates = vec![0.0; rank * n_tokens];
        for _ in 0..N_ITERATIONS {
            product(cpu.matmul(&centred, rank, &u_t, &mut coordinates, false));
            product(cpu.matmul_t(&centred, rank, &coordinates, &mut u_t, false));
            orthonormalise(&mut u_t, f);
        }
        let mut v = vec![0.0; rank * d];
        product(cpu.matmul_t(w_gate, rank, &u_t, &mut v, false));
        let mut bias = mean.clone();
        for u in u_t.chunks_exact(f) {
            let along: f64 = u.iter().zip(&mean).map(|(&u, mean)| f64::from(u) * mean).sum();
            bias.iter_mut().zip(u).for_each(|(bias, &u)| *bias -= along * f64::from(u));
        }
        let mut fc2 = vec![f16::ZERO; f * rank];
        for (k, (u, v)) in u_t.chunks_exact(f).zip(v.chunks_exact_mut(d)).enumerate() {
            let scale = balance(u, v);
            v.iter_mut().for_each(|v| *v /= scale);
            for (row, u) in u.iter().enumerate() {
                fc2[row * rank + k] = f16::from_f32(u * scale);
            }
        }
        Self {
            rank,
            fc1: v.iter().map(|&v| f16::from_f32(v)).collect(),
            fc2,
            bias: bias.into_iter().map(|bias| bias as f32).collect(),
            relu: false,
            residual: None,
        }
    }

    /// With what they leave of `w_gate`.
    pub(crate) fn with_residual(mut self, cpu: &Cpu, w_gate: &Matrix<'_>) -> Self {
        let (f, d) = (w_gate.n_rows, w_gate.n_cols);
        let n_words = d.div_ceil(32);
        let mut residual = Residual { signs: vec![0; f * n_words], scales: vec![0.0; f] };
        let mut rest = vec![0.0; RESIDUAL_ROWS * d];
        let mut row = vec![0.0; d];
        for row0 in (0..f).step_by(RESIDUAL_ROWS) {
            let n_rows = RESIDUAL_ROWS.min(f - row0);
            let fc2 = self.fc2[row0 * self.rank..][..n_rows * self.rank].iter();
            let fc2: Vec<f32> = fc2.copied().map(f16::to_f32).collect();
            let rest = &mut rest[..n_rows * d];
            product(cpu.matmul_t(&self.view().fc1, n_rows, &fc2, rest, false));
            for (idx, rest) in rest.chunks_exact_mut(d).enumerate() {
                copy_row(&w_gate.data, (row0 + idx) * d, &mut row);
                rest.iter_mut().zip(&row).for_each(|(rest, w)| *rest = w - *rest);
                let sum: f64 = rest.iter().map(|&rest| f64::from(rest.abs())).sum();
                residual.scales[row0 + idx] = (sum / d as f64) as f32;
                let words = &mut residual.signs[(row0 + idx) * n_words..][..n_words];
                kernels::reference::sign_pack(rest, words);
            }
        }
        self.residual = Some(residual);
        self
    }

    /// As kernels take them.
    pub(crate) fn view(&self) -> kernels::LowRank<'_> {
        let (rank, fc1, fc2) = (self.rank, Elements::F16(&self.fc1), Elements::F16(&self.fc2));
        kernels::LowRank {
            fc1: Matrix { data: fc1, n_rows: rank, n_cols: self.fc1.len() / rank },
            fc2: Matrix { data: fc2, n_rows: self.bias.len(), n_cols: rank },
            relu: self.relu,
            residual: self.residual.as_ref().map(|Residual { signs, scales }| kernels::Residual {
                signs: SignMatrix { words: signs, n_rows: scales.len(), n_words: signs.len() / scales.len() },
                scales,
            }),
        }
    }

    /// Scores, bias included, `(n_tokens, f)`, for `x (n_tokens, d)`.
    pub(crate) fn scores(&self, cpu: &Cpu, n_tokens: usize, x: &[f32]) -> Vec<f32> {
        let n_rows = self.bias.len();
        let mut scores = vec![0.0; n_tokens * n_rows];
        product(cpu.low_rank_scores(&self.view(), n_tokens, x, &mut scores));
        for scores in scores.chunks_exact_mut(n_rows) {
            scores.iter_mut().zip(&self.bias).for_each(|(score, bias)| *score += bias);
        }
        scores
    }
}

/// A power of two that makes the largest elements of `u` times it and of `v` over it about the same, as f16 has few
/// exponents.
fn balance(u: &[f32], v: &[f32]) -> f32 {
    let max = |values: &[f32]| values.iter().fold(0.0_f32, |max, v| max.max(v.abs()));
    let exponent = (max(v) / max(u)).sqrt().log2().round();
    if exponent.is_finite() { exponent.exp2() } else { 1.0 }
}

fn product(result: Result<(), kernels::ShapeError>) {
    result.expect("the shapes are those of the factors");
}

/// Gram and Schmidt over rows of `n_cols`, twice, so that rounding leaves them orthogonal. A row that depends on those
/// before it becomes zero.
fn orthonormalise(rows: &mut [f32], n_cols: usize) {
    let n_rows = rows.len() / n_cols;
    for row in 0..n_rows {
        let (before, rest) = rows.split_at_mut(row * n_cols);
        let current = &mut rest[..n_cols];
        let length_before = norm(current);
        for _ in 0..2 {
            for other in before.chunks_exact(n_cols) {
                let along: f64 =
                    other.iter().zip(&*current).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                current.iter_mut().zip(other).for_each(|(v, &o)| *v -= along as f32 * o);
            }
        }
        let length = norm(current);
        let factor = if length > 1e-6 * length_before { 1.0 / length } else { 0.0 };
        current.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
    }
}

fn norm(row: &[f32]) -> f64 {
    row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::noise;
    use super::*;

    #[test]
    fn the_rank_takes_the_bytes_of_256_at_7b() {
        assert_eq!(rank_of(11008, 4096), 256);
        assert_eq!(rank_of(1376, 512), 32);
        assert_eq!(rank_of(1, 1), 1);
        assert_eq!([256, 32, 1].map(third_of), [88, 11, 1]);
    }

    /// Weights whose rank is the factors' own give the gates themselves, also for inputs with a mean.
    #[test]
    fn gates_of_a_matrix_of_low_rank_are_exact() {
        let (f, d, n_tokens) = (96, 64, 40);
        let rank = 5;
        let cpu = Cpu::new(1);
        let (left, right) = (noise(f * rank, 1), noise(rank * d, 2));
        let right = Matrix { data: Elements::F32(&right), n_rows: rank, n_cols: d };
        let mut w = vec![0.0; f * d];
        product(cpu.matmul_t(&right, f, &left, &mut w, false));
        let w = Matrix { data: Elements::F32(&w), n_rows: f, n_cols: d };
        let x: Vec<f32> = noise(n_tokens * d, 3).iter().map(|v| v + 0.5).collect();
        let mut gates = vec![0.0; n_tokens * f];
        product(cpu.matmul(&w, n_tokens, &x, &mut gates, false));
        let found = Factors::fitted(&cpu, &w, &gates, rank).scores(&cpu, n_tokens, &x);
        // Up to the eleven bits of f16.
        let largest = gates.iter().fold(0.0_f32, |max, g| max.max(g.abs()));
        for (found, gate) in found.iter().zip(&gates) {
            assert!((found - gate).abs() < 2e-3 * largest, "{found} is not {gate}");
        }
    }

    /// Signs and scales of what is left make the gates of a matrix of full rank better foretold, and a residual of equal
    /// magnitudes is exact but for the eight bits of x.
    #[test]
    fn a_residual_foretells_what_the_factors_leave() {
        let (f, d, n_tokens) = (70, 45, 60);
        let cpu = Cpu::new(1);
        let (left, right) = (noise(f, 6), noise(d, 7));
        let w: Vec<f32> = noise(f * d, 8)
            .iter()
            .enumerate()
            .map(|(i, v)| 3.0 * left[i / d] * right[i % d] + if *v < 0.0 { -0.25 } else { 0.25 })
            .collect();
        let w = Matrix { data: Elements::F32(&w), n_rows: f, n_cols: d };
        let x = noise(n_tokens * d, 9);
        let mut gates = vec![0.0; n_tokens * f];
        product(cpu.matmul(&w, n_tokens, &x, &mut gates, false));
        let exact = Factors {
            rank: 1,
            fc1: right.iter().map(|&v| f16::from_f32(v)).collect(),
            fc2: left.iter().map(|&v| f16::from_f32(3.0 * v)).collect(),
            bias: vec![0.0; f],
            relu: false,
            residual: None,
        };
        let error = |factors: &Factors| -> f64 {
            let scores = factors.scores(&cpu, n_tokens, &x);
            scores.iter().zip(&gates).map(|(a, b)| f64::from(a - b).powi(2)).sum()
        };
        let energy: f64 = gates.iter().map(|&g| f64::from(g).powi(2)).sum();
        let with = exact.clone().with_residual(&cpu, &w);
        let residual = with.residual.as_ref().expect("made");
        assert!(residual.scales.iter().all(|scale| (scale - 0.25).abs() < 2e-3), "{:?}", residual.scales);
        assert!(error(&with) < 1e-3 * energy && error(&exact) > 0.05 * energy);
        let fitted = Factors::fitted(&cpu, &w, &gates, 4);
        let with = fitted.clone().with_residual(&cpu, &w);
        assert!(error(&with) < 0.7 * error(&fitted), "{} and {}", error(&with), error(&fitted));
    }

    /// Directions of much energy come first: with noise on top, the rest is no larger than the noise.
    #[test]
    fn the_strongest_directions_are_found() {
        let (f, n_tokens) = (96, 200);
        let rank = rank_of(f, f);
        let w = noise(f * f, 4);
        let w: Vec<f32> =
            w.iter().enumerate().map(|(i, w)| if i / f < rank { 10.0 * w } else { 0.1 * w }).collect();
        let w = Matrix { data: Elements::F32(&w), n_rows: f, n_cols: f };
        let (cpu, x) = (Cpu::new(1), noise(n_tokens * f, 5));
        let mut gates = vec![0.0; n_tokens * f];
        product(cpu.matmul(&w, n_tokens, &x, &mut gates, false));
        let found = Factors::fitted(&cpu, &w, &gates, rank).scores(&cpu, n_tokens, &x);
        let rest: f64 = found.iter().zip(&gates).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let noise: f64 = gates
            .iter()
            .enumerate()
            .filter(|(idx, _)| idx % f >= rank)
            .map(|(_, g)| f64::from(*g).powi(2))
            .sum();
        assert!(rest <= 1.01 * noise, "{rest} of {noise}");
    }
}
