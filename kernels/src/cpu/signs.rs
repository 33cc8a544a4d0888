//! Sign words of an input, and how many signs of a weight row disagree with them.
//!
//! Computes   words bit c = x[c] < 0; n_neg[r] = sum_w popcount(row[r][w] ^ x_words[w])
//! Source     SparseInfer, arXiv 2411.12692, section 3
//! Reference  reference::sign_pack, reference::n_neg; equal bit for bit
//! Shapes     x (n_cols,) f32; rows (n_rows, n_words) u32 row-major; x_words (n_words,)
//! Needs      n_rows <= GROUP
//! Lanes      AVX-512: 16 words at a time, VPOPCNTDQ, and one transposed sum for 16 rows; else 64-bit POPCNT
//! Tail       AVX-512: masked loads; else one 32-bit word

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Lanes, Portable};

/// Rows that [`Signs::n_neg`] counts at most.
pub(super) const GROUP: usize = 16;

/// The sign operations of an instruction set.
///
/// # Safety
/// As for [`Lanes`]; POPCNT belongs to AVX2, VPOPCNTDQ to AVX-512.
pub(super) trait Signs: Lanes {
    /// Bit `i` is `x[i] < 0` for [`Lanes::N`] values.
    unsafe fn below_zero(x: *const f32) -> u32;
    /// `n_neg[r]` for `n_rows <= GROUP` rows of `n_words`, one after the other.
    unsafe fn n_neg(rows: *const u32, n_rows: usize, n_words: usize, x_words: *const u32, n_neg: *mut u32);
}

/// Sign words of `x (n,)`.
///
/// # Safety
/// `n` readable values, room for `n.div_ceil(32)` words, and the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn sign_pack<L: Signs>(x: *const f32, n: usize, words: *mut u32) {
    // SAFETY: vectors and single values lie below n, words below n.div_ceil(32).
    unsafe {
        for word_idx in 0..n.div_ceil(32) {
            let (mut word, start) = (0, word_idx * 32);
            let n_bits = (n - start).min(32);
            let mut bit = 0;
            while bit + L::N <= n_bits {
                word |= L::below_zero(x.add(start + bit)) << bit;
                bit += L::N;
            }
            while bit < n_bits {
                word |= u32::from(*x.add(start + bit) < 0.0) << bit;
                bit += 1;
            }
            *words.add(word_idx) = word;
        }
    }
}

/// [`Signs::n_neg`] with 64-bit counts; POPCNT when the caller has it.
///
/// # Safety
/// That of [`Signs::n_neg`].
#[inline(always)]
unsafe fn n_neg_scalar(
    rows: *const u32,
    n_rows: usize,
    n_words: usize,
    x_words: *const u32,
    n_neg: *mut u32,
) {
    // SAFETY: pairs and the last word lie below n_words, rows below n_rows.
    unsafe {
        for r in 0..n_rows {
            let row = rows.add(r * n_words);
            let mut n = 0;
            for pair in 0..n_words / 2 {
                let a = row.add(2 * pair).cast::<u64>().read_unaligned();
                let b = x_words.add(2 * pair).cast::<u64>().read_unaligned();
                n += (a ^ b).count_ones();
            }
            if n_words % 2 == 1 {
                n += (*row.add(n_words - 1) ^ *x_words.add(n_words - 1)).count_ones();
            }
            *n_neg.add(r) = n;
        }
    }
}

impl Signs for Portable {
    #[inline(always)]
    unsafe fn below_zero(x: *const f32) -> u32 {
        // SAFETY: the caller promises four readable values.
        let x = unsafe { x.cast::<[f32; 4]>().read_unaligned() };
        (0..4).fold(0, |word, bit| word | u32::from(x[bit] < 0.0) << bit)
    }
    #[inline(always)]
    unsafe fn n_neg(rows: *const u32, n_rows: usize, n_words: usize, x_words: *const u32, n_neg: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { n_neg_scalar(rows, n_rows, n_words, x_words, n_neg) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Signs for Avx2 {
    #[inline(always)]
    unsafe fn below_zero(x: *const f32) -> u32 {
        use std::arch::x86_64::*;
        // SAFETY: the caller promises the instruction set and eight readable values.
        unsafe {
            let below = _mm256_cmp_ps::<_CMP_LT_OQ>(_mm256_loadu_ps(x), _mm256_setzero_ps());
            _mm256_movemask_ps(below) as u32
        }
    }
    #[inline(always)]
    unsafe fn n_neg(rows: *const u32, n_rows: usize, n_words: usize, x_words: *const u32, n_neg: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { n_neg_scalar(rows, n_rows, n_words, x_words, n_neg) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Signs for Avx512 {
    #[inline(always)]
    unsafe fn below_zero(x: *const f32) -> u32 {
        use std::arch::x86_64::*;
        // SAFETY: the caller promises the instruction set and sixteen readable values.
        unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_loadu_ps(x), _mm512_setzero_ps())) }
    }
    #[inline(always)]
    unsafe fn n_neg(rows: *const u32, n_rows: usize, n_words: usize, x_words: *const u32, n_neg: *mut u32) {
        use std::arch::x86_64::*;
        // SAFETY: the caller promises the instruction set; full vectors end below n_words, the mask of the last one
        // stops there; rows past n_rows are not read and their sums not copied.
        unsafe {
            // Counts are added as floats, which is exact below 2^24.
            if n_words >= 1 << 19 {
                return n_neg_scalar(rows, n_rows, n_words, x_words, n_neg);
            }
            let tail = (1u16 << (n_words % 16)) - 1;
            let n_full = n_words / 16 * 16;
            let mut counts = [_mm512_setzero_ps(); GROUP];
            for (r, count) in counts.iter_mut().enumerate().take(n_rows) {
                let row = rows.add(r * n_words).cast::<i32>();
                let x_words = x_words.cast::<i32>();
                let mut sum = _mm512_setzero_si512();
                let mut word = 0;
                while word < n_full {
                    let a = _mm512_loadu_si512(row.add(word).cast());
                    let b = _mm512_loadu_si512(x_words.add(word).cast());
                    sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(a, b)));
                    word += 16;
                }
                if tail != 0 {
                    let a = _mm512_maskz_loadu_epi32(tail, row.add(word));
                    let b = _mm512_maskz_loadu_epi32(tail, x_words.add(word));
                    sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(a, b)));
                }
                *count = _mm512_cvtepi32_ps(sum);
            }
            let mut sums = [0.0f32; GROUP];
            Self::sums(&counts, sums.as_mut_ptr());
            for (r, sum) in sums.iter().enumerate().take(n_rows) {
                *n_neg.add(r) = *sum as u32;
            }
        }
    }
}
