//! What was made, for people and for programs.

use std::io::Write;

use serde::Serialize;

use crate::predict::Histogram;

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct SynthReport {
    /// Weights.
    pub n_parameters: u64,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Safetensors files, with the index if there is one.
    pub n_files: usize,
    /// Wall time.
    pub seconds: f64,
    /// Weights written a second, MB (10^6).
    pub mb_per_s: f64,
    /// Share of zeros asked for; none with silu.
    pub sparsity: Option<f64>,
    /// Fresh tokens behind the figures of each layer.
    pub n_tokens: usize,
    /// One for each layer.
    pub layers: Vec<LayerReport>,
}

/// What a layer shows on fresh tokens.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Layer.
    pub layer: u32,
    /// Share of zeros measured.
    pub sparsity: f64,
    /// Square of the mean MLP input over the mean square of the inputs: what all tokens share.
    pub mean_share: f64,
    /// Root mean square of the residual stream after the layer.
    pub residual_rms: f64,
    /// What a limit on sign disagreements would do; none with silu.
    pub sign_rule: Vec<SignRulePoint>,
}

/// One limit of the sign rule.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SignRulePoint {
    /// Limit on n_neg.
    pub limit: u32,
    /// Share of rows kept.
    pub rows_kept: f64,
    /// Share of active rows kept.
    pub recall: f64,
    /// Share of output energy missed.
    pub missed_energy: f64,
}

impl SynthReport {
    /// The report for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_text(&self, out: &mut dyn Write) -> std::io::Result<()> {
        writeln!(
            out,
            "{:.2} G parameters, {:.2} GB in {} files, {:.1} s ({:.0} MB/s)",
            self.n_parameters as f64 / 1e9,
            self.weight_bytes as f64 / 1e9,
            self.n_files,
            self.seconds,
            self.mb_per_s
        )?;
        writeln!(out, "measured on {} fresh tokens:", self.n_tokens)?;
        write!(out, "layer  zeros   mean  residual")?;
        if self.sparsity.is_some() {
            write!(out, "   sign rule: rows kept, recall, energy missed")?;
        }
        writeln!(out)?;
        for layer in &self.layers {
            write!(
                out,
                "{:5}  {:.4}  {:.2}  {:8.3}",
                layer.layer, layer.sparsity, layer.mean_share, layer.residual_rms
            )?;
            for point in &layer.sign_rule {
                write!(out, "   {:.3} {:.3} {:.4}", point.rows_kept, point.recall, point.missed_energy)?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// The limit whose share of rows kept is nearest to `share`.
pub(super) fn sign_rule_point(histogram: &Histogram, share: f64) -> SignRulePoint {
    let curve = histogram.curve();
    let nearest = curve
        .iter()
        .min_by(|a, b| (a.rows_kept - share).abs().total_cmp(&(b.rows_kept - share).abs()))
        .expect("a curve has a point for limit 0");
    SignRulePoint {
        limit: nearest.limit,
        rows_kept: nearest.rows_kept,
        recall: nearest.recall,
        missed_energy: nearest.missed_energy,
    }
}
