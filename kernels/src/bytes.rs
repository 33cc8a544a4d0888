//! Bytes that each operation has to move, for benches and statistics: every weight that the operation uses, once.
//!
//! Vectors (activations, outputs) stay in cache from one operation to the next and are not counted.

use crate::{AttentionShape, Limits, Matrix, MlpAudit, MlpCounts, MlpWeights, Rows, Thresholds};

/// All of `w`: a product with it, the lm_head among them.
pub fn matrix(w: &Matrix<'_>) -> u64 {
    rows(w, w.n_rows)
}

/// What one MLP call reads, by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MlpBytes {
    /// Choosing the rows.
    pub predictor: u64,
    /// Rows of W_gate.
    pub gate: u64,
    /// Rows of W_up.
    pub up: u64,
    /// Rows of W_down, transposed.
    pub down: u64,
}

impl MlpBytes {
    /// Of a call that reads `rows` of `w` and returned `counts`.
    pub fn new(w: &MlpWeights<'_>, rows: &Rows<'_>, counts: &MlpCounts) -> Self {
        let (n_kept, n_active) = match rows {
            Rows::All => (w.gate.n_rows, w.up.n_rows),
            Rows::Active => (w.gate.n_rows, counts.n_active),
            Rows::Predicted { .. } | Rows::Scored { .. } | Rows::LowRank { .. } => {
                (counts.n_kept, counts.n_active)
            }
        };
        Self {
            predictor: predictor(rows),
            gate: self::rows(&w.gate, n_kept),
            up: self::rows(&w.up, n_active),
            down: self::rows(&w.down_t, n_active),
        }
    }

    /// All parts.
    pub fn sum(&self) -> u64 {
        self.predictor + self.gate + self.up + self.down
    }
}

/// What one MLP call reads of `w` and of the predictor, given the `counts` that it returned.
pub fn mlp(w: &MlpWeights<'_>, rows: &Rows<'_>, counts: &MlpCounts) -> u64 {
    MlpBytes::new(w, rows, counts).sum()
}

/// What an audit of an MLP call reads of `w` beside what the call itself reads.
pub fn audit(w: &MlpWeights<'_>, audit: &MlpAudit) -> u64 {
    rows(&w.gate, audit.n_skipped) + rows(&w.up, audit.n_missed) + rows(&w.down_t, audit.n_missed)
}

/// What choosing the rows reads.
pub fn predictor(rows: &Rows<'_>) -> u64 {
    let bytes = match rows {
        Rows::All | Rows::Active => 0,
        Rows::Predicted { signs, limits } => {
            size_of_val(signs.words)
                + match limits {
                    Limits::Layer(_) => 0,
                    Limits::PerRow(limits) => size_of_val(*limits),
                }
        }
        Rows::Scored { planes, thresholds } => {
            size_of_val(planes.signs.words) + size_of_val(planes.low) + self::thresholds(thresholds)
        }
        Rows::LowRank { factors, thresholds } => {
            let residual = factors
                .residual
                .map_or(0, |residual| size_of_val(residual.signs.words) + size_of_val(residual.scales));
            let bytes = residual + self::thresholds(thresholds);
            return matrix(&factors.fc1) + matrix(&factors.fc2) + bytes as u64;
        }
    };
    bytes as u64
}

/// Keys and values of `n_positions` positions of one layer.
pub fn kv(shape: &AttentionShape, element_bytes: usize, n_positions: usize) -> u64 {
    (2 * shape.n_kv_heads * shape.head_dim * element_bytes) as u64 * n_positions as u64
}

/// Those that rows have of their own.
fn thresholds(thresholds: &Thresholds<'_>) -> usize {
    match thresholds {
        Thresholds::Layer(_) => 0,
        Thresholds::PerRow(thresholds) => size_of_val(*thresholds),
    }
}

/// `n_rows` rows of `w`.
fn rows(w: &Matrix<'_>, n_rows: usize) -> u64 {
    n_rows as u64 * w.n_cols as u64 * w.data.element_bytes() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BitPlanes, Elements, LowRank, Residual, SignMatrix};

    #[test]
    fn an_mlp_moves_the_rows_it_counts() {
        let gate_bytes = [half::f16::ZERO; 7 * 40];
        let down = [0.0f32; 7 * 40];
        let gate = Matrix { data: Elements::F16(&gate_bytes), n_rows: 7, n_cols: 40 };
        let down_t = Matrix { data: Elements::F32(&down), n_rows: 7, n_cols: 40 };
        let w = MlpWeights { gate, up: gate, down_t };
        let counts = MlpCounts { n_kept: 5, n_active: 3 };
        assert_eq!(matrix(&w.gate), 560);
        assert_eq!(mlp(&w, &Rows::All, &counts), 560 + 560 + 1_120);
        assert_eq!(mlp(&w, &Rows::Active, &counts), 560 + 3 * (80 + 160));
        let signs = SignMatrix { words: &[0; 14], n_rows: 7, n_words: 2 };
        let layer = Rows::Predicted { signs, limits: Limits::Layer(20) };
        let parts = MlpBytes { predictor: 56, gate: 5 * 80, up: 3 * 80, down: 3 * 160 };
        assert_eq!(MlpBytes::new(&w, &layer, &counts), parts);
        assert_eq!(mlp(&w, &layer, &counts), 56 + 5 * 80 + 3 * (80 + 160));
        let per_row = Rows::Predicted { signs, limits: Limits::PerRow(&[0; 7]) };
        assert_eq!(mlp(&w, &per_row, &counts), 28 + 56 + 5 * 80 + 3 * (80 + 160));
        let planes = BitPlanes { signs, low: &[0; 28] };
        assert_eq!(planes.n_planes(), 3);
        let layer = Rows::Scored { planes, thresholds: Thresholds::Layer(0.0) };
        assert_eq!(mlp(&w, &layer, &counts), 3 * 56 + 5 * 80 + 3 * (80 + 160));
        let per_row = Rows::Scored { planes, thresholds: Thresholds::PerRow(&[0.0; 7]) };
        assert_eq!(predictor(&per_row), 28 + 3 * 56);
        let fc1 = Matrix { n_rows: 3, data: Elements::F16(&gate_bytes[..3 * 40]), ..gate };
        let fc2 = Matrix { data: Elements::F16(&gate_bytes[..7 * 3]), n_rows: 7, n_cols: 3 };
        let factors = LowRank { fc1, fc2, relu: true, residual: None };
        let low_rank = Rows::LowRank { factors, thresholds: Thresholds::PerRow(&[0.0; 7]) };
        assert_eq!(predictor(&low_rank), 2 * (3 * 40 + 7 * 3) + 28);
        let residual = Some(Residual { signs, scales: &[0.0; 7] });
        let with_signs = LowRank { residual, ..factors };
        let with_signs = Rows::LowRank { factors: with_signs, thresholds: Thresholds::PerRow(&[0.0; 7]) };
        assert_eq!(predictor(&with_signs), predictor(&low_rank) + 56 + 28);
        assert_eq!(mlp(&w, &low_rank, &counts), predictor(&low_rank) + 5 * 80 + 3 * (80 + 160));
        let found = MlpAudit { n_skipped: 2, n_missed: 1, ..MlpAudit::default() };
        assert_eq!(audit(&w, &found), 2 * 80 + 80 + 160);
    }

    #[test]
    fn a_cache_is_read_once_for_all_query_heads() {
        let shape = AttentionShape { n_heads: 8, n_kv_heads: 2, head_dim: 16, n_positions_max: 100 };
        assert_eq!(kv(&shape, 2, 10), 2 * 2 * 16 * 2 * 10);
    }
}
