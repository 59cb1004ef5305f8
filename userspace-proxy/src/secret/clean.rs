//! Turns real values in what comes back into their placeholders again, as a stream, across chunk borders.
//!
//! Holds back only what could be the beginning of a value, so that event streams are not delayed. Finds a value as it
//! is, as it stands in JSON and in URLs, and inside the Basic credentials that were put in. Other encodings of a server's
//! own choice cannot be told.

use super::patterns::{Patterns, SHORTEST};
use bytes::Bytes;
use std::sync::Arc;
use zeroize::Zeroize as _;

impl Patterns {
    /// A text that is whole, such as a header's value; `None` if it is clean.
    pub fn clean_whole(&self, text: &[u8]) -> Option<Vec<u8>> {
        if !self.is_in(text) {
            return None;
        }
        let mut cleaner = Cleaner::new_unshared(self);
        let mut out = cleaner.feed(text);
        out.extend(cleaner.finish());
        Some(out)
    }
}

/// Cleans one body. Generic over how the patterns are held.
pub struct Cleaner<P = Arc<Patterns>> {
    patterns: P,
    held: Vec<u8>,
    /// So many octets of what is held were given out already, for nothing followed them.
    shown: usize,
}

impl Cleaner {
    /// A cleaner at the beginning of a body.
    pub fn new(patterns: Arc<Patterns>) -> Self {
        Self { patterns, held: Vec::new(), shown: 0 }
    }
}

impl<'a> Cleaner<&'a Patterns> {
    fn new_unshared(patterns: &'a Patterns) -> Self {
        Self { patterns, held: Vec::new(), shown: 0 }
    }
}

impl<P: std::ops::Deref<Target = Patterns>> Cleaner<P> {
    /// Takes the next bytes and gives what is certain.
    pub fn feed(&mut self, chunk: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(chunk);
        self.take(false)
    }

    /// Whether nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether something short is held that nothing may follow for long: the end of a message, most likely.
    pub(crate) fn is_waiting(&self) -> bool {
        self.shown < self.held.len() && self.held.len() < SHORTEST
    }

    /// Gives such an end, and remembers it: were it the beginning of a value after all, the rest is still replaced.
    pub fn show(&mut self) -> Vec<u8> {
        if !self.is_waiting() {
            return Vec::new();
        }
        let end = self.held[self.shown..].to_vec();
        self.shown = self.held.len();
        end
    }

    /// The end: gives the rest.
    pub fn finish(&mut self) -> Vec<u8> {
        self.take(true)
    }

    fn take(&mut self, end: bool) -> Vec<u8> {
        let text = &self.held;
        let held_from = if end { text.len() } else { self.patterns.held_from(text) };
        let mut out = Vec::with_capacity(text.len());
        let mut at = 0;
        for (found, placeholder) in self.patterns.find(text) {
            // One that begins where a longer one may still grow is not decided yet.
            if found.start >= held_from {
                break;
            }
            out.extend_from_slice(text.get(at.max(self.shown)..found.start).unwrap_or_default());
            out.extend_from_slice(placeholder);
            at = found.end;
        }
        let keep = at.max(held_from);
        out.extend_from_slice(text.get(at.max(self.shown)..keep).unwrap_or_default());
        self.held.drain(..keep);
        self.shown = self.shown.saturating_sub(keep);
        out
    }
}

impl<P> Drop for Cleaner<P> {
    fn drop(&mut self) {
        self.held.zeroize();
    }
}

impl<P: std::ops::Deref<Target = Patterns>> Cleaner<P> {
    /// As [`Self::feed`], sparing the copy where nothing is held and nothing found.
    pub(crate) fn feed_bytes(&mut self, chunk: Bytes) -> Bytes {
        if self.held.is_empty()
            && !self.patterns.is_in(&chunk)
            && self.patterns.held_from(&chunk) == chunk.len()
        {
            return chunk;
        }
        self.feed(&chunk).into()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::substitute::tests::policy, *};
    use zeroize::Zeroizing;

    fn patterns(secrets: &[(&str, &str)]) -> Arc<Patterns> {
        let hosts: &[&str] = &["*"];
        let secrets: Vec<_> = secrets.iter().map(|(name, value)| (*name, *value, hosts)).collect();
        Patterns::new(&policy(&secrets).secrets).unwrap().unwrap()
    }

    fn clean(patterns: &Arc<Patterns>, text: &[u8], size: usize) -> String {
        let mut cleaner = Cleaner::new(patterns.clone());
        let mut out = Vec::new();
        for chunk in text.chunks(size) {
            out.extend(cleaner.feed(chunk));
        }
        out.extend(cleaner.finish());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn values_are_found_across_every_border() {
        let patterns = patterns(&[("a", "ghp_abcabcabd"), ("b", "ghp_abc"), ("c", "pass\"w/rd")]);
        let text =
            r#"x ghp_abcabcabcabd y ghp_abc ghp_ab {"p":"pass\"w\/rd"} pass%22w%2Frd pass"w/rd ghp_abcabcab"#;
        let clean_text = "x IRONSH_PROXY_babcabcabd y IRONSH_PROXY_b ghp_ab {\"p\":\"IRONSH_PROXY_c\"} IRONSH_PROXY_c IRONSH_PROXY_c IRONSH_PROXY_babcab";
        for size in 1..=text.len() {
            assert_eq!(clean(&patterns, text.as_bytes(), size), clean_text, "{size}");
        }
    }

    #[test]
    fn only_what_could_become_a_value_is_held_back() {
        let mut cleaner = Cleaner::new(patterns(&[("a", "secret-value")]));
        assert_eq!(cleaner.feed(b"data: hello\n\n"), b"data: hello\n\n");
        assert_eq!(cleaner.feed(b"data: sec"), b"data: ");
        assert_eq!(cleaner.feed(b"ond\n\n"), b"second\n\n");
        assert_eq!(cleaner.feed(b"secret-valu"), b"");
        assert_eq!(cleaner.finish(), b"secret-valu");
    }

    #[test]
    fn a_short_end_is_not_kept_waiting_and_gives_nothing_away() {
        let mut cleaner = Cleaner::new(patterns(&[("a", "ghp_value")]));
        assert_eq!(cleaner.feed(b"message g"), b"message ");
        assert_eq!(cleaner.show(), b"g");
        assert_eq!(cleaner.show(), b"");
        assert_eq!(cleaner.feed(b"o on"), b"o on");
        assert_eq!(cleaner.feed(b"gh"), b"");
        assert_eq!(cleaner.show(), b"gh");
        assert_eq!(cleaner.feed(b"p_val"), b"");
        assert_eq!(cleaner.show(), b"", "half a value is never shown");
        assert_eq!(cleaner.feed(b"ue!"), b"IRONSH_PROXY_a!");
        assert_eq!(cleaner.feed(b"gh"), b"");
        cleaner.show();
        assert_eq!(cleaner.finish(), b"");
    }

    #[test]
    fn credentials_become_what_the_guest_sent() {
        let credentials = vec![(Zeroizing::new(b"Z2l0OnMzY3IzdA==".to_vec()), b"Z2l0OlA=".to_vec())];
        let patterns = Patterns::with(None, credentials).unwrap().unwrap();
        assert_eq!(clean(&patterns, b"Basic Z2l0OnMzY3IzdA==.", 3), "Basic Z2l0OlA=.");
        assert!(patterns.clean_whole(b"clean").is_none());
        assert!(Patterns::with(Patterns::new(&[]).unwrap(), Vec::new()).unwrap().is_none());
        assert!(!format!("{patterns:?}").contains("Z2l0"));
    }
}
