//! Speed of prompts and of decoding, dense, exact and predicted side by side in one process.
//!
//! The modes take turns within each repetition, so that a machine that slows down slows all of them. Decoding runs
//! over a text that the model wrote itself, the same for all modes: rows kept and active are those of real text. Limits
//! for a share of rows kept are found on that text as well, by measuring n_neg. A decoded token includes the choice of the
//! most probable next one, on the device where generating text would choose there; the text goes on as it is. Steps of a
//! token are timed over the same text after that, as counting clocks takes time itself.

use std::io::{self, Write};
use std::time::Instant;

use serde::Serialize;

use crate::keep_share::{Scores, limits_keeping};
use crate::sampler::{Sampler, SamplerOptions};
use crate::stats::{RowShares, mean_and_deviation, ratio};
use crate::steps::{self, Step, StepFigures};
use crate::{AuditOptions, AuditReport, MlpMode, RuntimeError, Session};

/// Longest warm-up, in tokens.
const N_WARM_UP: usize = 16;

const NO_STEPS: &str =
    "Steps are not counted for this model: by its widths or mixed types a token is a run of single kernels.";
const STEPS_NOTE: &str = "\
GB/s of a step: bytes needed by its time; rows that came ahead, in the wait or norm before it, can lift it above memory's.
All gate rows have the up rows with them in dense. Outside the kernel: the draw, launches, and counts read back.";

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Tokens of the prompt; 0 leaves the row out.
    pub n_prompt: usize,
    /// Tokens decoded; 0 leaves the rows out.
    pub n_decode: usize,
    /// Repetitions.
    pub n_repetitions: usize,
    /// Factor on the stored alphas.
    pub alpha_scale: f64,
    /// Adds a row that is predicted and audited.
    pub audit: Option<AuditOptions>,
    /// Shares of gate rows, above 0 and at most 1: a row of decoding for each, under limits that keep it.
    pub keep_shares: Vec<f64>,
    /// Tells where a decoded token's time goes, on devices that count it.
    pub steps: bool,
}

/// Results of one process on one machine.
#[derive(Clone, Debug, Serialize)]
pub struct Bench {
    /// The file.
    pub model: String,
    /// What ran it.
    pub device: String,
    /// Plain read bandwidth, mean over the repetitions.
    pub read_gb_per_s: f64,
    /// One row for each test and mode.
    pub rows: Vec<BenchRow>,
    /// What the audited row found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditReport>,
}

/// One test in one mode.
#[derive(Clone, Debug, Serialize)]
pub struct BenchRow {
    /// `pp512`: a prompt of 512 tokens; `tg128`: 128 tokens decoded.
    pub test: String,
    /// `dense`, `exact`, `predicted`, `audited` or `adaptive`.
    pub mode: &'static str,
    /// Share of gate rows that was asked for; none: the mode's own limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_share: Option<f64>,
    /// Mean over the repetitions.
    pub tok_per_s: f64,
    /// Sample standard deviation over the repetitions.
    pub tok_per_s_deviation: f64,
    /// What only decoding counts.
    #[serde(flatten)]
    pub decode: Option<DecodeFigures>,
    /// Where its time goes; empty where a token is a run of single kernels, of which no steps are counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepFigures>>,
}

/// Figures of decoded tokens.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DecodeFigures {
    /// Bytes needed for a token, mean.
    pub bytes_per_token: f64,
    /// Bytes needed by time, in 10^9 bytes/s.
    pub gb_per_s: f64,
    /// `gb_per_s` by the measured read bandwidth.
    pub read_share: f64,
    /// Speed by that of the dense row.
    pub speedup: f64,
    /// Share of gate rows computed.
    pub rows_kept: f64,
    /// Share of rows that were active.
    pub rows_active: f64,
}

/// Gate rows that a contender reads.
#[derive(Debug)]
enum Selection {
    Mode(MlpMode),
    /// The share asked for, and limits that keep it.
    Share(f64, Vec<u32>),
}

/// One mode being measured.
#[derive(Debug)]
struct Contender {
    name: &'static str,
    rows: Selection,
    audit: Option<AuditOptions>,
    tok_per_s: Vec<f64>,
    n_tokens: u64,
    n_bytes: u64,
    seconds: f64,
    shares: RowShares,
    steps: Option<Vec<Step>>,
}

/// Measures `session`, whose context must hold the longer of the two tests. Leaves it without positions and audits.
///
/// # Errors
/// [`RuntimeError::ContextFull`]; [`RuntimeError::NoSigns`] for a share of rows in a file made without prediction; those
/// of [`Session::set_mode`] and [`Session::set_audit`].
pub fn bench(session: &mut Session<'_>, options: &BenchOptions) -> Result<Bench, RuntimeError> {
    let mode = |name, mode| Contender::new(name, Selection::Mode(mode));
    let mut contenders = vec![mode("dense", MlpMode::Dense), mode("exact", MlpMode::Exact)];
    session.set_mode(MlpMode::Stored, options.alpha_scale)?;
    if session.limits().iter().any(Option::is_some) {
        contenders.push(mode("predicted", MlpMode::Stored));
    }
    if let Some(audit) = options.audit {
        let name = if audit.adaptive { "adaptive" } else { "audited" };
        contenders.push(Contender { audit: Some(audit), ..mode(name, MlpMode::Stored) });
    }
    let text = own_text(session, options.n_decode.max(N_WARM_UP).min(session.n_positions_max()))?;
    let prompt: Vec<u32> = text.iter().copied().cycle().take(options.n_prompt).collect();
    let decoded = &text[..options.n_decode.min(text.len())];
    if options.n_decode > decoded.len() {
        return Err(session.context_full(options.n_decode));
    }
    if options.n_decode > 0 && !options.keep_shares.is_empty() {
        let scores = Scores::measure(session, decoded, false)?;
        for &share in &options.keep_shares {
            let limits = limits_keeping(session, &scores, decoded, share)?;
            contenders.push(Contender::new("predicted", Selection::Share(share, limits)));
        }
    }

    session.set_mode(MlpMode::Dense, 1.0)?;
    session.reset();
    session.prefill(&prompt)?;
    for contender in &contenders {
        contender.run(session, options.alpha_scale, &decoded[..decoded.len().min(N_WARM_UP)])?;
    }
    let mut prompt_tok_per_s = Vec::with_capacity(options.n_repetitions);
    let mut read_gb_per_s = Vec::with_capacity(options.n_repetitions);
    for _ in 0..options.n_repetitions {
        session.reset();
        let started = Instant::now();
        session.prefill(&prompt)?;
        prompt_tok_per_s.push(ratio(prompt.len() as f64, started.elapsed().as_secs_f64()));
        for contender in &mut contenders {
            let seconds = contender.run(session, options.alpha_scale, decoded)?;
            contender.record(session, seconds);
        }
        read_gb_per_s.push(session.measure_read_gb_per_s());
    }
    // The audited contender is the last to run.
    let audit = session.audit();
    session.set_audit(None)?;
    if options.steps {
        // The same tokens at the same positions as those that were timed.
        for contender in contenders.iter_mut().filter(|contender| contender.audit.is_none()) {
            contender.select_rows(session, options.alpha_scale)?;
            session.reset();
            contender.steps = session.time_steps(decoded)?;
        }
    }
    session.reset();

    let (read_gb_per_s, _) = mean_and_deviation(&read_gb_per_s);
    let mut rows = Vec::new();
    if options.n_prompt > 0 {
        let (tok_per_s, tok_per_s_deviation) = mean_and_deviation(&prompt_tok_per_s);
        let test = format!("pp{}", options.n_prompt);
        rows.push(BenchRow {
            test,
            mode: "dense",
            keep_share: None,
            tok_per_s,
            tok_per_s_deviation,
            decode: None,
            steps: None,
        });
    }
    if options.n_decode > 0 {
        let (dense_tok_per_s, _) = mean_and_deviation(&contenders[0].tok_per_s);
        rows.extend(contenders.iter().map(|contender| {
            contender.row(format!("tg{}", options.n_decode), dense_tok_per_s, read_gb_per_s)
        }));
    }
    let (model, device) = (session.model().path().to_owned(), session.backend());
    Ok(Bench { model, device, read_gb_per_s, rows, audit })
}

/// A text of `n_tokens` that the model writes from BOS, always the same.
fn own_text(session: &mut Session<'_>, n_tokens: usize) -> Result<Vec<u32>, RuntimeError> {
    let config = session.model().config();
    let first = config.bos_token_id.unwrap_or(0);
    let excluded = &config.eos_token_ids;
    let mut sampler = Sampler::new(&SamplerOptions::default(), config.vocab_size as usize, excluded);
    session.set_mode(MlpMode::Dense, 1.0)?;
    session.reset();
    let mut text = vec![first];
    while text.len() < n_tokens {
        let last = text[text.len() - 1];
        let logits = session.decode(last)?;
        sampler.accept(last);
        // Useless logits still take as long to compute as good ones: go on with any token.
        text.push(sampler.sample(logits).unwrap_or(first));
    }
    Ok(text)
}

impl Contender {
    fn new(name: &'static str, rows: Selection) -> Self {
        Self {
            name,
            rows,
            audit: None,
            tok_per_s: Vec::new(),
            n_tokens: 0,
            n_bytes: 0,
            seconds: 0.0,
            shares: RowShares::default(),
            steps: None,
        }
    }

    /// Has `session` read this contender's rows.
    fn select_rows(&self, session: &mut Session<'_>, alpha_scale: f64) -> Result<(), RuntimeError> {
        match &self.rows {
            Selection::Mode(mode) => session.set_mode(*mode, alpha_scale),
            Selection::Share(_, limits) => session.set_limits(limits),
        }
    }

    /// Decodes `tokens` in an empty context; returns the seconds it took.
    fn run(&self, session: &mut Session<'_>, alpha_scale: f64, tokens: &[u32]) -> Result<f64, RuntimeError> {
        session.set_audit(None)?;
        self.select_rows(session, alpha_scale)?;
        let greedy = SamplerOptions { temp: 0.0, ..SamplerOptions::default() };
        let mut sampler = Sampler::new(&greedy, session.model().config().vocab_size as usize, &[]);
        session.set_sampler(&greedy, &[])?;
        session.set_audit(self.audit)?;
        session.reset();
        // Ahead of the clock: the first token with other rows has the engine prepare for them. What is chosen does not
        // matter, nor that nothing can be.
        if let Some(&token) = tokens.first() {
            let _ = session.decode_and_choose(token, &mut sampler)?;
        }
        session.reset();
        session.reset_usage();
        let started = Instant::now();
        for &token in tokens {
            let _ = session.decode_and_choose(token, &mut sampler)?;
        }
        Ok(started.elapsed().as_secs_f64())
    }

    /// Adds what [`Contender::run`] measured.
    fn record(&mut self, session: &Session<'_>, seconds: f64) {
        let usage = session.usage();
        self.tok_per_s.push(ratio(usage.n_tokens as f64, seconds));
        self.n_tokens += usage.n_tokens;
        self.n_bytes += usage.n_bytes;
        self.seconds += seconds;
        // The same in every repetition.
        self.shares = RowShares::of_session(session);
    }

    fn row(&self, test: String, dense_tok_per_s: f64, read_gb_per_s: f64) -> BenchRow {
        let (tok_per_s, tok_per_s_deviation) = mean_and_deviation(&self.tok_per_s);
        let gb_per_s = ratio(self.n_bytes as f64 * 1e-9, self.seconds);
        let decode = DecodeFigures {
            bytes_per_token: ratio(self.n_bytes as f64, self.n_tokens as f64),
            gb_per_s,
            read_share: ratio(gb_per_s, read_gb_per_s),
            speedup: ratio(tok_per_s, dense_tok_per_s),
            rows_kept: self.shares.kept,
            rows_active: self.shares.active,
        };
        let keep_share = match self.rows {
            Selection::Mode(_) => None,
            Selection::Share(share, _) => Some(share),
        };
        let token_us = 1e6 * ratio(self.seconds, self.n_tokens as f64);
        let steps = self.steps.as_ref().map(|steps| steps::figures(steps, token_us));
        let decode = Some(decode);
        BenchRow { test, mode: self.name, keep_share, tok_per_s, tok_per_s_deviation, decode, steps }
    }
}

impl Bench {
    /// A table for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_markdown(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{} on {}, reads {:.1} GB/s\n", self.model, self.device, self.read_gb_per_s)?;
        writeln!(
            out,
            "| test   | mode        |            tok/s | to dense | MB/token |    GB/s | of read | rows kept | rows active |"
        )?;
        writeln!(
            out,
            "|--------|-------------|-----------------:|---------:|---------:|--------:|--------:|----------:|------------:|"
        )?;
        for row in &self.rows {
            let speed = format!("{:.2} ± {:.2}", row.tok_per_s, row.tok_per_s_deviation);
            let mode = row.label();
            write!(out, "| {:<6} | {mode:<11} | {speed:>16} |", row.test)?;
            match &row.decode {
                Some(decode) => writeln!(
                    out,
                    " {:>7.2}x | {:>8.1} | {:>7.2} | {:>5.1} % | {:>7.1} % | {:>9.1} % |",
                    decode.speedup,
                    1e-6 * decode.bytes_per_token,
                    decode.gb_per_s,
                    100.0 * decode.read_share,
                    100.0 * decode.rows_kept,
                    100.0 * decode.rows_active
                )?,
                None => writeln!(
                    out,
                    " {:>8} | {:>8} | {:>7} | {:>7} | {:>9} | {:>11} |",
                    "", "", "", "", "", ""
                )?,
            }
        }
        if let Some(audit) = &self.audit {
            writeln!(out)?;
            audit.write(out)?;
        }
        self.write_steps(out)
    }

    /// A table of steps for each row that has them.
    fn write_steps(&self, out: &mut dyn Write) -> io::Result<()> {
        let timed: Vec<_> = self.rows.iter().filter_map(|row| Some((row, row.steps.as_ref()?))).collect();
        if timed.is_empty() {
            return Ok(());
        }
        if timed.iter().all(|(_, steps)| steps.is_empty()) {
            return writeln!(out, "\n{NO_STEPS}");
        }
        for (row, figures) in timed {
            let token_us: f64 = figures.iter().map(|step| step.us_per_token).sum();
            writeln!(out, "\n{} {}, {token_us:.1} us a token:\n", row.test, row.label())?;
            steps::write_markdown(out, figures)?;
        }
        writeln!(out, "\n{STEPS_NOTE}")
    }

    /// One line of comma-separated values for each row, with a header.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_csv(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "model,device,read_gb_per_s,test,mode,keep_share,tok_per_s,tok_per_s_deviation,bytes_per_token,\
             gb_per_s,read_share,speedup,rows_kept,rows_active"
        )?;
        for row in &self.rows {
            write!(
                out,
                "{},{},{:.3},{},{},{},{:.3},{:.3}",
                quoted(&self.model),
                quoted(&self.device),
                self.read_gb_per_s,
                row.test,
                row.mode,
                row.keep_share.map_or_else(String::new, |share| share.to_string()),
                row.tok_per_s,
                row.tok_per_s_deviation
            )?;
            match &row.decode {
                Some(decode) => writeln!(
                    out,
                    ",{:.0},{:.3},{:.4},{:.4},{:.6},{:.6}",
                    decode.bytes_per_token,
                    decode.gb_per_s,
                    decode.read_share,
                    decode.speedup,
                    decode.rows_kept,
                    decode.rows_active
                )?,
                None => writeln!(out, ",,,,,,")?,
            }
        }
        Ok(())
    }
}

impl BenchRow {
    /// The mode, or the share of rows that was asked for.
    fn label(&self) -> String {
        match self.keep_share {
            None => self.mode.to_owned(),
            Some(share) => format!("keep {} %", (1e6 * share).round() / 1e4),
        }
    }
}

/// `text` as one field of comma-separated values.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Bench {
        let prompt = BenchRow {
            test: "pp512".to_owned(),
            mode: "dense",
            keep_share: None,
            tok_per_s: 1000.0,
            tok_per_s_deviation: 5.5,
            decode: None,
            steps: None,
        };
        let figures = DecodeFigures {
            bytes_per_token: 5.5e8,
            gb_per_s: 11.0,
            read_share: 0.5,
            speedup: 1.8,
            rows_kept: 0.25,
            rows_active: 0.125,
        };
        let decode = BenchRow {
            test: "tg128".to_owned(),
            mode: "predicted",
            keep_share: None,
            tok_per_s: 20.0,
            tok_per_s_deviation: 0.25,
            decode: Some(figures),
            steps: None,
        };
        let asked = BenchRow { keep_share: Some(0.135), ..decode.clone() };
        Bench {
            model: "a \"b\".sinf".to_owned(),
            device: "cpu (avx2, 2 threads)".to_owned(),
            read_gb_per_s: 22.0,
            rows: vec![prompt, decode, asked],
            audit: None,
        }
    }

    fn written(write: impl Fn(&Bench, &mut dyn Write) -> io::Result<()>) -> String {
        written_of(&example(), write)
    }

    fn written_of(bench: &Bench, write: impl Fn(&Bench, &mut dyn Write) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        write(bench, &mut out).expect("memory takes all");
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn tables_have_as_many_cells_in_every_row() {
        let markdown = written(Bench::write_markdown);
        let rows: Vec<&str> = markdown.lines().filter(|line| line.starts_with('|')).collect();
        assert_eq!(rows.len(), 5);
        assert!(rows.iter().all(|row| row.matches('|').count() == 10), "{markdown}");
        assert!(rows.iter().all(|row| row.chars().count() == rows[0].chars().count()), "{markdown}");
        assert!(rows[3].contains("20.00 ± 0.25") && rows[3].contains("1.80x"), "{markdown}");
        assert!(rows[3].contains("| predicted ") && rows[3].contains(" 550.0 |"), "{markdown}");
        assert!(rows[4].contains("| keep 13.5 % |"), "{markdown}");
    }

    #[test]
    fn steps_come_after_the_rows_where_they_were_counted() {
        let mut bench = example();
        let plain = written_of(&bench, Bench::write_markdown);
        let qkv = Step { name: "qkv", us_per_token: 10_000.0, bytes_per_token: 1e8 };
        bench.rows[1].steps = Some(steps::figures(&[qkv], 50_000.0));
        let with_steps = written_of(&bench, Bench::write_markdown);
        let added = with_steps.strip_prefix(&plain).expect("the rest is the same");
        assert!(added.starts_with("\ntg128 predicted, 50000.0 us a token:\n\n| step "), "{added}");
        assert!(
            added.contains("| qkv                 |  10000.0 |  20.0 % |    100.0 |    10.0 |"),
            "{added}"
        );
        assert!(added.contains("| outside the kernel  |  40000.0 |  80.0 % |"), "{added}");
        assert!(added.ends_with(&format!("|\n\n{STEPS_NOTE}\n")), "{added}");
        let json = serde_json::to_value(&bench).expect("JSON");
        assert_eq!(json["rows"][1]["steps"][0]["gb_per_s"], 10.0);
        assert!(json["rows"][2].get("steps").is_none());
        bench.rows[1].steps = Some(Vec::new());
        assert_eq!(written_of(&bench, Bench::write_markdown), format!("{plain}\n{NO_STEPS}\n"));
    }

    #[test]
    fn csv_quotes_names_and_leaves_unknown_fields_empty() {
        let csv = written(Bench::write_csv);
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines[0].split(',').count(), 14);
        assert_eq!(
            lines[1],
            "\"a \"\"b\"\".sinf\",\"cpu (avx2, 2 threads)\",22.000,pp512,dense,,1000.000,5.500,,,,,,"
        );
        let figures = "20.000,0.250,550000000,11.000,0.5000,1.8000,0.250000,0.125000";
        assert!(lines[2].ends_with(&format!("tg128,predicted,,{figures}")), "{csv}");
        assert!(lines[3].ends_with(&format!("tg128,predicted,0.135,{figures}")), "{csv}");
        assert!(lines[1..].iter().all(|line| line.matches(',').count() == 14), "{csv}");
    }
}
