//! tokenizer.json, the file of Hugging Face's tokenizers.
//!
//! The parts around the model are compared with the few forms that Llama tokenizers come in; anything else would give
//! other ids and is refused.

use std::collections::HashMap;
use std::path::Path;

use format_spec::{AddedToken, DummyPrefix};
use serde_json::{Value, json};

use super::settings::added_token;
use super::{Vocabulary, field_error, find};
use crate::PrepError;
use crate::arch::{Fields, read_object, shorten};

/// Longest accepted file: that of a vocabulary of 256,000 takes 35 MB.
const MAX_BYTES: u64 = 64 << 20;
const FAMILY_HINT: Option<&str> =
    Some("only Llama's tokenizers are converted: SentencePiece BPE with byte fallback");

/// The vocabulary, and what the post-processor puts around a text.
pub(super) struct TokenizerJson {
    pub(super) vocabulary: Vocabulary,
    /// `(add_bos, add_eos)`.
    pub(super) affixes: (bool, bool),
}

/// Reads a tokenizer.json; `bos` is the spelling of the beginning-of-sequence token.
pub(super) fn read(path: &Path, bos: Option<&str>) -> Result<TokenizerJson, PrepError> {
    let map = read_object(path, MAX_BYTES)?;
    let file = Fields::top(path, &map);
    let model = file.object("model")?.ok_or_else(|| file.refused("model", "an object", FAMILY_HINT))?;
    check_model(&model)?;

    let mut added_tokens: Vec<AddedToken> = Vec::new();
    for token in file.objects("added_tokens")? {
        let id = token.token_id("id", token.get("id").unwrap_or(&Value::Null))?;
        let special = token.flag("special")?.unwrap_or(false);
        added_tokens.push(added_token(&token, id, special)?);
    }
    let pieces = pieces(&model, &added_tokens)?;
    let unk_token_id = match model.get("unk_token") {
        None => None,
        Some(_) => {
            let unk = model.text("unk_token")?;
            let id = find(&pieces, unk);
            Some(id.ok_or_else(|| model.refused("unk_token", "a piece of vocab", None))?)
        }
    };
    let merges = merges(path, &model, &pieces)?;
    Ok(TokenizerJson {
        affixes: affixes(&file, bos)?,
        vocabulary: Vocabulary {
            pieces,
            merges,
            added_tokens,
            dummy_prefix: dummy_prefix(&file)?,
            fuse_unk: model.flag("fuse_unk")?.unwrap_or(false),
            unk_token_id,
        },
    })
}

/// Settings of the BPE model that change the ids.
fn check_model(model: &Fields<'_>) -> Result<(), PrepError> {
    if model.text("type")? != "BPE" {
        return Err(model.refused("type", "\"BPE\"", FAMILY_HINT));
    }
    if model.flag("byte_fallback")? != Some(true) {
        return Err(model.refused("byte_fallback", "true", FAMILY_HINT));
    }
    if model.flag("ignore_merges")? == Some(true) {
        return Err(model.refused("ignore_merges", "false", FAMILY_HINT));
    }
    if model.get("dropout").is_some_and(|dropout| dropout.as_f64() != Some(0.0)) {
        return Err(model.refused("dropout", "null or 0", FAMILY_HINT));
    }
    for name in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.get(name).is_some_and(|affix| affix != "") {
            return Err(model.refused(name, "null", FAMILY_HINT));
        }
    }
    Ok(())
}

/// Spellings by id: those of the model, then added tokens that it does not have.
fn pieces(model: &Fields<'_>, added_tokens: &[AddedToken]) -> Result<Vec<String>, PrepError> {
    let vocab =
        model.object("vocab")?.ok_or_else(|| model.refused("vocab", "an object of pieces and ids", None))?;
    let mut by_id: HashMap<u32, &str> = HashMap::new();
    for piece in vocab.names() {
        let id = vocab.token_id(piece, vocab.get(piece).unwrap_or(&Value::Null))?;
        if let Some(twin) = by_id.insert(id, piece) {
            return Err(vocab.refused(piece, &format!("an id of its own, not that of {twin:?}"), None));
        }
    }
    for token in added_tokens {
        match by_id.insert(token.id, &token.content) {
            Some(piece) if piece != token.content => {
                let expected = format!("the piece {:?}, as in added_tokens", token.content);
                return Err(vocab.refused(piece, &expected, None));
            }
            _ => {}
        }
    }
    let n = by_id.len() as u32;
    (0..n).map(|id| by_id.get(&id).map(|&piece| piece.to_owned())).collect::<Option<_>>().ok_or_else(|| {
        model.refused("vocab", &format!("every id from 0 to {} once", n.saturating_sub(1)), None)
    })
}

/// Merges as ids: `"a b"` in older files, `["a", "b"]` in newer ones.
fn merges(path: &Path, model: &Fields<'_>, pieces: &[String]) -> Result<Vec<(u32, u32)>, PrepError> {
    let Some(Value::Array(merges)) = model.get("merges") else {
        return Err(model.refused("merges", "an array of pairs of pieces", None));
    };
    let ids: HashMap<&str, u32> = (0..).zip(pieces).map(|(id, piece)| (piece.as_str(), id)).collect();
    let mut joined = String::new();
    let mut pair = |merge: &Value| {
        let (left, right) = match merge {
            Value::String(pair) => pair.split_once(' ')?,
            Value::Array(pair) => match pair.as_slice() {
                [left, right] => (left.as_str()?, right.as_str()?),
                _ => return None,
            },
            _ => return None,
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        ids.get(joined.as_str())?;
        Some((*ids.get(left)?, *ids.get(right)?))
    };
    let checked = merges.iter().enumerate().map(|(idx, merge)| {
        let field = format!("model.merges[{idx}]");
        let expected = "two pieces of vocab that make a third";
        pair(merge).ok_or_else(|| field_error(path, &field, expected, shorten(merge)))
    });
    checked.collect()
}

/// Where U+2581 is put before a text, by normalizer and pre-tokenizer; the decoder must undo it.
fn dummy_prefix(file: &Fields<'_>) -> Result<DummyPrefix, PrepError> {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let sequence = |normalizers: &[&Value]| json!({"type": "Sequence", "normalizers": normalizers});
    let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let prefix = match (file.get("normalizer"), file.get("pre_tokenizer")) {
        (Some(normalizer), None) if *normalizer == sequence(&[&prepend, &replace]) => {
            DummyPrefix::EveryStretch
        }
        (Some(normalizer), None) if *normalizer == replace || *normalizer == sequence(&[&replace]) => {
            DummyPrefix::Never
        }
        (None, Some(pre_tokenizer)) if *pre_tokenizer == metaspace("first") => DummyPrefix::First,
        (None, Some(pre_tokenizer)) if *pre_tokenizer == metaspace("never") => DummyPrefix::Never,
        (None, _) => {
            let expected = "Metaspace of \"▁\", first or never, unsplit, as there is no normalizer";
            return Err(file.refused("pre_tokenizer", expected, FAMILY_HINT));
        }
        (Some(_), Some(_)) => {
            return Err(file.refused("pre_tokenizer", "null, as there is a normalizer", FAMILY_HINT));
        }
        (Some(_), None) => {
            let expected = "[Prepend \"▁\",] Replace \" \" by \"▁\"";
            return Err(file.refused("normalizer", expected, FAMILY_HINT));
        }
    };

    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix != DummyPrefix::Never {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let decoder = json!({"type": "Sequence", "decoders": decoders});
    if file.get("decoder") != Some(&decoder) {
        let expected = format!("{decoder}");
        return Err(file.refused("decoder", &expected, FAMILY_HINT));
    }
    Ok(prefix)
}

/// `(add_bos, add_eos)` by the post-processor: nothing, or a template of special tokens around one text.
fn affixes(file: &Fields<'_>, bos: Option<&str>) -> Result<(bool, bool), PrepError> {
    let Some(post_processor) = file.object("post_processor")? else {
        return Ok((false, false));
    };
    let refused = || {
        let expected = "null or TemplateProcessing of [BOS] text [EOS]";
        file.refused("post_processor", expected, FAMILY_HINT)
    };
    if post_processor.text("type")? != "TemplateProcessing" {
        return Err(refused());
    }
    let parts = post_processor.objects("single")?;
    let text_at = parts.iter().position(|part| part.get("Sequence").is_some()).ok_or_else(refused)?;
    let (before, after) = (&parts[..text_at], &parts[text_at + 1..]);
    let name = |part: &Fields<'_>| -> Result<String, PrepError> {
        let token = part.object("SpecialToken")?.ok_or_else(refused)?;
        Ok(token.text("id")?.to_owned())
    };
    let add_bos = match before {
        [] => false,
        [part] if Some(name(part)?.as_str()) == bos => true,
        _ => return Err(refused()),
    };
    let add_eos = match after {
        [] => false,
        [part] if Some(name(part)?.as_str()) != bos => true,
        _ => return Err(refused()),
    };
    Ok((add_bos, add_eos))
}
