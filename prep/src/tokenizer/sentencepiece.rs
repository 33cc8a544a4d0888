//! tokenizer.model, a SentencePiece model.
//!
//! SentencePiece merges the pair whose piece has the best score; Hugging Face's BPE merges by rank. The ranks follow
//! from the scores as transformers' converter (`generate_merges`) derives them, so that the ids are the same:
//!
//! ```text
//! merges = [(piece[..i], piece[i..]) for piece in vocabulary for i in 1.. if both are pieces]
//! sorted by score of the piece, then characters on the left, then on the right, all descending; ties keep their order
//! ```

use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::Path;

use format_spec::{AddedToken, DummyPrefix};
use sentencepiece_model::{ModelType, SentencePiece, SentencePieceModel, Type};

use super::settings::Settings;
use super::{Vocabulary, field_error};
use crate::PrepError;
use crate::checkpoint::read_small;

/// Longest accepted file: that of a vocabulary of 256,000 takes 4.3 MB.
const MAX_BYTES: u64 = 64 << 20;
/// Pieces before the ones with scores: `<unk>`, `<s>`, `</s>`. The converter takes their score as 0.
const N_UNSCORED: usize = 3;

/// Reads and checks a tokenizer.model.
pub(super) fn read_pieces(path: &Path) -> Result<SentencePieceModel, PrepError> {
    let bytes = read_small(path, MAX_BYTES)?;
    let model = SentencePieceModel::from_slice(&bytes).map_err(|error| PrepError::Syntax {
        path: path.to_owned(),
        expected: "a SentencePiece model",
        found: error.to_string(),
    })?;
    check(path, &model)?;
    Ok(model)
}

/// The vocabulary of a tokenizer.model, with merges in the order of their scores.
pub(super) fn vocabulary(
    path: &Path,
    model: &SentencePieceModel,
    settings: &Settings,
) -> Result<Vocabulary, PrepError> {
    let mut ids: HashMap<&str, u32> = HashMap::with_capacity(model.pieces.len());
    for (id, piece) in (0..).zip(&model.pieces) {
        if let Some(twin) = ids.insert(piece.piece(), id) {
            let expected = format!("a spelling of its own, not that of pieces[{twin}]");
            return Err(field_error(
                path,
                &format!("pieces[{id}]"),
                &expected,
                format!("{:?}", piece.piece()),
            ));
        }
    }
    let of_kind = |kind: Type| (0..).zip(&model.pieces).filter(move |(_, piece)| piece.r#type() == kind);
    let added = |(id, piece): (u32, &SentencePiece)| AddedToken {
        id,
        content: piece.piece().to_owned(),
        special: piece.r#type() == Type::Control
            || settings.special.iter().any(|special| special.content == piece.piece()),
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
    };
    Ok(Vocabulary {
        merges: merges(&model.pieces, &ids),
        added_tokens: of_kind(Type::Control).chain(of_kind(Type::UserDefined)).map(added).collect(),
        dummy_prefix: match (settings.add_prefix_space, settings.legacy) {
            (false, _) => DummyPrefix::Never,
            (true, true) => DummyPrefix::EveryStretch,
            (true, false) => DummyPrefix::First,
        },
        fuse_unk: true,
        unk_token_id: of_kind(Type::Unknown).next().map(|(id, _)| id),
        pieces: model.pieces.iter().map(|piece| piece.piece().to_owned()).collect(),
    })
}

fn check(path: &Path, model: &SentencePieceModel) -> Result<(), PrepError> {
    let refused = |field: &str, expected: &str, found: String| Err(field_error(path, field, expected, found));
    let trainer = model.trainer().cloned().unwrap_or_default();
    if trainer.model_type() != ModelType::Bpe {
        return refused("trainer_spec.model_type", "BPE", format!("{:?}", trainer.model_type()));
    }
    if !trainer.byte_fallback() {
        return refused("trainer_spec.byte_fallback", "true", "false".to_owned());
    }
    if trainer.treat_whitespace_as_suffix() {
        return refused("trainer_spec.treat_whitespace_as_suffix", "false", "true".to_owned());
    }
    let normalizer = model.normalizer().cloned().unwrap_or_default();
    let n_bytes = normalizer.precompiled_charsmap().len();
    if n_bytes > 0 {
        let found = format!("{} of {n_bytes} bytes", normalizer.name());
        return refused("normalizer_spec.precompiled_charsmap", "none (identity)", found);
    }
    for (name, found, expected) in [
        ("add_dummy_prefix", normalizer.add_dummy_prefix(), true),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces(), false),
        ("escape_whitespaces", normalizer.escape_whitespaces(), true),
    ] {
        if found != expected {
            return refused(&format!("normalizer_spec.{name}"), &expected.to_string(), found.to_string());
        }
    }
    if let Some(id) = model.pieces.iter().position(|piece| piece.score().is_nan()) {
        return refused(&format!("pieces[{id}].score"), "a number", "NaN".to_owned());
    }
    Ok(())
}

/// Merges in rank order, from the scores.
fn merges(pieces: &[SentencePiece], ids: &HashMap<&str, u32>) -> Vec<(u32, u32)> {
    struct Merge {
        score: f32,
        n_chars: (usize, usize),
        pair: (u32, u32),
    }
    let mut merges = Vec::new();
    for (id, piece) in pieces.iter().enumerate() {
        let text = piece.piece();
        // Adding 0 makes -0 and 0 one score.
        let score = if id < N_UNSCORED { 0.0 } else { piece.score() + 0.0 };
        let n_chars = text.chars().count();
        for (n_left, (at, _)) in text.char_indices().enumerate().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                merges.push(Merge { score, n_chars: (n_left, n_chars - n_left), pair: (left, right) });
            }
        }
    }
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(Reverse(a.n_chars).cmp(&Reverse(b.n_chars))));
    merges.into_iter().map(|merge| merge.pair).collect()
}
