//! Binary `prep`: parse, call the library, print what came of it.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use prep::cli::{Cli, Command, ConvertArgs, EvalArgs, InspectArgs, ReportArgs, VerifyArgs};
use prep::inspect::PredictorRow;
use prep::synth::{self, SynthArgs, SynthError};
use prep::{ConvertReport, PrepError, Progress};
use runtime::interrupt::{INTERRUPTED, on_interrupt};
use serde::Serialize;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Convert(args) => convert(&args),
        Command::Eval(args) => eval(&args),
        Command::Report(args) => report_page(&args),
        Command::Inspect(args) => inspect(&args),
        Command::Verify(args) => verify(&args),
        Command::Synth(args) => synthesise(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to hear of a closed stderr.
            let _ = report(&error, &mut io::stderr().lock());
            let interrupted = matches!(error.downcast_ref(), Some(PrepError::Interrupted));
            if interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::FAILURE }
        }
    }
}

fn convert(args: &ConvertArgs) -> anyhow::Result<()> {
    let options = args.options().unwrap_or_else(|error| error.exit());
    let progress = interruptible(args.quiet)?;
    let result = prep::convert(&args.model_dir, &args.out, &options, &progress);
    progress.finish();
    let report = result?;
    if !args.quiet {
        write_summary(&report, &mut io::stderr().lock())?;
    }
    if args.json { print_json(&report) } else { Ok(()) }
}

fn inspect(args: &InspectArgs) -> anyhow::Result<()> {
    let inspection = prep::inspect(&args.file, args.tensors)?;
    if args.json { print_json(&inspection) } else { Ok(inspection.write_text(&mut io::stdout().lock())?) }
}

fn eval(args: &EvalArgs) -> anyhow::Result<()> {
    let progress = Progress::on_terminal();
    let result = prep::eval(&args.file, &args.options(), &progress);
    progress.finish();
    let found = result?;
    if args.json { print_json(&found) } else { Ok(found.write_text(&mut io::stdout().lock())?) }
}

fn report_page(args: &ReportArgs) -> anyhow::Result<()> {
    let progress = interruptible(args.quiet)?;
    let result = prep::report(&args.file, &args.options(), &progress);
    progress.finish();
    let n_bytes = result?;
    if !args.quiet {
        writeln!(io::stderr(), "{}: {n_bytes} bytes", args.out.display())?;
    }
    Ok(())
}

/// Progress that Ctrl-C stops, so that no unfinished output stays behind.
fn interruptible(quiet: bool) -> anyhow::Result<Arc<Progress>> {
    let progress = Arc::new(if quiet { Progress::silent() } else { Progress::on_terminal() });
    let handler = Arc::clone(&progress);
    on_interrupt(move || handler.interrupt()).context("cannot listen for signals")?;
    Ok(progress)
}

fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let progress = Progress::on_terminal();
    let result = prep::verify(&args.file, &progress);
    progress.finish();
    let found = result?;
    if args.json {
        return print_json(&found);
    }
    writeln!(
        io::stdout(),
        "{}: {} sections and {} bytes as written, blake3 {} ({:.1} s, {:.2} GB/s)",
        found.path,
        found.sections,
        found.bytes,
        found.blake3,
        found.seconds,
        found.gb_per_s
    )?;
    Ok(())
}

fn synthesise(args: &SynthArgs) -> anyhow::Result<()> {
    let progress = if args.quiet { Progress::silent() } else { Progress::on_terminal() };
    let mut is_new = true;
    let result = synth::generate(&args.options()?, &args.out_dir, &mut |done, total| {
        if std::mem::take(&mut is_new) {
            progress.begin("generating", total);
        }
        progress.set(done);
    });
    progress.finish();
    let report = result?;
    if args.json { print_json(&report) } else { Ok(report.write_text(&mut io::stdout().lock())?) }
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    Ok(io::stdout().lock().write_all(text.as_bytes())?)
}

/// What was written, for people.
fn write_summary(report: &ConvertReport, out: &mut dyn Write) -> io::Result<()> {
    for note in &report.notes {
        writeln!(out, "note: {note}")?;
    }
    writeln!(
        out,
        "{}: {} bytes, {} layers, {}; {:.1} s: weights {:.1} s ({:.2} GB/s read), calibration {:.1} s on {} tokens",
        report.out,
        report.bytes,
        report.layers,
        report.dtype,
        report.seconds,
        report.weights_seconds,
        report.read_gb_per_s,
        report.calibration_seconds,
        report.calibration_tokens
    )?;
    if let Some(quality) = &report.quality {
        writeln!(
            out,
            "{} text: perplexity {:.4} (dense {:.4}), KL mean {:.6}, top-1 agreement {:.2} %; MLP bytes {:.1} %",
            if quality.is_unseen { "unseen" } else { "fitted" },
            quality.ppl,
            quality.dense_ppl,
            quality.kl_mean,
            100.0 * quality.top1_agreement,
            100.0 * quality.mlp_bytes
        )?;
    }
    PredictorRow::write_table(&report.predictors, out)
}

/// The chain of causes on one line, then what to do about it.
fn report(error: &anyhow::Error, out: &mut dyn Write) -> io::Result<()> {
    let mut causes = Vec::new();
    let mut hints = Vec::new();
    for cause in error.chain() {
        let message = cause.to_string();
        let mut lines = message.lines();
        causes.extend(lines.next().map(str::to_owned));
        // The format's messages bring their own hints, on lines of their own.
        hints.extend(lines.map(|line| line.trim_start_matches("hint: ").to_owned()));
    }
    if let Some(error) = error.downcast_ref::<PrepError>() {
        hints.extend(error.hint().map(str::to_owned));
    } else if let Some(error) = error.downcast_ref::<SynthError>() {
        hints.extend(error.hint());
    }
    writeln!(out, "error: {}", causes.join(": "))?;
    hints.dedup();
    hints.iter().try_for_each(|hint| writeln!(out, "hint: {hint}"))
}

/// True if whoever read stdout has gone.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let is_broken = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.downcast_ref().is_some_and(is_broken)
}
