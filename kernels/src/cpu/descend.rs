//! Rows in a few bits, moved element by element to where the error of their product with given inputs is the least.
//!
//! ```text
//! for each sweep:    a = v.p / v.q; a row whose a is not above zero stays
//!     for each column c:    v'_c = the odd number nearest to v_c + (p_c / a - q_c) / H_cc, of the sign of w_c
//!                           q += (v'_c - v_c) H[c]
//! ```
//!
//! A row of H is as long as q, and only q_c is needed before column c is moved. So steps are added to their own tile of
//! columns at once, to the other tiles of their span when their tile is done, and to those of other spans when their span
//! is done: a tile of q stays in registers while all of them are added, and rows of H come from a cache.
//!
//! Computes   v and q after at most `n_sweeps` sweeps, or those up to the first that moves nothing
//! Reference  reference::descend; equal bit for bit: an element of q takes the same steps in the same order
//! Shapes     moments (n_cols, n_cols); w, v, p, q (n_rows, n_cols), all f32 row-major
//! Needs      lengths as the shapes say; checked in `Cpu`
//! Lanes      columns; a product is rounded before it is added, as scalars are
//! Tail       moments have zeros after the last column; an overhanging tile of q is made on the stack and copied
//! Chunks     ROWS rows, which share the rows of H that they bring into a cache
//! Measured   one core of a Xeon (Sapphire Rapids), AVX-512, 1024 rows of 4096 columns in 2 bits, of which 0.13 move: 0.11
//!            us for an element where reference::descend takes 0.31; a third of it waits for rows of H
//! Tried      chunks of 64 rows 7 % slower, as rows of H come from beyond L2 for each chunk anew; of 256 8 % faster, but
//!            too few for many threads. Without spans, as fast with little to move and slower with much

use std::cmp::Ordering;

use super::Isa;
use super::decode::dispatch;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{LINE_BYTES, Lanes, Portable};
use super::pool::{Pool, Shared};
use super::{Cpu, ShapeError, check};

/// Columns of a tile: four vectors of AVX-512, whose additions follow each other as fast as they can.
const TILE: usize = 64;
/// Columns that are looked at together.
const LOOK: usize = 16;
/// Columns of a span, whose rows of H in a tile stay in L2 for all rows of a chunk.
const SPAN: usize = 8 * TILE;
/// Rows in a chunk, which share each row of H that comes from beyond L2.
const ROWS: usize = 128;

macro_rules! entries {
    ($isa:ident, $lanes:ty $(, $feature:literal)?) => {
        mod $isa {
            use super::*;
            /// # Safety
            /// The processor has the instruction set.
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn descend(moments: &Moments, sweeps: Sweeps, rows: Chunk<'_>) {
                // SAFETY: the caller's promise.
                unsafe { super::descend_chunk::<$lanes>(moments, sweeps, rows) }
            }
        }
    };
}
entries!(portable, Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entries!(avx512, Avx512, "avx512f,avx512bw,avx512vl,avx2,fma,f16c");

/// Second moments of the columns of inputs, in the order in which [`Cpu::descend`] reads them.
#[derive(Clone, Debug)]
pub struct Moments {
    n_cols: usize,
    /// For each tile of columns, `n_cols` rows; zeros after the last column.
    tiles: Vec<TileRow>,
    /// Ones after the last column, so that nothing moves there.
    diagonal: Vec<f32>,
}

/// A row of a tile, in whole cache lines.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct TileRow([f32; TILE]);

impl Moments {
    /// From `moments (n_cols, n_cols)`.
    ///
    /// # Errors
    /// Another length.
    pub fn new(cpu: &Cpu, n_cols: usize, moments: &[f32]) -> Result<Self, ShapeError> {
        check("moments", n_cols * n_cols, moments.len())?;
        let n_tiles = n_cols.div_ceil(TILE);
        let mut tiles = vec![TileRow([0.0; TILE]); n_tiles * n_cols];
        cpu.for_each(tiles.chunks_exact_mut(n_cols.max(1)).enumerate(), |(tile, rows)| {
            let col0 = tile * TILE;
            let n = TILE.min(n_cols - col0);
            for (row, TileRow(out)) in rows.iter_mut().enumerate() {
                out[..n].copy_from_slice(&moments[row * n_cols + col0..][..n]);
            }
        });
        let mut diagonal = vec![1.0; n_tiles * TILE];
        (0..n_cols).for_each(|col| diagonal[col] = moments[col * n_cols + col]);
        Ok(Self { n_cols, tiles, diagonal })
    }

    /// Rows and columns.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// The `n` rows from `row0` on in the columns of `tile`.
    #[inline(always)]
    fn rows_of_tile(&self, tile: usize, row0: usize, n: usize) -> &[TileRow] {
        &self.tiles[tile * self.n_cols + row0..][..n]
    }
}

/// How far elements move, and how often they are looked at.
#[derive(Clone, Copy, Debug)]
pub struct Sweeps {
    /// The largest magnitude: odd.
    pub max: f32,
    /// Times that every element is looked at, at most.
    pub n_sweeps: usize,
}

/// Rows and what goes with them, each `(n_rows, n_cols)`.
pub(super) struct Chunk<'a> {
    pub(super) w: &'a [f32],
    pub(super) v: &'a mut [f32],
    pub(super) p: &'a [f32],
    pub(super) q: &'a mut [f32],
}

/// Moves `v`; shapes fit.
pub(super) fn descend(isa: Isa, pool: &Pool, moments: &Moments, sweeps: Sweeps, rows: Chunk<'_>) {
    let n_chunk = (ROWS * moments.n_cols).max(1);
    let Chunk { w, v, p, q } = rows;
    let len = w.len();
    assert!(v.len() == len && p.len() == len && q.len() == len);
    let (v, q) = (Shared::new(v), Shared::new(q));
    pool.run(len.div_ceil(n_chunk), &|chunk| {
        let start = chunk * n_chunk;
        let n = n_chunk.min(len - start);
        // SAFETY: each chunk has its own rows.
        let (v, q) = unsafe { (v.slice(start, n), q.slice(start, n)) };
        let rows = Chunk { w: &w[start..][..n], v, p: &p[start..][..n], q };
        dispatch!(isa, descend, moments, sweeps, rows);
    });
}

/// The steps of a row's elements in one span of columns.
#[derive(Clone, Copy)]
struct Steps {
    n: usize,
    /// Columns, from the start of the span.
    cols: [u16; SPAN],
    steps: [f32; SPAN],
}

impl Steps {
    const NONE: Self = Self { n: 0, cols: [0; SPAN], steps: [0.0; SPAN] };

    #[inline(always)]
    fn push(&mut self, col: usize, step: f32) {
        (self.cols[self.n], self.steps[self.n]) = (col as u16, step);
        self.n += 1;
    }

    /// Those after the first `n`.
    #[inline(always)]
    fn after(&self, n: usize) -> (&[u16], &[f32]) {
        (&self.cols[n..self.n], &self.steps[n..self.n])
    }
}

/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn descend_chunk<L: Lanes>(moments: &Moments, sweeps: Sweeps, rows: Chunk<'_>) {
    let n_cols = moments.n_cols;
    let n_tiles = n_cols.div_ceil(TILE);
    let Chunk { w, v, p, q } = rows;
    let n_rows = w.len() / n_cols;
    let mut steps = vec![Steps::NONE; n_rows];
    // Rows that nothing moves any more.
    let mut is_done = vec![false; n_rows];
    let mut scales = vec![0.0; n_rows];
    for _ in 0..sweeps.n_sweeps {
        for row in 0..n_rows {
            let columns = row * n_cols..(row + 1) * n_cols;
            scales[row] = match is_done[row] {
                true => 0.0,
                false => scale(&v[columns.clone()], &p[columns.clone()], &q[columns]),
            };
        }
        is_done.fill(true);
        for first_tile in (0..n_tiles).step_by(SPAN / TILE) {
            let tiles = first_tile..n_tiles.min(first_tile + SPAN / TILE);
            let span0 = first_tile * TILE;
            let n_span = SPAN.min(n_cols - span0);
            // Columns that moved in some row.
            let mut moved = [false; SPAN];
            steps.iter_mut().for_each(|steps| steps.n = 0);
            for tile in tiles.clone() {
                let col0 = tile * TILE;
                let n = TILE.min(n_cols - col0);
                let own = &moments.rows_of_tile(tile, span0, n_span)[col0 - span0..][..n];
                let diagonal = moments.diagonal[col0..].first_chunk().expect("whole tiles");
                for row in 0..n_rows {
                    // Not above zero, or no number.
                    if !matches!(scales[row].partial_cmp(&0.0), Some(Ordering::Greater)) {
                        continue;
                    }
                    let steps = &mut steps[row];
                    let n_before = steps.n;
                    let columns = row * n_cols + col0..row * n_cols + col0 + n;
                    let looked_at = Look {
                        w: &w[columns.clone()],
                        v: &mut v[columns.clone()],
                        p: &p[columns.clone()],
                        q: &mut q[columns],
                    };
                    let put = |col, step| steps.push(col0 - span0 + col, step);
                    // SAFETY: the caller's promise.
                    unsafe { look::<L>(looked_at, own, diagonal, scales[row], sweeps.max, put) };
                    let (cols, found) = steps.after(n_before);
                    if cols.is_empty() {
                        continue;
                    }
                    is_done[row] = false;
                    cols.iter().for_each(|&col| moved[usize::from(col)] = true);
                    let q = &mut q[row * n_cols..][..n_cols];
                    for other in tiles.clone().filter(|&other| other != tile) {
                        let rows = moments.rows_of_tile(other, span0, n_span);
                        // SAFETY: the caller's promise.
                        unsafe { add_to_tile::<L>(cols, found, rows, other, q) };
                    }
                }
            }
            if !moved.contains(&true) {
                continue;
            }
            for other in (0..n_tiles).filter(|other| !tiles.contains(other)) {
                let rows = moments.rows_of_tile(other, span0, n_span);
                // Rows of H come in no order that a processor foresees.
                let next = moments.rows_of_tile((other + 1) % n_tiles, span0, n_span);
                for (TileRow(next), _) in next.iter().zip(moved).filter(|(_, moved)| *moved) {
                    for line in next.chunks_exact(LINE_BYTES / size_of::<f32>()) {
                        L::prefetch(line.as_ptr().cast());
                    }
                }
                for (steps, q) in
                    steps.iter().zip(q.chunks_exact_mut(n_cols)).filter(|(steps, _)| steps.n > 0)
                {
                    let (cols, found) = steps.after(0);
                    // SAFETY: the caller's promise.
                    unsafe { add_to_tile::<L>(cols, found, rows, other, q) };
                }
            }
        }
        if is_done.iter().all(|done| *done) {
            break;
        }
    }
}

/// `v.p / v.q`.
#[inline(always)]
fn scale(v: &[f32], p: &[f32], q: &[f32]) -> f32 {
    // Both sums in one loop, as each of them waits for its own additions alone.
    let (mut vp, mut vq) = (0.0_f64, 0.0_f64);
    for ((&v, &p), &q) in v.iter().zip(p).zip(q) {
        vp += f64::from(v) * f64::from(p);
        vq += f64::from(v) * f64::from(q);
    }
    (vp / vq) as f32
}

/// Up to TILE columns of a row.
struct Look<'a> {
    w: &'a [f32],
    v: &'a mut [f32],
    p: &'a [f32],
    q: &'a mut [f32],
}

/// Moves the columns of a tile, whose rows of H in their own columns are `own`; `put` gets the columns that moved and
/// their steps.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn look<L: Lanes>(
    row: Look<'_>,
    own: &[TileRow],
    diagonal: &[f32; TILE],
    scale: f32,
    max: f32,
    mut put: impl FnMut(usize, f32),
) {
    let n = own.len();
    // Zeros and ones after the last column stay where they are.
    let (mut v, mut sign, mut target, mut q) = ([1.0; TILE], [1.0; TILE], [0.0; TILE], [0.0; TILE]);
    v[..n].copy_from_slice(row.v);
    q[..n].copy_from_slice(row.q);
    for ((sign, target), (&w, &p)) in sign.iter_mut().zip(&mut target).zip(row.w.iter().zip(row.p)) {
        *sign = if w < 0.0 { -1.0 } else { 1.0 };
        *target = p / scale;
    }
    let mut is_moved = false;
    for first in (0..TILE).step_by(LOOK) {
        let mut next = 0;
        loop {
            // All of them, as if the ones before stayed.
            let mut found = [0.0_f32; LOOK];
            for (i, found) in found.iter_mut().enumerate() {
                let c = first + i;
                let best = sign[c] * (v[c] + (target[c] - q[c]) / diagonal[c]);
                let odd = sign[c] * (2.0 * (0.5 * best).floor() + 1.0).clamp(1.0, max);
                *found = odd - v[c];
            }
            let Some(i) = (next..LOOK).find(|&i| found[i] != 0.0) else { break };
            let (c, step) = (first + i, found[i]);
            // As the sum is exact, this is the odd number itself.
            v[c] += step;
            put(c, step);
            is_moved = true;
            // SAFETY: the caller's promise.
            unsafe { add::<L>(&[c as u16], &[step], own, &mut q) };
            next = i + 1;
        }
    }
    if is_moved {
        row.v.copy_from_slice(&v[..n]);
        row.q.copy_from_slice(&q[..n]);
    }
}

/// As [`add`], to columns `tile` of `q (n_cols,)`.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn add_to_tile<L: Lanes>(cols: &[u16], steps: &[f32], rows: &[TileRow], tile: usize, q: &mut [f32]) {
    let q = &mut q[tile * TILE..];
    if let Some(q) = q.first_chunk_mut() {
        // SAFETY: the caller's promise.
        return unsafe { add::<L>(cols, steps, rows, q) };
    }
    let mut edge = [0.0; TILE];
    edge[..q.len()].copy_from_slice(q);
    // SAFETY: the caller's promise.
    unsafe { add::<L>(cols, steps, rows, &mut edge) };
    q.copy_from_slice(&edge[..q.len()]);
}

/// `q += step * rows[col]` for each of `steps` and its column, in order.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn add<L: Lanes>(cols: &[u16], steps: &[f32], rows: &[TileRow], q: &mut [f32; TILE]) {
    // SAFETY: the caller's promise; the vectors are as many as a tile has.
    unsafe {
        match L::N {
            16 => add_vectors::<L, { TILE / 16 }>(cols, steps, rows, q),
            8 => add_vectors::<L, { TILE / 8 }>(cols, steps, rows, q),
            _ => add_vectors::<L, { TILE / 4 }>(cols, steps, rows, q),
        }
    }
}

/// # Safety
/// That of [`add`], and `V` vectors of `L` are a tile.
#[inline(always)]
unsafe fn add_vectors<L: Lanes, const V: usize>(
    cols: &[u16],
    steps: &[f32],
    rows: &[TileRow],
    q: &mut [f32; TILE],
) {
    // SAFETY: every vector lies in a tile.
    unsafe {
        let mut sums = [L::splat(0.0); V];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = L::load(q.as_ptr().add(i * L::N));
        }
        // An index, as a call that makes an iterator would put the sums into memory.
        for k in 0..steps.len() {
            let (step, row) = (L::splat(steps[k]), rows[usize::from(cols[k])].0.as_ptr());
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = L::add(*sum, L::mul(step, L::load(row.add(i * L::N))));
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            L::store(q.as_mut_ptr().add(i * L::N), sum);
        }
    }
}
