//! Products of a predictor of low rank, whose sums have one order on all machines.
//!
//! Computes   y[r] = ordered_dot(w[r], x); with relu, 0 where that is below zero
//!            score[r] = y[r] + (s[r] * (1 / scale)) * scales[r], with a residual of scores s in 8 bits of x (scores.rs)
//! Reference  reference::{ordered_dot, low_rank_scores}; equal bit for bit, so that a score is on one side of a threshold everywhere
//! Shapes     w (n_rows, n_cols) row-major; x (n_cols,); y (n_rows,)
//! Lanes      DOT_CHAINS sums of each DOT_SEGMENT columns, column c in sum c mod DOT_CHAINS; products are rounded before they
//!            are added, as not every instruction set adds them in one step; then the segments' sums are added, then
//!            halves of those: sum j takes sum j + h, h = 16, 8, 4, 2, 1
//! Tail       one partial vector after another; the zeros in their place change no sum
//! Chunks     rows, each with all tokens of a batch, so that its weights stay in cache

use super::Isa;
use super::decode::{dispatch, with_elements};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Element, LANES_MAX, Lanes, Portable, load_partial};
use super::pool::{Pool, Shared};
use super::scores::{self, Quantised, Scores};
use super::signs::GROUP;
use crate::shape::{DOT_CHAINS, DOT_SEGMENT};
use crate::{BitPlanes, LowRank, Matrix, Residual};

/// Rows in a chunk.
const ROWS: usize = 16;
/// Rows that share one pass over x.
const ROWS_AT_ONCE: usize = 2;
/// Vectors that hold the sums, of the shortest kind.
const ACCS_MAX: usize = DOT_CHAINS / 4;
const _: () = assert!(DOT_CHAINS.is_multiple_of(LANES_MAX));

macro_rules! entries {
    ($isa:ident, $lanes:ty $(, $feature:literal)?) => {
        mod $isa {
            use super::*;
            /// # Safety
            /// That of [`super::rows_chunk`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn rows_chunk(task: &Product<'_>, chunk: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::rows_chunk::<$lanes>(task, chunk) }
            }
        }
    };
}
entries!(portable, Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2, Avx2, "avx2,fma,f16c,popcnt");
#[cfg(target_arch = "x86_64")]
entries!(avx512, Avx512, "avx512f,avx512bw,avx512vl,avx512vpopcntdq,avx2,fma,f16c,popcnt");

/// A product, as its chunks see it.
struct Product<'a> {
    w: Matrix<'a>,
    n_tokens: usize,
    x: &'a [f32],
    y: Shared<f32>,
    relu: bool,
}

/// `y = X W^T`; with `relu`, 0 where that is below zero. Shapes: `x (n_tokens, n_cols)`, `y (n_tokens, n_rows)`, which
/// fit.
pub(super) fn product(
    isa: Isa,
    pool: &Pool,
    w: &Matrix<'_>,
    n_tokens: usize,
    x: &[f32],
    y: &mut [f32],
    relu: bool,
) {
    assert!(x.len() >= n_tokens * w.n_cols && y.len() >= n_tokens * w.n_rows);
    let task = Product { w: *w, n_tokens, x, y: Shared::new(y), relu };
    pool.run(w.n_rows.div_ceil(ROWS), &|chunk| dispatch!(isa, rows_chunk, &task, chunk));
}

/// The rows of `chunk`.
///
/// # Safety
/// Shapes fit, nobody else writes these rows of `y`, the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn rows_chunk<L: Lanes>(task: &Product<'_>, chunk: usize) {
    let Product { w, n_tokens, .. } = *task;
    let row0 = chunk * ROWS;
    let n_rows = ROWS.min(w.n_rows - row0);
    for token in 0..n_tokens {
        // SAFETY: the rows lie in the matrix and in y, the token in both; the rest is the caller's promise.
        unsafe {
            let x = task.x.as_ptr().add(token * w.n_cols);
            let y = task.y.slice(token * w.n_rows + row0, n_rows);
            with_elements!(w.data, data => dots::<L, _>(data.add(row0 * w.n_cols), w.n_cols, x, y));
            if task.relu {
                y.iter_mut().filter(|y| **y < 0.0).for_each(|y| *y = 0.0);
            }
        }
    }
}

/// Scores of `n_rows <= GROUP` rows, the first of them row `row0`; `inner (rank,)` is the product with the first factor, `x`
/// the input for a residual.
///
/// # Safety
/// The rows lie in the second factor, which has as many columns as `inner` has elements, and in a residual, for whose
/// columns `x` was quantised; the processor has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn scores<L: Scores>(
    factors: &LowRank<'_>,
    row0: usize,
    n_rows: usize,
    inner: &[f32],
    x: &Quantised<'_>,
) -> [f32; GROUP] {
    let rank = factors.fc2.n_cols;
    let mut scores = [0.0; GROUP];
    // SAFETY: the caller's promise.
    unsafe {
        let scores = &mut scores[..n_rows];
        with_elements!(factors.fc2.data, w => dots::<L, _>(w.add(row0 * rank), rank, inner.as_ptr(), scores));
        if let Some(Residual { signs, scales }) = factors.residual {
            let sums = scores::scores::<L>(&BitPlanes { signs, low: &[] }, row0, n_rows, x);
            let unit = unit(x.scale);
            for ((score, sum), scale) in scores.iter_mut().zip(sums).zip(&scales[row0..]) {
                *score += residual_part(sum, unit, *scale);
            }
        }
    }
    scores
}

/// What one step of the quantised input is: 0 where it has no scale.
#[inline(always)]
pub(super) fn unit(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// What a residual adds to a score.
#[inline(always)]
pub(super) fn residual_part(sum: i32, unit: f32, scale: f32) -> f32 {
    sum as f32 * unit * scale
}

/// True if a row of this score is computed. A score that is no number keeps it.
#[inline(always)]
pub(super) fn is_kept(score: f32, threshold: f32) -> bool {
    score >= threshold || score.is_nan() || threshold.is_nan()
}

/// `y[r] = ordered_dot(w[r], x)` for rows that lie one after the other in memory.
///
/// # Safety
/// `w (y.len(), n_cols)` and `x (n_cols,)` are readable, the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn dots<L: Lanes, T: Element>(w: *const T, n_cols: usize, x: *const f32, y: &mut [f32]) {
    let mut row = 0;
    // SAFETY: rows lie below the length of y.
    unsafe {
        while row + ROWS_AT_ONCE <= y.len() {
            let rows: [*const T; ROWS_AT_ONCE] = std::array::from_fn(|r| w.wrapping_add((row + r) * n_cols));
            y[row..row + ROWS_AT_ONCE].copy_from_slice(&dot::<L, T, ROWS_AT_ONCE>(rows, n_cols, x));
            row += ROWS_AT_ONCE;
        }
        while row < y.len() {
            y[row] = dot::<L, T, 1>([w.add(row * n_cols)], n_cols, x)[0];
            row += 1;
        }
    }
}

/// Dots of `R` rows with `x`.
///
/// # Safety
/// `n_cols` elements are readable at each row and at `x`, the processor has the instruction set of `L`.
#[expect(clippy::needless_range_loop, reason = "the index names a register of each of several arrays")]
#[inline(always)]
unsafe fn dot<L: Lanes, T: Element, const R: usize>(
    rows: [*const T; R],
    n_cols: usize,
    x: *const f32,
) -> [f32; R] {
    // SAFETY: segments end at or before n_cols; vectors of sums lie in their array.
    unsafe {
        let mut sums = [[0.0_f32; DOT_CHAINS]; R];
        for begin in (0..n_cols).step_by(DOT_SEGMENT) {
            let of_segment = segment::<L, T, R>(
                rows.map(|row| row.add(begin)),
                DOT_SEGMENT.min(n_cols - begin),
                x.add(begin),
            );
            for r in 0..R {
                for a in 0..DOT_CHAINS / L::N {
                    let sum = sums[r].as_mut_ptr().add(a * L::N);
                    L::store(sum, L::add(L::load(sum), of_segment[r][a]));
                }
            }
        }
        sums.map(|mut sums| {
            let mut half = DOT_CHAINS / 2;
            while half > 0 {
                for j in 0..half {
                    sums[j] += sums[j + half];
                }
                half /= 2;
            }
            sums[0]
        })
    }
}

/// The sums of a segment of `R` rows, whose first columns `rows` and `x` are.
///
/// # Safety
/// As [`dot`].
#[expect(clippy::needless_range_loop, reason = "the index names a register of each of several arrays")]
#[inline(always)]
unsafe fn segment<L: Lanes, T: Element, const R: usize>(
    rows: [*const T; R],
    n_cols: usize,
    x: *const f32,
) -> [[L::V; ACCS_MAX]; R] {
    // SAFETY: full vectors end at or before n_cols, the partial one stops there.
    unsafe {
        let mut accs = [[L::splat(0.0); ACCS_MAX]; R];
        let mut col = 0;
        while col + DOT_CHAINS <= n_cols {
            for a in 0..DOT_CHAINS / L::N {
                let x = L::load(x.add(col + a * L::N));
                for r in 0..R {
                    let w = T::load::<L>(rows[r].add(col + a * L::N));
                    accs[r][a] = L::add(accs[r][a], L::mul(w, x));
                }
            }
            col += DOT_CHAINS;
        }
        for a in 0..DOT_CHAINS / L::N {
            if col < n_cols {
                let n = L::N.min(n_cols - col);
                let x = load_partial::<L, f32>(x.add(col), n);
                for r in 0..R {
                    let w = load_partial::<L, T>(rows[r].add(col), n);
                    accs[r][a] = L::add(accs[r][a], L::mul(w, x));
                }
                col += n;
            }
        }
        accs
    }
}
