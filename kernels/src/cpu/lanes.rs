//! Vectors of f32 under one name for each instruction set, so that a kernel is written once.
//!
//! A generic body is `#[inline(always)]` and is called from a thin entry that carries the `#[target_feature]`
//! attributes; there the intrinsics below become single instructions. Idea: memchr's `Vector` trait.

use half::{bf16, f16};

/// Longest vector of any instruction set.
pub(super) const LANES_MAX: usize = 16;

/// Operations on [`Lanes::N`] values at once.
///
/// # Safety
/// Every method asks that the processor has the instruction set of the implementor; those that take a pointer ask
/// that the `N` elements (or what they say) behind it are readable, or writable. No alignment is asked.
pub(super) trait Lanes {
    /// Values in a vector; at most [`LANES_MAX`].
    const N: usize;
    /// The register type.
    type V: Copy;
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self::V;
    /// `N` values.
    unsafe fn load(src: *const f32) -> Self::V;
    /// `N` values, exact.
    unsafe fn load_f16(src: *const f16) -> Self::V;
    /// `N` values, exact.
    unsafe fn load_bf16(src: *const bf16) -> Self::V;
    /// Writes `N` values.
    unsafe fn store(dst: *mut f32, v: Self::V);
    /// `a + b`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the instruction set has it.
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`, which is `b` when either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Adds the low bits of `n` to the exponent of `v`: with `n = 1.5 * 2^23 + i` the result is `v * 2^i`.
    unsafe fn scale_exponent(v: Self::V, n: Self::V) -> Self::V;
    /// `dst[i] = sum of the lanes of v[i]` for `N` vectors, all in the same order of addition. `dst` holds `N`.
    unsafe fn sums(v: &[Self::V], dst: *mut f32);
    /// The sum of the lanes, always in the same order of addition.
    unsafe fn sum(v: Self::V) -> f32;
    /// `dst[j * dst_stride + i] = src[i * src_stride + j]` for `i, j < N`.
    unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize);
    /// Asks for the cache line of `src`, which may be any address.
    fn prefetch(src: *const u8);
}

/// Bytes of a cache line.
pub(super) const LINE_BYTES: usize = 64;

/// Asks for the cache lines of `n` elements at `src`, which may be any address.
#[inline(always)]
pub(super) fn prefetch<L: Lanes, T>(src: *const T, n: usize) {
    for line in 0..(n * size_of::<T>()).div_ceil(LINE_BYTES) {
        L::prefetch(src.cast::<u8>().wrapping_add(line * LINE_BYTES));
    }
}

/// A weight type that [`Lanes`] can load.
pub(super) trait Element: Copy + Sync {
    /// Zero.
    const ZERO: Self;
    /// `L::N` values as f32.
    ///
    /// # Safety
    /// That of [`Lanes::load`].
    unsafe fn load<L: Lanes>(src: *const Self) -> L::V;
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    unsafe fn load<L: Lanes>(src: *const Self) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { L::load(src) }
    }
}

impl Element for f16 {
    const ZERO: Self = f16::ZERO;
    #[inline(always)]
    unsafe fn load<L: Lanes>(src: *const Self) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { L::load_f16(src) }
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    unsafe fn load<L: Lanes>(src: *const Self) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16(src) }
    }
}

/// The first `n <= L::N` elements as f32, zeros after them; reads nothing past them.
///
/// # Safety
/// `n` readable elements at `src`; the processor has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn load_partial<L: Lanes, T: Element>(src: *const T, n: usize) -> L::V {
    // SAFETY: a full vector is read only when `n` says it is there; else from a buffer that holds LANES_MAX.
    unsafe {
        if n == L::N {
            return T::load::<L>(src);
        }
        let mut lanes = [T::ZERO; LANES_MAX];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            *lane = *src.add(i);
        }
        T::load::<L>(lanes.as_ptr())
    }
}

/// Writes the first `n <= L::N` values of `v`, and nothing past them.
///
/// # Safety
/// Room for `n` values at `dst`; the processor has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn store_partial<L: Lanes>(dst: *mut f32, n: usize, v: L::V) {
    // SAFETY: a full vector is written only when `n` says there is room; else to a buffer that holds LANES_MAX.
    unsafe {
        if n == L::N {
            return L::store(dst, v);
        }
        let mut lanes = [0.0; LANES_MAX];
        L::store(lanes.as_mut_ptr(), v);
        for (i, lane) in lanes.iter().enumerate().take(n) {
            *dst.add(i) = *lane;
        }
    }
}

/// Four values and no intrinsics.
pub(super) struct Portable;

impl Lanes for Portable {
    const N: usize = 4;
    type V = [f32; 4];

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn load(src: *const f32) -> Self::V {
        // SAFETY: the caller promises four readable values.
        unsafe { src.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(src: *const f16) -> Self::V {
        // SAFETY: the caller promises four readable values.
        unsafe { src.cast::<[f16; 4]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self::V {
        // SAFETY: the caller promises four readable values.
        unsafe { src.cast::<[u16; 4]>().read_unaligned() }.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn store(dst: *mut f32, v: Self::V) {
        // SAFETY: the caller promises room for four values.
        unsafe { dst.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]]
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        [a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]]
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        [a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]]
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        [a[0] * b[0] + c[0], a[1] * b[1] + c[1], a[2] * b[2] + c[2], a[3] * b[3] + c[3]]
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        let max = |a: f32, b: f32| if a > b { a } else { b };
        [max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
    }
    #[inline(always)]
    unsafe fn scale_exponent(v: Self::V, n: Self::V) -> Self::V {
        let scale = |v: f32, n: f32| f32::from_bits(v.to_bits().wrapping_add(n.to_bits() << 23));
        [scale(v[0], n[0]), scale(v[1], n[1]), scale(v[2], n[2]), scale(v[3], n[3])]
    }
    #[inline(always)]
    unsafe fn sums(v: &[Self::V], dst: *mut f32) {
        let sum = |v: [f32; 4]| (v[0] + v[2]) + (v[1] + v[3]);
        // SAFETY: the caller promises room for four values.
        unsafe { Self::store(dst, [sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])]) }
    }
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        for i in 0..4 {
            for j in 0..4 {
                // SAFETY: the caller promises both 4 x 4 blocks.
                unsafe { *dst.add(j * dst_stride + i) = *src.add(i * src_stride + j) }
            }
        }
    }
    #[inline(always)]
    fn prefetch(_: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, bf16, f16};
    use std::arch::x86_64::*;

    /// Eight values: AVX2, FMA, F16C.
    pub(in crate::cpu) struct Avx2;

    // In this implementation each block's intrinsics need AVX2, FMA or F16C, which the caller promises, and reach no
    // memory but the pointers of the call.
    impl Lanes for Avx2 {
        const N: usize = 8;
        type V = __m256;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(src: *const f32) -> Self::V {
            // SAFETY: the caller promises the instruction set and eight readable values.
            unsafe { _mm256_loadu_ps(src) }
        }
        #[inline(always)]
        unsafe fn load_f16(src: *const f16) -> Self::V {
            // SAFETY: the caller promises the instruction set and eight readable values.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(src: *const bf16) -> Self::V {
            // SAFETY: the caller promises the instruction set and eight readable values.
            unsafe {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
        #[inline(always)]
        unsafe fn store(dst: *mut f32, v: Self::V) {
            // SAFETY: the caller promises the instruction set and room for eight values.
            unsafe { _mm256_storeu_ps(dst, v) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn scale_exponent(v: Self::V, n: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe {
                let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), n))
            }
        }
        #[inline(always)]
        unsafe fn sums(v: &[Self::V], dst: *mut f32) {
            // SAFETY: the caller promises the instruction set and room for eight values.
            unsafe {
                // Each step halves the number of vectors; lanes (i, i + 2), then (i, i + 1), then 128-bit halves.
                let a = fold4_256(v[0], v[1], v[2], v[3]);
                let b = fold4_256(v[4], v[5], v[6], v[7]);
                let (lo, hi) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
                _mm256_storeu_ps(dst, _mm256_add_ps(lo, hi));
            }
        }
        #[inline(always)]
        unsafe fn sum(v: Self::V) -> f32 {
            // SAFETY: the caller promises the instruction set.
            unsafe {
                let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
            }
        }
        #[inline(always)]
        unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
            // SAFETY: the caller promises the instruction set and both 8 x 8 blocks.
            unsafe {
                // A 4 x 4 transpose in each 128-bit half of four rows at a time: cols[4 g + j] then holds, in half p,
                // rows 4 g .. 4 g + 4 of column 4 p + j.
                let mut cols = [_mm256_setzero_ps(); 8];
                for group in 0..2 {
                    let row = src.add(4 * group * src_stride);
                    let (a, b) = (_mm256_loadu_ps(row), _mm256_loadu_ps(row.add(src_stride)));
                    let row = row.add(2 * src_stride);
                    let (c, d) = (_mm256_loadu_ps(row), _mm256_loadu_ps(row.add(src_stride)));
                    let (ab_lo, ab_hi) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                    let (cd_lo, cd_hi) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                    cols[4 * group] = _mm256_shuffle_ps::<0x44>(ab_lo, cd_lo);
                    cols[4 * group + 1] = _mm256_shuffle_ps::<0xee>(ab_lo, cd_lo);
                    cols[4 * group + 2] = _mm256_shuffle_ps::<0x44>(ab_hi, cd_hi);
                    cols[4 * group + 3] = _mm256_shuffle_ps::<0xee>(ab_hi, cd_hi);
                }
                for j in 0..4 {
                    let (lo, hi) = (cols[j], cols[j + 4]);
                    _mm256_storeu_ps(dst.add(j * dst_stride), _mm256_permute2f128_ps::<0x20>(lo, hi));
                    _mm256_storeu_ps(dst.add((j + 4) * dst_stride), _mm256_permute2f128_ps::<0x31>(lo, hi));
                }
            }
        }
        #[inline(always)]
        fn prefetch(src: *const u8) {
            // SAFETY: a prefetch reads nothing, faults nowhere, and SSE is in every x86_64.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(src.cast()) }
        }
    }

    /// Sixteen values: AVX-512 F, BW, VL.
    pub(in crate::cpu) struct Avx512;

    impl Lanes for Avx512 {
        const N: usize = 16;
        type V = __m512;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(src: *const f32) -> Self::V {
            // SAFETY: the caller promises the instruction set and sixteen readable values.
            unsafe { _mm512_loadu_ps(src) }
        }
        #[inline(always)]
        unsafe fn load_f16(src: *const f16) -> Self::V {
            // SAFETY: the caller promises the instruction set and sixteen readable values.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(src: *const bf16) -> Self::V {
            // SAFETY: the caller promises the instruction set and sixteen readable values.
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
        #[inline(always)]
        unsafe fn store(dst: *mut f32, v: Self::V) {
            // SAFETY: the caller promises the instruction set and room for sixteen values.
            unsafe { _mm512_storeu_ps(dst, v) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn scale_exponent(v: Self::V, n: Self::V) -> Self::V {
            // SAFETY: the caller promises the instruction set.
            unsafe {
                let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
                _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), n))
            }
        }
        #[inline(always)]
        unsafe fn sums(v: &[Self::V], dst: *mut f32) {
            // SAFETY: the caller promises the instruction set and room for sixteen values.
            unsafe {
                // Each step halves the number of vectors; lanes (i, i + 2), then (i, i + 1), then 128-bit parts
                // (i, i + 1), then (i, i + 2).
                let a = fold4_512(v[0], v[1], v[2], v[3]);
                let b = fold4_512(v[4], v[5], v[6], v[7]);
                let c = fold4_512(v[8], v[9], v[10], v[11]);
                let d = fold4_512(v[12], v[13], v[14], v[15]);
                _mm512_storeu_ps(dst, parts_512(parts_512(a, b), parts_512(c, d)));
            }
        }
        #[inline(always)]
        unsafe fn sum(v: Self::V) -> f32 {
            // SAFETY: the caller promises the instruction set, of which AVX2 is a part.
            unsafe {
                let hi = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
                Avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(v), hi))
            }
        }
        #[inline(always)]
        unsafe fn transpose(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
            // SAFETY: the caller promises the instruction set and both 16 x 16 blocks.
            unsafe {
                // A 4 x 4 transpose in each 128-bit part of four rows at a time: cols[4 g + j] then holds, in part p,
                // rows 4 g .. 4 g + 4 of column 4 p + j.
                let mut cols = [_mm512_setzero_ps(); 16];
                for group in 0..4 {
                    let row = src.add(4 * group * src_stride);
                    let (a, b) = (_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(src_stride)));
                    let row = row.add(2 * src_stride);
                    let (c, d) = (_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(src_stride)));
                    let (ab_lo, ab_hi) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                    let (cd_lo, cd_hi) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                    cols[4 * group] = _mm512_shuffle_ps::<0x44>(ab_lo, cd_lo);
                    cols[4 * group + 1] = _mm512_shuffle_ps::<0xee>(ab_lo, cd_lo);
                    cols[4 * group + 2] = _mm512_shuffle_ps::<0x44>(ab_hi, cd_hi);
                    cols[4 * group + 3] = _mm512_shuffle_ps::<0xee>(ab_hi, cd_hi);
                }
                // A 4 x 4 transpose of the 128-bit parts.
                for j in 0..4 {
                    let (a, b) = (cols[j], cols[4 + j]);
                    let (c, d) = (cols[8 + j], cols[12 + j]);
                    let (ab_lo, ab_hi) =
                        (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
                    let (cd_lo, cd_hi) =
                        (_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
                    let (dst, step) = (dst.add(j * dst_stride), 4 * dst_stride);
                    _mm512_storeu_ps(dst, _mm512_shuffle_f32x4::<0x88>(ab_lo, cd_lo));
                    _mm512_storeu_ps(dst.add(step), _mm512_shuffle_f32x4::<0xdd>(ab_lo, cd_lo));
                    _mm512_storeu_ps(dst.add(2 * step), _mm512_shuffle_f32x4::<0x88>(ab_hi, cd_hi));
                    _mm512_storeu_ps(dst.add(3 * step), _mm512_shuffle_f32x4::<0xdd>(ab_hi, cd_hi));
                }
            }
        }
        #[inline(always)]
        fn prefetch(src: *const u8) {
            // SAFETY: a prefetch reads nothing, faults nowhere, and SSE is in every x86_64.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(src.cast()) }
        }
    }

    /// Part p of lane i: the sum of part p of the i-th argument, `(v0 + v2) + (v1 + v3)`.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn fold4_256(a: __m256, b: __m256, c: __m256, d: __m256) -> __m256 {
        // SAFETY: the caller promises the instruction set.
        unsafe {
            let ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
            let cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
            _mm256_add_ps(
                _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
            )
        }
    }

    /// As [`fold4_256`].
    ///
    /// # Safety
    /// The processor has AVX-512F.
    #[inline(always)]
    unsafe fn fold4_512(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
        // SAFETY: the caller promises the instruction set.
        unsafe {
            let ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
            let cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
            _mm512_add_ps(
                _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
            )
        }
    }

    /// Sums of neighbouring 128-bit parts: those of `a`, then those of `b`.
    ///
    /// # Safety
    /// The processor has AVX-512F.
    #[inline(always)]
    unsafe fn parts_512(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller promises the instruction set.
        unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)) }
    }
}
