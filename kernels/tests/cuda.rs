//! Every CUDA kernel against `reference`, on the first GPU; without one these tests fail.
//!
//! Outputs are poisoned with NaN before each run and NaN is refused; each call runs twice and has to repeat itself bit
//! for bit. Skip decisions and counts compare exactly, floats as `common::TOLERANCE` says; a norm inside a kernel adds
//! the rounding of its own sum, which is why sums over normalised input get twice that.

#![expect(clippy::print_stderr, reason = "the device that the tests ran on belongs into their output")]

mod common;

use std::sync::{LazyLock, Mutex, MutexGuard};

use common::{
    Random, TOLERANCE, Weights, differences, integers, low_planes, magnitude, random_planes, rows_of,
    sign_words, thresholds_beside,
};
use half::f16;
use kernels::cuda::{
    AttentionCall, AuditCall, AuditLayer, AuditRecord, AuditScratch, Buffer, Chosen, CudaError, DecodeCall,
    DecodeLayer, Device, DeviceLimits, DeviceLowRank, DeviceMatrix, DevicePlanes, DeviceResidual, DeviceRows,
    DeviceThresholds, DownCall, Dtype, GateUpCall, LowRankCall, MatvecCall, MlpTrace, PredictScoresCall,
    PrefillNormCall, PrefillQuantiseCall, QkvCall, Quantised, SampleCall, View, audit_of, quantised_bytes,
};
use kernels::sample::{Draw, random, reference as drawn};
use kernels::{
    Activation, AttentionShape, BitPlanes, Elements, Limits, LowRank, Matrix, MlpCounts, MlpWeights,
    Residual, Rows, SignMatrix, Thresholds, reference,
};
use proptest::prelude::*;

const EPS: f32 = 1e-5;

static DEVICE: LazyLock<Mutex<Device>> = LazyLock::new(|| {
    let device = Device::open(0).unwrap_or_else(|error| panic!("these tests need a GPU: {error}"));
    eprintln!("{:?}, overlap {}", device.info(), device.overlaps());
    Mutex::new(device)
});

/// The device, for one test at a time.
fn device() -> MutexGuard<'static, Device> {
    DEVICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// `PROPTEST_CASES` lowers the number, for tools that slow kernels down.
fn config() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.min(100), failure_persistence: None, ..config }
}

fn upload(device: &Device, values: &[f32]) -> Buffer {
    device.upload(values).unwrap()
}

/// Device memory for `n` floats, all NaN.
fn poison(device: &Device, n: usize) -> Buffer {
    device.upload(&vec![f32::NAN; n]).unwrap()
}

fn download(device: &Device, buffer: &Buffer) -> Vec<f32> {
    let mut values = vec![0.0; buffer.view().len_bytes() / 4];
    device.read(buffer.view(), &mut values).unwrap();
    values
}

fn upload_elements(device: &Device, elements: &Elements<'_>) -> Buffer {
    match elements {
        Elements::F32(v) => device.upload(v),
        Elements::F16(v) => device.upload(v),
        Elements::Bf16(v) => device.upload(v),
    }
    .unwrap()
}

/// A matrix with the buffer that holds it.
struct Uploaded {
    buffer: Buffer,
    dtype: Dtype,
    n_rows: usize,
    n_cols: usize,
}

impl Uploaded {
    fn new(device: &Device, w: &Matrix<'_>) -> Self {
        let buffer = upload_elements(device, &w.data);
        Self { buffer, dtype: Dtype::of(&w.data), n_rows: w.n_rows, n_cols: w.n_cols }
    }

    fn matrix(&self) -> DeviceMatrix<'_> {
        DeviceMatrix::new(self.buffer.view(), self.dtype, self.n_rows, self.n_cols).unwrap()
    }
}

fn state(device: &Device, token: u32, position: usize) -> Buffer {
    device.upload(&[token, position as u32]).unwrap()
}

fn assert_close(what: &str, got: &[f32], want: &[f64], slack: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, ((&got, want), slack)) in got.iter().zip(want).zip(slack).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= slack * TOLERANCE + 1e-30, "{what}[{i}] is {got}, not {want}: off by {error:e}");
    }
}

fn assert_same(what: &str, a: &[f32], b: &[f32]) {
    let same = a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same, "{what} is not the same in two runs");
}

/// What tokens leave for audits, poisoned until then.
struct Trace {
    scratch: AuditScratch,
    d: usize,
    f: usize,
}

impl Trace {
    fn new(device: &Device, n_layers: usize, d: usize, f: usize) -> Self {
        let scratch = device.audit_scratch(n_layers, d, f, 1).unwrap();
        let MlpTrace { x, h, skip } = scratch.trace();
        device.write(x, &vec![f32::NAN; n_layers * d]).unwrap();
        device.write(h, &vec![f32::NAN; n_layers * f]).unwrap();
        device.write(skip, &vec![7u8; n_layers * f]).unwrap();
        Self { scratch, d, f }
    }

    fn layer(&self, layer: usize) -> MlpTrace<'_> {
        self.scratch.trace().layer(layer, self.d, self.f)
    }

    /// x, h and skip of a layer.
    fn read(&self, device: &Device, layer: usize) -> (Vec<f32>, Vec<f32>, Vec<u8>) {
        let MlpTrace { x, h, skip } = self.layer(layer);
        let mut got = (vec![0.0; self.d], vec![0.0; self.f], vec![0; self.f]);
        device.read(x, &mut got.0).unwrap();
        device.read(h, &mut got.1).unwrap();
        device.read(skip, &mut got.2).unwrap();
        got
    }
}

/// Widths on both sides of 16-byte rows, segments and their halves, and of models.
fn any_width() -> impl Strategy<Value = usize> {
    prop_oneof![
        1..70usize,
        (1..200usize).prop_map(|n| 8 * n),
        1000..1060usize,
        2040..2090usize,
        Just(4096),
        Just(5120),
        Just(704)
    ]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn matvec_is_the_reference(
        n_cols in any_width(), n_rows in prop_oneof![1..300usize, 4000..4100usize], kind in 0..3usize,
        normed: bool, accumulate: bool, seed: u64,
    ) {
        let device = device();
        let n_rows = if n_cols > 1000 { n_rows.min(300) } else { n_rows };
        let mut random = Random::new(seed);
        let weights = Weights::new(kind, &random.values(n_rows * n_cols));
        let w = weights.matrix(n_rows, n_cols);
        let (x, norm) = (random.values(n_cols), random.values(n_cols));
        let mut input = x.clone();
        if normed {
            reference::rmsnorm(&x, &norm, EPS, &mut input);
        }
        let old = if accumulate { 0.75 } else { 0.0 };
        let want: Vec<f64> = (0..n_rows).map(|row| old + reference::dot(&w, row, &input)).collect();
        let slack: Vec<f64> = (0..n_rows).map(|row| old + 2.0 * magnitude(&w, row, &input)).collect();

        let (w, x, norm) = (Uploaded::new(&device, &w), upload(&device, &x), upload(&device, &norm));
        let run = || {
            let y = upload(&device, &vec![if accumulate { 0.75 } else { f32::NAN }; n_rows]);
            device.matvec(&MatvecCall {
                w: w.matrix(),
                x: x.view(),
                norm: normed.then(|| (norm.view(), EPS)),
                y: y.view(),
                accumulate,
            }).unwrap();
            download(&device, &y)
        };
        let got = run();
        assert_close("y", &got, &want, &slack);
        assert_same("y", &got, &run());
    }

    #[test]
    fn qkv_is_the_reference(
        n_cols in any_width(), half in prop_oneof![1..40usize, Just(64)], n_kv_heads in 1..4usize, group in 1..4usize,
        kind in 0..3usize, n_positions_max in 1..6usize, seed: u64,
    ) {
        let device = device();
        let mut random = Random::new(seed);
        let head_dim = 2 * half;
        let shape = AttentionShape { n_heads: n_kv_heads * group, n_kv_heads, head_dim, n_positions_max };
        let position = random.below(n_positions_max as u64) as usize;
        let heights = [shape.n_heads, n_kv_heads, n_kv_heads].map(|n| n * head_dim);
        let weights = heights.map(|n_rows| Weights::new(kind, &random.values(n_rows * n_cols)));
        let [w_q, w_k, w_v] = [0, 1, 2].map(|i| weights[i].matrix(heights[i], n_cols));
        let (x, norm) = (random.values(n_cols), random.values(n_cols));
        let (cos, sin) = (random.values(n_positions_max * half), random.values(n_positions_max * half));
        let mut input = vec![0.0; n_cols];
        reference::rmsnorm(&x, &norm, EPS, &mut input);
        let [q, k, v] = [&w_q, &w_k, &w_v].map(|w| {
            let mut y = vec![0.0; w.n_rows];
            reference::matvec(w, &input, &mut y);
            y
        });
        let rotated = |mut heads: Vec<f32>| {
            let at = position * half..(position + 1) * half;
            reference::rope(&mut heads, head_dim, &cos[at.clone()], &sin[at]);
            heads
        };
        let [q, k] = [rotated(q), rotated(k)];
        // A rotated pair mixes two rows, each up to three times.
        let slack = |w: &Matrix<'_>| -> Vec<f64> {
            let rows: Vec<f64> = (0..w.n_rows).map(|row| magnitude(w, row, &input)).collect();
            (0..w.n_rows)
                .map(|row| {
                    let first = row / head_dim * head_dim + row % half;
                    6.0 * (rows[first] + rows[first + half])
                })
                .collect()
        };
        let slacks = [slack(&w_q), slack(&w_k), slack(&w_v)];

        let uploaded = [&w_q, &w_k, &w_v].map(|w| Uploaded::new(&device, w));
        let inputs = [&x, &norm, &cos, &sin].map(|values| upload(&device, values));
        let state = state(&device, 0, position);
        let cache = uploaded[0].dtype.cache();
        let n_cached = n_kv_heads * n_positions_max * head_dim;
        let run = || {
            let q = poison(&device, shape.n_heads * head_dim);
            let caches = [0, 1].map(|_| upload_elements(&device, &Weights::new(
                if cache == Dtype::F32 { 0 } else { 1 },
                &vec![f32::NAN; n_cached],
            ).elements()));
            device.qkv(&QkvCall {
                shape,
                w_q: uploaded[0].matrix(),
                w_k: uploaded[1].matrix(),
                w_v: uploaded[2].matrix(),
                x: inputs[0].view(),
                norm: inputs[1].view(),
                eps: EPS,
                cos: inputs[2].view(),
                sin: inputs[3].view(),
                q: q.view(),
                k_cache: caches[0].view(),
                v_cache: caches[1].view(),
                state: state.view(),
            }).unwrap();
            let cached = caches.map(|buffer| {
                if cache == Dtype::F32 {
                    return download(&device, &buffer);
                }
                let mut values = vec![f16::ZERO; n_cached];
                device.read(buffer.view(), &mut values).unwrap();
                values.iter().map(|v| v.to_f32()).collect()
            });
            (download(&device, &q), cached)
        };
        let (got_q, got_cached) = run();
        let f64s = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<_>>();
        assert_close("q", &got_q, &f64s(&q), &slacks[0]);
        for ((name, want), (got, slack)) in
            [("k", &k), ("v", &v)].into_iter().zip(got_cached.iter().zip(&slacks[1..]))
        {
            for (at, &got) in got.iter().enumerate() {
                let (head, rest) = (at / (n_positions_max * head_dim), at % (n_positions_max * head_dim));
                if rest / head_dim != position {
                    prop_assert!(got.is_nan(), "{name}: another position was written");
                    continue;
                }
                let row = head * head_dim + rest % head_dim;
                let (want, mut slack) = (f64::from(want[row]), slack[row] * TOLERANCE + 1e-30);
                if cache == Dtype::F16 {
                    slack += want.abs() * 2.0f64.powi(-11) + 2.0f64.powi(-24);
                }
                prop_assert!((f64::from(got) - want).abs() <= slack, "{name}[{row}] is {got}, not {want}");
            }
        }
        let (again_q, again_cached) = run();
        assert_same("q", &got_q, &again_q);
        for (a, b) in got_cached.iter().flatten().zip(again_cached.iter().flatten()) {
            prop_assert!(a.is_nan() && b.is_nan() || a.to_bits() == b.to_bits());
        }
    }

    #[test]
    fn attention_is_the_reference(
        half in prop_oneof![1..20usize, Just(32), Just(40), Just(48), Just(64), Just(128), 60..70usize],
        n_kv_heads in 1..4usize, group in 1..9usize, kind in 0..2usize,
        n_positions in prop_oneof![1..140usize, 500..530usize, 2000..2100usize], seed: u64,
    ) {
        let device = device();
        let mut random = Random::new(seed);
        let head_dim = 2 * half;
        let n_positions_max = n_positions + random.below(9) as usize;
        let shape = AttentionShape { n_heads: n_kv_heads * group, n_kv_heads, head_dim, n_positions_max };
        let [k, v] = [0, 1].map(|_| {
            let mut values = random.values(n_kv_heads * n_positions_max * head_dim);
            for head in values.chunks_exact_mut(n_positions_max * head_dim) {
                head[n_positions * head_dim..].fill(f32::NAN);
            }
            Weights::new(kind, &values)
        });
        let q: Vec<f32> = random.values(shape.n_heads * head_dim).iter().map(|q| 4.0 * q).collect();
        let mut want = vec![0.0; q.len()];
        reference::attention(&shape, &q, k.elements(), v.elements(), n_positions, &mut want);
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        // Values are at most 3, scores mostly below 10: an error of a score is one of its weight.
        let slack = vec![60.0; want.len()];

        let caches = [&k, &v].map(|values| upload_elements(&device, &values.elements()));
        let (q, state) = (upload(&device, &q), state(&device, 0, n_positions - 1));
        let scratch = device.attention_scratch(&shape).unwrap();
        let run = || {
            let out = poison(&device, want.len());
            device.attention(&AttentionCall {
                shape,
                q: q.view(),
                k_cache: caches[0].view(),
                v_cache: caches[1].view(),
                cache: Dtype::of(&k.elements()),
                out: out.view(),
                scratch: &scratch,
                state: state.view(),
            }).unwrap();
            download(&device, &out)
        };
        let got = run();
        assert_close("attention", &got, &want, &slack);
        assert_same("attention", &got, &run());
    }

    #[test]
    fn an_mlp_is_the_reference(
        n_cols in any_width(), n_rows in prop_oneof![1..400usize, 700..710usize, 2500..2600usize],
        kind in 0..3usize, down_kind in 0..3usize, select in 0..8usize, n_planes in 1..4usize,
        activation in 0..3usize, seed: u64,
    ) {
        let device = device();
        let n_rows = if n_cols > 700 { n_rows.min(400) } else { n_rows };
        let mut random = Random::new(seed);
        let (x, norm) = (random.values(n_cols), random.values(n_cols));
        let mut input = vec![0.0; n_cols];
        reference::rmsnorm(&x, &norm, EPS, &mut input);
        let weights = [kind, kind, down_kind].map(|kind| Weights::new(kind, &random.values(n_rows * n_cols)));
        let [gate, up, down_t] = [0, 1, 2].map(|m| weights[m].matrix(n_rows, n_cols));
        let words = sign_words(&gate);
        let signs = SignMatrix { words: &words, n_rows, n_words: n_cols.div_ceil(32) };
        let per_row: Vec<u32> = (0..n_rows).map(|_| random.below(n_cols as u64 + 1) as u32).collect();
        let low = low_planes(&mut random, n_planes, n_rows, n_cols);
        let planes = BitPlanes { signs, low: &low };
        // The device's norm may round to the other neighbour, which some columns have in 8 bits as well.
        let thresholds = thresholds_beside(&planes, &input, [64.0, 1e-4], &mut random);
        let rows = match select {
            0..=4 => rows_of(select, signs, &per_row, n_cols),
            5 => Rows::Scored { planes, thresholds: Thresholds::PerRow(&thresholds) },
            6 => Rows::Scored { planes, thresholds: Thresholds::Layer(f32::NEG_INFINITY) },
            _ => Rows::Scored { planes, thresholds: Thresholds::Layer(1e30) },
        };
        let activation = [Activation::Relu, Activation::FatRelu(0.3), Activation::Silu][activation];

        // A gate at the edge of its activation may round to either side of it: such rows are turned away from it.
        let edge = if let Activation::FatRelu(threshold) = activation { f64::from(threshold) } else { 0.0 };
        for row in 0..n_rows {
            let distance = (reference::dot(&gate, row, &input) - edge).abs();
            prop_assume!(distance == 0.0 && magnitude(&gate, row, &input) == 0.0
                || distance > 4.0 * TOLERANCE * magnitude(&gate, row, &input));
        }
        let w = MlpWeights { gate, up, down_t };
        let mut h = vec![0.0; n_rows];
        let counts = reference::gate_up(&w, &rows, activation, &input, &mut h);
        let h_slack: Vec<f64> = (0..n_rows)
            .map(|row| {
                let bound = magnitude(&gate, row, &input) * magnitude(&up, row, &input);
                if h[row] == 0.0 { 0.0 } else { 6.0 * bound.max(f64::from(h[row]).abs()) }
            })
            .collect();
        let (mut want, mut slack) = (vec![0.5; n_cols], vec![0.5; n_cols]);
        for row in 0..n_rows {
            for col in 0..n_cols {
                let down = f64::from(down_t.data.get(row * n_cols + col));
                want[col] += f64::from(h[row]) * down;
                slack[col] += (h_slack[row] + f64::from(h[row]).abs()) * down.abs();
            }
        }

        let [w_gate, w_up, w_down_t] = [&gate, &up, &down_t].map(|w| Uploaded::new(&device, w));
        let (x, norm) = (upload(&device, &x), upload(&device, &norm));
        let (words, limits) = (device.upload(&words).unwrap(), device.upload(&per_row).unwrap());
        let (low, thresholds_on_device) = (device.upload(&low).unwrap(), upload(&device, &thresholds));
        let device_rows = match rows {
            Rows::All => DeviceRows::All,
            Rows::Active => DeviceRows::Active,
            Rows::Predicted { limits: Limits::Layer(limit), .. } => {
                DeviceRows::Predicted { signs: words.view(), limits: DeviceLimits::Layer(limit) }
            }
            Rows::Predicted { .. } => {
                DeviceRows::Predicted { signs: words.view(), limits: DeviceLimits::PerRow(limits.view()) }
            }
            Rows::Scored { thresholds, .. } => DeviceRows::Scored {
                planes: DevicePlanes { signs: words.view(), low: (n_planes > 1).then(|| low.view()) },
                thresholds: match thresholds {
                    Thresholds::Layer(threshold) => DeviceThresholds::Layer(threshold),
                    Thresholds::PerRow(_) => DeviceThresholds::PerRow(thresholds_on_device.view()),
                },
            },
            Rows::LowRank { .. } => unreachable!("rows_of has none"),
        };
        let scratch = device.down_scratch(n_rows, n_cols).unwrap();
        let run = |trace: Option<MlpTrace<'_>>| {
            let (h, y) = (poison(&device, n_rows), upload(&device, &vec![0.5; n_cols]));
            let counts = device.upload(&[0u64; 2]).unwrap();
            device.gate_up(&GateUpCall {
                w_gate: w_gate.matrix(),
                w_up: w_up.matrix(),
                rows: device_rows,
                activation,
                x: x.view(),
                norm: norm.view(),
                eps: EPS,
                h: h.view(),
                counts: counts.view(),
                normed: trace.map(|trace| trace.x),
                skip: trace.map(|trace| trace.skip),
            }).unwrap();
            device.down(&DownCall {
                w_down_t: w_down_t.matrix(),
                h: h.view(),
                dense: matches!(rows, Rows::All),
                x: y.view(),
                scratch: &scratch,
            }).unwrap();
            let mut found = [0u64; 2];
            device.read(counts.view(), &mut found).unwrap();
            (download(&device, &h), download(&device, &y), found)
        };
        let (got_h, got_y, found) = run(None);
        let want_h: Vec<f64> = h.iter().copied().map(f64::from).collect();
        assert_close("h", &got_h, &want_h, &h_slack);
        assert_close("y", &got_y, &want, &slack);
        let found = MlpCounts { n_kept: found[0] as usize, n_active: found[1] as usize };
        prop_assert_eq!(found, counts);
        let trace = Trace::new(&device, 1, n_cols, n_rows);
        let (again_h, again_y, _) = run(Some(trace.layer(0)));
        assert_same("h", &got_h, &again_h);
        assert_same("y", &got_y, &again_y);
        let (got_x, _, got_skip) = trace.read(&device, 0);
        let want_x: Vec<f64> = input.iter().copied().map(f64::from).collect();
        let x_slack: Vec<f64> = want_x.iter().map(|x| 2.0 * x.abs()).collect();
        assert_close("normed", &got_x, &want_x, &x_slack);
        let skip: Vec<u8> = reference::skipped(&rows, n_rows, &input).into_iter().map(u8::from).collect();
        prop_assert_eq!(got_skip, skip);
    }

    /// Layers of any type, some of which predict nothing; their rows left out are drawn by the reference's signs.
    #[test]
    fn an_audit_is_the_reference(
        n_cols in any_width(), n_rows in prop_oneof![1..400usize, 2500..2600usize], n_layers in 1..4usize,
        one_in in 1..5usize, n_padded in 0..3usize, activation in 0..3usize, seed: u64,
    ) {
        let device = device();
        let n_rows = if n_cols > 700 { n_rows.min(400) } else { n_rows };
        let mut random = Random::new(seed);
        let activation = [Activation::Relu, Activation::FatRelu(0.3), Activation::Silu][activation];
        let edge = if let Activation::FatRelu(threshold) = activation { f64::from(threshold) } else { 0.0 };
        let n_drawn = n_rows.div_ceil(one_in) + n_padded;
        let scratch = device.audit_scratch(n_layers, n_cols, n_rows, n_drawn).unwrap();
        let trace = scratch.trace();
        let mut uploaded = Vec::new();
        let mut wanted = Vec::new();
        let mut drawn = vec![u32::MAX; n_layers * n_drawn];
        for layer in 0..n_layers {
            let kind = random.below(3) as usize;
            let down_kind = random.below(3) as usize;
            let weights = [kind, kind, down_kind].map(|kind| Weights::new(kind, &random.values(n_rows * n_cols)));
            let [gate, up, down_t] = [0, 1, 2].map(|m| weights[m].matrix(n_rows, n_cols));
            let x = random.values(n_cols);
            let words = sign_words(&gate);
            let signs = SignMatrix { words: &words, n_rows, n_words: n_cols.div_ceil(32) };
            let limits: Vec<u32> = (0..n_rows).map(|_| random.below(n_cols as u64 + 1) as u32).collect();
            let rows = Rows::Predicted { signs, limits: Limits::PerRow(&limits) };
            let w = MlpWeights { gate, up, down_t };
            let skip = reference::skipped(&rows, n_rows, &x);
            let mut h = vec![0.0; n_rows];
            reference::gate_up(&w, &rows, activation, &x, &mut h);
            let first = random.below(one_in as u64) as u32;
            let sample: Vec<u32> = (first..n_rows as u32).step_by(one_in).collect();
            drawn[layer * n_drawn..][..sample.len()].copy_from_slice(&sample);
            for row in sample.iter().map(|&row| row as usize).filter(|&row| skip[row]) {
                let distance = (reference::dot(&gate, row, &x) - edge).abs();
                prop_assume!(distance == 0.0 && magnitude(&gate, row, &x) == 0.0
                    || distance > 4.0 * TOLERANCE * magnitude(&gate, row, &x));
            }

            let norms: Vec<f64> = (0..n_rows)
                .map(|row| (0..n_cols).map(|c| f64::from(down_t.data.get(row * n_cols + c)).powi(2)).sum())
                .collect();
            let bound = |row: usize| (magnitude(&gate, row, &x) * magnitude(&up, row, &x)).powi(2) * norms[row];
            let missed: f64 = sample.iter().map(|&row| row as usize).filter(|&row| skip[row]).map(bound).sum();
            let kept: f64 = (0..n_rows).filter(|&row| !skip[row]).map(bound).sum();
            wanted.push((reference::audit(&w, &rows, activation, &x, &sample), missed, kept));

            let of_layer = trace.layer(layer, n_cols, n_rows);
            device.write(of_layer.x, &x).unwrap();
            device.write(of_layer.h, &h).unwrap();
            device.write(of_layer.skip, &skip.into_iter().map(u8::from).collect::<Vec<_>>()).unwrap();
            let [w_gate, w_up, w_down_t] = [&gate, &up, &down_t].map(|w| Uploaded::new(&device, w));
            device.write(scratch.norms(layer), &vec![f32::NAN; n_rows]).unwrap();
            device.squared_norms(&w_down_t.matrix(), scratch.norms(layer)).unwrap();
            let mut got = vec![0.0; n_rows];
            device.read(scratch.norms(layer), &mut got).unwrap();
            assert_close("norms", &got, &norms, &norms);
            uploaded.push((random.below(4) > 0).then_some([w_gate, w_up]));
        }
        device.write(scratch.sample(), &drawn).unwrap();
        let layers: Vec<_> = uploaded
            .iter()
            .map(|layer| layer.as_ref().map(|[gate, up]| AuditLayer { w_gate: gate.matrix(), w_up: up.matrix() }))
            .collect();
        let run = || {
            let mut records = vec![[u64::MAX; 3]; n_layers * scratch.n_blocks()];
            device.write(scratch.records(), &records).unwrap();
            device.audit(&AuditCall { layers: &layers, activation, scratch: &scratch }).unwrap();
            device.read(scratch.records(), &mut records).unwrap();
            records
        };
        let records: Vec<AuditRecord> = run();
        prop_assert_eq!(&run(), &records);
        for ((records, layer), (want, missed, kept)) in
            records.chunks_exact(scratch.n_blocks()).zip(&layers).zip(wanted)
        {
            if layer.is_none() {
                prop_assert!(records.iter().all(|record| *record == [u64::MAX; 3]), "{records:?}");
                continue;
            }
            let found = audit_of(records);
            prop_assert_eq!((found.n_skipped, found.n_missed), (want.n_skipped, want.n_missed));
            for (found, want, bound) in [
                (found.missed_energy, want.missed_energy, missed),
                (found.kept_energy, want.kept_energy, kept),
            ] {
                let error = (found - want).abs();
                prop_assert!(error <= 8.0 * TOLERANCE * bound + 1e-30, "{found} for {want}");
            }
        }
    }

    #[test]
    fn the_predictor_is_the_reference_bit_for_bit(n_cols in any_width(), n_rows in 1..600usize, seed: u64) {
        let device = device();
        let mut random = Random::new(seed);
        let weights = Weights::new(1, &random.values(n_rows * n_cols));
        let words = sign_words(&weights.matrix(n_rows, n_cols));
        let signs = SignMatrix { words: &words, n_rows, n_words: n_cols.div_ceil(32) };
        let mut x = random.values(n_cols);
        for x in &mut x {
            if random.below(10) == 0 {
                *x = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e-45][random.below(5) as usize];
            }
        }
        let per_row: Vec<u32> = (0..n_rows).map(|_| random.below(n_cols as u64 + 1) as u32).collect();
        let mut x_words = vec![0; signs.n_words];
        reference::sign_pack(&x, &mut x_words);
        let (x, words) = (upload(&device, &x), device.upload(&words).unwrap());
        let limits_on_device = device.upload(&per_row).unwrap();
        for (limits, on_device) in [
            (Limits::PerRow(&per_row), DeviceLimits::PerRow(limits_on_device.view())),
            (Limits::Layer(n_cols as u32 / 2), DeviceLimits::Layer(n_cols as u32 / 2)),
        ] {
            let mut want = vec![false; n_rows];
            reference::predict(&signs, &limits, &x_words, &mut want);
            let skip = device.upload(&vec![7u8; n_rows]).unwrap();
            device.predict(words.view(), on_device, x.view(), skip.view()).unwrap();
            let mut got = vec![7u8; n_rows];
            device.read(skip.view(), &mut got).unwrap();
            prop_assert_eq!(got, want.into_iter().map(u8::from).collect::<Vec<_>>());
        }
    }

    #[test]
    fn scores_are_the_reference_bit_for_bit(
        n_cols in any_width(), n_rows in 1..600usize, n_planes in 1..4usize,
        magnitude in prop_oneof![Just(1.0f32), Just(1e-38), Just(1e38), Just(0.0)], is_odd: bool, seed: u64,
    ) {
        let device = device();
        let mut random = Random::new(seed);
        let mut x: Vec<f32> = random.values(n_cols).iter().map(|v| v * magnitude).collect();
        if is_odd {
            let at = random.below(n_cols as u64) as usize;
            x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, f32::MAX][random.below(5) as usize];
        }
        let thresholds: Vec<f32> =
            random.values(n_rows).iter().map(|v| v * magnitude * (n_cols as f32).sqrt()).collect();
        let found = scores_differ(&device, &mut random, "drawn", n_rows, n_planes, &x, Some(&thresholds));
        prop_assert!(found.is_empty(), "{}", found.join("\n"));
    }

    #[test]
    fn the_ends_of_a_token_are_exact(
        n_rows in 1..3000usize, n_cols in 1..300usize, kind in 0..3usize, n_ids in 0..4usize, seed: u64,
    ) {
        let device = device();
        let mut random = Random::new(seed);
        let token = random.below(n_rows as u64) as usize;
        let weights = Weights::new(kind, &random.values(n_rows * n_cols));
        let embedding = weights.matrix(n_rows, n_cols);
        let w = Uploaded::new(&device, &embedding);
        let (x, state) = (poison(&device, n_cols), state(&device, token as u32, 2));
        device.embed(&w.matrix(), state.view(), x.view()).unwrap();
        let want: Vec<f32> = (0..n_cols).map(|col| embedding.data.get(token * n_cols + col)).collect();
        prop_assert_eq!(download(&device, &x), want);

        // Few different values, so that the largest comes more than once.
        let logits: Vec<f32> = (0..n_rows).map(|_| random.below(50) as f32 - 60.0).collect();
        let best = (0..n_rows).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
        let on_device = upload(&device, &logits);
        let ids = device.upload(&vec![u32::MAX; n_ids]).unwrap();
        device.greedy(on_device.view(), ids.view(), state.view()).unwrap();
        let (mut got_state, mut got_ids) = ([0u32; 2], vec![0u32; n_ids]);
        device.read(state.view(), &mut got_state).unwrap();
        device.read(ids.view(), &mut got_ids).unwrap();
        prop_assert_eq!(got_state, [best, 3]);
        for (position, id) in got_ids.into_iter().enumerate() {
            prop_assert_eq!(id, if position == 2 { best } else { u32::MAX });
        }
        device.advance(state.view()).unwrap();
        device.read(state.view(), &mut got_state).unwrap();
        prop_assert_eq!(got_state, [best, 4]);
    }
}

/// Where scores, scale and rows left out of random planes differ from the reference, for `thresholds`, for ones that
/// every score passes by half a unit or fails by it, and for ones that keep all rows and none.
fn scores_differ(
    device: &Device,
    random: &mut Random,
    case: &str,
    n_rows: usize,
    n_planes: usize,
    x: &[f32],
    thresholds: Option<&[f32]>,
) -> Vec<String> {
    let n_words = x.len().div_ceil(32);
    let words = random_planes(random, n_planes, n_rows, x.len());
    let (sign_words, low) = words.split_at(n_rows * n_words);
    let planes = BitPlanes { signs: SignMatrix { words: sign_words, n_rows, n_words }, low };
    let mut q = vec![99; x.len()];
    let scale = reference::quantise(x, &mut q);
    let want_scores: Vec<i32> = (0..n_rows).map(|row| reference::score(&planes, row, &q)).collect();
    let (x_on_device, signs, low_on_device) =
        (upload(device, x), device.upload(sign_words).unwrap(), device.upload(low).unwrap());
    let low_view = (n_planes > 1).then(|| low_on_device.view());
    let on_device = DevicePlanes { signs: signs.view(), low: low_view };
    let close = thresholds_beside(&planes, x, [0.5, 0.0], random);
    let middle = close[n_rows / 2];
    let kinds = [
        ("beside the scores", Thresholds::PerRow(&close)),
        ("given", Thresholds::PerRow(thresholds.unwrap_or(&close))),
        ("one", Thresholds::Layer(middle)),
        ("none", Thresholds::Layer(f32::NEG_INFINITY)),
        ("all", Thresholds::Layer(f32::INFINITY)),
        ("no number", Thresholds::Layer(f32::NAN)),
    ];
    let mut found = Vec::new();
    for (name, thresholds) in kinds {
        let mut want_skip = vec![false; n_rows];
        reference::predict_scores(&planes, &thresholds, &q, scale, &mut want_skip);
        let buffer = match thresholds {
            Thresholds::Layer(_) => None,
            Thresholds::PerRow(values) => Some(upload(device, values)),
        };
        let thresholds = match (thresholds, &buffer) {
            (Thresholds::PerRow(_), Some(buffer)) => DeviceThresholds::PerRow(buffer.view()),
            (thresholds, _) => DeviceThresholds::Layer(thresholds.of(0)),
        };
        let scores = device.upload(&vec![i32::MAX; n_rows]).unwrap();
        let (got_scale, skip) = (poison(device, 1), device.upload(&vec![7u8; n_rows]).unwrap());
        let call = PredictScoresCall {
            planes: on_device,
            thresholds,
            x: x_on_device.view(),
            scores: scores.view(),
            scale: got_scale.view(),
            skip: skip.view(),
        };
        device.predict_scores(&call).unwrap();
        let (mut got_scores, mut got_skip) = (vec![0i32; n_rows], vec![7u8; n_rows]);
        device.read(scores.view(), &mut got_scores).unwrap();
        device.read(skip.view(), &mut got_skip).unwrap();
        let want_skip: Vec<u8> = want_skip.into_iter().map(u8::from).collect();
        let case =
            format!("{case}: {n_rows} rows of {} columns in {n_planes} planes, thresholds {name}", x.len());
        found.extend(differences(&format!("{case}: scale"), &download(device, &got_scale), &[scale]));
        found.extend(differences(&format!("{case}: scores"), &got_scores, &want_scores));
        found.extend(differences(&format!("{case}: skip"), &got_skip, &want_skip));
    }
    found
}

/// Shapes of rows in bits: one, less than a word, words and 16-byte pieces and steps of a warp and parts of them, rows
/// and groups of rows and parts of them, widths of models.
const SCORED: [(usize, usize); 14] = [
    (1, 1),
    (3, 31),
    (7, 33),
    (8, 64),
    (9, 128),
    (15, 255),
    (16, 256),
    (17, 257),
    (33, 704),
    (70, 1000),
    (300, 2048),
    (1100, 4096),
    (65, 5100),
    (40, 20_000),
];

#[test]
fn scores_of_integers_are_exact() {
    let device = device();
    let mut random = Random::new(41);
    let mut found = Vec::new();
    for (n_rows, n_cols) in SCORED {
        let drawn = integers(&mut random, n_cols);
        let one_hot = |value: f32| (0..n_cols).map(|c| if c + 1 == n_cols { value } else { 0.0 }).collect();
        let inputs: [(&str, Vec<f32>); 8] = [
            ("integers", drawn),
            ("largest", vec![127.0; n_cols]),
            ("smallest", vec![-127.0; n_cols]),
            ("last column", one_hot(1.0)),
            ("last column negative", one_hot(-3.0)),
            ("zero", vec![0.0; n_cols]),
            ("NaN", one_hot(f32::NAN)),
            ("infinity", one_hot(f32::NEG_INFINITY)),
        ];
        for n_planes in 1..=3 {
            for (name, x) in &inputs {
                found.extend(scores_differ(&device, &mut random, name, n_rows, n_planes, x, None));
            }
        }
    }
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

/// Calls of an MLP at a model's width, over rows of which some are kept.
struct Mlp {
    weights: [Uploaded; 3],
    words: Buffer,
    x: Buffer,
    norm: Buffer,
    h: Buffer,
    y: Buffer,
    counts: Buffer,
    scratch: kernels::cuda::DownScratch,
}

impl Mlp {
    fn new(device: &Device, n_rows: usize, n_cols: usize) -> Self {
        let mut random = Random::new(3);
        let weights = [0, 1, 2].map(|_| Weights::new(1, &random.values(n_rows * n_cols)));
        let words = sign_words(&weights[0].matrix(n_rows, n_cols));
        Self {
            weights: [0, 1, 2].map(|i| Uploaded::new(device, &weights[i].matrix(n_rows, n_cols))),
            words: device.upload(&words).unwrap(),
            x: upload(device, &random.values(n_cols)),
            norm: upload(device, &vec![1.0; n_cols]),
            h: poison(device, n_rows),
            y: upload(device, &vec![0.0; n_cols]),
            counts: device.upload(&[0u64; 2]).unwrap(),
            scratch: device.down_scratch(n_rows, n_cols).unwrap(),
        }
    }

    fn launch(&self, device: &Device, limit: u32) -> Result<(), CudaError> {
        device.gate_up(&GateUpCall {
            w_gate: self.weights[0].matrix(),
            w_up: self.weights[1].matrix(),
            rows: DeviceRows::Predicted { signs: self.words.view(), limits: DeviceLimits::Layer(limit) },
            activation: Activation::Relu,
            x: self.x.view(),
            norm: self.norm.view(),
            eps: EPS,
            h: self.h.view(),
            counts: self.counts.view(),
            normed: None,
            skip: None,
        })?;
        device.down(&DownCall {
            w_down_t: self.weights[2].matrix(),
            h: self.h.view(),
            dense: false,
            x: self.y.view(),
            scratch: &self.scratch,
        })
    }

    /// The output of `launch` on an output of zeros.
    fn output(&self, device: &Device, launch: impl FnOnce()) -> Vec<f32> {
        device.write(self.y.view(), &vec![0.0f32; self.y.view().len_bytes() / 4]).unwrap();
        launch();
        download(device, &self.y)
    }
}

#[test]
fn ten_runs_are_the_same_launched_or_replayed() {
    let device = device();
    let mlp = Mlp::new(&device, 5632, 2048);
    let want = mlp.output(&device, || mlp.launch(&device, 1010).unwrap());
    assert!(want.iter().any(|&y| y != 0.0) && want.iter().all(|y| y.is_finite()));
    // SAFETY: the graph is dropped before the MLP's buffers.
    let graph = unsafe { device.capture(|| mlp.launch(&device, 1010)) }.unwrap();
    for _ in 0..10 {
        assert_same("launched", &want, &mlp.output(&device, || mlp.launch(&device, 1010).unwrap()));
        assert_same("replayed", &want, &mlp.output(&device, || device.replay(&graph).unwrap()));
    }
}

#[test]
fn an_mlp_that_skips_every_row_reads_none_and_leaves_y() {
    let device = device();
    let (n_rows, n_cols) = (500, 264);
    // Rows that are not read may hold anything.
    let poisoned = Weights::new(0, &vec![f32::NAN; n_rows * n_cols]);
    let mut mlp = Mlp::new(&device, n_rows, n_cols);
    for weights in &mut mlp.weights {
        *weights = Uploaded::new(&device, &poisoned.matrix(n_rows, n_cols));
    }
    device.write(mlp.x.view(), &vec![1.0f32; n_cols]).unwrap();
    let n_words = n_cols.div_ceil(32);
    let tail = u32::MAX >> (n_words * 32 - n_cols);
    let row: Vec<u32> = (0..n_words).map(|word| if word + 1 == n_words { tail } else { u32::MAX }).collect();
    device.write(mlp.words.view(), &row.repeat(n_rows)).unwrap();
    let y = mlp.output(&device, || mlp.launch(&device, n_cols as u32 - 1).unwrap());
    assert!(y.iter().all(|y| y.to_bits() == 0));
    assert!(download(&device, &mlp.h).iter().all(|h| h.to_bits() == 0));
    let mut counts = [1u64; 2];
    device.read(mlp.counts.view(), &mut counts).unwrap();
    assert_eq!(counts, [0, 0]);
}

#[test]
fn pages_of_the_host_are_read_in_place() {
    let device = device();
    let n = 1 << 16;
    let values: Vec<f32> = Random::new(9).values(n);
    let mapped = device.map_host(bytemuck::cast_slice(&values)).unwrap();
    let mut got = vec![0.0; n];
    device.read(mapped.view(), &mut got).unwrap();
    assert_eq!(got, values);
}

#[test]
fn staged_copies_arrive() {
    let device = device();
    let (mut from, mut to) = (device.alloc_host(1000).unwrap(), device.alloc_host(1000).unwrap());
    from.bytes_mut().iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
    let buffer = device.alloc(700).unwrap();
    // SAFETY: both host buffers are left alone until the device has been waited for.
    unsafe {
        device.write_later(buffer.view(), &from).unwrap();
        device.read_later(buffer.view(), &mut to).unwrap();
    }
    device.synchronize().unwrap();
    assert_eq!(to.bytes()[..700], from.bytes()[..700]);
    assert!(to.bytes()[700..].iter().all(|&byte| byte == 0));
}

#[test]
fn what_does_not_fit_is_an_error() {
    let device = device();
    let (x, y) = (upload(&device, &[0.0; 3]), upload(&device, &[0.0; 4]));
    let weights = Weights::new(1, &[0.0; 12]);
    let w = Uploaded::new(&device, &weights.matrix(4, 3));
    let matvec = |x: View<'_>, y: View<'_>| {
        let call = MatvecCall { w: w.matrix(), x, norm: None, y, accumulate: false };
        device.matvec(&call).unwrap_err().to_string()
    };
    assert_eq!(matvec(y.view(), y.view()), "matvec input: expected 12, found 16");
    assert_eq!(matvec(x.view(), x.view()), "matvec output: expected 16, found 12");
    let error = DeviceMatrix::new(w.buffer.view(), Dtype::F32, 4, 3).unwrap_err();
    assert_eq!(error.to_string(), "matrix bytes: expected 48, found 24");
    let error = device.alloc(1 << 50).unwrap_err();
    assert!(
        matches!(error, CudaError::OutOfMemory { wanted_bytes, .. } if wanted_bytes == 1 << 50),
        "{error}"
    );
    let predict = |n_low: usize, n_thresholds: usize| {
        let (signs, low) = (device.alloc(4 * 8).unwrap(), device.alloc(n_low).unwrap());
        let thresholds = device.alloc(4 * n_thresholds).unwrap();
        let [x, scores, scale, skip] = [4 * 40, 4 * 4, 4, 4].map(|n_bytes| device.alloc(n_bytes).unwrap());
        let call = PredictScoresCall {
            planes: DevicePlanes { signs: signs.view(), low: Some(low.view()) },
            thresholds: DeviceThresholds::PerRow(thresholds.view()),
            x: x.view(),
            scores: scores.view(),
            scale: scale.view(),
            skip: skip.view(),
        };
        device.predict_scores(&call).unwrap_err().to_string()
    };
    assert_eq!(predict(36, 4), "bytes of lower planes: expected 32, found 36");
    assert_eq!(predict(96, 4), "bit planes: expected 3, found 4");
    assert_eq!(predict(64, 5), "thresholds: expected 16, found 20");
    let error = Device::open(1000).unwrap_err();
    assert!(matches!(error, CudaError::NoSuchDevice { ordinal: 1000, .. }), "{error}");
}

/// A model of two layers on the device, run both ways.
struct Model {
    shape: AttentionShape,
    d: usize,
    f: usize,
    embedding: Uploaded,
    layers: Vec<ModelLayer>,
    norm: Buffer,
    cos: Buffer,
    sin: Buffer,
}

struct ModelLayer {
    /// q, k, v, o, gate, up, down.
    weights: [Uploaded; 7],
    words: Buffer,
    /// Two planes below the signs.
    low: Buffer,
    thresholds: Buffer,
    keys: Buffer,
    values: Buffer,
}

impl Model {
    fn new(
        device: &Device,
        random: &mut Random,
        kind: usize,
        shape: AttentionShape,
        d: usize,
        f: usize,
    ) -> Self {
        let (q, kv) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
        let cache_kind = if kind == 0 { 0 } else { 1 };
        let layers = (0..2)
            .map(|_| {
                let sizes = [(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (f, d)];
                let weights = sizes.map(|(n_rows, n_cols)| {
                    let scale = 1.0 / (n_cols as f32).sqrt();
                    let values: Vec<f32> = random.values(n_rows * n_cols).iter().map(|v| v * scale).collect();
                    Weights::new(kind, &values)
                });
                let words = sign_words(&weights[4].matrix(f, d));
                let [keys, values] = [0, 1].map(|_| {
                    let values = random.values(kv * shape.n_positions_max);
                    upload_elements(device, &Weights::new(cache_kind, &values).elements())
                });
                let mut i = 0;
                let weights = weights.map(|w| {
                    let (n_rows, n_cols) = sizes[i];
                    i += 1;
                    Uploaded::new(device, &w.matrix(n_rows, n_cols))
                });
                let thresholds: Vec<f32> = random.values(f).iter().map(|v| v * (d as f32).sqrt()).collect();
                ModelLayer {
                    weights,
                    words: device.upload(&words).unwrap(),
                    low: device.upload(&low_planes(random, 3, f, d)).unwrap(),
                    thresholds: upload(device, &thresholds),
                    keys,
                    values,
                }
            })
            .collect();
        let embedding = Weights::new(kind, &random.values(300 * d));
        let angles = shape.n_positions_max * shape.head_dim / 2;
        Self {
            embedding: Uploaded::new(device, &embedding.matrix(300, d)),
            layers,
            norm: upload(device, &random.values(d).iter().map(|v| 1.0 + 0.1 * v).collect::<Vec<_>>()),
            cos: upload(device, &random.values(angles)),
            sin: upload(device, &random.values(angles)),
            shape,
            d,
            f,
        }
    }

    fn rows(&self, layer: usize, select: usize) -> DeviceRows<'_> {
        match select {
            0 => DeviceRows::All,
            1 => DeviceRows::Active,
            2 => DeviceRows::Predicted {
                signs: self.layers[layer].words.view(),
                limits: DeviceLimits::Layer(self.d as u32 / 2),
            },
            // One to three planes.
            _ => {
                let ModelLayer { words, low, thresholds, .. } = &self.layers[layer];
                let low = low.view().slice(0, (select - 3) * words.view().len_bytes());
                DeviceRows::Scored {
                    planes: DevicePlanes { signs: words.view(), low: (select > 3).then_some(low) },
                    thresholds: if layer == 0 {
                        DeviceThresholds::Layer(0.0)
                    } else {
                        DeviceThresholds::PerRow(thresholds.view())
                    },
                }
            }
        }
    }

    /// Logits, state and rows counted after the token in `state`, as one kernel, which fills `trace`.
    fn in_one(
        &self,
        device: &Device,
        select: usize,
        position: usize,
        trace: Option<&Trace>,
    ) -> (Vec<f32>, [u32; 2], Vec<u64>) {
        let scratch = device
            .decode_scratch(&self.shape, self.d, self.f, 0, self.embedding.dtype.n_bytes())
            .unwrap()
            .expect("these widths fit");
        let layers: Vec<_> = self
            .layers
            .iter()
            .enumerate()
            .map(|(i, layer)| DecodeLayer {
                w_q: layer.weights[0].matrix(),
                w_k: layer.weights[1].matrix(),
                w_v: layer.weights[2].matrix(),
                w_o: layer.weights[3].matrix(),
                w_gate: layer.weights[4].matrix(),
                w_up: layer.weights[5].matrix(),
                w_down_t: layer.weights[6].matrix(),
                rows: self.rows(i, select),
                attn_norm: self.norm.view(),
                mlp_norm: self.norm.view(),
                keys: layer.keys.view(),
                values: layer.values.view(),
            })
            .collect();
        let (state, logits) = (state(device, 11, position), poison(device, 300));
        let (ids, counts) = (device.alloc(64).unwrap(), device.alloc(32).unwrap());
        device
            .decode(&DecodeCall {
                shape: self.shape,
                embedding: self.embedding.matrix(),
                lm_head: self.embedding.matrix(),
                final_norm: self.norm.view(),
                layers: &layers,
                cos: self.cos.view(),
                sin: self.sin.view(),
                activation: Activation::Relu,
                eps: EPS,
                state: state.view(),
                ids: ids.view(),
                logits: logits.view(),
                counts: counts.view(),
                greedy: true,
                clocks: None,
                trace: trace.map(|trace| trace.scratch.trace()),
                scratch: &scratch,
            })
            .unwrap();
        let (mut got_state, mut got_counts) = ([0; 2], vec![0; 4]);
        device.read(state.view(), &mut got_state).unwrap();
        device.read(counts.view(), &mut got_counts).unwrap();
        (download(device, &logits), got_state, got_counts)
    }

    /// The same as a run of single kernels.
    fn in_kernels(
        &self,
        device: &Device,
        select: usize,
        position: usize,
        trace: &Trace,
    ) -> (Vec<f32>, [u32; 2], Vec<u64>) {
        let q_width = self.shape.n_heads * self.shape.head_dim;
        let [x, q, attended, logits] = [self.d, q_width, q_width, 300].map(|n| poison(device, n));
        let (state, counts) = (state(device, 11, position), device.alloc(32).unwrap());
        let attention = device.attention_scratch(&self.shape).unwrap();
        let down = device.down_scratch(self.f, self.d).unwrap();
        device.embed(&self.embedding.matrix(), state.view(), x.view()).unwrap();
        for (i, layer) in self.layers.iter().enumerate() {
            let [w_q, w_k, w_v, w_o, w_gate, w_up, w_down_t] =
                [0, 1, 2, 3, 4, 5, 6].map(|m| layer.weights[m].matrix());
            let call = QkvCall {
                shape: self.shape,
                w_q,
                w_k,
                w_v,
                x: x.view(),
                norm: self.norm.view(),
                eps: EPS,
                cos: self.cos.view(),
                sin: self.sin.view(),
                q: q.view(),
                k_cache: layer.keys.view(),
                v_cache: layer.values.view(),
                state: state.view(),
            };
            device.qkv(&call).unwrap();
            let call = AttentionCall {
                shape: self.shape,
                q: q.view(),
                k_cache: layer.keys.view(),
                v_cache: layer.values.view(),
                cache: w_q.dtype().cache(),
                out: attended.view(),
                scratch: &attention,
                state: state.view(),
            };
            device.attention(&call).unwrap();
            let call = MatvecCall { w: w_o, x: attended.view(), norm: None, y: x.view(), accumulate: true };
            device.matvec(&call).unwrap();
            let rows = self.rows(i, select);
            let MlpTrace { x: normed, h, skip } = trace.layer(i);
            let call = GateUpCall {
                w_gate,
                w_up,
                rows,
                activation: Activation::Relu,
                x: x.view(),
                norm: self.norm.view(),
                eps: EPS,
                h,
                counts: counts.view().slice(16 * i, 16),
                normed: Some(normed),
                skip: Some(skip),
            };
            device.gate_up(&call).unwrap();
            let call = DownCall { w_down_t, h, dense: select == 0, x: x.view(), scratch: &down };
            device.down(&call).unwrap();
        }
        let norm = Some((self.norm.view(), EPS));
        let w = self.embedding.matrix();
        device.matvec(&MatvecCall { w, x: x.view(), norm, y: logits.view(), accumulate: false }).unwrap();
        let ids = device.alloc(64).unwrap();
        device.greedy(logits.view(), ids.view(), state.view()).unwrap();
        let (mut got_state, mut got_counts) = ([0; 2], vec![0; 4]);
        device.read(state.view(), &mut got_state).unwrap();
        device.read(counts.view(), &mut got_counts).unwrap();
        (download(device, &logits), got_state, got_counts)
    }
}

proptest! {
    #![proptest_config(config())]

    /// Both ways add the same products in another order: rows at the edge of the activation or of a sign may differ,
    /// and change what follows by little. A row at the edge of a threshold on its score may have any gate.
    #[test]
    fn a_token_in_one_kernel_is_a_token_in_many(
        kind in 0..3usize, select in 0..6usize, n_kv_heads in 1..5usize, group in 1..5usize,
        head_dim in prop_oneof![Just(32usize), Just(40), Just(64), Just(80), Just(128), Just(256)],
        // For the kernel of every width.
        d in prop_oneof![
            Just(256usize), Just(264), Just(512), Just(704), Just(1536), Just(2048), Just(4096), Just(5120), Just(6144)
        ],
        f in prop_oneof![1..200usize, 1300..1400usize], position in prop_oneof![0..10usize, 120..140usize, 500..520usize],
        seed: u64,
    ) {
        let device = device();
        let mut random = Random::new(seed);
        let f = if d > 2000 { f.min(700) } else { f };
        let shape = AttentionShape { n_heads: n_kv_heads * group, n_kv_heads, head_dim, n_positions_max: position + 3 };
        let model = Model::new(&device, &mut random, kind, shape, d, f);
        let want_trace = Trace::new(&device, 2, d, f);
        let (want, want_state, want_counts) = model.in_kernels(&device, select, position, &want_trace);
        let (got, got_state, got_counts) = model.in_one(&device, select, position, None);
        let far = |got: &[f32], want: &[f32]| {
            let largest = want.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
            let share = if select < 3 { 1e-3 } else { 0.1 };
            // Also true of what is no number.
            let is_near = |(got, want): (&f32, &f32)| (got - want).abs() <= share * largest;
            got.iter().zip(want).position(|pair| !is_near(pair)).map(|i| (i, got[i], want[i]))
        };
        prop_assert_eq!(far(&got, &want), None, "logit, found, expected");
        prop_assert_eq!(got_state[1], want_state[1]);
        prop_assert!(got[got_state[0] as usize] >= got.iter().copied().fold(f32::MIN, f32::max));
        for (got, want) in got_counts.iter().zip(&want_counts) {
            prop_assert!(got.abs_diff(*want) <= 2 + want / 100, "{got_counts:?}, not {want_counts:?}");
        }
        let traces = [0, 1].map(|_| Trace::new(&device, 2, d, f));
        for trace in [None, Some(&traces[0]), Some(&traces[1])] {
            let (again, again_state, again_counts) = model.in_one(&device, select, position, trace);
            assert_same("logits", &got, &again);
            prop_assert_eq!(got_state, again_state);
            prop_assert_eq!(&got_counts, &again_counts);
        }
        for layer in 0..2 {
            let [(x, h, skip), (again_x, again_h, again_skip)] =
                traces.each_ref().map(|trace| trace.read(&device, layer));
            assert_same("traced x", &x, &again_x);
            assert_same("traced h", &h, &again_h);
            prop_assert_eq!(&skip, &again_skip);
            let (want_x, ..) = want_trace.read(&device, layer);
            prop_assert_eq!(far(&x, &want_x), None, "column of layer {}, found, expected", layer);
            let n_kept = skip.iter().filter(|&&skip| skip == 0).count() as u64;
            prop_assert_eq!(n_kept, got_counts[2 * layer]);
            prop_assert!(skip.iter().all(|&skip| skip <= 1) && h.iter().all(|h| h.is_finite()));
            prop_assert!(h.iter().zip(&skip).all(|(&h, &skip)| skip == 0 || h == 0.0));
            let n_not_zero = h.iter().filter(|&&h| h != 0.0).count() as u64;
            let n_active = got_counts[2 * layer + 1];
            // Of active rows, those whose product with up is zero: there are few special values.
            prop_assert!(n_not_zero <= n_active && n_not_zero + 2 >= n_active, "{n_not_zero} of {n_active}");
        }
    }
}

/// A token at position 0 of a model whose attention adds nothing, so that the MLP of each layer sees the embedding,
/// integers: its rows are those of the reference exactly. One layer at a time also adds its rows to the output, each to a
/// column of its own (two or three rows share one, in powers of two), where the logits tell which came.
struct Exact {
    d: usize,
    f: usize,
    x: Vec<f32>,
    embedding: Uploaded,
    lm_head: Uploaded,
    zeros: [Uploaded; 2],
    ones: Uploaded,
    down: [Uploaded; 2],
    norm: Buffer,
    cached: [Buffer; 2],
    layers: Vec<ExactLayer>,
}

struct ExactLayer {
    /// 0 where signs or factors predict.
    n_planes: usize,
    factors: Option<ExactFactors>,
    keep: Vec<bool>,
    words: Buffer,
    low: Buffer,
    /// Of scores, or of signs.
    limits: Buffer,
    layer_limit: Option<f32>,
}

struct ExactFactors {
    fc1: Uploaded,
    fc2: Uploaded,
    relu: bool,
    /// Of a residual.
    scales: Option<Buffer>,
}

/// What a row adds to its column, in units of its h.
const EXACT_STEP: f32 = 1024.0;

impl Exact {
    fn shape() -> AttentionShape {
        AttentionShape { n_heads: 2, n_kv_heads: 1, head_dim: 64, n_positions_max: 2 }
    }

    /// The column that a row adds to, and its power of two; the last column tells how the final norm scales.
    fn column_of(d: usize, row: usize) -> (usize, u32) {
        (row % (d - 1), 1 << (row / (d - 1)))
    }

    fn new(device: &Device, kind: usize, d: usize, f: usize) -> Self {
        let mut random = Random::new(d as u64 + f as u64);
        let mut x = integers(&mut random, d);
        x[d - 1] = 127.0;
        let (norm, mut input) = (vec![1.0; d], vec![0.0; d]);
        reference::rmsnorm(&x, &norm, EPS, &mut input);
        // Planes, or a rank with or without a residual: of fewer rows than blocks, odd, and of several for each block.
        let predictors = [
            (3, 0),
            (0, 0),
            (1, 0),
            (2, 0),
            (3, 0),
            (1, 0),
            (0, 40),
            (1, 77),
            (0, if f > 8000 { 1100 } else { 1 }),
        ];
        let layers = predictors
            .into_iter()
            .enumerate()
            .map(|(i, (n_planes, rank))| {
                if rank > 0 {
                    return ExactLayer::of_low_rank(device, &mut random, &input, f, rank, n_planes > 0);
                }
                let words = random_planes(&mut random, n_planes.max(1), f, d);
                let (words, low) = words.split_at(f * d.div_ceil(32));
                let signs = SignMatrix { words, n_rows: f, n_words: d.div_ceil(32) };
                let planes = BitPlanes { signs, low };
                let limits: Vec<u32> = (0..f).map(|_| (d / 2) as u32 + random.below(9) as u32).collect();
                let mut thresholds = thresholds_beside(&planes, &input, [0.5, 0.0], &mut random);
                let layer_limit = (i >= 4).then_some(thresholds[f / 3]);
                if let Some(threshold) = layer_limit {
                    thresholds.fill(threshold);
                }
                let rows = match n_planes {
                    0 => Rows::Predicted { signs, limits: Limits::PerRow(&limits) },
                    _ => Rows::Scored { planes, thresholds: Thresholds::PerRow(&thresholds) },
                };
                let keep = reference::skipped(&rows, f, &input).into_iter().map(|skip| !skip).collect();
                let limits = if n_planes == 0 { device.upload(&limits) } else { device.upload(&thresholds) };
                ExactLayer {
                    n_planes,
                    factors: None,
                    keep,
                    words: device.upload(words).unwrap(),
                    low: device.upload(low).unwrap(),
                    limits: limits.unwrap(),
                    layer_limit,
                }
            })
            .collect();
        let filled = |n_rows: usize, n_cols: usize, value: &dyn Fn(usize) -> Option<(usize, f32)>| {
            let mut values = vec![0.0; n_rows * n_cols];
            for row in 0..n_rows {
                if let Some((col, value)) = value(row) {
                    values[row * n_cols + col] = value;
                }
            }
            Uploaded::new(device, &Weights::new(kind, &values).matrix(n_rows, n_cols))
        };
        let mut embedding = vec![0.0; d * d];
        embedding[11 * d..12 * d].copy_from_slice(&x);
        Self {
            d,
            f,
            embedding: Uploaded::new(device, &Weights::new(kind, &embedding).matrix(d, d)),
            lm_head: filled(d, d, &|row| Some((row, 1.0))),
            zeros: [filled(128, d, &|_| None), filled(d, 128, &|_| None)],
            ones: filled(f, d, &|_| Some((0, 1.0))),
            down: [
                filled(f, d, &|_| None),
                filled(f, d, &|row| {
                    let (col, power) = Self::column_of(d, row);
                    Some((col, EXACT_STEP * power as f32))
                }),
            ],
            norm: upload(device, &norm),
            cached: [0, 1].map(|_| device.alloc(2 * 64 * 4).unwrap()),
            layers,
            x,
        }
    }

    fn rows(&self, layer: usize) -> DeviceRows<'_> {
        let ExactLayer { n_planes, factors, words, low, limits, layer_limit, .. } = &self.layers[layer];
        let signs = words.view();
        if let Some(ExactFactors { fc1, fc2, relu, scales }) = factors {
            let residual = scales.as_ref().map(|scales| DeviceResidual { signs, scales: scales.view() });
            let factors = DeviceLowRank { fc1: fc1.matrix(), fc2: fc2.matrix(), relu: *relu, residual };
            return DeviceRows::LowRank { factors, thresholds: DeviceThresholds::PerRow(limits.view()) };
        }
        if *n_planes == 0 {
            return DeviceRows::Predicted { signs, limits: DeviceLimits::PerRow(limits.view()) };
        }
        DeviceRows::Scored {
            planes: DevicePlanes { signs, low: (*n_planes > 1).then(|| low.view()) },
            thresholds: layer_limit.map_or(DeviceThresholds::PerRow(limits.view()), |threshold| {
                DeviceThresholds::Layer(threshold)
            }),
        }
    }

    /// What `trace` has of a layer, if it is not what the reference and the layer's mask say.
    fn traced(&self, device: &Device, trace: &Trace, layer: usize, case: &str) -> Vec<String> {
        let (x, h, skip) = trace.read(device, layer);
        let mut input = vec![0.0; self.d];
        reference::rmsnorm(&self.x, &vec![1.0; self.d], EPS, &mut input);
        let want_x: Vec<f64> = input.iter().copied().map(f64::from).collect();
        assert_close("traced x", &x, &want_x, &want_x.iter().map(|x| 2.0 * x.abs()).collect::<Vec<_>>());
        let skips: Vec<bool> = skip.iter().map(|&skip| skip == 1).collect();
        let left_out: Vec<bool> = self.layers[layer].keep.iter().map(|keep| !keep).collect();
        let mut found =
            Vec::from_iter(differences(&format!("{case}: traced rows left out"), &skips, &left_out));
        // Every row is active.
        let zeros: Vec<bool> = h.iter().map(|&h| h == 0.0).collect();
        found.extend(differences(&format!("{case}: traced h of 0"), &zeros, &left_out));
        found
    }

    /// Rows of layer `live` that the whole token kept, and how many each layer up to it did: without a trace by the kernel
    /// for this width, which takes the layers before the first that has factors, else by the one for all.
    fn in_one(&self, device: &Device, live: usize, trace: Option<&Trace>) -> (Vec<bool>, Vec<u64>) {
        let (d, f, shape) = (self.d, self.f, Self::shape());
        let n_plain = self.layers.iter().take_while(|layer| layer.factors.is_none()).count();
        let n_layers = if trace.is_some() { self.layers.len() } else { n_plain };
        let factors = self.layers[..n_layers].iter().filter_map(|layer| layer.factors.as_ref());
        let rank_max = factors.map(|factors| factors.fc1.n_rows).max().unwrap_or(0);
        let scratch = device.decode_scratch(&shape, d, f, rank_max, self.ones.dtype.n_bytes()).unwrap();
        let scratch = scratch.expect("these widths fit");
        let n_cached = shape.n_positions_max * 64 * self.ones.dtype.cache().n_bytes();
        let (angles, w_kv) = (upload(device, &[1.0; 64]), &self.zeros[0].buffer);
        let w_kv = w_kv.view().slice(0, 64 * d * self.ones.dtype.n_bytes());
        let w_kv = DeviceMatrix::new(w_kv, self.ones.dtype, 64, d).unwrap();
        let layers: Vec<_> = (0..n_layers)
            .map(|layer| DecodeLayer {
                w_q: self.zeros[0].matrix(),
                w_k: w_kv,
                w_v: w_kv,
                w_o: self.zeros[1].matrix(),
                w_gate: self.ones.matrix(),
                w_up: self.ones.matrix(),
                w_down_t: self.down[usize::from(layer == live)].matrix(),
                rows: self.rows(layer),
                attn_norm: self.norm.view(),
                mlp_norm: self.norm.view(),
                keys: self.cached[0].view().slice(0, n_cached),
                values: self.cached[1].view().slice(0, n_cached),
            })
            .collect();
        let (state, logits) = (state(device, 11, 0), poison(device, d));
        let (ids, counts) = (device.alloc(8).unwrap(), device.alloc(16 * layers.len()).unwrap());
        let call = DecodeCall {
            shape,
            embedding: self.embedding.matrix(),
            lm_head: self.lm_head.matrix(),
            final_norm: self.norm.view(),
            layers: &layers,
            cos: angles.view(),
            sin: angles.view(),
            activation: Activation::Relu,
            eps: EPS,
            state: state.view(),
            ids: ids.view(),
            logits: logits.view(),
            counts: counts.view(),
            greedy: false,
            clocks: None,
            trace: trace.map(|trace| trace.scratch.trace()),
            scratch: &scratch,
        };
        device.decode(&call).unwrap();
        let logits = download(device, &logits);
        let unit = f64::from(logits[d - 1]) / 127.0;
        // Before the live layer nothing has changed x, so h = (x[0] / rms)^2.
        let square: f64 = self.x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / d as f64;
        let step = 127.0 * 127.0 / (square + f64::from(EPS)) * f64::from(EXACT_STEP);
        let added: Vec<u32> = logits
            .iter()
            .zip(&self.x)
            .map(|(&logit, &x)| ((f64::from(logit) / unit - f64::from(x)) / step).round() as u32)
            .collect();
        let kept = (0..f).map(|row| {
            let (col, power) = Self::column_of(d, row);
            added[col] & power != 0
        });
        let mut counted = vec![0u64; 2 * layers.len()];
        device.read(counts.view(), &mut counted).unwrap();
        (kept.collect(), counted.into_iter().step_by(2).take(live + 1).collect())
    }

    fn skip_low_rank(
        &self,
        device: &Device,
        x: View<'_>,
        factors: DeviceLowRank<'_>,
        thresholds: DeviceThresholds<'_>,
        skip: View<'_>,
    ) {
        let (normed, scratch) =
            (poison(device, self.d), device.low_rank_scratch(factors.fc1.n_rows()).unwrap());
        let (planes, scale) = (device.alloc(quantised_bytes(1, self.d)).unwrap(), poison(device, 1));
        let (weight, n_tokens, dtype) = (self.norm.view(), 1, Dtype::F32);
        let out = normed.view();
        device
            .prefill_norm(&PrefillNormCall { x, weight, eps: EPS, n_tokens, dtype, out, signs: None })
            .unwrap();
        let quantised = Quantised { planes: planes.view(), scales: scale.view() };
        device
            .prefill_quantise(&PrefillQuantiseCall { x, weight, eps: EPS, n_tokens, out: quantised })
            .unwrap();
        let quantised = factors.residual.map(|_| quantised);
        let call = LowRankCall { n_tokens, x: normed.view(), quantised, factors, thresholds, skip };
        device.predict_low_rank(&call, &scratch).unwrap();
    }

    /// Rows of `layer` that the separate kernel kept, and how many it counted.
    fn in_kernel(&self, device: &Device, layer: usize, trace: &Trace) -> (Vec<bool>, Vec<u64>) {
        let (x, counts) = (upload(device, &self.x), device.alloc(16).unwrap());
        let MlpTrace { x: normed, h, skip } = trace.layer(layer);
        let (mut rows, mask) = (self.rows(layer), device.upload(&vec![7u8; self.f]).unwrap());
        if let DeviceRows::LowRank { factors, thresholds } = rows {
            self.skip_low_rank(device, x.view(), factors, thresholds, mask.view());
            rows = DeviceRows::Masked { mask: mask.view() };
        }
        let call = GateUpCall {
            w_gate: self.ones.matrix(),
            w_up: self.ones.matrix(),
            rows,
            activation: Activation::Relu,
            x: x.view(),
            norm: self.norm.view(),
            eps: EPS,
            h,
            counts: counts.view(),
            normed: Some(normed),
            skip: Some(skip),
        };
        device.gate_up(&call).unwrap();
        let mut counted = [0u64; 2];
        device.read(counts.view(), &mut counted).unwrap();
        (trace.read(device, layer).1.iter().map(|&h| h != 0.0).collect(), vec![counted[0]])
    }
}

impl ExactLayer {
    /// Rows of random factors for `input`. What the device normalises itself has other roundings, so thresholds lie off the
    /// scores by more than those.
    fn of_low_rank(
        device: &Device,
        random: &mut Random,
        input: &[f32],
        f: usize,
        rank: usize,
        has_residual: bool,
    ) -> Self {
        let d = input.len();
        let weights = [rank * d, f * rank].map(|n| Weights::new(1, &random.values(n)));
        let words = random_planes(random, 1, f, d);
        let (fc1, fc2, scales) = (weights[0].matrix(rank, d), weights[1].matrix(f, rank), random.values(f));
        let signs = SignMatrix { words: &words, n_rows: f, n_words: d.div_ceil(32) };
        let residual = has_residual.then_some(Residual { signs, scales: &scales });
        let factors = LowRank { fc1, fc2, relu: has_residual, residual };
        let scores = reference::low_rank_scores(&factors, input);
        let margin = scores.iter().fold(0.0f32, |largest, score| largest.max(score.abs())) / 1000.0;
        let side = |random: &mut Random| if random.below(2) == 0 { margin } else { -margin };
        let thresholds: Vec<f32> = scores.iter().map(|score| score + side(random)).collect();
        Self {
            n_planes: 0,
            factors: Some(ExactFactors {
                fc1: Uploaded::new(device, &fc1),
                fc2: Uploaded::new(device, &fc2),
                relu: has_residual,
                scales: has_residual.then(|| upload(device, &scales)),
            }),
            keep: scores.iter().zip(&thresholds).map(|(score, threshold)| score >= threshold).collect(),
            words: device.upload(&words).unwrap(),
            low: device.alloc(0).unwrap(),
            limits: upload(device, &thresholds),
            layer_limit: None,
        }
    }
}

#[test]
fn a_token_keeps_the_rows_of_the_reference() {
    let device = device();
    let mut found = Vec::new();
    // Rows of sign words that do and do not divide into 16 bytes; several items for a warp; less than one.
    for (kind, d, f) in [
        (0, 256, 700),
        (1, 264, 500),
        (1, 256, 3),
        (2, 704, 1400),
        (1, 1536, 4600),
        (1, 4096, 11_008),
        (2, 5120, 900),
        (1, 6144, 1100),
        (0, 2048, 5504),
    ] {
        let model = Exact::new(&device, kind, d, f);
        let n_kept: Vec<u64> =
            model.layers.iter().map(|layer| layer.keep.iter().filter(|&&keep| keep).count() as u64).collect();
        for (layer, ExactLayer { n_planes, factors, keep, .. }) in model.layers.iter().enumerate() {
            let rank = factors.as_ref().map_or(0, |factors| factors.fc1.n_rows);
            let case = format!(
                "type {kind}, {f} rows of {d} columns, layer {layer} in {n_planes} planes, rank {rank}"
            );
            let trace = Trace::new(&device, model.layers.len(), d, f);
            let plain = factors.is_none().then_some(("one kernel", None));
            for (way, trace) in plain.into_iter().chain([("one kernel with a trace", Some(&trace))]) {
                let (rows, counts) = model.in_one(&device, layer, trace);
                found.extend(differences(
                    &format!("{case}, {way}: kept rows counted"),
                    &counts,
                    &n_kept[..=layer],
                ));
                found.extend(differences(&format!("{case}, {way}: kept"), &rows, keep));
            }
            for traced in 0..=layer {
                found.extend(model.traced(&device, &trace, traced, &format!("{case}, one kernel, {traced}")));
            }
            let trace = Trace::new(&device, model.layers.len(), d, f);
            let (rows, counts) = model.in_kernel(&device, layer, &trace);
            found.extend(differences(
                &format!("{case}, gate_up: kept rows counted"),
                &counts,
                &[n_kept[layer]],
            ));
            found.extend(differences(&format!("{case}, gate_up: kept"), &rows, keep));
            found.extend(model.traced(&device, &trace, layer, &format!("{case}, gate_up")));
        }
    }
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

/// Draws a token as the token of a text at `position`, into poisoned memory: what was chosen, and the state.
fn sample(
    device: &Device,
    logits: &[f32],
    excluded: &[u32],
    draw: Draw,
    seed: u64,
    position: usize,
) -> (Chosen, [u32; 2]) {
    let logits = upload(device, logits);
    let excluded = if excluded.is_empty() { device.alloc(0) } else { device.upload(excluded) }.unwrap();
    let (state, chosen) = (state(device, 0xdead_beef, position), device.upload(&[0xdead_beefu32]).unwrap());
    device
        .sample(&SampleCall {
            logits: logits.view(),
            excluded: excluded.view(),
            state: state.view(),
            chosen: chosen.view(),
            draw,
            seed,
        })
        .unwrap();
    let (mut got, mut got_state) = ([0u32], [0u32; 2]);
    device.read(chosen.view(), &mut got).unwrap();
    device.read(state.view(), &mut got_state).unwrap();
    (Chosen::of(got[0]), got_state)
}

/// That the device draws what the reference draws, each of ten times.
fn assert_sample(device: &Device, logits: &[f32], excluded: &[u32], draw: Draw, seed: u64, position: usize) {
    let mut left = logits.to_vec();
    for &id in excluded {
        if let Some(logit) = left.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    let want = drawn(&left, &draw, random(seed, position as u32)).map_or(Chosen::Empty, Chosen::Token);
    for _ in 0..10 {
        let (got, got_state) = sample(device, logits, excluded, draw, seed, position);
        assert_eq!(got, want, "{} logits, {draw:?}, seed {seed}, position {position}", logits.len());
        if let Chosen::Token(id) = want {
            assert_eq!(got_state, [id, position as u32]);
        }
    }
}

/// Vocabularies on both sides of a warp, a block and its loads.
fn any_vocabulary() -> impl Strategy<Value = usize> {
    prop_oneof![1..70usize, 1000..1060usize, 2040..2060usize, 8180..8200usize, 31_990..32_010usize]
}

/// Any options, with the edges of each more often than chance.
fn any_draw() -> impl Strategy<Value = Draw> {
    (
        prop_oneof![Just(0.0), Just(1e-30), Just(1e-3), 0.1..3.0],
        prop_oneof![Just(0usize), Just(1), 2..100usize, 2000..2100usize, Just(40_000)],
        prop_oneof![Just(1.0), Just(0.0), Just(1e-9), 0.0..1.0],
        prop_oneof![Just(0.0), Just(1.0), 0.0..1.0],
    )
        .prop_map(|(temp, top_k, top_p, min_p)| Draw::new(temp, top_k, top_p, min_p))
}

proptest! {
    #![proptest_config(config())]

    /// Spreads from nearly equal logits to a single likely one; few values, so that there are ties; minus infinity.
    #[test]
    fn sample_is_the_reference(
        n in any_vocabulary(), spread in prop_oneof![Just(1e-4f32), Just(1.0), Just(8.0), Just(60.0)], kind in 0..4usize,
        draw in any_draw(), seed: u64, position in 0..5000usize,
    ) {
        let device = device();
        let mut random = Random::new(seed);
        let logits: Vec<f32> = random
            .values(n)
            .into_iter()
            .map(|v| match kind {
                0 => spread * v,
                1 => (4.0 * v).round(),
                2 => 0.5,
                _ if v > 0.0 => f32::NEG_INFINITY,
                _ => spread * v,
            })
            .collect();
        let excluded = [0, 1, 7].map(|_| random.below(n as u64 + 5) as u32);
        assert_sample(&device, &logits, &excluded[..kind % 4], draw, seed, position);
    }
}

#[test]
fn sample_of_a_wide_vocabulary_is_the_reference() {
    let device = device();
    for (n, seed) in [(131_072, 1), (262_144, 2), (256_001, 3)] {
        let logits: Vec<f32> = Random::new(seed).values(n).into_iter().map(|v| 6.0 * v).collect();
        for draw in [
            Draw::new(0.0, 0, 1.0, 0.0),
            Draw::new(0.8, 40, 0.95, 0.05),
            Draw::new(0.8, 0, 0.95, 0.0),
            Draw::new(1.0, 5000, 1.0, 0.0),
            Draw::new(1.0, 0, 1.0, 0.0),
        ] {
            assert_sample(&device, &logits, &[], draw, seed, 17);
        }
    }
}

#[test]
fn sample_refuses_logits_that_are_none() {
    let device = device();
    for draw in [Draw::new(0.0, 0, 1.0, 0.0), Draw::new(0.8, 40, 0.95, 0.05), Draw::new(1.0, 0, 1.0, 0.0)] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.5; 3000];
            logits[2999] = bad;
            assert_eq!(sample(&device, &logits, &[], draw, 1, 2).0, Chosen::BadLogit);
            assert_eq!(sample(&device, &logits, &[2999], draw, 1, 2).0, Chosen::BadLogit);
        }
        assert_eq!(sample(&device, &[f32::NEG_INFINITY; 40], &[], draw, 1, 2).0, Chosen::Empty);
        assert_eq!(sample(&device, &[1.0, 2.0], &[0, 1], draw, 1, 2).0, Chosen::Empty);
    }
}

/// Twenty thousand positions of one text: each token as often as its probability says.
#[test]
fn sample_follows_the_probabilities() {
    let device = device();
    let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
    let (logits, excluded) = (upload(&device, &logits), device.alloc(0).unwrap());
    let chosen = device.alloc(4).unwrap();
    let mut counts = [0u32; 4];
    for position in 0..20_000 {
        let state = state(&device, 0, position);
        let draw = Draw::new(1.0, 0, 1.0, 0.0);
        let (logits, excluded, state) = (logits.view(), excluded.view(), state.view());
        device.sample(&SampleCall { logits, excluded, state, chosen: chosen.view(), draw, seed: 5 }).unwrap();
        let mut got = [0u32];
        device.read(chosen.view(), &mut got).unwrap();
        counts[got[0] as usize] += 1;
    }
    for (count, expected) in counts.iter().zip([10_000, 5_000, 2_500, 2_500]) {
        // Five standard deviations of a binomial count are below 354.
        assert!(count.abs_diff(expected) < 354, "{counts:?}");
    }
}
