//! Where the time of a decoded token goes, on devices that count clocks in the kernel of a token.

use std::io::{self, Write};

use serde::Serialize;

use crate::stats::ratio;

/// What is left of a token's time once all of its kernel's steps are taken off.
const OUTSIDE: &str = "outside the kernel";

/// One step of decoding, mean over tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// For people.
    pub name: &'static str,
    /// Time.
    pub us_per_token: f64,
    /// Weights, sign words and cache that it needs, each once; 0 where it reads none.
    pub bytes_per_token: f64,
}

/// A step beside the whole token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepFigures {
    /// For people.
    pub step: &'static str,
    /// Time, mean over tokens.
    pub us_per_token: f64,
    /// Of the token's time.
    pub share: f64,
    /// Bytes that the step needs, where it reads weights or cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_token: Option<f64>,
    /// Those by the step's time, in 10^9 bytes/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gb_per_s: Option<f64>,
}

/// `steps` of a token that takes `token_us` in all, without those that take no time, then what is outside of them. None
/// where there are no steps.
pub fn figures(steps: &[Step], token_us: f64) -> Vec<StepFigures> {
    if steps.is_empty() {
        return Vec::new();
    }
    let kernel_us: f64 = steps.iter().map(|step| step.us_per_token).sum();
    // Measured at another time, a token may have been faster than the steps of one.
    let outside_us = (token_us - kernel_us).max(0.0);
    let outside = Step { name: OUTSIDE, us_per_token: outside_us, bytes_per_token: 0.0 };
    let taken = steps.iter().copied().filter(|step| step.us_per_token > 0.0);
    let figures = |step: Step| {
        let bytes = (step.bytes_per_token > 0.0).then_some(step.bytes_per_token);
        StepFigures {
            step: step.name,
            us_per_token: step.us_per_token,
            share: ratio(step.us_per_token, kernel_us + outside_us),
            bytes_per_token: bytes,
            gb_per_s: bytes.map(|bytes| ratio(1e-3 * bytes, step.us_per_token)),
        }
    };
    taken.chain([outside]).map(figures).collect()
}

/// A table of `figures` for people.
///
/// # Errors
/// Those of `out`.
pub fn write_markdown(out: &mut dyn Write, figures: &[StepFigures]) -> io::Result<()> {
    writeln!(out, "| step                | us/token |   share | MB/token |    GB/s |")?;
    writeln!(out, "|---------------------|---------:|--------:|---------:|--------:|")?;
    for StepFigures { step, us_per_token, share, bytes_per_token, gb_per_s } in figures {
        write!(out, "| {step:<19} | {us_per_token:>8.1} | {:>5.1} % |", 100.0 * share)?;
        match bytes_per_token.zip(*gb_per_s) {
            Some((bytes, gb_per_s)) => writeln!(out, " {:>8.1} | {gb_per_s:>7.1} |", 1e-6 * bytes)?,
            None => writeln!(out, " {:>8} | {:>7} |", "", "")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &'static str, us_per_token: f64, bytes_per_token: f64) -> Step {
        Step { name, us_per_token, bytes_per_token }
    }

    #[test]
    fn steps_and_what_is_outside_make_up_the_token() {
        let steps = [step("qkv", 40.0, 8e4), step("predictor", 0.0, 0.0), step("wait for qkv", 10.0, 0.0)];
        let figures = figures(&steps, 62.5);
        let qkv = StepFigures {
            step: "qkv",
            us_per_token: 40.0,
            share: 0.64,
            bytes_per_token: Some(8e4),
            gb_per_s: Some(2.0),
        };
        let none = StepFigures { bytes_per_token: None, gb_per_s: None, ..qkv };
        let wait = StepFigures { step: "wait for qkv", us_per_token: 10.0, share: 0.16, ..none };
        let outside = StepFigures { step: OUTSIDE, us_per_token: 12.5, share: 0.2, ..none };
        assert_eq!(figures, [qkv, wait, outside]);
    }

    #[test]
    fn a_token_that_was_faster_than_its_steps_has_nothing_outside() {
        let figures = figures(&[step("qkv", 40.0, 0.0)], 39.0);
        assert_eq!(figures.iter().map(|figures| figures.share).collect::<Vec<_>>(), [1.0, 0.0]);
    }

    #[test]
    fn tables_have_cells_of_one_width() {
        let steps = [step("MLP, active up rows", 1234.5, 2.5e9), step("qkv", 0.25, 0.0)];
        let mut out = Vec::new();
        write_markdown(&mut out, &figures(&steps, 2000.0)).expect("memory takes all");
        let table = String::from_utf8(out).expect("UTF-8");
        let rows: Vec<&str> = table.lines().collect();
        assert_eq!(rows.len(), 5);
        assert!(
            rows.iter().all(|row| row.len() == rows[0].len() && row.matches('|').count() == 6),
            "{table}"
        );
        assert!(rows[2].contains(" 1234.5 |  61.7 % |   2500.0 |  2025.1 |"), "{table}");
        assert!(figures(&[], 2000.0).is_empty());
    }
}
