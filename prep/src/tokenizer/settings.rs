//! What tokenizer_config.json, special_tokens_map.json and added_tokens.json say beside the vocabulary.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use format_spec::AddedToken;
use serde_json::Value;

use crate::PrepError;
use crate::arch::{Fields, read_object};
use crate::checkpoint::exists;

/// Longest accepted file of settings; chat templates make some long.
const MAX_BYTES: u64 = 16 << 20;
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const ADDED_TOKENS: &str = "added_tokens.json";
/// Fields that name a special token, with what Llama's tokenizer class takes where nothing is said.
const SPECIAL_TOKENS: [(&str, Option<&str>); 7] = [
    ("unk_token", Some("<unk>")),
    ("bos_token", Some("<s>")),
    ("eos_token", Some("</s>")),
    ("pad_token", None),
    ("sep_token", None),
    ("cls_token", None),
    ("mask_token", None),
];

/// Settings of a model folder, as transformers reads them.
#[derive(Debug)]
pub(super) struct Settings {
    /// The files that are there.
    pub(super) files: Vec<PathBuf>,
    /// `tokenizer_class` is one of Llama's, or not said: transformers then goes by the model type.
    pub(super) is_llama_class: bool,
    pub(super) add_bos: Option<bool>,
    pub(super) add_eos: Option<bool>,
    /// False: the dummy prefix goes before the first stretch only.
    pub(super) legacy: bool,
    pub(super) add_prefix_space: bool,
    /// Spelling of the beginning-of-sequence token.
    pub(super) bos: Option<String>,
    /// Tokens at stated ids, by id.
    pub(super) numbered: BTreeMap<u32, AddedToken>,
    /// Special tokens by their spelling alone; their `id` says nothing.
    pub(super) special: Vec<AddedToken>,
}

impl Settings {
    /// Reads the files that are there; none has to be.
    ///
    /// # Errors
    /// A file that is no JSON object, or a field of another type than transformers writes.
    pub(super) fn read(folder: &Path) -> Result<Self, PrepError> {
        let mut files = Vec::new();
        let mut read = |name: &str| -> Result<_, PrepError> {
            let path = folder.join(name);
            let map = if exists(&path)? { Some(read_object(&path, MAX_BYTES)?) } else { None };
            files.extend(map.is_some().then(|| path.clone()));
            Ok((path, map.unwrap_or_default()))
        };
        let (config_path, config) = read(TOKENIZER_CONFIG)?;
        let (map_path, special_map) = read(SPECIAL_TOKENS_MAP)?;
        let (added_path, added) = read(ADDED_TOKENS)?;
        let config = Fields::top(&config_path, &config);
        let special_map = Fields::top(&map_path, &special_map);
        let added = Fields::top(&added_path, &added);

        let is_llama_class = match config.get("tokenizer_class") {
            None => true,
            Some(_) => ["LlamaTokenizer", "LlamaTokenizerFast"].contains(&config.text("tokenizer_class")?),
        };
        let special = special_tokens(&config, &special_map, is_llama_class)?;
        let bos =
            special.iter().find(|(name, _)| *name == "bos_token").map(|(_, token)| token.content.clone());
        let special: Vec<AddedToken> = special.into_iter().map(|(_, token)| token).collect();
        Ok(Self {
            is_llama_class,
            add_bos: config.flag("add_bos_token")?,
            add_eos: config.flag("add_eos_token")?,
            legacy: config.flag("legacy")?.unwrap_or(true),
            add_prefix_space: config.flag("add_prefix_space")?.unwrap_or(true),
            bos,
            numbered: numbered_tokens(&config, &added, &special)?,
            special,
            files,
        })
    }
}

/// A token as an object with its matching rules; `id` is the caller's.
pub(super) fn added_token(fields: &Fields<'_>, id: u32, special: bool) -> Result<AddedToken, PrepError> {
    let flag = |name: &str| Ok::<_, PrepError>(fields.flag(name)?.unwrap_or(false));
    Ok(AddedToken {
        id,
        content: fields.text("content")?.to_owned(),
        special,
        single_word: flag("single_word")?,
        lstrip: flag("lstrip")?,
        rstrip: flag("rstrip")?,
        normalized: flag("normalized")?,
    })
}

/// Special tokens by the field that names them; tokenizer_config.json goes before special_tokens_map.json.
fn special_tokens<'n>(
    config: &Fields<'_>,
    map: &Fields<'_>,
    is_llama_class: bool,
) -> Result<Vec<(&'n str, AddedToken)>, PrepError> {
    let mut tokens = Vec::new();
    for (name, default) in SPECIAL_TOKENS {
        let fields = if config.get(name).is_some() { config } else { map };
        let token = match fields.get(name) {
            None => match default.filter(|_| is_llama_class) {
                Some(content) => plain_special(content),
                None => continue,
            },
            Some(Value::String(content)) => plain_special(content),
            Some(Value::Object(_)) => {
                let token = fields.object(name)?.expect("it is an object");
                added_token(&token, 0, true)?
            }
            Some(_) => return Err(fields.refused(name, "a string or an object", None)),
        };
        tokens.push((name, token));
    }
    const ADDITIONAL: &str = "additional_special_tokens";
    for fields in [config, map] {
        let Some(Value::Array(values)) = fields.get(ADDITIONAL) else { continue };
        for content in values.iter().filter_map(|value| match value {
            Value::String(content) => Some(content.as_str()),
            value => value.get("content").and_then(Value::as_str),
        }) {
            tokens.push((ADDITIONAL, plain_special(content)));
        }
    }
    Ok(tokens)
}

/// `added_tokens_decoder` of tokenizer_config.json; in older folders added_tokens.json, spelling to id.
fn numbered_tokens(
    config: &Fields<'_>,
    added: &Fields<'_>,
    special: &[AddedToken],
) -> Result<BTreeMap<u32, AddedToken>, PrepError> {
    const DECODER: &str = "added_tokens_decoder";
    let mut tokens = BTreeMap::new();
    if let Some(decoder) = config.object(DECODER)? {
        for id in decoder.names() {
            let number: u32 =
                id.parse().map_err(|_| config.refused(DECODER, "token ids as the names", None))?;
            let token = decoder
                .object(id)?
                .ok_or_else(|| decoder.refused(id, "an object with the token's content", None))?;
            let is_special = token.flag("special")?.unwrap_or(false);
            tokens.insert(number, added_token(&token, number, is_special)?);
        }
        return Ok(tokens);
    }
    for content in added.names() {
        let id = added.get(content).unwrap_or(&Value::Null);
        let id = added.token_id(content, id)?;
        let is_special = special.iter().any(|token| token.content == *content);
        let token = AddedToken { id, special: is_special, normalized: !is_special, ..plain_special(content) };
        tokens.insert(id, token);
    }
    Ok(tokens)
}

fn plain_special(content: &str) -> AddedToken {
    AddedToken {
        id: 0,
        content: content.to_owned(),
        special: true,
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
    }
}
