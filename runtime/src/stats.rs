//! What a run took, in the units that people compare: tok/s, ms per token, GB/s, shares of rows.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::{AuditReport, LayerUsage, Session};

/// Figures of one generation. Rates of phases that did not happen are 0.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// From the start of the program to the moment the prompt could be computed.
    pub load_ms: f64,
    /// From the start of the program to the first token chosen.
    pub first_token_ms: f64,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Time of the prompt.
    pub prompt_ms: f64,
    /// Prompt tokens by time.
    pub prompt_tok_per_s: f64,
    /// Tokens decoded one at a time: all but the first one.
    pub n_decoded: usize,
    /// Time of those.
    pub decode_ms: f64,
    /// Decoded tokens by time.
    pub decode_tok_per_s: f64,
    /// Median time of one decoded token.
    pub ms_per_tok_p50: f64,
    /// Nineteen in twenty take at most this.
    pub ms_per_tok_p95: f64,
    /// Bytes that the decoded tokens needed by time, in 10^9 bytes/s.
    pub gb_per_s: f64,
    /// Plain read bandwidth of the machine, measured after the text.
    pub read_gb_per_s: f64,
    /// Share of gate rows computed, 0 to 1.
    pub rows_kept: f64,
    /// Share of rows whose activation was not zero, 0 to 1.
    pub rows_active: f64,
    /// What audits found, where the session audits and decoded enough for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditReport>,
}

/// Times of one generation.
#[derive(Clone, Debug)]
pub struct Times<'a> {
    /// From the start of the program to the prompt.
    pub load: Duration,
    /// The prompt of so many tokens.
    pub prompt: (usize, Duration),
    /// Each decoded token.
    pub steps: &'a [Duration],
}

impl Stats {
    /// Gathers the figures of what `session` has decoded in `times`, and measures its read bandwidth.
    pub fn new(session: &Session<'_>, times: &Times<'_>) -> Self {
        let mut steps_ms: Vec<f64> = times.steps.iter().map(|&step| ms(step)).collect();
        steps_ms.sort_by(f64::total_cmp);
        // Not `sum()`: that of nothing is -0.
        let decode_ms = steps_ms.iter().fold(0.0, |sum, step| sum + step);
        let (n_prompt, prompt) = times.prompt;
        let shares = RowShares::of_session(session);
        Self {
            load_ms: ms(times.load),
            first_token_ms: ms(times.load + prompt),
            n_prompt,
            prompt_ms: ms(prompt),
            prompt_tok_per_s: ratio(n_prompt as f64 * 1e3, ms(prompt)),
            n_decoded: steps_ms.len(),
            decode_ms,
            decode_tok_per_s: ratio(steps_ms.len() as f64 * 1e3, decode_ms),
            ms_per_tok_p50: percentile(&steps_ms, 0.50),
            ms_per_tok_p95: percentile(&steps_ms, 0.95),
            gb_per_s: ratio(session.usage().n_bytes as f64 * 1e-6, decode_ms),
            read_gb_per_s: session.measure_read_gb_per_s(),
            rows_kept: shares.kept,
            rows_active: shares.active,
            audit: session.audit(),
        }
    }

    /// The closing lines for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "load    {:.1} ms, first token after {:.1} ms", self.load_ms, self.first_token_ms)?;
        writeln!(
            out,
            "prompt  {} tokens in {:.1} ms: {:.1} tok/s",
            self.n_prompt, self.prompt_ms, self.prompt_tok_per_s
        )?;
        writeln!(
            out,
            "decode  {} tokens in {:.1} ms: {:.1} tok/s, ms/token p50 {:.2}, p95 {:.2}",
            self.n_decoded, self.decode_ms, self.decode_tok_per_s, self.ms_per_tok_p50, self.ms_per_tok_p95
        )?;
        writeln!(
            out,
            "bytes   {:.2} GB/s needed, {:.0} % of the {:.1} GB/s that this machine reads",
            self.gb_per_s,
            100.0 * ratio(self.gb_per_s, self.read_gb_per_s),
            self.read_gb_per_s
        )?;
        writeln!(
            out,
            "rows    {:.1} % kept, {:.1} % active",
            100.0 * self.rows_kept,
            100.0 * self.rows_active
        )?;
        self.audit.as_ref().map_or(Ok(()), |audit| audit.write(out))
    }
}

/// Shares of gate rows over decoded tokens, 0 to 1; 0 when nothing was decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowShares {
    /// Computed.
    pub kept: f64,
    /// With an activation that is not zero.
    pub active: f64,
}

impl RowShares {
    /// Over all layers of what `session` has decoded.
    pub fn of_session(session: &Session<'_>) -> Self {
        let layers = &session.usage().layers;
        Self::over(layers, session.usage().n_tokens, session.model().config().intermediate_size)
    }

    /// Over `layers` and `n_tokens` tokens of an MLP with `intermediate_size` rows.
    pub fn over(layers: &[LayerUsage], n_tokens: u64, intermediate_size: u32) -> Self {
        let n_pairs = n_tokens as f64 * f64::from(intermediate_size) * layers.len() as f64;
        let share =
            |count: fn(&LayerUsage) -> u64| ratio(layers.iter().map(count).sum::<u64>() as f64, n_pairs);
        Self { kept: share(|layer| layer.n_kept), active: share(|layer| layer.n_active) }
    }
}

/// `part / whole`, 0 where there is no whole.
pub(crate) fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// The smallest value that at least a share `p` of `sorted` does not exceed (nearest rank); 0 for none.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let rank = (p * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// Mean and sample standard deviation; 0 where there are too few values.
pub(crate) fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let mean = ratio(values.iter().sum(), values.len() as f64);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, ratio(squares, values.len() as f64 - 1.0).sqrt())
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let sorted: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(percentile(&sorted, 0.50), 10.0);
        assert_eq!(percentile(&sorted, 0.95), 19.0);
        assert_eq!(percentile(&sorted, 0.96), 20.0);
        assert_eq!(percentile(&[7.0], 0.50), 7.0);
        assert_eq!(percentile(&[], 0.95), 0.0);
    }

    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert_eq!(mean_and_deviation(&[2.0, 4.0, 6.0]), (4.0, 2.0));
        assert_eq!(mean_and_deviation(&[5.0]), (5.0, 0.0));
        assert_eq!(mean_and_deviation(&[]), (0.0, 0.0));
    }

    #[test]
    fn shares_are_of_all_rows_of_all_tokens() {
        let layers = [LayerUsage { n_kept: 30, n_active: 5 }, LayerUsage { n_kept: 10, n_active: 3 }];
        assert_eq!(RowShares::over(&layers, 4, 20), RowShares { kept: 0.25, active: 0.05 });
        assert_eq!(RowShares::over(&layers[..1], 4, 20), RowShares { kept: 0.375, active: 0.0625 });
        assert_eq!(RowShares::over(&layers, 0, 20), RowShares::default());
    }
}
