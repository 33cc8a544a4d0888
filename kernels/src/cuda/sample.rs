//! The draw of a token on the device (sample.cu).

use super::launch::{check_floats, check_state};
use super::{CudaError, Device, View};
use crate::sample::{Draw, SCALE_ONE};
use crate::shape::check;

const THREADS: usize = 1024;

/// A draw as [`crate::sample`] defines it.
#[derive(Clone, Copy, Debug)]
pub struct SampleCall<'a> {
    /// `(vocab_size,)` f32; those of excluded tokens become minus infinity, where they are not refused.
    pub logits: View<'a>,
    /// Tokens never chosen, u32; ids outside the vocabulary are nobody's.
    pub excluded: View<'a>,
    /// Token and position, two u32; the position is that of the token to be chosen, which becomes the token.
    pub state: View<'a>,
    /// The token once more, one u32, or one of [`Chosen`]'s codes.
    pub chosen: View<'a>,
    /// What is kept, and how it is weighed.
    pub draw: Draw,
    /// Start of the random sequence.
    pub seed: u64,
}

/// What a draw came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chosen {
    /// A token.
    Token(u32),
    /// A logit is NaN or plus infinity.
    BadLogit,
    /// Every logit is minus infinity.
    Empty,
}

impl Chosen {
    /// What the device wrote to `chosen`.
    pub fn of(code: u32) -> Self {
        match code {
            // SAMPLE_BAD_LOGIT and SAMPLE_EMPTY of sample.cu.
            0xffff_fffe => Self::BadLogit,
            0xffff_ffff => Self::Empty,
            id => Self::Token(id),
        }
    }
}

#[repr(C)]
struct SampleArgs {
    logits: u64,
    excluded: u64,
    state: u64,
    chosen: u64,
    seed: u64,
    top_p: u64,
    top_k: u32,
    distance_max: u32,
    scale: f32,
    scale_one: f32,
    n: i32,
    n_excluded: i32,
    greedy: i32,
}

impl Device {
    /// Draws the next token.
    ///
    /// # Errors
    /// [`CudaError::Shape`].
    pub fn sample(&self, call: &SampleCall<'_>) -> Result<(), CudaError> {
        let n = call.logits.len_bytes() / size_of::<f32>();
        check_floats("logits", n, call.logits)?;
        check_state(call.state)?;
        check("bytes of the chosen token", size_of::<u32>(), call.chosen.len_bytes())?;
        let n_excluded = call.excluded.len_bytes() / size_of::<u32>();
        check("bytes of excluded tokens", n_excluded * size_of::<u32>(), call.excluded.len_bytes())?;
        let Draw { greedy, top_k, top_p, distance_max, scale } = call.draw;
        let args = SampleArgs {
            logits: call.logits.address(),
            excluded: call.excluded.address(),
            state: call.state.address(),
            chosen: call.chosen.address(),
            seed: call.seed,
            top_p,
            top_k,
            distance_max,
            scale,
            scale_one: SCALE_ONE,
            n: n as i32,
            n_excluded: n_excluded as i32,
            greedy: greedy.into(),
        };
        // SAFETY: the kernel keeps to the lengths it is given, which were checked.
        unsafe { self.launch("sample", [1, 1, 1], THREADS, 0, &args) }
    }
}
