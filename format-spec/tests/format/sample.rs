//! Small made-up models: every section filled with values of its own, so that a mix-up shows.

use std::path::Path;

use format_spec::metadata::byte_of;
use format_spec::signs::{n_words, tail_mask};
use format_spec::{
    Activation, AddedToken, BudgetPoint, CalibrationCurve, CalibrationText, CurvePoint, DType, DummyPrefix,
    Layout, ModelConfig, Piece, PieceKind, PredictorKind, PredictorRecord, Provenance, Rope, RopeScaling,
    SectionKind, SectionSpec, Shape, SourceFile, Tail, Tokenizer, Writer,
};
use half::{bf16, f16};

/// Everything that a file is made of.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) config: ModelConfig,
    pub(crate) alignment_bytes: u32,
    pub(crate) weights: Vec<(SectionSpec, Vec<u8>)>,
    pub(crate) predictors: Vec<PredictorRecord>,
    pub(crate) curves: Option<Vec<CalibrationCurve>>,
    pub(crate) budget: Option<Vec<BudgetPoint>>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) provenance: Option<Provenance>,
}

/// A different value in every field. hidden_size is no multiple of 32, so that sign words have a tail.
pub(crate) fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 36,
        intermediate_size: 10,
        num_hidden_layers: 2,
        num_attention_heads: 6,
        num_key_value_heads: 3,
        head_dim: 4,
        vocab_size: 300,
        max_position_embeddings: 77,
        rms_norm_eps: 1e-6,
        activation: Activation::FatRelu { threshold: 0.01 },
        rope: Rope { theta: 10_000.5, scaling: RopeScaling::Linear { factor: 2.5 } },
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2, 7, 299],
    }
}

/// The smallest model with every kind of section, for tests that go through a file byte by byte.
pub(crate) fn tiny_config() -> ModelConfig {
    ModelConfig {
        hidden_size: 4,
        intermediate_size: 3,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 2,
        vocab_size: 5,
        max_position_embeddings: 8,
        eos_token_ids: vec![2],
        ..config()
    }
}

impl Sample {
    /// A full file of `config`: matrices of `dtype`, a predictor per row in the last layer (its kind by the seed) unless
    /// the activation is silu, curves and provenance.
    pub(crate) fn new(config: ModelConfig, dtype: DType, seed: u64) -> Self {
        let mut values = Values(seed);
        let is_sparse = config.activation != Activation::Silu;
        let n_layers = config.num_hidden_layers;
        let predictors = (0..n_layers)
            .map(|layer| record(&config, layer, is_sparse, seed))
            .collect::<Vec<PredictorRecord>>();
        let mut weights = vec![weight(&config, SectionKind::Embedding, None, dtype, &mut values)];
        for layer in 0..n_layers {
            use SectionKind::{AttnNorm, MlpNorm, WDownT, WGate, WK, WO, WQ, WUp, WV};
            for kind in [AttnNorm, WQ, WK, WV, WO, MlpNorm, WGate, WUp, WDownT] {
                let weight = weight(&config, kind, Some(layer), dtype, &mut values);
                if kind == WGate {
                    weights.push(signs(&config, layer, &weight.1, dtype));
                }
                weights.push(weight);
            }
            let kind = predictors[layer as usize].kind;
            if kind.n_planes() > 1 {
                weights.push(planes(&config, layer, kind.n_planes() - 1, &mut values));
            }
            if kind.has_score() {
                let offsets = (0..config.intermediate_size).flat_map(|_| values.next().to_le_bytes());
                let spec = spec(&config, SectionKind::GateOffsets, Some(layer), DType::F32);
                weights.push((spec, offsets.collect()));
            }
            if kind.has_factors() {
                let rank = 3.min(config.hidden_size);
                weights.extend(factors(&config, layer, rank, &mut values));
            }
            if kind.has_residual() {
                let one = planes(&config, layer, 1, &mut values).1;
                weights.push((spec(&config, SectionKind::ResidualSigns, Some(layer), DType::U32), one));
                let scales = (0..config.intermediate_size).flat_map(|_| values.next().abs().to_le_bytes());
                let spec = spec(&config, SectionKind::ResidualScales, Some(layer), DType::F32);
                weights.push((spec, scales.collect()));
            }
            if kind == PredictorKind::SignPerRow {
                let limit = |row| (row * 7 + 1) % (config.hidden_size + 1);
                let bytes = (0..config.intermediate_size).flat_map(|row| limit(row).to_le_bytes()).collect();
                weights.push((spec(&config, SectionKind::GateLimits, Some(layer), DType::U32), bytes));
            }
        }
        weights.push(weight(&config, SectionKind::FinalNorm, None, dtype, &mut values));
        if !config.tie_word_embeddings {
            weights.push(weight(&config, SectionKind::LmHead, None, dtype, &mut values));
        }
        let curves = (0..n_layers).map(|layer| curve(&config, layer, &predictors[layer as usize])).collect();
        let budget = [(0.0, 0.9), (f32::NAN, 0.5), (0.25, 0.125)].map(|(kl, mlp_bytes)| BudgetPoint {
            kl,
            mlp_bytes,
            limits: predictors
                .iter()
                .map(|record| if record.kind.has_score() { -1.5 } else { 1.0 })
                .collect(),
        });
        Self {
            tokenizer: tokenizer(&config),
            config,
            alignment_bytes: 64,
            weights,
            predictors,
            curves: Some(curves),
            budget: Some(budget.into()),
            provenance: Some(provenance()),
        }
    }

    pub(crate) fn tail(&self) -> Tail<'_> {
        Tail {
            predictors: &self.predictors,
            curves: self.curves.as_deref(),
            budget: self.budget.as_deref(),
            tokenizer: &self.tokenizer,
            provenance: self.provenance.as_ref(),
        }
    }

    /// Everything before the tail, written but not sealed.
    pub(crate) fn begin(&self, out: &Path, force: bool) -> Writer {
        let mut writer =
            Writer::create(out, &self.config, self.alignment_bytes, force).expect("a valid sample");
        for (spec, bytes) in &self.weights {
            writer.begin(spec.clone()).expect("a valid section");
            writer.write(bytes).expect("of the right size");
        }
        writer
    }

    /// The finished file's bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let out = folder.path().join("sample.sinf");
        let mut writer = self.begin(&out, false);
        writer.seal(&self.tail()).expect("a valid tail");
        let len_bytes = writer.commit().expect("committed");
        let bytes = std::fs::read(out).expect("written");
        assert_eq!(bytes.len() as u64, len_bytes);
        bytes
    }

    /// `file` holds exactly this sample.
    #[track_caller]
    pub(crate) fn assert_equals(&self, file: &[u8]) {
        let layout = Layout::parse(file).expect("a valid file");
        assert_eq!(layout.config(), &self.config);
        assert_eq!(layout.alignment_bytes(), self.alignment_bytes);
        let optional = [self.curves.is_some(), self.budget.is_some(), self.provenance.is_some()];
        let n_tail = 2 + optional.into_iter().map(usize::from).sum::<usize>();
        assert_eq!(layout.sections().len(), self.weights.len() + n_tail);
        for ((spec, bytes), section) in self.weights.iter().zip(layout.sections()) {
            assert_eq!((section.kind, section.layer), (spec.kind, spec.layer), "file order");
            assert_eq!(layout.find(spec.kind, spec.layer), Some(section));
            assert_eq!((section.dtype, section.shape), (spec.dtype, spec.shape));
            assert_eq!(section.offset_bytes % u64::from(self.alignment_bytes), 0);
            assert!(section.bytes(file) == bytes, "bytes of {} {:?}", spec.kind.name(), spec.layer);
        }
        // Debug texts, because NaN is not equal to itself.
        assert_eq!(format!("{:?}", layout.predictors()), format!("{:?}", self.predictors));
        assert_eq!(
            format!("{:?}", layout.calibration_curves(file).expect("curves")),
            format!("{:?}", self.curves)
        );
        assert_eq!(
            format!("{:?}", layout.budget_curve(file).expect("budgets")),
            format!("{:?}", self.budget)
        );
        assert_eq!(layout.tokenizer(file).expect("tokenizer"), self.tokenizer);
        assert_eq!(layout.provenance(file).expect("provenance"), self.provenance);
        let mut done = Vec::new();
        layout.verify(file, &mut |n_bytes| done.push(n_bytes)).expect("undamaged");
        assert!(done.is_sorted() && done.last() == Some(&(file.len() as u64)), "progress {done:?}");
    }
}

/// What the format expects of a section.
pub(crate) fn spec(config: &ModelConfig, kind: SectionKind, layer: Option<u32>, dtype: DType) -> SectionSpec {
    SectionSpec {
        kind,
        layer,
        dtype,
        shape: kind.expected_shape(config).expect("weights have shapes"),
        encoding: kind.encoding(),
        required: kind.is_required(),
    }
}

fn weight(
    config: &ModelConfig,
    kind: SectionKind,
    layer: Option<u32>,
    dtype: DType,
    values: &mut Values,
) -> (SectionSpec, Vec<u8>) {
    let dtype = if kind.dtypes().contains(&dtype) { dtype } else { DType::F32 };
    let spec = spec(config, kind, layer, dtype);
    let n_elements = spec.shape.n_elements().expect("small");
    let bytes = (0..n_elements).flat_map(|_| element(values.next(), dtype)).collect();
    (spec, bytes)
}

fn element(value: f32, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        DType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => unreachable!("weights are floats"),
    }
}

fn value(bytes: &[u8], dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes(bytes.try_into().expect("4 bytes")),
        DType::F16 => f16::from_le_bytes(bytes.try_into().expect("2 bytes")).to_f32(),
        DType::Bf16 => bf16::from_le_bytes(bytes.try_into().expect("2 bytes")).to_f32(),
        _ => unreachable!("weights are floats"),
    }
}

fn signs(config: &ModelConfig, layer: u32, weights: &[u8], dtype: DType) -> (SectionSpec, Vec<u8>) {
    let element_bytes = dtype.element_bytes().expect("not a block type");
    let mut bytes = Vec::new();
    for row in weights.chunks(config.hidden_size as usize * element_bytes) {
        let is_negative: Vec<bool> =
            row.chunks(element_bytes).map(|bytes| value(bytes, dtype) < 0.0).collect();
        for columns in is_negative.chunks(32) {
            let word: u32 =
                columns.iter().enumerate().map(|(bit, &negative)| u32::from(negative) << bit).sum();
            bytes.extend(word.to_le_bytes());
        }
    }
    (spec(config, SectionKind::GateSigns, Some(layer), DType::U32), bytes)
}

/// `n_planes` planes below the signs.
fn planes(config: &ModelConfig, layer: u32, n_planes: u32, values: &mut Values) -> (SectionSpec, Vec<u8>) {
    let signs = SectionKind::GateSigns.expected_shape(config).expect("weights have shapes");
    let shape = Shape::new(&[&[u64::from(n_planes)], signs.dims()].concat());
    let n_words = n_words(config.hidden_size);
    let words = (0..shape.n_elements().expect("small") as u32).map(|idx| {
        let is_last = (idx + 1).is_multiple_of(n_words);
        values.next().to_bits() & if is_last { !tail_mask(config.hidden_size) } else { u32::MAX }
    });
    let bytes = words.flat_map(u32::to_le_bytes).collect();
    let kind = SectionKind::GatePlanes;
    let spec = SectionSpec {
        kind,
        layer: Some(layer),
        dtype: DType::U32,
        shape,
        encoding: kind.encoding(),
        required: kind.is_required(),
    };
    (spec, bytes)
}

/// The factors of a predictor of low rank.
fn factors(config: &ModelConfig, layer: u32, rank: u32, values: &mut Values) -> [(SectionSpec, Vec<u8>); 2] {
    let shapes = [
        (SectionKind::GateFc1, [rank, config.hidden_size]),
        (SectionKind::GateFc2, [config.intermediate_size, rank]),
    ];
    shapes.map(|(kind, dims)| {
        let shape = Shape::new(&dims.map(u64::from));
        let spec = SectionSpec {
            kind,
            layer: Some(layer),
            dtype: DType::F16,
            shape,
            encoding: kind.encoding(),
            required: kind.is_required(),
        };
        let n_elements = shape.n_elements().expect("small");
        (spec, (0..n_elements).flat_map(|_| f16::from_f32(values.next()).to_le_bytes()).collect())
    })
}

fn record(config: &ModelConfig, layer: u32, is_sparse: bool, seed: u64) -> PredictorRecord {
    let is_last = layer + 1 == config.num_hidden_layers;
    let kind = match (is_sparse, is_last) {
        (false, _) => PredictorKind::Off,
        (true, false) => PredictorKind::Sign,
        (true, true) => {
            use PredictorKind::{LowRank, LowRankRelu, LowRankSign, SignPerRow, SignX8, W2, W3};
            [W2, SignPerRow, W3, SignX8, LowRank, SignPerRow, LowRankSign, LowRankRelu][seed as usize % 8]
        }
    };
    let (limit, alpha) = match kind {
        PredictorKind::Off => (config.hidden_size, f32::INFINITY),
        _ => (config.hidden_size / 2, 1.0 + layer as f32),
    };
    PredictorRecord {
        kind,
        limit,
        alpha,
        rows_active: 0.1,
        rows_kept: 0.25,
        recall: 0.99,
        missed_energy: if is_last { f32::NAN } else { 0.001 },
        n_tokens: 512 + layer,
        threshold: if kind.has_score() { -2.5 } else { 0.0 },
    }
}

fn curve(config: &ModelConfig, layer: u32, record: &PredictorRecord) -> CalibrationCurve {
    let mut limits = vec![0, config.hidden_size / 2, config.hidden_size];
    limits.dedup();
    let point = |(step, limit): (u8, u32)| CurvePoint {
        limit: if record.kind.has_score() { 0.75 - limit as f32 } else { limit as f32 },
        rows_kept: step as f32 * 0.5,
        recall: if layer == 0 { f32::NAN } else { step as f32 * 0.25 },
        missed_energy: 1.0 - step as f32 * 0.5,
    };
    (0_u8..).zip(limits).map(point).collect()
}

/// Pieces up to the vocabulary: `<unk>`, `<s>`, `</s>`, bytes as far as they fit, then words.
fn tokenizer(config: &ModelConfig) -> Tokenizer {
    let piece = |id: u32| {
        let (text, kind) = match id {
            0 => ("<unk>".to_owned(), PieceKind::Unknown),
            1 => ("<s>".to_owned(), PieceKind::Control),
            2 => ("</s>".to_owned(), PieceKind::Control),
            3..259 => (format!("<0x{:02X}>", id - 3), PieceKind::Byte),
            _ => (format!("\u{2581}w{id}"), PieceKind::Normal),
        };
        assert_eq!(kind == PieceKind::Byte, byte_of(&text).is_some());
        Piece { text, kind }
    };
    let pieces: Vec<Piece> = (0..config.vocab_size).map(piece).collect();
    let last = config.vocab_size - 1;
    Tokenizer {
        merges: vec![(0, last), (last, last / 2)],
        added_tokens: vec![AddedToken {
            id: last,
            content: "<pad>".to_owned(),
            special: true,
            single_word: false,
            lstrip: true,
            rstrip: false,
            normalized: true,
        }],
        pieces,
        dummy_prefix: DummyPrefix::First,
        byte_fallback: true,
        fuse_unk: false,
        unk_token_id: Some(0),
        add_bos: config.bos_token_id.is_some(),
        add_eos: false,
    }
}

fn provenance() -> Provenance {
    Provenance {
        source_name: "a-model".to_owned(),
        source_files: vec![SourceFile {
            name: "model.safetensors".to_owned(),
            len_bytes: 12_345,
            blake3: [7; 32],
        }],
        tool: "a test".to_owned(),
        options: vec![("dtype".to_owned(), "auto".to_owned())],
        calibration: Some(CalibrationText {
            name: "built-in".to_owned(),
            blake3: [9; 32],
            n_tokens: 512,
            window: 64,
        }),
    }
}

/// Normal-looking numbers of both signs, zeros of both signs among them (SplitMix64).
pub(crate) struct Values(pub(crate) u64);

impl Values {
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn next(&mut self) -> f32 {
        match self.next_u64() {
            bits if bits % 16 == 0 => 0.0,
            bits if bits % 16 == 1 => -0.0,
            bits => (bits >> 40) as f32 / f32::from(1_u16 << 12) / 4096.0 - 0.5,
        }
    }
}
