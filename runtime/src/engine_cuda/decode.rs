//! A token through all layers: one kernel where the model's widths allow it, else a run of the single kernels.

use kernels::cuda::{
    AttentionCall, AttentionScratch, Buffer, CudaError, DecodeCall, DecodeLayer, DecodeScratch, Device,
    DeviceRows, DownCall, DownScratch, Dtype, GateUpCall, LowRankScratch, MatvecCall, MlpTrace,
    PrefillNormCall, QkvCall, Quantised, SampleCall, View, quantised_bytes,
};
use kernels::sample::Draw;
use kernels::{AttentionShape, Matrix, MlpWeights};

use super::{COUNT_BYTES, ModelState};
use crate::engine::RowChoice;
use crate::model::Weights;

/// How a token runs.
#[derive(Debug)]
pub(super) enum Way {
    OneKernel(Box<DecodeScratch>),
    Kernels(Box<Vectors>),
}

/// What passes between single kernels.
#[derive(Debug)]
pub(super) struct Vectors {
    x: Buffer,
    q: Buffer,
    attended: Buffer,
    h: Buffer,
    /// What a predictor of low rank passes on; none in a model without.
    prediction: Option<LowRankVectors>,
    attention: AttentionScratch,
    down: DownScratch,
}

/// One token's, of a predictor of low rank.
#[derive(Debug)]
struct LowRankVectors {
    normed: Buffer,
    planes: Buffer,
    scale: Buffer,
    mask: Buffer,
    scratch: LowRankScratch,
}

/// How tokens are drawn on the device.
#[derive(Debug)]
pub(super) struct DeviceSampler {
    pub(super) draw: Draw,
    pub(super) seed: u64,
    /// Tokens never chosen, u32.
    pub(super) excluded: Buffer,
}

impl Way {
    /// The one kernel where it takes the model.
    pub(super) fn new(
        device: &Device,
        shape: &AttentionShape,
        weights: &Weights<'_>,
    ) -> Result<Self, CudaError> {
        let intermediate_size = weights.layers.first().map_or(0, |w| w.mlp.gate.n_rows);
        if let Some(scratch) = one_kernel(device, shape, weights, intermediate_size)? {
            return Ok(Self::OneKernel(Box::new(scratch)));
        }
        let floats = |n: usize| device.alloc(n * size_of::<f32>());
        let hidden_size = weights.embedding.n_cols;
        let prediction = match weights.rank_max() {
            0 => None,
            rank_max => Some(LowRankVectors {
                normed: floats(hidden_size)?,
                planes: device.alloc(quantised_bytes(1, hidden_size))?,
                scale: floats(1)?,
                mask: device.alloc(intermediate_size)?,
                scratch: device.low_rank_scratch(rank_max)?,
            }),
        };
        Ok(Self::Kernels(Box::new(Vectors {
            x: floats(hidden_size)?,
            q: floats(shape.n_heads * shape.head_dim)?,
            attended: floats(shape.n_heads * shape.head_dim)?,
            h: floats(intermediate_size)?,
            prediction,
            attention: device.attention_scratch(shape)?,
            down: device.down_scratch(intermediate_size, hidden_size)?,
        })))
    }
}

impl ModelState<'_> {
    /// Launches everything that the token in `self.token` needs, and the draw of the next one, which takes its place.
    pub(super) fn token_and_draw(
        &self,
        rows: &[RowChoice],
        sampler: &DeviceSampler,
    ) -> Result<(), CudaError> {
        self.token(rows, None, None)?;
        if let Way::Kernels(_) = self.way {
            self.device.advance(self.token.view())?;
        }
        self.device.sample(&SampleCall {
            logits: self.logits.view(),
            excluded: sampler.excluded.view(),
            state: self.token.view(),
            chosen: self.chosen(),
            draw: sampler.draw,
            seed: sampler.seed,
        })
    }

    /// Launches everything that the token in `self.token` needs. The one kernel adds to `clocks`. Either way fills `trace`.
    pub(super) fn token(
        &self,
        rows: &[RowChoice],
        clocks: Option<View<'_>>,
        trace: Option<MlpTrace<'_>>,
    ) -> Result<(), CudaError> {
        match &self.way {
            Way::OneKernel(scratch) => self.token_in_one(rows, scratch, clocks, trace),
            Way::Kernels(vectors) => self.token_in_kernels(rows, vectors, trace),
        }
    }

    fn token_in_one(
        &self,
        rows: &[RowChoice],
        scratch: &DecodeScratch,
        clocks: Option<View<'_>>,
        trace: Option<MlpTrace<'_>>,
    ) -> Result<(), CudaError> {
        let layers = self
            .weights
            .layers
            .iter()
            .zip(&self.keys_and_values)
            .enumerate()
            .map(|(layer, (w, [keys, values]))| {
                Ok(DecodeLayer {
                    w_q: self.matrix(&w.w_q)?,
                    w_k: self.matrix(&w.w_k)?,
                    w_v: self.matrix(&w.w_v)?,
                    w_o: self.matrix(&w.w_o)?,
                    w_gate: self.matrix(&w.mlp.gate)?,
                    w_up: self.matrix(&w.mlp.up)?,
                    w_down_t: self.matrix(&w.mlp.down_t)?,
                    rows: self.rows(layer, &rows[layer])?,
                    attn_norm: self.floats(w.attn_norm),
                    mlp_norm: self.floats(w.mlp_norm),
                    keys: keys.view(),
                    values: values.view(),
                })
            })
            .collect::<Result<Vec<_>, CudaError>>()?;
        self.device.decode(&DecodeCall {
            shape: self.shape,
            embedding: self.matrix(&self.weights.embedding)?,
            lm_head: self.matrix(&self.weights.lm_head)?,
            final_norm: self.floats(self.weights.final_norm),
            layers: &layers,
            cos: self.cos.view(),
            sin: self.sin.view(),
            activation: self.activation,
            eps: self.eps,
            state: self.token.view(),
            ids: self.ids.view(),
            logits: self.logits.view(),
            counts: self.counts(),
            greedy: false,
            clocks,
            trace,
            scratch,
        })
    }

    /// `rows` of `layer`, those of low rank as a mask for the input in `vectors`.
    fn masked<'a>(
        &self,
        layer: usize,
        rows: DeviceRows<'a>,
        vectors: &'a Vectors,
    ) -> Result<DeviceRows<'a>, CudaError> {
        let (DeviceRows::LowRank { factors, thresholds }, Some(v)) = (rows, &vectors.prediction) else {
            return Ok(rows);
        };
        let norm = PrefillNormCall {
            x: vectors.x.view(),
            weight: self.floats(self.weights.layers[layer].mlp_norm),
            eps: self.eps,
            n_tokens: 1,
            dtype: Dtype::F32,
            out: v.normed.view(),
            signs: None,
        };
        let quantised = Quantised { planes: v.planes.view(), scales: v.scale.view() };
        let call = self.low_rank_call(norm, quantised, factors, thresholds, v.mask.view())?;
        self.device.predict_low_rank(&call, &v.scratch)?;
        Ok(DeviceRows::Masked { mask: v.mask.view() })
    }

    fn token_in_kernels(
        &self,
        rows: &[RowChoice],
        vectors: &Vectors,
        trace: Option<MlpTrace<'_>>,
    ) -> Result<(), CudaError> {
        let Self { device, shape, .. } = self;
        let (x, q) = (vectors.x.view(), vectors.q.view());
        let state = self.token.view();
        device.embed(&self.matrix(&self.weights.embedding)?, state, x)?;
        for (layer, (w, [keys, values])) in self.weights.layers.iter().zip(&self.keys_and_values).enumerate()
        {
            device.qkv(&QkvCall {
                shape: *shape,
                w_q: self.matrix(&w.w_q)?,
                w_k: self.matrix(&w.w_k)?,
                w_v: self.matrix(&w.w_v)?,
                x,
                norm: self.floats(w.attn_norm),
                eps: self.eps,
                cos: self.cos.view(),
                sin: self.sin.view(),
                q,
                k_cache: keys.view(),
                v_cache: values.view(),
                state,
            })?;
            device.attention(&AttentionCall {
                shape: *shape,
                q,
                k_cache: keys.view(),
                v_cache: values.view(),
                cache: Dtype::of(&w.w_q.data).cache(),
                out: vectors.attended.view(),
                scratch: &vectors.attention,
                state,
            })?;
            device.matvec(&MatvecCall {
                w: self.matrix(&w.w_o)?,
                x: vectors.attended.view(),
                norm: None,
                y: x,
                accumulate: true,
            })?;
            let rows = self.masked(layer, self.rows(layer, &rows[layer])?, vectors)?;
            let trace = trace.map(|trace| trace.layer(layer, w.mlp.gate.n_cols, w.mlp.gate.n_rows));
            let h = trace.map_or(vectors.h.view(), |trace| trace.h);
            device.gate_up(&GateUpCall {
                w_gate: self.matrix(&w.mlp.gate)?,
                w_up: self.matrix(&w.mlp.up)?,
                rows,
                activation: self.activation,
                x,
                norm: self.floats(w.mlp_norm),
                eps: self.eps,
                h,
                counts: self.counts().slice(layer * COUNT_BYTES, COUNT_BYTES),
                normed: trace.map(|trace| trace.x),
                skip: trace.map(|trace| trace.skip),
            })?;
            device.down(&DownCall {
                w_down_t: self.matrix(&w.mlp.down_t)?,
                h,
                dense: matches!(rows, DeviceRows::All),
                x,
                scratch: &vectors.down,
            })?;
        }
        device.matvec(&MatvecCall {
            w: self.matrix(&self.weights.lm_head)?,
            x,
            norm: Some((self.floats(self.weights.final_norm), self.eps)),
            y: self.logits.view(),
            accumulate: false,
        })
    }
}

/// The scratch of the one kernel where it takes the model: every matrix of one type, widths that fit.
fn one_kernel(
    device: &Device,
    shape: &AttentionShape,
    weights: &Weights<'_>,
    intermediate_size: usize,
) -> Result<Option<DecodeScratch>, CudaError> {
    let dtype = Dtype::of(&weights.embedding.data);
    let same = |w: &Matrix<'_>| Dtype::of(&w.data) == dtype;
    let uniform = weights.layers.iter().all(|w| {
        let MlpWeights { gate, up, down_t } = &w.mlp;
        [&w.w_q, &w.w_k, &w.w_v, &w.w_o, gate, up, down_t].into_iter().all(same)
    });
    let rank_max = weights.rank_max();
    if !uniform || !same(&weights.lm_head) || !(1..=128).contains(&weights.layers.len()) {
        return Ok(None);
    }
    device.decode_scratch(shape, weights.embedding.n_cols, intermediate_size, rank_max, dtype.n_bytes())
}
