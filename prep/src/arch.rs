//! Which models are accepted: `config.json` becomes a [`ModelConfig`], and a [`ModelConfig`] the list of tensors that
//! its checkpoint must hold.
//!
//! Everything that changes the mathematics and is not known here is refused by name, never guessed. Fields that only
//! concern training or saving are left alone.

use std::path::{Path, PathBuf};

use format_spec::{Activation, ModelConfig, Rope, RopeScaling, SectionKind};
use serde_json::{Map, Value};

use crate::PrepError;
use crate::checkpoint::{exists, read_small};

/// Name of the configuration in the model folder.
pub const CONFIG_FILE: &str = "config.json";
/// Longest accepted config.json.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Largest width or count; with it no product of two overflows.
const MAX_DIMENSION: u64 = 1 << 24;
/// Most decoder layers; the deepest published models have a few hundred.
const MAX_LAYERS: u64 = 4096;
/// RoPE base where the configuration names none (transformers' LlamaConfig).
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// Fields that change the result of a Llama, with the one value that is understood.
const PLAIN_ONLY: [(&str, PlainValue); 6] = [
    ("attention_bias", PlainValue::False),
    ("mlp_bias", PlainValue::False),
    ("partial_rotary_factor", PlainValue::One),
    ("quantization_config", PlainValue::Null),
    ("compression_config", PlainValue::Null),
    ("sliding_window", PlainValue::Null),
];

/// What a field must be if it is there and not null.
#[derive(Clone, Copy)]
enum PlainValue {
    False,
    One,
    Null,
}

/// A tensor of the checkpoint and the section that it becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorName {
    /// The section. `WDownT` is stored transposed against the checkpoint.
    pub kind: SectionKind,
    /// Decoder layer, for the per-layer kinds.
    pub layer: Option<u32>,
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint, row-major.
    pub shape: Vec<u64>,
}

/// Reads `config.json` of a model folder.
///
/// # Errors
/// Any model that is not a Llama with a known activation and plain RoPE, naming the field.
pub fn read_config(folder: &Path) -> Result<ModelConfig, PrepError> {
    let path = folder.join(CONFIG_FILE);
    if folder.is_dir() && !exists(&path)? {
        return Err(PrepError::FileMissing {
            folder: folder.to_owned(),
            expected: CONFIG_FILE,
            found: "no such file".to_owned(),
        });
    }
    let map = read_object(&path, MAX_CONFIG_BYTES)?;
    parse(&Fields::top(&path, &map))
}

/// Reads a file that holds one JSON object.
pub(crate) fn read_object(path: &Path, max_bytes: u64) -> Result<Map<String, Value>, PrepError> {
    let bytes = read_small(path, max_bytes)?;
    serde_json::from_slice(&bytes).map_err(|error| PrepError::Syntax {
        path: path.to_owned(),
        expected: "a JSON object",
        found: error.to_string(),
    })
}

/// The tensors of a Llama's checkpoint in the order of the file's sections. lm_head is left out when tied.
pub fn tensors(config: &ModelConfig) -> Vec<TensorName> {
    let d = u64::from(config.hidden_size);
    let f = u64::from(config.intermediate_size);
    let q = u64::from(config.num_attention_heads) * u64::from(config.head_dim);
    let kv = u64::from(config.num_key_value_heads) * u64::from(config.head_dim);
    let vocab = u64::from(config.vocab_size);
    let model = |kind, name: &str, shape: &[u64]| TensorName {
        kind,
        layer: None,
        name: name.to_owned(),
        shape: shape.to_vec(),
    };
    let per_layer: [(SectionKind, &str, &[u64]); 9] = [
        (SectionKind::AttnNorm, "input_layernorm", &[d]),
        (SectionKind::WQ, "self_attn.q_proj", &[q, d]),
        (SectionKind::WK, "self_attn.k_proj", &[kv, d]),
        (SectionKind::WV, "self_attn.v_proj", &[kv, d]),
        (SectionKind::WO, "self_attn.o_proj", &[d, q]),
        (SectionKind::MlpNorm, "post_attention_layernorm", &[d]),
        (SectionKind::WGate, "mlp.gate_proj", &[f, d]),
        (SectionKind::WUp, "mlp.up_proj", &[f, d]),
        (SectionKind::WDownT, "mlp.down_proj", &[d, f]),
    ];
    let mut tensors = vec![model(SectionKind::Embedding, "model.embed_tokens.weight", &[vocab, d])];
    for layer in 0..config.num_hidden_layers {
        tensors.extend(per_layer.iter().map(|&(kind, name, shape)| TensorName {
            kind,
            layer: Some(layer),
            name: format!("model.layers.{layer}.{name}.weight"),
            shape: shape.to_vec(),
        }));
    }
    tensors.push(model(SectionKind::FinalNorm, "model.norm.weight", &[d]));
    if !config.tie_word_embeddings {
        tensors.push(model(SectionKind::LmHead, LM_HEAD, &[vocab, d]));
    }
    tensors
}

/// The one tensor whose presence depends on `tie_word_embeddings`.
pub(crate) const LM_HEAD: &str = "lm_head.weight";

fn parse(fields: &Fields<'_>) -> Result<ModelConfig, PrepError> {
    let model_type = fields.text("model_type")?;
    if !["llama", "sparsellama"].contains(&model_type) {
        return Err(fields.refused("model_type", "\"llama\" or \"sparsellama\"", MODEL_TYPE_HINT));
    }
    for (name, plain) in PLAIN_ONLY {
        let Some(value) = fields.get(name) else { continue };
        let (accepted, expected) = match plain {
            PlainValue::False => (value == &Value::Bool(false), "false"),
            PlainValue::One => (value.as_f64() == Some(1.0), "1"),
            PlainValue::Null => (false, "null"),
        };
        if !accepted {
            return Err(fields.refused(name, expected, None));
        }
    }

    let hidden_size = fields.dimension("hidden_size", MAX_DIMENSION)?;
    let num_attention_heads = fields.dimension("num_attention_heads", MAX_DIMENSION)?;
    let num_key_value_heads = match fields.get("num_key_value_heads") {
        Some(_) => fields.dimension("num_key_value_heads", MAX_DIMENSION)?,
        None => num_attention_heads,
    };
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let expected = format!("a divisor of the {num_attention_heads} num_attention_heads");
        return Err(fields.refused("num_key_value_heads", &expected, None));
    }
    let head_dim = match fields.get("head_dim") {
        Some(_) => fields.dimension("head_dim", MAX_DIMENSION)?,
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => {
            let expected = format!("a divisor of the hidden_size {hidden_size}, as there is no head_dim");
            return Err(fields.refused("num_attention_heads", &expected, None));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(PrepError::Field {
            path: fields.path.to_owned(),
            field: "head_dim".to_owned(),
            expected: "an even number, as RoPE rotates pairs".to_owned(),
            found: head_dim.to_string(),
            hint: None,
        });
    }
    let vocab_size = fields.dimension("vocab_size", MAX_DIMENSION)?;
    let config = ModelConfig {
        hidden_size,
        intermediate_size: fields.dimension("intermediate_size", MAX_DIMENSION)?,
        num_hidden_layers: fields.dimension("num_hidden_layers", MAX_LAYERS)?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        vocab_size,
        max_position_embeddings: fields.dimension("max_position_embeddings", MAX_DIMENSION)?,
        rms_norm_eps: fields.number("rms_norm_eps", "a finite number above 0", |eps| {
            eps as f32 > 0.0 && (eps as f32).is_finite()
        })? as f32,
        activation: activation(fields)?,
        rope: rope(fields)?,
        tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        bos_token_id: match fields.map.get("bos_token_id") {
            None => Some(1),
            Some(Value::Null) => None,
            Some(id) => Some(fields.token_id("bos_token_id", id)?),
        },
        eos_token_ids: match fields.map.get("eos_token_id") {
            None => vec![2],
            Some(Value::Null) => Vec::new(),
            Some(Value::Array(ids)) => {
                ids.iter().map(|id| fields.token_id("eos_token_id", id)).collect::<Result<_, _>>()?
            }
            Some(id) => vec![fields.token_id("eos_token_id", id)?],
        },
    };
    if config.eos_token_ids.len() > ModelConfig::MAX_EOS {
        let expected = format!("at most {} ids", ModelConfig::MAX_EOS);
        return Err(fields.refused("eos_token_id", &expected, None));
    }
    let ids = config.bos_token_id.iter().map(|id| ("bos_token_id", id));
    for (name, &id) in ids.chain(config.eos_token_ids.iter().map(|id| ("eos_token_id", id))) {
        if id >= vocab_size {
            let expected = format!("an id below the vocab_size {vocab_size}");
            return Err(fields.refused(name, &expected, None));
        }
    }
    Ok(config)
}

const MODEL_TYPE_HINT: Option<&str> =
    Some("only Llama checkpoints are converted; other architectures compute something else");

fn activation(fields: &Fields<'_>) -> Result<Activation, PrepError> {
    const PARAM: &str = "hidden_act_param";
    let activation = match fields.text("hidden_act")? {
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        "fatrelu" => {
            let threshold =
                fields.number(PARAM, "the threshold of fatrelu, a finite number of at least 0", |value| {
                    value >= 0.0 && (value as f32).is_finite()
                })? as f32;
            // -0 and 0 are one threshold; the format knows the positive one.
            return Ok(Activation::FatRelu { threshold: threshold.abs() });
        }
        _ => {
            let hint =
                Some("the activation decides what is sparse; an unknown one is never replaced by another");
            return Err(fields.refused("hidden_act", "\"relu\", \"fatrelu\" or \"silu\"", hint));
        }
    };
    match fields.get(PARAM) {
        Some(value) if value.as_f64() != Some(0.0) => {
            Err(fields.refused(PARAM, "null or 0, as hidden_act is not fatrelu", None))
        }
        _ => Ok(activation),
    }
}

/// `rope_theta` and `rope_scaling`, or both inside `rope_parameters` (transformers 5).
fn rope(fields: &Fields<'_>) -> Result<Rope, PrepError> {
    let nested = match (fields.object("rope_parameters")?, fields.object("rope_scaling")?) {
        (Some(_), Some(_)) => {
            return Err(fields.refused("rope_scaling", "null, as rope_parameters is there", None));
        }
        (parameters, scaling) => parameters.or(scaling),
    };
    let outer = fields.get("rope_theta").map(|_| fields.theta()).transpose()?;
    let Some(nested) = nested else {
        return Ok(Rope { theta: outer.unwrap_or(DEFAULT_ROPE_THETA), scaling: RopeScaling::None });
    };

    let inner = nested.get("rope_theta").map(|_| nested.theta()).transpose()?;
    if let (Some(outer), Some(inner)) = (outer, inner)
        && outer != inner
    {
        return Err(nested.refused("rope_theta", &format!("{outer} as in rope_theta outside"), None));
    }
    let mut rope_type = None;
    for name in ["rope_type", "type"] {
        if nested.get(name).is_none() {
            continue;
        }
        let found = nested.text(name)?;
        if !["default", "linear"].contains(&found) || rope_type.is_some_and(|first| first != found) {
            return Err(nested.refused(name, "\"default\" or \"linear\"", None));
        }
        rope_type = Some(found);
    }
    let known: &[&str] = match rope_type {
        None => {
            return Err(nested.refused("rope_type", "\"default\" or \"linear\"", None));
        }
        Some("linear") => &["rope_type", "type", "rope_theta", "factor"],
        Some(_) => &["rope_type", "type", "rope_theta"],
    };
    let plain = |name: &str, value: &Value| {
        value.is_null() || (name == "partial_rotary_factor" && value.as_f64() == Some(1.0))
    };
    for (name, value) in nested.map {
        if !known.contains(&name.as_str()) && !plain(name, value) {
            return Err(nested.refused(name, "no such field for this rope_type", None));
        }
    }
    let scaling = match rope_type {
        Some("linear") => RopeScaling::Linear {
            factor: nested.number("factor", "a finite number of at least 1", |factor| factor >= 1.0)?,
        },
        _ => RopeScaling::None,
    };
    Ok(Rope { theta: inner.or(outer).unwrap_or(DEFAULT_ROPE_THETA), scaling })
}

/// A JSON object of a file; null counts as absent.
pub(crate) struct Fields<'a> {
    path: &'a Path,
    /// Name of the object inside the file; empty at the top.
    parent: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The object that is the whole file.
    pub(crate) fn top(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { path, parent: String::new(), map }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn text(&self, name: &str) -> Result<&'a str, PrepError> {
        self.get(name).and_then(Value::as_str).ok_or_else(|| self.refused(name, "a string", None))
    }

    fn number(&self, name: &str, expected: &str, accept: impl Fn(f64) -> bool) -> Result<f64, PrepError> {
        let number =
            self.get(name).and_then(Value::as_f64).filter(|value| value.is_finite() && accept(*value));
        number.ok_or_else(|| self.refused(name, expected, None))
    }

    fn theta(&self) -> Result<f64, PrepError> {
        self.number("rope_theta", "a finite number above 0", |theta| theta > 0.0)
    }

    fn dimension(&self, name: &str, max: u64) -> Result<u32, PrepError> {
        let number = self.get(name).and_then(Value::as_u64).filter(|value| (1..=max).contains(value));
        match number {
            Some(number) => Ok(number as u32),
            None => Err(self.refused(name, &format!("a whole number from 1 to {max}"), None)),
        }
    }

    pub(crate) fn token_id(&self, name: &str, value: &Value) -> Result<u32, PrepError> {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| self.refused(name, "token ids", None))
    }

    /// A field that is true, false, or absent.
    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, PrepError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.refused(name, "true or false", None)),
        }
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, PrepError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { path: self.path, parent: self.name_of(name), map })),
            Some(_) => Err(self.refused(name, "null or an object", None)),
        }
    }

    /// The objects of an array; none if it is absent.
    pub(crate) fn objects(&self, name: &str) -> Result<Vec<Fields<'a>>, PrepError> {
        let values = match self.get(name) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values,
            Some(_) => return Err(self.refused(name, "an array of objects", None)),
        };
        let objects = values.iter().enumerate().map(|(idx, value)| match value {
            Value::Object(map) => {
                Ok(Fields { path: self.path, parent: self.name_of(&format!("{name}[{idx}]")), map })
            }
            _ => Err(self.refused(name, "an array of objects", None)),
        });
        objects.collect()
    }

    /// Names of the fields.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a String> {
        self.map.keys()
    }

    pub(crate) fn refused(&self, name: &str, expected: &str, hint: Option<&'static str>) -> PrepError {
        let found = self.map.get(name).map_or_else(|| "no such field".to_owned(), shorten);
        PrepError::Field {
            path: PathBuf::from(self.path),
            field: self.name_of(name),
            expected: expected.to_owned(),
            found,
            hint,
        }
    }

    /// A field's name with its parents.
    fn name_of(&self, name: &str) -> String {
        if self.parent.is_empty() { name.to_owned() } else { format!("{}.{name}", self.parent) }
    }
}

/// A JSON value for a message, cut where it would fill the screen.
pub(crate) fn shorten(value: &Value) -> String {
    const MAX_CHARS: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "model_type": "llama", "hidden_act": "relu", "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5, "pretraining_tp": 2, "use_cache": true, "rope_scaling": null,
        })
    }

    fn read(change: Value) -> Result<ModelConfig, String> {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let mut config = base();
        for (name, value) in change.as_object().expect("an object") {
            config[name] = value.clone();
        }
        std::fs::write(folder.path().join(CONFIG_FILE), config.to_string()).expect("written");
        read_config(folder.path()).map_err(|error| {
            let text = error.to_string();
            assert!(text.contains("config.json"), "{text}");
            text
        })
    }

    #[test]
    fn defaults_are_those_of_llama() {
        let config = read(json!({})).expect("accepted");
        assert_eq!((config.num_key_value_heads, config.head_dim), (4, 16));
        assert_eq!(config.rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
        assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
        assert!(!config.tie_word_embeddings);
    }

    #[test]
    fn every_accepted_variant_is_understood() {
        let config = read(json!({
            "model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.01,
            "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": true,
            "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0},
            "bos_token_id": null, "eos_token_id": [2, 3, 4],
        }))
        .expect("accepted");
        assert_eq!(config.activation, Activation::FatRelu { threshold: 0.01 });
        assert_eq!((config.num_key_value_heads, config.head_dim), (2, 32));
        assert_eq!(config.rope, Rope { theta: 5e5, scaling: RopeScaling::Linear { factor: 2.0 } });
        assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2, 3, 4]));

        let new_style = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}});
        assert_eq!(
            read(new_style).expect("accepted").rope,
            Rope { theta: 777.0, scaling: RopeScaling::None }
        );
        assert_eq!(read(json!({"hidden_act": "silu"})).expect("accepted").activation, Activation::Silu);
        let zero = read(json!({"hidden_act": "fatrelu", "hidden_act_param": -0.0})).expect("accepted");
        let Activation::FatRelu { threshold } = zero.activation else { panic!("{:?}", zero.activation) };
        assert_eq!(threshold.to_bits(), 0);
    }

    #[test]
    fn refusals_name_field_expected_and_found() {
        let cases = [
            (json!({"model_type": "mixtral"}), ["model_type", "llama", "mixtral"]),
            (json!({"hidden_act": "gelu"}), ["hidden_act", "relu", "gelu"]),
            (json!({"hidden_act": "fatrelu"}), ["hidden_act_param", "threshold", "no such field"]),
            (
                json!({"hidden_act": "fatrelu", "hidden_act_param": -0.5}),
                ["hidden_act_param", "at least 0", "-0.5"],
            ),
            (json!({"hidden_act_param": 0.01}), ["hidden_act_param", "not fatrelu", "0.01"]),
            (json!({"attention_bias": true}), ["attention_bias", "false", "true"]),
            (json!({"mlp_bias": true}), ["mlp_bias", "false", "true"]),
            (json!({"quantization_config": {"bits": 4}}), ["quantization_config", "null", "bits"]),
            (json!({"hidden_size": 0}), ["hidden_size", "from 1", "0"]),
            (json!({"hidden_size": 64.5}), ["hidden_size", "whole", "64.5"]),
            (json!({"hidden_size": 66}), ["num_attention_heads", "66", "4"]),
            (json!({"hidden_size": 20}), ["head_dim", "even", "5"]),
            (json!({"num_hidden_layers": 1_000_000}), ["num_hidden_layers", "4096", "1000000"]),
            (json!({"num_key_value_heads": 3}), ["num_key_value_heads", "divisor", "3"]),
            (json!({"rms_norm_eps": 0}), ["rms_norm_eps", "above 0", "0"]),
            (json!({"rope_theta": -1}), ["rope_theta", "above 0", "-1"]),
            (json!({"rope_scaling": {"rope_type": "yarn"}}), ["rope_scaling.rope_type", "linear", "yarn"]),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 0.5}}),
                ["rope_scaling.factor", "at least 1", "0.5"],
            ),
            (
                json!({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 32}}),
                ["rope_scaling.beta_fast", "no such", "32"],
            ),
            (
                json!({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}}),
                ["rope_parameters.rope_theta", "5", "6"],
            ),
            (json!({"eos_token_id": 300}), ["eos_token_id", "300", "found 300"]),
            (json!({"bos_token_id": -1}), ["bos_token_id", "token ids", "-1"]),
            (json!({"eos_token_id": [2, 3, 4, 5, 6]}), ["eos_token_id", "at most 4", "[2,3,4,5,6]"]),
        ];
        for (change, words) in cases {
            let error = read(change.clone()).expect_err("refused");
            for word in words {
                assert!(error.contains(word), "{change}: no {word:?} in: {error}");
            }
        }
    }

    #[test]
    fn tensors_follow_the_order_of_sections() {
        let mut config = read(json!({"num_key_value_heads": 2})).expect("accepted");
        let untied = tensors(&config);
        assert_eq!(untied.len(), 3 + 2 * 9);
        let places: Vec<_> = untied.iter().map(|tensor| (tensor.layer, tensor.name.as_str())).collect();
        assert_eq!(places[0], (None, "model.embed_tokens.weight"));
        assert_eq!(places[10], (Some(1), "model.layers.1.input_layernorm.weight"));
        assert_eq!(places[20], (None, LM_HEAD));
        assert_eq!((untied[3].kind, untied[3].shape.as_slice()), (SectionKind::WK, &[32, 64][..]));
        assert_eq!((untied[9].kind, untied[9].shape.as_slice()), (SectionKind::WDownT, &[64, 160][..]));
        config.tie_word_embeddings = true;
        assert_eq!(tensors(&config), untied[..20]);
    }
}
