//! Offsets of the rows' thresholds, from how well a row's score foretells its gate.
//!
//! Over a sample of tokens the gate g of a row is a line in its score s (in units of the input) and a rest of deviation r,
//! taken as normal:
//!
//! ```text
//! g = a s + c + r e        skipped at score s, the row misses about n r^2 psi((T - c - a s) / r) of energy
//! ```
//!
//! with n = |W_down[:, i]|^2, T the activation's own threshold and psi(z) = E max(0, e - z)^2. A row's threshold is the
//! score where that is as much as in the others; c takes the mean of the input in, which the signs and the few bits of a
//! row's elements miss. Five sums of a few hundred tokens give a row's line, so that it hardly fits their noise.

/// Energy missed at a threshold, over the mean energy of a pair: with what the default budget allows.
const MARGINAL_ENERGY: f64 = 0.01;
/// Offsets stay within this many of their root mean square.
const MAX_OFFSET: f64 = 4.0;

/// Sums for the line of each row.
#[derive(Clone, Debug)]
pub(crate) struct RowLines {
    rows: Vec<Sums>,
    energy: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    n: f64,
    s: f64,
    g: f64,
    ss: f64,
    sg: f64,
    gg: f64,
}

impl RowLines {
    pub(crate) fn new(n_rows: usize) -> Self {
        Self { rows: vec![Sums::default(); n_rows], energy: 0.0 }
    }

    /// Adds a token; `scores` in units of the input, `gate` before the activation, `h`, all `(n_rows,)`.
    pub(crate) fn add_token(
        &mut self,
        scores: impl Iterator<Item = f32>,
        gate: &[f32],
        h: &[f32],
        squared_norms: &[f64],
    ) {
        for ((((sums, s), &g), &h), squared_norm) in
            self.rows.iter_mut().zip(scores).zip(gate).zip(h).zip(squared_norms)
        {
            let (s, g) = (f64::from(s), f64::from(g));
            sums.n += 1.0;
            sums.s += s;
            sums.g += g;
            sums.ss += s * s;
            sums.sg += s * g;
            sums.gg += g * g;
            self.energy += f64::from(h) * f64::from(h) * squared_norm;
        }
    }

    /// Offsets with a mean of 0, `(n_rows,)`; 0 where a row has no line. `threshold` is the activation's own.
    pub(crate) fn offsets(&self, squared_norms: &[f64], threshold: f64) -> Vec<f32> {
        let n_pairs: f64 = self.rows.iter().map(|sums| sums.n).sum();
        let marginal = MARGINAL_ENERGY * self.energy / n_pairs;
        let thresholds = self.rows.iter().zip(squared_norms).map(|(sums, squared_norm)| {
            let line = sums.line()?;
            let z = inverse_psi(marginal / (line.rest * line.rest * squared_norm));
            Some((threshold - line.intercept - line.rest * z) / line.slope).filter(|t| t.is_finite())
        });
        let thresholds: Vec<Option<f64>> = thresholds.collect();
        let n_known = thresholds.iter().flatten().count().max(1) as f64;
        let mean = thresholds.iter().flatten().sum::<f64>() / n_known;
        let mean_square = thresholds.iter().flatten().map(|t| (t - mean) * (t - mean)).sum::<f64>() / n_known;
        let max = MAX_OFFSET * mean_square.sqrt();
        thresholds.iter().map(|t| t.map_or(0.0, |t| (t - mean).clamp(-max, max)) as f32).collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Line {
    slope: f64,
    intercept: f64,
    /// Standard deviation around it.
    rest: f64,
}

impl Sums {
    /// The line with the least squares; none where g does not rise with s.
    fn line(&self) -> Option<Line> {
        let Self { n, s, g, ss, sg, gg } = *self;
        let (var_s, covariance, var_g) = (ss - s * s / n, sg - s * g / n, gg - g * g / n);
        let slope = covariance / var_s;
        let rest = ((var_g - slope * covariance) / n).sqrt();
        (slope > 0.0 && slope.is_finite() && rest > 0.0).then_some(Line {
            slope,
            intercept: (g - slope * s) / n,
            rest,
        })
    }
}

/// The z at which psi(z) = y, by `psi(z) = exp(-1.596 z - 0.33 z^2) / 2`, which is exact at 0 with its slope, and within a
/// tenth up to z = 3.
fn inverse_psi(y: f64) -> f64 {
    const LINEAR: f64 = 1.596;
    const SQUARE: f64 = 0.33;
    let exponent = (0.5 / y).ln();
    ((LINEAR * LINEAR + 4.0 * SQUARE * exponent).max(0.0).sqrt() - LINEAR) / (2.0 * SQUARE)
}
