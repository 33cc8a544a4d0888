//! Keys and values of one session: per layer `(n_kv_heads, n_positions_max, head_dim)` each, in f16, or in f32 for
//! files of f32 weights.
//!
//! All of it is asked for at the start and never grows; the system backs a page once it is written, so that a short
//! text in a long context takes the memory of a short text.

use bytemuck::zeroed_vec;
use half::f16;
use half::slice::HalfFloatSliceExt;
use kernels::{AttentionShape, Elements};

/// Keys and values of all layers.
#[derive(Debug)]
pub(crate) struct KvCache {
    shape: AttentionShape,
    layers: Vec<[Values; 2]>,
}

#[derive(Debug)]
enum Values {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl KvCache {
    /// For `n_layers` layers of `shape`; in f32 if `wide`.
    pub(crate) fn new(shape: AttentionShape, n_layers: usize, wide: bool) -> Self {
        let len = shape.n_kv_heads * shape.n_positions_max * shape.head_dim;
        // Zeroed by the system, page by page as they are used.
        let values = || if wide { Values::F32(zeroed_vec(len)) } else { Values::F16(zeroed_vec(len)) };
        Self { shape, layers: (0..n_layers).map(|_| [values(), values()]).collect() }
    }

    /// Bytes of one element.
    pub(crate) fn element_bytes(&self) -> usize {
        match self.layers.first() {
            Some([Values::F32(_), _]) => 4,
            _ => 2,
        }
    }

    /// Keys and values of `layer`.
    pub(crate) fn layer(&self, layer: usize) -> (Elements<'_>, Elements<'_>) {
        let [k, v] = &self.layers[layer];
        (k.view(), v.view())
    }

    /// Stores keys and values of consecutive positions. Shapes: `k`, `v` `(n_tokens, n_kv_heads, head_dim)`.
    pub(crate) fn store(&mut self, layer: usize, first_position: usize, k: &[f32], v: &[f32]) {
        let AttentionShape { n_kv_heads, head_dim, n_positions_max, .. } = self.shape;
        for (values, new) in self.layers[layer].iter_mut().zip([k, v]) {
            for (token, heads) in new.chunks_exact(n_kv_heads * head_dim).enumerate() {
                for (head, new) in heads.chunks_exact(head_dim).enumerate() {
                    let start = (head * n_positions_max + first_position + token) * head_dim;
                    match values {
                        Values::F16(values) => {
                            values[start..start + head_dim].convert_from_f32_slice(new);
                        }
                        Values::F32(values) => values[start..start + head_dim].copy_from_slice(new),
                    }
                }
            }
        }
    }
}

impl Values {
    fn view(&self) -> Elements<'_> {
        match self {
            Self::F16(values) => Elements::F16(values),
            Self::F32(values) => Elements::F32(values),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_lie_side_by_side_within_a_head() {
        let shape = AttentionShape { n_heads: 4, n_kv_heads: 2, head_dim: 3, n_positions_max: 5 };
        for wide in [false, true] {
            let mut cache = KvCache::new(shape, 2, wide);
            // Two positions from 1 on; the value tells token, head and column.
            let k: Vec<f32> = (0..12).map(|i| i as f32).collect();
            let v: Vec<f32> = k.iter().map(|k| 100.0 + k).collect();
            cache.store(1, 1, &k, &v);
            let (keys, values) = cache.layer(1);
            for (token, head, col) in [(0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 2)] {
                let at = (head * 5 + 1 + token) * 3 + col;
                let expected = (token * 6 + head * 3 + col) as f32;
                assert_eq!(keys.get(at), expected);
                assert_eq!(values.get(at), 100.0 + expected);
            }
            assert_eq!(keys.get(0), 0.0);
            assert_eq!(cache.layer(0).0.get(3), 0.0);
            assert_eq!(cache.element_bytes(), if wide { 4 } else { 2 });
        }
    }
}
