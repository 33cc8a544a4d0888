//! Bytes of pieces to text while they come: never half a character, never the beginning of a stop string.

/// Turns the bytes of pieces into text that may be shown at once.
///
/// Text is held back as long as it may still be part of a character or become a stop string. The buffers keep their
/// size, so that a long text stops allocating soon.
#[derive(Debug, Default)]
pub struct TextStream {
    stops: Vec<String>,
    held: Vec<u8>,
    ready: String,
}

/// What a piece made certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready<'a> {
    /// Text to show, possibly empty.
    pub text: &'a str,
    /// A stop string is complete: `text` is what came before it, and nothing more follows.
    pub stopped: bool,
}

impl TextStream {
    /// A stream that ends before the first of `stops`; empty ones are left out.
    pub fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(),
            held: Vec::with_capacity(256),
            ready: String::with_capacity(256),
        }
    }

    /// Adds the bytes of one piece and returns the text that is certain now.
    pub fn push(&mut self, piece: &[u8]) -> Ready<'_> {
        self.held.extend_from_slice(piece);
        let stop = self.stops.iter().filter_map(|stop| find(&self.held, stop.as_bytes())).min();
        let n_certain =
            stop.unwrap_or_else(|| self.held.len() - self.n_maybe_stop().max(n_incomplete(&self.held)));
        self.release(n_certain);
        if stop.is_some() {
            self.held.clear();
        }
        Ready { text: &self.ready, stopped: stop.is_some() }
    }

    /// The text held back so far, now that nothing follows. A character that was never completed becomes U+FFFD.
    pub fn finish(&mut self) -> &str {
        self.release(self.held.len());
        &self.ready
    }

    /// Length of the longest end of the held bytes that begins a stop string.
    fn n_maybe_stop(&self) -> usize {
        let longest = |stop: &String| {
            (1..stop.len().min(self.held.len() + 1))
                .rev()
                .find(|&len| self.held.ends_with(&stop.as_bytes()[..len]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }

    /// Moves the first `len` held bytes to `ready`, replacing what is not UTF-8.
    fn release(&mut self, len: usize) {
        self.ready.clear();
        for chunk in self.held[..len].utf8_chunks() {
            self.ready.push_str(chunk.valid());
            if !chunk.invalid().is_empty() {
                self.ready.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.held.drain(..len);
    }
}

/// Where `needle` first begins.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Length of the character that `bytes` ends in the middle of; 0 when it ends between two or in an invalid one.
fn n_incomplete(bytes: &[u8]) -> usize {
    // A character has at most four bytes: an unfinished one begins in the last three.
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    for (start, &byte) in tail.iter().enumerate() {
        if byte & 0b1100_0000 == 0b1100_0000 {
            let rest = &tail[start..];
            if let Err(error) = std::str::from_utf8(rest)
                && error.valid_up_to() == 0
                && error.error_len().is_none()
            {
                return rest.len();
            }
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(stops: &[&str]) -> TextStream {
        TextStream::new(&stops.iter().map(|&stop| stop.to_owned()).collect::<Vec<_>>())
    }

    /// Text shown for `pieces` and whether a stop string ended it.
    fn run(stream: &mut TextStream, pieces: &[&[u8]]) -> (String, bool) {
        let mut shown = String::new();
        for piece in pieces {
            let ready = stream.push(piece);
            shown.push_str(ready.text);
            if ready.stopped {
                return (shown, true);
            }
        }
        shown.push_str(stream.finish());
        (shown, false)
    }

    #[test]
    fn characters_are_shown_when_complete() {
        let mut stream = stream(&[]);
        let crab = "🦀".as_bytes();
        assert_eq!(stream.push(&crab[..1]).text, "");
        assert_eq!(stream.push(&crab[1..3]).text, "");
        assert_eq!(stream.push(&crab[3..]).text, "🦀");
        assert_eq!(stream.push(b"ab\xc3").text, "ab");
        assert_eq!(stream.push(b"\xa9").text, "é");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn invalid_bytes_do_not_hold_the_text_back() {
        let mut stream = stream(&[]);
        assert_eq!(stream.push(b"a\x80").text, "a\u{fffd}");
        assert_eq!(stream.push(b"\xff").text, "\u{fffd}");
        assert_eq!(stream.push(b"\xe2\x82").text, "");
        assert_eq!(stream.push(b"x").text, "\u{fffd}x");
        assert_eq!(stream.push(b"\xf0\x9f").text, "");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn a_stop_string_is_held_back_and_never_shown() {
        let mut stream = stream(&["\n\nUser:", "STOP"]);
        assert_eq!(stream.push(b"one\n"), Ready { text: "one", stopped: false });
        assert_eq!(stream.push(b"two\n\nUs"), Ready { text: "\ntwo", stopped: false });
        assert_eq!(stream.push(b"ers\n\n"), Ready { text: "\n\nUsers", stopped: false });
        assert_eq!(stream.push(b"User: x"), Ready { text: "", stopped: true });
    }

    #[test]
    fn the_first_of_several_stop_strings_counts() {
        assert_eq!(run(&mut stream(&["cd", "bc"]), &[b"abcd"]), ("a".to_owned(), true));
        assert_eq!(run(&mut stream(&["aab"]), &[b"a", b"a", b"a", b"b"]), ("a".to_owned(), true));
        assert_eq!(run(&mut stream(&["", "é"]), &[b"x\xc3", b"\xa9y"]), ("x".to_owned(), true));
        assert_eq!(run(&mut stream(&["zz"]), &[b"az"]), ("az".to_owned(), false));
    }

    proptest! {
        /// However the bytes are cut, the text is the one of all bytes at once, up to the first stop string.
        #[test]
        fn cuts_do_not_matter(
            text in "[ab é🦀\u{fffd}]{0,24}",
            stops in prop::collection::vec("[ab é🦀]{1,3}", 0..3),
            cuts in prop::collection::vec(0_usize..100, 0..12),
        ) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect();
            let (shown, stopped) = run(&mut TextStream::new(&stops), &pieces);
            let end = stops.iter().filter_map(|stop| text.find(stop.as_str())).min();
            // A stop string that is complete first may begin behind one that takes longer.
            if let Some(end) = end {
                prop_assert!(stopped && shown.len() >= end && stops.iter().all(|stop| !shown.contains(stop.as_str())));
                prop_assert!(text.starts_with(&shown));
                prop_assert!(stops.iter().any(|stop| text[shown.len()..].starts_with(stop.as_str())));
            } else {
                prop_assert_eq!((shown, stopped), (text, false));
            }
        }

        #[test]
        fn any_bytes_equal_the_lossy_text(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..8)) {
            let all = pieces.concat();
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let (shown, _) = run(&mut stream(&[]), &pieces);
            prop_assert_eq!(shown, String::from_utf8_lossy(&all));
        }
    }
}
