//! What the tests of all backends share: seeded values, owned weights, the scale of rounding.

#![allow(dead_code, reason = "each test binary uses its part")]

use half::{bf16, f16};
use kernels::{BitPlanes, Elements, Limits, Matrix, Rows, SignMatrix, reference};

/// Error of a float as a share of the sum of the magnitudes of its terms: the reference adds in f64, a backend in f32
/// chains of at most a few thousand terms, each of which rounds by 2^-24 of a partial sum that is no larger than that.
pub(crate) const TOLERANCE: f64 = 4e-6;

/// Seeded values; every fifth is special.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) % n
    }

    pub(crate) fn value(&mut self) -> f32 {
        match self.below(20) {
            0 => 0.0,
            1 => -0.0,
            2 => 3.0,
            3 => -1e-7,
            _ => self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0,
        }
    }

    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// Owned weights of one of the three types.
#[derive(Debug)]
pub(crate) enum Weights {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Weights {
    pub(crate) fn new(kind: usize, values: &[f32]) -> Self {
        match kind {
            0 => Self::F32(values.to_vec()),
            1 => Self::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            _ => Self::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
        }
    }

    pub(crate) fn elements(&self) -> Elements<'_> {
        match self {
            Self::F32(v) => Elements::F32(v),
            Self::F16(v) => Elements::F16(v),
            Self::Bf16(v) => Elements::Bf16(v),
        }
    }

    pub(crate) fn matrix(&self, n_rows: usize, n_cols: usize) -> Matrix<'_> {
        Matrix::new(self.elements(), n_rows, n_cols).unwrap()
    }
}

/// `sum |w x|` of a row, the scale of its rounding.
pub(crate) fn magnitude(w: &Matrix<'_>, row: usize, x: &[f32]) -> f64 {
    (0..w.n_cols).map(|c| f64::from(w.data.get(row * w.n_cols + c) * x[c]).abs()).sum()
}

/// Sign words of the rows of `w`.
pub(crate) fn sign_words(w: &Matrix<'_>) -> Vec<u32> {
    let n_words = w.n_cols.div_ceil(32);
    let mut words = vec![0; w.n_rows * n_words];
    for row in 0..w.n_rows {
        let values: Vec<f32> = (0..w.n_cols).map(|c| w.data.get(row * w.n_cols + c)).collect();
        reference::sign_pack(&values, &mut words[row * n_words..][..n_words]);
    }
    words
}

/// Every way to choose rows: all, the active ones, those below one limit or a limit each, and a limit that skips none.
pub(crate) fn rows_of<'a>(
    select: usize,
    signs: SignMatrix<'a>,
    per_row: &'a [u32],
    n_cols: usize,
) -> Rows<'a> {
    match select {
        0 => Rows::All,
        1 => Rows::Active,
        2 => Rows::Predicted { signs, limits: Limits::Layer(n_cols as u32 / 2) },
        3 => Rows::Predicted { signs, limits: Limits::PerRow(per_row) },
        _ => Rows::Predicted { signs, limits: Limits::Layer(n_cols as u32) },
    }
}

/// `n_planes` planes of `n_rows` rows of random words, zero past the last column.
pub(crate) fn random_planes(random: &mut Random, n_planes: usize, n_rows: usize, n_cols: usize) -> Vec<u32> {
    let n_words = n_cols.div_ceil(32);
    let tail = u32::MAX >> (n_words * 32 - n_cols);
    (0..n_planes * n_rows * n_words)
        .map(|idx| {
            let word = (random.below(1 << 16) << 16 | random.below(1 << 16)) as u32;
            if (idx + 1).is_multiple_of(n_words) { word & tail } else { word }
        })
        .collect()
}

/// Random words of `n_planes - 1` planes below the signs, zero past the last column.
pub(crate) fn low_planes(random: &mut Random, n_planes: usize, n_rows: usize, n_cols: usize) -> Vec<u32> {
    random_planes(random, n_planes - 1, n_rows, n_cols)
}

/// Integers from -127 to 127, 127 the first: what an input in 8 bits has, whatever it was multiplied by before.
pub(crate) fn integers(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|i| if i == 0 { 127.0 } else { random.below(255) as f32 - 127.0 }).collect()
}

/// `(n_rows,)` thresholds for `x`, `margin` units of the score, and `relative` of it, to either side of what each row
/// has. An input of integers keeps to its side at half a unit, one that a device normalises at some more.
pub(crate) fn thresholds_beside(
    planes: &BitPlanes<'_>,
    x: &[f32],
    [margin, relative]: [f64; 2],
    random: &mut Random,
) -> Vec<f32> {
    let mut q = vec![0; x.len()];
    let scale = reference::quantise(x, &mut q);
    (0..planes.signs.n_rows)
        .map(|row| {
            let score = f64::from(reference::score(planes, row, &q));
            let side = if random.below(2) == 0 { 1.0 } else { -1.0 };
            let threshold = (score + side * (margin + relative * score.abs())) / f64::from(scale);
            if threshold.is_finite() { threshold as f32 } else { 1.0 }
        })
        .collect()
}

/// The first few places where `got` is not `want`, for a test that looks at all its cases before it fails.
pub(crate) fn differences<T: PartialEq + std::fmt::Debug>(
    case: &str,
    got: &[T],
    want: &[T],
) -> Option<String> {
    if got.len() != want.len() {
        return Some(format!("{case}: {} found, {} expected", got.len(), want.len()));
    }
    let differing: Vec<usize> = (0..got.len()).filter(|&i| got[i] != want[i]).collect();
    let places = differing.iter().take(4).map(|&i| format!("[{i}] is {:?}, not {:?}", got[i], want[i]));
    (!differing.is_empty()).then(|| {
        format!(
            "{case}: {} of {} differ: {}",
            differing.len(),
            want.len(),
            places.collect::<Vec<_>>().join(", ")
        )
    })
}
