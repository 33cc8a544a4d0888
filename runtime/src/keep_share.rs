//! Limits that keep a given share of gate rows, for figures of speed by share.
//!
//! A layer's limit is one integer, so the shares it can keep lie apart: near the middle of the distribution of n_neg by
//! about `0.8 / sqrt(hidden_size)` of all rows (1.2 % at 4096). What one layer keeps too much or too little, the next one
//! makes up for, which brings the share of the whole model much closer than that of a layer.

use crate::{MlpBatch, MlpObserver, RuntimeError, Session};

/// Most masked passes over the text: what a layer skips moves n_neg in the layers behind it.
const N_PASSES_MAX: usize = 3;
/// A share this close to the one asked for needs no further pass.
const CLOSE_ENOUGH: f64 = 0.001;

/// Pairs of token and gate row by n_neg, `(num_hidden_layers, hidden_size + 1)`.
#[derive(Clone, Debug)]
pub(crate) struct Scores {
    layers: Vec<Vec<u64>>,
}

impl MlpObserver for Scores {
    fn wants_n_neg(&self) -> bool {
        true
    }

    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        let counts = &mut self.layers[batch.layer];
        batch.n_neg.iter().for_each(|&n_neg| counts[n_neg as usize] += 1);
    }
}

impl Scores {
    /// Those of `tokens` in an empty context; `masked` leaves out the rows that decoding would leave out.
    ///
    /// # Errors
    /// Those of [`Session::forward_batch`].
    pub(crate) fn measure(
        session: &mut Session<'_>,
        tokens: &[u32],
        masked: bool,
    ) -> Result<Self, RuntimeError> {
        let config = session.model().config();
        let empty = vec![0; config.hidden_size as usize + 1];
        let mut scores = Self { layers: vec![empty; config.num_hidden_layers as usize] };
        session.reset();
        for batch in tokens.chunks(session.n_batch()) {
            session.forward_batch(batch, masked, None, Some(&mut scores))?;
        }
        session.reset();
        Ok(scores)
    }

    /// A limit for each layer such that all of them together keep the share of rows closest to `share`.
    fn limits(&self, share: f64) -> Vec<u32> {
        // Share of one layer's rows that the layers so far keep too little.
        let mut missing = 0.0;
        self.layers
            .iter()
            .map(|counts| {
                let wanted = share + missing;
                let (limit, kept) = closest(counts, wanted);
                missing = wanted - kept;
                limit
            })
            .collect()
    }

    /// The share of rows that `limits` keep.
    fn kept(&self, limits: &[u32]) -> f64 {
        let pairs = self.layers.iter().zip(limits);
        let n_kept: u64 = pairs.flat_map(|(counts, &limit)| &counts[..=limit as usize]).sum();
        crate::stats::ratio(n_kept as f64, self.layers.iter().flatten().sum::<u64>() as f64)
    }
}

/// The limit that keeps the share of pairs closest to `share`, and that share; among equals the largest, so that a share
/// of one keeps every row of every text.
fn closest(counts: &[u64], share: f64) -> (u32, f64) {
    let total = counts.iter().sum::<u64>() as f64;
    let mut n_kept = 0;
    let mut best = (0, f64::INFINITY);
    for (limit, count) in counts.iter().enumerate() {
        n_kept += count;
        let kept = crate::stats::ratio(n_kept as f64, total);
        if (kept - share).abs() <= (best.1 - share).abs() {
            best = (limit as u32, kept);
        }
    }
    best
}

/// Limits with which decoding `tokens` keeps a share of gate rows close to `share`, found by measuring n_neg on these
/// tokens: from `scores`, those of a pass that skips nothing, then from passes under the limits found. Leaves `session`
/// without positions, with other limits.
///
/// # Errors
/// [`RuntimeError::NoSigns`]; those of [`Session::forward_batch`].
pub(crate) fn limits_keeping(
    session: &mut Session<'_>,
    scores: &Scores,
    tokens: &[u32],
    share: f64,
) -> Result<Vec<u32>, RuntimeError> {
    let mut limits = scores.limits(share);
    let mut best = (f64::INFINITY, limits.clone());
    for _ in 0..N_PASSES_MAX {
        session.set_limits(&limits)?;
        let scores = Scores::measure(session, tokens, true)?;
        let error = (scores.kept(&limits) - share).abs();
        if error < best.0 {
            best = (error, limits);
        }
        if error < CLOSE_ENOUGH {
            break;
        }
        limits = scores.limits(share);
    }
    Ok(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_limit_counts_every_pair_up_to_it() {
        // Kept up to each limit: 0, 0.2, 0.5, 0.5, 0.9, 1, 1.
        let counts = [0, 2, 3, 0, 4, 1, 0];
        assert_eq!(closest(&counts, 0.2), (1, 0.2));
        assert_eq!(closest(&counts, 0.36), (3, 0.5));
        assert_eq!(closest(&counts, 0.34), (1, 0.2));
        assert_eq!(closest(&counts, 0.01), (0, 0.0));
        assert_eq!(closest(&counts, 1.0), (6, 1.0));
        assert_eq!(closest(&counts, 1.7), (6, 1.0));
    }

    /// Layers of two steps a half apart alternate to reach a quarter, a third, three quarters.
    #[test]
    fn layers_make_up_for_each_other() {
        let scores = Scores { layers: vec![vec![0, 5, 5]; 12] };
        for (share, expected) in [(0.25, 0.25), (1.0 / 3.0, 1.0 / 3.0), (0.75, 0.75), (1.0, 1.0)] {
            let limits = scores.limits(share);
            assert!((scores.kept(&limits) - expected).abs() < 1e-9, "{share}: {limits:?}");
        }
        assert_eq!(scores.limits(1.0), [2; 12]);
        let tiny = scores.limits(0.04);
        assert!((scores.kept(&tiny) - 0.04).abs() <= 0.5 / 12.0, "{tiny:?}");
    }
}
