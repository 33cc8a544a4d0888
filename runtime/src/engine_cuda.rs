//! A token through all layers on a CUDA device.
//!
//! The file's bytes lie on the device as one image (on integrated GPUs the mapped pages themselves), so that every
//! weight's address there is its address in the map, moved. A token is one recorded graph: one kernel where the model's
//! widths allow it, else a run of the single kernels. Two graphs are kept, one for the rows that decoding reads and one
//! for all rows; token and position live on the device. Batches go through token by token.

use format_spec::ModelConfig;
use kernels::cuda::{
    AttentionCall, AttentionScratch, Buffer, CudaError, DecodeCall, DecodeLayer, DecodeScratch, Device,
    DeviceLimits, DeviceMatrix, DeviceRows, DownCall, DownScratch, Dtype, GateUpCall, Graph, HostBuffer,
    Mapped, MatvecCall, QkvCall, View,
};
use kernels::{Activation, AttentionShape, Elements, Matrix, MlpCounts, MlpWeights, Rows, bytes};

use crate::RuntimeError;
use crate::engine::{Batch, BatchLogits, Engine, RowChoice};
use crate::forward::RopeAngles;
use crate::model::{LayerWeights, Model, Weights};
use crate::session::{MlpObserver, SessionOptions, Usage};

/// A CUDA device's engine.
#[derive(Debug)]
pub(crate) struct CudaEngine<'m> {
    // Graphs name the buffers below, so they are dropped first.
    stored: Option<Graph>,
    dense: Option<Graph>,
    state: ModelState<'m>,
    rows: Vec<RowChoice>,
    logits: HostBuffer,
    /// Rows kept and active so far, for each layer, as the device counts them.
    counted: Vec<[u64; 2]>,
}

/// Everything on the device.
#[derive(Debug)]
struct ModelState<'m> {
    device: Device,
    ordinal: usize,
    map: &'m [u8],
    image: Image<'m>,
    weights: Weights<'m>,
    activation: Activation,
    eps: f32,
    shape: AttentionShape,
    keys_and_values: Vec<[Buffer; 2]>,
    cos: Buffer,
    sin: Buffer,
    /// Limits of rows, one buffer for each layer that has its own.
    limits: Vec<Option<Buffer>>,
    token: Buffer,
    ids: Buffer,
    counts: Buffer,
    logits: Buffer,
    way: Way,
}

/// The bytes of the file as the device reads them.
#[derive(Debug)]
enum Image<'m> {
    Copied(Buffer),
    Mapped(Mapped<'m>),
}

/// How a token runs.
#[derive(Debug)]
enum Way {
    OneKernel(Box<DecodeScratch>),
    Kernels(Box<Vectors>),
}

/// What passes between single kernels.
#[derive(Debug)]
struct Vectors {
    x: Buffer,
    q: Buffer,
    attended: Buffer,
    h: Buffer,
    attention: AttentionScratch,
    down: DownScratch,
}

impl<'m> CudaEngine<'m> {
    /// The engine of the first device that has room for `model`.
    pub(crate) fn first_that_fits(model: &'m Model, options: &SessionOptions) -> Option<Self> {
        if !kernels::cuda::is_built_in() {
            return None;
        }
        let devices = kernels::cuda::list_devices().ok()?;
        devices.iter().find_map(|device| Self::new(model, device.ordinal, options).ok())
    }

    /// Opens device `ordinal` and brings `model` to it.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`]: no device, or too little memory on it.
    pub(crate) fn new(
        model: &'m Model,
        ordinal: usize,
        options: &SessionOptions,
    ) -> Result<Self, RuntimeError> {
        let device = Device::open(ordinal)?;
        let config = model.config();
        let weights = model.weights();
        let shape = AttentionShape {
            n_heads: config.num_attention_heads as usize,
            n_kv_heads: config.num_key_value_heads as usize,
            head_dim: config.head_dim as usize,
            n_positions_max: options.n_positions_max,
        };
        check_memory(&device, model, &shape, Dtype::of(&weights.embedding.data))?;
        let image = upload(&device, model.bytes())?;
        let state = ModelState::new(device, ordinal, image, model, weights, shape)?;
        let n_layers = state.weights.layers.len();
        let logits = state.device.alloc_host(config.vocab_size as usize * size_of::<f32>())?;
        let rows = vec![RowChoice::All; n_layers];
        Ok(Self { stored: None, dense: None, state, rows, logits, counted: vec![[0; 2]; n_layers] })
    }

    /// One token at `position`, reading all rows or those that decoding reads; its logits stay on the device.
    fn step(&mut self, token: u32, position: usize, dense: bool) -> Result<(), RuntimeError> {
        let graph = if dense { &mut self.dense } else { &mut self.stored };
        let graph = match graph {
            Some(graph) => graph,
            None => {
                let rows: &[RowChoice] = if dense { &[] } else { &self.rows };
                self.state.upload_limits(rows)?;
                let state = &self.state;
                // SAFETY: the graphs are dropped before the buffers of `state`, by the order of fields; limits of rows
                // are replaced only here, when the one graph that names them is gone.
                graph.insert(unsafe { state.device.capture(|| state.token(rows)) }?)
            }
        };
        self.state.device.set_state(self.state.token.view(), token, position)?;
        Ok(self.state.device.replay(graph)?)
    }

    /// Waits for the device, with the logits of the last token on the host.
    fn fetch_logits(&mut self) -> Result<(), RuntimeError> {
        Ok(self.state.device.read(self.state.logits.view(), self.logits.bytes_mut())?)
    }

    /// Rows kept and active since the last call, for each layer.
    fn take_counts(&mut self) -> Result<Vec<MlpCounts>, RuntimeError> {
        let before = self.counted.clone();
        self.state.device.read(self.state.counts.view(), &mut self.counted)?;
        let since = |(now, before): (&[u64; 2], &[u64; 2])| MlpCounts {
            n_kept: (now[0] - before[0]) as usize,
            n_active: (now[1] - before[1]) as usize,
        };
        Ok(self.counted.iter().zip(&before).map(since).collect())
    }
}

impl<'m> ModelState<'m> {
    fn new(
        device: Device,
        ordinal: usize,
        image: Image<'m>,
        model: &'m Model,
        weights: Weights<'m>,
        shape: AttentionShape,
    ) -> Result<Self, RuntimeError> {
        let config = model.config();
        let (d, f) = (config.hidden_size as usize, config.intermediate_size as usize);
        let dtype = Dtype::of(&weights.embedding.data);
        let n_cached = shape.n_kv_heads * shape.n_positions_max * shape.head_dim * dtype.cache().n_bytes();
        let n_layers = weights.layers.len();
        let keys_and_values = (0..n_layers)
            .map(|_| Ok([device.alloc(n_cached)?, device.alloc(n_cached)?]))
            .collect::<Result<_, CudaError>>()?;
        let (cos, sin) = angles(config, shape.n_positions_max);
        let floats = |n: usize| device.alloc(n * size_of::<f32>());
        let way = match one_kernel(&device, &shape, &weights)? {
            Some(scratch) => Way::OneKernel(Box::new(scratch)),
            None => Way::Kernels(Box::new(Vectors {
                x: floats(d)?,
                q: floats(shape.n_heads * shape.head_dim)?,
                attended: floats(shape.n_heads * shape.head_dim)?,
                h: floats(f)?,
                attention: device.attention_scratch(&shape)?,
                down: device.down_scratch(f, d)?,
            })),
        };
        Ok(Self {
            ordinal,
            map: model.bytes(),
            image,
            activation: model.activation(),
            eps: config.rms_norm_eps,
            shape,
            keys_and_values,
            cos: device.upload(&cos)?,
            sin: device.upload(&sin)?,
            limits: (0..n_layers).map(|_| None).collect(),
            token: device.alloc(8)?,
            ids: device.alloc(shape.n_positions_max * size_of::<u32>())?,
            counts: device.alloc(n_layers * 16)?,
            logits: floats(config.vocab_size as usize)?,
            way,
            weights,
            device,
        })
    }

    /// Brings the limits of the rows that have their own to the device.
    fn upload_limits(&mut self, rows: &[RowChoice]) -> Result<(), CudaError> {
        for (buffer, rows) in self.limits.iter_mut().zip(rows) {
            *buffer = match rows {
                RowChoice::RowLimits(limits) => Some(self.device.upload(limits)?),
                RowChoice::All | RowChoice::Active | RowChoice::Limit(_) => None,
            };
        }
        Ok(())
    }

    /// The image's bytes that lie in the map where `bytes` does.
    fn view(&self, bytes: &[u8]) -> View<'_> {
        let image = match &self.image {
            Image::Copied(buffer) => buffer.view(),
            Image::Mapped(mapped) => mapped.view(),
        };
        image.slice(bytes.as_ptr().addr() - self.map.as_ptr().addr(), bytes.len())
    }

    fn floats(&self, values: &[f32]) -> View<'_> {
        self.view(bytemuck::cast_slice(values))
    }

    fn matrix(&self, w: &Matrix<'_>) -> Result<DeviceMatrix<'_>, CudaError> {
        DeviceMatrix::new(self.view(element_bytes(&w.data)), Dtype::of(&w.data), w.n_rows, w.n_cols)
    }

    /// The rows of `layer` that `rows` selects; all of them where it says nothing.
    fn rows(&self, layer: usize, rows: &[RowChoice]) -> DeviceRows<'_> {
        let predicted = |limits| {
            let signs = self.weights.layers[layer]
                .signs
                .expect("the reader checked that a layer with limits has signs");
            DeviceRows::Predicted { signs: self.view(bytemuck::cast_slice(signs.words)), limits }
        };
        match rows.get(layer) {
            None | Some(RowChoice::All) => DeviceRows::All,
            Some(RowChoice::Active) => DeviceRows::Active,
            Some(RowChoice::Limit(limit)) => predicted(DeviceLimits::Layer(*limit)),
            Some(RowChoice::RowLimits(_)) => {
                let limits = self.limits[layer].as_ref().expect("set_rows uploads the limits of rows");
                predicted(DeviceLimits::PerRow(limits.view()))
            }
        }
    }

    /// Launches everything that the token in `self.token` needs.
    fn token(&self, rows: &[RowChoice]) -> Result<(), CudaError> {
        match &self.way {
            Way::OneKernel(scratch) => self.token_in_one(rows, scratch),
            Way::Kernels(vectors) => self.token_in_kernels(rows, vectors),
        }
    }

    fn token_in_one(&self, rows: &[RowChoice], scratch: &DecodeScratch) -> Result<(), CudaError> {
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
                    rows: self.rows(layer, rows),
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
            counts: self.counts.view(),
            greedy: false,
            scratch,
        })
    }

    fn token_in_kernels(&self, rows: &[RowChoice], vectors: &Vectors) -> Result<(), CudaError> {
        let Self { device, shape, .. } = self;
        let (x, q, h) = (vectors.x.view(), vectors.q.view(), vectors.h.view());
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
            let rows = self.rows(layer, rows);
            device.gate_up(&GateUpCall {
                w_gate: self.matrix(&w.mlp.gate)?,
                w_up: self.matrix(&w.mlp.up)?,
                rows,
                activation: self.activation,
                x,
                norm: self.floats(w.mlp_norm),
                eps: self.eps,
                h,
                counts: self.counts.view().slice(layer * 16, 16),
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

    /// Bytes that `layer` needed of its MLP for a token.
    fn mlp_bytes(&self, layer: usize, rows: &RowChoice, counts: &MlpCounts) -> u64 {
        let w = &self.weights.layers[layer];
        match rows {
            RowChoice::All => bytes::mlp(&w.mlp, &Rows::All, counts),
            RowChoice::Active => bytes::mlp(&w.mlp, &Rows::Active, counts),
            RowChoice::Limit(_) | RowChoice::RowLimits(_) => {
                let signs = w.signs.map_or(0, |signs| size_of_val(signs.words) as u64);
                let limits = match rows {
                    RowChoice::RowLimits(limits) => size_of_val(limits.as_slice()) as u64,
                    _ => 0,
                };
                let kept = bytes::matrix(&Matrix { n_rows: counts.n_kept, ..w.mlp.gate });
                let up = bytes::matrix(&Matrix { n_rows: counts.n_active, ..w.mlp.up });
                let down = bytes::matrix(&Matrix { n_rows: counts.n_active, ..w.mlp.down_t });
                signs + limits + kept + up + down
            }
        }
    }
}

impl Engine for CudaEngine<'_> {
    fn describe(&self) -> String {
        format!("cuda:{} ({})", self.state.ordinal, self.state.device.info().name)
    }

    fn set_rows(&mut self, rows: Vec<RowChoice>) {
        self.stored = None;
        self.rows = rows;
    }

    fn decode(&mut self, token: u32, position: usize, usage: &mut Usage) -> Result<(), RuntimeError> {
        self.step(token, position, false)?;
        self.fetch_logits()?;
        let counts = self.take_counts()?;
        let state = &self.state;
        let cache = Dtype::of(&state.weights.embedding.data).cache().n_bytes();
        let kv_bytes = bytes::kv(&state.shape, cache, position + 1);
        for (layer, (w, counts)) in state.weights.layers.iter().zip(&counts).enumerate() {
            usage.n_bytes +=
                attention_bytes(w) + kv_bytes + state.mlp_bytes(layer, &self.rows[layer], counts);
            usage.layers[layer].n_kept += counts.n_kept as u64;
            usage.layers[layer].n_active += counts.n_active as u64;
        }
        usage.n_bytes += bytes::matrix(&state.weights.lm_head);
        usage.n_tokens += 1;
        Ok(())
    }

    fn forward_batch(
        &mut self,
        batch: Batch<'_>,
        observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError> {
        if observer.is_some() {
            return Err(RuntimeError::NotOnCuda { what: "watching the rows of each layer" });
        }
        let mut wanted = match batch.logits {
            BatchLogits::All(logits) => Some(logits),
            BatchLogits::None | BatchLogits::Last => None,
        };
        for (i, &token) in batch.tokens.iter().enumerate() {
            self.step(token, batch.first_position + i, !batch.masked)?;
            if let Some(logits) = &mut wanted {
                self.fetch_logits()?;
                let vocab_size = self.state.weights.lm_head.n_rows;
                logits[i * vocab_size..][..vocab_size].copy_from_slice(self.logits());
            }
        }
        if !batch.tokens.is_empty() {
            self.fetch_logits()?;
            // Counts are of decoded tokens.
            self.take_counts()?;
        }
        Ok(())
    }

    fn logits(&self) -> &[f32] {
        bytemuck::cast_slice(self.logits.bytes())
    }

    fn measure_read_gb_per_s(&self) -> f64 {
        self.state.device.measure_read_gb_per_s().unwrap_or(f64::NAN)
    }
}

/// The scratch of the one kernel where it takes the model: every matrix of one type, widths that fit.
fn one_kernel(
    device: &Device,
    shape: &AttentionShape,
    weights: &Weights<'_>,
) -> Result<Option<DecodeScratch>, CudaError> {
    let dtype = Dtype::of(&weights.embedding.data);
    let same = |w: &Matrix<'_>| Dtype::of(&w.data) == dtype;
    let uniform = weights.layers.iter().all(|w| {
        let MlpWeights { gate, up, down_t } = &w.mlp;
        [&w.w_q, &w.w_k, &w.w_v, &w.w_o, gate, up, down_t].into_iter().all(same)
    });
    let f = weights.layers.first().map_or(0, |w| w.mlp.gate.n_rows);
    if !uniform || !same(&weights.lm_head) || !(1..=128).contains(&weights.layers.len()) {
        return Ok(None);
    }
    device.decode_scratch(shape, weights.embedding.n_cols, f, dtype.n_bytes())
}

/// That weights and cache fit the device's free memory, before anything is copied.
fn check_memory(
    device: &Device,
    model: &Model,
    shape: &AttentionShape,
    dtype: Dtype,
) -> Result<(), CudaError> {
    let n_layers = model.config().num_hidden_layers as usize;
    let cached =
        2 * n_layers * shape.n_kv_heads * shape.n_positions_max * shape.head_dim * dtype.cache().n_bytes();
    let image = if maps_pages(device) { 0 } else { model.bytes().len() };
    let (free_bytes, total_bytes) = device.memory_bytes()?;
    let wanted_bytes = image + cached;
    if wanted_bytes > free_bytes {
        return Err(CudaError::OutOfMemory { wanted_bytes, free_bytes, total_bytes });
    }
    Ok(())
}

/// True where the device reads the file's pages in place: it shares the host's memory, or `SINF_CUDA_MAP=1` asks for
/// it, to test that path on a device that does not.
fn maps_pages(device: &Device) -> bool {
    device.info().integrated || std::env::var("SINF_CUDA_MAP").is_ok_and(|value| value == "1")
}

/// The bytes of the file on the device.
fn upload<'m>(device: &Device, bytes: &'m [u8]) -> Result<Image<'m>, CudaError> {
    if maps_pages(device) {
        return Ok(Image::Mapped(device.map_host(bytes)?));
    }
    Ok(Image::Copied(device.upload_staged(bytes)?))
}

/// `cos` and `sin` of all positions, `(n_positions, head_dim / 2)` each.
fn angles(config: &ModelConfig, n_positions: usize) -> (Vec<f32>, Vec<f32>) {
    let rope = RopeAngles::new(config);
    let half = config.head_dim as usize / 2;
    let (mut cos, mut sin) = (vec![0.0; n_positions * half], vec![0.0; n_positions * half]);
    for (position, (cos, sin)) in cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half)).enumerate() {
        rope.fill(position, cos, sin);
    }
    (cos, sin)
}

/// Bytes of the projections around attention.
fn attention_bytes(w: &LayerWeights<'_>) -> u64 {
    [&w.w_q, &w.w_k, &w.w_v, &w.w_o].map(bytes::matrix).iter().sum()
}

fn element_bytes<'a>(elements: &Elements<'a>) -> &'a [u8] {
    match elements {
        Elements::F32(v) => bytemuck::cast_slice(v),
        Elements::F16(v) => bytemuck::cast_slice(v),
        Elements::Bf16(v) => bytemuck::cast_slice(v),
    }
}
