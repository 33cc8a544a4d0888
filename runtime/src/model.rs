//! A mapped, validated file as typed views of its weights.

use std::path::Path;

use format_spec::{Layout, ModelConfig};

use crate::RuntimeError;

/// A mapped, validated file.
#[derive(Debug)]
pub struct Model {}

impl Model {
    /// Maps and validates `path`.
    pub fn open(path: &Path) -> Result<Self, RuntimeError> {
        let _ = path;
        todo!()
    }

    /// Dimensions and constants.
    pub fn config(&self) -> &ModelConfig {
        todo!()
    }

    /// The validated structure.
    pub fn layout(&self) -> &Layout {
        todo!()
    }

    /// The mapped bytes.
    pub fn bytes(&self) -> &[u8] {
        todo!()
    }

    /// `|W_down[:, i]|^2` for every neuron i of `layer`, `(intermediate_size,)`: what a missed row costs is
    /// `h_i^2` times it.
    pub fn down_squared_norms(&self, layer: usize) -> Vec<f64> {
        let _ = layer;
        todo!()
    }

    /// Sign words of W_gate of `layer`.
    pub fn gate_signs(&self, layer: usize) -> kernels::SignMatrix<'_> {
        let _ = layer;
        todo!()
    }

    /// The MLP's activation, as the kernels name it.
    pub fn activation(&self) -> kernels::Activation {
        todo!()
    }
}
