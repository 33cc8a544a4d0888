//! How far a load is, on one line of a terminal that goes away with the load.

use std::io::Write;
use std::time::{Duration, Instant};

/// Time between two lines.
const PAUSE: Duration = Duration::from_millis(100);

/// Shows how many bytes are loaded.
pub(crate) struct LoadProgress {
    /// None: nothing is shown.
    out: Option<Box<dyn Write>>,
    started: Instant,
    /// When a line was last written; none: nothing is to be cleared.
    written: Option<Instant>,
}

impl LoadProgress {
    pub(crate) fn new(out: Option<Box<dyn Write>>) -> Self {
        Self { out, started: Instant::now(), written: None }
    }

    /// `n_done` of `n_all` bytes are on their way.
    pub(crate) fn show(&mut self, n_done: usize, n_all: usize) {
        let Some(out) = &mut self.out else { return };
        if self.written.unwrap_or(self.started).elapsed() < PAUSE {
            return;
        }
        self.written = Some(Instant::now());
        // Nobody to tell when the terminal is closed.
        let _ = write!(out, "\r{}\x1b[K", line(n_done, n_all, self.started.elapsed()));
    }

    /// Takes the line away.
    pub(crate) fn clear(&mut self) {
        if let (Some(_), Some(out)) = (self.written.take(), &mut self.out) {
            let _ = write!(out, "\r\x1b[K");
        }
    }
}

fn line(n_done: usize, n_all: usize, elapsed: Duration) -> String {
    let gb = |n_bytes: usize| n_bytes as f64 * 1e-9;
    let gb_per_s = gb(n_done) / elapsed.as_secs_f64().max(1e-9);
    format!("loading {:.1} of {:.1} GB, {gb_per_s:.1} GB/s", gb(n_done), gb(n_all))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn lines_tell_bytes_and_speed() {
        let text = line(3_000_000_000, 13_700_000_000, Duration::from_millis(250));
        assert_eq!(text, "loading 3.0 of 13.7 GB, 12.0 GB/s");
    }

    #[test]
    fn nothing_is_written_where_nothing_is_shown() {
        let mut progress = LoadProgress::new(None);
        progress.started -= PAUSE;
        progress.show(1, 2);
        assert!(progress.written.is_none());
        let mut progress = LoadProgress::new(Some(Box::new(io::sink())));
        progress.show(1, 2);
        assert!(progress.written.is_none(), "too early");
        progress.started -= PAUSE;
        progress.show(1, 2);
        assert!(progress.written.is_some());
        progress.clear();
        assert!(progress.written.is_none());
    }
}
