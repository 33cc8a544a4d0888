//! Choosing what each layer predicts with: kinds, what they cost, and how far they lead from the dense model.
//!
//! ```text
//! fit       dense pass over half of the text; for each layer and kind, rows kept and energy missed by limit
//! search    for a price of missed energy, the kind and limit of each layer that read the fewest bytes
//! measure   masked pass over the other half, or over new text: KL divergence from the dense pass, rows, energy
//! ```

mod fit;
mod histogram;
mod low_rank;
mod measure;
mod offsets;
mod planes;
mod search;

use format_spec::{PredictorKind, PredictorRecord};

pub(crate) use fit::{Fit, LayerFit};
pub(crate) use histogram::{Histogram, LimitEffect};
pub(crate) use low_rank::{Factors, LowRankSource, Residual};
pub(crate) use measure::{Masking, Measured, Reference, decoded, measure};
pub(crate) use search::{LayerSetting, Search, Setting, budgets};

/// A way to predict that `prep` can calibrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Every gate row.
    Exact,
    /// Signs of W_gate against signs of the input.
    Sign,
    /// Signs of W_gate times the input in 8 bits.
    SignX8,
    /// W_gate in 2 bits times the input in 8.
    W2,
    /// W_gate in 3 bits times the input in 8.
    W3,
    /// W_gate in low rank, f16, or an imported predictor of that form.
    LowRank,
    /// As `LowRank` with a ReLU between the factors. Only an imported one is.
    LowRankRelu,
    /// As `LowRank`, of a third of its rank, and signs of what that leaves times the input in 8 bits.
    LowRankSign,
}

impl Kind {
    /// All that can be fitted, by what they read.
    pub const ALL: [Self; 7] =
        [Self::Exact, Self::Sign, Self::SignX8, Self::LowRank, Self::LowRankSign, Self::W2, Self::W3];
    /// Those that are worth a choice: `Sign` reads what `SignX8` reads, and foretells less; those of low rank take a
    /// pass and a decomposition of their own, and read more bytes than `W2` does.
    pub const CHOICES: [Self; 4] = [Self::Exact, Self::SignX8, Self::W2, Self::W3];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Sign => "sign",
            Self::SignX8 => "sign-x8",
            Self::W2 => "w2",
            Self::W3 => "w3",
            Self::LowRank => "low-rank",
            Self::LowRankRelu => "low-rank-relu",
            Self::LowRankSign => "low-rank-sign",
        }
    }

    /// The kind of its records.
    pub(crate) fn record_kind(self) -> PredictorKind {
        match self {
            Self::Exact => PredictorKind::Off,
            Self::Sign => PredictorKind::Sign,
            Self::SignX8 => PredictorKind::SignX8,
            Self::W2 => PredictorKind::W2,
            Self::W3 => PredictorKind::W3,
            Self::LowRank => PredictorKind::LowRank,
            Self::LowRankRelu => PredictorKind::LowRankRelu,
            Self::LowRankSign => PredictorKind::LowRankSign,
        }
    }

    /// True for the kinds that skip rows of a low score.
    pub(crate) fn has_score(self) -> bool {
        self.record_kind().has_score()
    }

    /// True for the kinds whose score is made of two factors.
    pub(crate) fn has_factors(self) -> bool {
        self.record_kind().has_factors()
    }

    /// Planes of bits that it reads.
    pub(crate) fn n_planes(self) -> usize {
        self.record_kind().n_planes() as usize
    }

    /// The kind that a record names; a limit for each row counts as a limit.
    pub(crate) fn of_record(record: &PredictorRecord) -> Self {
        match record.kind {
            PredictorKind::Off => Self::Exact,
            PredictorKind::Sign | PredictorKind::SignPerRow => Self::Sign,
            PredictorKind::SignX8 => Self::SignX8,
            PredictorKind::W2 => Self::W2,
            PredictorKind::W3 => Self::W3,
            PredictorKind::LowRank => Self::LowRank,
            PredictorKind::LowRankRelu => Self::LowRankRelu,
            PredictorKind::LowRankSign => Self::LowRankSign,
        }
    }
}

/// Bytes of one layer's MLP, for shares and sums of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MlpBytes {
    /// Rows.
    pub(crate) n_rows: f64,
    /// Columns of W_gate.
    n_cols: f64,
    /// Of a row of W_gate, and of W_up and W_down each.
    pub(crate) row: f64,
    /// Of one plane of bits.
    pub(crate) plane: f64,
}

impl MlpBytes {
    pub(crate) fn new(model: &runtime::Model) -> Self {
        let config = model.config();
        let (n_rows, n_cols) = (f64::from(config.intermediate_size), f64::from(config.hidden_size));
        let row = n_cols * model.w_gate(0).data.element_bytes() as f64;
        Self { n_rows, n_cols, row, plane: n_rows * 4.0 * f64::from(config.hidden_size.div_ceil(32)) }
    }

    /// What predicting with `kind` reads; `rank` counts where it has one.
    pub(crate) fn predictor(&self, kind: Kind, rank: usize) -> f64 {
        match kind {
            Kind::Exact => 0.0,
            Kind::Sign => self.plane,
            // Planes and an offset for each row.
            Kind::SignX8 | Kind::W2 | Kind::W3 => self.plane * kind.n_planes() as f64 + 4.0 * self.n_rows,
            // Two factors in f16, and an offset for each row.
            Kind::LowRank | Kind::LowRankRelu => {
                2.0 * rank as f64 * (self.n_rows + self.n_cols) + 4.0 * self.n_rows
            }
            // Signs, and a scale for each row.
            Kind::LowRankSign => self.predictor(Kind::LowRank, rank) + self.plane + 4.0 * self.n_rows,
        }
    }

    /// Predictor and gate rows of a token, over a dense W_gate.
    pub(crate) fn gate_share(&self, kind: Kind, rank: usize, rows_kept: f64) -> f64 {
        self.predictor(kind, rank) / (self.n_rows * self.row) + rows_kept
    }

    /// Bytes of the three dense matrices.
    pub(crate) fn dense(&self) -> f64 {
        3.0 * self.n_rows * self.row
    }

    /// Everything that a token reads, over the three dense matrices.
    pub(crate) fn mlp_share(&self, kind: Kind, rank: usize, rows_kept: f64, rows_active_kept: f64) -> f64 {
        (self.gate_share(kind, rank, rows_kept) + 2.0 * rows_active_kept) / 3.0
    }
}

/// Numbers without a pattern in -1..1.
#[cfg(test)]
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}
