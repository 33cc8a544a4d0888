//! The layers of a model on a CUDA device.
//!
//! The file's bytes lie on the device as one image (on integrated GPUs the mapped pages themselves), so that every
//! weight's address there is its address in the map, moved. [`decode`] runs one token, recorded as a graph, for which
//! token and position live on the device; [`prompt`] runs batches. Both fill the same cache. [`predictors`] tells kernels
//! what layers predict with, [`audit`] looks at what a token left out, [`steps`] tells where its time goes.

mod audit;
mod decode;
mod predictors;
mod prompt;
mod steps;

use std::thread;

use bytemuck::NoUninit;
use format_spec::ModelConfig;
use kernels::cuda::{
    Buffer, Chosen, CudaError, Device, DeviceMatrix, Dtype, Gemm, Graph, HostBuffer, Mirror, Placement,
    UploadError, View,
};
use kernels::{Activation, AttentionShape, BitPlanes, Elements, LowRank, Matrix, MlpCounts};

use self::audit::Audits;
use self::decode::{DeviceSampler, Way};
use self::predictors::OwnParts;
use self::prompt::Prompt;
use crate::RuntimeError;
use crate::audit::Audit;
use crate::engine::{Batch, BatchLogits, Engine, RowChoice};
use crate::forward::RopeAngles;
use crate::model::{Model, Weights};
use crate::sampler::{SampleError, SamplerOptions};
use crate::session::{MlpObserver, SessionOptions, Usage};
use crate::steps::Step;

/// Rows kept and active of a layer, two u64.
const COUNT_BYTES: usize = 16;

/// A CUDA device's engine.
#[derive(Debug)]
pub(crate) struct CudaEngine<'m> {
    /// A token, once one was decoded with `rows`. It names the buffers below, so it is dropped first.
    graph: Option<Graph>,
    /// The same with the draw of the next token.
    drawing: Option<Graph>,
    /// What audits need, once there was one.
    audits: Option<Audits>,
    sampler: Option<DeviceSampler>,
    state: ModelState<'m>,
    prompt: Prompt,
    rows: Vec<RowChoice>,
    logits: HostBuffer,
    /// The device's report as it was read last: rows kept and active so far, for each layer; then the token drawn.
    report: HostBuffer,
    /// Rows kept and active before that token.
    counted: Vec<[u64; 2]>,
    /// Token and position that lie on the device, where a draw has left them.
    next: Option<(u32, usize)>,
}

/// Everything on the device.
#[derive(Debug)]
struct ModelState<'m> {
    device: Device,
    ordinal: usize,
    image: Mirror<'m>,
    own_parts: OwnParts<'m>,
    weights: Weights<'m>,
    activation: Activation,
    eps: f32,
    shape: AttentionShape,
    keys_and_values: Vec<[Buffer; 2]>,
    cos: Buffer,
    sin: Buffer,
    /// Limits or thresholds of rows, one buffer for each layer that has its own; none before a pass needed them.
    limits: Option<Vec<Option<Buffer>>>,
    /// Layers whose rows have other limits or thresholds now than in `limits`.
    moved: Vec<bool>,
    token: Buffer,
    ids: Buffer,
    /// Counts of layers, then the token drawn.
    report: Buffer,
    logits: Buffer,
    way: Way,
}

impl<'m> CudaEngine<'m> {
    /// The engine of the first device that has room for `model`; `passed_over` gets those before it, and why.
    pub(crate) fn first_that_fits(
        model: &'m Model,
        options: &SessionOptions,
        progress: &mut dyn FnMut(usize, usize),
        passed_over: &mut Vec<String>,
    ) -> Option<Self> {
        if !kernels::cuda::is_built_in() {
            return None;
        }
        let devices = match kernels::cuda::list_devices() {
            Ok(devices) => devices,
            // A machine without a GPU is nothing to tell of.
            Err(CudaError::NoDriver | CudaError::NoDevice) => return None,
            Err(error) => {
                passed_over.push(format!("cuda: {error}"));
                return None;
            }
        };
        devices.iter().find_map(|device| {
            Self::new(model, device.ordinal, options, progress)
                .map_err(|error| passed_over.push(format!("cuda:{}: {error}", device.ordinal)))
                .ok()
        })
    }

    /// Opens device `ordinal` and brings `model` to it.
    ///
    /// # Errors
    /// [`RuntimeError::Cuda`]: no device, or too little memory on it. [`RuntimeError::Upload`] when the file
    /// cannot be read.
    pub(crate) fn new(
        model: &'m Model,
        ordinal: usize,
        options: &SessionOptions,
        progress: &mut dyn FnMut(usize, usize),
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
        check_memory(&device, model, &shape, options.n_batch_max)?;
        let image = upload(&device, model, progress)?;
        let state = ModelState::new(device, ordinal, image, model, weights, shape)?;
        let n_layers = state.weights.layers.len();
        Ok(Self {
            graph: None,
            drawing: None,
            audits: None,
            sampler: None,
            next: None,
            prompt: Prompt::new(&state, config, options)?,
            rows: vec![RowChoice::All; n_layers],
            logits: state.device.alloc_host(config.vocab_size as usize * size_of::<f32>())?,
            report: state.device.alloc_host((n_layers + 1) * COUNT_BYTES)?,
            counted: vec![[0; 2]; n_layers],
            state,
        })
    }

    /// One token at `position`; its logits stay on the device.
    fn step(&mut self, token: u32, position: usize) -> Result<(), RuntimeError> {
        self.place(token, position)?;
        self.run_placed()
    }

    /// Has the next token on the device be this one.
    fn place(&mut self, token: u32, position: usize) -> Result<(), RuntimeError> {
        self.next = None;
        Ok(self.state.device.set_state(self.state.token.view(), token, position)?)
    }

    /// The token that was placed.
    fn run_placed(&mut self) -> Result<(), RuntimeError> {
        self.state.bring_limits(&self.rows)?;
        let graph = match &mut self.graph {
            Some(graph) => graph,
            None => {
                let state = &self.state;
                // SAFETY: the graph is dropped before the buffers of `state`, by the order of fields, and before those
                // that go earlier, by `set_rows` and `set_predictors`.
                self.graph.insert(unsafe { state.device.capture(|| state.token(&self.rows, None, None)) }?)
            }
        };
        Ok(self.state.device.replay(graph)?)
    }

    /// One token at `position` and the draw of the next one, which stays on the device for the next call.
    fn step_and_draw(
        &mut self,
        token: u32,
        position: usize,
        sampler: &DeviceSampler,
    ) -> Result<(), RuntimeError> {
        self.state.bring_limits(&self.rows)?;
        let graph = match &mut self.drawing {
            Some(graph) => graph,
            None => {
                let state = &self.state;
                // SAFETY: as in `step`; the sampler's buffer outlives the graph, by `set_sampler` and the order of fields.
                let graph = unsafe { state.device.capture(|| state.token_and_draw(&self.rows, sampler)) }?;
                self.drawing.insert(graph)
            }
        };
        if self.next.take() != Some((token, position)) {
            self.state.device.set_state(self.state.token.view(), token, position)?;
        }
        Ok(self.state.device.replay(graph)?)
    }

    /// Waits for the device, with the logits of the last token on the host.
    fn fetch_logits(&mut self) -> Result<(), RuntimeError> {
        Ok(self.state.device.read(self.state.logits.view(), self.logits.bytes_mut())?)
    }

    /// Waits for the device; rows kept and active since the last call, for each layer.
    fn take_counts(&mut self) -> Result<Vec<MlpCounts>, RuntimeError> {
        self.state.device.read(self.state.report.view(), self.report.bytes_mut())?;
        let now: &[[u64; 2]] = bytemuck::cast_slice(self.report.bytes());
        let since = |(before, now): (&mut [u64; 2], &[u64; 2])| {
            let before = std::mem::replace(before, *now);
            MlpCounts { n_kept: (now[0] - before[0]) as usize, n_active: (now[1] - before[1]) as usize }
        };
        Ok(self.counted.iter_mut().zip(now).map(since).collect())
    }

    /// What the draw before the last [`Self::take_counts`] came to.
    fn chosen(&self) -> Chosen {
        let report: &[[u64; 2]] = bytemuck::cast_slice(self.report.bytes());
        // The low half of the entry behind the layers.
        Chosen::of(report[self.counted.len()][0] as u32)
    }

    /// Adds what a token at `position` has read, once it has run, and returns the rows that it counted.
    fn count(&mut self, position: usize, usage: &mut Usage) -> Result<Vec<MlpCounts>, RuntimeError> {
        let counts = self.take_counts()?;
        usage.n_bytes += self.step_bytes(position, &counts).iter().sum::<u64>();
        for (layer, counts) in usage.layers.iter_mut().zip(&counts) {
            layer.n_kept += counts.n_kept as u64;
            layer.n_active += counts.n_active as u64;
        }
        usage.n_tokens += 1;
        Ok(counts)
    }

    /// Drops every graph that names the rows.
    fn drop_graphs(&mut self) {
        self.graph = None;
        self.drawing = None;
        if let Some(audits) = &mut self.audits {
            audits.drop_graph();
        }
    }

    /// The logit for which the device refused to draw.
    fn bad_logit(&mut self) -> Result<SampleError, RuntimeError> {
        self.fetch_logits()?;
        let is_bad = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
        let id = self.logits().iter().position(is_bad).unwrap_or(0);
        Ok(SampleError::Logit { id, logit: self.logits()[id] })
    }
}

impl<'m> ModelState<'m> {
    fn new(
        device: Device,
        ordinal: usize,
        image: Mirror<'m>,
        model: &Model,
        weights: Weights<'m>,
        shape: AttentionShape,
    ) -> Result<Self, RuntimeError> {
        let config = model.config();
        let dtype = Dtype::of(&weights.embedding.data);
        let n_cached = shape.n_kv_heads * shape.n_positions_max * shape.head_dim * dtype.cache().n_bytes();
        let n_layers = weights.layers.len();
        let keys_and_values = (0..n_layers)
            .map(|_| Ok([device.alloc(n_cached)?, device.alloc(n_cached)?]))
            .collect::<Result<_, CudaError>>()?;
        let (cos, sin) = angles(config, shape.n_positions_max);
        let way = Way::new(&device, &shape, &weights)?;
        Ok(Self {
            ordinal,
            image,
            own_parts: OwnParts::default(),
            activation: model.activation(),
            eps: config.rms_norm_eps,
            shape,
            keys_and_values,
            cos: device.upload(&cos)?,
            sin: device.upload(&sin)?,
            limits: None,
            moved: vec![false; n_layers],
            token: device.alloc(8)?,
            ids: device.alloc(shape.n_positions_max * size_of::<u32>())?,
            report: device.alloc((n_layers + 1) * COUNT_BYTES)?,
            logits: device.alloc(config.vocab_size as usize * size_of::<f32>())?,
            way,
            weights,
            device,
        })
    }

    /// Brings the limits and thresholds of the rows that have their own to the device, unless they are there. Those that
    /// have moved keep their place, which graphs name.
    fn bring_limits(&mut self, rows: &[RowChoice]) -> Result<(), CudaError> {
        if let Some(limits) = &self.limits {
            for (layer, moved) in self.moved.iter_mut().enumerate().filter(|(_, moved)| **moved) {
                if let (Some(buffer), Some(bytes)) = (&limits[layer], limit_bytes(&rows[layer])) {
                    self.device.write(buffer.view(), bytes)?;
                }
                *moved = false;
            }
        } else {
            let of_layer = |rows| limit_bytes(rows).map(|bytes| self.device.upload(bytes)).transpose();
            self.limits = Some(rows.iter().map(of_layer).collect::<Result<_, _>>()?);
            self.moved.fill(false);
        }
        Ok(())
    }

    /// Rows kept and active so far, for each layer.
    fn counts(&self) -> View<'_> {
        self.report.view().slice(0, self.weights.layers.len() * COUNT_BYTES)
    }

    /// The token drawn last, one u32.
    fn chosen(&self) -> View<'_> {
        self.report.view().slice(self.weights.layers.len() * COUNT_BYTES, size_of::<u32>())
    }

    /// `weights` of the model or of a predictor, where they lie on the device.
    fn view<T: NoUninit>(&self, weights: &[T]) -> View<'_> {
        let bytes = bytemuck::cast_slice(weights);
        self.own_parts.find(bytes).unwrap_or_else(|| self.image.view(bytes))
    }

    fn floats(&self, values: &[f32]) -> View<'_> {
        self.view(values)
    }

    fn matrix(&self, w: &Matrix<'_>) -> Result<DeviceMatrix<'_>, CudaError> {
        DeviceMatrix::new(self.view(element_bytes(&w.data)), Dtype::of(&w.data), w.n_rows, w.n_cols)
    }
}

impl<'m> Engine<'m> for CudaEngine<'m> {
    fn n_batch(&self) -> usize {
        self.prompt.n_batch_max()
    }

    fn describe(&self) -> String {
        format!("cuda:{} ({})", self.state.ordinal, self.state.device.info().name)
    }

    fn set_predictors(
        &mut self,
        planes: &[Option<BitPlanes<'m>>],
        factors: &[Option<LowRank<'m>>],
    ) -> Result<(), RuntimeError> {
        // So that nothing names buffers that go, whether or not there is room for others.
        self.set_rows(vec![RowChoice::Active; self.rows.len()]);
        self.state.set_predictors(planes, factors)?;
        Ok(self.prompt.make_room(&self.state.device, self.state.weights.rank_max())?)
    }

    fn set_rows(&mut self, rows: Vec<RowChoice>) {
        self.drop_graphs();
        self.state.limits = None;
        self.rows = rows;
    }

    fn layer_rows_mut(&mut self, layer: usize) -> &mut RowChoice {
        // Limits of rows lie in a buffer, to be written again; that of a layer is an argument of kernels.
        if limit_bytes(&self.rows[layer]).is_some() {
            self.state.moved[layer] = true;
        } else {
            self.drop_graphs();
        }
        &mut self.rows[layer]
    }

    fn decode(&mut self, token: u32, position: usize, usage: &mut Usage) -> Result<(), RuntimeError> {
        self.step(token, position)?;
        self.fetch_logits()?;
        self.count(position, usage)?;
        Ok(())
    }

    fn decode_audited(
        &mut self,
        token: u32,
        position: usize,
        usage: &mut Usage,
        audit: &mut Audit,
        number: usize,
    ) -> Result<(), RuntimeError> {
        self.step_audited(token, position, audit, number)?;
        self.fetch_logits()?;
        let counts = self.count(position, usage)?;
        self.record_audit(&counts, usage, audit, number)
    }

    fn set_sampler(&mut self, options: &SamplerOptions, excluded: &[u32]) -> Result<(), RuntimeError> {
        self.drawing = None;
        self.sampler = None;
        if options.repeat_penalty == 1.0 {
            let excluded = match excluded {
                [] => self.state.device.alloc(0)?,
                ids => self.state.device.upload(ids)?,
            };
            self.sampler = Some(DeviceSampler { draw: options.draw(), seed: options.seed, excluded });
        }
        Ok(())
    }

    fn decode_and_choose(
        &mut self,
        token: u32,
        position: usize,
        usage: &mut Usage,
    ) -> Result<Option<Result<u32, SampleError>>, RuntimeError> {
        let Some(sampler) = self.sampler.take() else { return Ok(None) };
        let stepped = self.step_and_draw(token, position, &sampler);
        self.sampler = Some(sampler);
        stepped?;
        self.count(position, usage)?;
        Ok(Some(match self.chosen() {
            Chosen::Token(id) => {
                self.next = Some((id, position + 1));
                Ok(id)
            }
            Chosen::Empty => Err(SampleError::Empty),
            Chosen::BadLogit => Err(self.bad_logit()?),
        }))
    }

    fn time_steps(
        &mut self,
        tokens: &[u32],
        first_position: usize,
    ) -> Result<Option<Vec<Step>>, RuntimeError> {
        self.time_kernel_steps(tokens, first_position).map(Some)
    }

    fn forward_batch(
        &mut self,
        batch: Batch<'_>,
        observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError> {
        if batch.tokens.is_empty() {
            return Ok(());
        }
        self.next = None;
        if batch.masked {
            self.state.bring_limits(&self.rows)?;
        }
        let wants_last = matches!(batch.logits, BatchLogits::Last);
        self.prompt.run(&self.state, &self.rows, batch, observer)?;
        if wants_last { self.fetch_logits() } else { Ok(()) }
    }

    fn logits(&self) -> &[f32] {
        bytemuck::cast_slice(self.logits.bytes())
    }

    fn measure_read_gb_per_s(&self) -> f64 {
        self.state.device.measure_read_gb_per_s().unwrap_or(f64::NAN)
    }
}

/// That weights, cache and the buffers of prompts fit the device's free memory, before anything is copied.
fn check_memory(
    device: &Device,
    model: &Model,
    shape: &AttentionShape,
    n_batch_max: usize,
) -> Result<(), CudaError> {
    let (config, weights) = (model.config(), model.weights());
    let cache = Dtype::of(&weights.embedding.data).cache().n_bytes();
    let cached = 2
        * config.num_hidden_layers as usize
        * shape.n_kv_heads
        * shape.n_positions_max
        * shape.head_dim
        * cache;
    let is_copied = !device.info().integrated && placement() != Some(Placement::InPlace);
    let image = if is_copied { model.bytes().len() } else { 0 };
    let sizes = prompt::Sizes::new(config, shape, weights.rank_max(), n_batch_max);
    let batches = sizes.n_bytes() + Gemm::WORKSPACE_BYTES;
    check_room(image + cached + batches, device.memory_bytes()?)
}

/// That `wanted_bytes` fit memory of which so many bytes are free, of so many.
fn check_room(wanted_bytes: usize, (free_bytes, total_bytes): (usize, usize)) -> Result<(), CudaError> {
    if wanted_bytes > free_bytes {
        return Err(CudaError::OutOfMemory { wanted_bytes, free_bytes, total_bytes });
    }
    Ok(())
}

/// What `SINF_CUDA_MAP=1` asks for: the file's pages in place, to test that on a device with memory of its own.
fn placement() -> Option<Placement> {
    std::env::var("SINF_CUDA_MAP").is_ok_and(|value| value == "1").then_some(Placement::InPlace)
}

/// The bytes of the file on the device; the library for products is opened meanwhile.
fn upload<'m>(
    device: &Device,
    model: &'m Model,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Mirror<'m>, RuntimeError> {
    let read = |offset: usize, buffer: &mut [u8]| model.read_at(offset, buffer);
    thread::scope(|scope| {
        scope.spawn(Gemm::preload);
        Mirror::new(device, model.bytes(), &read, placement(), &mut |n_done| {
            progress(n_done, model.bytes().len())
        })
    })
    .map_err(|error| match error {
        UploadError::Cuda(error) => error.into(),
        source => RuntimeError::Upload { path: model.path().to_owned(), source },
    })
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

/// The limits or thresholds of the rows that have their own.
fn limit_bytes(rows: &RowChoice) -> Option<&[u8]> {
    match rows {
        RowChoice::RowLimits(limits) => Some(bytemuck::cast_slice(limits)),
        RowChoice::RowThresholds(thresholds) => Some(bytemuck::cast_slice(thresholds)),
        RowChoice::All | RowChoice::Active | RowChoice::Limit(_) | RowChoice::Threshold(_) => None,
    }
}

fn element_bytes<'a>(elements: &Elements<'a>) -> &'a [u8] {
    match elements {
        Elements::F32(v) => bytemuck::cast_slice(v),
        Elements::F16(v) => bytemuck::cast_slice(v),
        Elements::Bf16(v) => bytemuck::cast_slice(v),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_larger_than_free_memory_is_refused_with_the_sizes() {
        const GIB: usize = 1 << 30;
        assert!(check_room(3 * GIB, (3 * GIB, 8 * GIB)).is_ok());
        let error = check_room(13 * GIB, (3 * GIB, 8 * GIB)).expect_err("no room");
        let text = error.to_string();
        for size in ["13.00 GiB", "3.00 GiB", "8.00 GiB"] {
            assert!(text.contains(size), "{text}");
        }
        assert!(error.hint().is_some_and(|hint| hint.contains("--ctx-size")));
    }
}
