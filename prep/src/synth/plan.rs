//! config.json and the tensors of a checkpoint, in the order they are made.

use format_spec::Activation;
use serde_json::json;

use super::options::SynthOptions;
use super::shards::TensorPlan;

/// RoPE base.
pub(super) const ROPE_THETA: f64 = 10_000.0;
/// RMSNorm epsilon.
pub(super) const RMS_NORM_EPS: f32 = 1e-5;
/// Ids below this are special tokens and bytes.
pub(super) const BOS: u32 = 1;

impl SynthOptions {
    pub(super) fn config_json(&self, torch_dtype: &str) -> serde_json::Value {
        let fatrelu = matches!(self.activation, Activation::FatRelu { .. });
        let mut config = json!({
            "architectures": [if fatrelu { "SparseLlamaForCausalLM" } else { "LlamaForCausalLM" }],
            "model_type": if fatrelu { "sparsellama" } else { "llama" },
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": RMS_NORM_EPS as f64,
            "rope_theta": ROPE_THETA,
            "rope_scaling": null,
            "tie_word_embeddings": false,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": BOS,
            "eos_token_id": 2,
            "torch_dtype": torch_dtype,
            "synthetic": {
                "tool": concat!("prep synth ", env!("CARGO_PKG_VERSION")),
                "seed": self.seed,
                "sparsity": self.is_sparse().then_some(self.sparsity),
            }
        });
        match self.activation {
            Activation::Relu => config["hidden_act"] = json!("relu"),
            Activation::Silu => config["hidden_act"] = json!("silu"),
            Activation::FatRelu { threshold } => {
                config["hidden_act"] = json!("fatrelu");
                // Through the shortest decimal, so that 0.01 stays 0.01.
                config["hidden_act_param"] = json!(threshold.to_string().parse::<f64>().unwrap_or_default());
            }
        }
        config
    }

    /// Every tensor in the order it is made.
    pub(super) fn tensors(&self) -> Vec<TensorPlan> {
        let [d, f, v] = [self.hidden_size, self.intermediate_size, self.vocab_size].map(|n| n as usize);
        let kv = (self.num_key_value_heads * self.head_dim()) as usize;
        let mut tensors = Vec::new();
        let mut push =
            |name: String, shape: &[usize]| tensors.push(TensorPlan { name, shape: shape.to_vec() });
        push("model.embed_tokens.weight".to_owned(), &[v, d]);
        for layer in 0..self.num_hidden_layers {
            push(layer_name(layer, "input_layernorm"), &[d]);
            push(layer_name(layer, "self_attn.q_proj"), &[d, d]);
            push(layer_name(layer, "self_attn.k_proj"), &[kv, d]);
            push(layer_name(layer, "self_attn.v_proj"), &[kv, d]);
            push(layer_name(layer, "self_attn.o_proj"), &[d, d]);
            push(layer_name(layer, "post_attention_layernorm"), &[d]);
            push(layer_name(layer, "mlp.gate_proj"), &[f, d]);
            push(layer_name(layer, "mlp.up_proj"), &[f, d]);
            push(layer_name(layer, "mlp.down_proj"), &[d, f]);
        }
        push("model.norm.weight".to_owned(), &[d]);
        push("lm_head.weight".to_owned(), &[v, d]);
        tensors
    }
}

pub(super) fn layer_name(layer: u32, part: &str) -> String {
    format!("model.layers.{layer}.{part}.weight")
}
