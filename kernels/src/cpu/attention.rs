//! Softmax attention over a cache of keys and values.
//!
//! Computes   s[p] = dot(q, k[p]) / sqrt(head_dim);  out = sum_p exp(s[p] - max s) * v[p] / sum_p exp(s[p] - max s)
//! Source     the running maximum and sum of "Online normalizer calculation for softmax", arXiv 1805.02867
//! Reference  reference::attention, within the rounding of the sums and of `exp` (2 ulp)
//! Shapes     q, out (n_tokens, n_heads, head_dim) f32; k, v (n_kv_heads, n_positions_max, head_dim) f32, f16 or bf16
//! Needs      lengths as the shapes say, first_position + n_tokens <= n_positions_max; checked in Cpu::attention
//! Lanes      scores: one chain over head_dim per position, lanes added for N positions together; values: one chain
//!            over positions per column. BLOCK queries that read the same head share its loads
//! Tail       partial vectors; no position past a query's own is read for it but those that its block needs
//! Chunks     one token: (kv head, CHUNK positions), partial results joined afterwards; more: (kv head, QUERIES
//!            queries), positions in the same chunks and joined by the same operations. So a result depends neither on
//!            threads nor on how many tokens one call has
//! Bytes      bytes::kv for one token
//!
//! ```text
//! for chunk of positions:  m' = max(s), p = exp(s - m'), l' = sum(p), o' = sum(p v)
//!     m, l, o = join((m, l, o), (m', l', o')):  both scaled to the larger maximum, then added
//! out = o / l
//! ```

use super::Isa;
use super::decode::{dispatch, with_elements};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Element, LANES_MAX, Lanes, Portable, load_partial, store_partial};
use super::pool::{Pool, Shared};
use crate::{AttentionShape, Elements};

/// Positions in a chunk: their scores stay in registers and L1, their keys and values in L2.
const CHUNK: usize = 256;
/// Queries that share the loads of keys and values.
const BLOCK: usize = 4;
/// Queries of one kv head in a piece of work when there are many tokens.
const QUERIES: usize = 16;
/// Heads joined in a piece of work when there is one token.
const JOIN_HEADS: usize = 4;

/// Partial results of one token: for each chunk and head its maximum and sum, and `head_dim` values.
#[derive(Debug)]
pub(super) struct Scratch {
    sums: Vec<Sums>,
    values: Vec<f32>,
}

/// Maximum of the scores and sum of their exponentials, relative to it.
#[derive(Clone, Copy, Debug)]
struct Sums {
    max: f32,
    total: f32,
}

/// Before any chunk.
const NO_SUMS: Sums = Sums { max: f32::NEG_INFINITY, total: 0.0 };

impl Scratch {
    pub(super) fn new(shape: &AttentionShape) -> Self {
        let (n_sums, n_values) = Self::sizes_for(shape);
        Self { sums: vec![NO_SUMS; n_sums], values: vec![0.0; n_values] }
    }

    /// What [`Scratch::sizes`] has to be for `shape`.
    pub(super) fn sizes_for(shape: &AttentionShape) -> (usize, usize) {
        let n = shape.n_heads * shape.n_positions_max.div_ceil(CHUNK);
        (n, n * shape.head_dim)
    }

    /// `(chunks * heads, values)`.
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.sums.len(), self.values.len())
    }
}

/// A call, as its pieces of work see it.
struct Args<'a> {
    shape: AttentionShape,
    first_position: usize,
    n_tokens: usize,
    q: &'a [f32],
    k: Elements<'a>,
    v: Elements<'a>,
    out: Shared<f32>,
    sums: Shared<Sums>,
    values: Shared<f32>,
}

macro_rules! entries {
    ($isa:ident, $lanes:ty, $wide:literal $(, $feature:literal)?) => {
        mod $isa {
            use super::*;
            /// # Safety
            /// That of [`super::chunk_of_one`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn chunk_of_one(args: &Args<'_>, work: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::chunk_of_one::<$lanes, $wide>(args, work) }
            }
            /// # Safety
            /// That of [`super::join_heads`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn join_heads(args: &Args<'_>, work: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::join_heads::<$lanes>(args, work) }
            }
            /// # Safety
            /// That of [`super::queries_of_many`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn queries_of_many(args: &Args<'_>, work: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::queries_of_many::<$lanes, $wide>(args, work) }
            }
        }
    };
}
// The number: vectors of values that BLOCK queries keep in registers.
entries!(portable, Portable, 2);
#[cfg(target_arch = "x86_64")]
entries!(avx2, Avx2, 2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entries!(avx512, Avx512, 4, "avx512f,avx512bw,avx512vl,avx2,fma,f16c");

/// Causal attention of `n_tokens` positions; shapes and scratch fit.
#[expect(clippy::too_many_arguments, reason = "the arguments of Cpu::attention")]
pub(super) fn attention(
    isa: Isa,
    pool: &Pool,
    shape: &AttentionShape,
    n_tokens: usize,
    first_position: usize,
    q: &[f32],
    k: Elements<'_>,
    v: Elements<'_>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let args = Args {
        shape: *shape,
        first_position,
        n_tokens,
        q,
        k,
        v,
        out: Shared::new(out),
        sums: Shared::new(&mut scratch.sums),
        values: Shared::new(&mut scratch.values),
    };
    if n_tokens == 1 {
        let n_chunks = (first_position + 1).div_ceil(CHUNK);
        pool.run(n_chunks * shape.n_kv_heads, &|work| dispatch!(isa, chunk_of_one, &args, work));
        pool.run(shape.n_heads.div_ceil(JOIN_HEADS), &|work| dispatch!(isa, join_heads, &args, work));
    } else {
        let n_queries = n_tokens * (shape.n_heads / shape.n_kv_heads);
        pool.run(n_queries.div_ceil(QUERIES) * shape.n_kv_heads, &|work| {
            dispatch!(isa, queries_of_many, &args, work);
        });
    }
}

/// One query and where its results go.
#[derive(Clone, Copy)]
struct Query {
    q: *const f32,
    /// Positions it sees.
    n_positions: usize,
    /// `head_dim` values.
    out: *mut f32,
}

/// All query heads of a kv head over one chunk, for one token.
///
/// # Safety
/// Shapes and scratch fit, each piece of work runs once, the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn chunk_of_one<L: Lanes, const WIDE: usize>(args: &Args<'_>, work: usize) {
    let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = args.shape;
    let (chunk, kv_head) = (work / n_kv_heads, work % n_kv_heads);
    let group = n_heads / n_kv_heads;
    // SAFETY: heads of this kv head in this chunk are this piece's part of the scratch.
    unsafe {
        let slot = chunk * n_heads + kv_head * group;
        let sums = args.sums.slice(slot, group);
        sums.fill(NO_SUMS);
        let query = |i: usize| Query {
            q: args.q.as_ptr().add((kv_head * group + i) * head_dim),
            n_positions: args.first_position + 1,
            out: args.values.get().add((slot + i) * head_dim),
        };
        add_chunk::<L, WIDE>(args, kv_head, chunk, query, sums);
    }
}

/// Joins the chunks of some heads of one token.
///
/// # Safety
/// As [`chunk_of_one`], after all of its work.
#[inline(always)]
unsafe fn join_heads<L: Lanes>(args: &Args<'_>, work: usize) {
    let AttentionShape { n_heads, head_dim, .. } = args.shape;
    for head in work * JOIN_HEADS..n_heads.min((work + 1) * JOIN_HEADS) {
        // SAFETY: this head's part of the scratch, which nobody writes any more, and of the output.
        unsafe {
            let out = args.out.get().add(head * head_dim);
            let mut sums = NO_SUMS;
            for chunk in 0..(args.first_position + 1).div_ceil(CHUNK) {
                let slot = chunk * n_heads + head;
                let values = args.values.get().add(slot * head_dim).cast_const();
                let into = join(&mut sums, args.sums.slice(slot, 1)[0], chunk == 0);
                let mut col = 0;
                while col < head_dim {
                    let n = L::N.min(head_dim - col);
                    put::<L>(out.add(col), n, load_partial::<L, f32>(values.add(col), n), into);
                    col += n;
                }
            }
            divide::<L>(out, head_dim, sums.total);
        }
    }
}

/// Some queries of one kv head over all positions that they see.
///
/// # Safety
/// As [`chunk_of_one`]; the scratch is not used.
#[inline(always)]
unsafe fn queries_of_many<L: Lanes, const WIDE: usize>(args: &Args<'_>, work: usize) {
    let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = args.shape;
    let group = n_heads / n_kv_heads;
    // Queries in the order of their tokens, those that see most first: they take longest.
    let n_all = args.n_tokens * group;
    let (tile, kv_head) = (n_all.div_ceil(QUERIES) - 1 - work / n_kv_heads, work % n_kv_heads);
    let first = tile * QUERIES;
    let n_queries = QUERIES.min(n_all - first);
    let mut sums = [NO_SUMS; QUERIES];
    let n_positions = args.first_position + (first + n_queries - 1) / group + 1;
    // SAFETY: each query has its own part of the output.
    unsafe {
        let query = |i: usize| {
            let (token, head) = ((first + i) / group, kv_head * group + (first + i) % group);
            let at = (token * n_heads + head) * head_dim;
            Query {
                q: args.q.as_ptr().add(at),
                n_positions: args.first_position + token + 1,
                out: args.out.get().add(at),
            }
        };
        for chunk in 0..n_positions.div_ceil(CHUNK) {
            add_chunk::<L, WIDE>(args, kv_head, chunk, query, &mut sums[..n_queries]);
        }
        for (i, sums) in sums.iter().enumerate().take(n_queries) {
            divide::<L>(query(i).out, head_dim, sums.total);
        }
    }
}

/// Joins a chunk into the sums and values of `sums.len()` queries.
///
/// # Safety
/// Shapes fit; the queries' parts of output or scratch are this thread's; the processor has the instruction set.
#[inline(always)]
unsafe fn add_chunk<L: Lanes, const WIDE: usize>(
    args: &Args<'_>,
    kv_head: usize,
    chunk: usize,
    query: impl Fn(usize) -> Query,
    sums: &mut [Sums],
) {
    let mut i = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while i + BLOCK <= sums.len() {
            let queries: [_; BLOCK] = std::array::from_fn(|b| query(i + b));
            block::<L, BLOCK, WIDE>(args, kv_head, chunk, queries, &mut sums[i..]);
            i += BLOCK;
        }
        while i < sums.len() {
            block::<L, 1, 8>(args, kv_head, chunk, [query(i)], &mut sums[i..]);
            i += 1;
        }
    }
}

/// [`add_chunk`] for `B` queries; `WIDE` vectors of values at a time.
///
/// # Safety
/// That of [`add_chunk`].
#[inline(always)]
unsafe fn block<L: Lanes, const B: usize, const WIDE: usize>(
    args: &Args<'_>,
    kv_head: usize,
    chunk: usize,
    queries: [Query; B],
    sums: &mut [Sums],
) {
    let AttentionShape { head_dim, n_positions_max, .. } = args.shape;
    let start = chunk * CHUNK;
    let n_seen = queries.map(|query| query.n_positions.saturating_sub(start).min(CHUNK));
    let n_most = n_seen.into_iter().fold(0, usize::max);
    if n_most == 0 {
        return;
    }
    let at = (kv_head * n_positions_max + start) * head_dim;
    let mut scores = [[0.0f32; CHUNK]; B];
    // SAFETY: positions start .. start + n_most lie in the cache; the rest is the caller's promise.
    unsafe {
        let v = with_elements!(args.v, v => v.add(at).cast::<u8>());
        let row_bytes = head_dim * args.v.element_bytes();
        let q = queries.map(|query| query.q);
        with_elements!(args.k, k => {
            score::<L, _, B>(q, k.add(at), head_dim, n_most, v, row_bytes, &mut scores);
        });
        let mut into = [Into::Leave; B];
        for b in 0..B {
            if n_seen[b] > 0 {
                let new = exponentials::<L>(&mut scores[b], n_seen[b], n_most, head_dim);
                into[b] = join(&mut sums[b], new, chunk == 0);
            }
        }
        let out = queries.map(|query| query.out);
        with_elements!(args.v, v => {
            values::<L, _, B, WIDE>(&scores, v.add(at), head_dim, n_most, out, into);
        });
    }
}

/// `scores[b][p] = dot(q[b], k[p])`; asks for the lines of `next` on the way.
///
/// # Safety
/// `head_dim` values at each q, `n_positions` rows of them at `k`; the processor has the instruction set of `L`.
#[expect(clippy::needless_range_loop, reason = "the index names a register of each of several arrays")]
#[inline(always)]
unsafe fn score<L: Lanes, T: Element, const B: usize>(
    q: [*const f32; B],
    k: *const T,
    head_dim: usize,
    n_positions: usize,
    next: *const u8,
    next_bytes: usize,
    scores: &mut [[f32; CHUNK]; B],
) {
    // SAFETY: rows lie below n_positions, vectors end at or before head_dim; CHUNK is a multiple of L::N.
    unsafe {
        let mut first = 0;
        while first < n_positions {
            let mut sums = [[L::splat(0.0); LANES_MAX]; B];
            for i in 0..L::N.min(n_positions - first) {
                let k = k.add((first + i) * head_dim);
                let mut byte = 0;
                while byte < next_bytes {
                    L::prefetch(next.wrapping_add((first + i) * next_bytes + byte));
                    byte += 64;
                }
                let mut acc = [L::splat(0.0); B];
                let mut col = 0;
                while col + L::N <= head_dim {
                    let k = T::load::<L>(k.add(col));
                    for b in 0..B {
                        acc[b] = L::mul_add(k, L::load(q[b].add(col)), acc[b]);
                    }
                    col += L::N;
                }
                if col < head_dim {
                    let n = head_dim - col;
                    let k = load_partial::<L, T>(k.add(col), n);
                    for b in 0..B {
                        acc[b] = L::mul_add(k, load_partial::<L, f32>(q[b].add(col), n), acc[b]);
                    }
                }
                for b in 0..B {
                    sums[b][i] = acc[b];
                }
            }
            for b in 0..B {
                L::sums(&sums[b], scores[b].as_mut_ptr().add(first));
            }
            first += L::N;
        }
    }
}

/// Turns the first `n` dots into `exp(s - max s)`, those up to `n_most` (and its vector) into zeros.
///
/// # Safety
/// The processor has the instruction set of `L`; `0 < n <= n_most <= CHUNK`.
#[inline(always)]
unsafe fn exponentials<L: Lanes>(
    scores: &mut [f32; CHUNK],
    n: usize,
    n_most: usize,
    head_dim: usize,
) -> Sums {
    let padded = n.next_multiple_of(L::N);
    scores[n..padded].fill(f32::NEG_INFINITY);
    // SAFETY: vectors end at or before `padded`, which is at most CHUNK, a multiple of L::N.
    unsafe {
        let s = scores.as_mut_ptr();
        let scale = L::splat(1.0 / (head_dim as f32).sqrt());
        let mut maxima = L::splat(f32::NEG_INFINITY);
        for i in (0..padded).step_by(L::N) {
            let scaled = L::mul(L::load(s.add(i)), scale);
            L::store(s.add(i), scaled);
            maxima = L::max(maxima, scaled);
        }
        let mut lanes = [f32::NEG_INFINITY; LANES_MAX];
        L::store(lanes.as_mut_ptr(), maxima);
        let max = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        for i in (0..padded).step_by(L::N) {
            L::store(s.add(i), exp::<L>(L::sub(L::load(s.add(i)), L::splat(max))));
        }
        scores[n..n_most.next_multiple_of(L::N)].fill(0.0);
        let mut total = L::splat(0.0);
        for i in (0..padded).step_by(L::N) {
            total = L::add(total, L::load(scores.as_ptr().add(i)));
        }
        Sums { max, total: L::sum(total) }
    }
}

/// `exp(x)` for `x <= 0`, within 2 ulp; below -87 that of -87; NaN for NaN. Source: Cephes `expf`.
///
/// # Safety
/// The processor has the instruction set of `L`.
#[inline(always)]
unsafe fn exp<L: Lanes>(x: L::V) -> L::V {
    const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    // SAFETY: the caller's promise.
    unsafe {
        // The second operand is returned for NaN.
        let x = L::max(L::splat(-87.0), x);
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
        let magic = L::splat(12_582_912.0);
        let n = L::mul_add(x, L::splat(std::f32::consts::LOG2_E), magic);
        let whole = L::sub(n, magic);
        // ln 2 in two parts, the first of which times n is exact.
        let r = L::mul_add(whole, L::splat(-0.693_359_4), x);
        let r = L::mul_add(whole, L::splat(2.121_944_4e-4), r);
        let mut p = L::splat(POLYNOMIAL[0]);
        for c in &POLYNOMIAL[1..] {
            p = L::mul_add(p, r, L::splat(*c));
        }
        let p = L::mul_add(p, L::mul(r, r), L::add(r, L::splat(1.0)));
        L::scale_exponent(p, n)
    }
}

/// What becomes of new values.
#[derive(Clone, Copy)]
enum Into {
    /// They are the first.
    Set,
    /// What is there and they, times these factors to bring them to a common maximum, are added.
    Join(f32, f32),
    /// Nothing: the query sees none of them.
    Leave,
}

/// Joins `new` into `sums`.
#[inline(always)]
fn join(sums: &mut Sums, new: Sums, first: bool) -> Into {
    if first {
        *sums = new;
        return Into::Set;
    }
    let max = sums.max.max(new.max);
    let (old_factor, new_factor) = ((sums.max - max).exp(), (new.max - max).exp());
    let total = sums.total * old_factor + new.total * new_factor;
    *sums = Sums { max, total };
    Into::Join(old_factor, new_factor)
}

/// Joins `n` values into `out`.
///
/// # Safety
/// Room for `n` values, at most `L::N`; the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn put<L: Lanes>(out: *mut f32, n: usize, new: L::V, into: Into) {
    // SAFETY: the caller's promise.
    unsafe {
        let value = match into {
            Into::Leave => return,
            Into::Set => new,
            Into::Join(old_factor, new_factor) => {
                let old = L::mul(load_partial::<L, f32>(out, n), L::splat(old_factor));
                L::mul_add(new, L::splat(new_factor), old)
            }
        };
        store_partial::<L>(out, n, value);
    }
}

/// Joins `sum_p weights[b][p] * v[p]` into `out[b]`.
///
/// # Safety
/// `n_positions` rows of `head_dim` values at `v`, room for `head_dim` values at each `out`; the processor has the
/// instruction set of `L`.
#[expect(clippy::needless_range_loop, reason = "the index names a register of each of several arrays")]
#[inline(always)]
unsafe fn values<L: Lanes, T: Element, const B: usize, const WIDE: usize>(
    weights: &[[f32; CHUNK]; B],
    v: *const T,
    head_dim: usize,
    n_positions: usize,
    out: [*mut f32; B],
    into: [Into; B],
) {
    // SAFETY: rows lie below n_positions, vectors end at or before head_dim.
    unsafe {
        let mut col = 0;
        while col + WIDE * L::N <= head_dim {
            let mut acc = [[L::splat(0.0); WIDE]; B];
            for p in 0..n_positions {
                let v = v.add(p * head_dim + col);
                let mut row = [L::splat(0.0); WIDE];
                for i in 0..WIDE {
                    row[i] = T::load::<L>(v.add(i * L::N));
                }
                for b in 0..B {
                    let weight = L::splat(*weights[b].as_ptr().add(p));
                    for i in 0..WIDE {
                        acc[b][i] = L::mul_add(row[i], weight, acc[b][i]);
                    }
                }
            }
            for b in 0..B {
                for i in 0..WIDE {
                    put::<L>(out[b].add(col + i * L::N), L::N, acc[b][i], into[b]);
                }
            }
            col += WIDE * L::N;
        }
        while col < head_dim {
            let n = L::N.min(head_dim - col);
            let mut acc = [L::splat(0.0); B];
            for p in 0..n_positions {
                let v = load_partial::<L, T>(v.add(p * head_dim + col), n);
                for b in 0..B {
                    acc[b] = L::mul_add(v, L::splat(*weights[b].as_ptr().add(p)), acc[b]);
                }
            }
            for b in 0..B {
                put::<L>(out[b].add(col), n, acc[b], into[b]);
            }
            col += n;
        }
    }
}

/// `out /= total`.
///
/// # Safety
/// `n` values at `out`; the processor has the instruction set of `L`.
#[inline(always)]
unsafe fn divide<L: Lanes>(out: *mut f32, n: usize, total: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let factor = L::splat(1.0 / total);
        let mut i = 0;
        while i < n {
            let len = L::N.min(n - i);
            store_partial::<L>(out.add(i), len, L::mul(load_partial::<L, f32>(out.add(i), len), factor));
            i += len;
        }
    }
}
