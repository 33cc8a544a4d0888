//! Scores of many inputs: the bits of a row are made numbers once and multiplied with all of them.
//!
//! Computes   score[t][r] = sum_c w[r][c] q[t][c] as in `scores`; the instruction takes one side without signs, so
//!            score = sum_c w (q + 128) - 128 sum_c w
//! Reference  reference::score; equal, as integers are
//! Shapes     planes (n_rows, n_words) u32 each; inputs (n_tokens, q_len) u8, each q + 128, 128 from n_cols on
//! Needs      q_len a multiple of 64, the words of a row within q_len
//! Lanes      64 columns: a plane's bits are the mask of a subtraction; VPDPBUSD adds four products to a lane
//! Tail       columns past the last one have any w and a q of 0; rows and tokens past the last ones repeat it
//! Chunks     ROWS rows with all tokens
//! Measured   one core of a Xeon (Sapphire Rapids), 411 tokens, 2752 rows of 4096 columns: 190 G products a second, in 24 ms for
//!            1, 2 and 3 planes; `scores`, a token at a time, takes 46, 82 and 115 ms

use std::arch::x86_64::*;

use super::scores::Q_MULTIPLE;
use crate::BitPlanes;

/// Rows in a chunk: as numbers they stay in L2, beside the inputs.
pub(super) const ROWS: usize = 32;
/// Rows and tokens of a tile, whose sums are in registers.
const TILE: usize = 4;
/// What makes an input's numbers positive.
const BIAS: i32 = 128;

/// Inputs in 8 bits, made positive.
#[derive(Clone, Debug)]
pub(super) struct Biased {
    q: Vec<u8>,
    q_len: usize,
}

impl Biased {
    /// Of inputs as `scores::quantise` makes them, `(q_len,)` each, at least one.
    pub(super) fn new<'q>(inputs: impl Iterator<Item = &'q [i8]>, q_len: usize) -> Self {
        let q: Vec<u8> = inputs.flat_map(|q| q.iter().map(|&q| (i32::from(q) + BIAS) as u8)).collect();
        assert!(q_len > 0 && q_len.is_multiple_of(Q_MULTIPLE));
        assert!(!q.is_empty() && q.len().is_multiple_of(q_len));
        Self { q, q_len }
    }

    fn n_tokens(&self) -> usize {
        self.q.len() / self.q_len
    }
}

/// Calls `put` with each token and its scores with `n_rows <= ROWS` rows of `planes`, the first of them row `row0`.
///
/// # Safety
/// The processor has AVX-512 F and BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn scores(
    planes: &BitPlanes<'_>,
    row0: usize,
    n_rows: usize,
    x: &Biased,
    mut put: impl FnMut(usize, &[i32]),
) {
    let (q_len, n_words, n_planes) = (x.q_len, planes.signs.n_words, planes.n_planes());
    assert!(
        n_rows <= ROWS && row0 + n_rows <= planes.signs.n_rows && n_words.next_multiple_of(2) * 32 <= q_len
    );
    let mut values = vec![0_i8; n_rows * q_len];
    let mut biases = [0; ROWS];
    for (row, values) in values.chunks_exact_mut(q_len).enumerate() {
        let mut sum = _mm512_setzero_si512();
        for (pair, values) in values.as_chunks_mut::<Q_MULTIPLE>().0.iter_mut().enumerate() {
            let mut value = _mm512_set1_epi8((1 << n_planes) - 1);
            for plane in 0..n_planes {
                let words = &planes.plane(plane)[(row0 + row) * n_words..][..n_words];
                let word = |idx: usize| words.get(idx).map_or(0, |&word| u64::from(word));
                let bits = word(2 * pair) | word(2 * pair + 1) << 32;
                let twice = _mm512_set1_epi8(2 << (n_planes - 1 - plane));
                value = _mm512_mask_sub_epi8(value, bits, value, twice);
            }
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), value);
            // SAFETY: the array has as many bytes as the vector.
            unsafe { _mm512_storeu_si512(values.as_mut_ptr().cast(), value) };
        }
        biases[row] = BIAS * _mm512_reduce_add_epi32(sum);
    }
    let n_tokens = x.n_tokens();
    for token0 in (0..n_tokens).step_by(TILE) {
        let mut found = [[0; ROWS]; TILE];
        for tile in (0..n_rows).step_by(TILE) {
            // SAFETY: rows and tokens are clamped to those that are there, each of q_len bytes.
            let (rows, tokens) = unsafe {
                let row = |i: usize| values.as_ptr().add((tile + i).min(n_rows - 1) * q_len);
                let token = |i: usize| x.q.as_ptr().add((token0 + i).min(n_tokens - 1) * q_len);
                ([row(0), row(1), row(2), row(3)], [token(0), token(1), token(2), token(3)])
            };
            let mut sums = [[_mm512_setzero_si512(); TILE]; TILE];
            for col in (0..q_len).step_by(Q_MULTIPLE) {
                // SAFETY: columns lie below q_len, a multiple of the vector's length.
                unsafe {
                    let mut w = [_mm512_setzero_si512(); TILE];
                    for (w, row) in w.iter_mut().zip(rows) {
                        *w = _mm512_loadu_si512(row.add(col).cast());
                    }
                    for (sums, token) in sums.iter_mut().zip(tokens) {
                        let q = _mm512_loadu_si512(token.add(col).cast());
                        for (sum, w) in sums.iter_mut().zip(w) {
                            *sum = _mm512_dpbusd_epi32(*sum, q, w);
                        }
                    }
                }
            }
            for (found, sums) in found.iter_mut().zip(sums) {
                for (i, sum) in sums.into_iter().enumerate() {
                    found[tile + i] = _mm512_reduce_add_epi32(sum) - biases[tile + i];
                }
            }
        }
        for (token, found) in (token0..n_tokens).zip(&found) {
            put(token, &found[..n_rows]);
        }
    }
}
