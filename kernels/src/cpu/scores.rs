//! An input in 8 bits, and its products with rows in one to three bits.
//!
//! Computes   q[c] = round(x[c] * scale), scale = 127 / max |x|
//!            score[r] = sum_c w[r][c] q[c] with w = sum_p 2^(P - 1 - p) (1 - 2 bit_p)
//!                     = (2^P - 1) sum q - 2 sum_p 2^(P - 1 - p) sum_{c: bit_p[r][c] = 1} q[c]
//! Reference  reference::quantise, reference::score; equal bit for bit
//! Shapes     x (n_cols,) f32; planes (n_rows, n_words) u32 each, row-major; q (n_words * 32 rounded up to Q_MULTIPLE,)
//! Needs      n_rows <= GROUP, at most PLANES_MAX planes, q zero from n_cols on, so that no bit there counts
//! Lanes      AVX-512: 64 columns, lane b counts (VPOPCNTQ) what they share with the ones of bit b of q, worth 2^b, bit 7
//!            -128; AVX2: 32 columns, bits spread to bytes, VPMADDUBSW adds two products to 16 bits; else bytes by a table
//! Tail       AVX-512: the last odd word as one of 64 bits; else none, words are whole
//! Many       inputs at once on AVX-512 go through `score_batch`
//! Measured   one core of an EPYC (Zen 5), 4096 columns in L2: 12 ns a row, where bits as the mask of a load of q, which
//!            VPDPBUSD adds, took 22; by instruction tables the two are level on Sapphire Rapids

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Lanes, Portable};
use super::signs::GROUP;
use crate::PLANES_MAX;

/// Length of a quantised input is a multiple of this.
pub(super) const Q_MULTIPLE: usize = 64;

/// Elements of the buffer that [`quantise`] fills for `n_cols` columns.
pub(super) fn q_len(n_cols: usize) -> usize {
    n_cols.next_multiple_of(Q_MULTIPLE)
}

/// An input in 8 bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quantised<'a> {
    /// Zero from the last column on; in order, or as [`Scores::arrange`] leaves it.
    pub(super) q: &'a [i8],
    /// `127 / max |x|`, or 0.
    pub(super) scale: f32,
    /// `sum q`.
    pub(super) total: i32,
}

/// Fills `q`, which holds [`q_len`] elements, with `x` in 8 bits, in order.
pub(super) fn quantise<'q>(x: &[f32], q: &'q mut [i8]) -> Quantised<'q> {
    /// Adding it leaves the nearest integer, halves to even, in the low bits of a sum below 2^22.
    const ROUND: f32 = 12_582_912.0;
    // Magnitudes compare as their bits do, NaN above all.
    let max = f32::from_bits(x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff)));
    let scale = 127.0 / max;
    q.fill(0);
    if !(scale > 0.0 && scale.is_finite()) {
        return Quantised { q, scale: 0.0, total: 0 };
    }
    let mut total = 0;
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * scale + ROUND).to_bits() as i8;
        total += i32::from(*q);
    }
    Quantised { q, scale, total }
}

/// The score operations of an instruction set.
///
/// # Safety
/// As for [`Lanes`]; AVX-512 has VPOPCNTDQ.
pub(super) trait Scores: Lanes {
    /// Brings values in order, a multiple of [`Q_MULTIPLE`], into that in which `negative_sums` reads them.
    unsafe fn arrange(_q: &mut [i8]) {}

    /// `sums[r] = sum_p 2^(P - 1 - p) sum_{c: bit_p[r][c] = 1} q[c]` for `n_rows <= GROUP` rows of `n_words`, one after
    /// the other in each of the P planes; `q`, arranged, holds 32 values a word, rounded up to [`Q_MULTIPLE`].
    unsafe fn negative_sums<const P: usize>(
        planes: [*const u32; P],
        n_rows: usize,
        n_words: usize,
        q: *const i8,
        sums: *mut i32,
    );
}

/// Scores of `n_rows <= GROUP` rows, the first of them row `row0` of `planes`.
///
/// # Safety
/// The rows lie in every plane, `x` was quantised for their columns, and the processor has the instruction set of `L`.
#[inline(always)]
pub(super) unsafe fn scores<L: Scores>(
    planes: &crate::BitPlanes<'_>,
    row0: usize,
    n_rows: usize,
    x: &Quantised<'_>,
) -> [i32; GROUP] {
    let n_words = planes.signs.n_words;
    let plane = |idx: usize| planes.plane(idx).as_ptr().wrapping_add(row0 * n_words);
    let (q, mut sums) = (x.q.as_ptr(), [0; GROUP]);
    const { assert!(PLANES_MAX == 3) };
    // SAFETY: the caller's promise.
    let all_ones = unsafe {
        match planes.n_planes() {
            1 => {
                L::negative_sums([plane(0)], n_rows, n_words, q, sums.as_mut_ptr());
                1
            }
            2 => {
                L::negative_sums([plane(0), plane(1)], n_rows, n_words, q, sums.as_mut_ptr());
                3
            }
            _ => {
                L::negative_sums([plane(0), plane(1), plane(2)], n_rows, n_words, q, sums.as_mut_ptr());
                7
            }
        }
    };
    sums.map(|negative| all_ones * x.total - 2 * negative)
}

/// True if a row of this score is computed. A threshold that is no number at this scale keeps it.
#[inline(always)]
pub(super) fn is_kept(score: i32, threshold: f32, scale: f32) -> bool {
    let least = threshold * scale;
    score as f32 >= least || least.is_nan()
}

impl Scores for Portable {
    #[inline(always)]
    unsafe fn negative_sums<const P: usize>(
        planes: [*const u32; P],
        n_rows: usize,
        n_words: usize,
        q: *const i8,
        sums: *mut i32,
    ) {
        // SAFETY: words lie below n_words, rows below n_rows, and 32 values of q belong to each word.
        unsafe {
            for r in 0..n_rows {
                *sums.add(r) = 0;
                for plane in planes {
                    let mut sum = 0;
                    for word_idx in 0..n_words {
                        let word = *plane.add(r * n_words + word_idx);
                        let q = q.add(word_idx * 32).cast::<[[i8; 8]; 4]>().read_unaligned();
                        let mut lanes = [0i16; 8];
                        for (byte, q) in word.to_le_bytes().into_iter().zip(q) {
                            for ((lane, mask), q) in lanes.iter_mut().zip(BYTE_MASKS[byte as usize]).zip(q) {
                                *lane += i16::from(q & mask);
                            }
                        }
                        sum += lanes.into_iter().map(i32::from).sum::<i32>();
                    }
                    *sums.add(r) = 2 * *sums.add(r) + sum;
                }
            }
        }
    }
}

/// For each byte, -1 where its bit is 1.
static BYTE_MASKS: [[i8; 8]; 256] = {
    let mut masks = [[0; 8]; 256];
    let mut i = 0;
    while i < 256 * 8 {
        masks[i / 8][i % 8] = -(((i / 8) >> (i % 8) & 1) as i8);
        i += 1;
    }
    masks
};

#[cfg(target_arch = "x86_64")]
impl Scores for Avx2 {
    #[inline(always)]
    unsafe fn negative_sums<const P: usize>(
        planes: [*const u32; P],
        n_rows: usize,
        n_words: usize,
        q: *const i8,
        sums: *mut i32,
    ) {
        use std::arch::x86_64::*;
        /// Words that a lane of 16 bits can add: each gives at most 7 * 2 * 127.
        const BLOCK: usize = 16;
        // SAFETY: the caller promises the instruction set; words lie below n_words, rows below n_rows, and 32 values
        // of q belong to each word.
        unsafe {
            let bit_of_lane = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let byte_of_lane =
                _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            for r in 0..n_rows {
                let mut sum = _mm256_setzero_si256();
                let mut word = 0;
                while word < n_words {
                    let end = n_words.min(word + BLOCK);
                    let mut block = _mm256_setzero_si256();
                    while word < end {
                        let q = _mm256_loadu_si256(q.add(word * 32).cast());
                        for (p, plane) in planes.iter().enumerate() {
                            let bits = _mm256_set1_epi32(*plane.add(r * n_words + word) as i32);
                            let bits = _mm256_and_si256(_mm256_shuffle_epi8(bits, byte_of_lane), bit_of_lane);
                            let negative = _mm256_and_si256(q, _mm256_cmpeq_epi8(bits, bit_of_lane));
                            let weight = _mm256_set1_epi8(1 << (P - 1 - p));
                            block = _mm256_add_epi16(block, _mm256_maddubs_epi16(weight, negative));
                        }
                        word += 1;
                    }
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(block, _mm256_set1_epi16(1)));
                }
                let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
                let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
                let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum));
                *sums.add(r) = _mm_cvtsi128_si32(sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Scores for Avx512 {
    /// The eight words of bits of 64 columns, in the place of their bytes.
    #[inline(always)]
    unsafe fn arrange(q: &mut [i8]) {
        use std::arch::x86_64::*;
        for block in q.as_chunks_mut::<Q_MULTIPLE>().0 {
            // SAFETY: the caller promises the instruction set; a block is as long as a vector.
            unsafe {
                let values = _mm512_loadu_si512(block.as_ptr().cast());
                let words: [u64; 8] = std::array::from_fn(|bit| {
                    _mm512_test_epi8_mask(values, _mm512_set1_epi8((1_u8 << bit) as i8))
                });
                block.as_mut_ptr().cast::<[u64; 8]>().write_unaligned(words);
            }
        }
    }

    #[inline(always)]
    unsafe fn negative_sums<const P: usize>(
        planes: [*const u32; P],
        n_rows: usize,
        n_words: usize,
        q: *const i8,
        sums: *mut i32,
    ) {
        use std::arch::x86_64::*;
        /// Rows at once: each is a chain of additions, and they share the loads of q.
        const ROWS: usize = 8;
        // SAFETY: the caller promises the instruction set; pairs of words and the last word lie below n_words, rows
        // below n_rows (a missing one repeats the last), and q holds the 64 values of the last word too.
        unsafe {
            let bits = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
            let mut r = 0;
            while r < n_rows {
                let row: [usize; ROWS] = std::array::from_fn(|i| (r + i).min(n_rows - 1) * n_words);
                let mut counts = [_mm512_setzero_si512(); ROWS];
                for plane in planes {
                    for counts in &mut counts {
                        *counts = _mm512_add_epi64(*counts, *counts);
                    }
                    let mut word = 0;
                    while word < n_words {
                        let is_pair = word + 1 < n_words;
                        let q = _mm512_loadu_si512(q.add(word * 32).cast());
                        for (counts, row) in counts.iter_mut().zip(row) {
                            let words = plane.add(row + word);
                            let words = if is_pair {
                                words.cast::<i64>().read_unaligned()
                            } else {
                                i64::from(*words)
                            };
                            let shared = _mm512_and_si512(q, _mm512_set1_epi64(words));
                            *counts = _mm512_add_epi64(*counts, _mm512_popcnt_epi64(shared));
                        }
                        word += 2;
                    }
                }
                for (i, counts) in counts.iter().enumerate().take(n_rows - r) {
                    let worth = _mm512_sllv_epi64(*counts, bits);
                    let worth = _mm512_mask_sub_epi64(worth, 1 << 7, _mm512_setzero_si512(), worth);
                    *sums.add(r + i) = _mm512_reduce_add_epi64(worth) as i32;
                }
                r += ROWS;
            }
        }
    }
}
