use super::Isa;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Element, LANES_MAX, Lanes, Portable, load_partial};
use crate::{Elements, Matrix};
use std::sync::Mutex;

/// Elements of the summed dimension in a block: each block is one chain of fused multiply-adds from zero, and the
/// blocks are added in ascending order. The same for all instruction sets, so that those with FMA agree bit for bit.
pub(super) const K_BLOCK: usize = 256;
/// Distance of the rows of a broadcast operand; not a power of two, which would map them to the same cache sets.
pub(super) const K_STRIDE: usize = K_BLOCK + 16;
/// Steps between two calls of the prefetch hook.
const K_STEP: usize = 32;
/// Weight rows converted at a time: a multiple of every tile height.
const GROUP: usize = 24;
/// Groups in the largest chunk.
const GROUPS_MAX: usize = 4;
/// Tokens in the largest chunk: K_BLOCK of them stay in a 1 MiB L2.
const TOKENS_MAX: usize = 256;
/// Panels (of `N * NV_MAX` columns) in the largest chunk of `matmul_t`.
const PANELS_MAX: usize = 4;

/// Cache-line aligned floats.
#[derive(Debug, Default)]
pub(super) struct Buffer(Vec<Line>);

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Buffer {
    /// At least `len` floats, of any value.
    pub(super) fn get(&mut self, len: usize) -> *mut f32 {
        let n_lines = len.div_ceil(16);
        if self.0.len() < n_lines {
            self.0 = vec![Line([0.0; 16]); n_lines];
        }
        self.0.as_mut_ptr().cast()
    }
}

/// Buffers of the products, kept between calls.
#[derive(Debug)]
pub(super) struct GemmScratch {
    packed: Mutex<Buffer>,
    slots: Box<[Mutex<Buffer>]>,
}

impl GemmScratch {
    pub(super) fn new(n_threads: usize) -> Self {
        Self { packed: Mutex::default(), slots: (0..n_threads).map(|_| Mutex::default()).collect() }
    }
}

/// Runs `f` with a slot that no other thread uses: there are as many as threads.
pub(super) fn with_slot<T>(slots: &[Mutex<T>], f: impl FnOnce(&mut T)) {
    loop {
        for slot in slots {
            match slot.try_lock() {
                Ok(mut slot) => return f(&mut slot),
                Err(std::sync::TryLockError::Poisoned(slot)) => return f(&mut slot.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) => {}
            }
        }
        std::thread::yield_now();
    }
}

/// `run(n_chunks, body)`.
pub(super) type Run<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Sync));

#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: TODO.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: TODO.
unsafe impl<T> Sync for Shared<T> {}

struct Args<'a> {
    w: Matrix<'a>,
    n_tokens: usize,
    x: *const f32,
    packed: *mut f32,
    y: *mut f32,
    accumulate: bool,
    n_threads: usize,
    /// Vectors of tokens (matmul) or tokens (matmul_t) in a chunk.
    block: usize,
    n_blocks: usize,
    /// Groups (matmul) or panels (matmul_t) in a chunk.
    units: usize,
    n_unit_chunks: usize,
}
// SAFETY: TODO.
unsafe impl Sync for Args<'_> {}

const fn nv_max<L: Lanes>() -> usize {
    if L::N == 16 { 4 } else { 2 }
}

fn lanes(isa: Isa) -> (usize, usize) {
    match isa {
        Isa::Portable => (4, 2),
        Isa::Avx2 => (8, 2),
        Isa::Avx512 => (16, 4),
    }
}

macro_rules! dispatch {
    ($isa:expr, $entry:ident, $($arg:expr),*) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::$entry($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::$entry($($arg),*) },
            _ => unsafe { portable::$entry($($arg),*) },
        }
    };
}

macro_rules! entries {
    ($isa:ident, $lanes:ty $(, $feature:literal)?) => {
        mod $isa {
            use super::*;
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn pack(args: &Args<'_>, task: usize) {
                unsafe { super::pack::<$lanes>(args, task) }
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn matmul(args: &Args<'_>, chunk: usize, buffer: &mut Buffer) {
                unsafe { matmul_chunk::<$lanes>(args, chunk, buffer) }
            }
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn matmul_t(args: &Args<'_>, chunk: usize, buffer: &mut Buffer) {
                unsafe { matmul_t_chunk::<$lanes>(args, chunk, buffer) }
            }
        }
    };
}
entries!(portable, Portable);
#[cfg(target_arch = "x86_64")]
entries!(avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entries!(avx512, Avx512, "avx512f,avx512bw,avx512vl,avx2,fma,f16c");

pub(super) fn matmul(
    isa: Isa,
    n_threads: usize,
    run: Run<'_>,
    scratch: &GemmScratch,
    w: &Matrix<'_>,
    n_tokens: usize,
    x: &[f32],
    y: &mut [f32],
    accumulate: bool,
) {
    if n_tokens == 0 || w.n_rows == 0 {
        return;
    }
    if w.n_cols == 0 {
        // An empty sum.
        if !accumulate {
            y.fill(0.0);
        }
        return;
    }
    let (n, nv_max) = lanes(isa);
    let n_vecs = n_tokens.div_ceil(n);
    let n_groups = w.n_rows.div_ceil(GROUP);
    let mut block = (TOKENS_MAX / n).min(n_vecs);
    while block > nv_max && n_groups * n_vecs.div_ceil(block) < 4 * n_threads {
        block = (block / 2).next_multiple_of(nv_max);
    }
    let n_blocks = n_vecs.div_ceil(block);
    let units = (n_groups * n_blocks / (8 * n_threads)).clamp(1, GROUPS_MAX);
    let mut packed = scratch.packed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let args = Args {
        w: *w,
        n_tokens,
        x: x.as_ptr(),
        packed: packed.get(n_vecs * n * w.n_cols),
        y: y.as_mut_ptr(),
        accumulate,
        n_threads,
        block,
        n_blocks,
        units,
        n_unit_chunks: n_groups.div_ceil(units),
    };
    let n_tiles = n_vecs.div_ceil(nv_max);
    run(n_tiles * w.n_cols.div_ceil(4 * K_BLOCK), &|task| dispatch!(isa, pack, &args, task));
    run(args.n_unit_chunks * n_blocks, &|chunk| {
        with_slot(&scratch.slots, |buffer| dispatch!(isa, matmul, &args, chunk, buffer))
    });
}

pub(super) fn matmul_t(
    isa: Isa,
    n_threads: usize,
    run: Run<'_>,
    scratch: &GemmScratch,
    w_t: &Matrix<'_>,
    n_tokens: usize,
    x: &[f32],
    y: &mut [f32],
    accumulate: bool,
) {
    if n_tokens == 0 || w_t.n_cols == 0 {
        return;
    }
    if w_t.n_rows == 0 {
        // An empty sum.
        if !accumulate {
            y.fill(0.0);
        }
        return;
    }
    let (n, nv_max) = lanes(isa);
    let n_panels = w_t.n_cols.div_ceil(n * nv_max);
    let mut block = TOKENS_MAX.min(n_tokens);
    while block > 48 && n_panels * n_tokens.div_ceil(block) < 4 * n_threads {
        block = (block / 2).next_multiple_of(6);
    }
    let n_blocks = n_tokens.div_ceil(block);
    let units = (n_panels * n_blocks / (8 * n_threads)).clamp(1, PANELS_MAX);
    let mut packed = scratch.packed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let n_k_blocks = w_t.n_rows.div_ceil(K_BLOCK);
    let packed = packed.get(n_k_blocks * n_tokens * K_STRIDE);
    let args = Args {
        w: *w_t,
        n_tokens,
        x: x.as_ptr(),
        packed,
        y: y.as_mut_ptr(),
        accumulate,
        n_threads,
        block,
        n_blocks,
        units,
        n_unit_chunks: n_panels.div_ceil(units),
    };
    let args = &args;
    run(n_tokens.div_ceil(16), &|task| {
        let args = args;
        for token in task * 16..(task * 16 + 16).min(n_tokens) {
            for k_block in 0..n_k_blocks {
                let k0 = k_block * K_BLOCK;
                unsafe {
                    let dst = args.packed.add((k_block * n_tokens + token) * K_STRIDE);
                    args.x
                        .add(token * args.w.n_rows + k0)
                        .copy_to_nonoverlapping(dst, K_BLOCK.min(args.w.n_rows - k0));
                }
            }
        }
    });
    run(args.n_unit_chunks * n_blocks, &|chunk| {
        with_slot(&scratch.slots, |buffer| dispatch!(isa, matmul_t, args, chunk, buffer))
    });
}

/// Tile `v` wide of tokens, from `packed`.
#[inline(always)]
unsafe fn pack<L: Lanes>(args: &Args<'_>, task: usize) {
    unsafe {
        let n_cols = args.w.n_cols;
        let n_k_tasks = n_cols.div_ceil(4 * K_BLOCK);
        let (tile, k0) = (task / n_k_tasks, task % n_k_tasks * 4 * K_BLOCK);
        let k1 = (k0 + 4 * K_BLOCK).min(n_cols);
        let v0 = tile * nv_max::<L>();
        let nv = (args.n_tokens.div_ceil(L::N) - v0).min(nv_max::<L>());
        let width = nv * L::N;
        let out = args.packed.add(v0 * L::N * n_cols);
        for v in 0..nv {
            let t0 = (v0 + v) * L::N;
            let n_valid = (args.n_tokens - t0).min(L::N);
            let x = args.x.add(t0 * n_cols);
            let out = out.add(v * L::N);
            let mut k = k0;
            if n_valid == L::N {
                while k + L::N <= k1 {
                    L::transpose(x.add(k), n_cols, out.add(k * width), width);
                    k += L::N;
                }
            }
            for k in k..k1 {
                for t in 0..L::N {
                    *out.add(k * width + t) = if t < n_valid { *x.add(t * n_cols + k) } else { 0.0 };
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn convert_row<L: Lanes, T: Element>(src: *const T, n: usize, dst: *mut f32) {
    unsafe {
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

/// `dst[r * dst_stride + i] = src[r * src_stride + i]` for `i < n`; writes up to the next multiple of `L::N`.
#[inline(always)]
unsafe fn convert<L: Lanes>(
    src: &Elements<'_>,
    start: usize,
    src_stride: usize,
    n_rows: usize,
    n: usize,
    dst: *mut f32,
    dst_stride: usize,
) {
    unsafe {
        for r in 0..n_rows {
            let dst = dst.add(r * dst_stride);
            let at = start + r * src_stride;
            match src {
                Elements::F32(v) => convert_row::<L, _>(v.as_ptr().add(at), n, dst),
                Elements::F16(v) => convert_row::<L, _>(v.as_ptr().add(at), n, dst),
                Elements::Bf16(v) => convert_row::<L, _>(v.as_ptr().add(at), n, dst),
            }
        }
    }
}

/// What a tile does with `c`.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Into {
    Set,
    Add,
}

#[inline(always)]
pub(super) unsafe fn tile<L: Lanes, const NV: usize, const MR: usize>(
    n_k: usize,
    v: *const f32,
    v_stride: usize,
    b: *const f32,
    c: *mut f32,
    c_stride: usize,
    into: Into,
    prefetch: impl Fn(usize),
) {
    unsafe {
        let zero = L::splat(0.0);
        let mut acc = [[zero; NV]; MR];
        let mut v = v;
        let mut k = 0;
        while k < n_k {
            prefetch(k / K_STEP);
            let end = (k + K_STEP).min(n_k);
            while k < end {
                let mut vs = [zero; NV];
                for i in 0..NV {
                    vs[i] = L::load(v.add(i * L::N));
                }
                for r in 0..MR {
                    let b = L::splat(*b.add(r * K_STRIDE + k));
                    for i in 0..NV {
                        acc[r][i] = L::mul_add(vs[i], b, acc[r][i]);
                    }
                }
                v = v.add(v_stride);
                k += 1;
            }
        }
        for r in 0..MR {
            for i in 0..NV {
                let c = c.add(r * c_stride + i * L::N);
                let sum = if into == Into::Set { acc[r][i] } else { L::add(L::load(c), acc[r][i]) };
                L::store(c, sum);
            }
        }
    }
}

#[inline(always)]
unsafe fn prefetch_rows<L: Lanes>(
    base: *const u8,
    row_bytes: usize,
    n_rows: usize,
    step: usize,
    step_bytes: usize,
) {
    for r in 0..n_rows {
        let line = base.wrapping_add(r * row_bytes + step * step_bytes);
        L::prefetch(line);
        if step_bytes > 64 {
            L::prefetch(line.wrapping_add(64));
        }
    }
}

fn base(e: &Elements<'_>) -> *const u8 {
    match e {
        Elements::F32(v) => v.as_ptr().cast(),
        Elements::F16(v) => v.as_ptr().cast(),
        Elements::Bf16(v) => v.as_ptr().cast(),
    }
}

#[inline(always)]
unsafe fn matmul_chunk<L: Lanes>(args: &Args<'_>, chunk: usize, buffer: &mut Buffer) {
    unsafe {
        let (n_rows, n_cols) = (args.w.n_rows, args.w.n_cols);
        let nv_max = nv_max::<L>();
        let v0 = chunk / args.n_unit_chunks * args.block;
        let n_vecs = (args.n_tokens.div_ceil(L::N) - v0).min(args.block);
        let row0 = chunk % args.n_unit_chunks * args.units * GROUP;
        let rows = (n_rows - row0).min(args.units * GROUP);
        let width = n_vecs * L::N;
        // The last transpose of c may read up to LANES_MAX rows past it.
        let b = buffer.get(GROUP * K_STRIDE + (args.units * GROUP).next_multiple_of(LANES_MAX) * width);
        let c = b.add(GROUP * K_STRIDE);
        let element_bytes = args.w.data.element_bytes();
        let row_bytes = n_cols * element_bytes;
        let data = base(&args.w.data);

        let mut k0 = 0;
        while k0 < n_cols {
            let n_k = (n_cols - k0).min(K_BLOCK);
            let into = if k0 == 0 { Into::Set } else { Into::Add };
            let mut row = 0;
            while row < rows {
                let n_group = (rows - row).min(GROUP);
                convert::<L>(&args.w.data, (row0 + row) * n_cols + k0, n_cols, n_group, n_k, b, K_STRIDE);
                let (next_row, next_k) = if row + GROUP < rows {
                    (row0 + row + GROUP, k0)
                } else if k0 + K_BLOCK < n_cols {
                    (row0, k0 + K_BLOCK)
                } else {
                    (row0 + args.n_threads * args.units * GROUP, 0)
                };
                let next = data.wrapping_add(next_row * row_bytes + next_k * element_bytes);
                let mut v = 0;
                while v < n_vecs {
                    let nv = (n_vecs - v).min(nv_max);
                    let panel = args.packed.add((v0 + v) * L::N * n_cols + k0 * nv * L::N);
                    let c = c.add(row * width + v * L::N);
                    let n_prefetch = usize::from(v == 0);
                    macro_rules! tiles {
                        ($nv:literal, $mr:literal) => {{
                            let mut r = 0;
                            while r < n_group {
                                tile::<L, $nv, $mr>(
                                    n_k,
                                    panel,
                                    $nv * L::N,
                                    b.add(r * K_STRIDE),
                                    c.add(r * width),
                                    width,
                                    into,
                                    |step| {
                                        prefetch_rows::<L>(
                                            next.wrapping_add(r * row_bytes),
                                            row_bytes,
                                            n_prefetch * $mr,
                                            step,
                                            K_STEP * element_bytes,
                                        )
                                    },
                                );
                                r += $mr;
                            }
                        }};
                    }
                    if L::N == 16 {
                        match nv {
                            4 => tiles!(4, 6),
                            3 => tiles!(3, 8),
                            2 => tiles!(2, 12),
                            _ => tiles!(1, 24),
                        }
                    } else {
                        match nv {
                            2 => tiles!(2, 6),
                            _ => tiles!(1, 12),
                        }
                    }
                    v += nv;
                }
                row += GROUP;
            }
            k0 += K_BLOCK;
        }

        // Rows of c become columns of y.
        let mut square = [0.0f32; 256];
        for v in 0..n_vecs {
            let t0 = (v0 + v) * L::N;
            let n_t = (args.n_tokens - t0).min(L::N);
            let mut row = 0;
            while row < rows {
                let n_r = (rows - row).min(L::N);
                L::transpose(c.add(row * width + v * L::N), width, square.as_mut_ptr(), L::N);
                for t in 0..n_t {
                    let y = args.y.add((t0 + t) * n_rows + row0 + row);
                    let s = square.as_ptr().add(t * L::N);
                    if n_r == L::N {
                        let s = L::load(s);
                        L::store(y, if args.accumulate { L::add(L::load(y), s) } else { s });
                    } else {
                        for r in 0..n_r {
                            *y.add(r) = if args.accumulate { *y.add(r) + *s.add(r) } else { *s.add(r) };
                        }
                    }
                }
                row += L::N;
            }
        }
    }
}

#[inline(always)]
unsafe fn matmul_t_chunk<L: Lanes>(args: &Args<'_>, chunk: usize, buffer: &mut Buffer) {
    unsafe {
        let (n_rows, n_cols) = (args.w.n_rows, args.w.n_cols);
        let panel_width = nv_max::<L>() * L::N;
        let t0 = chunk / args.n_unit_chunks * args.block;
        let n_tokens = (args.n_tokens - t0).min(args.block);
        let col0 = chunk % args.n_unit_chunks * args.units * panel_width;
        let cols = (n_cols - col0).min(args.units * panel_width);
        let n_panels = cols.div_ceil(panel_width);
        let panels = buffer.get(n_panels * panel_width * K_BLOCK);
        let element_bytes = args.w.data.element_bytes();
        let row_bytes = n_cols * element_bytes;
        let data = base(&args.w.data);

        let n_calls = n_panels * n_tokens.div_ceil(6);
        let mut k0 = 0;
        while k0 < n_rows {
            let n_k = (n_rows - k0).min(K_BLOCK);
            let into = if k0 == 0 && !args.accumulate { Into::Set } else { Into::Add };
            for p in 0..n_panels {
                let n = (cols - p * panel_width).min(panel_width);
                convert::<L>(
                    &args.w.data,
                    k0 * n_cols + col0 + p * panel_width,
                    n_cols,
                    n_k,
                    n,
                    panels.add(p * panel_width * K_BLOCK),
                    panel_width,
                );
            }
            let next = if k0 + K_BLOCK < n_rows {
                data.wrapping_add((k0 + K_BLOCK) * row_bytes + col0 * element_bytes)
            } else {
                data.wrapping_add((col0 + args.n_threads * args.units * panel_width) * element_bytes)
            };
            let n_steps = n_k.div_ceil(K_STEP);
            let rows_per_step = n_k.div_ceil(n_calls * n_steps);
            let n_lines = (n_panels * panel_width * element_bytes).div_ceil(64);
            let mut call = 0;
            for p in 0..n_panels {
                let panel = panels.add(p * panel_width * K_BLOCK);
                let col = p * panel_width;
                let full = cols - col >= panel_width;
                let mut t = 0;
                while t < n_tokens {
                    let b = args.packed.add((k0 / K_BLOCK * args.n_tokens + t0 + t) * K_STRIDE);
                    let y = args.y.add((t0 + t) * n_cols + col0 + col);
                    let prefetch = |step: usize| {
                        let row = (call * n_steps + step) * rows_per_step;
                        if row < K_BLOCK {
                            for r in row..row + rows_per_step {
                                for line in 0..n_lines {
                                    L::prefetch(next.wrapping_add(r * row_bytes + line * 64));
                                }
                            }
                        }
                    };
                    let mut edge = [0.0f32; 6 * 64];
                    let (c, c_stride, c_into) =
                        if full { (y, n_cols, into) } else { (edge.as_mut_ptr(), panel_width, Into::Set) };
                    macro_rules! tiles {
                        ($nv:literal, $mr:literal) => {{
                            tile::<L, $nv, $mr>(n_k, panel, panel_width, b, c, c_stride, c_into, prefetch);
                            $mr
                        }};
                    }
                    let n = if L::N == 16 {
                        match n_tokens - t {
                            6.. => tiles!(4, 6),
                            4.. => tiles!(4, 4),
                            2.. => tiles!(4, 2),
                            _ => tiles!(4, 1),
                        }
                    } else {
                        match n_tokens - t {
                            6.. => tiles!(2, 6),
                            4.. => tiles!(2, 4),
                            2.. => tiles!(2, 2),
                            _ => tiles!(2, 1),
                        }
                    };
                    if !full {
                        for r in 0..n {
                            for i in 0..cols - col {
                                let y = y.add(r * n_cols + i);
                                let s = edge[r * panel_width + i];
                                *y = if into == Into::Set { s } else { *y + s };
                            }
                        }
                    }
                    t += n;
                    call += 1;
                }
            }
            k0 += K_BLOCK;
        }
    }
}
