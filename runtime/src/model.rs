//! A mapped, validated file as typed views of its weights.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::OnceLock;

use format_spec::{DType, FormatError, Layout, ModelConfig, PredictorKind, Section, SectionKind};
use half::{bf16, f16};
use kernels::{BitPlanes, Cpu, Elements, LowRank, Matrix, MlpWeights, Residual, SignMatrix};
use memmap2::Mmap;

use crate::RuntimeError;
use crate::map::{map, read_at};

#[cfg(target_endian = "big")]
compile_error!("the weights of a .sinf file are little-endian and used in place");

/// Rows of W_down that a thread takes at a time for their norms.
const NORM_ROWS: usize = 256;

/// A mapped, validated file.
#[derive(Debug)]
pub struct Model {
    map: Mmap,
    file: File,
    layout: Layout,
    path: String,
    /// Of all layers, once somebody asked for them.
    down_squared_norms: OnceLock<Vec<Vec<f64>>>,
}

/// The weights of one layer, in the words of FORMAT.md.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerWeights<'m> {
    pub(crate) attn_norm: &'m [f32],
    pub(crate) w_q: Matrix<'m>,
    pub(crate) w_k: Matrix<'m>,
    pub(crate) w_v: Matrix<'m>,
    pub(crate) w_o: Matrix<'m>,
    pub(crate) mlp_norm: &'m [f32],
    pub(crate) mlp: MlpWeights<'m>,
    /// What prediction reads, in files made for it.
    pub(crate) planes: Option<BitPlanes<'m>>,
    /// The factors of a predictor of low rank, in place of planes.
    pub(crate) low_rank: Option<LowRank<'m>>,
}

impl<'m> LayerWeights<'m> {
    /// Sign words of W_gate, in files made for prediction.
    pub(crate) fn signs(&self) -> Option<SignMatrix<'m>> {
        self.planes.map(|planes| planes.signs)
    }
}

/// All weights of a model as views of the map.
#[derive(Clone, Debug)]
pub(crate) struct Weights<'m> {
    pub(crate) embedding: Matrix<'m>,
    pub(crate) layers: Vec<LayerWeights<'m>>,
    pub(crate) final_norm: &'m [f32],
    pub(crate) lm_head: Matrix<'m>,
}

impl<'m> Weights<'m> {
    /// Has layers predict with `planes` and `factors`, one of each for each layer, in place of what they have.
    pub(crate) fn set_predictors(
        &mut self,
        planes: &[Option<BitPlanes<'m>>],
        factors: &[Option<LowRank<'m>>],
    ) {
        for ((layer, &planes), &factors) in self.layers.iter_mut().zip(planes).zip(factors) {
            (layer.planes, layer.low_rank) = (planes, factors);
        }
    }

    /// The largest rank of a predictor; 0 where none is of low rank.
    pub(crate) fn rank_max(&self) -> usize {
        let ranks = self.layers.iter().filter_map(|layer| layer.low_rank).map(|factors| factors.fc1.n_rows);
        ranks.max().unwrap_or(0)
    }
}

impl Model {
    /// Maps and validates `path`: header, section table and structure; checksums are `layout().verify()`'s.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] when it cannot be mapped, [`RuntimeError::Format`] for the first broken rule.
    pub fn open(path: &Path) -> Result<Self, RuntimeError> {
        let (file, map) = map(path)?;
        let path = path.display().to_string();
        let layout = match Layout::parse(map.as_deref().unwrap_or(&[])) {
            Ok(layout) => layout,
            Err(error) => return Err(RuntimeError::format(&path, error)),
        };
        let map = map.expect("an empty file is not valid");
        Ok(Self { map, file, layout, path, down_squared_norms: OnceLock::new() })
    }

    /// Dimensions and constants.
    pub fn config(&self) -> &ModelConfig {
        self.layout.config()
    }

    /// The validated structure.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The mapped bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Fills `buffer` with the file's bytes from `offset` on, read instead of mapped: those of a file that was cut since
    /// are an error.
    ///
    /// # Errors
    /// Those of the system.
    pub(crate) fn read_at(&self, offset: usize, buffer: &mut [u8]) -> io::Result<()> {
        read_at(&self.file, self.map.len(), offset as u64, buffer)
    }

    /// The file's path, for messages.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// `error` as one of this file, for rules that only a full read can check.
    pub fn error(&self, error: FormatError) -> RuntimeError {
        RuntimeError::format(&self.path, error)
    }

    /// The MLP's activation, as the kernels name it.
    pub fn activation(&self) -> kernels::Activation {
        match self.config().activation {
            format_spec::Activation::Relu => kernels::Activation::Relu,
            format_spec::Activation::FatRelu { threshold } => kernels::Activation::FatRelu(threshold),
            format_spec::Activation::Silu => kernels::Activation::Silu,
        }
    }

    /// Sign words of W_gate of `layer`, `(intermediate_size, ceil(hidden_size / 32))`.
    fn gate_signs(&self, layer: usize) -> Option<SignMatrix<'_>> {
        self.layout.find(SectionKind::GateSigns, Some(layer as u32)).map(|section| self.sign_matrix(section))
    }

    /// The words of `section`, signs of a matrix of the shape of W_gate.
    fn sign_matrix(&self, section: &Section) -> SignMatrix<'_> {
        let config = self.config();
        SignMatrix {
            words: bytemuck::cast_slice(section.bytes(&self.map)),
            n_rows: config.intermediate_size as usize,
            n_words: config.hidden_size.div_ceil(32) as usize,
        }
    }

    /// Gate projection of `layer`, `(intermediate_size, hidden_size)`.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn w_gate(&self, layer: usize) -> Matrix<'_> {
        self.matrix(SectionKind::WGate, Some(layer))
    }

    /// The bits of W_gate of `layer` that scores are made of: its signs and what the file holds of planes below them; a
    /// file made without prediction has none.
    pub fn gate_planes(&self, layer: usize) -> Option<BitPlanes<'_>> {
        let low = self.layout.find(SectionKind::GatePlanes, Some(layer as u32));
        let low = low.map_or(&[][..], |section| bytemuck::cast_slice(section.bytes(&self.map)));
        Some(BitPlanes { signs: self.gate_signs(layer)?, low })
    }

    /// The factors that `layer` predicts with, where its predictor is of low rank.
    pub fn low_rank(&self, layer: usize) -> Option<LowRank<'_>> {
        let kind = self.layout.predictors().get(layer)?.kind;
        kind.has_factors().then(|| LowRank {
            fc1: self.matrix(SectionKind::GateFc1, Some(layer)),
            fc2: self.matrix(SectionKind::GateFc2, Some(layer)),
            relu: kind == PredictorKind::LowRankRelu,
            residual: kind.has_residual().then(|| Residual {
                signs: self.sign_matrix(self.section(SectionKind::ResidualSigns, Some(layer))),
                scales: self.floats(SectionKind::ResidualScales, Some(layer)),
            }),
        })
    }

    /// Offsets on the thresholds of the rows of `layer`, `(intermediate_size,)`, where the file has them.
    pub fn gate_offsets(&self, layer: usize) -> Option<&[f32]> {
        let section = self.layout.find(SectionKind::GateOffsets, Some(layer as u32))?;
        Some(bytemuck::cast_slice(section.bytes(&self.map)))
    }

    /// `|W_down[:, i]|^2` for every neuron i of every layer, `(intermediate_size,)` each: what a missed row costs is `h_i^2`
    /// times it. The first call reads every W_down, on the threads of `cpu`.
    pub fn down_squared_norms(&self, cpu: &Cpu) -> &[Vec<f64>] {
        self.down_squared_norms.get_or_init(|| {
            let config = self.config();
            let mut norms =
                vec![vec![0.0; config.intermediate_size as usize]; config.num_hidden_layers as usize];
            let rows = norms.iter_mut().enumerate().flat_map(|(layer, norms)| {
                let rows = norms.chunks_mut(NORM_ROWS).enumerate();
                rows.map(move |(idx, norms)| (layer, idx * NORM_ROWS, norms))
            });
            cpu.for_each(rows, |(layer, row0, norms)| {
                for (idx, norm) in norms.iter_mut().enumerate() {
                    *norm = self.down_squared_norm(layer, row0 + idx);
                }
            });
            norms
        })
    }

    /// `|W_down[:, row]|^2` of `layer`.
    ///
    /// # Panics
    /// If the model has no such layer or row.
    pub fn down_squared_norm(&self, layer: usize, row: usize) -> f64 {
        fn norm<T: Copy>(row: &[T], to_f32: impl Fn(T) -> f32) -> f64 {
            row.iter().map(|&v| f64::from(to_f32(v)) * f64::from(to_f32(v))).sum()
        }
        let w = self.matrix(SectionKind::WDownT, Some(layer));
        let row = row * w.n_cols..(row + 1) * w.n_cols;
        match w.data {
            Elements::F32(v) => norm(&v[row], |v| v),
            Elements::F16(v) => norm(&v[row], f16::to_f32),
            Elements::Bf16(v) => norm(&v[row], bf16::to_f32),
        }
    }

    /// Views of all weights.
    pub(crate) fn weights(&self) -> Weights<'_> {
        let embedding = self.matrix(SectionKind::Embedding, None);
        Weights {
            embedding,
            layers: (0..self.config().num_hidden_layers as usize).map(|layer| self.layer(layer)).collect(),
            final_norm: self.floats(SectionKind::FinalNorm, None),
            lm_head: if self.config().tie_word_embeddings {
                embedding
            } else {
                self.matrix(SectionKind::LmHead, None)
            },
        }
    }

    fn layer(&self, layer: usize) -> LayerWeights<'_> {
        let matrix = |kind| self.matrix(kind, Some(layer));
        LayerWeights {
            attn_norm: self.floats(SectionKind::AttnNorm, Some(layer)),
            w_q: matrix(SectionKind::WQ),
            w_k: matrix(SectionKind::WK),
            w_v: matrix(SectionKind::WV),
            w_o: matrix(SectionKind::WO),
            mlp_norm: self.floats(SectionKind::MlpNorm, Some(layer)),
            mlp: MlpWeights {
                gate: matrix(SectionKind::WGate),
                up: matrix(SectionKind::WUp),
                down_t: matrix(SectionKind::WDownT),
            },
            planes: self.gate_planes(layer),
            low_rank: self.low_rank(layer),
        }
    }

    fn matrix(&self, kind: SectionKind, layer: Option<usize>) -> Matrix<'_> {
        let section = self.section(kind, layer);
        let bytes = section.bytes(&self.map);
        let data = match section.dtype {
            DType::F32 => Elements::F32(bytemuck::cast_slice(bytes)),
            DType::F16 => Elements::F16(bytemuck::cast_slice(bytes)),
            DType::Bf16 => Elements::Bf16(bytemuck::cast_slice(bytes)),
            other => unreachable!("the reader accepts no weights of {other:?}"),
        };
        let dims = section.shape.dims();
        Matrix::new(data, dims[0] as usize, dims[1] as usize).expect("the reader checked the length")
    }

    fn floats(&self, kind: SectionKind, layer: Option<usize>) -> &[f32] {
        bytemuck::cast_slice(self.section(kind, layer).bytes(&self.map))
    }

    pub(crate) fn words(&self, kind: SectionKind, layer: Option<usize>) -> &[u32] {
        bytemuck::cast_slice(self.section(kind, layer).bytes(&self.map))
    }

    fn section(&self, kind: SectionKind, layer: Option<usize>) -> &Section {
        let section = self.layout.find(kind, layer.map(|layer| layer as u32));
        section.unwrap_or_else(|| panic!("the reader checked that {kind:?} of layer {layer:?} is there"))
    }
}
