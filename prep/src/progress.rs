//! How far a long command is, and whether it is to stop.

use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::PrepError;

/// Shared by every thread of a command: a bar on stderr if that is a terminal, and a flag that asks to stop.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    interrupted: AtomicBool,
}

impl Progress {
    /// A bar on stderr; in a pipe nothing is shown.
    pub fn on_terminal() -> Self {
        Self::new(ProgressDrawTarget::stderr())
    }

    /// Shows nothing anywhere.
    pub fn silent() -> Self {
        Self::new(ProgressDrawTarget::hidden())
    }

    fn new(target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let style = ProgressStyle::with_template("{msg:12} [{wide_bar}] {percent:>3}%  {eta} left")
            .expect("the template is well-formed")
            .progress_chars("=> ");
        bar.set_style(style);
        Self { bar, interrupted: AtomicBool::new(false) }
    }

    /// Starts a stage of `total` units.
    pub fn begin(&self, stage: &'static str, total: u64) {
        self.bar.reset();
        self.bar.set_length(total);
        self.bar.set_message(stage);
    }

    /// `n` more units are done. Long loops call this often, so here they hear that they are to stop.
    ///
    /// # Errors
    /// [`PrepError::Interrupted`] after [`Progress::interrupt`].
    pub fn advance(&self, n: u64) -> Result<(), PrepError> {
        self.bar.inc(n);
        self.check()
    }

    /// `done` units of this stage are done.
    pub fn set(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// # Errors
    /// [`PrepError::Interrupted`] after [`Progress::interrupt`].
    pub fn check(&self) -> Result<(), PrepError> {
        if self.is_interrupted() { Err(PrepError::Interrupted) } else { Ok(()) }
    }

    /// Asks every thread to stop at its next step.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
    }

    /// True after [`Progress::interrupt`].
    pub fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Units done in this stage.
    pub fn position(&self) -> u64 {
        self.bar.position()
    }

    /// Takes the bar off the screen, before anything else is printed.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_reaches_the_next_step() {
        let progress = Progress::silent();
        progress.begin("stage", 10);
        progress.advance(3).expect("not interrupted");
        assert_eq!(progress.position(), 3);
        progress.interrupt();
        assert!(matches!(progress.advance(1), Err(PrepError::Interrupted)));
        assert!(matches!(progress.check(), Err(PrepError::Interrupted)));
    }
}
