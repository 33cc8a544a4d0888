//! Times of the CUDA kernels, each alone and a whole token as one graph, at the shapes of models:
//!
//! ```sh
//! cargo bench -p kernels --bench cuda -- 7b [--context 512] [--keep 0.2]
//!     [--predictor sign|sign-x8|w2|w3|low-rank|low-rank-sign]... [--ahead N]... [--overlap] [--verbose]
//! ```
//!
//! Weights are random and each layer has its own, so that they come from memory, as in a text. Limits, or thresholds on
//! scores, keep the asked share of gate rows; the activation's threshold is then set so that 11 % of all rows are active
//! (or as many as are kept), for each predictor anew. Times are of the device, medians of `REPEATS` graph launches; bytes
//! are the weights, sign words and cached positions that the token needs, each once.
#![expect(clippy::print_stdout, reason = "the table is the program's result")]

use std::time::Instant;

use half::f16;
use kernels::cuda::{
    AttentionCall, AttentionScratch, Buffer, CudaError, DECODE_STEPS, DecodeCall, DecodeLayer, DecodeScratch,
    Device, DeviceLimits, DeviceLowRank, DeviceMatrix, DevicePlanes, DeviceResidual, DeviceRows,
    DeviceThresholds, DownCall, DownScratch, Dtype, GateUpCall, LowRankCall, LowRankScratch, MatvecCall,
    PredictScoresCall, PrefillNormCall, PrefillQuantiseCall, QkvCall, Quantised, SampleCall, StepTime, View,
    quantised_bytes, step_times,
};
use kernels::sample::Draw;
use kernels::{Activation, AttentionShape, PLANES_MAX};

const REPEATS: usize = 20;
const EPS: f32 = 1e-5;
const ACTIVE_SHARE: f64 = 0.11;

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    d: usize,
    f: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
}

const SHAPES: [Shape; 4] = [
    Shape {
        name: "46m",
        d: 512,
        f: 1376,
        n_layers: 12,
        n_heads: 4,
        n_kv_heads: 4,
        head_dim: 128,
        vocab_size: 8192,
    },
    Shape {
        name: "1b",
        d: 2048,
        f: 5504,
        n_layers: 16,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 64,
        vocab_size: 32000,
    },
    Shape {
        name: "7b",
        d: 4096,
        f: 11008,
        n_layers: 32,
        n_heads: 32,
        n_kv_heads: 32,
        head_dim: 128,
        vocab_size: 32000,
    },
    Shape {
        name: "13b",
        d: 5120,
        f: 13824,
        n_layers: 40,
        n_heads: 40,
        n_kv_heads: 40,
        head_dim: 128,
        vocab_size: 32000,
    },
];

/// Rows that an MLP reads.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Dense,
    Exact,
    Predicted(Predictor),
}

/// What predicts rows: bits of W_gate for each weight, with the signs of x or x in 8 bits, or factors, with the signs of a
/// residual as well.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Predictor {
    Sign,
    SignX8,
    W2,
    W3,
    LowRank,
    LowRankSign,
}

impl Predictor {
    const ALL: [(&'static str, Self); 6] = [
        ("sign", Self::Sign),
        ("sign-x8", Self::SignX8),
        ("w2", Self::W2),
        ("w3", Self::W3),
        ("low-rank", Self::LowRank),
        ("low-rank-sign", Self::LowRankSign),
    ];

    fn has_factors(self) -> bool {
        matches!(self, Self::LowRank | Self::LowRankSign)
    }

    fn n_planes(self) -> usize {
        match self {
            Self::LowRank => 0,
            Self::Sign | Self::SignX8 | Self::LowRankSign => 1,
            Self::W2 => 2,
            Self::W3 => 3,
        }
    }

    /// Variance of an element of as many planes, all of its values as likely.
    fn variance(self) -> f64 {
        (4f64.powi(self.n_planes() as i32) - 1.0) / 3.0
    }
}

/// One layer's weights in one buffer.
struct Layer {
    weights: Buffer,
    keys: Buffer,
    values: Buffer,
}

struct Bench {
    device: Device,
    shape: Shape,
    attention: AttentionShape,
    layers: Vec<Layer>,
    norm: Buffer,
    angles: Buffer,
    vocabulary: Buffer,
    state: Buffer,
    x: Buffer,
    q: Buffer,
    attended: Buffer,
    h: Buffer,
    counts: Buffer,
    logits: Buffer,
    ids: Buffer,
    attention_scratch: AttentionScratch,
    down_scratch: DownScratch,
    /// For all predictors but those with factors, whose kernel is another.
    decode_scratch: DecodeScratch,
    low_rank_scratch: DecodeScratch,
    layer_counts: Buffer,
    context: usize,
    /// Room for what the predictor alone finds.
    scores: Buffer,
    skip: Buffer,
    normed: Buffer,
    x_planes: Buffer,
    x_scale: Buffer,
    /// Of the residual that factors leave.
    scales: Buffer,
    predict_scratch: LowRankScratch,
    keep: f64,
    threshold: f32,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// `n` values, uniform with variance `variance`.
    fn halves(&mut self, n: usize, variance: f32) -> Vec<f16> {
        let scale = (3.0 * variance).sqrt() / 32768.0;
        // A table of all steps costs less than a conversion for each value.
        let table: Vec<f16> = (0..1 << 16).map(|i| f16::from_f32((i - 32768) as f32 * scale)).collect();
        let mut values = Vec::with_capacity(n + 3);
        while values.len() < n {
            let bits = self.next();
            values.extend((0..4).map(|i| table[(bits >> (16 * i)) as usize & 0xffff]));
        }
        values.truncate(n);
        values
    }
}

impl Shape {
    /// Of the factors that stand in for a predictor of low rank: 256 at 7B; beside signs, 88.
    fn rank(&self, predictor: Predictor) -> usize {
        let whole = self.d / 16;
        if predictor == Predictor::LowRankSign { whole.div_ceil(3).next_multiple_of(8) } else { whole }
    }

    fn factor_elements(&self, predictor: Predictor) -> usize {
        self.rank(predictor) * (self.d + self.f)
    }

    /// Elements before each matrix of a layer: q, k, v, o, gate, up, down, and the end, where factors begin and then planes.
    fn offsets(&self) -> [usize; 8] {
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let sizes = [
            q * self.d,
            kv * self.d,
            kv * self.d,
            q * self.d,
            self.f * self.d,
            self.f * self.d,
            self.f * self.d,
        ];
        let mut offsets = [0; 8];
        for (i, size) in sizes.into_iter().enumerate() {
            offsets[i + 1] = offsets[i] + size;
        }
        offsets
    }
}

impl Bench {
    fn new(device: Device, shape: Shape, context: usize, keep: f64) -> Result<Self, CudaError> {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (d, f) = (shape.d, shape.f);
        let offsets = shape.offsets();
        let weights = random.halves(offsets[7], 1.0 / d as f32);
        let n_words = d.div_ceil(32);
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&weights).to_vec();
        let factors = Random(random.0 ^ 1).halves(shape.factor_elements(Predictor::LowRank), 1.0 / d as f32);
        bytes.extend_from_slice(bytemuck::cast_slice(&factors));
        // Uniform weights: signs, then above half of the largest, then the odd quarters; a bit of a negative is turned.
        let largest = (3.0 / d as f32).sqrt();
        let magnitude_bits: [fn(f32) -> bool; PLANES_MAX] =
            [|_| false, |share| share < 0.5, |share| ((share * 4.0) as u32).is_multiple_of(2)];
        for bit in magnitude_bits {
            for row in weights[offsets[4]..offsets[5]].chunks_exact(d) {
                for part in row.chunks(32) {
                    let bits = part.iter().map(|v| v.to_f32());
                    let bits = bits.map(|v| (v < 0.0) != bit((v.abs() / largest).min(0.999)));
                    let word = bits.enumerate().fold(0, |word, (i, bit)| word | u32::from(bit) << i);
                    bytes.extend(word.to_le_bytes());
                }
            }
        }
        assert_eq!(bytes.len(), (offsets[7] + factors.len()) * 2 + PLANES_MAX * f * n_words * 4);
        let attention = AttentionShape {
            n_heads: shape.n_heads,
            n_kv_heads: shape.n_kv_heads,
            head_dim: shape.head_dim,
            n_positions_max: context + 128,
        };
        let n_cached = shape.n_kv_heads * attention.n_positions_max * shape.head_dim;
        let cached = random.halves(n_cached, 1.0);
        let layers = (0..shape.n_layers)
            .map(|_| {
                Ok(Layer {
                    weights: device.upload(&bytes)?,
                    keys: device.upload(&cached)?,
                    values: device.upload(&cached)?,
                })
            })
            .collect::<Result<_, CudaError>>()?;
        let floats = |n: usize| device.alloc(4 * n);
        let embedding = random.halves(shape.vocab_size * d, 1.0);
        Ok(Self {
            layers,
            norm: device.upload(&vec![1.0f32; d])?,
            angles: device.upload(&vec![0.6f32; attention.n_positions_max * shape.head_dim / 2])?,
            vocabulary: device.upload(&embedding)?,
            state: device.upload(&[7u32, context as u32])?,
            x: floats(d)?,
            q: floats(shape.n_heads * shape.head_dim)?,
            attended: floats(shape.n_heads * shape.head_dim)?,
            h: floats(f)?,
            counts: device.alloc(16)?,
            logits: floats(shape.vocab_size)?,
            ids: device.alloc(4 * attention.n_positions_max)?,
            attention_scratch: device.attention_scratch(&attention)?,
            down_scratch: device.down_scratch(f, d)?,
            decode_scratch: device.decode_scratch(&attention, d, f, 0, 2)?.expect("widths of models fit"),
            low_rank_scratch: device
                .decode_scratch(&attention, d, f, shape.rank(Predictor::LowRank), 2)?
                .expect("widths of models fit"),
            layer_counts: device.alloc(16 * shape.n_layers)?,
            scores: floats(f + 1)?,
            skip: device.alloc(f)?,
            normed: floats(d)?,
            x_planes: device.alloc(quantised_bytes(1, d))?,
            x_scale: floats(1)?,
            scales: device.upload(&vec![(shape.rank(Predictor::LowRankSign) as f32).sqrt() / d as f32; f])?,
            predict_scratch: device.low_rank_scratch(shape.rank(Predictor::LowRank))?,
            keep,
            threshold: 0.0,
            device,
            shape,
            attention,
            context,
        })
    }

    /// Bisects the activation's threshold that leaves `ACTIVE_SHARE` of the first layer's rows.
    fn set_threshold(&mut self, predictor: Predictor) -> Result<(), CudaError> {
        let wanted = (ACTIVE_SHARE.min(self.keep) * self.shape.f as f64) as u64;
        let (mut low, mut high) = (0.0f32, 8.0f32);
        for _ in 0..12 {
            self.threshold = (low + high) / 2.0;
            self.device.write(self.counts.view(), &[0u64; 2])?;
            self.device.embed(&self.embedding()?, self.state.view(), self.x.view())?;
            self.gate_up(0, Mode::Predicted(predictor))?;
            let mut counts = [0u64; 2];
            self.device.read(self.counts.view(), &mut counts)?;
            if counts[1] > wanted { low = self.threshold } else { high = self.threshold }
        }
        Ok(())
    }

    fn embedding(&self) -> Result<DeviceMatrix<'_>, CudaError> {
        DeviceMatrix::new(self.vocabulary.view(), Dtype::F16, self.shape.vocab_size, self.shape.d)
    }

    /// Matrix `i` of a layer, in the order of [`Shape::offsets`].
    fn matrix(
        &self,
        layer: usize,
        i: usize,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<DeviceMatrix<'_>, CudaError> {
        let view = self.layers[layer].weights.view();
        let view = view.slice(self.shape.offsets()[i] * 2, n_rows * n_cols * 2);
        DeviceMatrix::new(view, Dtype::F16, n_rows, n_cols)
    }

    /// Bytes of a plane of W_gate.
    fn plane_bytes(&self) -> usize {
        self.shape.f * self.shape.d.div_ceil(32) * 4
    }

    /// What `predictor` reads: both factors, planes of W_gate, or both factors and a plane.
    fn predictor_bits(&self, layer: usize, predictor: Predictor) -> View<'_> {
        let (weights, offset) = (self.layers[layer].weights.view(), self.shape.offsets()[7] * 2);
        let planes_offset = offset + self.shape.factor_elements(Predictor::LowRank) * 2;
        let plane_bytes = predictor.n_planes() * self.plane_bytes();
        let factor_bytes =
            if predictor.has_factors() { self.shape.factor_elements(predictor) * 2 } else { 0 };
        weights.slice(planes_offset - factor_bytes, factor_bytes + plane_bytes)
    }

    fn factors(&self, layer: usize, predictor: Predictor) -> Result<DeviceLowRank<'_>, CudaError> {
        let Shape { d, f, .. } = self.shape;
        let (bits, rank) = (self.predictor_bits(layer, predictor), self.shape.rank(predictor));
        let signs = bits.slice((d + f) * rank * 2, predictor.n_planes() * self.plane_bytes());
        Ok(DeviceLowRank {
            fc1: DeviceMatrix::new(bits.slice(0, rank * d * 2), Dtype::F16, rank, d)?,
            fc2: DeviceMatrix::new(bits.slice(rank * d * 2, f * rank * 2), Dtype::F16, f, rank)?,
            relu: false,
            residual: (predictor == Predictor::LowRankSign)
                .then(|| DeviceResidual { signs, scales: self.scales.view() }),
        })
    }

    fn planes(&self, layer: usize, predictor: Predictor) -> DevicePlanes<'_> {
        let planes = self.predictor_bits(layer, predictor);
        let (n_low, n_bytes) = (predictor.n_planes() - 1, self.plane_bytes());
        DevicePlanes {
            signs: planes.slice(0, n_bytes),
            low: (n_low > 0).then(|| planes.slice(n_bytes, n_low * n_bytes)),
        }
    }

    /// The limit that keeps the asked share of rows: disagreements of signs are d coins.
    fn limits(&self) -> DeviceLimits<'static> {
        let d = self.shape.d as f64;
        DeviceLimits::Layer((d / 2.0 + d.sqrt() / 2.0 * normal_quantile(self.keep)).round() as u32)
    }

    /// The same for scores, of a normalised input with elements as `predictor` has them.
    fn thresholds(&self, predictor: Predictor) -> DeviceThresholds<'static> {
        let deviation = match predictor {
            Predictor::LowRank => (self.shape.rank(predictor) as f64 / self.shape.d as f64).sqrt(),
            // The residual adds as much.
            Predictor::LowRankSign => (2.0 * self.shape.rank(predictor) as f64 / self.shape.d as f64).sqrt(),
            _ => (self.shape.d as f64 * predictor.variance()).sqrt(),
        };
        DeviceThresholds::Layer((deviation * normal_quantile(1.0 - self.keep)) as f32)
    }

    /// The predictor alone, on whatever the residual stream holds.
    fn predict(&self, layer: usize, predictor: Predictor) -> Result<(), CudaError> {
        if predictor.has_factors() {
            return self.predict_low_rank(layer, predictor, self.x.view());
        }
        let planes = self.planes(layer, predictor);
        if predictor == Predictor::Sign {
            return self.device.predict(planes.signs, self.limits(), self.x.view(), self.skip.view());
        }
        let f_bytes = self.shape.f * 4;
        self.device.predict_scores(&PredictScoresCall {
            planes,
            thresholds: self.thresholds(predictor),
            x: self.x.view(),
            scores: self.scores.view().slice(0, f_bytes),
            scale: self.scores.view().slice(f_bytes, 4),
            skip: self.skip.view(),
        })
    }

    fn quantised(&self) -> Quantised<'_> {
        Quantised { planes: self.x_planes.view(), scales: self.x_scale.view() }
    }

    fn predict_low_rank(&self, layer: usize, predictor: Predictor, x: View<'_>) -> Result<(), CudaError> {
        let factors = self.factors(layer, predictor)?;
        let call = LowRankCall {
            n_tokens: 1,
            x,
            quantised: factors.residual.map(|_| self.quantised()),
            factors,
            thresholds: self.thresholds(predictor),
            skip: self.skip.view(),
        };
        self.device.predict_low_rank(&call, &self.predict_scratch)
    }

    fn rows_of(&self, layer: usize, mode: Mode) -> Result<DeviceRows<'_>, CudaError> {
        Ok(match mode {
            Mode::Dense => DeviceRows::All,
            Mode::Exact => DeviceRows::Active,
            Mode::Predicted(Predictor::Sign) => DeviceRows::Predicted {
                signs: self.planes(layer, Predictor::Sign).signs,
                limits: self.limits(),
            },
            Mode::Predicted(predictor) if predictor.has_factors() => DeviceRows::LowRank {
                factors: self.factors(layer, predictor)?,
                thresholds: self.thresholds(predictor),
            },
            Mode::Predicted(predictor) => DeviceRows::Scored {
                planes: self.planes(layer, predictor),
                thresholds: self.thresholds(predictor),
            },
        })
    }

    /// A token as one kernel.
    fn decode(&self, mode: Mode, clocks: Option<View<'_>>) -> Result<(), CudaError> {
        let Shape { d, f, n_heads, n_kv_heads, head_dim, .. } = self.shape;
        let layers = (0..self.layers.len())
            .map(|layer| {
                Ok(DecodeLayer {
                    w_q: self.matrix(layer, 0, n_heads * head_dim, d)?,
                    w_k: self.matrix(layer, 1, n_kv_heads * head_dim, d)?,
                    w_v: self.matrix(layer, 2, n_kv_heads * head_dim, d)?,
                    w_o: self.matrix(layer, 3, d, n_heads * head_dim)?,
                    w_gate: self.matrix(layer, 4, f, d)?,
                    w_up: self.matrix(layer, 5, f, d)?,
                    w_down_t: self.matrix(layer, 6, f, d)?,
                    rows: self.rows_of(layer, mode)?,
                    attn_norm: self.norm.view(),
                    mlp_norm: self.norm.view(),
                    keys: self.layers[layer].keys.view(),
                    values: self.layers[layer].values.view(),
                })
            })
            .collect::<Result<Vec<_>, CudaError>>()?;
        self.device.decode(&DecodeCall {
            shape: self.attention,
            embedding: self.embedding()?,
            lm_head: self.embedding()?,
            final_norm: self.norm.view(),
            layers: &layers,
            cos: self.angles.view(),
            sin: self.angles.view(),
            activation: Activation::FatRelu(self.threshold),
            eps: EPS,
            state: self.state.view(),
            ids: self.ids.view(),
            logits: self.logits.view(),
            counts: self.layer_counts.view(),
            greedy: true,
            clocks,
            trace: None,
            scratch: match mode {
                Mode::Predicted(predictor) if predictor.has_factors() => &self.low_rank_scratch,
                _ => &self.decode_scratch,
            },
        })
    }

    fn qkv(&self, layer: usize) -> Result<(), CudaError> {
        let Shape { d, n_heads, n_kv_heads, head_dim, .. } = self.shape;
        self.device.qkv(&QkvCall {
            shape: self.attention,
            w_q: self.matrix(layer, 0, n_heads * head_dim, d)?,
            w_k: self.matrix(layer, 1, n_kv_heads * head_dim, d)?,
            w_v: self.matrix(layer, 2, n_kv_heads * head_dim, d)?,
            x: self.x.view(),
            norm: self.norm.view(),
            eps: EPS,
            cos: self.angles.view(),
            sin: self.angles.view(),
            q: self.q.view(),
            k_cache: self.layers[layer].keys.view(),
            v_cache: self.layers[layer].values.view(),
            state: self.state.view(),
        })
    }

    fn attend(&self, layer: usize) -> Result<(), CudaError> {
        self.device.attention(&AttentionCall {
            shape: self.attention,
            q: self.q.view(),
            k_cache: self.layers[layer].keys.view(),
            v_cache: self.layers[layer].values.view(),
            cache: Dtype::F16,
            out: self.attended.view(),
            scratch: &self.attention_scratch,
            state: self.state.view(),
        })
    }

    fn output(&self, layer: usize) -> Result<(), CudaError> {
        let n_cols = self.shape.n_heads * self.shape.head_dim;
        self.device.matvec(&MatvecCall {
            w: self.matrix(layer, 3, self.shape.d, n_cols)?,
            x: self.attended.view(),
            norm: None,
            y: self.x.view(),
            accumulate: true,
        })
    }

    fn gate_up(&self, layer: usize, mode: Mode) -> Result<(), CudaError> {
        let mut rows = self.rows_of(layer, mode)?;
        if let Mode::Predicted(predictor) = mode
            && predictor.has_factors()
        {
            let (x, weight, n_tokens) = (self.x.view(), self.norm.view(), 1);
            self.device.prefill_norm(&PrefillNormCall {
                x,
                weight,
                eps: EPS,
                n_tokens,
                dtype: Dtype::F32,
                out: self.normed.view(),
                signs: None,
            })?;
            if predictor == Predictor::LowRankSign {
                let out = self.quantised();
                self.device.prefill_quantise(&PrefillQuantiseCall { x, weight, eps: EPS, n_tokens, out })?;
            }
            self.predict_low_rank(layer, predictor, self.normed.view())?;
            rows = DeviceRows::Masked { mask: self.skip.view() };
        }
        self.device.gate_up(&GateUpCall {
            w_gate: self.matrix(layer, 4, self.shape.f, self.shape.d)?,
            w_up: self.matrix(layer, 5, self.shape.f, self.shape.d)?,
            rows,
            activation: Activation::FatRelu(self.threshold),
            x: self.x.view(),
            norm: self.norm.view(),
            eps: EPS,
            h: self.h.view(),
            counts: self.counts.view(),
            normed: None,
            skip: None,
        })
    }

    fn down(&self, layer: usize, mode: Mode) -> Result<(), CudaError> {
        self.device.down(&DownCall {
            w_down_t: self.matrix(layer, 6, self.shape.f, self.shape.d)?,
            h: self.h.view(),
            dense: mode == Mode::Dense,
            x: self.x.view(),
            scratch: &self.down_scratch,
        })
    }

    fn head(&self) -> Result<(), CudaError> {
        self.device.matvec(&MatvecCall {
            w: self.embedding()?,
            x: self.x.view(),
            norm: Some((self.norm.view(), EPS)),
            y: self.logits.view(),
            accumulate: false,
        })
    }

    fn token(&self, mode: Mode) -> Result<(), CudaError> {
        self.device.embed(&self.embedding()?, self.state.view(), self.x.view())?;
        for layer in 0..self.layers.len() {
            self.qkv(layer)?;
            self.attend(layer)?;
            self.output(layer)?;
            self.gate_up(layer, mode)?;
            self.down(layer, mode)?;
        }
        self.head()?;
        self.device.greedy(self.logits.view(), self.ids.view(), self.state.view())
    }

    /// Median, lowest and highest microseconds of the device for what `launches` launches, as a graph.
    fn time_us(&self, launches: impl FnOnce() -> Result<(), CudaError>) -> Result<[f64; 3], CudaError> {
        // SAFETY: the graph is dropped before the buffers of `self`.
        let graph = unsafe { self.device.capture(launches) }?;
        let mut times = Vec::with_capacity(REPEATS);
        for repeat in 0..REPEATS + 3 {
            if repeat % 64 == 0 {
                self.device.write(self.state.view(), &[7u32, self.context as u32])?;
            }
            let start = self.device.record()?;
            self.device.replay(&graph)?;
            times.push(self.device.record()?.ms_since(&start)? * 1e3);
        }
        let mut times = times.split_off(3);
        times.sort_by(f64::total_cmp);
        Ok([times[REPEATS / 2], times[0], times[REPEATS - 1]])
    }

    /// Rows kept and active, for each layer and token, of a token in `mode`.
    fn rows(&self, mode: Mode) -> Result<[f64; 2], CudaError> {
        self.device.write(self.counts.view(), &[0u64; 2])?;
        self.device.write(self.state.view(), &[7u32, self.context as u32])?;
        self.token(mode)?;
        let mut counts = [0u64; 2];
        self.device.read(self.counts.view(), &mut counts)?;
        Ok(counts.map(|count| count as f64 / self.layers.len() as f64))
    }

    /// Largest difference of a logit between the two ways, as a share of the largest logit.
    fn difference(&self, mode: Mode) -> Result<f32, CudaError> {
        let mut logits = [0, 1].map(|_| vec![0.0f32; self.shape.vocab_size]);
        for (way, logits) in logits.iter_mut().enumerate() {
            self.device.write(self.state.view(), &[7u32, self.context as u32])?;
            if way == 0 {
                self.token(mode)?
            } else {
                self.decode(mode, None)?
            }
            self.device.read(self.logits.view(), logits)?;
        }
        let largest = logits[0].iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
        let pairs = logits[0].iter().zip(&logits[1]);
        Ok(pairs.fold(0.0f32, |worst, (a, b)| if (a - b).abs() <= worst { worst } else { (a - b).abs() })
            / largest)
    }

    /// Microseconds of each step of a token that takes `token_us`: mean, lowest and highest over the blocks.
    fn report_steps(&self, mode: Mode, token_us: f64) -> Result<(), CudaError> {
        let n_steps = DECODE_STEPS.len();
        let clocks = self.device.alloc(self.decode_scratch.n_blocks() * n_steps * 8)?;
        let mut counts = vec![0u64; self.decode_scratch.n_blocks() * n_steps];
        self.device.write(clocks.view(), &counts)?;
        self.time_us(|| self.decode(mode, Some(clocks.view())))?;
        self.device.read(clocks.view(), &mut counts)?;
        for (name, time) in DECODE_STEPS.iter().zip(step_times(&counts, token_us)) {
            let StepTime { mean_us, lowest_us, highest_us } = time;
            println!("    {name:<22} {mean_us:8.1} us ({lowest_us:.1} to {highest_us:.1})");
        }
        Ok(())
    }

    /// Draws over logits of several widths, such as a model gives: a few likely tokens before a wide rest.
    fn report_sampling(&self, line: impl Fn(&str, [f64; 3], f64, f64)) -> Result<(), CudaError> {
        let (excluded, chosen) = (self.device.alloc(0)?, self.device.alloc(4)?);
        for vocab_size in [32_000, 131_072, 262_144] {
            let spread = |i: usize| ((i * 7919 % 10_007) as f32 / 10_007.0).powi(8) * 30.0 - 15.0;
            let logits = self.device.upload(&(0..vocab_size).map(spread).collect::<Vec<f32>>())?;
            for (name, draw) in [
                ("greedy", Draw::new(0.0, 0, 1.0, 0.0)),
                ("defaults", Draw::new(0.8, 40, 0.95, 0.05)),
                ("top-p alone", Draw::new(0.8, 0, 0.95, 0.0)),
                ("no filter", Draw::new(1.0, 0, 1.0, 0.0)),
            ] {
                let call = SampleCall {
                    logits: logits.view(),
                    excluded: excluded.view(),
                    state: self.state.view(),
                    chosen: chosen.view(),
                    draw,
                    seed: 1,
                };
                let time_us = self.time_us(|| self.device.sample(&call))?;
                line(&format!("sample {vocab_size} {name}"), time_us, 1.0, vocab_size as f64 * 4.0);
            }
        }
        Ok(())
    }

    fn report(&mut self, predictors: &[Predictor], gb_per_s: f64, verbose: bool) -> Result<(), CudaError> {
        let Shape { d, f, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, .. } = self.shape;
        let (q, kv) = ((n_heads * head_dim) as f64, (n_kv_heads * head_dim) as f64);
        let (row, layers) = (d as f64 * 2.0, n_layers as f64);
        let line = |name: &str, [us, low, high]: [f64; 3], n: f64, bytes: f64| {
            let rate = n * bytes / us / 1e3;
            println!(
                "{name:<28} {:9.2} us ({:.2} to {:.2})  {:8.2} MB  {rate:7.0} GB/s  {:5.1} %",
                us / n,
                low / n,
                high / n,
                bytes / 1e6,
                100.0 * rate / gb_per_s
            );
        };
        let kv_bytes = 2.0 * kv * 2.0 * (self.context + 1) as f64;
        if verbose {
            let each = |launch: &dyn Fn(usize) -> Result<(), CudaError>| {
                self.time_us(|| (0..n_layers).try_for_each(launch))
            };
            line("qkv", each(&|layer| self.qkv(layer))?, layers, (q + 2.0 * kv) * row);
            line("attention", each(&|layer| self.attend(layer))?, layers, kv_bytes);
            line("output", each(&|layer| self.output(layer))?, layers, q * row);
            line("lm_head", self.time_us(|| self.head())?, 1.0, vocab_size as f64 * row);
            let greedy = || self.device.greedy(self.logits.view(), self.ids.view(), self.state.view());
            line("greedy", self.time_us(greedy)?, 1.0, vocab_size as f64 * 4.0);
            self.report_sampling(line)?;
        }
        self.set_threshold(predictors[0])?;
        let predicted = predictors.iter().map(|&predictor| Mode::Predicted(predictor));
        for mode in [Mode::Dense, Mode::Exact].into_iter().chain(predicted) {
            let mut signs = 0.0;
            if let Mode::Predicted(predictor) = mode {
                self.set_threshold(predictor)?;
                signs = self.predictor_bits(0, predictor).len_bytes() as f64;
            }
            let each = |launch: &dyn Fn(usize) -> Result<(), CudaError>| {
                self.time_us(|| (0..n_layers).try_for_each(launch))
            };
            let [n_kept, n_active] = self.rows(mode)?;
            let [n_up, n_down] = if mode == Mode::Dense { [f as f64; 2] } else { [n_active; 2] };
            if verbose {
                if let Mode::Predicted(predictor) = mode {
                    let sum = self.scores.view().slice(0, 4);
                    let read = |layer| self.device.read_all(self.predictor_bits(layer, predictor), sum);
                    line("read of its bits alone", each(&read)?, layers, signs);
                    line(
                        &format!("predictor {predictor:?} alone"),
                        each(&|layer| self.predict(layer, predictor))?,
                        layers,
                        signs,
                    );
                }
                let bytes = signs + (n_kept + n_up) * row;
                self.rows(mode)?;
                line(&format!("gate_up {mode:?}"), each(&|layer| self.gate_up(layer, mode))?, layers, bytes);
                self.rows(mode)?;
                line(&format!("down {mode:?}"), each(&|layer| self.down(layer, mode))?, layers, n_down * row);
            }
            let layer_bytes = (2.0 * q + 2.0 * kv) * row + kv_bytes + signs + (n_kept + n_up + n_down) * row;
            let bytes = layers * layer_bytes + vocab_size as f64 * row;
            let graph = self.time_us(|| self.token(mode))?;
            line(&format!("token {mode:?}, kernels"), graph, 1.0, bytes);
            let decode = self.time_us(|| self.decode(mode, None))?;
            line(&format!("token {mode:?}, one kernel"), decode, 1.0, bytes);
            if verbose {
                self.report_steps(mode, decode[0])?;
            }
            println!(
                "  {} {mode:?} keep {}: {:.1} and {:.1} tok/s, rows kept {:.1} %, active {:.1} %, logits differ by {:.1e}",
                self.shape.name,
                self.keep,
                1e6 / graph[0],
                1e6 / decode[0],
                100.0 * n_kept / f as f64,
                100.0 * n_active / f as f64,
                self.difference(mode)?
            );
        }
        Ok(())
    }
}

/// Where the normal distribution has `share` of its mass below, within eight deviations.
fn normal_quantile(share: f64) -> f64 {
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if normal_share(middle) < share { low = middle } else { high = middle }
    }
    low
}

/// Mass of the normal distribution below `x`, by Simpson's rule.
fn normal_share(x: f64) -> f64 {
    let n = 400;
    let step = (x + 9.0) / f64::from(n);
    let density = |i: i32| (-(step * f64::from(i) - 9.0).powi(2) / 2.0).exp();
    let inner: f64 = (1..n).map(|i| density(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    (density(0) + inner + density(n)) * step / 3.0 / std::f64::consts::TAU.sqrt()
}

fn main() -> Result<(), CudaError> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let values = |name: &str| -> Vec<f64> {
        let after = args.windows(2).filter(|pair| pair[0] == name);
        after.map(|pair| pair[1].parse().unwrap_or_else(|_| panic!("{name} takes a number"))).collect()
    };
    let shape = SHAPES.iter().find(|shape| args.iter().any(|arg| arg == shape.name)).unwrap_or(&SHAPES[0]);
    let context = values("--context").last().map_or(512, |&value| value as usize);
    let keeps = Some(values("--keep")).filter(|keeps| !keeps.is_empty()).unwrap_or_else(|| vec![0.2]);
    let named = args.windows(2).filter(|pair| pair[0] == "--predictor").map(|pair| {
        let known = Predictor::ALL.into_iter().find(|(name, _)| *name == pair[1]);
        let names = || Predictor::ALL.map(|(name, _)| name).join(", ");
        known.unwrap_or_else(|| panic!("--predictor takes one of {}, not {}", names(), pair[1])).1
    });
    let mut predictors: Vec<Predictor> = named.collect();
    if predictors.is_empty() {
        predictors.push(Predictor::Sign);
    }
    let verbose = args.iter().any(|arg| arg == "--verbose");
    let mut device = Device::open(0)?;
    if args.iter().any(|arg| arg == "--overlap") {
        device = device.with_overlap();
    }
    let gb_per_s = device.measure_read_gb_per_s()?;
    println!("{:?}\nread {gb_per_s:.0} GB/s, overlap {}", device.info(), device.overlaps());
    let started = Instant::now();
    let mut bench = Bench::new(device, *shape, context, keeps[0])?;
    println!("{} at context {context}, set up in {:.1?}", shape.name, started.elapsed());
    let aheads = Some(values("--ahead")).filter(|aheads| !aheads.is_empty());
    for &keep in &keeps {
        bench.keep = keep;
        match &aheads {
            None => bench.report(&predictors, gb_per_s, verbose)?,
            Some(aheads) => {
                for &ahead in aheads {
                    println!("ahead {ahead}");
                    bench.device = bench.device.with_ahead(ahead as usize);
                    bench.report(&predictors, gb_per_s, verbose)?;
                }
            }
        }
    }
    Ok(())
}
