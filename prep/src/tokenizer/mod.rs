//! tokenizer.json or tokenizer.model becomes the file's tokenizer, so that the runtime needs no other file.
//!
//! Accepted are Llama's tokenizers, SentencePiece BPE with byte fallback, with the ids that Hugging Face's transformers
//! gives them. Where files of a folder say different things:
//!
//! - tokenizer.json goes before tokenizer.model, as in transformers; if both are there and a piece differs, the folder
//!   is refused, because one of them belongs to another model.
//! - tokenizer_config.json decides whether BOS and EOS are added; what it leaves out is Llama's default for Llama's
//!   tokenizer classes, and the post-processor's word for others.
//! - The BOS token must be the one that config.json names.
//!
//! The vocabulary may have up to `MAX_PADDING` entries fewer than the embedding has rows, which some checkpoints pad;
//! ids past the last piece have no text.

mod hugging_face;
mod sentencepiece;
mod settings;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use format_spec::metadata::byte_of;
use format_spec::{AddedToken, DummyPrefix, ModelConfig, Piece, PieceKind, Tokenizer};

use self::settings::Settings;
use crate::PrepError;
use crate::checkpoint::exists;

const TOKENIZER_JSON: &str = "tokenizer.json";
const TOKENIZER_MODEL: &str = "tokenizer.model";
/// Most rows of the embedding without a piece.
const MAX_PADDING: usize = 1024;
const VOCAB_HINT: Option<&str> = Some("the tokenizer and config.json are not of one model");

/// A model folder's tokenizer.
#[derive(Debug)]
pub struct FolderTokenizer {
    /// As it is written.
    pub tokenizer: Tokenizer,
    /// The token that it puts before a text, if it does.
    pub bos_token_id: Option<u32>,
    /// Every file that was read.
    pub files: Vec<PathBuf>,
}

/// What either file holds: spellings by id, and everything that decides how text becomes ids.
struct Vocabulary {
    pieces: Vec<String>,
    merges: Vec<(u32, u32)>,
    added_tokens: Vec<AddedToken>,
    dummy_prefix: DummyPrefix,
    fuse_unk: bool,
    unk_token_id: Option<u32>,
}

/// Reads the tokenizer of a model folder.
///
/// # Errors
/// No tokenizer file; a tokenizer that is not Llama's, naming the field; files that disagree; more pieces than
/// `config.vocab_size`, or far fewer.
pub fn read_tokenizer(folder: &Path, config: &ModelConfig) -> Result<FolderTokenizer, PrepError> {
    let (json_path, model_path) = (folder.join(TOKENIZER_JSON), folder.join(TOKENIZER_MODEL));
    let settings = Settings::read(folder)?;
    let model = if exists(&model_path)? { Some(sentencepiece::read_pieces(&model_path)?) } else { None };
    let mut files = settings.files.clone();
    files.extend(model.is_some().then(|| model_path.clone()));
    let (path, mut vocabulary, affixes) = if exists(&json_path)? {
        files.push(json_path.clone());
        let json = hugging_face::read(&json_path, settings.bos.as_deref())?;
        if let Some(model) = model {
            let spelled = model.pieces.iter().map(|piece| piece.piece());
            expect_same_pieces(&json_path, &json.vocabulary.pieces, spelled)?;
        }
        (json_path, json.vocabulary, json.affixes)
    } else if let Some(model) = model {
        let vocabulary = sentencepiece::vocabulary(&model_path, &model, &settings)?;
        (model_path, vocabulary, LLAMA_AFFIXES)
    } else {
        return Err(PrepError::FileMissing {
            folder: folder.to_owned(),
            expected: "tokenizer.json or tokenizer.model",
            found: "neither".to_owned(),
        });
    };

    add_tokens(&path, &mut vocabulary, &settings)?;
    check_size(&path, vocabulary.pieces.len(), config)?;
    check_bytes(&path, &vocabulary.pieces)?;
    let (add_bos, add_eos) = if settings.is_llama_class { LLAMA_AFFIXES } else { affixes };
    let (add_bos, add_eos) = (settings.add_bos.unwrap_or(add_bos), settings.add_eos.unwrap_or(add_eos));
    let bos = settings.bos.as_deref();
    let bos_token_id = if add_bos { Some(bos_id(&path, &vocabulary.pieces, bos, config)?) } else { None };
    if add_eos && config.eos_token_ids.is_empty() {
        let found = "none in config.json".to_owned();
        return Err(field_error(&path, "eos_token_id", "an id, as EOS is put behind every text", found));
    }
    Ok(FolderTokenizer { bos_token_id, tokenizer: tokenizer(vocabulary, add_bos, add_eos), files })
}

/// `(add_bos, add_eos)` of Llama's tokenizer classes where nothing is said.
const LLAMA_AFFIXES: (bool, bool) = (true, false);

/// Both files must spell every piece of tokenizer.model alike; tokenizer.json may have more.
fn expect_same_pieces<'a>(
    path: &Path,
    pieces: &[String],
    spelled: impl Iterator<Item = &'a str>,
) -> Result<(), PrepError> {
    for (id, expected) in spelled.enumerate() {
        let found = pieces.get(id).map(String::as_str);
        if found != Some(expected) {
            return Err(PrepError::Field {
                path: path.to_owned(),
                field: format!("id {id}"),
                expected: format!("the piece {expected:?} of {TOKENIZER_MODEL}"),
                found: found.map_or_else(|| "no such id".to_owned(), |piece| format!("{piece:?}")),
                hint: Some("remove the file that does not belong to the model; either is enough"),
            });
        }
    }
    Ok(())
}

/// Adds the tokens of the settings to those of the vocabulary, which keep their own rules. A special token without a
/// piece and without an id of its own has no row in the embedding and is left out.
fn add_tokens(path: &Path, vocabulary: &mut Vocabulary, settings: &Settings) -> Result<(), PrepError> {
    let known =
        |tokens: &[AddedToken], content: &str| tokens.iter().find(|t| t.content == content).map(|t| t.id);
    for token in settings.numbered.values() {
        let next = vocabulary.pieces.len() as u32;
        let found = known(&vocabulary.added_tokens, &token.content)
            .or_else(|| find(&vocabulary.pieces, &token.content))
            .unwrap_or(next);
        if found != token.id {
            let expected = format!("id {}, as tokenizer_config.json or added_tokens.json says", token.id);
            return Err(field_error(
                path,
                &format!("token {:?}", token.content),
                &expected,
                format!("id {found}"),
            ));
        }
        if known(&vocabulary.added_tokens, &token.content).is_none() {
            if found == next {
                vocabulary.pieces.push(token.content.clone());
            }
            vocabulary.added_tokens.push(token.clone());
        }
    }
    for token in &settings.special {
        if known(&vocabulary.added_tokens, &token.content).is_none()
            && let Some(id) = find(&vocabulary.pieces, &token.content)
        {
            vocabulary.added_tokens.push(AddedToken { id, ..token.clone() });
        }
    }
    vocabulary.added_tokens.sort_by_key(|token| token.id);
    Ok(())
}

fn check_size(path: &Path, n_pieces: usize, config: &ModelConfig) -> Result<(), PrepError> {
    let vocab_size = config.vocab_size as usize;
    if n_pieces <= vocab_size && n_pieces + MAX_PADDING >= vocab_size {
        return Ok(());
    }
    Err(PrepError::Field {
        path: path.to_owned(),
        field: "vocabulary".to_owned(),
        expected: format!("{vocab_size} pieces by config.json, or up to {MAX_PADDING} fewer"),
        found: n_pieces.to_string(),
        hint: VOCAB_HINT,
    })
}

/// All 256 bytes must be there, or some texts had no ids.
fn check_bytes(path: &Path, pieces: &[String]) -> Result<(), PrepError> {
    let found: HashSet<u8> = pieces.iter().filter_map(|piece| byte_of(piece)).collect();
    match (0..=u8::MAX).find(|byte| !found.contains(byte)) {
        None => Ok(()),
        Some(byte) => Err(field_error(
            path,
            "vocabulary",
            &format!("the piece <0x{byte:02X}>"),
            "no such piece".to_owned(),
        )),
    }
}

/// The id of the BOS token, which must be the one of config.json.
fn bos_id(path: &Path, pieces: &[String], bos: Option<&str>, config: &ModelConfig) -> Result<u32, PrepError> {
    let found = bos.and_then(|bos| find(pieces, bos));
    match (found, config.bos_token_id) {
        (Some(id), None) => Ok(id),
        (Some(id), Some(expected)) if id == expected => Ok(id),
        (_, expected) => Err(PrepError::Field {
            path: path.to_owned(),
            field: format!("bos_token {:?}", bos.unwrap_or("null")),
            expected: match expected {
                Some(id) => format!("id {id}, the bos_token_id of config.json"),
                None => "a piece of the vocabulary".to_owned(),
            },
            found: found.map_or_else(|| "no such piece".to_owned(), |id| format!("id {id}")),
            hint: Some("correct bos_token_id in config.json, or bos_token in tokenizer_config.json"),
        }),
    }
}

fn tokenizer(vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> Tokenizer {
    let mut pieces: Vec<Piece> = vocabulary
        .pieces
        .into_iter()
        .map(|text| {
            let kind = if byte_of(&text).is_some() { PieceKind::Byte } else { PieceKind::Normal };
            Piece { text, kind }
        })
        .collect();
    for token in &vocabulary.added_tokens {
        let kind = if token.special { PieceKind::Control } else { PieceKind::UserDefined };
        pieces[token.id as usize].kind = kind;
    }
    if let Some(id) = vocabulary.unk_token_id {
        pieces[id as usize].kind = PieceKind::Unknown;
    }
    Tokenizer {
        pieces,
        merges: vocabulary.merges,
        added_tokens: vocabulary.added_tokens,
        dummy_prefix: vocabulary.dummy_prefix,
        byte_fallback: true,
        fuse_unk: vocabulary.fuse_unk,
        unk_token_id: vocabulary.unk_token_id,
        add_bos,
        add_eos,
    }
}

/// The id of a spelling.
fn find(pieces: &[String], text: &str) -> Option<u32> {
    pieces.iter().position(|piece| piece == text).map(|id| id as u32)
}

fn field_error(path: &Path, field: &str, expected: &str, found: String) -> PrepError {
    PrepError::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        found,
        hint: None,
    }
}

#[cfg(test)]
mod tests;
