//! Scalar truth: each function reads like its equation, and every backend is tested against it.
//!
//! Sums run in f64 so that the reference is closer to the exact result than any backend.

use crate::{
    Activation, AttentionShape, BitPlanes, Elements, Limits, LowRank, Matrix, MlpAudit, MlpCounts,
    MlpWeights, Residual, Rows, SignMatrix, Thresholds,
    shape::{DOT_CHAINS, DOT_SEGMENT},
};

/// `sum_c w[row, c] * x[c]`.
pub fn dot(w: &Matrix<'_>, row: usize, x: &[f32]) -> f64 {
    (0..w.n_cols).map(|col| f64::from(w.data.get(row * w.n_cols + col)) * f64::from(x[col])).sum()
}

/// `y = W x`. Shapes: `x (n_cols,)`, `y (n_rows,)`.
pub fn matvec(w: &Matrix<'_>, x: &[f32], y: &mut [f32]) {
    for (row, y) in y.iter_mut().enumerate() {
        *y = dot(w, row, x) as f32;
    }
}

/// `y = X Wᵀ`, row by row. Shapes: `x (n_tokens, n_cols)`, `y (n_tokens, n_rows)`.
pub fn matmul(w: &Matrix<'_>, x: &[f32], y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w.n_cols).zip(y.chunks_exact_mut(w.n_rows)) {
        matvec(w, x, y);
    }
}

/// `y = X W`. Shapes: `w_t (n_rows, n_cols)`, `x (n_tokens, n_rows)`, `y (n_tokens, n_cols)`.
pub fn matmul_t(w_t: &Matrix<'_>, x: &[f32], y: &mut [f32]) {
    for (x, y) in x.chunks_exact(w_t.n_rows).zip(y.chunks_exact_mut(w_t.n_cols)) {
        for (col, y) in y.iter_mut().enumerate() {
            *y = (0..w_t.n_rows)
                .map(|row| f64::from(w_t.data.get(row * w_t.n_cols + col)) * f64::from(x[row]))
                .sum::<f64>() as f32;
        }
    }
}

/// `out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]`.
pub fn rmsnorm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean_square = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = (f64::from(x) * scale * f64::from(weight)) as f32;
    }
}

/// Rotates pairs `(i, i + head_dim / 2)` of every head. `cos`, `sin`: `(head_dim / 2,)` for the position.
pub fn rope(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = head_dim / 2;
    for head in heads.chunks_exact_mut(head_dim) {
        for i in 0..half {
            let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
            let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
            head[i] = (a * cos - b * sin) as f32;
            head[i + half] = (b * cos + a * sin) as f32;
        }
    }
}

/// Softmax attention of one position over positions `0..n_positions` of the cache.
///
/// Shapes: `q (n_heads, head_dim)`, `k` and `v` `(n_kv_heads, n_positions_max, head_dim)`, `out` as `q`.
pub fn attention(
    shape: &AttentionShape,
    q: &[f32],
    k: Elements<'_>,
    v: Elements<'_>,
    n_positions: usize,
    out: &mut [f32],
) {
    let d = shape.head_dim;
    let group = shape.n_heads / shape.n_kv_heads;
    for head in 0..shape.n_heads {
        let base = head / group * shape.n_positions_max * d;
        let scores: Vec<f64> = (0..n_positions)
            .map(|p| {
                let dot: f64 =
                    (0..d).map(|i| f64::from(q[head * d + i]) * f64::from(k.get(base + p * d + i))).sum();
                dot / (d as f64).sqrt()
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        for i in 0..d {
            let sum: f64 = scores
                .iter()
                .enumerate()
                .map(|(p, s)| (s - max).exp() * f64::from(v.get(base + p * d + i)))
                .sum();
            out[head * d + i] = (sum / total) as f32;
        }
    }
}

/// Sign words of `x`: bit `c % 32` of word `c / 32` is 1 iff `x[c] < 0`; NaN and both zeros give 0.
pub fn sign_pack(x: &[f32], words: &mut [u32]) {
    for (word, x) in words.iter_mut().zip(x.chunks(32)) {
        *word = x.iter().enumerate().fold(0, |word, (bit, &v)| word | u32::from(v < 0.0) << bit);
    }
}

/// Sign disagreements of `row` with `x_words`.
pub fn n_neg(signs: &SignMatrix<'_>, row: usize, x_words: &[u32]) -> u32 {
    let row_words = &signs.words[row * signs.n_words..][..signs.n_words];
    row_words.iter().zip(x_words).map(|(w, x)| (w ^ x).count_ones()).sum()
}

/// `skip[row]` iff `n_neg(row) > limit(row)`. Source: SparseInfer, arXiv 2411.12692, section 3.
pub fn predict(signs: &SignMatrix<'_>, limits: &Limits<'_>, x_words: &[u32], skip: &mut [bool]) {
    for (row, skip) in skip.iter_mut().enumerate() {
        *skip = n_neg(signs, row, x_words) > limits.of(row);
    }
}

/// `x` in 8 bits: `q[c] = round(x[c] * scale)`, halves to even, with `scale = 127 / max |x|`, which is returned. Every
/// operation is one of f32, so that all backends agree. An input that has no such scale (all zero, not finite, too
/// small) gives zeros and a scale of 0.
pub fn quantise(x: &[f32], q: &mut [i8]) -> f32 {
    // Magnitudes compare as their bits do, NaN above all.
    let max = f32::from_bits(x.iter().fold(0, |max, v| max.max(v.abs().to_bits())));
    let scale = 127.0 / max;
    if !(scale > 0.0 && scale.is_finite()) {
        q.fill(0);
        return 0.0;
    }
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * scale).round_ties_even() as i8;
    }
    scale
}

/// `sum_c w[row, c] * q[c]` with the elements of `planes`.
pub fn score(planes: &BitPlanes<'_>, row: usize, q: &[i8]) -> i32 {
    let n_planes = planes.n_planes();
    let sign = |plane: usize, col: usize| {
        let word = planes.plane(plane)[row * planes.signs.n_words + col / 32];
        1 - 2 * (word >> (col % 32) & 1) as i32
    };
    let element = |col| (0..n_planes).map(|plane| sign(plane, col) << (n_planes - 1 - plane)).sum::<i32>();
    q.iter().enumerate().map(|(col, &q)| element(col) * i32::from(q)).sum()
}

/// `skip[row]` iff `score(row) < threshold(row) * scale`, the score as f32; it is exact in f32 below 2^24.
pub fn predict_scores(
    planes: &BitPlanes<'_>,
    thresholds: &Thresholds<'_>,
    q: &[i8],
    scale: f32,
    skip: &mut [bool],
) {
    for (row, skip) in skip.iter_mut().enumerate() {
        *skip = (score(planes, row, q) as f32) < thresholds.of(row) * scale;
    }
}

/// Moves the odd numbers `v` up to `max` of a row, which stand for `w`, to where `(w - a v)^T H (w - a v)` is the least,
/// `a = v^T H w / v^T H v`; `p` and `q` are H times both, `moments` is H, `(n_cols, n_cols)`. The best real number in column
/// c is `v_c + (p_c / a - q_c) / H_cc`, and the error being a parabola there, the odd number nearest to it is the best one.
/// Source: OPTQ, arXiv 2210.17323, with more than one sweep. Every operation is one of f32 but the two sums in a.
pub fn descend(
    moments: &[f32],
    max: f32,
    n_sweeps: usize,
    w: &[f32],
    v: &mut [f32],
    p: &[f32],
    q: &mut [f32],
) {
    let n_cols = w.len();
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).fold(0.0, |sum, (&a, &b)| sum + f64::from(a) * f64::from(b))
    };
    for _ in 0..n_sweeps {
        let scale = (dot(v, p) / dot(v, q)) as f32;
        if scale <= 0.0 || scale.is_nan() {
            break;
        }
        let mut is_done = true;
        for (col, moments) in moments.chunks_exact(n_cols).enumerate() {
            let sign = if w[col] < 0.0 { -1.0 } else { 1.0 };
            let best = sign * (v[col] + (p[col] / scale - q[col]) / moments[col]);
            let odd = sign * (2.0 * (0.5 * best).floor() + 1.0).clamp(1.0, max);
            let step = odd - v[col];
            if step != 0.0 {
                v[col] = odd;
                q.iter_mut().zip(moments).for_each(|(q, moment)| *q += step * moment);
                is_done = false;
            }
        }
        if is_done {
            break;
        }
    }
}

/// `sum_c w[row, c] * x[c]` in the one order that all backends keep: column c of a segment of [`DOT_SEGMENT`] columns goes to
/// the segment's sum c mod [`DOT_CHAINS`], sum j takes the segments' sums j one after the other, and in the end sum j takes
/// sum j + h for h = 16, 8, 4, 2, 1. Every operation is one of f32.
pub fn ordered_dot(w: &Matrix<'_>, row: usize, x: &[f32]) -> f32 {
    let mut sums = [0.0_f32; DOT_CHAINS];
    for (segment, x) in x.chunks(DOT_SEGMENT).enumerate() {
        let mut of_segment = [0.0_f32; DOT_CHAINS];
        for (col, x) in x.iter().enumerate() {
            let w = w.data.get(row * w.n_cols + segment * DOT_SEGMENT + col);
            of_segment[col % DOT_CHAINS] += w * x;
        }
        for (sum, more) in sums.iter_mut().zip(of_segment) {
            *sum += more;
        }
    }
    let mut half = DOT_CHAINS / 2;
    while half > 0 {
        for j in 0..half {
            sums[j] += sums[j + half];
        }
        half /= 2;
    }
    sums[0]
}

/// `score = fc2 act(fc1 x)`, with act the identity or max(v, 0); with a residual, plus `(s (1 / scale)) e` for the score s of
/// its signs with x in 8 bits and e the row's scale. Source: Deja Vu, arXiv 2310.17157, whose small networks
/// have no activation, and PowerInfer, arXiv 2312.12456, whose have.
pub fn low_rank_scores(factors: &LowRank<'_>, x: &[f32]) -> Vec<f32> {
    let act = |v: f32| if factors.relu && v < 0.0 { 0.0 } else { v };
    let inner: Vec<f32> = (0..factors.fc1.n_rows).map(|k| act(ordered_dot(&factors.fc1, k, x))).collect();
    let mut scores: Vec<f32> =
        (0..factors.fc2.n_rows).map(|row| ordered_dot(&factors.fc2, row, &inner)).collect();
    if let Some(Residual { signs, scales }) = factors.residual {
        let mut q = vec![0; x.len()];
        let scale = quantise(x, &mut q);
        let unit = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let planes = BitPlanes { signs, low: &[] };
        for (row, (sum, weight)) in scores.iter_mut().zip(scales).enumerate() {
            *sum += score(&planes, row, &q) as f32 * unit * weight;
        }
    }
    scores
}

/// `skip[row]` iff `score(row) < threshold(row)`.
pub fn predict_low_rank(factors: &LowRank<'_>, thresholds: &Thresholds<'_>, x: &[f32], skip: &mut [bool]) {
    for (row, (skip, score)) in skip.iter_mut().zip(low_rank_scores(factors, x)).enumerate() {
        *skip = score < thresholds.of(row);
    }
}

/// `skip[row]` of what `rows` predicts for `x`; nothing is skipped without a prediction.
pub fn skipped(rows: &Rows<'_>, n_rows: usize, x: &[f32]) -> Vec<bool> {
    let mut skip = vec![false; n_rows];
    match rows {
        Rows::All | Rows::Active => {}
        Rows::Predicted { signs, limits } => {
            let mut x_words = vec![0; signs.n_words];
            sign_pack(x, &mut x_words);
            predict(signs, limits, &x_words, &mut skip);
        }
        Rows::Scored { planes, thresholds } => {
            let mut q = vec![0; x.len()];
            let scale = quantise(x, &mut q);
            predict_scores(planes, thresholds, &q, scale, &mut skip);
        }
        Rows::LowRank { factors, thresholds } => predict_low_rank(factors, thresholds, x, &mut skip),
    }
    skip
}

/// `h[i] = skip(i) ? 0 : act(w_gate[i] . x) * (w_up[i] . x)`; returns the rows read.
pub fn gate_up(
    w: &MlpWeights<'_>,
    rows: &Rows<'_>,
    activation: Activation,
    x: &[f32],
    h: &mut [f32],
) -> MlpCounts {
    let skip = skipped(rows, w.gate.n_rows, x);
    let mut counts = MlpCounts::default();
    for (row, h) in h.iter_mut().enumerate() {
        *h = 0.0;
        if skip[row] {
            continue;
        }
        counts.n_kept += 1;
        let gate = activation.apply(dot(&w.gate, row, x) as f32);
        if gate != 0.0 {
            counts.n_active += 1;
            *h = (f64::from(gate) * dot(&w.up, row, x)) as f32;
        }
    }
    counts
}

/// What [`gate_up`] and [`down`] with the same arguments miss among the rows of `sample`:
/// `energy(i) = (act(w_gate[i] . x) * (w_up[i] . x))^2 * |w_down_t[i]|^2`.
pub fn audit(
    w: &MlpWeights<'_>,
    rows: &Rows<'_>,
    activation: Activation,
    x: &[f32],
    sample: &[u32],
) -> MlpAudit {
    let skip = skipped(rows, w.gate.n_rows, x);
    let gate = |row| activation.apply(dot(&w.gate, row, x) as f32);
    let energy = |row: usize| {
        let h = f64::from(gate(row)) * dot(&w.up, row, x);
        let n_cols = w.down_t.n_cols;
        let norm: f64 = (0..n_cols).map(|col| f64::from(w.down_t.data.get(row * n_cols + col)).powi(2)).sum();
        h * h * norm
    };
    let mut audit = MlpAudit {
        kept_energy: (0..w.gate.n_rows).filter(|&row| !skip[row]).map(energy).sum(),
        ..MlpAudit::default()
    };
    for row in sample.iter().map(|&row| row as usize).filter(|&row| skip[row]) {
        audit.n_skipped += 1;
        audit.n_missed += usize::from(gate(row) != 0.0);
        audit.missed_energy += energy(row);
    }
    audit
}

/// `y += sum_i h[i] * w_down_t[i]`.
pub fn down(w_down_t: &Matrix<'_>, h: &[f32], y: &mut [f32]) {
    for (col, y) in y.iter_mut().enumerate() {
        let sum: f64 = h
            .iter()
            .enumerate()
            .map(|(row, &h)| f64::from(h) * f64::from(w_down_t.data.get(row * w_down_t.n_cols + col)))
            .sum();
        *y += sum as f32;
    }
}
