//! Sign words: bit order, padding, and the rule for zero and NaN.
//!
//! Row i of `gate_signs` holds one bit per column of row i of `w_gate`, as stored in the file: bit `c % 32` of word
//! `c / 32` is 1 iff `w_gate[i][c] < 0`. Both zeros and NaN give 0, and so do the bits past the last column. The
//! predictor XORs these words with those of its input, so a stray bit past the end would count as a disagreement.

use crate::DType;

/// Sign words of a row of `n_cols` columns.
pub fn n_words(n_cols: u32) -> u32 {
    n_cols.div_ceil(32)
}

/// Bits of a row's last word that stand for no column.
pub fn tail_mask(n_cols: u32) -> u32 {
    match n_cols % 32 {
        0 => 0,
        n_used => u32::MAX << n_used,
    }
}

/// The first row of sign words `bytes`, `(n_rows, n_words(n_cols))`, that sets bits past its last column, with those
/// bits. Looks at one word per row, and at none when rows fill their words.
pub(crate) fn first_stray_tail(bytes: &[u8], n_cols: u32) -> Option<(u64, u32)> {
    let mask = tail_mask(n_cols);
    if mask == 0 {
        return None;
    }
    let words = bytes.as_chunks::<4>().0;
    let last_words = words.chunks_exact(n_words(n_cols) as usize).filter_map(|row| row.last());
    let stray = last_words.map(|&word| u32::from_le_bytes(word) & mask);
    (0..).zip(stray).find(|&(_, stray)| stray != 0)
}

/// The first row where sign words `signs` are not the signs of `weights`, `(n_rows, n_cols)` elements of `dtype`.
///
/// # Panics
/// If `dtype` is not a floating-point type.
pub(crate) fn first_wrong_row(signs: &[u8], weights: &[u8], dtype: DType, n_cols: u32) -> Option<u64> {
    let n_cols = n_cols as usize;
    match dtype {
        DType::F32 => wrong_row::<4>(signs, weights, n_cols, |bytes| f32::from_le_bytes(bytes) < 0.0),
        DType::F16 => wrong_row::<2>(signs, weights, n_cols, |bytes| half_is_negative(bytes, 0xFC00)),
        DType::Bf16 => wrong_row::<2>(signs, weights, n_cols, |bytes| half_is_negative(bytes, 0xFF80)),
        _ => unreachable!("weights are floating-point numbers, not {}", dtype.name()),
    }
}

/// Negative 16-bit floats lie between -0 and `minus_infinity`, as integers; NaN lies above.
fn half_is_negative(bytes: [u8; 2], minus_infinity: u16) -> bool {
    let bits = u16::from_le_bytes(bytes);
    bits > 0x8000 && bits <= minus_infinity
}

fn wrong_row<const N: usize>(
    signs: &[u8],
    weights: &[u8],
    n_cols: usize,
    is_negative: impl Fn([u8; N]) -> bool,
) -> Option<u64> {
    let sign_rows = signs.as_chunks::<4>().0.chunks_exact(n_cols.div_ceil(32));
    let weight_rows = weights.as_chunks::<N>().0.chunks_exact(n_cols);
    let word = |columns: &[[u8; N]]| {
        (0..).zip(columns).fold(0, |word, (bit, &value)| word | u32::from(is_negative(value)) << bit)
    };
    let wrong = sign_rows.zip(weight_rows).position(|(words, row)| {
        words.iter().zip(row.chunks(32)).any(|(&found, columns)| u32::from_le_bytes(found) != word(columns))
    })?;
    Some(wrong as u64)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn every_half_has_the_sign_of_its_value() {
        for bits in 0..=u16::MAX {
            let bytes = bits.to_le_bytes();
            assert_eq!(
                half_is_negative(bytes, 0xFC00),
                f16::from_bits(bits).to_f32() < 0.0,
                "f16 {bits:#06x}"
            );
            assert_eq!(
                half_is_negative(bytes, 0xFF80),
                bf16::from_bits(bits).to_f32() < 0.0,
                "bf16 {bits:#06x}"
            );
        }
    }

    #[test]
    fn tails_are_what_columns_leave_of_the_last_word() {
        let expected = [(1, 1, !1), (31, 1, 1 << 31), (32, 1, 0), (33, 2, !1), (4096, 128, 0), (36, 2, !0xF)];
        for (n_cols, n, mask) in expected {
            assert_eq!((n_words(n_cols), tail_mask(n_cols)), (n, mask), "{n_cols} columns");
        }
    }
}
