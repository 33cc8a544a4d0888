//! Products of a batch of tokens with a weight matrix: each weight is converted to f32 once and used for many tokens,
//! so the multipliers set the pace.
//!
//! ```text
//! for each chunk, a block of tokens by a block of outputs, on any thread:
//!     for each block of K_BLOCK summed elements, ascending:
//!         convert the weights of the block to f32, into a buffer that stays in cache
//!         for each tile of outputs, kept in registers: add the block's products, asking meanwhile for later weights
//!
//! Computes   matmul: y[t, r] (+)= dot(w[r], x[t]);  matmul_t: y[t, c] (+)= sum_r x[t, r] * w_t[r, c]
//! Source     blocks and tiles after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
//! Reference  reference::{matmul, matmul_t}, within the rounding of f32 sums
//! Shapes     w, w_t (n_rows, n_cols) f32, f16 or bf16 row-major; x, y f32 row-major, a row for each token
//! Needs      lengths as the shapes say; checked in `Cpu`, asserted here
//! Lanes      matmul: tokens, so x is packed across tokens and the result transposed back; matmul_t: columns
//! Tail       matmul: zeros for the missing tokens; matmul_t: a tile on the stack for the missing columns
//! Order      an output is one chain of multiply-adds for each K_BLOCK elements, from zero, the chains added in
//!            ascending order (matmul_t: to y, matmul: to each other and then to y). Nothing of it depends on the other
//!            tokens, on the chunk or on the threads, and AVX2 and AVX-512 agree bit for bit
//! Bytes      bytes::matrix for each block of TOKENS_MAX tokens
//! Measured   2 cores of an AMD EPYC (Zen 5), AVX-512, f16, weights from memory, share of the multiply-add peak of
//!            515 GFLOP/s: 64 tokens 78-87 %, 16 tokens 52-62 %
//! Tried      at 64 tokens, on 2048x2048, 5504x2048 and 4096x11008. Four groups of rows in a chunk of matmul, so that
//!            packed tokens are used more often: 10-15 % slower, as rows of more pages take turns in memory. K_BLOCK 256
//!            or 512: 2-8 % slower. Eight chunks of matmul_t for each thread: as narrow pieces of rows, 2-10 % slower,
//!            and 25 % at 16 tokens
//! ```

use super::Isa;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Element, LANES_MAX, LINE_BYTES, Lanes, Portable, load_partial, prefetch};
use super::pool::{Pool, Shared};
use crate::{Elements, Matrix};
use std::sync::{Mutex, PoisonError, TryLockError};

/// Summed elements in a block.
const K_BLOCK: usize = 128;
/// Distance of the rows of an operand that is broadcast; not a power of two, which would put them in the same cache
/// sets.
const K_STRIDE: usize = K_BLOCK + 16;
/// Summed elements between two requests for later weights: a cache line of f16.
const K_STEP: usize = 32;
/// Weight rows in a chunk of `matmul`: a multiple of the height of each tile.
const GROUP: usize = 24;
/// Panels in the largest chunk of `matmul_t`; a panel is as many columns as a tile.
const PANELS_MAX: usize = 4;
/// Tokens in the largest chunk: a block of them takes 128 KiB of L2.
const TOKENS_MAX: usize = 256;
/// Tokens of the tallest tile of `matmul_t`.
const TILE_TOKENS: usize = 6;
/// Chunks for each thread, where there is enough work: an even share although cores differ.
const CHUNKS_PER_THREAD: usize = 4;
/// Tokens in a chunk of `matmul_t` are not divided below this.
const TOKENS_MIN: usize = 48;
/// Tokens that `matmul_t` copies in a chunk.
const COPY_TOKENS: usize = 16;
/// Summed elements that `matmul` packs in a chunk.
const PACK_ELEMENTS: usize = 4 * K_BLOCK;

/// Calls the entry of an instruction set.
macro_rules! dispatch {
    ($isa:expr, $entry:ident, $($arg:expr),*) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Cpu` has an instruction set only if the processor has it. The plan holds to its shapes, which
            // are asserted, and the pool runs each chunk once.
            Isa::Avx512 => unsafe { avx512::$entry($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { avx2::$entry($($arg),*) },
            // SAFETY: as above; nothing is asked of the processor.
            _ => unsafe { portable::$entry($($arg),*) },
        }
    };
}

/// One product over checked shapes.
pub(super) struct Product<'a> {
    /// The weights, transposed or not.
    pub(super) w: &'a Matrix<'a>,
    /// Rows of `x` and `y`.
    pub(super) n_tokens: usize,
    /// The input.
    pub(super) x: &'a [f32],
    /// The output.
    pub(super) y: &'a mut [f32],
    /// Adds to `y` instead of replacing it.
    pub(super) accumulate: bool,
}

/// Buffers of the products, which grow to the largest one and are kept.
#[derive(Debug)]
pub(super) struct GemmScratch {
    /// The input, in the order in which tiles read it.
    packed: Mutex<Buffer>,
    /// One for each thread: converted weights and results.
    slots: Box<[Mutex<Buffer>]>,
}

impl GemmScratch {
    /// For products on `n_threads`.
    pub(super) fn new(n_threads: usize) -> Self {
        Self { packed: Mutex::default(), slots: (0..n_threads).map(|_| Mutex::default()).collect() }
    }

    /// Runs `f` with a slot that nobody else uses. `packed` is locked meanwhile, so there are as many slots as threads.
    fn with_slot(&self, f: impl FnOnce(&mut Buffer)) {
        loop {
            for slot in &self.slots {
                match slot.try_lock() {
                    Ok(mut slot) => return f(&mut slot),
                    Err(TryLockError::Poisoned(slot)) => return f(&mut slot.into_inner()),
                    Err(TryLockError::WouldBlock) => {}
                }
            }
            std::hint::spin_loop();
        }
    }

    /// `y (+)= X Wᵀ`. Shapes: `x (n_tokens, n_cols)`, `y (n_tokens, n_rows)`.
    pub(super) fn matmul(&self, isa: Isa, pool: &Pool, product: Product<'_>) {
        let Product { w, n_tokens, x, y, accumulate } = product;
        let (n_rows, n_cols) = (w.n_rows, w.n_cols);
        assert!(fits(w.data.len(), n_rows, n_cols));
        assert!(fits(x.len(), n_tokens, n_cols) && fits(y.len(), n_tokens, n_rows));
        if y.is_empty() || x.is_empty() {
            // Nothing, or empty sums.
            if !accumulate {
                y.fill(0.0);
            }
            return;
        }
        let (n, n_vecs_tile) = tile_size(isa);
        let n_vecs = n_tokens.div_ceil(n);
        let n_groups = n_rows.div_ceil(GROUP);
        let mut block = (TOKENS_MAX / n).min(n_vecs);
        while block > n_vecs_tile && n_groups * n_vecs.div_ceil(block) < CHUNKS_PER_THREAD * pool.n_threads()
        {
            block = (block / 2).next_multiple_of(n_vecs_tile);
        }
        let n_blocks = n_vecs.div_ceil(block);
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = Plan {
            w: *w,
            n_tokens,
            x,
            packed: Shared::new(packed.get(n_vecs * n * n_cols)),
            y: Shared::new(y),
            accumulate,
            n_threads: pool.n_threads(),
            block,
            outputs: GROUP,
            n_output_chunks: n_groups,
        };
        let n_pack_chunks = n_vecs.div_ceil(n_vecs_tile) * n_cols.div_ceil(PACK_ELEMENTS);
        pool.run(n_pack_chunks, &|chunk| dispatch!(isa, pack, &plan, chunk));
        pool.run(n_groups * n_blocks, &|chunk| {
            self.with_slot(|buffer| dispatch!(isa, matmul_chunk, &plan, chunk, buffer));
        });
    }

    /// `y (+)= X W`. Shapes: `x (n_tokens, n_rows)`, `y (n_tokens, n_cols)`.
    pub(super) fn matmul_t(&self, isa: Isa, pool: &Pool, product: Product<'_>) {
        let Product { w, n_tokens, x, y, accumulate } = product;
        let (n_rows, n_cols) = (w.n_rows, w.n_cols);
        assert!(fits(w.data.len(), n_rows, n_cols));
        assert!(fits(x.len(), n_tokens, n_rows) && fits(y.len(), n_tokens, n_cols));
        if y.is_empty() || x.is_empty() {
            // Nothing, or empty sums.
            if !accumulate {
                y.fill(0.0);
            }
            return;
        }
        let (n, n_vecs_tile) = tile_size(isa);
        let n_panels = n_cols.div_ceil(n * n_vecs_tile);
        let mut block = TOKENS_MAX.min(n_tokens);
        while block > TOKENS_MIN && n_panels * n_tokens.div_ceil(block) < CHUNKS_PER_THREAD * pool.n_threads()
        {
            block = (block / 2).next_multiple_of(TILE_TOKENS);
        }
        let n_blocks = n_tokens.div_ceil(block);
        let n_chunk_panels =
            (n_panels * n_blocks / (CHUNKS_PER_THREAD * pool.n_threads())).clamp(1, PANELS_MAX);
        let n_output_chunks = n_panels.div_ceil(n_chunk_panels);
        let n_k_blocks = n_rows.div_ceil(K_BLOCK);
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = Plan {
            w: *w,
            n_tokens,
            x,
            packed: Shared::new(packed.get(n_k_blocks * n_tokens * K_STRIDE)),
            y: Shared::new(y),
            accumulate,
            n_threads: pool.n_threads(),
            block,
            outputs: n_chunk_panels * n * n_vecs_tile,
            n_output_chunks,
        };
        let plan = &plan;
        pool.run(n_tokens.div_ceil(COPY_TOKENS), &|chunk| {
            for token in chunk * COPY_TOKENS..(chunk * COPY_TOKENS + COPY_TOKENS).min(n_tokens) {
                for (k_block, x) in x[token * n_rows..][..n_rows].chunks(K_BLOCK).enumerate() {
                    // SAFETY: `packed` has a row of K_STRIDE for each block and token; this chunk alone has the token.
                    let row = unsafe { plan.packed.slice((k_block * n_tokens + token) * K_STRIDE, x.len()) };
                    row.copy_from_slice(x);
                }
            }
        });
        pool.run(n_output_chunks * n_blocks, &|chunk| {
            self.with_slot(|buffer| dispatch!(isa, matmul_t_chunk, plan, chunk, buffer));
        });
    }
}

/// True when `len` elements are `n_rows` rows of `n_cols`.
fn fits(len: usize, n_rows: usize, n_cols: usize) -> bool {
    n_rows.checked_mul(n_cols) == Some(len)
}

/// What the chunks of a product share. Chunk i is block `i / n_output_chunks` of the tokens by block
/// `i % n_output_chunks` of the outputs.
struct Plan<'a> {
    w: Matrix<'a>,
    n_tokens: usize,
    x: &'a [f32],
    /// `matmul`: for each tile of token vectors, `(n_cols, tile)`, zeros after the last token.
    /// `matmul_t`: `(n_k_blocks, n_tokens, K_STRIDE)`.
    packed: Shared<f32>,
    y: Shared<f32>,
    accumulate: bool,
    n_threads: usize,
    /// Vectors of tokens (`matmul`) or tokens (`matmul_t`) in a chunk.
    block: usize,
    /// Outputs in a chunk: GROUP rows (`matmul`) or whole panels of columns (`matmul_t`).
    outputs: usize,
    n_output_chunks: usize,
}

/// Floats on cache lines of their own.
#[derive(Debug, Default)]
struct Buffer(Vec<Line>);

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; LINE_BYTES / 4]);

impl Buffer {
    /// `len` floats, of any value.
    fn get(&mut self, len: usize) -> &mut [f32] {
        let n_lines = len.div_ceil(LINE_BYTES / 4);
        if self.0.len() < n_lines {
            self.0 = vec![Line([0.0; LINE_BYTES / 4]); n_lines];
        }
        // SAFETY: a line is nothing but its floats, and the vector has lines for `len` of them.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// Vectors in a row of a tile, chosen so that its sums fill the registers: 32 of AVX-512, 16 elsewhere.
const fn n_vecs_tile<L: Lanes>() -> usize {
    if L::N == 16 { 4 } else { 2 }
}

/// Lanes of a vector and vectors of a tile.
fn tile_size(isa: Isa) -> (usize, usize) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => (Avx512::N, n_vecs_tile::<Avx512>()),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (Avx2::N, n_vecs_tile::<Avx2>()),
        _ => (Portable::N, n_vecs_tile::<Portable>()),
    }
}

macro_rules! entries {
    ($isa:ident, $lanes:ty $(, $feature:literal)?) => {
        mod $isa {
            use super::*;
            /// # Safety
            /// That of [`super::pack`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn pack(plan: &Plan<'_>, chunk: usize) {
                // SAFETY: the caller's promise.
                unsafe { super::pack::<$lanes>(plan, chunk) }
            }
            /// # Safety
            /// That of [`super::matmul_chunk`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn matmul_chunk(plan: &Plan<'_>, chunk: usize, buffer: &mut Buffer) {
                // SAFETY: the caller's promise.
                unsafe { super::matmul_chunk::<$lanes>(plan, chunk, buffer) }
            }
            /// # Safety
            /// That of [`super::matmul_t_chunk`].
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn matmul_t_chunk(plan: &Plan<'_>, chunk: usize, buffer: &mut Buffer) {
                // SAFETY: the caller's promise.
                unsafe { super::matmul_t_chunk::<$lanes>(plan, chunk, buffer) }
            }
        }
    };
}
entries!(portable, Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entries!(avx512, Avx512, "avx512f,avx512bw,avx512vl,avx2,fma,f16c");

/// Packs some summed elements of one tile of tokens.
///
/// # Safety
/// The processor has the instruction set of `L`; `plan` is one of `matmul` for it; no other thread has the chunk.
#[inline(always)]
unsafe fn pack<L: Lanes>(plan: &Plan<'_>, chunk: usize) {
    let n_cols = plan.w.n_cols;
    let n_k_chunks = n_cols.div_ceil(PACK_ELEMENTS);
    let (tile, k0) = (chunk / n_k_chunks, chunk % n_k_chunks * PACK_ELEMENTS);
    let k1 = (k0 + PACK_ELEMENTS).min(n_cols);
    let v0 = tile * n_vecs_tile::<L>();
    let n_vecs = (plan.n_tokens.div_ceil(L::N) - v0).min(n_vecs_tile::<L>());
    let width = n_vecs * L::N;
    for v in 0..n_vecs {
        let t0 = (v0 + v) * L::N;
        let n_valid = (plan.n_tokens - t0).min(L::N);
        let x = &plan.x[t0 * n_cols..][..n_valid * n_cols];
        // SAFETY: the tile's part of `packed` is `(n_cols, width)`, of which this thread alone writes rows k0 to k1;
        // a transpose reads L::N columns, k to k + L::N, of L::N rows of `x`, which has them when n_valid is L::N.
        unsafe {
            let out = plan.packed.get().add(v0 * L::N * n_cols + v * L::N);
            let mut k = k0;
            while n_valid == L::N && k + L::N <= k1 {
                L::transpose(x.as_ptr().add(k), n_cols, out.add(k * width), width);
                k += L::N;
            }
            for k in k..k1 {
                for t in 0..L::N {
                    *out.add(k * width + t) = if t < n_valid { x[t * n_cols + k] } else { 0.0 };
                }
            }
        }
    }
}

/// `dst[r * dst_stride + i] = src[r * src_stride + i]` for `i < n`, and zeros up to the next multiple of `L::N`.
///
/// # Safety
/// The processor has the instruction set of `L`; both sides have `n_rows` such rows.
#[inline(always)]
unsafe fn convert<L: Lanes, T: Element>(
    src: *const T,
    src_stride: usize,
    n_rows: usize,
    n: usize,
    dst: *mut f32,
    dst_stride: usize,
) {
    for r in 0..n_rows {
        // SAFETY: the caller's promise; past the last whole vector of `src` only its n - i elements are read.
        unsafe {
            let (src, dst) = (src.add(r * src_stride), dst.add(r * dst_stride));
            let mut i = 0;
            while i + L::N <= n {
                L::store(dst.add(i), T::load::<L>(src.add(i)));
                i += L::N;
            }
            if i < n {
                L::store(dst.add(i), load_partial::<L, T>(src.add(i), n - i));
            }
        }
    }
}

/// What a tile does with the values that are in its place.
#[derive(Clone, Copy, PartialEq)]
enum Into {
    Set,
    Add,
}

/// `c[r, i] (+)= sum_k v[k, i] * b[r, k]` for `MR` rows of `NV` vectors.
/// Shapes: `v (n_k, NV * L::N)`, `b (MR, K_STRIDE)`, `c (MR, c_stride)`. Calls `prefetch` every K_STEP elements.
///
/// # Safety
/// The processor has the instruction set of `L`; the operands have their shapes, and no other thread has `c`.
#[inline(always)]
unsafe fn tile<L: Lanes, const NV: usize, const MR: usize>(
    n_k: usize,
    v: *const f32,
    b: *const f32,
    c: *mut f32,
    c_stride: usize,
    into: Into,
    prefetch: impl Fn(usize),
) {
    // SAFETY: the caller's promise; k stays below n_k, which is at most K_BLOCK.
    unsafe {
        let mut sums = [[L::splat(0.0); NV]; MR];
        let mut k = 0;
        while k < n_k {
            prefetch(k / K_STEP);
            let end = (k + K_STEP).min(n_k);
            while k < end {
                let mut vs = [L::splat(0.0); NV];
                for (i, vector) in vs.iter_mut().enumerate() {
                    *vector = L::load(v.add((k * NV + i) * L::N));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let b = L::splat(*b.add(r * K_STRIDE + k));
                    for (sum, vector) in sums.iter_mut().zip(vs) {
                        *sum = L::mul_add(vector, b, *sum);
                    }
                }
                k += 1;
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (i, sum) in sums.into_iter().enumerate() {
                let c = c.add(r * c_stride + i * L::N);
                L::store(c, if into == Into::Set { sum } else { L::add(L::load(c), sum) });
            }
        }
    }
}

/// # Safety
/// The processor has the instruction set of `L`; `plan` is one of `matmul` for it; no other thread has the chunk.
#[inline(always)]
unsafe fn matmul_chunk<L: Lanes>(plan: &Plan<'_>, chunk: usize, buffer: &mut Buffer) {
    match plan.w.data {
        // SAFETY: the caller's promise.
        Elements::F32(w) => unsafe { matmul_rows::<L, _>(plan, w, chunk, buffer) },
        // SAFETY: as above.
        Elements::F16(w) => unsafe { matmul_rows::<L, _>(plan, w, chunk, buffer) },
        // SAFETY: as above.
        Elements::Bf16(w) => unsafe { matmul_rows::<L, _>(plan, w, chunk, buffer) },
    }
}

/// # Safety
/// That of [`matmul_chunk`].
#[inline(always)]
unsafe fn matmul_rows<L: Lanes, T: Element>(plan: &Plan<'_>, w: &[T], chunk: usize, buffer: &mut Buffer) {
    let (n_rows, n_cols) = (plan.w.n_rows, plan.w.n_cols);
    let v0 = chunk / plan.n_output_chunks * plan.block;
    let n_vecs = (plan.n_tokens.div_ceil(L::N) - v0).min(plan.block);
    let row0 = chunk % plan.n_output_chunks * plan.outputs;
    let rows = (n_rows - row0).min(GROUP);
    let width = n_vecs * L::N;
    // The transposes at the end read whole vectors of rows.
    let n_sum_rows = GROUP.next_multiple_of(LANES_MAX);
    let (b, sums) = buffer.get(GROUP * K_STRIDE + n_sum_rows * width).split_at_mut(GROUP * K_STRIDE);

    for k0 in (0..n_cols).step_by(K_BLOCK) {
        let n_k = (n_cols - k0).min(K_BLOCK);
        let into = if k0 == 0 { Into::Set } else { Into::Add };
        let src = w[row0 * n_cols + k0..].as_ptr();
        // SAFETY: `rows` rows from row0 have n_k columns from k0; `b` has GROUP rows of K_STRIDE.
        unsafe { convert::<L, T>(src, n_cols, rows, n_k, b.as_mut_ptr(), K_STRIDE) };
        // The next block of these rows; after the last, the first of rows that this thread probably takes next.
        let next = w.as_ptr().wrapping_add(if k0 + K_BLOCK < n_cols {
            row0 * n_cols + k0 + K_BLOCK
        } else {
            (row0 + plan.n_threads * GROUP) * n_cols
        });
        let mut v = 0;
        while v < n_vecs {
            let nv = (n_vecs - v).min(n_vecs_tile::<L>());
            // Rows of `b` past the last hold what an earlier chunk left: their sums are of no use, and stay here.
            macro_rules! tiles {
                ($nv:literal, $mr:literal) => {
                    for r in (0..rows).step_by($mr) {
                        let prefetch = |step: usize| {
                            if v == 0 {
                                for r in r..r + $mr {
                                    prefetch::<L, T>(next.wrapping_add(r * n_cols + step * K_STEP), K_STEP);
                                }
                            }
                        };
                        // SAFETY: a tile of `packed` is `(n_cols, nv * L::N)`, of which this is rows k0 and on;
                        // `b` and `sums` have GROUP rows, a multiple of the tile's height.
                        unsafe {
                            let tokens = plan.packed.get().add((v0 + v) * L::N * n_cols + k0 * $nv * L::N);
                            let b = b.as_ptr().add(r * K_STRIDE);
                            let c = sums.as_mut_ptr().add(r * width + v * L::N);
                            tile::<L, $nv, $mr>(n_k, tokens, b, c, width, into, prefetch);
                        }
                    }
                };
            }
            match (L::N, nv) {
                (16, 4) => tiles!(4, 6),
                (16, 3) => tiles!(3, 8),
                (16, 2) => tiles!(2, 12),
                (16, _) => tiles!(1, 24),
                (_, 2) => tiles!(2, 6),
                _ => tiles!(1, 12),
            }
            v += nv;
        }
    }
    for v in 0..n_vecs {
        let t0 = (v0 + v) * L::N;
        let mut square = [0.0; LANES_MAX * LANES_MAX];
        for row in (0..rows).step_by(L::N) {
            let sums = sums[row * width + v * L::N..].as_ptr();
            // SAFETY: `sums` has n_sum_rows rows, a multiple of L::N; `square` has L::N times L::N.
            unsafe { L::transpose(sums, width, square.as_mut_ptr(), L::N) };
            let n = (rows - row).min(L::N);
            for (t, sums) in square.chunks_exact(L::N).enumerate().take((plan.n_tokens - t0).min(L::N)) {
                // SAFETY: token t0 + t and rows row0 + row to row0 + row + n exist, and are of this chunk alone.
                let y = unsafe { plan.y.slice((t0 + t) * n_rows + row0 + row, n) };
                for (y, sum) in y.iter_mut().zip(sums) {
                    *y = if plan.accumulate { *y + sum } else { *sum };
                }
            }
        }
    }
}

/// # Safety
/// The processor has the instruction set of `L`; `plan` is one of `matmul_t` for it; no other thread has the chunk.
#[inline(always)]
unsafe fn matmul_t_chunk<L: Lanes>(plan: &Plan<'_>, chunk: usize, buffer: &mut Buffer) {
    match plan.w.data {
        // SAFETY: the caller's promise.
        Elements::F32(w) => unsafe { matmul_t_cols::<L, _>(plan, w, chunk, buffer) },
        // SAFETY: as above.
        Elements::F16(w) => unsafe { matmul_t_cols::<L, _>(plan, w, chunk, buffer) },
        // SAFETY: as above.
        Elements::Bf16(w) => unsafe { matmul_t_cols::<L, _>(plan, w, chunk, buffer) },
    }
}

/// # Safety
/// That of [`matmul_t_chunk`].
#[inline(always)]
unsafe fn matmul_t_cols<L: Lanes, T: Element>(plan: &Plan<'_>, w: &[T], chunk: usize, buffer: &mut Buffer) {
    let (n_rows, n_cols) = (plan.w.n_rows, plan.w.n_cols);
    let panel_width = n_vecs_tile::<L>() * L::N;
    let t0 = chunk / plan.n_output_chunks * plan.block;
    let n_tokens = (plan.n_tokens - t0).min(plan.block);
    let col0 = chunk % plan.n_output_chunks * plan.outputs;
    let cols = (n_cols - col0).min(plan.outputs);
    let n_panels = cols.div_ceil(panel_width);
    let panels = buffer.get(n_panels * panel_width * K_BLOCK);

    for k0 in (0..n_rows).step_by(K_BLOCK) {
        let n_k = (n_rows - k0).min(K_BLOCK);
        let into = if k0 == 0 && !plan.accumulate { Into::Set } else { Into::Add };
        for (p, panel) in panels.chunks_exact_mut(panel_width * K_BLOCK).enumerate() {
            let col = p * panel_width;
            let n = (cols - col).min(panel_width);
            let src = w[k0 * n_cols + col0 + col..].as_ptr();
            // SAFETY: rows k0 to k0 + n_k have n columns from col0 + col; the panel is `(K_BLOCK, panel_width)`.
            unsafe { convert::<L, T>(src, n_cols, n_k, n, panel.as_mut_ptr(), panel_width) };
        }
        // The block of rows after this one; after the last, one of the chunk that this thread probably takes next.
        let next = w.as_ptr().wrapping_add(if k0 + K_BLOCK < n_rows {
            (k0 + K_BLOCK) * n_cols + col0
        } else {
            col0 + plan.n_threads * plan.outputs
        });
        // Its rows are spread evenly over the steps of this block's tiles.
        let n_steps = n_k.div_ceil(K_STEP);
        let rows_per_step = n_k.div_ceil(n_panels * n_tokens.div_ceil(TILE_TOKENS) * n_steps);
        let mut n_tiles = 0;
        for (p, panel) in panels.chunks_exact(panel_width * K_BLOCK).enumerate() {
            let col = p * panel_width;
            let n_tile_cols = (cols - col).min(panel_width);
            let mut t = 0;
            while t < n_tokens {
                let prefetch = |step: usize| {
                    let row = (n_tiles * n_steps + step) * rows_per_step;
                    for row in row..(row + rows_per_step).min(K_BLOCK) {
                        prefetch::<L, T>(next.wrapping_add(row * n_cols), n_panels * panel_width);
                    }
                };
                // A tile that overhangs y is made here and copied.
                let mut edge = [0.0; TILE_TOKENS * 4 * LANES_MAX];
                let overhangs = n_tile_cols < panel_width;
                macro_rules! tiles {
                    ($nv:literal, $mr:literal) => {
                        // SAFETY: `packed` has $mr tokens from t0 + t in this block of rows; y has them and the tile's
                        // columns, of this chunk alone, unless it overhangs; `edge` has TILE_TOKENS times a tile row.
                        unsafe {
                            let b = (k0 / K_BLOCK * plan.n_tokens + t0 + t) * K_STRIDE;
                            let b = plan.packed.get().add(b);
                            let v = panel.as_ptr();
                            if overhangs {
                                let c = edge.as_mut_ptr();
                                tile::<L, $nv, $mr>(n_k, v, b, c, panel_width, Into::Set, prefetch);
                            } else {
                                let c = plan.y.get().add((t0 + t) * n_cols + col0 + col);
                                tile::<L, $nv, $mr>(n_k, v, b, c, n_cols, into, prefetch);
                            }
                            $mr
                        }
                    };
                }
                let n = match (L::N, n_tokens - t) {
                    (16, TILE_TOKENS..) => tiles!(4, 6),
                    (16, 4..) => tiles!(4, 4),
                    (16, 2..) => tiles!(4, 2),
                    (16, _) => tiles!(4, 1),
                    (_, TILE_TOKENS..) => tiles!(2, 6),
                    (_, 4..) => tiles!(2, 4),
                    (_, 2..) => tiles!(2, 2),
                    _ => tiles!(2, 1),
                };
                if overhangs {
                    for (r, sums) in edge.chunks_exact(panel_width).enumerate().take(n) {
                        // SAFETY: token t0 + t + r and these columns exist, and are of this chunk alone.
                        let y = unsafe { plan.y.slice((t0 + t + r) * n_cols + col0 + col, n_tile_cols) };
                        for (y, sum) in y.iter_mut().zip(sums) {
                            *y = if into == Into::Set { *sum } else { *y + sum };
                        }
                    }
                }
                t += n;
                n_tiles += 1;
            }
        }
    }
}
