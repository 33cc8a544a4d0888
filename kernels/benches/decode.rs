//! Decode operations against memory: every pass reads weights that no cache holds.
//!
//! `cargo bench -p kernels --bench decode [-- THREADS]`. Records lie in `records`.
#![allow(missing_docs, clippy::print_stdout, reason = "a benchmark's output is its purpose")]

use half::f16;
use kernels::{
    Activation, Cpu, Elements, Limits, Matrix, Matvec, MlpCounts, MlpScratch, MlpWeights, Rows, SignMatrix,
    bytes, reference,
};
use std::time::Instant;

/// Weights of a case together: several times the L3 cache.
const COLD_BYTES: usize = 400 << 20;
const N_ROUNDS: usize = 40;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Even in (-1, 1).
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn weights(&mut self, n: usize, scale: f32) -> Vec<f16> {
        (0..n).map(|_| f16::from_f32(self.value() * scale)).collect()
    }
}

/// Best and median of the rounds, in seconds.
fn time(mut pass: impl FnMut(usize)) -> (f64, f64) {
    let mut times: Vec<f64> = (0..N_ROUNDS)
        .map(|round| {
            let start = Instant::now();
            pass(round);
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[N_ROUNDS / 2])
}

fn report(name: &str, n_bytes: u64, (best, median): (f64, f64), read: f64) {
    let gb_per_s = |s: f64| n_bytes as f64 / s / 1e9;
    println!(
        "{name:<34} {:>8.1} us best {:>8.1} us median {:>7.2} MB {:>6.1} GB/s best {:>6.1} GB/s median {:>5.1} % of read",
        best * 1e6,
        median * 1e6,
        n_bytes as f64 / 1e6,
        gb_per_s(best),
        gb_per_s(median),
        100.0 * gb_per_s(median) / read,
    );
}

fn check(name: &str, want: &[f32], got: &[f32], tolerance: f32) {
    for (i, (want, got)) in want.iter().zip(got).enumerate() {
        assert!((want - got).abs() <= tolerance, "{name}: [{i}] is {got}, not {want}");
    }
}

fn matvec(cpu: &Cpu, random: &mut Random, read: f64, n_rows: usize, n_cols: usize) {
    let n = n_rows * n_cols;
    let n_copies = COLD_BYTES.div_ceil(2 * n);
    let data = random.weights(n * n_copies, 1.0);
    let copies: Vec<_> = data
        .chunks_exact(n)
        .map(|data| Matrix::new(Elements::F16(data), n_rows, n_cols).expect("the shape fits"))
        .collect();
    let x: Vec<f32> = (0..n_cols).map(|_| random.value()).collect();
    let (mut y, mut want) = (vec![0.0; n_rows], vec![0.0; n_rows]);
    let mut run = |w: &Matrix<'_>| {
        cpu.matvec(&x, &mut [Matvec { w: *w, y: &mut y, accumulate: false }]).expect("the shapes fit");
    };
    run(&copies[0]);
    let times = time(|round| run(&copies[(round + 1) % n_copies]));
    run(&copies[0]);
    reference::matvec(&copies[0], &x, &mut want);
    check("matvec", &want, &y, 1e-3);
    report(&format!("matvec {n_rows} x {n_cols} f16"), bytes::matrix(&copies[0]), times, read);
}

/// A layer whose gate rows are active with chance `active`: row signs lean towards or away from those of x.
struct Layer {
    gate: Vec<f16>,
    up: Vec<f16>,
    down_t: Vec<f16>,
    words: Vec<u32>,
}

fn mlp(cpu: &Cpu, random: &mut Random, read: f64, hidden: usize, intermediate: usize) {
    let n = hidden * intermediate;
    let n_copies = COLD_BYTES.div_ceil(6 * n).max(2);
    let x: Vec<f32> = (0..hidden).map(|_| random.value()).collect();
    let layers: Vec<Layer> = (0..n_copies)
        .map(|_| {
            let mut gate = random.weights(n, 1.0);
            for row in gate.chunks_exact_mut(hidden) {
                let lean = if random.next() % 100 < 11 { 1.0 } else { -1.0 };
                for (w, x) in row.iter_mut().zip(&x) {
                    if random.next().is_multiple_of(4) {
                        *w = f16::from_f32(w.to_f32().abs() * lean * x.signum());
                    }
                }
            }
            let mut words = vec![0; intermediate * hidden / 32];
            for (row, words) in gate.chunks_exact(hidden).zip(words.chunks_exact_mut(hidden / 32)) {
                let row: Vec<f32> = row.iter().map(|w| w.to_f32()).collect();
                reference::sign_pack(&row, words);
            }
            Layer { gate, up: random.weights(n, 1.0), down_t: random.weights(n, 0.01), words }
        })
        .collect();
    let matrix = |data| Matrix::new(Elements::F16(data), intermediate, hidden).expect("the shape fits");
    let views: Vec<_> = layers
        .iter()
        .map(|layer| {
            let signs = SignMatrix { words: &layer.words, n_rows: intermediate, n_words: hidden / 32 };
            let w = MlpWeights {
                gate: matrix(&layer.gate),
                up: matrix(&layer.up),
                down_t: matrix(&layer.down_t),
            };
            (w, signs)
        })
        .collect();

    let mut scratch = MlpScratch::new(intermediate, hidden);
    let limits = Limits::Layer(hidden as u32 / 2);
    let mut dense = f64::NAN;
    for name in ["dense", "exact", "predicted"] {
        let mut y = vec![0.0; hidden];
        let mut counts = MlpCounts::default();
        let mut run = |(w, signs): &(MlpWeights<'_>, SignMatrix<'_>), y: &mut [f32]| {
            let rows = match name {
                "dense" => Rows::All,
                "exact" => Rows::Active,
                _ => Rows::Predicted { signs: *signs, limits },
            };
            counts = cpu.mlp(w, &rows, Activation::Relu, &x, &mut scratch, y).expect("the shapes fit");
            bytes::mlp(w, &rows, &counts)
        };
        let mut n_bytes = 0;
        let times = time(|round| n_bytes += run(&views[(round + 1) % n_copies], &mut y));
        let mut y = vec![0.0; hidden];
        run(&views[0], &mut y);
        let (w, signs) = &views[0];
        let rows = if name == "predicted" { Rows::Predicted { signs: *signs, limits } } else { Rows::Active };
        let (mut h, mut want) = (vec![0.0; intermediate], vec![0.0; hidden]);
        let want_counts = reference::gate_up(w, &rows, Activation::Relu, &x, &mut h);
        reference::down(&w.down_t, &h, &mut want);
        assert_eq!(counts.n_active, want_counts.n_active);
        check(name, &want, &y, 1e-3 * want.iter().fold(1.0, |max, v| v.abs().max(max)));
        let name = format!(
            "mlp {name} {hidden}/{intermediate} {:.3} kept {:.3} active",
            counts.n_kept as f64 / intermediate as f64,
            counts.n_active as f64 / intermediate as f64
        );
        report(&name, n_bytes / N_ROUNDS as u64, times, read);
        if dense.is_nan() {
            dense = times.1;
        } else {
            println!("    {:.2} x dense", dense / times.1);
        }
    }
}

fn main() {
    let n_threads = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(0);
    let cpu = Cpu::new(n_threads);
    let buffer: Vec<u64> = (0..COLD_BYTES as u64 / 8).collect();
    let read = cpu.measure_read_gb_per_s(bytemuck::cast_slice(&buffer), 10);
    drop(buffer);
    println!(
        "{} threads, {}, plain read {read:.1} GB/s (best of 10 passes over 400 MiB)",
        cpu.n_threads(),
        cpu.isa()
    );
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for (n_rows, n_cols) in [(2048, 2048), (6144, 2048), (32_000, 2048), (2048, 5504), (4096, 4096)] {
        matvec(&cpu, &mut random, read, n_rows, n_cols);
    }
    for (hidden, intermediate) in [(2048, 5504), (4096, 11_008)] {
        mlp(&cpu, &mut random, read, hidden, intermediate);
    }
}
