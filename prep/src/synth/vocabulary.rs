//! A Llama tokenizer of any size: byte fallback, and pieces built up from pairs of common letters.
//!
//! It is made, not trained: real text takes about one token for two letters. What matters is that it is a complete
//! tokenizer.json, that any text encodes, and that ids up to the last are ordinary pieces.

use serde_json::{Map, Value, json};

/// `<unk>`, `<s>`, `</s>`, the 256 bytes and U+2581, which the decoder only finds as a piece of its own.
pub(super) const MIN_VOCAB_SIZE: u32 = 3 + 256 + 1;

/// Lower-case letters, the common ones first.
const LETTERS: &str = "etaoinshrdlucmwfgypbvkjxqz";
/// Characters that only stand alone.
const OTHERS: &str = "ETAOINSHRDLUCMWFGYPBVKJXQZ0123456789.,;:!?'\"()[]{}<>-_/\\+=*&%$#@|~^`\n";

/// Pieces in id order and merges in rank order.
#[derive(Debug)]
struct Vocabulary {
    pieces: Vec<String>,
    merges: Vec<(String, String)>,
    n_max: usize,
}

/// tokenizer.json for `vocab_size` entries, at least [`MIN_VOCAB_SIZE`].
pub(super) fn tokenizer_json(vocab_size: u32) -> Value {
    let vocabulary = Vocabulary::new(vocab_size as usize);
    let vocab: Map<String, Value> =
        vocabulary.pieces.iter().enumerate().map(|(id, piece)| (piece.clone(), id.into())).collect();
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    };
    let bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
    let first = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                { "type": "Prepend", "prepend": "▁" },
                { "type": "Replace", "pattern": { "String": " " }, "content": "▁" }
            ]
        },
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [
                bos, first,
                { "SpecialToken": { "id": "<s>", "type_id": 1 } },
                { "Sequence": { "id": "B", "type_id": 1 } }
            ],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } }
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 }
            ]
        },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": "<unk>",
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": vocabulary.merges
        }
    })
}

/// tokenizer_config.json that goes with it.
pub(super) fn tokenizer_config_json(context: u32) -> Value {
    json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": false,
        "eos_token": "</s>",
        "legacy": true,
        "model_max_length": context,
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": "<unk>"
    })
}

impl Vocabulary {
    fn new(n_max: usize) -> Self {
        let mut pieces: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
        pieces.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        let mut vocabulary = Self { pieces, merges: Vec::new(), n_max };
        vocabulary.fill();
        vocabulary
    }

    fn fill(&mut self) {
        let letters: Vec<String> = LETTERS.chars().map(String::from).collect();
        let space = "▁".to_owned();
        for single in
            std::iter::once(space.clone()).chain(letters.clone()).chain(OTHERS.chars().map(String::from))
        {
            self.push(single);
        }
        // Rank order is what BPE obeys: word starts and pairs first, then what can be built from them.
        let pairs = products(&letters, &letters);
        self.merge_all(letters.iter().map(|letter| (&space, letter)));
        self.merge_all(pairs.iter().map(|(a, b)| (a, b)));
        let doubles: Vec<String> = pairs.iter().map(|(a, b)| format!("{a}{b}")).collect();
        let starts: Vec<String> = letters.iter().map(|letter| format!("▁{letter}")).collect();
        for right in [&letters, &doubles] {
            for left in [&starts, &doubles] {
                if self.pieces.len() < self.n_max {
                    self.merge_all(products(left, right).iter().map(|(a, b)| (a, b)));
                }
            }
        }
        while self.pieces.len() < self.n_max {
            self.pieces.push(format!("<filler_{}>", self.pieces.len()));
        }
    }

    fn merge_all<'a>(&mut self, merges: impl Iterator<Item = (&'a String, &'a String)>) {
        for (left, right) in merges {
            if self.push(format!("{left}{right}")) {
                self.merges.push((left.clone(), right.clone()));
            }
        }
    }

    /// False when the vocabulary is full.
    fn push(&mut self, piece: String) -> bool {
        let fits = self.pieces.len() < self.n_max;
        if fits {
            self.pieces.push(piece);
        }
        fits
    }
}

/// All pairs, those of common parts first.
fn products(left: &[String], right: &[String]) -> Vec<(String, String)> {
    let mut ranked: Vec<(usize, usize)> =
        (0..left.len()).flat_map(|i| (0..right.len()).map(move |j| (i, j))).collect();
    ranked.sort_by_key(|&(i, j)| (i * right.len() + j * left.len(), i));
    ranked.into_iter().map(|(i, j)| (left[i].clone(), right[j].clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::Tokenizer;

    fn tokenizer(vocab_size: u32) -> Tokenizer {
        Tokenizer::from_bytes(tokenizer_json(vocab_size).to_string()).unwrap()
    }

    #[test]
    fn every_size_has_exactly_that_many_entries_and_encodes_any_text() {
        let text = "The other thing, it seems, was \u{1F980} naïve\n\n  and 42!";
        for vocab_size in [MIN_VOCAB_SIZE, 261, 300, 1000, 1088, 32_000, 600_000] {
            let tokenizer = tokenizer(vocab_size);
            assert_eq!(tokenizer.get_vocab_size(true), vocab_size as usize);
            let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
            assert_eq!(ids[0], 1);
            assert!(ids.iter().all(|&id| id < vocab_size && id != 0), "{ids:?}");
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "vocabulary of {vocab_size}");
        }
    }

    #[test]
    fn text_takes_fewer_tokens_than_characters() {
        let text = "nothing other than the thought that there are others in this house";
        let n_tokens = tokenizer(32_000).encode(text, false).unwrap().len();
        assert!(n_tokens * 2 < text.len(), "{n_tokens} tokens for {} characters", text.len());
    }
}
