//! W_gate in a few bits.
//!
//! An element w of a row becomes the odd number v of P bits nearest to it in steps of the row:
//!
//! ```text
//! s = step(P) * sqrt(mean of the row's squares)         v = sign(w) * (2 min(floor(|w| / s), 2^(P - 1) - 1) + 1)
//! ```
//!
//! so that w is about v * s / 2. The steps are those of the uniform quantiser of a normal variable with the least
//! error (Max, "Quantizing for minimum distortion", 1960). Equal steps, that is 1 : 3 for two bits, keep the score
//! a sum of integers, and are within 2 % of the best unequal levels.

use half::{bf16, f16};
use kernels::{BitPlanes, Elements, Matrix, SignMatrix};

/// Steps of 1, 2 and 3 bits in standard deviations; a single bit has none.
const STEPS: [f32; 3] = [f32::INFINITY, 0.9957, 0.586];

/// Planes of a matrix below its signs, `(n_planes - 1, n_rows, n_words)`.
#[derive(Clone, Debug, Default)]
pub(crate) struct LowPlanes {
    pub(crate) words: Vec<u32>,
}

impl LowPlanes {
    /// The planes of `w` in `n_planes` bits; none for one.
    pub(crate) fn of(w: &Matrix<'_>, n_planes: usize) -> Self {
        let n_words = w.n_cols.div_ceil(32);
        let mut words = vec![0; (n_planes - 1) * w.n_rows * n_words];
        if n_planes == 1 {
            return Self { words };
        }
        let mut row = vec![0.0; w.n_cols];
        for row_idx in 0..w.n_rows {
            copy_row(&w.data, row_idx * w.n_cols, &mut row);
            let step = STEPS[n_planes - 1] * root_mean_square(&row);
            for (col, &w_col) in row.iter().enumerate() {
                // From 0 to 2^P - 1: its binary digits are the planes, 0 for -1; a plane's bit is 1 for -1.
                let magnitude = ((w_col.abs() / step) as u32).min((1 << (n_planes - 1)) - 1);
                let digits = if w_col < 0.0 {
                    (1 << (n_planes - 1)) - 1 - magnitude
                } else {
                    (1 << (n_planes - 1)) + magnitude
                };
                for plane in 1..n_planes {
                    let bit = !digits >> (n_planes - 1 - plane) & 1;
                    words[((plane - 1) * w.n_rows + row_idx) * n_words + col / 32] |= bit << (col % 32);
                }
            }
        }
        Self { words }
    }

    /// Signs and these.
    pub(crate) fn with<'a>(&'a self, signs: SignMatrix<'a>) -> BitPlanes<'a> {
        BitPlanes { signs, low: &self.words }
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
    use super::*;
    use kernels::reference;

    /// Standard deviation 1 by construction.
    const ROW: [f32; 8] = [0.1, -0.1, 1.2, -1.2, 0.0, -0.9, 1.9, -0.0];

    fn values(n_planes: usize) -> Vec<i32> {
        let rms = root_mean_square(&ROW);
        let row = ROW.map(|w| w / rms);
        let mut words = [0];
        reference::sign_pack(&row, &mut words);
        let w = Matrix { data: Elements::F32(&row), n_rows: 1, n_cols: 8 };
        let planes = LowPlanes::of(&w, n_planes);
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
        let planes = LowPlanes::of(&w, 2);
        assert_eq!(planes.words, [u32::MAX, 0xFF], "1 = 2 - 1, and nothing past the last column");
    }
}
