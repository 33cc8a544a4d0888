//! Scratch.
#![allow(clippy::print_stdout)]
use half::{bf16, f16};
use kernels::{Cpu, Elements, Isa, Matrix, reference};
use std::time::Instant;

fn rnd(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e3779b97f4a7c15) | 1;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            ((s >> 40) as f32) / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn peak(threads: usize) {
    use std::arch::x86_64::*;
    #[target_feature(enable = "avx512f")]
    fn spin(n: usize) -> f32 {
        let a = _mm512_set1_ps(1.0001);
        let mut acc = [_mm512_set1_ps(0.5); 12];
        for _ in 0..n {
            for v in &mut acc {
                *v = _mm512_fmadd_ps(*v, a, a);
            }
        }
        acc.iter().map(|v| _mm512_reduce_add_ps(*v)).sum()
    }
    let n = 20_000_000;
    let t = Instant::now();
    std::thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(move || std::hint::black_box(unsafe { spin(n) }));
        }
    });
    let e = t.elapsed().as_secs_f64();
    println!("peak {threads}: {:.0} GFLOP/s", threads as f64 * n as f64 * 12.0 * 32.0 / e / 1e9);
}

fn main() {
    let isas: Vec<Isa> = match std::env::var("BISA").as_deref() {
        Ok("avx2") => vec![Isa::Avx2],
        Ok("portable") => vec![Isa::Portable],
        _ => vec![Isa::Avx512],
    };
    for t in [1, 2] {
        peak(t);
    }
    for isa in isas {
        for threads in [1, 2] {
            let cpu = Cpu::with_isa(threads, isa);
            for (rows, cols) in [(2048, 2048), (5504, 2048), (4096, 11008)] {
                let w = rnd(rows * cols, 1);
                let h: Vec<f16> = w.iter().map(|&v| f16::from_f32(v)).collect();
                let b: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
                for (name, e) in
                    [("f16", Elements::F16(&h)), ("bf16", Elements::Bf16(&b)), ("f32", Elements::F32(&w))]
                {
                    for tokens in [1, 2, 4, 8, 16, 64, 512] {
                        if name != "f16" && tokens < 64 {
                            continue;
                        }
                        for t in [false, true] {
                            let (k, n) = if t { (rows, cols) } else { (cols, rows) };
                            let x = rnd(tokens * k, 2);
                            let mut y = vec![f32::NAN; tokens * n];
                            let m = Matrix::new(e, rows, cols).unwrap();
                            let mut best = f64::MAX;
                            let reps = if tokens < 64 {
                                20
                            } else if tokens == 64 {
                                8
                            } else {
                                4
                            };
                            for _ in 0..reps {
                                let s = Instant::now();
                                if t {
                                    cpu.matmul_t(&m, tokens, &x, &mut y, false).unwrap()
                                } else {
                                    cpu.matmul(&m, tokens, &x, &mut y, false).unwrap()
                                }
                                best = best.min(s.elapsed().as_secs_f64());
                            }
                            // spot check
                            for tok in [0, tokens / 2, tokens - 1] {
                                for col in [0, n / 3, n - 1] {
                                    let r: f64 = (0..k)
                                        .map(|i| {
                                            f64::from(x[tok * k + i])
                                                * f64::from(if t {
                                                    e.get(i * cols + col)
                                                } else {
                                                    e.get(col * cols + i)
                                                })
                                        })
                                        .sum();
                                    assert!(
                                        (f64::from(y[tok * n + col]) - r).abs() < 1e-3,
                                        "{} {r} {t} {tok} {col}",
                                        y[tok * n + col]
                                    );
                                }
                            }
                            println!(
                                "{isa:?} t{threads} {rows}x{cols} {name} {}tokens={tokens}: {:.3} ms {:.0} GFLOP/s {:.1} GB/s",
                                if t { "T " } else { "" },
                                best * 1e3,
                                2.0 * (tokens * k * n) as f64 / best / 1e9,
                                (rows * cols * e.element_bytes()) as f64 / best / 1e9
                            );
                        }
                    }
                }
            }
        }
    }
    let _ = reference::dot;
}
