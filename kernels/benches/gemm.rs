//! Batched products: checks, then times them, and prints a table with the share of the measured multiply-add peak.
//!
//! `cargo bench -p kernels --bench gemm [-- OPTION=VALUE...]`, where the options are `threads` (a number), `isa` (a name)
//! and `n_tokens` (a comma-separated list). Weights come from memory: copies of them, together larger than any cache of
//! this class of machine, take turns. Each time is the best of the repetitions, with the median beside it.

#![expect(clippy::print_stdout, reason = "the table is the program's result")]

use half::{bf16, f16};
use kernels::{Cpu, Elements, Isa, Matrix};
use std::time::Instant;

/// `(n_rows, n_cols)`: an attention projection and MLPs of Llama shapes.
const SHAPES: [(usize, usize); 3] = [(2_048, 2_048), (5_504, 2_048), (4_096, 11_008)];
/// Bytes of the copies of a matrix that take turns.
const COPIES_BYTES: usize = 128 << 20;
/// Seconds spent on one line of the table, at least `REPETITIONS_MIN` times.
const LINE_S: f64 = 0.3;
const REPETITIONS_MIN: usize = 5;

fn main() {
    let mut isa = Isa::detect();
    let mut n_threads = 0;
    let mut batches = vec![1, 4, 16, 64, 256];
    for arg in std::env::args().skip(1) {
        match arg.split_once('=') {
            Some(("isa", name)) => isa = Isa::from_name(name).expect("isa is portable, avx2 or avx512"),
            Some(("threads", n)) => n_threads = n.parse().expect("threads is a number"),
            Some(("n_tokens", list)) => {
                batches =
                    list.split(',').map(|n| n.parse().expect("n_tokens is a list of numbers")).collect();
            }
            // `cargo bench` adds a flag of its own.
            _ => assert_eq!(arg, "--bench", "options are isa=, threads= and n_tokens="),
        }
    }
    let cpu = Cpu::with_isa(n_threads, isa);
    let n_tokens_max = batches.iter().copied().max().unwrap_or(0);
    let peak = peak_gflop_per_s(&cpu);
    println!("isa {}, {} threads, multiply-add peak {peak:.0} GFLOP/s", cpu.isa(), cpu.n_threads());
    println!(
        "{:>8}  {:>10}  {:>4}  {:>8}  {:>9}  {:>9}  {:>7}  {:>5}  {:>6}",
        "product", "shape", "type", "n_tokens", "ms best", "ms median", "GFLOP/s", "peak", "GB/s"
    );
    for (n_rows, n_cols) in SHAPES {
        let values = random(n_rows * n_cols, 1);
        let f16s = copies(values.iter().map(|&v| f16::from_f32(v)).collect());
        let bf16s = copies(values.iter().map(|&v| bf16::from_f32(v)).collect());
        let f32s = copies(values);
        let x = random(n_tokens_max * n_rows.max(n_cols), 2);
        let matrix = |data| Matrix { data, n_rows, n_cols };
        let weights: [(&str, Vec<Matrix<'_>>); 3] = [
            ("f16", f16s.iter().map(|w| matrix(Elements::F16(w))).collect()),
            ("bf16", bf16s.iter().map(|w| matrix(Elements::Bf16(w))).collect()),
            ("f32", f32s.iter().map(|w| matrix(Elements::F32(w))).collect()),
        ];
        for (name, weights) in &weights {
            for &n_tokens in &batches {
                for transposed in [false, true] {
                    let times_s = time(&cpu, weights, transposed, n_tokens, &x);
                    let (best_s, median_s) = (times_s[0], times_s[times_s.len() / 2]);
                    let gflop_per_s = 2.0 * (n_tokens * n_rows * n_cols) as f64 / best_s / 1e9;
                    println!(
                        "{:>8}  {:>10}  {name:>4}  {n_tokens:>8}  {:>9.3}  {:>9.3}  {gflop_per_s:>7.0}  {:>4.0}%  {:>6.1}",
                        if transposed { "matmul_t" } else { "matmul" },
                        format!("{n_rows}x{n_cols}"),
                        best_s * 1e3,
                        median_s * 1e3,
                        100.0 * gflop_per_s / peak,
                        kernels::bytes::matrix(&weights[0]) as f64 / best_s / 1e9,
                    );
                }
            }
        }
    }
}

/// Times of the product in seconds, ascending, after a check of some outputs.
fn time(cpu: &Cpu, weights: &[Matrix<'_>], transposed: bool, n_tokens: usize, x: &[f32]) -> Vec<f64> {
    let w = &weights[0];
    let (n_x, n_y) = if transposed { (w.n_rows, w.n_cols) } else { (w.n_cols, w.n_rows) };
    let x = &x[..n_tokens * n_x];
    let mut y = vec![f32::NAN; n_tokens * n_y];
    let mut times_s = Vec::new();
    let start = Instant::now();
    while times_s.len() < REPETITIONS_MIN || start.elapsed().as_secs_f64() < LINE_S {
        let w = &weights[times_s.len() % weights.len()];
        let start = Instant::now();
        let result = if transposed {
            cpu.matmul_t(w, n_tokens, x, &mut y, false)
        } else {
            cpu.matmul(w, n_tokens, x, &mut y, false)
        };
        result.expect("the shapes fit");
        times_s.push(start.elapsed().as_secs_f64());
        if times_s.len() == 1 {
            check(w, transposed, x, &y, n_x, n_y);
        }
    }
    times_s.sort_by(f64::total_cmp);
    times_s
}

/// Compares outputs in every corner of `y` with sums in f64.
fn check(w: &Matrix<'_>, transposed: bool, x: &[f32], y: &[f32], n_x: usize, n_y: usize) {
    assert!(y.iter().all(|v| v.is_finite()), "an output was not written");
    let n_tokens = y.len() / n_y;
    for token in [0, n_tokens / 2, n_tokens - 1] {
        for output in [0, n_y / 3, n_y - 1] {
            let expected: f64 = (0..n_x)
                .map(|i| {
                    let idx = if transposed { i * w.n_cols + output } else { output * w.n_cols + i };
                    f64::from(x[token * n_x + i]) * f64::from(w.data.get(idx))
                })
                .sum();
            let found = f64::from(y[token * n_y + output]);
            assert!((found - expected).abs() < 1e-3, "y[{token}, {output}] is {found}, not {expected}");
        }
    }
}

/// Copies of `w` that fill COPIES_BYTES.
fn copies<T: Clone>(w: Vec<T>) -> Vec<Vec<T>> {
    vec![w.clone(); COPIES_BYTES.div_ceil(size_of_val(&w[..]))]
}

/// Values in [-1, 1], the same for a seed.
fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// What all threads reach on multiply-adds in registers, two operations each; best of five.
fn peak_gflop_per_s(cpu: &Cpu) -> f64 {
    const N: usize = 4_000_000;
    let spin: fn() -> f64 = match cpu.isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => x86::spin_avx512::<N>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => x86::spin_avx2::<N>,
        _ => spin_portable::<N>,
    };
    let pass = |_| {
        let start = Instant::now();
        let flops: f64 = std::thread::scope(|s| {
            let workers: Vec<_> = (0..cpu.n_threads()).map(|_| s.spawn(spin)).collect();
            workers.into_iter().map(|worker| worker.join().expect("a worker panicked")).sum()
        });
        flops / start.elapsed().as_secs_f64() / 1e9
    };
    (0..5).map(pass).fold(0.0, f64::max)
}

/// Operations done: `n` times `CHAINS` multiply-adds of `lanes`.
const CHAINS: usize = 12;
fn flops(n: usize, lanes: usize) -> f64 {
    (2 * n * CHAINS * lanes) as f64
}

fn spin_portable<const N: usize>() -> f64 {
    let mut sums = [[0.5f32; 4]; CHAINS];
    let a = std::hint::black_box(0.999f32);
    for _ in 0..N {
        for sum in sums.iter_mut().flatten() {
            *sum = *sum * a + a;
        }
    }
    std::hint::black_box(sums);
    flops(N, 4)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, flops};
    use std::arch::x86_64::*;

    macro_rules! spin {
        ($name:ident, $feature:literal, $lanes:literal, $set:ident, $fmadd:ident) => {
            pub(super) fn $name<const N: usize>() -> f64 {
                #[target_feature(enable = $feature)]
                fn spin(n: usize) {
                    let a = $set(std::hint::black_box(0.999));
                    let mut sums = [$set(0.5); CHAINS];
                    for _ in 0..n {
                        for sum in &mut sums {
                            *sum = $fmadd(*sum, a, a);
                        }
                    }
                    std::hint::black_box(sums);
                }
                // SAFETY: called for the instruction set that `Cpu` chose, which the processor has.
                unsafe { spin(N) };
                flops(N, $lanes)
            }
        };
    }
    spin!(spin_avx2, "avx2,fma", 8, _mm256_set1_ps, _mm256_fmadd_ps);
    spin!(spin_avx512, "avx512f", 16, _mm512_set1_ps, _mm512_fmadd_ps);
}
