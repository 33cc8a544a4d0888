//! Binary `runtime`: parse, call the library, print, exit code.

mod cli;
mod progress;

use std::fmt::Display;
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use serde::Serialize;

use runtime::bench::{BenchOptions, bench};
use runtime::chat::ChatFormat;
use runtime::device::{self, DeviceError};
use runtime::generate::{
    GenerateError, GenerateOptions, Generated, N_BATCH_MAX, StopReason, check_prompt, generate,
};
use runtime::interrupt::{INTERRUPTED, on_interrupt};
use runtime::perplexity::{Perplexity, PerplexityError, PerplexityOptions, join_documents, perplexity};
use runtime::sampler::Candidate;
use runtime::stats::{RowShares, Stats, Times};
use runtime::{MlpMode, Model, RuntimeError, Session, SessionOptions, Tokenizer};

use cli::{Action, Cli, Source, Table};
use progress::LoadProgress;

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = Cli::parse();
    let action = match cli.action() {
        Ok(action) => action,
        Err(error) => error.exit(),
    };
    match run(&cli, action, started) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("error: {error:#}"));
            if let Some(hint) = hint(&error) {
                say(format_args!("hint: {hint}"));
            }
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli, action: Action<'_>, started: Instant) -> anyhow::Result<ExitCode> {
    match action {
        Action::ListDevices { measure } => {
            let mut out = io::stdout().lock();
            device::list(measure).iter().try_for_each(|line| writeln!(out, "{line}"))?;
        }
        Action::Check { file } => {
            open(cli, file)?;
            say(format_args!("{}: every checksum is right", file.display()));
        }
        Action::Generate { file, prompt, chat, n_predict } => {
            return generate_text(cli, file, &prompt, chat, n_predict, started);
        }
        Action::Bench { file, n_prompt, n_decode, n_repetitions, keep_shares, output } => {
            let options = BenchOptions {
                n_prompt,
                n_decode,
                n_repetitions,
                alpha_scale: cli.alpha_scale,
                audit: cli.audit(cli.seed()),
                keep_shares: keep_shares.to_vec(),
                steps: cli.verbose,
            };
            run_bench(cli, file, &options, output)?;
        }
        Action::Perplexity { file, text, kl, n_windows } => {
            run_perplexity(cli, file, &text, kl, n_windows)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Maps `file` for the device asked for; with `--check`, all of it is read and compared.
fn open(cli: &Cli, file: &Path) -> anyhow::Result<Model> {
    cli.device.check()?;
    let model = Model::open(file)?;
    if cli.check {
        let verified = model.layout().verify(model.bytes(), &mut |_| {});
        verified.with_context(|| file.display().to_string())?;
    }
    Ok(model)
}

/// A session for `model`; `n_positions` where `-c` says nothing.
fn session<'m>(
    cli: &Cli,
    model: &'m Model,
    n_positions: usize,
    mode: MlpMode,
) -> anyhow::Result<Session<'m>> {
    let n_positions_max = cli.ctx_size.unwrap_or(n_positions);
    let options = SessionOptions {
        n_positions_max,
        n_batch_max: N_BATCH_MAX.min(n_positions_max),
        n_threads: cli.threads,
        mode,
        alpha_scale: cli.alpha_scale,
    };
    let shows_progress = !cli.quiet && io::stderr().is_terminal();
    let mut progress = LoadProgress::new(shows_progress.then(|| Box::new(io::stderr()) as Box<dyn Write>));
    let session = Session::on(cli.device, model, &options, &mut |n_done, n_all| progress.show(n_done, n_all));
    progress.clear();
    let mut session = session?;
    if !cli.quiet {
        for device in session.passed_over() {
            say(format_args!("note: passed over {device}"));
        }
    }
    if let Some(kl) = cli.budget {
        session.set_budget(kl)?;
        session.set_mode(mode, cli.alpha_scale)?;
    }
    Ok(session)
}

/// Positions that `model` was made for.
fn max_positions(model: &Model) -> usize {
    model.config().max_position_embeddings as usize
}

fn tokenizer(model: &Model) -> anyhow::Result<Tokenizer> {
    let spec = model.layout().tokenizer(model.bytes()).with_context(|| model.path().to_owned())?;
    let config = model.config();
    let tokenizer = Tokenizer::new(&spec, config.bos_token_id, config.eos_token_ids.first().copied());
    tokenizer.with_context(|| model.path().to_owned())
}

/// Tokenizer and session are made side by side: a vocabulary takes some tens of milliseconds.
fn tokenizer_and_session<'m>(
    cli: &Cli,
    model: &'m Model,
    seed: u64,
) -> anyhow::Result<(Tokenizer, Session<'m>)> {
    std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| tokenizer(model));
        let session = session(cli, model, max_positions(model), cli.predictor.mode());
        let tokenizer = tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let mut session = session?;
        session.set_audit(cli.audit(seed))?;
        Ok((tokenizer, session))
    })
}

/// What `--json` prints for a generation.
#[derive(Serialize)]
struct GenerateReport<'a> {
    prompt_ids: &'a [u32],
    ids: &'a [u32],
    text: &'a str,
    stop_reason: StopReason,
    seed: u64,
    predictor: &'static str,
    device: String,
    stats: &'a Stats,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logits: Option<Vec<Vec<(u32, f32)>>>,
}

fn generate_text(
    cli: &Cli,
    file: &Path,
    prompt: &Source<'_>,
    chat: Option<&'static ChatFormat>,
    n_predict: Option<usize>,
    started: Instant,
) -> anyhow::Result<ExitCode> {
    let mut prompt = match prompt {
        Source::Text(text) => (*text).to_owned(),
        file => without_last_newline(read(file)?),
    };
    let model = open(cli, file)?;
    let seed = cli.seed();
    let (tokenizer, mut session) = tokenizer_and_session(cli, &model, seed)?;
    let mut stops = cli.stop.clone();
    let mut end_ids = model.config().eos_token_ids.clone();
    if let Some(chat) = chat {
        prompt = chat.prompt(&prompt);
        stops.extend(chat.stops.iter().map(|&stop| stop.to_owned()));
        // A model that knows such a string as one token ends with that.
        end_ids.extend(chat.stops.iter().filter_map(|stop| tokenizer.added_token(stop)));
    }
    let prompt_ids = tokenizer.encode(&prompt)?;
    check_prompt(&session, &prompt_ids)?;
    let options = GenerateOptions {
        n_predict,
        sampler: cli.sampler(seed),
        end_ids,
        ignore_end: cli.ignore_eos,
        stops,
        n_top_logits: cli.logits,
    };

    let interrupted = catch_interrupts()?;
    let mut out = TextOutput { is_shown: !cli.json, ends_line: true };
    if !cli.no_display_prompt {
        out.show(&prompt).map_err(GenerateError::Show)?;
    }
    let load = started.elapsed();
    let generated =
        generate(&mut session, &tokenizer, &prompt_ids, &options, &mut |text| out.show(text), &|| {
            interrupted.load(Ordering::Relaxed)
        })?;
    out.finish().map_err(GenerateError::Show)?;

    let times =
        Times { load, prompt: (prompt_ids.len(), generated.prompt_time), steps: &generated.step_times };
    let stats = Stats::new(&session, &times);
    if cli.json {
        let pairs = |step: &Vec<Candidate>| step.iter().map(|top| (top.id, top.logit)).collect();
        print_json(&GenerateReport {
            prompt_ids: &prompt_ids,
            ids: &generated.ids,
            text: &generated.text,
            stop_reason: generated.stop_reason,
            seed,
            predictor: cli.predictor.name(),
            device: session.backend(),
            stats: &stats,
            top_logits: (cli.logits > 0).then(|| generated.top_logits.iter().map(pairs).collect()),
        })?;
    } else {
        // Nobody to tell when stderr is closed.
        let _ = write_statistics(&mut io::stderr().lock(), cli, &session, &generated, seed, &stats);
    }
    Ok(match generated.stop_reason {
        StopReason::Interrupt => ExitCode::from(INTERRUPTED),
        _ => ExitCode::SUCCESS,
    })
}

/// The closing lines for people.
fn write_statistics(
    out: &mut dyn Write,
    cli: &Cli,
    session: &Session<'_>,
    generated: &Generated,
    seed: u64,
    stats: &Stats,
) -> io::Result<()> {
    writeln!(out)?;
    stats.write(out)?;
    if let (Some(audit), None) = (cli.audit(seed), &stats.audit) {
        writeln!(out, "audit   none of {} tokens, one comes in every {}", stats.n_decoded, audit.every)?;
    }
    let stop_reason = generated.stop_reason.name();
    writeln!(out, "text    {} tokens, ended by {stop_reason}, seed {seed}", generated.ids.len())?;
    writeln!(out, "device  {}, predictor {}", session.backend(), cli.predictor.name())?;
    if cli.verbose {
        let n_tokens = session.usage().n_tokens;
        let intermediate_size = session.model().config().intermediate_size;
        writeln!(out, "\nlayer  widest    kept  active")?;
        for (idx, (layer, limit)) in session.usage().layers.iter().zip(session.limits()).enumerate() {
            let shares = RowShares::over(std::slice::from_ref(layer), n_tokens, intermediate_size);
            let limit = limit.map_or_else(|| "-".to_owned(), limit_text);
            writeln!(out, "{idx:>5}  {limit:>6}  {}  {}", percent(shares.kept), percent(shares.active))?;
        }
        if let Some(audit) = &stats.audit {
            writeln!(out)?;
            audit.write_layers(out)?;
        }
    }
    Ok(())
}

fn run_bench(cli: &Cli, file: &Path, options: &BenchOptions, output: Table) -> anyhow::Result<()> {
    let model = open(cli, file)?;
    let n_positions = options.n_prompt.max(options.n_decode).min(max_positions(&model));
    let mut session = session(cli, &model, n_positions, MlpMode::Dense)?;
    let results = bench(&mut session, options)?;
    let mut out = io::stdout().lock();
    match output {
        Table::Md => results.write_markdown(&mut out)?,
        Table::Csv => results.write_csv(&mut out)?,
        Table::Json => return print_json(&results),
    }
    Ok(out.flush()?)
}

fn run_perplexity(
    cli: &Cli,
    file: &Path,
    text: &Source<'_>,
    kl: bool,
    n_windows: Option<usize>,
) -> anyhow::Result<()> {
    let name = text.name();
    let text = join_documents(&read(text)?);
    let model = open(cli, file)?;
    let (tokenizer, mut session) = tokenizer_and_session(cli, &model, cli.seed())?;
    let mut dense =
        kl.then(|| self::session(cli, &model, max_positions(&model), MlpMode::Dense)).transpose()?;
    let options = PerplexityOptions {
        window: session.n_positions_max(),
        n_windows,
        n_batch: session.n_batch(),
        alpha_scale: cli.alpha_scale,
    };
    let ids = tokenizer.encode_plain(&text)?;
    let shows_progress = !cli.json && !cli.quiet && io::stderr().is_terminal();
    let mut progress = |n_done: usize, mean_nll: f64| {
        if shows_progress {
            say(format_args!("window {n_done}: perplexity {:.4} so far", mean_nll.exp()));
        }
    };
    let result = perplexity(&mut session, dense.as_mut(), &ids, &options, &mut progress);
    let result = result.map_err(|error| match error {
        PerplexityError::TextTooShort { .. } => anyhow::Error::new(error).context(name),
        _ => error.into(),
    })?;
    if cli.json { print_json(&result) } else { Ok(write_perplexity(&mut io::stdout().lock(), &result)?) }
}

fn write_perplexity(out: &mut dyn Write, result: &Perplexity) -> io::Result<()> {
    writeln!(
        out,
        "perplexity  {:.4} (mean nll {:.6}) over {} tokens, {} windows of {}",
        result.ppl, result.mean_nll, result.n_tokens, result.n_windows, result.window
    )?;
    if let Some(divergence) = &result.divergence {
        writeln!(
            out,
            "to dense    perplexity {:.4}, KL mean {:.6} max {:.4}, top-1 agreement {:.2} %",
            divergence.dense_ppl,
            divergence.kl_mean,
            divergence.kl_max,
            100.0 * divergence.top1_agreement
        )?;
    }
    writeln!(out, "\nlayer  predictor    widest   alpha    kept  active  recall  missed energy")?;
    for (idx, layer) in result.layers.iter().enumerate() {
        let limit = layer.limit.map_or_else(|| "-".to_owned(), limit_text);
        let alpha = layer.alpha.map_or_else(|| "-".to_owned(), |alpha| format!("{alpha:.4}"));
        writeln!(
            out,
            "{idx:>5}  {:<12}{limit:>7}  {alpha:>6}  {}  {}  {}  {:>11.4} %",
            layer.predictor,
            percent(layer.rows_kept),
            percent(layer.rows_active),
            percent(layer.recall),
            100.0 * layer.missed_energy
        )?;
    }
    if let Some(audit) = &result.audit {
        writeln!(out)?;
        audit.write(out)?;
        writeln!(out)?;
        audit.write_layers(out)?;
    }
    Ok(())
}

/// Text on stdout as it comes, for people; none where `--json` prints it later.
struct TextOutput {
    is_shown: bool,
    /// The last character was a newline, or there is none yet.
    ends_line: bool,
}

impl TextOutput {
    fn show(&mut self, text: &str) -> io::Result<()> {
        if !self.is_shown || text.is_empty() {
            return Ok(());
        }
        self.ends_line = text.ends_with('\n');
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// Ends the last line, as text files do.
    fn finish(&mut self) -> io::Result<()> {
        if self.ends_line { Ok(()) } else { self.show("\n") }
    }
}

/// A flag that the first Ctrl-C raises; the second one ends the program at once.
fn catch_interrupts() -> anyhow::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&interrupted);
    on_interrupt(move || raised.store(true, Ordering::Relaxed)).context("cannot catch Ctrl-C")?;
    Ok(interrupted)
}

/// All of a text.
fn read(source: &Source<'_>) -> anyhow::Result<String> {
    let name = source.name();
    let bytes = match source {
        Source::Text(text) => return Ok((*text).to_owned()),
        Source::File(path) => std::fs::read(path),
        Source::Stdin => {
            let mut bytes = Vec::new();
            io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
        }
    };
    let bytes = bytes.with_context(|| format!("{name}: cannot read"))?;
    String::from_utf8(bytes).map_err(|error| anyhow::anyhow!("{name}: {}", error.utf8_error()))
}

/// `text` without the newline that editors put at the end of a file.
fn without_last_newline(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

/// One line with one JSON value.
fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

/// A line on stderr; nobody is told when that is closed.
fn say(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// A limit on a count, or a threshold with three digits.
fn limit_text(limit: f32) -> String {
    if limit.fract() == 0.0 { limit.to_string() } else { format!("{limit:.3}") }
}

/// A share in six characters.
fn percent(share: f64) -> String {
    format!("{:>4.1} %", 100.0 * share)
}

/// Someone closed the pipe that text goes to: they have read enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// What to do about `error`, where there is something.
fn hint(error: &anyhow::Error) -> Option<&'static str> {
    error.chain().find_map(|cause| {
        cause
            .downcast_ref::<RuntimeError>()
            .and_then(RuntimeError::hint)
            .or_else(|| cause.downcast_ref::<DeviceError>()?.hint())
            .or_else(|| cause.downcast_ref::<GenerateError>()?.hint())
            .or_else(|| cause.downcast_ref::<PerplexityError>()?.hint())
    })
}
