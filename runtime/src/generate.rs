//! From a prompt to text: prefill, then choose, show and decode one token at a time.

use std::io;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::sampler::{Candidate, SampleError, Sampler, SamplerOptions, largest};
use crate::{RuntimeError, Session, TextStream, Tokenizer};

/// Most tokens of one batch of a prompt, for sessions that generate; [`Session::n_batch`] says how many are best.
pub const N_BATCH_MAX: usize = 512;

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most tokens; none: until the context is full.
    pub n_predict: Option<usize>,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Tokens that end the text, EOS above all.
    pub end_ids: Vec<u32>,
    /// True: `end_ids` are never chosen instead.
    pub ignore_end: bool,
    /// Strings that end the text; they are not part of it.
    pub stops: Vec<String>,
    /// Largest logits to keep of each step.
    pub n_top_logits: usize,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StopReason {
    /// The model chose a token that ends texts.
    Eos,
    /// As many tokens as asked for.
    Length,
    /// A stop string.
    Stop,
    /// No position is left.
    Context,
    /// The user interrupted.
    Interrupt,
}

impl StopReason {
    /// As JSON spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Length => "length",
            Self::Stop => "stop",
            Self::Context => "context",
            Self::Interrupt => "interrupt",
        }
    }
}

/// A text and how it came about.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Tokens chosen, the one that ended the text included.
    pub ids: Vec<u32>,
    /// The text, as it was shown.
    pub text: String,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// Largest logits of each step, as the model gave them: before penalties and exclusions.
    pub top_logits: Vec<Vec<Candidate>>,
    /// Time of the prompt and the first choice.
    pub prompt_time: Duration,
    /// Time of each later token: decode and choice, without showing it.
    pub step_times: Vec<Duration>,
}

/// Why a generation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The prompt has no token: an empty text for a model without BOS.
    #[error("the prompt is empty, and this model has no BOS token to begin with")]
    EmptyPrompt,
    /// The forward pass refused.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The logits are of no use.
    #[error("cannot choose token {n} of the text")]
    Sample {
        /// Which token, from 0.
        n: usize,
        /// Why.
        #[source]
        source: SampleError,
    },
    /// The text could not be shown.
    #[error("cannot write the text")]
    Show(#[source] io::Error),
}

impl GenerateError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::EmptyPrompt => Some("give a prompt with -p TEXT"),
            Self::Runtime(error) => error.hint(),
            Self::Sample { .. } | Self::Show(_) => None,
        }
    }
}

/// That `prompt` has a token and fits the context of `session`: what can be said before anything is shown.
///
/// # Errors
/// [`GenerateError::EmptyPrompt`], [`RuntimeError::ContextFull`].
pub fn check_prompt(session: &Session<'_>, prompt: &[u32]) -> Result<(), GenerateError> {
    let n_positions_max = session.n_positions_max();
    match prompt.len() {
        0 => Err(GenerateError::EmptyPrompt),
        wanted if wanted > n_positions_max => Err(session.context_full(wanted).into()),
        _ => Ok(()),
    }
}

/// Continues `prompt` in the empty context of `session`. Text goes to `show` as soon as it is certain;
/// `is_interrupted` is asked between tokens and between batches of the prompt.
///
/// # Errors
/// Those of [`check_prompt`], before anything is computed; [`GenerateError::Sample`]; those of `show`.
pub fn generate(
    session: &mut Session<'_>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    show: &mut dyn FnMut(&str) -> io::Result<()>,
    is_interrupted: &dyn Fn() -> bool,
) -> Result<Generated, GenerateError> {
    check_prompt(session, prompt)?;
    let n_positions_max = session.n_positions_max();
    // A prompt of n positions leaves room to choose from the last one's logits, hence the 1.
    let n_room = n_positions_max - prompt.len() + 1;
    let n_max = options.n_predict.map_or(n_room, |n_predict| n_predict.min(n_room));
    let excluded: &[u32] = if options.ignore_end { &options.end_ids } else { &[] };
    let mut sampler = Sampler::new(&options.sampler, session.model().config().vocab_size as usize, excluded);
    prompt.iter().for_each(|&id| sampler.accept(id));
    let mut stream = TextStream::new(&options.stops);
    // The space that encoding puts in front of a text belongs to the prompt, if that has a text.
    let mut at_start = prompt.iter().all(|&id| tokenizer.piece(id, &mut true).is_empty());
    let mut generated = Generated {
        ids: Vec::with_capacity(n_max),
        text: String::with_capacity(n_max.saturating_mul(4)),
        stop_reason: StopReason::Length,
        top_logits: Vec::with_capacity(if options.n_top_logits > 0 { n_max } else { 0 }),
        prompt_time: Duration::ZERO,
        step_times: Vec::with_capacity(n_max),
    };
    session.set_sampler(&options.sampler, excluded)?;
    let keep_top = |logits: &[f32], generated: &mut Generated| {
        if options.n_top_logits > 0 {
            let mut top = Vec::new();
            largest(logits, options.n_top_logits, &mut top);
            generated.top_logits.push(top);
        }
    };
    let take = |chosen: Result<u32, SampleError>, sampler: &mut Sampler, generated: &mut Generated| {
        let id = chosen.map_err(|source| GenerateError::Sample { n: generated.ids.len(), source })?;
        sampler.accept(id);
        generated.ids.push(id);
        Ok::<u32, GenerateError>(id)
    };

    let started = Instant::now();
    for batch in prompt.chunks(session.n_batch()) {
        if is_interrupted() {
            generated.stop_reason = StopReason::Interrupt;
            return Ok(generated);
        }
        session.prefill(batch)?;
    }
    generated.prompt_time = started.elapsed();
    if n_max == 0 {
        return Ok(generated);
    }
    let logits = session.prefill(&[])?;
    keep_top(logits, &mut generated);
    let chosen = sampler.sample(logits);
    let mut id = take(chosen, &mut sampler, &mut generated)?;
    generated.prompt_time = started.elapsed();

    generated.stop_reason = loop {
        if options.end_ids.contains(&id) {
            break StopReason::Eos;
        }
        let ready = stream.push(tokenizer.piece(id, &mut at_start));
        generated.text.push_str(ready.text);
        show(ready.text).map_err(GenerateError::Show)?;
        if ready.stopped {
            break StopReason::Stop;
        }
        if generated.ids.len() == n_max {
            break if options.n_predict == Some(n_max) { StopReason::Length } else { StopReason::Context };
        }
        if is_interrupted() {
            break StopReason::Interrupt;
        }
        let started = Instant::now();
        let chosen = if options.n_top_logits > 0 {
            let logits = session.decode(id)?;
            keep_top(logits, &mut generated);
            sampler.sample(logits)
        } else {
            session.decode_and_choose(id, &mut sampler)?
        };
        id = take(chosen, &mut sampler, &mut generated)?;
        generated.step_times.push(started.elapsed());
    };
    let rest = stream.finish();
    generated.text.push_str(rest);
    show(rest).map_err(GenerateError::Show)?;
    Ok(generated)
}
