//! The next token from logits.
//!
//! The chain is llama.cpp's: repeat penalty, top-k, top-p, min-p, temperature, draw. What each step means is written in
//! [`kernels::sample`], in integers, so that a GPU draws the same token; randomness is a function of the seed and of the
//! token's position in the text. The same logits, options, seed and position give the same token. Nothing is allocated
//! after construction.

use std::cmp::Ordering;

use kernels::sample::{Draw, SCALE_ONE, distance, draw_need, random, top_p_need, weight};

/// Tokens that the repeat penalty looks back on (llama.cpp's `repeat_last_n`).
const N_PENALISED: usize = 64;

/// How tokens are chosen. The defaults are llama.cpp's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits before the draw; 0 takes the most probable token.
    pub temp: f64,
    /// Candidates kept; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest candidates whose probabilities reach this sum; 1 keeps all.
    pub top_p: f64,
    /// Keeps candidates at least this probable in relation to the best; 0 keeps all.
    pub min_p: f64,
    /// Lowers the logits of the last 64 tokens; 1 leaves them.
    pub repeat_penalty: f64,
    /// Start of the random sequence.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self { temp: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, repeat_penalty: 1.0, seed: 0 }
    }
}

/// Why no token can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// A logit that is NaN or plus infinity.
    #[error("the logit of token {id} is {logit}")]
    Logit {
        /// The token.
        id: usize,
        /// Its logit.
        logit: f32,
    },
    /// Every token is excluded or at minus infinity, or there are no logits.
    #[error("no token is left to choose from")]
    Empty,
}

/// A token and its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Token.
    pub id: u32,
    /// Its logit.
    pub logit: f32,
}

impl Candidate {
    /// Larger logits first, ties by the lower id.
    fn order(&self, other: &Self) -> Ordering {
        other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// Chooses tokens.
#[derive(Debug)]
pub struct Sampler {
    draw: Draw,
    seed: u64,
    /// Tokens of the text so far: the position of the next one.
    n_accepted: u32,
    adjustment: Adjustment,
    /// Distance from the best in the upper half, id in the lower one.
    candidates: Vec<u64>,
}

impl SamplerOptions {
    /// The part that is about the chances of tokens.
    pub fn draw(&self) -> Draw {
        Draw::new(self.temp, self.top_k, self.top_p, self.min_p)
    }
}

impl Sampler {
    /// A sampler over `vocab_size` tokens that never chooses one of `excluded`.
    pub fn new(options: &SamplerOptions, vocab_size: usize, excluded: &[u32]) -> Self {
        Self {
            draw: options.draw(),
            seed: options.seed,
            n_accepted: 0,
            adjustment: Adjustment {
                repeat_penalty: options.repeat_penalty as f32,
                recent: Vec::with_capacity(N_PENALISED),
                next_recent: 0,
                excluded: excluded.to_vec(),
                logits: Vec::with_capacity(vocab_size),
            },
            candidates: Vec::with_capacity(2 * vocab_size),
        }
    }

    /// Tells of the next token of the text: the repeat penalty remembers it, and the draw after it is another one.
    pub fn accept(&mut self, id: u32) {
        self.n_accepted = self.n_accepted.wrapping_add(1);
        self.adjustment.accept(id);
    }

    /// The next token for `logits`, `(vocab_size,)`; minus infinity is never chosen.
    ///
    /// # Errors
    /// [`SampleError::Logit`] for NaN and plus infinity, [`SampleError::Empty`] when nothing may be chosen.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        let is_bad = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
        if best(logits).is_none()
            && let Some(id) = logits.iter().position(is_bad)
        {
            return Err(SampleError::Logit { id, logit: logits[id] });
        }
        let draw = self.draw;
        let logits = self.adjustment.apply(logits);
        if draw.greedy {
            // Exactly the largest: distances tell apart no logits closer than 2^-27.
            let best = best(logits).filter(|&best| best > f32::NEG_INFINITY).ok_or(SampleError::Empty)?;
            return logits
                .iter()
                .zip(0..)
                .find_map(|(&logit, id)| (logit == best).then_some(id))
                .ok_or(SampleError::Empty);
        }
        let n_kept = if draw.top_k == 0 { usize::MAX } else { draw.top_k as usize };
        let candidates = &mut self.candidates;
        nearest(logits, n_kept, candidates);
        if candidates.is_empty() {
            return Err(SampleError::Empty);
        }
        let weigh = |scale: f32| move |candidate: &u64| weight((candidate >> 32) as u32, scale);
        if draw.top_p < 1 << 32 {
            let total = candidates.iter().map(weigh(SCALE_ONE)).sum();
            candidates.truncate(reach(candidates, weigh(SCALE_ONE), top_p_need(total, draw.top_p)) + 1);
        }
        candidates
            .truncate(candidates.partition_point(|candidate| (candidate >> 32) as u32 <= draw.distance_max));
        let total = candidates.iter().map(weigh(draw.scale)).sum();
        let need = draw_need(total, random(self.seed, self.n_accepted));
        Ok(candidates[reach(candidates, weigh(draw.scale), need)] as u32)
    }
}

/// What is done to logits before candidates are taken from them.
#[derive(Debug)]
struct Adjustment {
    repeat_penalty: f32,
    /// The last tokens; the oldest is overwritten once there are [`N_PENALISED`].
    recent: Vec<u32>,
    /// Where in `recent` the next token goes.
    next_recent: usize,
    /// Tokens never chosen.
    excluded: Vec<u32>,
    /// The adjusted logits.
    logits: Vec<f32>,
}

impl Adjustment {
    fn accept(&mut self, id: u32) {
        if self.recent.len() < N_PENALISED {
            self.recent.push(id);
        } else {
            self.recent[self.next_recent] = id;
        }
        self.next_recent = (self.next_recent + 1) % N_PENALISED;
    }

    /// `logits` with the repeat penalty and without excluded tokens; as they are where there is nothing to do.
    fn apply<'a>(&'a mut self, logits: &'a [f32]) -> &'a [f32] {
        let penalised: &[u32] = if self.repeat_penalty == 1.0 { &[] } else { &self.recent };
        if penalised.is_empty() && self.excluded.is_empty() {
            return logits;
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        for &id in penalised {
            // Computed from the original, so that a token repeated in the window is penalised once.
            if let (Some(adjusted), Some(&logit)) =
                (self.logits.get_mut(id as usize), logits.get(id as usize))
            {
                let lowered =
                    if logit > 0.0 { logit / self.repeat_penalty } else { logit * self.repeat_penalty };
                *adjusted = lowered.clamp(f32::MIN, f32::MAX);
            }
        }
        for &id in &self.excluded {
            if let Some(adjusted) = self.logits.get_mut(id as usize) {
                *adjusted = f32::NEG_INFINITY;
            }
        }
        &self.logits
    }
}

/// The `n` largest logits in order into `out`, which needs room for `2 n` to not allocate.
///
/// One pass: what is smaller than the n-th largest so far is never stored, and the store is cut to n when it
/// has grown to twice that.
pub fn largest(logits: &[f32], n: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let n = n.min(logits.len());
    if n == 0 {
        return;
    }
    let mut threshold = f32::NEG_INFINITY;
    let mut is_full = false;
    for (id, &logit) in logits.iter().enumerate() {
        // A tie with the threshold has a higher id than what is stored, so it loses.
        if is_full && logit <= threshold {
            continue;
        }
        out.push(Candidate { id: id as u32, logit });
        if out.len() == 2 * n {
            out.select_nth_unstable_by(n - 1, Candidate::order);
            out.truncate(n);
            threshold = out[n - 1].logit;
            is_full = true;
        }
    }
    out.sort_unstable_by(Candidate::order);
    out.truncate(n);
}

/// The largest logit, minus infinity of none; `None` if one is NaN or plus infinity.
fn best(logits: &[f32]) -> Option<f32> {
    // As many at a time as wide registers hold.
    const LANES: usize = 32;
    let (mut best, mut good) = ([f32::NEG_INFINITY; LANES], [true; LANES]);
    let mut see = |lane: usize, logit: f32| {
        good[lane] &= logit < f32::INFINITY;
        best[lane] = if logit > best[lane] { logit } else { best[lane] };
    };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        (0..LANES).for_each(|lane| see(lane, chunk[lane]));
    }
    rest.iter().enumerate().for_each(|(lane, &logit)| see(lane, logit));
    good.iter().all(|good| *good).then(|| best.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

/// The `n` candidates nearest to the best in order into `out`, which needs room for twice as many to not allocate. No
/// logit is NaN or plus infinity.
fn nearest(logits: &[f32], n: usize, out: &mut Vec<u64>) {
    out.clear();
    let n = n.min(logits.len());
    let Some(best) = best(logits) else { return };
    // As in `largest`: what lies behind the n-th of those seen is never stored. No smaller logit is nearer, and an equal
    // one has a higher id.
    let mut threshold = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit <= threshold {
            continue;
        }
        let Some(distance) = distance(best, logit) else { continue };
        out.push(u64::from(distance) << 32 | id as u64);
        if out.len() == 2 * n {
            let last = *out.select_nth_unstable(n - 1).1;
            threshold = logits[last as u32 as usize];
            out.truncate(n);
        }
    }
    out.sort_unstable();
    out.truncate(n);
}

/// The index at which the running sum of weights reaches `need`.
fn reach(candidates: &[u64], weigh: impl Fn(&u64) -> u64, need: u64) -> usize {
    let mut running = 0;
    let found = candidates.iter().position(|candidate| {
        running += weigh(candidate);
        running >= need
    });
    found.expect("need is at most the sum")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// No filter, no penalty, temperature 1.
    const PLAIN: SamplerOptions =
        SamplerOptions { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0, seed: 1 };
    const GREEDY: SamplerOptions = SamplerOptions { temp: 0.0, ..PLAIN };

    /// How often each token is drawn in `n` draws.
    fn count(options: SamplerOptions, logits: &[f32], n: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(&options, logits.len(), &[]);
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            let id = sampler.sample(logits).expect("finite");
            sampler.accept(id);
            counts[id as usize] += 1;
        }
        counts
    }

    /// Logits of probabilities.
    fn logits_of(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn greedy_takes_the_largest_and_ties_go_to_the_lower_id() {
        let mut sampler = Sampler::new(&GREEDY, 5, &[]);
        assert_eq!(sampler.sample(&[0.0, 3.0, -1.0, 3.0, 2.0]), Ok(1));
        assert_eq!(sampler.sample(&[-0.0, 0.0, -1.0, -3.0, -2.0]), Ok(0));
        assert_eq!(sampler.sample(&[-5.0; 5]), Ok(0));
        assert_eq!(sampler.sample(&[1e-9, 2e-9, 3e-9, -1.0, f32::NEG_INFINITY]), Ok(2));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 5]), Err(SampleError::Empty));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let counts = count(PLAIN, &logits_of(&[0.5, 0.25, 0.125, 0.125]), 80_000);
        for (count, expected) in counts.iter().zip([40_000, 20_000, 10_000, 10_000]) {
            // Five standard deviations of a binomial count are below 710.
            assert!(count.abs_diff(expected) < 710, "{counts:?}");
        }
        // Temperature 0.5 squares them: 16 : 4 : 1 : 1.
        let counts =
            count(SamplerOptions { temp: 0.5, ..PLAIN }, &logits_of(&[0.5, 0.25, 0.125, 0.125]), 88_000);
        for (count, expected) in counts.iter().zip([64_000, 16_000, 4_000, 4_000]) {
            assert!(count.abs_diff(expected) < 710, "{counts:?}");
        }
    }

    /// Which tokens can be drawn.
    fn drawn(options: SamplerOptions, logits: &[f32]) -> Vec<usize> {
        let counts = count(options, logits, 4_000);
        (0..logits.len()).filter(|&id| counts[id] > 0).collect()
    }

    #[test]
    fn filters_keep_what_they_should() {
        let logits = logits_of(&[0.1, 0.4, 0.2, 0.3]);
        assert_eq!(drawn(SamplerOptions { top_k: 2, ..PLAIN }, &logits), [1, 3]);
        assert_eq!(drawn(SamplerOptions { top_k: 9, ..PLAIN }, &logits), [0, 1, 2, 3]);
        // 0.4 does not reach 0.6, 0.4 + 0.3 does.
        assert_eq!(drawn(SamplerOptions { top_p: 0.6, ..PLAIN }, &logits), [1, 3]);
        assert_eq!(drawn(SamplerOptions { top_p: 0.0, ..PLAIN }, &logits), [1]);
        // 0.2 / 0.4 is not below 0.4, 0.1 / 0.4 is.
        assert_eq!(drawn(SamplerOptions { min_p: 0.4, ..PLAIN }, &logits), [1, 2, 3]);
        assert_eq!(drawn(SamplerOptions { min_p: 1.0, ..PLAIN }, &logits), [1]);
    }

    /// Top-k comes first: of 0.4, 0.3, 0.2 the first two have 7/9 of the mass, so a top-p of 0.75 is reached.
    #[test]
    fn filters_run_in_the_order_of_llama_cpp() {
        let logits = logits_of(&[0.1, 0.4, 0.2, 0.3]);
        assert_eq!(drawn(SamplerOptions { top_p: 0.75, ..PLAIN }, &logits), [1, 2, 3]);
        assert_eq!(drawn(SamplerOptions { top_k: 3, top_p: 0.75, ..PLAIN }, &logits), [1, 3]);
        // The temperature comes last: it does not move what min-p keeps.
        assert_eq!(drawn(SamplerOptions { min_p: 0.4, temp: 5.0, ..PLAIN }, &logits), [1, 2, 3]);
    }

    #[test]
    fn the_penalty_lowers_recent_tokens_once_and_forgets_old_ones() {
        let logits = [2.0, 1.5, -1.0, -1.2];
        let mut sampler = Sampler::new(&SamplerOptions { repeat_penalty: 2.0, ..GREEDY }, 4, &[]);
        assert_eq!(sampler.sample(&logits), Ok(0));
        sampler.accept(0);
        sampler.accept(0);
        // 2.0 / 2 = 1.0 < 1.5, and not 0.5.
        assert_eq!(sampler.sample(&logits), Ok(1));
        assert_eq!(sampler.sample(&[2.0, 0.9, -1.0, -1.2]), Ok(0));
        // Negative logits move down: -1.0 * 2.
        sampler.accept(2);
        assert_eq!(sampler.sample(&[-9.0, -9.0, -1.0, -1.2]), Ok(3));
        // Ids outside the vocabulary are nobody's.
        (0..64).for_each(|_| sampler.accept(77));
        assert_eq!(sampler.sample(&logits), Ok(0));
    }

    #[test]
    fn excluded_tokens_are_never_chosen() {
        let mut sampler = Sampler::new(&GREEDY, 3, &[1, 9]);
        assert_eq!(sampler.sample(&[0.0, 5.0, 1.0]), Ok(2));
        let mut sampler = Sampler::new(&PLAIN, 2, &[0, 1]);
        assert_eq!(sampler.sample(&[0.0, 5.0]), Err(SampleError::Empty));
    }

    #[test]
    fn numbers_that_are_none_are_errors() {
        for bad in [f32::NAN, f32::INFINITY] {
            for options in [GREEDY, PLAIN, SamplerOptions::default()] {
                let found = Sampler::new(&options, 3, &[]).sample(&[0.0, bad, 1.0]);
                assert!(matches!(found, Err(SampleError::Logit { id: 1, .. })), "{bad}: {found:?}");
            }
        }
        assert_eq!(Sampler::new(&PLAIN, 0, &[]).sample(&[]), Err(SampleError::Empty));
        assert_eq!(Sampler::new(&PLAIN, 2, &[]).sample(&[f32::NEG_INFINITY; 2]), Err(SampleError::Empty));
        assert_eq!(Sampler::new(&PLAIN, 2, &[]).sample(&[f32::NEG_INFINITY, -9.0]), Ok(1));
    }

    /// Fixed once: a change of these ids changes everyone's seeded texts.
    #[test]
    fn a_seed_means_the_same_tokens_for_ever() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37 % 101) as f32) / 10.0).collect();
        let mut sampler = Sampler::new(&SamplerOptions { seed: 42, ..SamplerOptions::default() }, 1000, &[]);
        let mut next = || {
            let id = sampler.sample(&logits).expect("finite");
            sampler.accept(id);
            id
        };
        let ids: Vec<u32> = (0..8).map(|_| next()).collect();
        assert_eq!(ids, [565, 60, 292, 393, 19, 939, 696, 363]);
    }

    proptest! {
        #[test]
        fn a_sample_is_the_reference(
            logits in prop::collection::vec(
                prop_oneof![-9.0_f32..3.0, Just(0.0), Just(1.0), Just(f32::NEG_INFINITY), -1e30_f32..1e30], 0..90,
            ),
            temp in prop_oneof![Just(0.0), Just(1e-30), 0.01..4.0], top_k in 0_usize..100,
            top_p in prop_oneof![Just(1.0), Just(0.0), 0.0..1.0], min_p in prop_oneof![Just(0.0), Just(1.0), 0.0..1.0],
            seed: u64, n_accepted in 0_u32..5,
        ) {
            let options = SamplerOptions { temp, top_k, top_p, min_p, repeat_penalty: 1.0, seed };
            let mut sampler = Sampler::new(&options, logits.len(), &[]);
            (0..n_accepted).for_each(|id| sampler.accept(id));
            let want = kernels::sample::reference(&logits, &options.draw(), random(seed, n_accepted));
            prop_assert_eq!(sampler.sample(&logits), want.ok_or(SampleError::Empty));
        }

        #[test]
        fn largest_equals_a_full_sort(
            logits in prop::collection::vec(prop_oneof![-3.0_f32..3.0, Just(0.0), Just(1.0)], 0..60),
            n in 0_usize..70,
        ) {
            let mut expected: Vec<Candidate> =
                logits.iter().zip(0..).map(|(&logit, id)| Candidate { id, logit }).collect();
            expected.sort_by(Candidate::order);
            expected.truncate(n);
            let mut found = Vec::with_capacity(2 * n);
            largest(&logits, n, &mut found);
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_finite_logits_give_a_token_of_the_vocabulary_and_allocate_nothing(
            logits in prop::collection::vec(prop_oneof![
                -30.0_f32..30.0, Just(f32::MAX), Just(f32::MIN), Just(f32::MIN_POSITIVE)
            ], 1..40),
            temp in prop_oneof![Just(0.0_f64), 1e-30_f64..1e30],
            top_k in 0_usize..50,
            top_p in 0.0_f64..=1.0,
            min_p in 0.0_f64..=1.0,
            repeat_penalty in 1e-30_f64..1e30,
            seed: u64,
        ) {
            let options = SamplerOptions { temp, top_k, top_p, min_p, repeat_penalty, seed };
            let draw = || {
                let mut sampler = Sampler::new(&options, logits.len(), &[]);
                let capacities = |s: &Sampler| {
                    (s.candidates.capacity(), s.adjustment.logits.capacity())
                };
                let before = capacities(&sampler);
                let ids: Vec<u32> = (0..70)
                    .map(|_| {
                        let id = sampler.sample(&logits).expect("finite");
                        sampler.accept(id);
                        id
                    })
                    .collect();
                assert_eq!(capacities(&sampler), before);
                ids
            };
            let ids = draw();
            prop_assert!(ids.iter().all(|&id| (id as usize) < logits.len()));
            prop_assert_eq!(draw(), ids);
        }
    }
}
