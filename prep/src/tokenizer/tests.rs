use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::arch::read_config;

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/relu-llama-8m")
}

/// A copy of the bundled model's small files, without the ones in `without`.
fn copy(without: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().expect("a scratch folder");
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ] {
        if !without.contains(&name) {
            fs::copy(bundled().join(name), folder.path().join(name)).expect("copied");
        }
    }
    folder
}

fn edit(folder: &TempDir, name: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.path().join(name);
    let mut value = serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
    change(&mut value);
    fs::write(path, value.to_string()).expect("written");
}

fn read(folder: &TempDir) -> Result<FolderTokenizer, PrepError> {
    let config = read_config(folder.path())?;
    read_tokenizer(folder.path(), &config)
}

#[track_caller]
fn refused(folder: &TempDir, words: &[&str]) {
    let error = read(folder).expect_err("refused").to_string();
    for word in words {
        assert!(error.contains(word), "no {word:?} in: {error}");
    }
}

#[test]
fn either_file_gives_the_same_tokenizer() {
    let both = read(&copy(&[])).expect("accepted");
    let json = read(&copy(&["tokenizer.model"])).expect("accepted");
    let model = read(&copy(&["tokenizer.json"])).expect("accepted");
    assert_eq!(json.tokenizer.merges, model.tokenizer.merges);
    assert_eq!(json.tokenizer, model.tokenizer);
    assert_eq!(both.tokenizer, model.tokenizer);
    assert_eq!(both.files.len(), 4);

    let tokenizer = model.tokenizer;
    assert_eq!(
        (tokenizer.pieces.len(), model.bos_token_id, tokenizer.unk_token_id),
        (4096, Some(1), Some(0))
    );
    assert_eq!((tokenizer.add_bos, tokenizer.add_eos), (true, false));
    assert_eq!(tokenizer.dummy_prefix, DummyPrefix::EveryStretch);
    let kinds: Vec<_> = tokenizer.pieces[..4].iter().map(|piece| piece.kind).collect();
    assert_eq!(kinds, [PieceKind::Unknown, PieceKind::Control, PieceKind::Control, PieceKind::Byte]);
    assert_eq!(tokenizer.added_tokens.iter().map(|token| token.id).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn settings_files_may_be_absent() {
    let bare = ["tokenizer_config.json", "special_tokens_map.json"];
    for without in ["tokenizer.json", "tokenizer.model"] {
        let found = read(&copy(&[bare[0], bare[1], without])).expect("accepted");
        assert_eq!(found.tokenizer, read(&copy(&[])).expect("accepted").tokenizer, "without {without}");
    }
}

#[test]
fn settings_decide_the_affixes_and_the_prefix() {
    let folder = copy(&["tokenizer.json"]);
    edit(&folder, "tokenizer_config.json", |config| {
        config["add_bos_token"] = false.into();
        config["add_eos_token"] = true.into();
        config["legacy"] = false.into();
    });
    let found = read(&folder).expect("accepted");
    assert_eq!((found.tokenizer.add_bos, found.tokenizer.add_eos, found.bos_token_id), (false, true, None));
    assert_eq!(found.tokenizer.dummy_prefix, DummyPrefix::First);
    edit(&folder, "tokenizer_config.json", |config| config["add_prefix_space"] = false.into());
    assert_eq!(read(&folder).expect("accepted").tokenizer.dummy_prefix, DummyPrefix::Never);

    // Other classes go by the post-processor.
    let folder = copy(&["tokenizer.model"]);
    edit(&folder, "tokenizer_config.json", |config| {
        config["tokenizer_class"] = "PreTrainedTokenizerFast".into();
        config.as_object_mut().expect("an object").remove("add_bos_token");
    });
    assert!(read(&folder).expect("accepted").tokenizer.add_bos);
    edit(&folder, "tokenizer.json", |json| json["post_processor"] = Value::Null);
    assert!(!read(&folder).expect("accepted").tokenizer.add_bos);
}

#[test]
fn tokens_of_the_settings_are_added() {
    let folder = copy(&["tokenizer.json"]);
    edit(&folder, "config.json", |config| config["vocab_size"] = 4098.into());
    fs::write(folder.path().join("added_tokens.json"), json!({"<pad>": 4096, "<|user|>": 4097}).to_string())
        .expect("written");
    edit(&folder, "tokenizer_config.json", |config| {
        config.as_object_mut().expect("an object").remove("added_tokens_decoder");
        config["pad_token"] = "<pad>".into();
    });
    let tokenizer = read(&folder).expect("accepted").tokenizer;
    let added: Vec<_> =
        tokenizer.added_tokens.iter().map(|t| (t.id, t.content.as_str(), t.special, t.normalized)).collect();
    assert_eq!(added[3..], [(4096, "<pad>", true, false), (4097, "<|user|>", false, true)]);
    assert_eq!(tokenizer.pieces[4097], Piece { text: "<|user|>".to_owned(), kind: PieceKind::UserDefined });

    fs::write(folder.path().join("added_tokens.json"), json!({"<pad>": 4097}).to_string()).expect("written");
    refused(&folder, &["<pad>", "id 4097", "id 4096"]);
}

#[test]
fn vocabularies_may_be_padded_but_not_of_another_model() {
    let folder = copy(&[]);
    for (vocab_size, accepted) in [(4095, false), (4160, true), (4096 + 1024, true), (32_000, false)] {
        edit(&folder, "config.json", |config| config["vocab_size"] = vocab_size.into());
        if accepted {
            assert_eq!(read(&folder).expect("accepted").tokenizer.pieces.len(), 4096);
        } else {
            refused(&folder, &["tokenizer.json", &vocab_size.to_string(), "4096"]);
        }
    }
}

#[test]
fn files_that_disagree_are_refused() {
    let folder = copy(&[]);
    edit(&folder, "tokenizer.json", |json| {
        let vocab = json["model"]["vocab"].as_object_mut().expect("an object");
        let id = vocab.remove("▁Linux").expect("a piece");
        vocab.insert("▁BSD".to_owned(), id);
        json["model"]["merges"] = json!([]);
    });
    refused(&folder, &["tokenizer.json", "▁Linux", "▁BSD", "tokenizer.model"]);
    let folder = copy(&[]);
    edit(&folder, "config.json", |config| config["bos_token_id"] = 5.into());
    refused(&folder, &["bos_token", "id 5", "id 1"]);
    edit(&folder, "config.json", |config| config["bos_token_id"] = Value::Null);
    assert_eq!(read(&folder).expect("accepted").bos_token_id, Some(1));
}

#[test]
fn affixes_need_their_tokens() {
    let folder = copy(&["tokenizer.json"]);
    edit(&folder, "tokenizer_config.json", |config| config["add_eos_token"] = true.into());
    assert!(read(&folder).expect("accepted").tokenizer.add_eos);
    edit(&folder, "config.json", |config| config["eos_token_id"] = Value::Null);
    refused(&folder, &["eos_token_id", "none in config.json"]);
    let folder = copy(&["tokenizer.json"]);
    edit(&folder, "tokenizer_config.json", |config| config["bos_token"] = "<bos>".into());
    refused(&folder, &["bos_token", "<bos>", "no such piece"]);
}

#[test]
fn other_families_are_refused_by_field() {
    type Change = fn(&mut Value);
    let cases: [(Change, &[&str]); 15] = [
        (|t| t["model"]["type"] = "Unigram".into(), &["model.type", "BPE", "Unigram"]),
        (|t| t["model"]["byte_fallback"] = false.into(), &["model.byte_fallback", "true", "false"]),
        (|t| t["model"]["ignore_merges"] = true.into(), &["model.ignore_merges", "false", "true"]),
        (|t| t["model"]["dropout"] = 0.1.into(), &["model.dropout", "0.1"]),
        (|t| t["model"]["end_of_word_suffix"] = "</w>".into(), &["end_of_word_suffix", "null", "</w>"]),
        (|t| t["model"]["unk_token"] = "<oov>".into(), &["model.unk_token", "<oov>"]),
        (|t| t["model"]["vocab"]["<0x41>"] = 4000.into(), &["model.vocab", "an id of its own"]),
        (|t| t["model"]["vocab"]["<0x41>"] = 5000.into(), &["model.vocab", "every id from 0 to 4095"]),
        (|t| t["model"]["merges"][7] = "x".into(), &["model.merges[7]", "two pieces", "\"x\""]),
        (|t| t["added_tokens"][1]["id"] = 300.into(), &["model.vocab", "<s>"]),
        (|t| t["normalizer"] = json!({"type": "NFC"}), &["normalizer", "Replace", "NFC"]),
        (|t| t["normalizer"] = Value::Null, &["pre_tokenizer", "Metaspace", "null"]),
        (|t| t["pre_tokenizer"] = json!({"type": "ByteLevel"}), &["pre_tokenizer", "null", "ByteLevel"]),
        (|t| t["decoder"]["decoders"][3]["start"] = 2.into(), &["decoder", "Strip"]),
        (|t| t["post_processor"] = json!({"type": "ByteLevel"}), &["post_processor", "ByteLevel"]),
    ];
    for (change, words) in cases {
        let folder = copy(&["tokenizer.model"]);
        edit(&folder, "tokenizer.json", change);
        refused(&folder, &[&["tokenizer.json"], words].concat());
    }
    let folder = copy(&["tokenizer.json"]);
    fs::write(folder.path().join("tokenizer.model"), "version https://git-lfs.github.com/spec/v1")
        .expect("written");
    refused(&folder, &["tokenizer.model", "SentencePiece"]);
}

#[test]
fn metaspace_says_where_the_prefix_goes() {
    for (scheme, prefix) in [("first", DummyPrefix::First), ("never", DummyPrefix::Never)] {
        let folder = copy(&["tokenizer.model"]);
        edit(&folder, "tokenizer.json", |json| {
            json["normalizer"] = Value::Null;
            json["pre_tokenizer"] =
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
            if prefix == DummyPrefix::Never {
                json["decoder"]["decoders"].as_array_mut().expect("an array").pop();
            }
        });
        assert_eq!(read(&folder).expect("accepted").tokenizer.dummy_prefix, prefix);
    }
}

#[test]
fn no_tokenizer_is_named() {
    refused(&copy(&["tokenizer.json", "tokenizer.model"]), &["tokenizer.json", "tokenizer.model"]);
}
