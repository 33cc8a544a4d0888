//! Products of one decode step: each weight is used once, so the memory sets the pace.
//!
//! Computes   matvec: y[r] (+)= dot(w[r], x)
//!            mlp:    h[i] = skip(i) ? 0 : act(dot(w_gate[i], x)) * dot(w_up[i], x);  y += sum_i h[i] * w_down_t[i]
//!            audit:  sums of (h[i] |w_down_t[i]|)^2 over kept rows, and over skipped rows of a sample
//! Source     SparseInfer, arXiv 2411.12692, sections 3 and 4
//! Reference  reference::{matvec, gate_up, down, audit}; skip equal bit for bit, sums within their rounding
//! Shapes     x (n_cols,) f32; weights (n_rows, n_cols) f32, f16 or bf16 row-major; y as the caller says
//! Needs      lengths as the shapes say; checked in the methods of `Cpu`
//! Lanes      a dot has ACCS chains of fused multiply-adds over vectors, added as a tree, then the lanes; the same for
//!            every row, so a result does not depend on the rows that share its block or its chunk
//! Tail       vectors into the first chain, then one partial vector
//! Chunks     matvec and gate/up: rows; down: columns, each summed over its rows in ascending order. Chunk sizes may
//!            depend on the threads, results do not. Audit: rows of the sample, then kept rows, fixed sizes
//! Bytes      bytes::{matrix, mlp, audit}: an up or down row is read only if its activation is not zero

use super::Isa;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Element, LINE_BYTES, Lanes, Portable, load_partial, prefetch};
use super::low_rank;
use super::pool::{Pool, Shared};
use super::scores::{self, Quantised, Scores};
use super::signs::{self, Signs};
use crate::{Activation, BitPlanes, Matrix, Matvec, MlpAudit, MlpCounts, MlpWeights, Rows};

/// Independent chains of a dot.
const ACCS: usize = 4;
/// Weight bytes in a chunk of a matvec: long enough to hide the start of a stream, short enough to share fairly.
const CHUNK_BYTES: usize = 256 << 10;
/// Rows of a matvec chunk are a multiple of this.
const ROW_MULTIPLE: usize = 8;
/// Chunks of gate and up for each thread: so few that reading a chunk's first listed rows, which nothing asked for before,
/// matters little, so many that threads end together.
const MLP_CHUNKS: usize = 5;
/// Least and most neurons in a chunk.
const MLP_ROWS_MIN: usize = 128;
const MLP_ROWS_MAX: usize = 512;
/// Rows in a chunk of an audit.
const AUDIT_ROWS: usize = 32;
/// Rows out of a list that share one pass over x.
const LISTED_ROWS: usize = 4;
/// Columns of the widest slice of down.
const SLICE_MAX: usize = 1024;
/// Columns of the narrowest slice of down.
const SLICE_MIN: usize = 256;
/// Rows of down that share one pass over the slice.
const DOWN_ROWS: usize = 4;
/// Bytes in a chunk of a plain read.
const READ_BYTES: usize = 256 << 10;
/// How far ahead a plain read asks for lines.
const READ_AHEAD_BYTES: usize = 2048;
/// Jobs in one dispatch; more go into further ones.
const JOBS_MAX: usize = 8;

macro_rules! dispatch {
    ($isa:expr, $entry:ident, $($arg:expr),*) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Cpu` has an instruction set only if the processor has it; the rest is the entry's promise.
            Isa::Avx512 => unsafe { avx512::$entry($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2::$entry($($arg),*) },
            // SAFETY: as above; nothing is asked of the processor.
            _ => unsafe { portable::$entry($($arg),*) },
        }
    };
}

macro_rules! entries {
    ($isa:ident, $lanes:ty $(, $feature:literal)?) => {
        mod $isa {
            use super::*;
            /// # Safety
            /// That of [`super::matvec_chunk`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn matvec_chunk(task: &Task<'_>, x: &[f32], chunk: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::matvec_chunk::<$lanes>(task, x, chunk) }
            }
            /// # Safety
            /// That of [`super::gate_up_chunk`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn gate_up_chunk(args: &GateUp<'_>, chunk: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::gate_up_chunk::<$lanes>(args, chunk) }
            }
            /// # Safety
            /// That of [`super::down_slice`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn down_slice(args: &Down<'_>, slice: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::down_slice::<$lanes>(args, slice) }
            }
            /// # Safety
            /// That of [`super::audit_chunk`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn audit_chunk(args: &Audit<'_>, chunk: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::audit_chunk::<$lanes>(args, chunk) }
            }
            /// # Safety
            /// The processor has the instruction set.
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn read(bytes: &[u8]) -> f32 {
                // SAFETY: the caller's promise.
                unsafe { super::read::<$lanes>(bytes) }
            }
            /// # Safety
            /// That of [`signs::sign_pack`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn sign_pack(x: *const f32, n: usize, words: *mut u32) {
                // SAFETY: the caller's promise.
                unsafe { signs::sign_pack::<$lanes>(x, n, words) }
            }
            /// # Safety
            /// That of [`Signs::n_neg`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn n_neg(
                rows: *const u32,
                n_rows: usize,
                n_words: usize,
                x_words: *const u32,
                n_neg: *mut u32,
            ) {
                // SAFETY: the caller's promise.
                unsafe { <$lanes as Signs>::n_neg(rows, n_rows, n_words, x_words, n_neg) }
            }
            /// # Safety
            /// That of [`Scores::arrange`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn arrange(q: &mut [i8]) {
                // SAFETY: the caller's promise.
                unsafe { <$lanes as Scores>::arrange(q) }
            }
            /// # Safety
            /// That of [`scores::scores`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn scores(
                planes: &BitPlanes<'_>,
                row0: usize,
                n_rows: usize,
                x: &Quantised<'_>,
            ) -> [i32; signs::GROUP] {
                // SAFETY: the caller's promise.
                unsafe { scores::scores::<$lanes>(planes, row0, n_rows, x) }
            }
        }
    };
}
entries!(portable, Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2, Avx2, "avx2,fma,f16c,popcnt");
#[cfg(target_arch = "x86_64")]
entries!(avx512, Avx512, "avx512f,avx512bw,avx512vl,avx512vpopcntdq,avx2,fma,f16c,popcnt");

/// Calls `$body` with `$ptr` as the pointer of the weights' own type.
macro_rules! with_elements {
    ($elements:expr, $ptr:ident => $body:expr) => {
        match $elements {
            $crate::Elements::F32(v) => {
                let $ptr = v.as_ptr();
                $body
            }
            $crate::Elements::F16(v) => {
                let $ptr = v.as_ptr();
                $body
            }
            $crate::Elements::Bf16(v) => {
                let $ptr = v.as_ptr();
                $body
            }
        }
    };
}

pub(super) use {dispatch, with_elements};

/// One job of a matvec, as its chunks see it.
#[derive(Clone, Copy)]
struct Task<'a> {
    w: Matrix<'a>,
    y: Shared<f32>,
    accumulate: bool,
    chunk_rows: usize,
    n_chunks: usize,
}

/// `y (+)= W x` of all jobs; their shapes fit.
pub(super) fn matvec(isa: Isa, pool: &Pool, x: &[f32], jobs: &mut [Matvec<'_>]) {
    for jobs in jobs.chunks_mut(JOBS_MAX) {
        let mut tasks: [Option<Task<'_>>; JOBS_MAX] = [None; JOBS_MAX];
        let mut n_chunks = 0;
        for (task, job) in tasks.iter_mut().zip(jobs) {
            let row_bytes = (job.w.n_cols * job.w.data.element_bytes()).max(1);
            let chunk_rows = (CHUNK_BYTES / row_bytes).next_multiple_of(ROW_MULTIPLE).max(ROW_MULTIPLE);
            let task = task.insert(Task {
                w: job.w,
                y: Shared::new(job.y),
                accumulate: job.accumulate,
                chunk_rows,
                n_chunks: job.w.n_rows.div_ceil(chunk_rows),
            });
            n_chunks += task.n_chunks;
        }
        pool.run(n_chunks, &|chunk| {
            let mut chunk = chunk;
            for task in tasks.iter().flatten() {
                if chunk < task.n_chunks {
                    return dispatch!(isa, matvec_chunk, task, x, chunk);
                }
                chunk -= task.n_chunks;
            }
        });
    }
}

/// The rows of `chunk`.
///
/// # Safety
/// Shapes fit, nobody else writes these rows of `y`, the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn matvec_chunk<L: Lanes>(task: &Task<'_>, x: &[f32], chunk: usize) {
    let row0 = chunk * task.chunk_rows;
    let n_rows = task.chunk_rows.min(task.w.n_rows - row0);
    // SAFETY: the rows lie in the matrix and in y; the rest is the caller's promise.
    unsafe {
        let y = task.y.get().add(row0);
        let n_cols = task.w.n_cols;
        with_elements!(task.w.data, w => {
            let w = w.add(row0 * n_cols);
            if task.accumulate {
                dots::<L, _>(w, n_rows, n_cols, x.as_ptr(), |row, dot| *y.add(row) += dot);
            } else {
                dots::<L, _>(w, n_rows, n_cols, x.as_ptr(), |row, dot| *y.add(row) = dot);
            }
        });
    }
}

/// `put(row, dot(w[row], x))` for `n_rows` rows, one after the other in memory.
///
/// # Safety
/// `w (n_rows, n_cols)` and `x (n_cols,)` are readable, the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn dots<L: Lanes, T: Element>(
    w: *const T,
    n_rows: usize,
    n_cols: usize,
    x: *const f32,
    mut put: impl FnMut(usize, f32),
) {
    let mut row = 0;
    // SAFETY: rows lie below n_rows; prefetched addresses need not be readable.
    unsafe {
        while row + 4 <= n_rows {
            let rows: [*const T; 4] = std::array::from_fn(|r| w.wrapping_add((row + r) * n_cols));
            let next = rows.map(|w| w.wrapping_add(4 * n_cols));
            for (r, sum) in dot::<L, T, 4>(rows, n_cols, x, next).into_iter().enumerate() {
                put(row + r, sum);
            }
            row += 4;
        }
        while row < n_rows {
            let w = w.add(row * n_cols);
            put(row, dot::<L, T, 1>([w], n_cols, x, [w.wrapping_add(n_cols)])[0]);
            row += 1;
        }
    }
}

/// `dots[i] = w[rows[i]] . x`, several rows at once and the next ones asked for: nothing of them is in a cache.
///
/// # Safety
/// `rows` lie in the matrix at `w` and have places in `dots`, `n_cols` elements are readable at `x`, the processor has the
/// instruction set of `L`.
#[inline(always)]
unsafe fn dots_of<L: Lanes, T: Element>(
    w: *const T,
    rows: &[u32],
    n_cols: usize,
    x: *const f32,
    dots: &mut [f32],
) {
    let at = |i: usize| w.wrapping_add(rows[i.min(rows.len() - 1)] as usize * n_cols);
    let mut i = 0;
    while i < rows.len() {
        let here: [_; LISTED_ROWS] = std::array::from_fn(|r| at(i + r));
        let next: [_; LISTED_ROWS] = std::array::from_fn(|r| at(i + LISTED_ROWS + r));
        // SAFETY: the rows lie in the matrix.
        let of_rows = unsafe { dot::<L, T, LISTED_ROWS>(here, n_cols, x, next) };
        let n = LISTED_ROWS.min(rows.len() - i);
        dots[i..i + n].copy_from_slice(&of_rows[..n]);
        i += n;
    }
}

/// Dots of `R` rows with `x`; asks for the lines of `next` on the way.
///
/// # Safety
/// `n_cols` elements are readable at each row and at `x`, the processor has the instruction set of `L`.
#[expect(clippy::needless_range_loop, reason = "the index names a register of each of several arrays")]
#[inline(always)]
unsafe fn dot<L: Lanes, T: Element, const R: usize>(
    rows: [*const T; R],
    n_cols: usize,
    x: *const f32,
    next: [*const T; R],
) -> [f32; R] {
    // SAFETY: full vectors end at or before n_cols, the partial one stops there.
    unsafe {
        let mut accs = [[L::splat(0.0); ACCS]; R];
        let step = ACCS * L::N;
        let mut col = 0;
        while col + step <= n_cols {
            for next in next {
                let mut byte = 0;
                while byte < step * size_of::<T>() {
                    L::prefetch(next.wrapping_add(col).cast::<u8>().wrapping_add(byte));
                    byte += LINE_BYTES;
                }
            }
            for a in 0..ACCS {
                let x = L::load(x.add(col + a * L::N));
                for r in 0..R {
                    accs[r][a] = L::mul_add(T::load::<L>(rows[r].add(col + a * L::N)), x, accs[r][a]);
                }
            }
            col += step;
        }
        while col < n_cols {
            let n = L::N.min(n_cols - col);
            let x = load_partial::<L, f32>(x.add(col), n);
            for r in 0..R {
                accs[r][0] = L::mul_add(load_partial::<L, T>(rows[r].add(col), n), x, accs[r][0]);
            }
            col += n;
        }
        let mut sums = [0.0; R];
        for r in 0..R {
            sums[r] = L::sum(L::add(L::add(accs[r][0], accs[r][1]), L::add(accs[r][2], accs[r][3])));
        }
        sums
    }
}

/// Buffers of [`mlp`].
#[derive(Debug)]
pub(super) struct Scratch {
    /// Rows that down reads, ascending within a chunk and, once gathered, over all; with their `h`.
    rows: Vec<u32>,
    h: Vec<f32>,
    /// Of each chunk.
    counts: Vec<MlpCounts>,
    x_words: Vec<u32>,
    q: Vec<i8>,
    /// The product with the first factor of a predictor of low rank, which is of no higher rank than W_gate.
    inner: Vec<f32>,
    /// Rows that the predictor left out, filled for audits alone.
    skip: Vec<bool>,
    /// Of each chunk of an audit.
    audits: Vec<MlpAudit>,
}

impl Scratch {
    pub(super) fn new(intermediate_size: usize, hidden_size: usize) -> Self {
        Self {
            rows: vec![0; intermediate_size],
            h: vec![0.0; intermediate_size],
            counts: vec![MlpCounts::default(); intermediate_size.div_ceil(MLP_ROWS_MIN)],
            x_words: vec![0; hidden_size.div_ceil(32)],
            q: vec![0; scores::q_len(hidden_size)],
            inner: vec![0.0; hidden_size],
            skip: vec![false; intermediate_size],
            // The sample and the kept rows end in a part of a chunk each.
            audits: vec![MlpAudit::default(); 2 * intermediate_size.div_ceil(AUDIT_ROWS)],
        }
    }

    /// `(intermediate_size, n_words)`.
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.rows.len(), self.x_words.len())
    }
}

/// First phase of an MLP, as its chunks see it.
struct GateUp<'a> {
    w: MlpWeights<'a>,
    select: Rows<'a>,
    activation: Activation,
    x: &'a [f32],
    x_words: &'a [u32],
    quantised: Quantised<'a>,
    inner: &'a [f32],
    chunk_rows: usize,
    rows: Shared<u32>,
    h: Shared<f32>,
    counts: Shared<MlpCounts>,
    /// Where to note the rows left out, if an audit follows.
    skip: Option<Shared<bool>>,
}

/// An audit, as its chunks see it.
struct Audit<'a> {
    w: MlpWeights<'a>,
    activation: Activation,
    x: &'a [f32],
    sample: &'a [u32],
    skip: &'a [bool],
    /// Kept rows, with their `h`.
    rows: &'a [u32],
    h: &'a [f32],
    sums: Shared<MlpAudit>,
}

/// Second phase of an MLP, as its slices see it.
struct Down<'a> {
    w_t: Matrix<'a>,
    rows: &'a [u32],
    h: &'a [f32],
    y: Shared<f32>,
    width: usize,
}

/// One token's MLP; shapes and scratch fit. With a `sample` of rows, each at most once, also what was missed there.
#[expect(clippy::too_many_arguments, reason = "a call of the equation, each argument one of its terms")]
pub(super) fn mlp(
    isa: Isa,
    pool: &Pool,
    w: &MlpWeights<'_>,
    select: &Rows<'_>,
    activation: Activation,
    x: &[f32],
    sample: Option<&[u32]>,
    scratch: &mut Scratch,
    y: &mut [f32],
) -> (MlpCounts, MlpAudit) {
    let n_rows = w.gate.n_rows;
    let mut quantised = Quantised { q: &[], scale: 0.0, total: 0 };
    match select {
        Rows::All | Rows::Active => {}
        Rows::Predicted { .. } => sign_pack(isa, x, &mut scratch.x_words),
        Rows::Scored { .. } => quantised = quantise(isa, x, &mut scratch.q),
        Rows::LowRank { factors, .. } => {
            low_rank::product(isa, pool, &factors.fc1, 1, x, &mut scratch.inner, factors.relu);
            if factors.residual.is_some() {
                quantised = quantise(isa, x, &mut scratch.q);
            }
        }
    }
    let chunk_rows = n_rows.div_ceil(MLP_CHUNKS * pool.n_threads()).next_multiple_of(signs::GROUP);
    let chunk_rows = chunk_rows.clamp(MLP_ROWS_MIN, MLP_ROWS_MAX);
    let n_chunks = n_rows.div_ceil(chunk_rows);
    let args = GateUp {
        w: *w,
        select: *select,
        activation,
        x,
        x_words: &scratch.x_words,
        quantised,
        inner: &scratch.inner,
        chunk_rows,
        rows: Shared::new(&mut scratch.rows),
        h: Shared::new(&mut scratch.h),
        counts: Shared::new(&mut scratch.counts),
        skip: sample.map(|_| Shared::new(&mut scratch.skip)),
    };
    pool.run(n_chunks, &|chunk| dispatch!(isa, gate_up_chunk, &args, chunk));

    let dense = matches!(select, Rows::All);
    let (mut total, mut n_listed) = (MlpCounts::default(), 0);
    for (chunk, counts) in scratch.counts[..n_chunks].iter().enumerate() {
        let start = chunk * chunk_rows;
        let n = if dense { chunk_rows.min(n_rows - start) } else { counts.n_active };
        scratch.rows.copy_within(start..start + n, n_listed);
        scratch.h.copy_within(start..start + n, n_listed);
        n_listed += n;
        total.n_kept += counts.n_kept;
        total.n_active += counts.n_active;
    }

    let n_cols = w.down_t.n_cols;
    let width = n_cols.div_ceil(pool.n_threads()).next_multiple_of(64).clamp(SLICE_MIN, SLICE_MAX);
    let args = Down {
        w_t: w.down_t,
        rows: &scratch.rows[..n_listed],
        h: &scratch.h[..n_listed],
        y: Shared::new(y),
        width,
    };
    if n_listed > 0 {
        pool.run(n_cols.div_ceil(width), &|slice| dispatch!(isa, down_slice, &args, slice));
    }
    let found = sample.map(|sample| audit(isa, pool, w, activation, x, sample, n_listed, scratch));
    (total, found.unwrap_or_default())
}

/// What was missed among `sample`, and the energy of the `n_listed` rows that `scratch` still lists.
#[expect(clippy::too_many_arguments, reason = "what the MLP before it had, and the sample")]
fn audit(
    isa: Isa,
    pool: &Pool,
    w: &MlpWeights<'_>,
    activation: Activation,
    x: &[f32],
    sample: &[u32],
    n_listed: usize,
    scratch: &mut Scratch,
) -> MlpAudit {
    let args = Audit {
        w: *w,
        activation,
        x,
        sample,
        skip: &scratch.skip,
        rows: &scratch.rows[..n_listed],
        h: &scratch.h[..n_listed],
        sums: Shared::new(&mut scratch.audits),
    };
    let n_chunks = sample.len().div_ceil(AUDIT_ROWS) + n_listed.div_ceil(AUDIT_ROWS);
    pool.run(n_chunks, &|chunk| dispatch!(isa, audit_chunk, &args, chunk));
    scratch.audits[..n_chunks].iter().fold(MlpAudit::default(), |sum, chunk| MlpAudit {
        n_skipped: sum.n_skipped + chunk.n_skipped,
        n_missed: sum.n_missed + chunk.n_missed,
        missed_energy: sum.missed_energy + chunk.missed_energy,
        kept_energy: sum.kept_energy + chunk.kept_energy,
    })
}

/// Predicts, computes and lists the neurons of `chunk`.
///
/// # Safety
/// Shapes and scratch fit, nobody else uses this chunk's part of the scratch, the processor has the instruction set
/// of `L`.
#[inline(always)]
unsafe fn gate_up_chunk<L: Signs + Scores>(args: &GateUp<'_>, chunk: usize) {
    let row0 = chunk * args.chunk_rows;
    let n_rows = args.chunk_rows.min(args.w.gate.n_rows - row0);
    let n_cols = args.w.gate.n_cols;
    let x = args.x.as_ptr();
    // SAFETY: this chunk's part of the scratch; rows lie in the matrices.
    unsafe {
        let rows = args.rows.slice(row0, n_rows);
        let h = args.h.slice(row0, n_rows);
        let counts = &mut args.counts.slice(chunk, 1)[0];
        if let Some(skip) = &args.skip {
            skip.slice(row0, n_rows).fill(args.select.is_predicted());
        }
        match args.select {
            Rows::All => {
                let mut n_active = 0;
                with_elements!(args.w.gate.data, w => {
                    dots::<L, _>(w.add(row0 * n_cols), n_rows, n_cols, x, |row, dot| {
                        rows[row] = (row0 + row) as u32;
                        h[row] = args.activation.apply(dot);
                        n_active += usize::from(h[row] != 0.0);
                    });
                });
                with_elements!(args.w.up.data, w => {
                    dots::<L, _>(w.add(row0 * n_cols), n_rows, n_cols, x, |row, dot| h[row] *= dot);
                });
                *counts = MlpCounts { n_kept: n_rows, n_active };
                return;
            }
            Rows::Active => {
                let mut n_active = 0;
                with_elements!(args.w.gate.data, w => {
                    dots::<L, _>(w.add(row0 * n_cols), n_rows, n_cols, x, |row, dot| {
                        let gate = args.activation.apply(dot);
                        if gate != 0.0 {
                            rows[n_active] = (row0 + row) as u32;
                            h[n_active] = gate;
                            n_active += 1;
                        }
                    });
                });
                *counts = MlpCounts { n_kept: n_rows, n_active };
            }
            Rows::Predicted { .. } | Rows::Scored { .. } | Rows::LowRank { .. } => {
                let n_kept = keep::<L>(args, row0, rows);
                if let Some(skip) = &args.skip {
                    let skip = skip.slice(row0, n_rows);
                    rows[..n_kept].iter().for_each(|&row| skip[row as usize - row0] = false);
                }
                let mut gates = [0.0; MLP_ROWS_MAX];
                with_elements!(args.w.gate.data, w => {
                    dots_of::<L, _>(w, &rows[..n_kept], n_cols, x, &mut gates);
                });
                let mut n_active = 0;
                for (i, &gate) in gates[..n_kept].iter().enumerate() {
                    let gate = args.activation.apply(gate);
                    if gate != 0.0 {
                        rows[n_active] = rows[i];
                        h[n_active] = gate;
                        n_active += 1;
                    }
                }
                *counts = MlpCounts { n_kept, n_active };
            }
        }
        let n_active = counts.n_active;
        let mut ups = [0.0; MLP_ROWS_MAX];
        with_elements!(args.w.up.data, w => {
            dots_of::<L, _>(w, &rows[..n_active], n_cols, x, &mut ups);
        });
        h.iter_mut().zip(&ups[..n_active]).for_each(|(h, up)| *h *= up);
    }
}

/// Sums of `chunk`: the chunks of the sample come first, those of the kept rows after them.
///
/// # Safety
/// Shapes fit, rows lie in the matrices, nobody else uses this chunk's sums, the processor has the instruction set of
/// `L`.
#[inline(always)]
unsafe fn audit_chunk<L: Lanes>(args: &Audit<'_>, chunk: usize) {
    let n_cols = args.w.gate.n_cols;
    let x = args.x.as_ptr();
    let n_sample_chunks = args.sample.len().div_ceil(AUDIT_ROWS);
    let part = |chunk: usize, len: usize| chunk * AUDIT_ROWS..len.min((chunk + 1) * AUDIT_ROWS);
    let mut sums = MlpAudit::default();
    // SAFETY: rows lie in the matrices; the chunk's own sums.
    unsafe {
        if chunk < n_sample_chunks {
            let (mut skipped, mut gates) = ([0; AUDIT_ROWS], [0.0; AUDIT_ROWS]);
            let mut n_skipped = 0;
            for &row in &args.sample[part(chunk, args.sample.len())] {
                skipped[n_skipped] = row;
                n_skipped += usize::from(args.skip[row as usize]);
            }
            let skipped = &skipped[..n_skipped];
            with_elements!(args.w.gate.data, w => dots_of::<L, _>(w, skipped, n_cols, x, &mut gates));
            sums.n_skipped = n_skipped;
            for (&row, gate) in skipped.iter().zip(gates) {
                let gate = args.activation.apply(gate);
                if gate != 0.0 {
                    let up = with_elements!(args.w.up.data, w => {
                        let w = w.add(row as usize * n_cols);
                        dot::<L, _, 1>([w], n_cols, x, [w])[0]
                    });
                    sums.n_missed += 1;
                    sums.missed_energy += energy::<L>(&args.w.down_t, row as usize, gate * up);
                }
            }
        } else {
            let part = part(chunk - n_sample_chunks, args.rows.len());
            for (&row, &h) in args.rows[part.clone()].iter().zip(&args.h[part]) {
                sums.kept_energy += energy::<L>(&args.w.down_t, row as usize, h);
            }
        }
        args.sums.slice(chunk, 1)[0] = sums;
    }
}

/// `(h |w_t[row]|)^2`. No closure, as those do not take on the instruction set of the function around them.
///
/// # Safety
/// The row lies in the matrix, the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn energy<L: Lanes>(w_t: &Matrix<'_>, row: usize, h: f32) -> f64 {
    let n_cols = w_t.n_cols;
    // SAFETY: the caller's promise.
    let norm = unsafe { with_elements!(w_t.data, w => squares::<L, _>(w.add(row * n_cols), n_cols)) };
    f64::from(h) * f64::from(h) * f64::from(norm)
}

/// `sum_c w[c]^2`, in the order of [`dot`].
///
/// # Safety
/// `n_cols` elements are readable at `w`, the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn squares<L: Lanes, T: Element>(w: *const T, n_cols: usize) -> f32 {
    // SAFETY: full vectors end at or before n_cols, the partial one stops there.
    unsafe {
        let mut accs = [L::splat(0.0); ACCS];
        let mut col = 0;
        while col + ACCS * L::N <= n_cols {
            for (a, acc) in accs.iter_mut().enumerate() {
                let w = T::load::<L>(w.add(col + a * L::N));
                *acc = L::mul_add(w, w, *acc);
            }
            col += ACCS * L::N;
        }
        while col < n_cols {
            let n = L::N.min(n_cols - col);
            let w = load_partial::<L, T>(w.add(col), n);
            accs[0] = L::mul_add(w, w, accs[0]);
            col += n;
        }
        L::sum(L::add(L::add(accs[0], accs[1]), L::add(accs[2], accs[3])))
    }
}

/// Asks for the words of `n_rows` rows from `row` on, where a predictor has some: the processor's own streams of lines end
/// with each page, which is every few rows.
#[inline(always)]
fn ask_for_words<L: Lanes>(select: &Rows<'_>, row: usize, n_rows: usize) {
    let ask = |words: &[u32], n_words: usize, row: usize| {
        prefetch::<L, _>(words.as_ptr().wrapping_add(row * n_words), n_rows * n_words);
    };
    match select {
        Rows::Predicted { signs, .. } => ask(signs.words, signs.n_words, row),
        Rows::Scored { planes: BitPlanes { signs, low }, .. } => {
            ask(signs.words, signs.n_words, row);
            for plane in 0..low.len() / signs.words.len().max(1) {
                ask(low, signs.n_words, plane * signs.n_rows + row);
            }
        }
        Rows::All | Rows::Active | Rows::LowRank { .. } => {}
    }
}

/// Lists the rows from `row0` on, as many as `rows` has places, that the predictor keeps; returns their number.
///
/// # Safety
/// That of [`gate_up_chunk`].
#[inline(always)]
unsafe fn keep<L: Signs + Scores>(args: &GateUp<'_>, row0: usize, rows: &mut [u32]) -> usize {
    let n_rows = rows.len();
    let (mut n_kept, mut row) = (0, row0);
    while row < row0 + n_rows {
        let n_group = signs::GROUP.min(row0 + n_rows - row);
        ask_for_words::<L>(&args.select, row + n_group, signs::GROUP);
        // SAFETY: the rows lie in the matrices; the rest is the caller's promise.
        let kept: [bool; signs::GROUP] = unsafe {
            match &args.select {
                Rows::All | Rows::Active => [true; signs::GROUP],
                Rows::Predicted { signs, limits } => {
                    let mut n_neg = [0; signs::GROUP];
                    let words = signs.words.as_ptr().add(row * signs.n_words);
                    L::n_neg(words, n_group, signs.n_words, args.x_words.as_ptr(), n_neg.as_mut_ptr());
                    std::array::from_fn(|r| r < n_group && n_neg[r] <= limits.of(row + r))
                }
                Rows::Scored { planes, thresholds } => {
                    let scores = scores::scores::<L>(planes, row, n_group, &args.quantised);
                    let scale = args.quantised.scale;
                    std::array::from_fn(|r| {
                        r < n_group && scores::is_kept(scores[r], thresholds.of(row + r), scale)
                    })
                }
                Rows::LowRank { factors, thresholds } => {
                    let scores = low_rank::scores::<L>(factors, row, n_group, args.inner, &args.quantised);
                    std::array::from_fn(|r| {
                        r < n_group && low_rank::is_kept(scores[r], thresholds.of(row + r))
                    })
                }
            }
        };
        for (r, kept) in kept.into_iter().enumerate().take(n_group) {
            // The place is written either way: a branch here would be taken at random.
            rows[n_kept] = (row + r) as u32;
            n_kept += usize::from(kept);
        }
        row += n_group;
    }
    n_kept
}

/// `y[cols] += sum_i h[i] * w_t[rows[i]][cols]` for the columns of `slice`.
///
/// # Safety
/// Shapes fit, `rows` lie in the matrix, nobody else uses these columns of `y`, the processor has the instruction
/// set of `L`.
#[inline(always)]
unsafe fn down_slice<L: Lanes>(args: &Down<'_>, slice: usize) {
    let n_cols = args.w_t.n_cols;
    let col0 = slice * args.width;
    let width = args.width.min(n_cols - col0);
    let mut acc = [0.0f32; SLICE_MAX];
    // SAFETY: the columns lie in the rows, in `acc` (which holds whole vectors up to SLICE_MAX) and in y.
    unsafe {
        with_elements!(args.w_t.data, w => {
            let w = w.add(col0);
            let mut i = 0;
            while i + DOWN_ROWS <= args.rows.len() {
                let row = |i: usize| w.wrapping_add(args.rows[i.min(args.rows.len() - 1)] as usize * n_cols);
                let rows: [_; DOWN_ROWS] = std::array::from_fn(|r| row(i + r));
                let next: [_; DOWN_ROWS] = std::array::from_fn(|r| row(i + DOWN_ROWS + r));
                let h: [_; DOWN_ROWS] = std::array::from_fn(|r| args.h[i + r]);
                add_rows::<L, _, DOWN_ROWS>(rows, h, width, acc.as_mut_ptr(), next);
                i += DOWN_ROWS;
            }
            while i < args.rows.len() {
                let row = w.add(args.rows[i] as usize * n_cols);
                add_rows::<L, _, 1>([row], [args.h[i]], width, acc.as_mut_ptr(), [row]);
                i += 1;
            }
        });
        let y = args.y.slice(col0, width);
        for (y, acc) in y.iter_mut().zip(&acc) {
            *y += acc;
        }
    }
}

/// `acc += h[0] * rows[0]`, then `h[1] * rows[1]`, and so on; asks for the lines of `next` on the way.
///
/// # Safety
/// `width` elements are readable at each row; `acc` holds `width` rounded up to whole vectors; the processor has the
/// instruction set of `L`.
#[inline(always)]
unsafe fn add_rows<L: Lanes, T: Element, const R: usize>(
    rows: [*const T; R],
    h: [f32; R],
    width: usize,
    acc: *mut f32,
    next: [*const T; R],
) {
    // SAFETY: full vectors end at or before `width`, the partial one stops there.
    unsafe {
        let mut factors = [L::splat(0.0); R];
        for r in 0..R {
            factors[r] = L::splat(h[r]);
        }
        let line = 64 / size_of::<T>();
        let mut col = 0;
        while col + line <= width {
            for next in next {
                L::prefetch(next.wrapping_add(col).cast());
            }
            let mut v = 0;
            while v < line {
                let acc = acc.add(col + v);
                let mut sum = L::load(acc);
                for r in 0..R {
                    sum = L::mul_add(T::load::<L>(rows[r].add(col + v)), factors[r], sum);
                }
                L::store(acc, sum);
                v += L::N;
            }
            col += line;
        }
        while col < width {
            let n = L::N.min(width - col);
            let acc = acc.add(col);
            let mut sum = L::load(acc);
            for r in 0..R {
                sum = L::mul_add(load_partial::<L, T>(rows[r].add(col), n), factors[r], sum);
            }
            L::store(acc, sum);
            col += n;
        }
    }
}

/// Sign words of `x`; `words` holds `x.len().div_ceil(32)`.
pub(super) fn sign_pack(isa: Isa, x: &[f32], words: &mut [u32]) {
    assert!(words.len() >= x.len().div_ceil(32));
    dispatch!(isa, sign_pack, x.as_ptr(), x.len(), words.as_mut_ptr());
}

/// `n_neg[r]` of the rows of `words (n_rows, n_words)`.
pub(super) fn n_neg(isa: Isa, words: &[u32], x_words: &[u32], n_neg: &mut [u32]) {
    let n_words = x_words.len();
    assert_eq!(words.len(), n_neg.len() * n_words);
    for (group, n_neg) in n_neg.chunks_mut(signs::GROUP).enumerate() {
        let rows = words[group * signs::GROUP * n_words..].as_ptr();
        dispatch!(isa, n_neg, rows, n_neg.len(), n_words, x_words.as_ptr(), n_neg.as_mut_ptr());
    }
}

/// `x` in 8 bits, as [`scores`] takes it.
pub(super) fn quantise<'q>(isa: Isa, x: &[f32], q: &'q mut [i8]) -> Quantised<'q> {
    let Quantised { scale, total, .. } = scores::quantise(x, q);
    dispatch!(isa, arrange, q);
    Quantised { q, scale, total }
}

/// Scores of the rows of `planes` from `row0` on, as many as `out` has places.
pub(super) fn scores(isa: Isa, planes: &BitPlanes<'_>, row0: usize, x: &Quantised<'_>, out: &mut [i32]) {
    assert!(row0 + out.len() <= planes.signs.n_rows);
    assert!(x.q.len() >= scores::q_len(planes.signs.n_words * 32));
    for (group, out) in out.chunks_mut(signs::GROUP).enumerate() {
        let row = row0 + group * signs::GROUP;
        let scores = dispatch!(isa, scores, planes, row, out.len(), x);
        out.copy_from_slice(&scores[..out.len()]);
    }
}

/// Reads all of `bytes` on all threads.
pub(super) fn read_all(isa: Isa, pool: &Pool, bytes: &[u8]) {
    pool.run(bytes.len().div_ceil(READ_BYTES), &|chunk| {
        let start = chunk * READ_BYTES;
        let chunk = &bytes[start..bytes.len().min(start + READ_BYTES)];
        std::hint::black_box(dispatch!(isa, read, chunk));
    });
}

/// Something that needs all of `bytes`, but for less than a vector at the end.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn read<L: Lanes>(bytes: &[u8]) -> f32 {
    const CHAINS: usize = 8;
    // SAFETY: every vector ends at or before the last byte; its lanes are any bits, and a maximum is slow for none.
    unsafe {
        let values = bytes.as_ptr().cast::<f32>();
        let mut maxima = [L::splat(0.0); CHAINS];
        let mut i = 0;
        while (i + CHAINS * L::N) * size_of::<f32>() <= bytes.len() {
            for (c, max) in maxima.iter_mut().enumerate() {
                L::prefetch(values.wrapping_add(i + c * L::N).cast::<u8>().wrapping_add(READ_AHEAD_BYTES));
                *max = L::max(*max, L::load(values.add(i + c * L::N)));
            }
            i += CHAINS * L::N;
        }
        while (i + L::N) * size_of::<f32>() <= bytes.len() {
            maxima[0] = L::max(maxima[0], L::load(values.add(i)));
            i += L::N;
        }
        L::sum(maxima.into_iter().fold(L::splat(0.0), |a, b| L::add(a, b)))
    }
}
