//! Every CUDA kernel over batches against `reference`, and the way of weights to the device, on the first GPU; without
//! one these tests fail.
//!
//! Outputs are poisoned with NaN before each run and NaN is refused; each call runs twice and has to repeat itself bit
//! for bit. Inputs are rounded before the reference sees them, so that what is compared is the kernel's own error:
//! f32 sums as `common::TOLERANCE` says, tensor cores up to [`TENSOR`] of that, as they cut off where f32 arithmetic
//! rounds; and the rounding of the output.

mod common;

use std::io;
use std::sync::{LazyLock, Mutex, MutexGuard};

use common::{
    Random, TOLERANCE, Weights, differences, integers, random_planes, sign_words, thresholds_beside,
};
use half::{bf16, f16};
use kernels::cuda::{
    Buffer, CudaError, Device, DeviceLimits, DeviceLowRank, DeviceMatrix, DevicePlanes, DeviceResidual,
    DeviceThresholds, Dtype, FloatRows, Gemm, GemmCall, LowRankCall, Mirror, Placement, PrefillAttentionCall,
    PrefillGatedCall, PrefillNormCall, PrefillQuantiseCall, PrefillRopeCall, PrefillSkipCall,
    PrefillSkipScoresCall, Quantised, UploadError, UploadPlan, View, quantised_bytes, rounded_bytes, upload,
};
use kernels::{
    Activation, AttentionShape, BitPlanes, Elements, Limits, LowRank, Residual, SignMatrix, Thresholds,
    reference,
};

const EPS: f32 = 1e-5;
/// Error of a sum on tensor cores, in errors of an f32 sum.
const TENSOR: f64 = 4.0;
/// Numbers of tokens: one, less than a matrix, a whole tile, tiles and a part of one.
const TOKENS: [usize; 4] = [1, 7, 64, 300];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
/// Floats on each side of an output that no kernel may change.
const MARGIN: usize = 64;

static DEVICE: LazyLock<Mutex<Device>> = LazyLock::new(|| {
    let device = Device::open(0).unwrap_or_else(|error| panic!("these tests need a GPU: {error}"));
    Mutex::new(device)
});

/// The device, for one test at a time.
fn device() -> MutexGuard<'static, Device> {
    DEVICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// As `Weights::new` counts the types.
fn kind(dtype: Dtype) -> usize {
    DTYPES.iter().position(|&other| other == dtype).unwrap()
}

/// Relative error of one rounding to the planes of `dtype`.
fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 0.0,
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-17),
    }
}

fn upload_elements(device: &Device, elements: &Elements<'_>) -> Buffer {
    match elements {
        Elements::F32(v) => device.upload(v),
        Elements::F16(v) => device.upload(v),
        Elements::Bf16(v) => device.upload(v),
    }
    .unwrap()
}

/// A batched input of products, and what it stands for.
fn upload_rounded(device: &Device, dtype: Dtype, values: &[f32]) -> (Buffer, Vec<f32>) {
    match dtype {
        Dtype::F32 => (device.upload(values).unwrap(), values.to_vec()),
        Dtype::F16 => {
            let rounded: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
            (device.upload(&rounded).unwrap(), rounded.iter().map(|v| v.to_f32()).collect())
        }
        Dtype::Bf16 => {
            let high: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            let rest = |(v, high): (&f32, &bf16)| bf16::from_f32(v - high.to_f32());
            let low: Vec<bf16> = values.iter().zip(&high).map(rest).collect();
            let sums = high.iter().zip(&low).map(|(high, low)| high.to_f32() + low.to_f32()).collect();
            (device.upload(&[high, low].concat()).unwrap(), sums)
        }
    }
}

fn download<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(device: &Device, view: View<'_>) -> Vec<T> {
    let mut values = vec![T::zeroed(); view.len_bytes() / size_of::<T>()];
    device.read(view, &mut values).unwrap();
    values
}

/// What a kernel left in the planes of `view`.
fn download_rounded(device: &Device, dtype: Dtype, view: View<'_>) -> Vec<f32> {
    match dtype {
        Dtype::F32 => download(device, view),
        Dtype::F16 => download::<f16>(device, view).into_iter().map(f16::to_f32).collect(),
        Dtype::Bf16 => {
            let planes = download::<bf16>(device, view);
            let (high, low) = planes.split_at(planes.len() / 2);
            high.iter().zip(low).map(|(high, low)| high.to_f32() + low.to_f32()).collect()
        }
    }
}

/// Bytes that are NaN in every type.
fn poison(device: &Device, len_bytes: usize) -> Buffer {
    device.upload(&vec![0xff_u8; len_bytes]).unwrap()
}

/// The result of `run` into poisoned `len_bytes`, the same twice.
fn twice(device: &Device, dtype: Dtype, len_bytes: usize, mut run: impl FnMut(View<'_>)) -> Vec<f32> {
    let [first, second] = [(), ()].map(|()| {
        let out = poison(device, len_bytes);
        run(out.view());
        download_rounded(device, dtype, out.view())
    });
    assert_eq!(bits(&first), bits(&second), "not the same in two runs");
    first
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f32], slack: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - f64::from(*want)).abs();
        assert!(
            error <= slack(i) + 1e-7,
            "{what}[{i}] is {got}, not {want}: off by {error:e}, {:e}",
            slack(i)
        );
    }
}

#[test]
fn embeddings_are_rows() {
    let device = device();
    let mut random = Random::new(1);
    for (n_cols, n_tokens) in [(1, 1), (703, 7), (4096, 64), (2050, 300)] {
        for dtype in DTYPES {
            let n_rows = 50;
            let weights = Weights::new(kind(dtype), &random.values(n_rows * n_cols));
            let buffer = upload_elements(&device, &weights.elements());
            let w = DeviceMatrix::new(buffer.view(), dtype, n_rows, n_cols).unwrap();
            let mut ids: Vec<u32> = (0..n_tokens).map(|_| random.below(n_rows as u64) as u32).collect();
            let tokens = device.upload(&ids).unwrap();
            // Checked on the host; here it must not read past the end.
            ids[0] = u32::MAX;
            let hostile = device.upload(&ids).unwrap();
            ids[0] = n_rows as u32 - 1;
            let run = |tokens: &Buffer| {
                twice(&device, Dtype::F32, n_tokens * n_cols * 4, |x| {
                    device.prefill_embed(&w, tokens.view(), x).unwrap();
                })
            };
            let rows = |ids: &[u32]| -> Vec<f32> {
                let row = |&id: &u32| (0..n_cols).map(move |col| id as usize * n_cols + col);
                ids.iter().flat_map(row).map(|at| weights.elements().get(at)).collect()
            };
            assert_eq!(bits(&run(&hostile)), bits(&rows(&ids)));
            let ids = download::<u32>(&device, tokens.view());
            assert_eq!(bits(&run(&tokens)), bits(&rows(&ids)));
        }
    }
}

#[test]
fn norms_and_their_signs_are_the_reference() {
    let device = device();
    let mut random = Random::new(2);
    for n_cols in [1, 31, 704, 1111, 4096, 5120] {
        for n_tokens in TOKENS {
            let x = random.values(n_tokens * n_cols);
            let weight = random.values(n_cols);
            let mut want = vec![0.0; x.len()];
            for (x, want) in x.chunks_exact(n_cols).zip(want.chunks_exact_mut(n_cols)) {
                reference::rmsnorm(x, &weight, EPS, want);
            }
            let n_words = n_cols.div_ceil(32);
            let mut want_signs = vec![0; n_tokens * n_words];
            for (x, words) in want.chunks_exact(n_cols).zip(want_signs.chunks_exact_mut(n_words)) {
                reference::sign_pack(x, words);
            }
            let (x, weight) = (device.upload(&x).unwrap(), device.upload(&weight).unwrap());
            for dtype in DTYPES {
                for signs in [None, Some(poison(&device, n_tokens * n_words * 4))] {
                    let got = twice(&device, dtype, rounded_bytes(dtype, n_tokens, n_cols), |out| {
                        let (x, weight, signs) = (x.view(), weight.view(), signs.as_ref().map(Buffer::view));
                        let call = PrefillNormCall { x, weight, eps: EPS, n_tokens, dtype, out, signs };
                        device.prefill_norm(&call).unwrap();
                    });
                    assert_close("norm", &got, &want, |i| {
                        (2.0 * TOLERANCE + rounding(dtype)) * f64::from(want[i]).abs()
                    });
                    if let Some(signs) = signs {
                        assert_eq!(download::<u32>(&device, signs.view()), want_signs);
                    }
                }
            }
        }
    }
}

/// Head widths with tensor cores and without, and groups of query heads.
const HEADS: [(usize, usize, usize); 8] =
    [(32, 4, 4), (64, 8, 2), (80, 3, 1), (96, 2, 2), (128, 4, 1), (256, 2, 1), (34, 3, 3), (112, 6, 2)];
/// Positions before a batch.
const FIRST_POSITIONS: [usize; 3] = [0, 1, 131];

/// Keys or values whose first `n_positions` are random; the rest are NaN, as nobody wrote them.
fn cache(random: &mut Random, shape: &AttentionShape, dtype: Dtype, n_positions: usize) -> Weights {
    let n = shape.n_positions_max * shape.head_dim;
    let mut values = random.values(shape.n_kv_heads * n);
    for head in values.chunks_exact_mut(n) {
        head[n_positions * shape.head_dim..].fill(f32::NAN);
    }
    Weights::new(kind(dtype), &values)
}

#[test]
fn rotations_reach_queries_and_cache() {
    let device = device();
    let mut random = Random::new(3);
    for (head_dim, n_heads, n_kv_heads) in HEADS {
        for (n_tokens, first_position) in TOKENS.into_iter().zip([0, 5, 131, 17]) {
            for cache_type in [Dtype::F32, Dtype::F16] {
                let n_positions_max = first_position + n_tokens + 3;
                let shape = AttentionShape { n_heads, n_kv_heads, head_dim, n_positions_max };
                let (q_width, kv_width) = (n_heads * head_dim, n_kv_heads * head_dim);
                let width = q_width + 2 * kv_width;
                let qkv = random.values(n_tokens * width);
                let (cos, sin) = (
                    random.values(n_positions_max * head_dim / 2),
                    random.values(n_positions_max * head_dim / 2),
                );
                let old = cache(&mut random, &shape, cache_type, first_position);

                let (mut want_q, mut want_caches) = (Vec::new(), [(); 2].map(|()| Vec::new()));
                for want in &mut want_caches {
                    *want = (0..old.elements().len()).map(|i| old.elements().get(i)).collect();
                }
                for (token, row) in qkv.chunks_exact(width).enumerate() {
                    let position = first_position + token;
                    let angles = position * head_dim / 2..(position + 1) * head_dim / 2;
                    let mut rotated = row[..q_width + kv_width].to_vec();
                    reference::rope(&mut rotated, head_dim, &cos[angles.clone()], &sin[angles]);
                    want_q.extend_from_slice(&rotated[..q_width]);
                    for (want, new) in
                        want_caches.iter_mut().zip([&rotated[q_width..], &row[q_width + kv_width..]])
                    {
                        for (head, new) in new.chunks_exact(head_dim).enumerate() {
                            let at = (head * n_positions_max + position) * head_dim;
                            want[at..at + head_dim].copy_from_slice(new);
                        }
                    }
                }

                let qkv = device.upload(&qkv).unwrap();
                let (cos, sin) = (device.upload(&cos).unwrap(), device.upload(&sin).unwrap());
                let caches = [(); 2].map(|()| upload_elements(&device, &old.elements()));
                let rows = FloatRows::new(qkv.view(), n_tokens, width).unwrap();
                let n_bytes = n_tokens * q_width * cache_type.n_bytes();
                let got = twice(&device, cache_type, n_bytes, |rotated| {
                    let call = PrefillRopeCall {
                        shape,
                        n_tokens,
                        first_position,
                        q: rows.columns(0, q_width),
                        k: rows.columns(q_width, kv_width),
                        v: rows.columns(q_width + kv_width, kv_width),
                        cos: cos.view(),
                        sin: sin.view(),
                        cache: cache_type,
                        rotated,
                        k_cache: caches[0].view(),
                        v_cache: caches[1].view(),
                    };
                    device.prefill_rope(&call).unwrap();
                });
                // Two products of values of at most three.
                let slack = |_| 18.0 * (TOLERANCE + rounding(cache_type));
                assert_close("rotated", &got, &want_q, slack);
                for (want, got) in want_caches.iter().zip(&caches) {
                    let got = download_rounded(&device, cache_type, got.view());
                    for (i, (got, want)) in got.iter().zip(want).enumerate() {
                        let close = f64::from((got - want).abs()) <= slack(i);
                        assert!(close || got.is_nan() && want.is_nan(), "cache[{i}] is {got}, not {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn attention_is_the_reference() {
    let device = device();
    let mut random = Random::new(4);
    for (head_dim, n_heads, n_kv_heads) in HEADS {
        for n_tokens in TOKENS {
            for first_position in FIRST_POSITIONS {
                for dtype in DTYPES {
                    let n_positions = first_position + n_tokens;
                    let shape =
                        AttentionShape { n_heads, n_kv_heads, head_dim, n_positions_max: n_positions + 70 };
                    let width = n_heads * head_dim;
                    let cache_type = dtype.cache();
                    let (k, v) = (
                        cache(&mut random, &shape, cache_type, n_positions),
                        cache(&mut random, &shape, cache_type, n_positions),
                    );
                    let magnitudes: Vec<f32> =
                        (0..v.elements().len()).map(|i| v.elements().get(i).abs()).collect();
                    let (q, q_values) = upload_rounded(&device, cache_type, &random.values(n_tokens * width));
                    let (mut want, mut terms) = (vec![0.0; n_tokens * width], vec![0.0; n_tokens * width]);
                    // The reference is slow: some of the tokens, the last among them.
                    let tokens: Vec<usize> = (0..n_tokens).rev().step_by(1 + n_tokens / 6).collect();
                    for &token in &tokens {
                        let row = token * width..(token + 1) * width;
                        let (q, n) = (&q_values[row.clone()], first_position + token + 1);
                        reference::attention(
                            &shape,
                            q,
                            k.elements(),
                            v.elements(),
                            n,
                            &mut want[row.clone()],
                        );
                        let magnitudes = Elements::F32(&magnitudes);
                        reference::attention(&shape, q, k.elements(), magnitudes, n, &mut terms[row]);
                    }

                    let (k, v) =
                        (upload_elements(&device, &k.elements()), upload_elements(&device, &v.elements()));
                    let got = twice(&device, dtype, rounded_bytes(dtype, n_tokens, width), |out| {
                        let (q, k_cache, v_cache) = (q.view(), k.view(), v.view());
                        let call = PrefillAttentionCall {
                            shape,
                            n_tokens,
                            first_position,
                            q,
                            k_cache,
                            v_cache,
                            dtype,
                            out,
                        };
                        device.prefill_attention(&call).unwrap();
                    });
                    assert!(got.iter().all(|v| v.is_finite()), "{shape:?} {dtype:?}: unwritten or NaN");
                    for token in tokens {
                        let row = token * width..(token + 1) * width;
                        // A score's own error, and on tensor cores the rounding of weights to f16.
                        let of_weights = if dtype == Dtype::F32 { 1e-5 } else { 2f64.powi(-10) };
                        assert_close(
                            &format!("{shape:?} {dtype:?} token {token} after {first_position}"),
                            &got[row.clone()],
                            &want[row.clone()],
                            |i| f64::from(terms[row.start + i]) * (of_weights + rounding(dtype)),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn gated_rows_are_the_reference() {
    let device = device();
    let mut random = Random::new(5);
    for n_rows in [1, 33, 704, 1376, 5504] {
        for n_tokens in TOKENS {
            // Gate and up side by side, as a product with stacked weights leaves them.
            let both = random.values(n_tokens * 2 * n_rows);
            let skip: Vec<u8> = (0..n_tokens * n_rows).map(|_| u8::from(random.below(3) == 0)).collect();
            let buffer = device.upload(&both).unwrap();
            let skip_buffer = device.upload(&skip).unwrap();
            let rows = FloatRows::new(buffer.view(), n_tokens, 2 * n_rows).unwrap();
            for activation in [Activation::Relu, Activation::FatRelu(0.3), Activation::Silu] {
                for masked in [false, true] {
                    let want: Vec<f32> = (0..n_tokens * n_rows)
                        .map(|i| {
                            let (token, row) = (i / n_rows, i % n_rows);
                            let gate = activation.apply(both[token * 2 * n_rows + row]);
                            let out = gate == 0.0 || masked && skip[i] != 0;
                            if out { 0.0 } else { gate * both[token * 2 * n_rows + n_rows + row] }
                        })
                        .collect();
                    for dtype in DTYPES {
                        let got = twice(&device, dtype, rounded_bytes(dtype, n_tokens, n_rows), |h| {
                            let call = PrefillGatedCall {
                                gate: rows.columns(0, n_rows),
                                up: rows.columns(n_rows, n_rows),
                                activation,
                                skip: masked.then(|| skip_buffer.view()),
                                dtype,
                                h,
                            };
                            device.prefill_gated(&call).unwrap();
                        });
                        assert_close("h", &got, &want, |i| {
                            (2.0 * TOLERANCE + rounding(dtype)) * f64::from(want[i]).abs()
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn rounding_saturates_and_keeps_nan() {
    let device = device();
    let both = device.upload(&[1e6_f32, f32::NAN, -1e6, 1e6, 1.0, 1e6]).unwrap();
    let rows = FloatRows::new(both.view(), 1, 6).unwrap();
    let h = poison(&device, 6);
    device
        .prefill_gated(&PrefillGatedCall {
            gate: rows.columns(0, 3),
            up: rows.columns(3, 3),
            activation: Activation::Silu,
            skip: None,
            dtype: Dtype::F16,
            h: h.view(),
        })
        .unwrap();
    let got = download::<f16>(&device, h.view());
    assert_eq!(got[0], f16::MAX);
    assert!(got[1].is_nan());
    assert_eq!(got[2].to_f32(), 0.0);
}

#[test]
fn skipped_rows_are_the_reference_bit_for_bit() {
    let device = device();
    let mut random = Random::new(6);
    for (n_rows, n_cols) in [(1, 1), (100, 33), (704, 256), (1376, 512), (130, 4096), (65, 5100)] {
        let weights = Weights::new(0, &random.values(n_rows * n_cols));
        let words = sign_words(&weights.matrix(n_rows, n_cols));
        let n_words = n_cols.div_ceil(32);
        let signs = SignMatrix { words: &words, n_rows, n_words };
        let per_row: Vec<u32> = (0..n_rows).map(|_| random.below(n_cols as u64 + 1) as u32).collect();
        let (w_signs, limits_buffer) = (device.upload(&words).unwrap(), device.upload(&per_row).unwrap());
        for n_tokens in TOKENS {
            let mut x_words = vec![0; n_tokens * n_words];
            for words in x_words.chunks_exact_mut(n_words) {
                reference::sign_pack(&random.values(n_cols), words);
            }
            let x_signs = device.upload(&x_words).unwrap();
            let layer = n_cols as u32 / 2;
            for (limits, on_device) in [
                (Limits::Layer(layer), DeviceLimits::Layer(layer)),
                (Limits::Layer(n_cols as u32), DeviceLimits::Layer(n_cols as u32)),
                (Limits::PerRow(&per_row), DeviceLimits::PerRow(limits_buffer.view())),
            ] {
                let mut want = vec![false; n_tokens * n_rows];
                for (skip, x) in want.chunks_exact_mut(n_rows).zip(x_words.chunks_exact(n_words)) {
                    reference::predict(&signs, &limits, x, skip);
                }
                let skip = poison(&device, n_tokens * n_rows);
                let call = PrefillSkipCall {
                    n_tokens,
                    n_rows,
                    n_words,
                    x_signs: x_signs.view(),
                    w_signs: w_signs.view(),
                    limits: on_device,
                    skip: skip.view(),
                };
                device.prefill_skip(&call).unwrap();
                let got: Vec<bool> =
                    download::<u8>(&device, skip.view()).iter().map(|&skip| skip != 0).collect();
                assert_eq!(got, want);
            }
        }
    }
}

/// Inputs of integers, which the norm leaves integers in 8 bits, with thresholds half a unit beside the scores of one of
/// them; an input of zeros and one of NaN among them.
#[test]
fn rows_skipped_by_their_score_are_the_reference_bit_for_bit() {
    let device = device();
    let mut random = Random::new(16);
    let mut found = Vec::new();
    for (n_rows, n_cols) in [(1, 1), (100, 33), (704, 256), (1376, 512), (130, 4096), (65, 5100)] {
        let n_words = usize::div_ceil(n_cols, 32);
        let ones = vec![1.0; n_cols];
        let weight = device.upload(&ones).unwrap();
        for (n_tokens, n_planes) in TOKENS.into_iter().zip([1, 2, 3, 2]) {
            let words = random_planes(&mut random, n_planes, n_rows, n_cols);
            let (sign_words, low) = words.split_at(n_rows * n_words);
            let planes = BitPlanes { signs: SignMatrix { words: sign_words, n_rows, n_words }, low };
            // The same values elsewhere, for one scale, and other signs.
            let values = integers(&mut random, n_cols);
            let mut x = Vec::with_capacity(n_tokens * n_cols);
            for _ in 0..n_tokens {
                let first = random.below(n_cols as u64) as usize;
                let turned = values[first..].iter().chain(&values[..first]);
                x.extend(turned.map(|&x| if random.below(2) == 0 { x } else { -x }));
            }
            if n_tokens > 2 {
                x[..n_cols].fill(0.0);
                x[2 * n_cols - 1] = f32::NAN;
            }
            let mut normed = vec![0.0; x.len()];
            for (x, normed) in x.chunks_exact(n_cols).zip(normed.chunks_exact_mut(n_cols)) {
                reference::rmsnorm(x, &ones, EPS, normed);
            }
            let last = &normed[(n_tokens - 1) * n_cols..];
            let beside = thresholds_beside(&planes, last, [0.5, 0.0], &mut random);
            let (signs, low_buffer) = (device.upload(sign_words).unwrap(), device.upload(low).unwrap());
            let (x, beside_buffer) = (device.upload(&x).unwrap(), device.upload(&beside).unwrap());
            let (x_planes, scales) = (
                device.upload(&vec![u8::MAX; quantised_bytes(n_tokens, n_cols)]).unwrap(),
                device.upload(&vec![f32::NAN; n_tokens]).unwrap(),
            );
            let out = Quantised { planes: x_planes.view(), scales: scales.view() };
            let call = PrefillQuantiseCall { x: x.view(), weight: weight.view(), eps: EPS, n_tokens, out };
            device.prefill_quantise(&call).unwrap();
            for (name, thresholds, on_device) in [
                ("beside", Thresholds::PerRow(&beside), DeviceThresholds::PerRow(beside_buffer.view())),
                ("one", Thresholds::Layer(beside[0]), DeviceThresholds::Layer(beside[0])),
                ("none", Thresholds::Layer(-1e30), DeviceThresholds::Layer(-1e30)),
                ("all", Thresholds::Layer(1e30), DeviceThresholds::Layer(1e30)),
            ] {
                let mut want = vec![false; n_tokens * n_rows];
                let mut q = vec![0; n_cols];
                for (x, skip) in normed.chunks_exact(n_cols).zip(want.chunks_exact_mut(n_rows)) {
                    let scale = reference::quantise(x, &mut q);
                    reference::predict_scores(&planes, &thresholds, &q, scale, skip);
                }
                let skip = poison(&device, n_tokens * n_rows);
                let call = PrefillSkipScoresCall {
                    n_tokens,
                    n_rows,
                    n_cols,
                    x: out,
                    planes: DevicePlanes {
                        signs: signs.view(),
                        low: (n_planes > 1).then(|| low_buffer.view()),
                    },
                    thresholds: on_device,
                    skip: skip.view(),
                };
                device.prefill_skip_scores(&call).unwrap();
                let got: Vec<bool> =
                    download::<u8>(&device, skip.view()).iter().map(|&skip| skip != 0).collect();
                let case = format!(
                    "{n_tokens} tokens, {n_rows} rows of {n_cols} columns in {n_planes} planes, thresholds {name}"
                );
                found.extend(differences(&case, &got, &want));
            }
        }
    }
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

/// Inputs as the norm leaves them, one of NaN among them, with thresholds that are the scores of the last one, or the
/// next float above.
#[test]
fn rows_skipped_by_low_rank_are_the_reference_bit_for_bit() {
    let device = device();
    let mut random = Random::new(26);
    let mut found = Vec::new();
    // One for all ranks, as layers of a model share it.
    let scratch = device.low_rank_scratch(600).unwrap();
    for (n_rows, n_cols, rank) in [
        (1, 1, 1),
        (100, 33, 31),
        (704, 256, 16),
        (1376, 512, 100),
        (1376, 512, 104),
        (130, 4096, 256),
        (65, 5100, 333),
        (300, 640, 320),
        (300, 1024, 600),
        (700, 9216, 320),
        (20_000, 512, 8),
    ] {
        let n_words = usize::div_ceil(n_cols, 32);
        let weight = random.values(n_cols);
        let weight_buffer = device.upload(&weight).unwrap();
        let factors =
            [Weights::new(1, &random.values(rank * n_cols)), Weights::new(1, &random.values(n_rows * rank))];
        let (fc1, fc2) = (factors[0].matrix(rank, n_cols), factors[1].matrix(n_rows, rank));
        let uploaded = [&fc1, &fc2].map(|w| upload_elements(&device, &w.data));
        let words = random_planes(&mut random, 1, n_rows, n_cols);
        let (signs, scales) = (device.upload(&words).unwrap(), random.values(n_rows));
        let scales_buffer = device.upload(&scales).unwrap();
        for (n_tokens, relu, has_residual) in
            [(1, false, false), (1, true, true), (7, true, false), (9, false, true), (20, true, true)]
        {
            let mut x = random.values(n_tokens * n_cols);
            if n_tokens > 1 {
                x[n_cols - 1] = f32::NAN;
            }
            let x = device.upload(&x).unwrap();
            let normed = poison(&device, n_tokens * n_cols * 4);
            let (planes, x_scales) = (
                device.upload(&vec![u8::MAX; quantised_bytes(n_tokens, n_cols)]).unwrap(),
                device.upload(&vec![f32::NAN; n_tokens]).unwrap(),
            );
            let (x, weight, dtype) = (x.view(), weight_buffer.view(), Dtype::F32);
            let out = normed.view();
            let call = PrefillNormCall { x, weight, eps: EPS, n_tokens, dtype, out, signs: None };
            device.prefill_norm(&call).unwrap();
            let quantised = Quantised { planes: planes.view(), scales: x_scales.view() };
            let call = PrefillQuantiseCall { x, weight, eps: EPS, n_tokens, out: quantised };
            device.prefill_quantise(&call).unwrap();
            let input: Vec<f32> = download(&device, normed.view());

            let residual = Residual { signs: SignMatrix { words: &words, n_rows, n_words }, scales: &scales };
            let factors = LowRank { fc1, fc2, relu, residual: has_residual.then_some(residual) };
            let on_device = DeviceLowRank {
                fc1: DeviceMatrix::new(uploaded[0].view(), Dtype::F16, rank, n_cols).unwrap(),
                fc2: DeviceMatrix::new(uploaded[1].view(), Dtype::F16, n_rows, rank).unwrap(),
                relu,
                residual: has_residual
                    .then(|| DeviceResidual { signs: signs.view(), scales: scales_buffer.view() }),
            };
            let scores = reference::low_rank_scores(&factors, &input[(n_tokens - 1) * n_cols..]);
            let beside: Vec<f32> = scores
                .iter()
                .map(|&score| if random.below(2) == 0 { score } else { score.next_up() })
                .collect();
            let beside_buffer = device.upload(&beside).unwrap();
            for (name, thresholds, thresholds_on_device) in [
                ("beside", Thresholds::PerRow(&beside), DeviceThresholds::PerRow(beside_buffer.view())),
                ("one", Thresholds::Layer(scores[0]), DeviceThresholds::Layer(scores[0])),
                ("none", Thresholds::Layer(f32::NEG_INFINITY), DeviceThresholds::Layer(f32::NEG_INFINITY)),
                ("all", Thresholds::Layer(f32::INFINITY), DeviceThresholds::Layer(f32::INFINITY)),
                ("no number", Thresholds::Layer(f32::NAN), DeviceThresholds::Layer(f32::NAN)),
            ] {
                let mut want = vec![false; n_tokens * n_rows];
                for (x, skip) in input.chunks_exact(n_cols).zip(want.chunks_exact_mut(n_rows)) {
                    reference::predict_low_rank(&factors, &thresholds, x, skip);
                }
                let case = format!(
                    "{n_tokens} tokens, {n_rows} rows of {n_cols} columns at rank {rank}, relu {relu}, residual {has_residual}, thresholds {name}"
                );
                let want: Vec<u8> = want.iter().map(|&skip| skip.into()).collect();
                let ways: &[bool] = if n_tokens == 1 { &[false, true, false, true] } else { &[false, false] };
                for &in_one in ways {
                    let (inner, skip) =
                        (poison(&device, n_tokens * rank * 4), poison(&device, n_tokens * n_rows));
                    let call = LowRankCall {
                        n_tokens,
                        x: normed.view(),
                        quantised: has_residual.then_some(quantised),
                        factors: on_device,
                        thresholds: thresholds_on_device,
                        skip: skip.view(),
                    };
                    if in_one {
                        device.predict_low_rank(&call, &scratch).unwrap();
                    } else {
                        device.prefill_skip_low_rank(&call, inner.view()).unwrap();
                    }
                    let case = format!("{case}, in one kernel {in_one}");
                    found.extend(differences(&case, &download(&device, skip.view()), &want));
                }
            }
        }
    }
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

/// Inputs and outputs of products: odd, rows that are and are not multiples of 16 bytes, enough for large tiles.
const PRODUCTS: [(usize, usize); 8] =
    [(1, 1), (33, 130), (100, 36), (64, 4352), (72, 8200), (256, 704), (1376, 72), (4096, 24)];

#[test]
fn products_are_the_reference() {
    let device = device();
    let mut gemms = vec![Gemm::without_cublas()];
    // Where there is no cuBLASLt, this one has the same kernels as the first.
    gemms.push(Gemm::new(&device).unwrap());
    assert_eq!(gemms[1].uses_cublas(), Gemm::preload());
    let mut random = Random::new(7);
    for (n_in, n_out) in PRODUCTS {
        for dtype in DTYPES {
            for transposed in [false, true] {
                let (n_rows, n_cols) = if transposed { (n_in, n_out) } else { (n_out, n_in) };
                let weights = Weights::new(kind(dtype), &random.values(n_rows * n_cols));
                let magnitudes: Vec<f32> =
                    (0..n_rows * n_cols).map(|i| weights.elements().get(i).abs()).collect();
                let magnitudes = Weights::F32(magnitudes);
                let multiply = |weights: &Weights, x: &[f32], y: &mut [f32]| {
                    let w = weights.matrix(n_rows, n_cols);
                    if transposed { reference::matmul_t(&w, x, y) } else { reference::matmul(&w, x, y) }
                };
                let buffer = upload_elements(&device, &weights.elements());
                let w = DeviceMatrix::new(buffer.view(), dtype, n_rows, n_cols).unwrap();
                for n_tokens in TOKENS {
                    let (x, values) = upload_rounded(&device, dtype, &random.values(n_tokens * n_in));
                    let (mut want, mut terms) = (vec![0.0; n_tokens * n_out], vec![0.0; n_tokens * n_out]);
                    multiply(&weights, &values, &mut want);
                    let absolute: Vec<f32> = values.iter().map(|v| v.abs()).collect();
                    multiply(&magnitudes, &absolute, &mut terms);
                    for (gemm, accumulate) in (0..gemms.len()).flat_map(|i| [(i, false), (i, true)]) {
                        let gemm = &mut gemms[gemm];
                        let old = if accumulate { 0.75 } else { 0.0 };
                        let want: Vec<f32> = want.iter().map(|want| old + want).collect();
                        let runs = [(), ()].map(|()| {
                            let mut start = vec![f32::NAN; n_tokens * n_out + 2 * MARGIN];
                            if accumulate {
                                start[MARGIN..MARGIN + n_tokens * n_out].fill(old);
                            }
                            let y = device.upload(&start).unwrap();
                            gemm.multiply(
                                &device,
                                &GemmCall {
                                    w,
                                    transposed,
                                    n_tokens,
                                    x: x.view(),
                                    y: y.view().slice(MARGIN * 4, n_tokens * n_out * 4),
                                    accumulate,
                                },
                            )
                            .unwrap();
                            download::<f32>(&device, y.view())
                        });
                        assert_eq!(bits(&runs[0]), bits(&runs[1]), "not the same in two runs");
                        let (before, rest) = runs[0].split_at(MARGIN);
                        let (got, after) = rest.split_at(n_tokens * n_out);
                        assert!(before.iter().chain(after).all(|v| v.is_nan()), "wrote outside y");
                        let name = format!(
                            "{dtype:?} {n_tokens} x {n_in} x {n_out} transposed {transposed} accumulate {accumulate} \
                             cublas {}",
                            gemm.uses_cublas()
                        );
                        assert_close(&name, got, &want, |i| TENSOR * TOLERANCE * f64::from(terms[i] + old));
                    }
                }
            }
        }
    }
}

#[test]
fn products_of_many_tokens_are_those_of_few() {
    let device = device();
    let mut gemm = Gemm::without_cublas();
    let mut random = Random::new(9);
    // As deep as models; many outputs, so that kernels with the largest tiles are chosen.
    let (n_in, n_out, n_tokens, n_few) = (4096, 8200, 300, 100);
    for dtype in [Dtype::F16, Dtype::Bf16] {
        for transposed in [false, true] {
            let (n_rows, n_cols) = if transposed { (n_in, n_out) } else { (n_out, n_in) };
            let weights = upload_elements(
                &device,
                &Weights::new(kind(dtype), &random.values(n_rows * n_cols)).elements(),
            );
            let w = DeviceMatrix::new(weights.view(), dtype, n_rows, n_cols).unwrap();
            let values = random.values(n_tokens * n_in);
            let mut multiply = |values: &[f32]| {
                let (x, _) = upload_rounded(&device, dtype, values);
                let n_tokens = values.len() / n_in;
                twice(&device, Dtype::F32, n_tokens * n_out * 4, |y| {
                    let x = x.view();
                    gemm.multiply(&device, &GemmCall { w, transposed, n_tokens, x, y, accumulate: false })
                        .unwrap();
                })
            };
            let many = multiply(&values);
            let few: Vec<f32> = values.chunks(n_few * n_in).flat_map(&mut multiply).collect();
            // Values are 0.6 large in the mean.
            assert_close("y", &many, &few, |_| TENSOR * TOLERANCE * 0.4 * n_in as f64);
        }
    }
}

#[test]
fn neighbours_make_stacks() {
    let device = device();
    let buffer = device.alloc(64 * 32 * 2).unwrap();
    let rows = |first: usize, n_rows: usize, dtype: Dtype| {
        DeviceMatrix::new(buffer.view().slice(first * 64, n_rows * 64), dtype, n_rows, 64 / dtype.n_bytes())
            .unwrap()
    };
    let (first, second, third) = (rows(0, 8, Dtype::F16), rows(8, 3, Dtype::F16), rows(11, 53, Dtype::F16));
    let stack = DeviceMatrix::stacked(&[first, second, third]).unwrap();
    assert_eq!((stack.n_rows(), stack.n_cols(), stack.n_bytes()), (64, 32, 64 * 64));
    assert!(DeviceMatrix::stacked(&[]).is_none());
    assert!(DeviceMatrix::stacked(&[first, third]).is_none(), "a gap");
    assert!(DeviceMatrix::stacked(&[second, first]).is_none(), "the wrong order");
    assert!(DeviceMatrix::stacked(&[first, rows(8, 3, Dtype::Bf16)]).is_none(), "two types");
    assert!(DeviceMatrix::stacked(&[first, rows(8, 3, Dtype::F32)]).is_none(), "two widths");
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let device = device();
    let (small, large) = (device.alloc(64).unwrap(), device.alloc(4096).unwrap());
    let refused =
        |result: Result<(), CudaError>| assert!(matches!(result, Err(CudaError::Shape(_))), "{result:?}");
    let w = DeviceMatrix::new(large.view(), Dtype::F16, 64, 32).unwrap();
    refused(device.prefill_embed(&w, small.view(), small.view()));
    let norm = PrefillNormCall {
        x: large.view(),
        weight: small.view(),
        eps: EPS,
        n_tokens: 64,
        dtype: Dtype::F16,
        out: large.view(),
        signs: None,
    };
    refused(device.prefill_norm(&norm));
    let shape = AttentionShape { n_heads: 1, n_kv_heads: 1, head_dim: 32, n_positions_max: 64 };
    let attention = PrefillAttentionCall {
        shape,
        n_tokens: 1,
        first_position: 64,
        q: small.view(),
        k_cache: large.view(),
        v_cache: large.view(),
        dtype: Dtype::F16,
        out: small.view(),
    };
    refused(device.prefill_attention(&attention));
    let call =
        GemmCall { w, transposed: false, n_tokens: 1, x: small.view(), y: small.view(), accumulate: false };
    refused(Gemm::without_cublas().multiply(&device, &call));
    device.prefill_attention(&PrefillAttentionCall { first_position: 63, ..attention }).unwrap();
    device.synchronize().unwrap();
}

#[test]
fn mirrors_hold_the_bytes() {
    let device = device();
    let mut random = Random::new(8);
    let bytes: Vec<u8> = (0..(70 << 20) + 12_345).map(|_| random.below(256) as u8).collect();
    let read = |offset: usize, buffer: &mut [u8]| {
        buffer.copy_from_slice(&bytes[offset..offset + buffer.len()]);
        Ok(())
    };
    for len in [0, 1, 4096, 100_001, bytes.len()] {
        let bytes = &bytes[..len];
        let mut heard = Vec::new();
        let mut progress = |n_bytes| heard.push(n_bytes);
        let mirror = Mirror::new(&device, bytes, &read, Some(Placement::Copied), &mut progress).unwrap();
        assert_eq!(mirror.placement(), Placement::Copied);
        assert!(download::<u8>(&device, mirror.view(bytes)) == bytes, "{len} bytes differ");
        let part = &bytes[len / 3..len / 2];
        assert!(download::<u8>(&device, mirror.view(part)) == part, "a part of {len} bytes differs");
        assert!(heard.is_sorted() && heard.last().is_none_or(|&last| last == len), "{heard:?}");
    }

    let in_place = Mirror::new(&device, &bytes, &read, Some(Placement::InPlace), &mut |_| {}).unwrap();
    assert_eq!(in_place.placement(), Placement::InPlace);
    // A kernel reads through the map: embeddings are copies of rows.
    let (n_rows, n_cols) = (1000, 64);
    let part = &bytes[4096..4096 + 4 * n_rows * n_cols];
    let w = DeviceMatrix::new(in_place.view(part), Dtype::F32, n_rows, n_cols).unwrap();
    let tokens = device.upload(&(0..n_rows as u32).collect::<Vec<_>>()).unwrap();
    let x = poison(&device, part.len());
    device.prefill_embed(&w, tokens.view(), x.view()).unwrap();
    assert!(download::<u8>(&device, x.view()) == part, "the pages read in place differ");
}

#[test]
fn every_plan_of_an_upload_brings_the_bytes() {
    let device = device();
    let mut random = Random::new(9);
    let bytes: Vec<u8> = (0..(3 << 20) + 77).map(|_| random.below(256) as u8).collect();
    let read = |offset: usize, buffer: &mut [u8]| {
        buffer.copy_from_slice(&bytes[offset..offset + buffer.len()]);
        Ok(())
    };
    for (n_readers, n_buffers, chunk_bytes) in
        [(1, 2, 1 << 16), (3, 4, 100_003), (8, 24, 1 << 20), (2, 9, 1 << 24)]
    {
        let plan = UploadPlan { n_readers, n_buffers, chunk_bytes };
        let memory = device.upload(&vec![0xa5_u8; bytes.len()]).unwrap();
        upload(&device, memory.view(), &plan, &read, &mut |_| {}).unwrap();
        assert!(download::<u8>(&device, memory.view()) == bytes, "{plan:?}");
    }
    for (n_readers, n_buffers, chunk_bytes) in [(0, 2, 1024), (2, 2, 1024), (1, 2, 0)] {
        let plan = UploadPlan { n_readers, n_buffers, chunk_bytes };
        let memory = device.alloc(bytes.len()).unwrap();
        let error = upload(&device, memory.view(), &plan, &read, &mut |_| {}).unwrap_err();
        assert!(matches!(error, UploadError::Cuda(CudaError::Shape(_))), "{plan:?}: {error}");
    }
}

#[test]
fn what_cannot_be_read_is_an_error() {
    let device = device();
    let bytes = vec![1_u8; 40 << 20];
    let end = 25 << 20;
    let read = |offset: usize, buffer: &mut [u8]| {
        if offset + buffer.len() > end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.fill(1);
        Ok(())
    };
    let error = Mirror::new(&device, &bytes, &read, Some(Placement::Copied), &mut |_| {}).unwrap_err();
    assert!(
        matches!(error, UploadError::Read { offset_bytes, len_bytes, .. } if offset_bytes + len_bytes > end),
        "{error:?}"
    );
    // The device works on.
    Mirror::new(&device, &bytes[..end], &read, Some(Placement::Copied), &mut |_| {}).unwrap();
}
