//! Every instruction set of this processor against `reference`, and against itself with other thread counts.
//!
//! Skip decisions, counts of signs and of rows compare exactly. A float may differ by `TOLERANCE` times the sum of the
//! magnitudes of its terms: the reference adds in f64, a backend in f32 chains of at most a few thousand terms, each
//! of which rounds by 2^-24 of a partial sum that is no larger than that. NaN is refused.

mod common;

use common::{Random, TOLERANCE, Weights, low_planes, magnitude, rows_of, sign_words};
use kernels::{
    Activation, AttentionScratch, AttentionShape, BitPlanes, Cpu, Elements, Isa, Limits, LowRank, Matrix,
    Matvec, MlpCounts, MlpScratch, MlpWeights, Moments, Residual, Rows, SignMatrix, Sweeps, Thresholds,
    reference,
};
use proptest::prelude::*;
use std::sync::LazyLock;

/// One `Cpu` for each instruction set and number of threads.
static CPUS: LazyLock<Vec<Vec<Cpu>>> = LazyLock::new(|| {
    Isa::ALL
        .into_iter()
        .filter(|&isa| isa <= Isa::detect())
        .map(|isa| [1, 2, 3, 8].map(|n_threads| Cpu::with_isa(n_threads, isa)).into())
        .collect()
});

/// Runs `op` on every backend: its result has to be the same for each number of threads, and within `slack` of `want`.
fn on_each_backend(want: &[f64], slack: &[f64], op: impl Fn(&Cpu) -> Vec<f32>) {
    for cpus in CPUS.iter() {
        let got = op(&cpus[0]);
        let name = cpus[0].isa();
        assert_eq!(got.len(), want.len());
        for (i, ((&got, want), slack)) in got.iter().zip(want).zip(slack).enumerate() {
            let error = (f64::from(got) - want).abs();
            assert!(
                error <= slack * TOLERANCE + 1e-30,
                "{name}: [{i}] is {got}, not {want}: off by {error:e}"
            );
        }
        for cpu in &cpus[1..] {
            let other = op(cpu);
            let same = got.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}: {} threads change the result", cpu.n_threads());
        }
    }
}

/// Widths on both sides of the vectors, the sign words and the groups of them.
fn any_width() -> impl Strategy<Value = usize> {
    prop_oneof![1..70usize, 500..530usize, 1020..1030usize, Just(64), Just(2048), 2040..2090usize]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn matvec_is_the_reference(
        n_cols in any_width(), n_rows in 1..150usize, kind in 0..3usize, n_jobs in 1..11usize, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let x = random.values(n_cols);
        let jobs: Vec<_> = (0..n_jobs)
            .map(|job| {
                // Jobs differ in height and type.
                let n_rows = (n_rows + 7 * job) % 150 + 1;
                (n_rows, Weights::new((kind + job) % 3, &random.values(n_rows * n_cols)), job % 2 == 1)
            })
            .collect();
        let (mut want, mut slack) = (Vec::new(), Vec::new());
        for (n_rows, weights, accumulate) in &jobs {
            let w = weights.matrix(*n_rows, n_cols);
            for row in 0..*n_rows {
                let old = if *accumulate { 0.75 } else { 0.0 };
                want.push(old + reference::dot(&w, row, &x));
                slack.push(old + magnitude(&w, row, &x));
            }
        }
        on_each_backend(&want, &slack, |cpu| {
            let mut y: Vec<Vec<f32>> = jobs
                .iter()
                .map(|(n_rows, _, accumulate)| vec![if *accumulate { 0.75 } else { f32::NAN }; *n_rows])
                .collect();
            let mut calls: Vec<_> = jobs
                .iter()
                .zip(&mut y)
                .map(|((n_rows, weights, accumulate), y)| Matvec {
                    w: weights.matrix(*n_rows, n_cols), y, accumulate: *accumulate,
                })
                .collect();
            cpu.matvec(&x, &mut calls).unwrap();
            y.concat()
        });
    }

    #[test]
    fn mlp_is_the_reference(
        n_cols in any_width(), n_rows in 1..300usize, kind in 0..3usize, select in 0..11usize,
        activation in 0..3usize, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let x = random.values(n_cols);
        let weights: Vec<_> =
            (0..3).map(|m| Weights::new((kind + m) % 3, &random.values(n_rows * n_cols))).collect();
        let [gate, up, down_t] = [0, 1, 2].map(|m| weights[m].matrix(n_rows, n_cols));
        let w = MlpWeights { gate, up, down_t };
        let words = sign_words(&gate);
        let signs = SignMatrix { words: &words, n_rows, n_words: n_cols.div_ceil(32) };
        let per_row: Vec<u32> = (0..n_rows).map(|_| random.below(n_cols as u64 + 1) as u32).collect();
        let low = low_planes(&mut random, 1 + select % 3, n_rows, n_cols);
        let thresholds: Vec<f32> = random.values(n_rows).iter().map(|v| v * n_cols as f32 / 8.0).collect();
        let scored = |thresholds| Rows::Scored { planes: BitPlanes { signs, low: &low }, thresholds };
        let rank = 1 + random.below(n_cols as u64) as usize % 100;
        let fc1 = Weights::new((kind + 1) % 3, &random.values(rank * n_cols));
        let fc2 = Weights::new((kind + 2) % 3, &random.values(n_rows * rank));
        let (fc1, fc2) = (fc1.matrix(rank, n_cols), fc2.matrix(n_rows, rank));
        let residual = Residual { signs, scales: &thresholds };
        let low_rank = |thresholds| {
            let residual = (kind == 2).then_some(residual);
            Rows::LowRank { factors: LowRank { fc1, fc2, relu: kind == 1, residual }, thresholds }
        };
        let rows = match select {
            0..=4 => rows_of(select, signs, &per_row, n_cols),
            9 => low_rank(Thresholds::Layer(0.5)),
            10 => low_rank(Thresholds::PerRow(&thresholds)),
            5 => scored(Thresholds::PerRow(&thresholds)),
            _ => scored(Thresholds::Layer([0.0, -0.3, f32::NEG_INFINITY][select - 6])),
        };
        let activation = [Activation::Relu, Activation::FatRelu(0.3), Activation::Silu][activation];

        // A gate at the edge of its activation may round to either side of it: such rows are turned away from it.
        let edge = if let Activation::FatRelu(threshold) = activation { f64::from(threshold) } else { 0.0 };
        let mut h = vec![0.0; n_rows];
        let counts = reference::gate_up(&w, &rows, activation, &x, &mut h);
        for row in 0..n_rows {
            let distance = (reference::dot(&gate, row, &x) - edge).abs();
            prop_assume!(distance == 0.0 && magnitude(&gate, row, &x) == 0.0
                || distance > 2.0 * TOLERANCE * magnitude(&gate, row, &x));
        }
        let (mut want, mut slack) = (vec![0.5; n_cols], vec![0.5; n_cols]);
        for (row, &h) in h.iter().enumerate().filter(|(_, h)| **h != 0.0) {
            let gate_terms = magnitude(&gate, row, &x);
            let up_terms = magnitude(&up, row, &x);
            let bound = (gate_terms * up_terms).max(f64::from(h).abs());
            for col in 0..n_cols {
                let down = f64::from(down_t.data.get(row * n_cols + col));
                want[col] += f64::from(h) * down;
                slack[col] += 3.0 * bound * down.abs();
            }
        }
        on_each_backend(&want, &slack, |cpu| {
            let mut scratch = MlpScratch::new(n_rows, n_cols);
            let mut y = vec![0.5; n_cols];
            let found = cpu.mlp(&w, &rows, activation, &x, &mut scratch, &mut y).unwrap();
            assert_eq!(found, counts, "{}", cpu.isa());
            // The buffers keep nothing from one call to the next.
            let mut again = vec![0.5; n_cols];
            cpu.mlp(&w, &rows, activation, &x, &mut scratch, &mut again).unwrap();
            assert_eq!(y, again);
            let mut audited = vec![0.5; n_cols];
            let found = cpu.mlp_audited(&w, &rows, activation, &x, &[], &mut scratch, &mut audited).unwrap();
            assert_eq!(found.0, counts, "{}", cpu.isa());
            assert_eq!(y, audited, "{}: an audit changes the result", cpu.isa());
            y
        });

        // One row in so many, and of the energies the sums: relative to the sum of magnitudes, squared.
        let one_in = 1 + random.below(4) as usize;
        let first = random.below(one_in as u64) as u32;
        let sample: Vec<u32> = (first..n_rows as u32).step_by(one_in).collect();
        let audit = reference::audit(&w, &rows, activation, &x, &sample);
        let skip = reference::skipped(&rows, n_rows, &x);
        let bound = |row: usize| {
            let norm: f64 = (0..n_cols).map(|c| f64::from(down_t.data.get(row * n_cols + c)).powi(2)).sum();
            (magnitude(&gate, row, &x) * magnitude(&up, row, &x)).powi(2) * norm
        };
        let missed: f64 = sample.iter().map(|&row| row as usize).filter(|&row| skip[row]).map(bound).sum();
        let kept: f64 = (0..n_rows).filter(|&row| !skip[row]).map(bound).sum();
        for cpus in CPUS.iter() {
            let of = |cpu: &Cpu| {
                let (mut scratch, mut y) = (MlpScratch::new(n_rows, n_cols), vec![0.5; n_cols]);
                cpu.mlp_audited(&w, &rows, activation, &x, &sample, &mut scratch, &mut y).unwrap().1
            };
            let found = of(&cpus[0]);
            let name = cpus[0].isa();
            prop_assert_eq!((found.n_skipped, found.n_missed), (audit.n_skipped, audit.n_missed), "{}", name);
            for (found, want, bound) in [
                (found.missed_energy, audit.missed_energy, missed),
                (found.kept_energy, audit.kept_energy, kept),
            ] {
                let error = (found - want).abs();
                prop_assert!(error <= 6.0 * TOLERANCE * bound + 1e-30, "{}: {} for {}", name, found, want);
            }
            for cpu in &cpus[1..] {
                prop_assert_eq!(of(cpu), found, "{}: {} threads", name, cpu.n_threads());
            }
        }
    }

    #[test]
    fn signs_are_the_reference_bit_for_bit(
        n_cols in any_width(), n_rows in 1..600usize, n_tokens in 1..4usize, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let weights = Weights::new(1, &random.values(n_rows * n_cols));
        let w = weights.matrix(n_rows, n_cols);
        let words = sign_words(&w);
        let signs = SignMatrix { words: &words, n_rows, n_words: n_cols.div_ceil(32) };
        let mut x = random.values(n_tokens * n_cols);
        for x in &mut x {
            if random.below(10) == 0 {
                *x = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e-45][random.below(5) as usize];
            }
        }
        let limits: Vec<u32> = (0..n_rows).map(|_| random.below(n_cols as u64 + 1) as u32).collect();
        let (mut want, mut want_skip) = (Vec::new(), vec![false; n_rows]);
        let mut x_words = vec![0; signs.n_words];
        for x in x.chunks_exact(n_cols) {
            reference::sign_pack(x, &mut x_words);
            want.extend((0..n_rows).map(|row| reference::n_neg(&signs, row, &x_words)));
        }
        reference::sign_pack(&x[..n_cols], &mut x_words);
        reference::predict(&signs, &Limits::PerRow(&limits), &x_words, &mut want_skip);
        for cpu in CPUS.iter().flatten() {
            let mut n_neg = vec![u32::MAX; n_tokens * n_rows];
            cpu.n_neg(&signs, n_tokens, &x, &mut n_neg).unwrap();
            prop_assert_eq!(&n_neg, &want);
            let mut skip = want_skip.iter().map(|skip| !skip).collect::<Vec<_>>();
            let rows = Rows::Predicted { signs, limits: Limits::PerRow(&limits) };
            cpu.predict(&rows, 1, &x[..n_cols], &mut skip).unwrap();
            prop_assert_eq!(&skip, &want_skip);
        }
    }

    #[test]
    fn scores_are_the_reference_bit_for_bit(
        n_cols in any_width(), n_rows in 1..300usize, n_tokens in prop_oneof![1..4usize, 7..14usize], n_planes in 1..4usize,
        magnitude in prop_oneof![Just(1.0f32), Just(1e-38), Just(1e38), Just(0.0)], is_odd: bool, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let weights = Weights::new(1, &random.values(n_rows * n_cols));
        let words = sign_words(&weights.matrix(n_rows, n_cols));
        let signs = SignMatrix { words: &words, n_rows, n_words: n_cols.div_ceil(32) };
        let low = low_planes(&mut random, n_planes, n_rows, n_cols);
        let planes = BitPlanes { signs, low: &low };
        let mut x: Vec<f32> = random.values(n_tokens * n_cols).iter().map(|v| v * magnitude).collect();
        if is_odd {
            // In the last token alone: the others must not notice.
            let at = (n_tokens - 1) * n_cols + random.below(n_cols as u64) as usize;
            x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, f32::MAX][random.below(5) as usize];
        }
        let thresholds: Vec<f32> =
            random.values(n_rows).iter().map(|v| v * magnitude * (n_cols as f32).sqrt()).collect();
        let thresholds = Thresholds::PerRow(&thresholds);
        let (mut want, mut want_scales) = (vec![], vec![]);
        let mut want_skip = vec![false; n_tokens * n_rows];
        for (x, skip) in x.chunks_exact(n_cols).zip(want_skip.chunks_exact_mut(n_rows)) {
            let mut q = vec![99; n_cols];
            let scale = reference::quantise(x, &mut q);
            prop_assert!(q.iter().all(|q| (-127..=127).contains(q)));
            want.extend((0..n_rows).map(|row| reference::score(&planes, row, &q)));
            want_scales.push(scale);
            reference::predict_scores(&planes, &thresholds, &q, scale, skip);
        }
        for cpu in CPUS.iter().flatten() {
            let (mut scores, mut scales) = (vec![i32::MAX; n_tokens * n_rows], vec![f32::NAN; n_tokens]);
            cpu.scores(&planes, n_tokens, &x, &mut scores, &mut scales).unwrap();
            prop_assert_eq!(&scores, &want, "{}", cpu.isa());
            prop_assert_eq!(&scales, &want_scales);
            let mut skip: Vec<bool> = want_skip.iter().map(|skip| !skip).collect();
            cpu.predict(&Rows::Scored { planes, thresholds }, n_tokens, &x, &mut skip).unwrap();
            prop_assert_eq!(&skip, &want_skip, "{}", cpu.isa());
        }
    }

    /// On both sides of tiles, spans and chunks.
    #[test]
    fn rows_descend_as_the_reference_does_bit_for_bit(
        n_cols in prop_oneof![1..70usize, 120..135usize, 505..520usize, 570..580usize],
        n_rows in prop_oneof![1..5usize, 126..131usize], n_planes in 1..4usize, n_sweeps in 0..5usize, seed: u64,
    ) {
        let mut random = Random::new(seed);
        // Moments of a few inputs.
        let n_tokens = 1 + n_cols / 4;
        let x = random.values(n_tokens * n_cols);
        let mut moments = vec![0.0; n_cols * n_cols];
        for x in x.chunks_exact(n_cols) {
            for (row, x_row) in moments.chunks_exact_mut(n_cols).zip(x) {
                row.iter_mut().zip(x).for_each(|(moment, x)| *moment += x_row * x);
            }
        }
        (0..n_cols).for_each(|col| moments[col * n_cols + col] += 0.5);
        let max = ((1 << n_planes) - 1) as f32;
        let mut w = random.values(n_rows * n_cols);
        // A row of zeros has no scale.
        w[..n_cols].fill(0.0);
        let v: Vec<f32> = w
            .iter()
            .map(|w| (2.0 * (w.abs() * max / 2.0).floor() + 1.0).min(max) * if *w < 0.0 { -1.0 } else { 1.0 })
            .collect();
        let times = |rows: &[f32]| -> Vec<f32> {
            let moments = Matrix { data: Elements::F32(&moments), n_rows: n_cols, n_cols };
            let mut product = vec![0.0; rows.len()];
            reference::matmul(&moments, rows, &mut product);
            product
        };
        let (p, q) = (times(&w), times(&v));
        let (mut want_v, mut want_q) = (v.clone(), q.clone());
        for row in 0..n_rows {
            let at = row * n_cols..(row + 1) * n_cols;
            let (v, q) = (&mut want_v[at.clone()], &mut want_q[at.clone()]);
            reference::descend(&moments, max, n_sweeps, &w[at.clone()], v, &p[at], q);
        }
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for cpu in CPUS.iter().flatten() {
            let (mut v, mut q) = (v.clone(), q.clone());
            let moments = Moments::new(cpu, n_cols, &moments).unwrap();
            cpu.descend(&moments, Sweeps { max, n_sweeps }, &w, &mut v, &p, &mut q).unwrap();
            prop_assert_eq!(bits(&v), bits(&want_v), "{}", cpu.isa());
            prop_assert_eq!(bits(&q), bits(&want_q), "{}", cpu.isa());
        }
    }

    #[test]
    fn scores_of_low_rank_are_the_reference_bit_for_bit(
        n_cols in any_width(), n_rows in 1..300usize, rank in 1..400usize, n_tokens in 1..4usize,
        kind in 0..3usize, relu: bool, has_residual: bool, is_odd: bool, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let rank = rank.min(n_cols);
        let fc1 = Weights::new(kind, &random.values(rank * n_cols));
        let fc2 = Weights::new((kind + 1) % 3, &random.values(n_rows * rank));
        let (fc1, fc2) = (fc1.matrix(rank, n_cols), fc2.matrix(n_rows, rank));
        let words = sign_words(&Weights::new(1, &random.values(n_rows * n_cols)).matrix(n_rows, n_cols));
        let signs = SignMatrix { words: &words, n_rows, n_words: n_cols.div_ceil(32) };
        let scales = random.values(n_rows);
        let residual = has_residual.then_some(Residual { signs, scales: &scales });
        let factors = LowRank { fc1, fc2, relu, residual };
        let mut x = random.values(n_tokens * n_cols);
        if is_odd {
            // In the last token alone: the others must not notice.
            let at = (n_tokens - 1) * n_cols + random.below(n_cols as u64) as usize;
            x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, f32::MAX][random.below(5) as usize];
        }
        let bits = |scores: &[f32]| -> Vec<u32> {
            // Which NaN it is says nothing.
            scores.iter().map(|score| if score.is_nan() { u32::MAX } else { score.to_bits() }).collect()
        };
        let want: Vec<f32> = x.chunks_exact(n_cols).flat_map(|x| reference::low_rank_scores(&factors, x)).collect();
        // Some are exactly a score, which is kept.
        let per_row: Vec<f32> =
            (0..n_rows).map(|row| if row % 3 == 0 { random.value() } else { want[row] }).collect();
        let thresholds = Thresholds::PerRow(&per_row);
        let mut want_skip = vec![false; n_tokens * n_rows];
        for (x, skip) in x.chunks_exact(n_cols).zip(want_skip.chunks_exact_mut(n_rows)) {
            reference::predict_low_rank(&factors, &thresholds, x, skip);
        }
        for cpu in CPUS.iter().flatten() {
            let mut scores = vec![f32::NAN; n_tokens * n_rows];
            cpu.low_rank_scores(&factors, n_tokens, &x, &mut scores).unwrap();
            prop_assert_eq!(bits(&scores), bits(&want), "{}", cpu.isa());
            let mut skip: Vec<bool> = want_skip.iter().map(|skip| !skip).collect();
            cpu.predict(&Rows::LowRank { factors, thresholds }, n_tokens, &x, &mut skip).unwrap();
            prop_assert_eq!(&skip, &want_skip, "{}", cpu.isa());
        }
    }
}

/// A score is what its equation says, whatever order its terms are added in.
#[test]
fn an_ordered_dot_is_a_dot() {
    let mut random = Random::new(9);
    for n_cols in [1, 31, 32, 33, 64, 100, 2048] {
        let weights = Weights::new(1, &random.values(n_cols));
        let (w, x) = (weights.matrix(1, n_cols), random.values(n_cols));
        let error = f64::from(reference::ordered_dot(&w, 0, &x)) - reference::dot(&w, 0, &x);
        assert!(error.abs() <= TOLERANCE * magnitude(&w, 0, &x), "{n_cols} columns: {error:e}");
    }
}

/// A cache whose positions past `n_positions` are poison, and queries for all of them.
fn cache(
    shape: &AttentionShape,
    n_positions: usize,
    kind: usize,
    random: &mut Random,
) -> (Weights, Weights, Vec<f32>) {
    let [k, v] = [0, 1].map(|_| {
        let mut values = random.values(shape.n_kv_heads * shape.n_positions_max * shape.head_dim);
        for head in values.chunks_exact_mut(shape.n_positions_max * shape.head_dim) {
            head[n_positions * shape.head_dim..].fill(f32::NAN);
        }
        Weights::new(kind, &values)
    });
    let q = random.values(n_positions * shape.n_heads * shape.head_dim).iter().map(|q| 4.0 * q).collect();
    (k, v, q)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn attention_is_the_reference_for_one_token_and_for_many(
        head_dim in prop_oneof![1..20usize, Just(64), 60..70usize, Just(128), 120..150usize],
        n_kv_heads in 1..4usize, group in 1..7usize, kind in 0..3usize,
        n_positions in prop_oneof![1..40usize, 250..262usize, 500..530usize], n_tokens in 1..24usize, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let n_tokens = n_tokens.min(n_positions);
        let first = n_positions - n_tokens;
        let n_positions_max = n_positions + random.below(9) as usize;
        let shape = AttentionShape { n_heads: n_kv_heads * group, n_kv_heads, head_dim, n_positions_max };
        let width = shape.n_heads * head_dim;
        let (k, v, q) = cache(&shape, n_positions, kind, &mut random);
        let q = &q[..n_tokens * width];
        let mut want = vec![0.0; n_tokens * width];
        for (token, (q, want)) in q.chunks_exact(width).zip(want.chunks_exact_mut(width)).enumerate() {
            reference::attention(&shape, q, k.elements(), v.elements(), first + token + 1, want);
        }
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        // Values are at most 3, scores mostly below 10: an error of a score is one of its weight.
        let slack = vec![3.0 * 10.0; want.len()];
        on_each_backend(&want, &slack, |cpu| {
            let mut scratch = AttentionScratch::new(&shape);
            let mut out = vec![f32::NAN; n_tokens * width];
            cpu.attention(&shape, n_tokens, first, q, k.elements(), v.elements(), &mut scratch, &mut out).unwrap();
            // A token's result does not depend on its company.
            let mut alone = vec![f32::NAN; width];
            for token in [0, n_tokens / 2, n_tokens - 1] {
                let q = &q[token * width..][..width];
                cpu.attention(&shape, 1, first + token, q, k.elements(), v.elements(), &mut scratch, &mut alone)
                    .unwrap();
                assert_eq!(&alone, &out[token * width..][..width], "{}: token {token}", cpu.isa());
            }
            out
        });
    }

    #[test]
    fn vectors_are_the_reference(
        n_tokens in 1..20usize, n_heads in 1..4usize, half in 1..70usize, kind in 0..3usize, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let (head_dim, width) = (2 * half, 2 * half * n_heads);
        let x = random.values(n_tokens * width);
        let weight = random.values(width);
        let mut want = vec![0.0; x.len()];
        for (x, want) in x.chunks_exact(width).zip(want.chunks_exact_mut(width)) {
            reference::rmsnorm(x, &weight, 1e-5, want);
        }
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        let slack: Vec<f64> = want.iter().map(|want| want.abs()).collect();
        on_each_backend(&want, &slack, |cpu| {
            let mut out = vec![f32::NAN; x.len()];
            cpu.rmsnorm(&x, &weight, 1e-5, &mut out).unwrap();
            out
        });

        let (cos, sin) = (random.values(n_tokens * half), random.values(n_tokens * half));
        let mut want = x.clone();
        for (token, heads) in want.chunks_exact_mut(width).enumerate() {
            reference::rope(heads, head_dim, &cos[token * half..][..half], &sin[token * half..][..half]);
        }
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        on_each_backend(&want, &vec![6.0; want.len()], |cpu| {
            let mut heads = x.clone();
            cpu.rope(&mut heads, n_heads, head_dim, &cos, &sin).unwrap();
            heads
        });

        let weights = Weights::new(kind, &x);
        let want: Vec<f64> = (0..width).map(|c| weights.elements().get((n_tokens - 1) * width + c).into()).collect();
        on_each_backend(&want, &vec![0.0; width], |cpu| {
            let mut out = vec![f32::NAN; width];
            cpu.row(&weights.matrix(n_tokens, width), n_tokens - 1, &mut out).unwrap();
            out
        });
    }
}

#[test]
fn attention_refuses_what_lies_outside_the_cache() {
    let cpu = Cpu::with_isa(1, Isa::Portable);
    let shape = AttentionShape { n_heads: 4, n_kv_heads: 2, head_dim: 2, n_positions_max: 5 };
    let mut scratch = AttentionScratch::new(&shape);
    let cache = [0.0; 20];
    let mut call = |shape: AttentionShape, n_tokens, first, n_q: usize, n_keys: usize| {
        let (k, v) = (Elements::F32(&cache[..n_keys]), Elements::F32(&cache));
        let error =
            cpu.attention(&shape, n_tokens, first, &[0.0; 32][..n_q], k, v, &mut scratch, &mut [0.0; 16]);
        error.unwrap_err().to_string()
    };
    assert_eq!(call(shape, 2, 0, 17, 20), "attention queries: expected 16, found 17");
    assert_eq!(call(shape, 2, 0, 16, 19), "attention keys: expected 20, found 19");
    assert_eq!(call(shape, 2, 4, 16, 20), "attention positions: expected 5, found 6");
    let larger = AttentionShape { n_heads: 8, n_kv_heads: 2, head_dim: 2, n_positions_max: 5 };
    assert_eq!(call(larger, 1, 0, 16, 20), "attention scratch: expected 8, found 4");
}

#[test]
fn an_mlp_that_skips_every_row_reads_none_and_leaves_y() {
    let mut random = Random::new(5);
    // Rows that are not read may hold anything.
    let poison = Weights::F32(vec![f32::NAN; 90 * 33]);
    let w =
        MlpWeights { gate: poison.matrix(90, 33), up: poison.matrix(90, 33), down_t: poison.matrix(90, 33) };
    let words: Vec<u32> = [u32::MAX, 1].repeat(90);
    let signs = SignMatrix { words: &words, n_rows: 90, n_words: 2 };
    let x: Vec<f32> = random.values(33).iter().map(|v| v.abs()).collect();
    let rows = Rows::Predicted { signs, limits: Limits::Layer(32) };
    for cpu in CPUS.iter().flatten() {
        let mut y = vec![-0.0; 33];
        let counts = cpu.mlp(&w, &rows, Activation::Relu, &x, &mut MlpScratch::new(90, 33), &mut y).unwrap();
        assert_eq!(counts, MlpCounts::default());
        assert!(y.iter().all(|y| y.to_bits() == (-0.0f32).to_bits()));
    }
}

#[test]
fn lengths_that_do_not_fit_are_errors() {
    let cpu = Cpu::with_isa(2, Isa::Portable);
    let data = [0.0f32; 12];
    let w = Matrix { data: Elements::F32(&data), n_rows: 4, n_cols: 3 };
    let short = Matrix { data: Elements::F32(&data[..11]), ..w };
    let mut y = [0.0; 4];
    let error = |r: Result<(), kernels::ShapeError>| r.unwrap_err().to_string();
    let matvec = |w, x: &[f32], y: &mut [f32]| cpu.matvec(x, &mut [Matvec { w, y, accumulate: false }]);
    assert_eq!(error(matvec(w, &[0.0; 2], &mut y)), "matvec input: expected 3, found 2");
    assert_eq!(error(matvec(w, &[0.0; 3], &mut y[..3])), "matvec output: expected 4, found 3");
    assert_eq!(error(matvec(short, &[0.0; 3], &mut y)), "matrix elements: expected 12, found 11");
    let mlp = |w, rows, n_scratch, y: &mut [f32]| {
        cpu.mlp(&w, &rows, Activation::Relu, &[0.0; 3], &mut MlpScratch::new(n_scratch, 3), y).map(|_| ())
    };
    let weights = MlpWeights { gate: w, up: w, down_t: w };
    let mut y = [0.0; 3];
    assert_eq!(
        error(mlp(MlpWeights { up: short, ..weights }, Rows::All, 4, &mut y)),
        "matrix elements: expected 12, found 11"
    );
    assert_eq!(error(mlp(weights, Rows::All, 5, &mut y)), "mlp scratch rows: expected 4, found 5");
    assert_eq!(error(mlp(weights, Rows::All, 4, &mut [0.0; 2])), "mlp output: expected 3, found 2");
    let signs = SignMatrix { words: &[0; 3], n_rows: 4, n_words: 1 };
    let rows = Rows::Predicted { signs, limits: Limits::Layer(1) };
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "sign words: expected 4, found 3");
    let signs = SignMatrix { words: &[0; 4], ..signs };
    let rows = Rows::Predicted { signs, limits: Limits::PerRow(&[1; 3]) };
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "limits: expected 4, found 3");
    let planes = |low| BitPlanes { signs: SignMatrix { words: &[0; 4], ..signs }, low };
    let scored = |low, thresholds| Rows::Scored { planes: planes(low), thresholds };
    let rows = scored(&[0; 4], Thresholds::PerRow(&[0.0; 5]));
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "thresholds: expected 4, found 5");
    let rows = scored(&[0; 5], Thresholds::Layer(0.0));
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "words of lower planes: expected 4, found 5");
    let rows = scored(&[0; 12], Thresholds::Layer(0.0));
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "bit planes: expected 3, found 4");
    let fc1 = Matrix { data: Elements::F32(&data[..6]), n_rows: 2, n_cols: 3 };
    let fc2 = Matrix { data: Elements::F32(&data[..8]), n_rows: 4, n_cols: 2 };
    let low_rank = |fc1, fc2| Rows::LowRank {
        factors: LowRank { fc1, fc2, relu: false, residual: None },
        thresholds: Thresholds::Layer(0.0),
    };
    let rows = low_rank(fc1, Matrix { n_rows: 2, n_cols: 4, ..fc2 });
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "rows of the second factor: expected 4, found 2");
    let rows = low_rank(Matrix { n_rows: 3, n_cols: 2, ..fc1 }, fc2);
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "columns of the first factor: expected 3, found 2");
    let rows = low_rank(fc1, Matrix { n_cols: 3, data: Elements::F32(&data), ..fc2 });
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "columns of the second factor: expected 2, found 3");
    let high = Matrix { data: Elements::F32(&data), n_rows: 4, n_cols: 3 };
    let square = [0.0; 16];
    let rows = low_rank(high, Matrix { data: Elements::F32(&square), n_rows: 4, n_cols: 4 });
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "rank: expected 3, found 4");
    let with_signs = |signs, scales| {
        let factors = LowRank { fc1, fc2, relu: false, residual: Some(Residual { signs, scales }) };
        Rows::LowRank { factors, thresholds: Thresholds::Layer(0.0) }
    };
    let fitting = SignMatrix { words: &[0; 4], n_rows: 4, n_words: 1 };
    let rows = with_signs(SignMatrix { n_rows: 3, ..fitting }, &[0.0; 4]);
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "rows of residual signs: expected 4, found 3");
    let rows = with_signs(fitting, &[0.0; 3]);
    assert_eq!(error(mlp(weights, rows, 4, &mut y)), "scales of a residual: expected 4, found 3");
    let audited = |sample: &[u32], y: &mut [f32]| {
        let (x, mut scratch) = ([0.0; 3], MlpScratch::new(4, 3));
        let found = cpu.mlp_audited(&weights, &Rows::All, Activation::Relu, &x, sample, &mut scratch, y);
        found.map(|_| ())
    };
    assert_eq!(error(audited(&[0, 2, 2], &mut y)), "ascending rows of a sample: expected 2, found 1");
    assert_eq!(error(audited(&[1, 4], &mut y)), "rows of a sample: expected 3, found 4");
    assert_eq!(error(audited(&[1], &mut [0.0; 2])), "mlp output: expected 3, found 2");
}

#[test]
fn each_item_is_visited_once_on_any_number_of_threads() {
    for cpu in CPUS.iter().flatten() {
        let mut values = vec![0_u32; 1000];
        cpu.for_each(values.chunks_mut(7).enumerate(), |(idx, values)| {
            values.iter_mut().for_each(|value| *value += 1 + idx as u32);
        });
        assert!(values.iter().enumerate().all(|(idx, &value)| value == 1 + idx as u32 / 7), "{values:?}");
    }
}

/// The range of a score: every weight at its largest with the sign of x, which is at its largest too.
#[test]
fn the_largest_scores_do_not_overflow() {
    let n_cols = 20_000_usize;
    let n_words = n_cols.div_ceil(32);
    let words = vec![0; 2 * n_words];
    let signs = SignMatrix { words: &words, n_rows: 2, n_words };
    for n_planes in 1..=3 {
        let low = vec![0; (n_planes - 1) * words.len()];
        let planes = BitPlanes { signs, low: &low };
        for cpu in CPUS.iter().flatten() {
            for x in [1.0, -1.0] {
                let (mut scores, mut scales) = ([0; 2], [0.0]);
                cpu.scores(&planes, 1, &vec![x; n_cols], &mut scores, &mut scales).unwrap();
                let want = x as i32 * 127 * ((1 << n_planes) - 1) * n_cols as i32;
                assert_eq!((scores, scales), ([want; 2], [127.0]), "{}", cpu.isa());
            }
            let negative = vec![u32::MAX; n_planes * words.len()];
            let (sign_words, low) = negative.split_at(words.len());
            let planes = BitPlanes { signs: SignMatrix { words: sign_words, ..signs }, low };
            let (mut scores, mut scales) = ([0; 2], [0.0]);
            cpu.scores(&planes, 1, &vec![2.0; n_cols], &mut scores, &mut scales).unwrap();
            let want = -127 * ((1 << n_planes) - 1) * n_cols as i32;
            assert_eq!((scores, scales), ([want; 2], [63.5]), "{}", cpu.isa());
        }
    }
}
