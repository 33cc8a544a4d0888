//! W_gate in a few bits.
//!
//! An element w of a row becomes an odd number v of P bits with the sign of w, at first the nearest in steps of the row:
//!
//! ```text
//! s = step(P) * sqrt(mean of the row's squares)         v = sign(w) * (2 min(floor(|w| / s), 2^(P - 1) - 1) + 1)
//! ```
//!
//! so that w is about v * s / 2. The steps are those of the uniform quantiser of a normal variable with the least
//! error (Max, "Quantizing for minimum distortion", 1960). Equal steps, that is 1 : 3 for two bits, keep the score
//! a sum of integers, and are within 2 % of the best unequal levels.
//!
//! The errors of a row's elements then make up for each other over the inputs x of a text, as in OPTQ (arXiv 2210.17323):
//! element by element, v moves to where the error of the row's gate is the least,
//!
//! ```text
//! E = (w - a v)^T H (w - a v)         H = X^T X + r I,  X the inputs less their mean         a = v^T H w / v^T H v
//! ```
//!
//! The mean is left to the offset of the row's threshold (`offsets`), and so is a. With p = H w and q = H v the best real
//! number in column c is v_c + (p_c / a - q_c) / H_cc, and E being a parabola there, the odd number nearest to it is the
//! best one; q follows each step by a row of H. The ridge r stands for the inputs that the text lacks.

use half::{bf16, f16};
use kernels::{BitPlanes, Cpu, Elements, Matrix, Moments, SignMatrix, Sweeps};

/// Steps of 1, 2 and 3 bits in standard deviations; a single bit has none.
const STEPS: [f32; 3] = [f32::INFINITY, 0.9957, 0.586];
/// The ridge over what as many tokens of noise would give a direction. That the best one goes with d / n is inferred.
/// What ran on held-out text, gate bytes at a KL of 0.0035: with 820 tokens and w2 on relu-llama-8m, ridges of 0.05, 0.3, 1
/// and 3 (33.3, 32.4, 32.0 and 31.9 %; 33.8 % unfitted), with chosen kinds on relu-llama-46m 1 and 2 (27.7 % both); with
/// 3276 tokens 0.3 and 1 on relu-llama-8m (31.1 and 31.3 %) and 1 on relu-llama-46m.
const RIDGE: f32 = 3.0;
/// Times that every element is looked at.
const N_SWEEPS: usize = 4;
/// Rows that are fitted at a time: enough for every thread, few enough for little memory.
const N_ROWS: usize = 4096;
/// Rows that a thread takes at a time.
const N_ROWS_OF_THREAD: usize = 32;

/// Inputs of a layer, for its planes to be fitted to.
#[derive(Clone, Debug)]
pub(crate) struct Inputs {
    n_cols: usize,
    /// Less their mean, scaled so that the moments of a column are 1 in the mean, `(n_tokens, n_cols)`.
    x: Vec<f32>,
    ridge: f32,
    /// H.
    moments: Moments,
}

/// Planes of a matrix below its signs, `(n_planes - 1, n_rows, n_words)`.
#[derive(Clone, Debug, Default)]
pub(crate) struct LowPlanes {
    pub(crate) words: Vec<u32>,
}

impl Inputs {
    /// From `x (n_tokens, n_cols)`; none where they are all the same, or not finite.
    pub(crate) fn new(cpu: &Cpu, mut x: Vec<f32>, n_cols: usize) -> Option<Self> {
        let n_tokens = x.len() / n_cols;
        let mut mean = vec![0.0_f64; n_cols];
        for x in x.chunks_exact(n_cols) {
            mean.iter_mut().zip(x).for_each(|(mean, &x)| *mean += f64::from(x) / n_tokens as f64);
        }
        let mut sum_squares = 0.0;
        for x in x.chunks_exact_mut(n_cols) {
            for (x, mean) in x.iter_mut().zip(&mean) {
                let centred = f64::from(*x) - mean;
                sum_squares += centred * centred;
                *x = centred as f32;
            }
        }
        let scale = (n_cols as f64 / sum_squares).sqrt();
        if !scale.is_normal() {
            return None;
        }
        x.iter_mut().for_each(|x| *x = (f64::from(*x) * scale) as f32);
        let ridge = RIDGE * n_cols as f32 / n_tokens as f32;
        let mut x_t = vec![0.0; x.len()];
        for (token, x) in x.chunks_exact(n_cols).enumerate() {
            x.iter().enumerate().for_each(|(col, &x)| x_t[col * n_tokens + token] = x);
        }
        let mut moments = vec![0.0; n_cols * n_cols];
        let as_matrix = Matrix { data: Elements::F32(&x), n_rows: n_tokens, n_cols };
        cpu.matmul_t(&as_matrix, n_cols, &x_t, &mut moments, false).expect("a matrix and its transpose");
        (0..n_cols).for_each(|col| moments[col * n_cols + col] += ridge);
        let moments = Moments::new(cpu, n_cols, &moments).expect("a square");
        Some(Self { n_cols, x, ridge, moments })
    }

    /// `product = rows H`, both `(n, n_cols)`; `along` is overwritten. There are fewer tokens than columns in large models,
    /// so that X does with fewer operations than H.
    fn times(&self, cpu: &Cpu, rows: &[f32], along: &mut Vec<f32>, product: &mut [f32]) {
        let (n_rows, n_tokens) = (rows.len() / self.n_cols, self.x.len() / self.n_cols);
        let x = Matrix { data: Elements::F32(&self.x), n_rows: n_tokens, n_cols: self.n_cols };
        along.resize(n_rows * n_tokens, 0.0);
        cpu.matmul(&x, n_rows, rows, along, false).expect("rows of as many columns");
        let n_together = N_ROWS_OF_THREAD * self.n_cols;
        cpu.for_each(rows.chunks(n_together).zip(product.chunks_mut(n_together)), |(rows, product)| {
            product.iter_mut().zip(rows).for_each(|(product, v)| *product = self.ridge * v);
        });
        cpu.matmul_t(&x, n_rows, along, product, true).expect("rows of as many tokens");
    }
}

impl LowPlanes {
    /// The planes of `w` in each of `n_planes` bits, fitted to `inputs` where there are some; none for one bit.
    pub(crate) fn of(cpu: &Cpu, w: &Matrix<'_>, n_planes: &[usize], inputs: Option<&Inputs>) -> Vec<Self> {
        let (n_rows, n_cols) = (w.n_rows, w.n_cols);
        let n_words = n_cols.div_ceil(32);
        let mut planes: Vec<Self> =
            n_planes.iter().map(|n| Self { words: vec![0; (n - 1) * n_rows * n_words] }).collect();
        let n_together = N_ROWS_OF_THREAD * n_cols;
        let buffer = || vec![0.0; N_ROWS.min(n_rows) * n_cols];
        let (mut rows, mut values) = (buffer(), buffer());
        let (mut p, mut q) = if inputs.is_some() { (buffer(), buffer()) } else { Default::default() };
        let mut along = Vec::new();
        for row0 in (0..n_rows).step_by(N_ROWS) {
            let n_rows_here = N_ROWS.min(n_rows - row0);
            let n = n_rows_here * n_cols;
            let rows = &mut rows[..n];
            cpu.for_each(rows.chunks_exact_mut(n_cols).enumerate(), |(idx, row)| {
                cpu.row(w, row0 + idx, row).expect("a row of the matrix");
            });
            let rows = &*rows;
            if let Some(inputs) = inputs {
                inputs.times(cpu, rows, &mut along, &mut p[..n]);
            }
            for (planes, &n_planes) in planes.iter_mut().zip(n_planes).filter(|(_, n)| **n > 1) {
                let max = (1 << n_planes) - 1;
                let values = &mut values[..n];
                cpu.for_each(rows.chunks(n_together).zip(values.chunks_mut(n_together)), |(rows, values)| {
                    let rows = rows.chunks_exact(n_cols).zip(values.chunks_exact_mut(n_cols));
                    rows.for_each(|(row, values)| nearest(row, n_planes, values));
                });
                if let Some(inputs) = inputs {
                    inputs.times(cpu, values, &mut along, &mut q[..n]);
                    let sweeps = Sweeps { max: max as f32, n_sweeps: N_SWEEPS };
                    let moved = cpu.descend(&inputs.moments, sweeps, rows, values, &p[..n], &mut q[..n]);
                    moved.expect("shapes of the rows");
                }
                for (plane, words) in planes.words.chunks_exact_mut(n_rows * n_words).enumerate() {
                    let words = &mut words[row0 * n_words..][..n_rows_here * n_words];
                    let digit = n_planes - 2 - plane;
                    let words = words.chunks_mut(N_ROWS_OF_THREAD * n_words);
                    cpu.for_each(words.zip(values.chunks(n_together)), |(words, values)| {
                        let rows = words.chunks_exact_mut(n_words).zip(values.chunks_exact(n_cols));
                        rows.for_each(|(words, values)| pack(values, max, digit, words));
                    });
                }
            }
        }
        planes
    }

    /// Signs and these.
    pub(crate) fn with<'a>(&'a self, signs: SignMatrix<'a>) -> BitPlanes<'a> {
        BitPlanes { signs, low: &self.words }
    }
}

/// The nearest numbers of `n_planes` bits in steps of the row.
fn nearest(row: &[f32], n_planes: usize, values: &mut [f32]) {
    let step = STEPS[n_planes - 1] * root_mean_square(row);
    let max = (1 << (n_planes - 1)) - 1;
    for (value, w) in values.iter_mut().zip(row) {
        // From a row of zeros the step is 0, and 0 / 0 becomes 0.
        let magnitude = (2 * ((w.abs() / step) as u32).min(max) + 1) as f32;
        *value = if *w < 0.0 { -magnitude } else { magnitude };
    }
}

/// The bits of one plane of a row: binary digit `digit` of a number's place among the odd ones from `-max` on, of which 0
/// is a bit of 1, as a plane's bit is 1 for -1.
fn pack(values: &[f32], max: i32, digit: usize, words: &mut [u32]) {
    for (word, values) in words.iter_mut().zip(values.chunks(32)) {
        *word = values.iter().enumerate().fold(0, |word, (bit, &value)| {
            let place = (value as i32 + max) as u32 / 2;
            word | (!place >> digit & 1) << bit
        });
    }
}

fn root_mean_square(row: &[f32]) -> f32 {
    (row.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>() / row.len() as f64).sqrt() as f32
}

/// `out = elements[start..]`.
pub(super) fn copy_row(elements: &Elements<'_>, start: usize, out: &mut [f32]) {
    let range = start..start + out.len();
    match elements {
        Elements::F32(v) => out.copy_from_slice(&v[range]),
        Elements::F16(v) => out.iter_mut().zip(&v[range]).for_each(|(out, &w)| *out = f16::to_f32(w)),
        Elements::Bf16(v) => out.iter_mut().zip(&v[range]).for_each(|(out, &w)| *out = bf16::to_f32(w)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::noise;
    use super::*;
    use kernels::reference;

    /// Standard deviation 1 by construction.
    const ROW: [f32; 8] = [0.1, -0.1, 1.2, -1.2, 0.0, -0.9, 1.9, -0.0];

    fn of(cpu: &Cpu, w: &Matrix<'_>, n_planes: usize, inputs: Option<&Inputs>) -> LowPlanes {
        LowPlanes::of(cpu, w, &[n_planes], inputs).remove(0)
    }

    fn values(n_planes: usize) -> Vec<i32> {
        let rms = root_mean_square(&ROW);
        let row = ROW.map(|w| w / rms);
        let mut words = [0];
        reference::sign_pack(&row, &mut words);
        let w = Matrix { data: Elements::F32(&row), n_rows: 1, n_cols: 8 };
        let planes = of(&Cpu::new(1), &w, n_planes, None);
        let planes = planes.with(SignMatrix { words: &words, n_rows: 1, n_words: 1 });
        assert_eq!(planes.n_planes(), n_planes);
        let one = |col: usize| std::array::from_fn::<i8, 8, _>(|c| i8::from(c == col));
        (0..8).map(|col| reference::score(&planes, 0, &one(col))).collect()
    }

    #[test]
    fn elements_become_the_nearest_odd_numbers() {
        assert_eq!(values(1), [1, -1, 1, -1, 1, -1, 1, 1]);
        // rms is 0.9646...: 0.9 is 0.93 of it, 1.2 is 1.24, 1.9 is 1.97.
        assert_eq!(values(2), [1, -1, 3, -3, 1, -1, 3, 1]);
        assert_eq!(values(3), [1, -1, 5, -5, 1, -3, 7, 1]);
    }

    #[test]
    fn a_row_of_zeros_has_values_all_the_same() {
        let w = Matrix { data: Elements::F16(&[f16::ZERO; 40]), n_rows: 1, n_cols: 40 };
        let planes = of(&Cpu::new(1), &w, 2, None);
        assert_eq!(planes.words, [u32::MAX, 0xFF], "1 = 2 - 1, and nothing past the last column");
    }

    /// Inputs with a mean, most of whose energy lies in a few directions, as that of a model's does.
    fn inputs(n_tokens: usize, n_cols: usize, seed: u32) -> Vec<f32> {
        const N_DIRECTIONS: usize = 6;
        let directions = noise(N_DIRECTIONS * n_cols, 1);
        let (along, rest) = (noise(n_tokens * N_DIRECTIONS, seed), noise(n_tokens * n_cols, seed + 1));
        let x = |(idx, rest): (usize, &f32)| {
            let (token, col) = (idx / n_cols, idx % n_cols);
            let along = &along[token * N_DIRECTIONS..][..N_DIRECTIONS];
            let sum: f32 = along.iter().enumerate().map(|(k, a)| a * directions[k * n_cols + col]).sum();
            2.0 + sum + 0.3 * rest
        };
        rest.iter().enumerate().map(x).collect()
    }

    /// Share of the gates' variance that is left around the lines through the scores of all planes, mean over rows.
    fn unforetold(w: &Matrix<'_>, low: &LowPlanes, x: &[f32]) -> f64 {
        let (cpu, f, d) = (Cpu::new(1), w.n_rows, w.n_cols);
        let n_tokens = x.len() / d;
        let mut row = vec![0.0; d];
        let mut signs = vec![0; f * d.div_ceil(32)];
        for (row_idx, words) in signs.chunks_exact_mut(d.div_ceil(32)).enumerate() {
            copy_row(&w.data, row_idx * d, &mut row);
            reference::sign_pack(&row, words);
        }
        let planes = low.with(SignMatrix { words: &signs, n_rows: f, n_words: d.div_ceil(32) });
        let one = |col: usize| (0..d).map(|c| i8::from(c == col)).collect::<Vec<_>>();
        let columns: Vec<Vec<i8>> = (0..d).map(one).collect();
        let values: Vec<f32> =
            (0..f * d).map(|idx| reference::score(&planes, idx / d, &columns[idx % d]) as f32).collect();
        let values = Matrix { data: Elements::F32(&values), n_rows: f, n_cols: d };
        let (mut gates, mut scores) = (vec![0.0; n_tokens * f], vec![0.0; n_tokens * f]);
        cpu.matmul(w, n_tokens, x, &mut gates, false).expect("shapes");
        cpu.matmul(&values, n_tokens, x, &mut scores, false).expect("shapes");
        let of_row = |values: &[f32], row: usize| -> Vec<f64> {
            let values: Vec<f64> = values.iter().skip(row).step_by(f).map(|&v| f64::from(v)).collect();
            let mean = values.iter().sum::<f64>() / n_tokens as f64;
            values.iter().map(|v| v - mean).collect()
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let left = (0..f).map(|row| {
            let (g, s) = (of_row(&gates, row), of_row(&scores, row));
            1.0 - dot(&g, &s).powi(2) / (dot(&g, &g) * dot(&s, &s))
        });
        left.sum::<f64>() / f as f64
    }

    #[test]
    fn errors_of_elements_make_up_for_each_other_on_inputs_that_were_not_seen() {
        // More rows than are moved at a time, and a number of columns that leaves words half full.
        let (f, d) = (N_ROWS + 40, 72);
        let w: Vec<f32> = noise(f * d, 2).iter().zip(noise(f * d, 3)).map(|(a, b)| a + b).collect();
        let w = Matrix { data: Elements::F32(&w), n_rows: f, n_cols: d };
        let cpu = Cpu::new(2);
        let seen = Inputs::new(&cpu, inputs(100, d, 10), d).expect("inputs differ");
        let new = inputs(300, d, 20);
        for (n_planes, share) in [(2, 0.5), (3, 0.5)] {
            let nearest = unforetold(&w, &of(&cpu, &w, n_planes, None), &new);
            let fitted = of(&cpu, &w, n_planes, Some(&seen));
            let left = unforetold(&w, &fitted, &new);
            assert!(left < share * nearest, "{n_planes} planes: {left} and {nearest}");
            let by_one = of(&Cpu::new(1), &w, n_planes, Some(&seen));
            assert!(fitted.words == by_one.words, "the number of threads changes the planes");
        }
    }

    #[test]
    fn inputs_that_say_nothing_leave_the_nearest_numbers() {
        let cpu = Cpu::new(1);
        assert!(Inputs::new(&cpu, [1.0, -2.0, 3.0].repeat(5), 3).is_none(), "all the same");
        assert!(Inputs::new(&cpu, vec![0.0, 1.0, f32::NAN, 2.0], 2).is_none(), "not finite");
        assert!(Inputs::new(&cpu, Vec::new(), 4).is_none(), "no token");
        // A row of zeros has no scale to fit.
        let w = Matrix { data: Elements::F32(&[0.0; 72]), n_rows: 1, n_cols: 72 };
        let seen = Inputs::new(&cpu, inputs(50, 72, 30), 72).expect("inputs differ");
        let fitted = of(&cpu, &w, 2, Some(&seen));
        assert_eq!(fitted.words, of(&cpu, &w, 2, None).words);
    }
}
