//! Text to token ids and back.
//!
//! Encoding is the `tokenizers` crate's BPE, built in memory from the file's tokenizer section, so that ids equal
//! those of Hugging Face. Decoding is a table from ids to bytes: text streams out token by token, and a piece may
//! be part of a UTF-8 character ([`crate::TextStream`] puts those together).

use format_spec::metadata::byte_of;
use format_spec::{DummyPrefix, PieceKind};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// Why a tokenizer cannot be built or a text not be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// An id of the tokenizer section lies outside its vocabulary.
    #[error("tokenizer: {field} names piece {id}, there are {n_pieces}")]
    PieceId {
        /// Which field.
        field: &'static str,
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        n_pieces: usize,
    },
    /// An added token is spelled differently from the piece with its id.
    #[error("tokenizer: added token {content:?} has id {id}, whose piece is {piece:?}")]
    AddedToken {
        /// Its spelling.
        content: String,
        /// Its id.
        id: u32,
        /// The piece with that id.
        piece: String,
    },
    /// A byte piece that is not spelled `<0xNN>`.
    #[error("tokenizer: byte piece {id} is spelled {piece:?}, not <0xNN>")]
    BytePiece {
        /// Its id.
        id: usize,
        /// Its spelling.
        piece: String,
    },
    /// The `tokenizers` crate refused.
    #[error("tokenizer: BPE failed")]
    Bpe(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A vocabulary in use.
#[derive(Debug)]
pub struct Tokenizer {
    encoder: tokenizers::Tokenizer,
    pieces: PieceBytes,
    bos: Option<u32>,
    /// EOS, where encoding puts it behind the text.
    appended_eos: Option<u32>,
    add_bos: bool,
    strips_first_space: bool,
    added_tokens: Vec<(String, u32)>,
}

impl Tokenizer {
    /// Builds encoder and decoder of `spec`. `bos` and `eos` are the model's ids; EOS is put behind encoded text only
    /// where `spec.add_eos` says so.
    ///
    /// # Errors
    /// [`TokenizerError`] where `spec` contradicts itself.
    pub fn new(
        spec: &format_spec::Tokenizer,
        bos: Option<u32>,
        eos: Option<u32>,
    ) -> Result<Self, TokenizerError> {
        Ok(Self {
            encoder: encoder(spec)?,
            pieces: PieceBytes::new(spec)?,
            bos,
            appended_eos: eos.filter(|_| spec.add_eos),
            add_bos: spec.add_bos,
            strips_first_space: spec.dummy_prefix != DummyPrefix::Never,
            added_tokens: spec.added_tokens.iter().map(|token| (token.content.clone(), token.id)).collect(),
        })
    }

    /// Ids of `text` with BOS in front and EOS behind as the model was trained, those of Hugging Face.
    ///
    /// # Errors
    /// [`TokenizerError::Bpe`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids: Vec<u32> = self.bos.filter(|_| self.add_bos).into_iter().collect();
        ids.extend(self.encode_plain(text)?);
        ids.extend(self.appended_eos);
        Ok(ids)
    }

    /// Ids of `text` alone, without BOS and EOS around it.
    ///
    /// # Errors
    /// [`TokenizerError::Bpe`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.encoder.encode_fast(text, false).map_err(TokenizerError::Bpe)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The BOS token of the model.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Id of the token that is matched whole in text and spelled `content`.
    pub fn added_token(&self, content: &str) -> Option<u32> {
        self.added_tokens.iter().find(|(known, _)| known == content).map(|&(_, id)| id)
    }

    /// The bytes that `id` adds to a text; empty for special tokens and for ids outside the vocabulary.
    ///
    /// `at_start` says that no piece came before and is kept up to date: the space that encoding puts in front of a
    /// text is left out there.
    pub fn piece(&self, id: u32, at_start: &mut bool) -> &[u8] {
        let piece = self.pieces.get(id);
        if piece.is_empty() || !std::mem::take(at_start) || !self.strips_first_space {
            return piece;
        }
        piece.strip_prefix(b" ").unwrap_or(piece)
    }

    /// The text of `ids`, special tokens left out, bytes that are not UTF-8 replaced.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        let mut at_start = true;
        for &id in ids {
            bytes.extend_from_slice(self.piece(id, &mut at_start));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The crate's tokenizer: added tokens, dummy prefix, BPE.
fn encoder(spec: &format_spec::Tokenizer) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let piece = |field, id: u32| {
        spec.pieces.get(id as usize).ok_or(TokenizerError::PieceId { field, id, n_pieces: spec.pieces.len() })
    };
    let vocab: Vocab =
        spec.pieces.iter().enumerate().map(|(id, piece)| (piece.text.clone(), id as u32)).collect();
    let merges = spec
        .merges
        .iter()
        .map(|&(left, right)| Ok((piece("merges", left)?.text.clone(), piece("merges", right)?.text.clone())))
        .collect::<Result<Merges, TokenizerError>>()?;
    let mut builder = BPE::builder()
        .vocab_and_merges(vocab, merges)
        // Texts are encoded once: nothing to remember.
        .cache_capacity(0)
        .byte_fallback(spec.byte_fallback)
        .fuse_unk(spec.fuse_unk);
    if let Some(id) = spec.unk_token_id {
        builder = builder.unk_token(piece("unk_token_id", id)?.text.clone());
    }
    let mut encoder = tokenizers::Tokenizer::new(builder.build().map_err(TokenizerError::Bpe)?);

    let spaces = Replace::new(" ", SPACE).map_err(TokenizerError::Bpe)?;
    match spec.dummy_prefix {
        DummyPrefix::Never => {
            encoder.with_normalizer(Some(spaces));
        }
        DummyPrefix::EveryStretch => {
            let prepend = Prepend::new(SPACE.to_owned());
            encoder.with_normalizer(Some(Sequence::new(vec![prepend.into(), spaces.into()])));
        }
        DummyPrefix::First => {
            encoder.with_pre_tokenizer(Some(Metaspace::new('\u{2581}', PrependScheme::First, false)));
        }
    }

    let mut added = Vec::with_capacity(spec.added_tokens.len());
    for token in &spec.added_tokens {
        let piece = &piece("added_tokens", token.id)?.text;
        if *piece != token.content {
            return Err(TokenizerError::AddedToken {
                content: token.content.clone(),
                id: token.id,
                piece: piece.clone(),
            });
        }
        added.push(
            tokenizers::AddedToken::from(token.content.clone(), token.special)
                .single_word(token.single_word)
                .lstrip(token.lstrip)
                .rstrip(token.rstrip)
                .normalized(token.normalized),
        );
    }
    encoder.add_tokens(&added);
    Ok(encoder)
}

/// What each id adds to a text, in one allocation.
#[derive(Debug)]
struct PieceBytes {
    bytes: Vec<u8>,
    /// End of each piece in `bytes`; a piece starts where the one before ends.
    ends: Vec<usize>,
}

impl PieceBytes {
    fn new(spec: &format_spec::Tokenizer) -> Result<Self, TokenizerError> {
        let mut special = vec![false; spec.pieces.len()];
        for token in spec.added_tokens.iter().filter(|token| token.special) {
            if let Some(special) = special.get_mut(token.id as usize) {
                *special = true;
            }
        }
        let mut bytes = Vec::with_capacity(spec.pieces.iter().map(|piece| piece.text.len()).sum());
        let mut ends = Vec::with_capacity(spec.pieces.len());
        for (id, piece) in spec.pieces.iter().enumerate() {
            match piece.kind {
                _ if special[id] => {}
                PieceKind::Control | PieceKind::Unknown => {}
                PieceKind::Byte => {
                    let byte = byte_of(&piece.text)
                        .ok_or_else(|| TokenizerError::BytePiece { id, piece: piece.text.clone() })?;
                    bytes.push(byte);
                }
                PieceKind::Normal | PieceKind::UserDefined => {
                    for (i, part) in piece.text.split(SPACE).enumerate() {
                        if i > 0 {
                            bytes.push(b' ');
                        }
                        bytes.extend_from_slice(part.as_bytes());
                    }
                }
            }
            ends.push(bytes.len());
        }
        Ok(Self { bytes, ends })
    }

    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use format_spec::{AddedToken, Piece};
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    const HOSTILE: &[&str] = &[
        "",
        " ",
        "   ",
        "\n",
        "\n\n\n  \n",
        "\t\r\n\u{0}",
        "The Linux kernel",
        " leading and trailing ",
        "a  b   c    d",
        "</s>",
        "a</s>b",
        " a </s> b <s><s> ",
        "<unk>x<unk>",
        "<0x41>",
        "\u{2581}",
        "a\u{2581}b",
        "日本語のテキスト",
        "naïve café — “quotes”",
        "👩‍👩‍👧‍👦 🏳️‍🌈",
        "e\u{301}\u{200b}\u{feff}\u{202e}",
        "\u{10ffff}\u{e000}",
        "<|doc|>\nfor i in range(10):\n    print(i)\n",
    ];

    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/relu-llama-8m")
    }

    fn json() -> Value {
        serde_json::from_slice(&std::fs::read(folder().join("tokenizer.json")).expect("readable"))
            .expect("JSON")
    }

    /// The bundled tokenizer.json, with the dummy prefix replaced, as the crate itself reads it.
    fn hugging_face(prefix: DummyPrefix) -> tokenizers::Tokenizer {
        let mut json = json();
        let replace =
            serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
        match prefix {
            DummyPrefix::EveryStretch => {}
            DummyPrefix::Never => json["normalizer"] = replace,
            DummyPrefix::First => {
                json["normalizer"] = Value::Null;
                json["pre_tokenizer"] = serde_json::json!({
                    "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false
                });
            }
        }
        tokenizers::Tokenizer::from_bytes(json.to_string()).expect("valid")
    }

    /// The bundled tokenizer.json in the words of a `.sinf` file.
    fn spec(dummy_prefix: DummyPrefix) -> format_spec::Tokenizer {
        let json = json();
        let vocab = json["model"]["vocab"].as_object().expect("vocab");
        let mut pieces = vec![Piece { text: String::new(), kind: PieceKind::Normal }; vocab.len()];
        for (text, id) in vocab {
            let kind = match text.as_str() {
                "<unk>" => PieceKind::Unknown,
                "<s>" | "</s>" => PieceKind::Control,
                text if byte_of(text).is_some() => PieceKind::Byte,
                _ => PieceKind::Normal,
            };
            pieces[id.as_u64().expect("id") as usize] = Piece { text: text.clone(), kind };
        }
        let id = |text: &Value| vocab[text.as_str().expect("text")].as_u64().expect("id") as u32;
        let merges = json["model"]["merges"].as_array().expect("merges");
        format_spec::Tokenizer {
            merges: merges.iter().map(|pair| (id(&pair[0]), id(&pair[1]))).collect(),
            pieces,
            added_tokens: ["<unk>", "<s>", "</s>"]
                .into_iter()
                .zip(0..)
                .map(|(content, id)| AddedToken {
                    id,
                    content: content.to_owned(),
                    special: true,
                    single_word: false,
                    lstrip: false,
                    rstrip: false,
                    normalized: false,
                })
                .collect(),
            dummy_prefix,
            byte_fallback: true,
            fuse_unk: true,
            unk_token_id: Some(0),
            add_bos: true,
            add_eos: false,
        }
    }

    fn bundled(prefix: DummyPrefix) -> Tokenizer {
        Tokenizer::new(&spec(prefix), Some(1), Some(2)).expect("valid")
    }

    const PREFIXES: [DummyPrefix; 3] = [DummyPrefix::EveryStretch, DummyPrefix::Never, DummyPrefix::First];

    #[test]
    fn ids_equal_hugging_face_on_hostile_texts() {
        for prefix in PREFIXES {
            let (ours, theirs) = (bundled(prefix), hugging_face(prefix));
            for text in HOSTILE {
                let expected = theirs.encode_fast(*text, true).expect("encodes");
                assert_eq!(ours.encode(text).expect("encodes"), expected.get_ids(), "{prefix:?}: {text:?}");
            }
        }
    }

    #[test]
    fn ids_and_texts_equal_the_golden_ones() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/relu-llama-8m.json");
        let golden: Value = serde_json::from_slice(&std::fs::read(golden).expect("readable")).expect("JSON");
        let tokenizer = bundled(DummyPrefix::EveryStretch);
        let ids = |value: &Value| -> Vec<u32> {
            value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("id") as u32).collect()
        };
        for prompt in golden["prompts"].as_array().expect("prompts") {
            let text = prompt["text"].as_str().expect("text");
            assert_eq!(tokenizer.encode(text).expect("encodes"), ids(&prompt["ids"]), "{text:?}");
            assert_eq!(tokenizer.decode(&ids(&prompt["ids"])), text);
            assert_eq!(tokenizer.decode(&ids(&prompt["greedy_ids"])), prompt["greedy_text"]);
        }
    }

    #[test]
    fn added_tokens_may_strip_spaces_and_ask_for_word_boundaries() {
        let mut spec = spec(DummyPrefix::EveryStretch);
        let id = spec.pieces.len() as u32;
        spec.pieces.push(Piece { text: "<|im_end|>".to_owned(), kind: PieceKind::UserDefined });
        spec.added_tokens.push(AddedToken {
            id,
            content: "<|im_end|>".to_owned(),
            special: false,
            single_word: true,
            lstrip: false,
            rstrip: true,
            normalized: false,
        });
        let tokenizer = Tokenizer::new(&spec, Some(1), Some(2)).expect("valid");
        assert_eq!(tokenizer.added_token("<|im_end|>"), Some(id));
        let mut theirs = hugging_face(DummyPrefix::EveryStretch);
        theirs.add_tokens(&[tokenizers::AddedToken::from("<|im_end|>", false)
            .single_word(true)
            .rstrip(true)
            .normalized(false)]);
        for text in ["a <|im_end|>  b", "a<|im_end|>b", "<|im_end|>\n\nx"] {
            let expected = theirs.encode_fast(text, true).expect("encodes");
            assert_eq!(tokenizer.encode(text).expect("encodes"), expected.get_ids(), "{text:?}");
        }
        assert_eq!(tokenizer.piece(id, &mut false), b"<|im_end|>");
    }

    #[test]
    fn bos_and_eos_follow_the_file() {
        let mut spec = spec(DummyPrefix::EveryStretch);
        spec.add_eos = true;
        let tokenizer = Tokenizer::new(&spec, Some(1), Some(2)).expect("valid");
        assert_eq!(tokenizer.encode("").expect("encodes"), [1, 2]);
        spec.add_bos = false;
        let tokenizer = Tokenizer::new(&spec, Some(1), None).expect("valid");
        assert!(tokenizer.encode("").expect("encodes").is_empty());
    }

    #[test]
    fn pieces_decode_to_bytes() {
        let tokenizer = bundled(DummyPrefix::EveryStretch);
        let mut at_start = true;
        for special in [0, 1, 2, u32::MAX] {
            assert_eq!(tokenizer.piece(special, &mut at_start), b"");
        }
        assert!(at_start);
        assert_eq!(tokenizer.piece(325, &mut at_start), b"The");
        assert_eq!(tokenizer.piece(325, &mut at_start), b" The");
        assert_eq!(tokenizer.piece(3 + 0xf0, &mut at_start), [0xf0]);
        assert_eq!(tokenizer.decode(&[1, 325]), "The");
        assert_eq!(tokenizer.decode(&[3 + 0xe2, 3 + 0x96]), "\u{fffd}");
        assert_eq!(bundled(DummyPrefix::Never).decode(&[325]), " The");
    }

    #[test]
    fn contradictions_are_errors() {
        let broken = |change: fn(&mut format_spec::Tokenizer)| {
            let mut spec = spec(DummyPrefix::EveryStretch);
            change(&mut spec);
            let error = Tokenizer::new(&spec, Some(1), Some(2)).expect_err("refused");
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error}: {}", cause.unwrap_or_default())
        };
        assert!(broken(|spec| spec.merges.push((4, 999_999))).contains("999999"));
        assert!(broken(|spec| spec.merges.push((4, 5))).contains("<0x01><0x02>"));
        assert!(broken(|spec| spec.unk_token_id = Some(4096)).contains("unk_token_id"));
        assert!(broken(|spec| spec.added_tokens[1].content = "<bos>".to_owned()).contains("<bos>"));
        assert!(broken(|spec| spec.pieces[3].text = "<0x+1>".to_owned()).contains("<0x+1>"));
    }

    proptest! {
        #[test]
        fn any_text_encodes_as_in_hugging_face_and_comes_back(text in "\\PC{0,40}|[ \n\u{2581}</s>a-c👍]{0,24}") {
            thread_local! {
                static BOTH: (Tokenizer, tokenizers::Tokenizer) =
                    (bundled(DummyPrefix::EveryStretch), hugging_face(DummyPrefix::EveryStretch));
            }
            BOTH.with(|(ours, theirs)| {
                let ids = ours.encode(&text).expect("encodes");
                let expected = theirs.encode_fast(text.as_str(), true).expect("encodes");
                prop_assert_eq!(&ids[..], expected.get_ids());
                if !text.contains('<') {
                    prop_assert_eq!(ours.decode(&ids), text.replace('\u{2581}', " "));
                }
                Ok(())
            })?;
        }
    }
}
