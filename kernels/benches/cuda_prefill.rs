//! Times of a prompt on CUDA, part by part and whole, and of bringing weights to the device:
//!
//! ```sh
//! cargo bench -p kernels --features cuda-tests --bench cuda_prefill -- prompt [7b | 13b] [--tokens 512] [--first 0]
//! cargo bench -p kernels --features cuda-tests --bench cuda_prefill -- upload [GIB]
//! ```
//!
//! Weights are random f16; `N_DISTINCT` layers take turns, so that they come from memory, as in a model. Times are of
//! the device, medians of `REPEATS`. A part's TFLOP/s count two operations for each weight and token.

#![expect(clippy::print_stdout, reason = "the table is the program's result")]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use half::f16;
use kernels::cuda::{
    Buffer, CudaError, Device, DeviceMatrix, Dtype, FloatRows, Gemm, GemmCall, Mirror, Placement,
    PrefillAttentionCall, PrefillGatedCall, PrefillNormCall, PrefillRopeCall, rounded_bytes,
};
use kernels::{Activation, AttentionShape};

const REPEATS: usize = 9;
const N_DISTINCT: usize = 4;
const EPS: f32 = 1e-5;
const DTYPE: Dtype = Dtype::F16;

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    d: usize,
    f: usize,
    n_layers: usize,
    n_heads: usize,
    head_dim: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "7b", d: 4096, f: 11008, n_layers: 32, n_heads: 32, head_dim: 128 },
    Shape { name: "13b", d: 5120, f: 13824, n_layers: 40, n_heads: 40, head_dim: 128 },
];

/// `(rows, columns)` of a layer's matrices: stacked q, k and v; o; stacked gate and up; down, transposed.
fn matrices(shape: &Shape) -> [(usize, usize); 4] {
    let Shape { d, f, .. } = *shape;
    [(3 * d, d), (d, d), (2 * f, d), (f, d)]
}

struct Prompt {
    device: Device,
    shape: Shape,
    attention: AttentionShape,
    n_tokens: usize,
    first_position: usize,
    layers: Vec<[Buffer; 4]>,
    norm: Buffer,
    angles: Buffer,
    keys: Buffer,
    values: Buffer,
    x: Buffer,
    normed: Buffer,
    qkv: Buffer,
    rotated: Buffer,
    attended: Buffer,
    gate_up: Buffer,
    h: Buffer,
}

/// The steps of a layer, in order.
const STEPS: [&str; 9] = ["norm", "qkv", "rope", "attention", "o", "norm", "gate_up", "gated", "down"];

impl Prompt {
    fn new(device: Device, shape: Shape, n_tokens: usize, first_position: usize) -> Result<Self, CudaError> {
        let Shape { d, f, n_heads, head_dim, .. } = shape;
        let n_positions_max = first_position + n_tokens;
        let attention = AttentionShape { n_heads, n_kv_heads: n_heads, head_dim, n_positions_max };
        let mut random = Random(1);
        let layers = (0..N_DISTINCT)
            .map(|_| {
                let [qkv, o, gate_up, down] =
                    matrices(&shape).map(|(n_rows, n_cols)| device.upload(&random.halves(n_rows * n_cols)));
                Ok([qkv?, o?, gate_up?, down?])
            })
            .collect::<Result<_, CudaError>>()?;
        let floats = |n: usize| device.alloc(n * size_of::<f32>());
        let cached =
            |random: &mut Random| device.upload(&random.halves(n_heads * n_positions_max * head_dim));
        Ok(Self {
            layers,
            norm: device.upload(&vec![1.0_f32; d])?,
            angles: device.upload(&vec![0.7_f32; n_positions_max * head_dim / 2])?,
            keys: cached(&mut random)?,
            values: cached(&mut random)?,
            x: device.upload(&random.halves(n_tokens * d).iter().map(|v| v.to_f32()).collect::<Vec<_>>())?,
            normed: device.alloc(rounded_bytes(DTYPE, n_tokens, d))?,
            qkv: floats(n_tokens * 3 * d)?,
            rotated: device.alloc(n_tokens * d * DTYPE.cache().n_bytes())?,
            attended: device.alloc(rounded_bytes(DTYPE, n_tokens, d))?,
            gate_up: floats(n_tokens * 2 * f)?,
            h: device.alloc(rounded_bytes(DTYPE, n_tokens, f))?,
            device,
            shape,
            attention,
            n_tokens,
            first_position,
        })
    }

    /// Step `step` of [`STEPS`] in layer `layer`.
    fn step(&self, gemm: &mut Gemm, layer: usize, step: usize) -> Result<(), CudaError> {
        let Self { device, n_tokens, first_position, .. } = self;
        let (n_tokens, first_position) = (*n_tokens, *first_position);
        let Shape { d, f, .. } = self.shape;
        let mut multiply = |idx: usize, x: &Buffer, y: &Buffer, accumulate: bool| {
            let (n_rows, n_cols) = matrices(&self.shape)[idx];
            let w = DeviceMatrix::new(self.layers[layer % N_DISTINCT][idx].view(), DTYPE, n_rows, n_cols)?;
            let (x, y) = (x.view(), y.view());
            gemm.multiply(device, &GemmCall { w, transposed: idx == 3, n_tokens, x, y, accumulate })
        };
        match step {
            0 | 5 => device.prefill_norm(&PrefillNormCall {
                x: self.x.view(),
                weight: self.norm.view(),
                eps: EPS,
                n_tokens,
                dtype: DTYPE,
                out: self.normed.view(),
                signs: None,
            }),
            1 => multiply(0, &self.normed, &self.qkv, false),
            2 => {
                let qkv = FloatRows::new(self.qkv.view(), n_tokens, 3 * d)?;
                device.prefill_rope(&PrefillRopeCall {
                    shape: self.attention,
                    n_tokens,
                    first_position,
                    q: qkv.columns(0, d),
                    k: qkv.columns(d, d),
                    v: qkv.columns(2 * d, d),
                    cos: self.angles.view(),
                    sin: self.angles.view(),
                    cache: DTYPE.cache(),
                    rotated: self.rotated.view(),
                    k_cache: self.keys.view(),
                    v_cache: self.values.view(),
                })
            }
            3 => device.prefill_attention(&PrefillAttentionCall {
                shape: self.attention,
                n_tokens,
                first_position,
                q: self.rotated.view(),
                k_cache: self.keys.view(),
                v_cache: self.values.view(),
                dtype: DTYPE,
                out: self.attended.view(),
            }),
            4 => multiply(1, &self.attended, &self.x, true),
            6 => multiply(2, &self.normed, &self.gate_up, false),
            7 => {
                let both = FloatRows::new(self.gate_up.view(), n_tokens, 2 * f)?;
                device.prefill_gated(&PrefillGatedCall {
                    gate: both.columns(0, f),
                    up: both.columns(f, f),
                    activation: Activation::FatRelu(0.01),
                    skip: None,
                    dtype: DTYPE,
                    h: self.h.view(),
                })
            }
            _ => multiply(3, &self.h, &self.x, true),
        }
    }

    /// Median milliseconds of the device.
    fn time(&self, mut run: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        run()?;
        let mut times = Vec::new();
        for _ in 0..REPEATS {
            let start = self.device.record()?;
            run()?;
            times.push(self.device.record()?.ms_since(&start)?);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[REPEATS / 2])
    }

    fn report(&self, gemm: &mut Gemm) -> Result<(), CudaError> {
        let Shape { n_layers, .. } = self.shape;
        let by = if gemm.uses_cublas() { "cublasLt" } else { "own" };
        let weights = matrices(&self.shape).map(|(n_rows, n_cols)| n_rows * n_cols);
        for (step, name) in STEPS.iter().enumerate() {
            let all = self.time(|| (0..n_layers).try_for_each(|layer| self.step(gemm, layer, step)))?;
            let us = all * 1e3 / n_layers as f64;
            let n_weights =
                [(1, 0), (4, 1), (6, 2), (8, 3)].iter().find(|(of, _)| *of == step).map(|&(_, i)| weights[i]);
            let rate = n_weights.map_or(String::new(), |n| {
                format!("{:8.1} TFLOP/s", 2.0 * (n * self.n_tokens) as f64 / us / 1e6)
            });
            println!("{by:9} {name:10} {us:9.1} us {rate}");
        }
        let every_step = |layer: usize, gemm: &mut Gemm| {
            (0..STEPS.len()).try_for_each(|step| self.step(gemm, layer, step))
        };
        let ms = self.time(|| (0..n_layers).try_for_each(|layer| every_step(layer, gemm)))?;
        let tok_per_s = self.n_tokens as f64 / ms * 1e3;
        println!("{by:9} all layers {ms:9.2} ms {tok_per_s:8.0} tok/s");
        Ok(())
    }
}

struct Random(u64);

impl Random {
    /// `n` values about as large as those of a model.
    fn halves(&mut self, n: usize) -> Vec<f16> {
        let table: Vec<f16> = (0..1 << 16).map(|i| f16::from_f32((i - 32768) as f32 * 1e-6)).collect();
        let mut values = Vec::with_capacity(n + 3);
        while values.len() < n {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            values.extend((0..4).map(|i| table[(self.0 >> (16 * i)) as usize & 0xffff]));
        }
        values.truncate(n);
        values
    }
}

/// Seconds and GB/s of `n_bytes`.
fn print_rate(what: &str, n_bytes: usize, start: Instant) {
    let s = start.elapsed().as_secs_f64();
    println!("{what:28} {s:8.3} s {:8.2} GB/s", n_bytes as f64 / s / 1e9);
}

/// A file with a warm page cache to the device, beside what the bus gives.
fn upload(device: &Device, n_bytes: usize) -> Result<(), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let buffers = (0..16).map(|_| device.alloc_host(2 << 20)).collect::<Result<Vec<_>, _>>()?;
    print_rate("making 16 host buffers", 32 << 20, start);
    drop(buffers);
    let pinned = device.alloc_host(256 << 20)?;
    let to = device.alloc(256 << 20)?;
    for _ in 0..3 {
        let start = Instant::now();
        // SAFETY: the buffer is only read, and waited for.
        unsafe { device.write_later(to.view(), &pinned) }?;
        device.synchronize()?;
        print_rate("page-locked to device", 256 << 20, start);
    }
    let path = std::env::temp_dir().join(format!("sinf-upload-{}", std::process::id()));
    let bytes: Vec<u8> =
        (0..n_bytes / 8).flat_map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect();
    File::create(&path)?.write_all(&bytes)?;
    let file = File::open(&path)?;
    std::fs::remove_file(&path)?;
    let read = |offset: usize, buffer: &mut [u8]| file.read_exact_at(buffer, offset as u64);
    for _ in 0..3 {
        let start = Instant::now();
        let mirror = Mirror::new(device, &bytes, &read, Some(Placement::Copied), &mut |_| {})?;
        device.synchronize()?;
        print_rate("file to device", bytes.len(), start);
        let last = &bytes[bytes.len() - 4096..];
        let mut copy = vec![0_u8; last.len()];
        device.read(mirror.view(last), &mut copy)?;
        assert!(copy == last, "the end of the file did not arrive");
    }
    let start = Instant::now();
    match Mirror::new(device, &bytes, &read, Some(Placement::InPlace), &mut |_| {}) {
        Ok(_) => print_rate("registered in place", bytes.len(), start),
        Err(error) => println!("registered in place: {error}"),
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let after = |flag: &str| args.iter().position(|arg| arg == flag).map(|at| args[at + 1].parse::<usize>());
    let device = Device::open(0)?;
    println!("{}, driver {}", device.info().name, device.info().driver);
    if let Some(at) = args.iter().position(|arg| arg == "upload") {
        let gib = args.get(at + 1).map_or(Ok(4), |gib| gib.parse::<usize>())?;
        return upload(&device, gib << 30);
    }
    let shape =
        SHAPES.into_iter().find(|shape| args.iter().any(|arg| arg == shape.name)).unwrap_or(SHAPES[0]);
    let n_tokens = after("--tokens").unwrap_or(Ok(512))?;
    let first_position = after("--first").unwrap_or(Ok(0))?;
    let prompt = Prompt::new(device, shape, n_tokens, first_position)?;
    println!("{} f16, {n_tokens} tokens from position {first_position} on", shape.name);
    let start = Instant::now();
    Gemm::preload();
    println!("cublasLt opened after {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    let start = Instant::now();
    let cublas = Gemm::new(&prompt.device)?;
    println!("cublasLt {} after {:.0} ms", cublas.uses_cublas(), start.elapsed().as_secs_f64() * 1e3);
    if cublas.uses_cublas() {
        let mut cublas = cublas;
        let start = Instant::now();
        prompt.step(&mut cublas, 0, 1)?;
        prompt.device.synchronize()?;
        println!("its first product {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
        prompt.report(&mut cublas)?;
    }
    prompt.report(&mut Gemm::without_cublas())?;
    Ok(())
}
