//! Files of random models: what is written is read, whatever the dimensions and texts.

use format_spec::{
    Activation, AddedToken, DType, DummyPrefix, ModelConfig, Piece, PieceKind, PredictorKind,
    PredictorRecord, Rope, RopeScaling, SourceFile,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use crate::sample::Sample;

fn configs() -> impl Strategy<Value = ModelConfig> {
    let dimensions =
        (1_u32..80, 1_u32..20, 1_u32..4, 1_u32..4, 1_u32..4, 1_u32..4, 1_u32..40, 1_u32..=1 << 24);
    let threshold = prop_oneof![Just(0.0), 0.0_f32..1.0, Just(f32::MAX)];
    let activation = prop_oneof![
        Just(Activation::Relu),
        Just(Activation::Silu),
        threshold.prop_map(|threshold| Activation::FatRelu { threshold }),
    ];
    let scaling =
        prop_oneof![Just(RopeScaling::None), (1.0..64.0).prop_map(|factor| RopeScaling::Linear { factor }),];
    let constants = (f32::MIN_POSITIVE..1.0, activation, 1.0..1e7, scaling, any::<bool>());
    let tokens = (option::of(any::<u32>()), vec(any::<u32>(), 0..=ModelConfig::MAX_EOS));
    (dimensions, constants, tokens).prop_map(|(dimensions, constants, tokens)| {
        let (d, f, n_layers, n_kv, n_groups, half_head, vocab_size, max_position_embeddings) = dimensions;
        let (rms_norm_eps, activation, theta, scaling, tie_word_embeddings) = constants;
        ModelConfig {
            hidden_size: d,
            intermediate_size: f,
            num_hidden_layers: n_layers,
            num_attention_heads: n_kv * n_groups,
            num_key_value_heads: n_kv,
            head_dim: 2 * half_head,
            vocab_size,
            max_position_embeddings,
            rms_norm_eps,
            activation,
            rope: Rope { theta, scaling },
            tie_word_embeddings,
            bos_token_id: tokens.0.map(|id| id % vocab_size),
            eos_token_ids: tokens.1.into_iter().map(|id| id % vocab_size).collect(),
        }
    })
}

fn share() -> impl Strategy<Value = f32> {
    prop_oneof![Just(f32::NAN), Just(0.0), Just(1.0), 0.0_f32..1.0]
}

fn records() -> impl Strategy<Value = PredictorRecord> {
    let kind = prop_oneof![Just(PredictorKind::Off), Just(PredictorKind::Sign)];
    let alpha = prop_oneof![Just(0.0), Just(f32::INFINITY), 0.0_f32..10.0];
    (kind, any::<u32>(), alpha, share(), share(), share(), share(), any::<u32>()).prop_map(
        |(kind, limit, alpha, rows_active, rows_kept, recall, missed_energy, n_tokens)| PredictorRecord {
            kind,
            limit,
            alpha,
            rows_active,
            rows_kept,
            recall,
            missed_energy,
            n_tokens,
        },
    )
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let kind = prop_oneof![Just(PieceKind::Normal), Just(PieceKind::Control), Just(PieceKind::UserDefined)];
    vec((any::<String>(), kind).prop_map(|(text, kind)| Piece { text, kind }), 1..20)
}

fn added_tokens() -> impl Strategy<Value = Vec<AddedToken>> {
    let token = (any::<u32>(), any::<String>(), any::<[bool; 5]>()).prop_map(|(id, content, flags)| {
        let [special, single_word, lstrip, rstrip, normalized] = flags;
        AddedToken { id, content, special, single_word, lstrip, rstrip, normalized }
    });
    vec(token, 0..3)
}

fn dummy_prefixes() -> impl Strategy<Value = DummyPrefix> {
    prop_oneof![Just(DummyPrefix::Never), Just(DummyPrefix::EveryStretch), Just(DummyPrefix::First)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_models_read_back_equal(
        config in configs(),
        dtype in prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::Bf16)],
        alignment_log in 6_u32..=12,
        seed: u64,
        records in vec(records(), 3),
        has_curves: bool,
        (pieces, added_tokens, prefix) in (pieces(), added_tokens(), dummy_prefixes()),
        merges in vec(any::<(u32, u32)>(), 0..30),
        flags: [bool; 4],
        provenance in option::of((any::<String>(), vec((any::<String>(), any::<u64>(), any::<[u8; 32]>()), 0..4))),
    ) {
        let mut sample = Sample::new(config.clone(), dtype, seed);
        sample.alignment_bytes = 1 << alignment_log;
        if config.activation != Activation::Silu {
            for (record, random) in sample.predictors.iter_mut().zip(records) {
                *record = PredictorRecord { limit: random.limit % (config.hidden_size + 1), ..random };
            }
        }
        if !has_curves {
            sample.curves = None;
        }
        let tokenizer = &mut sample.tokenizer;
        tokenizer.pieces = pieces;
        tokenizer.pieces.truncate(config.vocab_size as usize);
        let n_pieces = tokenizer.pieces.len() as u32;
        tokenizer.merges = merges.into_iter().map(|(l, r)| (l % n_pieces, r % n_pieces)).collect();
        tokenizer.added_tokens = added_tokens;
        for token in &mut tokenizer.added_tokens {
            token.id %= config.vocab_size;
        }
        tokenizer.dummy_prefix = prefix;
        [tokenizer.byte_fallback, tokenizer.fuse_unk, tokenizer.add_bos, tokenizer.add_eos] = flags;
        tokenizer.add_bos &= config.bos_token_id.is_some();
        tokenizer.add_eos &= !config.eos_token_ids.is_empty();
        match (provenance, &mut sample.provenance) {
            (Some((name, files)), Some(stored)) => {
                stored.source_name = name;
                let file = |(name, len_bytes, blake3)| SourceFile { name, len_bytes, blake3 };
                stored.source_files = files.into_iter().map(file).collect();
            }
            (_, stored) => *stored = None,
        }
        let bytes = sample.bytes();
        sample.assert_equals(&bytes);
        prop_assert!(sample.bytes() == bytes, "written twice");
    }

    /// Arbitrary changes behind a good header reach the table and the records, and never a panic.
    #[test]
    fn random_damage_never_panics(
        seed: u64,
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        in_table: bool,
    ) {
        use crate::patch::{Patch, header, read_all};
        let mut file = Patch { bytes: Sample::new(crate::sample::tiny_config(), DType::F32, seed).bytes() };
        let from = if in_table { file.get_u64(header::TABLE_OFFSET) as usize } else { 0 };
        for (index, value) in changes {
            let at = from + index.index(file.bytes.len() - from);
            file.bytes[at] = value;
        }
        file.reseal();
        if let Ok(layout) = read_all(&file.bytes) {
            for section in layout.sections() {
                prop_assert_eq!(section.bytes(&file.bytes).len() as u64, section.len_bytes);
            }
        }
    }
}
