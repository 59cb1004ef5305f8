//! Turns real values in what comes back into their placeholders again, as a stream, across chunk borders.
//!
//! Finds a value as it is, as it stands in JSON, in URLs, in HTML and in Base64, and the Basic credentials that were put in.
//! Other encodings of a server's own choice cannot be told. What is held back, and for how long, must never depend on how
//! a value goes on: a guest and a server together would guess it, one character after the other.

use super::patterns::Patterns;
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

    /// Looks for these from here on, in what is held too.
    pub(crate) fn look_for(&mut self, patterns: Arc<Patterns>) {
        self.patterns = patterns;
    }
}

impl<'a> Cleaner<&'a Patterns> {
    fn new_unshared(patterns: &'a Patterns) -> Self {
        Self { patterns, held: Vec::new(), shown: 0 }
    }
}

impl<P: std::ops::Deref<Target = Patterns>> Cleaner<P> {
    /// Takes the next bytes and gives what is certain: all but an end of which a value could be made, whatever the values.
    pub fn feed(&mut self, chunk: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(chunk);
        let until = self.patterns.held_from(&self.held);
        self.give(until, until)
    }

    /// Whether nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether something is held that need not wait for what follows: the end of a message, most likely.
    pub(crate) fn is_waiting(&self) -> bool {
        self.shown < self.patterns.kept_from(&self.held)
    }

    /// Gives such an end, and remembers it: were it the beginning of a value after all, the rest is still replaced.
    pub fn show(&mut self) -> Vec<u8> {
        let until = self.patterns.kept_from(&self.held);
        if until <= self.shown {
            return Vec::new();
        }
        self.give(until, self.patterns.held_from(&self.held))
    }

    /// The end: gives the rest.
    pub fn finish(&mut self) -> Vec<u8> {
        let all = self.held.len();
        self.give(all, all)
    }

    /// Gives what is held up to there and not shown yet. From `needed` on it stays, to be looked at with what follows.
    fn give(&mut self, until: usize, needed: usize) -> Vec<u8> {
        let text = &self.held;
        let mut out = Vec::with_capacity(text.len());
        let mut at = 0;
        for (found, placeholder) in self.patterns.find(text) {
            // One that begins where a longer one may still grow is not decided yet.
            if found.start >= until {
                break;
            }
            out.extend_from_slice(text.get(at.max(self.shown)..found.start).unwrap_or_default());
            out.extend_from_slice(placeholder);
            at = found.end;
        }
        let end = at.max(until);
        out.extend_from_slice(text.get(at.max(self.shown)..end).unwrap_or_default());
        let drained = at.max(needed);
        self.shown = self.shown.max(end).saturating_sub(drained);
        self.held.drain(..drained);
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
    pub(crate) fn feed_bytes(&mut self, mut chunk: Bytes) -> Bytes {
        if self.held.is_empty() && !self.patterns.is_in(&chunk) {
            self.held.extend_from_slice(&chunk.split_off(self.patterns.held_from(&chunk)));
            return chunk;
        }
        self.feed(&chunk).into()
    }

    /// As [`Self::feed_bytes`] and [`Self::finish`] at once, where nothing follows.
    pub(crate) fn end_with(&mut self, chunk: Bytes) -> Bytes {
        if self.held.is_empty() && !self.patterns.is_in(&chunk) {
            return chunk;
        }
        self.held.extend_from_slice(&chunk);
        self.finish().into()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::substitute::tests::policy, *};
    use base64::{
        Engine as _,
        engine::general_purpose::{STANDARD, URL_SAFE},
    };
    use zeroize::Zeroizing;

    fn patterns(secrets: &[(&str, &str)]) -> Arc<Patterns> {
        let hosts: &[&str] = &["*"];
        let secrets: Vec<_> = secrets.iter().map(|(name, value)| (*name, *value, hosts)).collect();
        Patterns::new(policy(&secrets).secrets.iter()).unwrap().unwrap()
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
    fn only_an_end_that_values_could_be_made_of_is_held_back() {
        let mut cleaner = Cleaner::new(patterns(&[("a", "secret-value")]));
        assert_eq!(cleaner.feed(b"data: hello\n\n"), b"data: hello\n\n");
        assert_eq!(cleaner.feed(b"data: sec"), b"data: ");
        assert_eq!(cleaner.feed(b"ond\n\n"), b"second\n\n");
        assert_eq!(cleaner.feed(b"secret-valu"), b"");
        assert_eq!(cleaner.finish(), b"secret-valu");
    }

    #[test]
    fn an_end_is_not_kept_waiting_and_is_remembered() {
        let mut cleaner = Cleaner::new(patterns(&[("a", "ghp_value-of-a-token")]));
        assert_eq!(cleaner.feed(b"message g"), b"message ");
        assert_eq!(cleaner.show(), b"g");
        assert_eq!(cleaner.show(), b"");
        assert_eq!(cleaner.feed(b"o on"), b"o ");
        assert_eq!(cleaner.feed(b" gh"), b"on ");
        assert_eq!(cleaner.show(), b"gh");
        assert_eq!(cleaner.feed(b"p_value-of-"), b"");
        assert_eq!(cleaner.show(), b"", "a piece of a value is not shown");
        assert_eq!(cleaner.feed(b"a-token"), b"");
        assert_eq!(cleaner.show(), b"IRONSH_PROXY_a");
        assert_eq!(cleaner.feed(b" ghp_value-of-a-token"), b" ");
        assert_eq!(cleaner.feed(b"!"), b"IRONSH_PROXY_a!");
        assert_eq!(cleaner.feed(b"gh"), b"");
        cleaner.show();
        assert_eq!(cleaner.finish(), b"");
    }

    /// All that a guest sees of an answer that ends in this and stands still: what comes at once, what comes after a while.
    fn seen(patterns: &Arc<Patterns>, text: &str) -> (usize, usize) {
        let mut cleaner = Cleaner::new(patterns.clone());
        let at_once = cleaner.feed_bytes(Bytes::copy_from_slice(text.as_bytes())).len();
        (at_once, if cleaner.is_waiting() { cleaner.show().len() } else { 0 })
    }

    #[test]
    fn what_is_held_back_tells_nothing_of_how_a_value_goes_on() {
        let value = "ghp_16C7e42F292c6912E7710c838347Ae178B4a";
        let patterns = patterns(&[("a", value)]);
        for known in 0..value.len() - 1 {
            for before in ["", "token ", "\n\n", "x", "-----"] {
                let right = format!("{before}{}", &value[..=known]);
                let wrong = format!("{before}{}!", &value[..known]).replace('!', "~");
                match (known + 1).is_multiple_of(12) {
                    // So much has to be guessed at once.
                    true => assert_ne!(seen(&patterns, &right), seen(&patterns, &wrong), "{right}"),
                    false => assert_eq!(seen(&patterns, &right), seen(&patterns, &wrong), "{right}"),
                }
            }
        }
    }

    #[test]
    fn what_a_value_looks_like_in_base64_is_found_whatever_stands_before() {
        let patterns = patterns(&[("a", "ghp_16C7e42F292c6912?>~")]);
        for before in ["", "u", "me", "git", "user"] {
            for engine in [STANDARD, URL_SAFE] {
                let text = engine.encode(format!("{before}:ghp_16C7e42F292c6912?>~, and more"));
                let cleaned = clean(&patterns, text.as_bytes(), 7);
                assert!(cleaned.contains("IRONSH_PROXY_a"), "{before}: {text} came as {cleaned}");
                let left = cleaned.split("IRONSH_PROXY_a").next().unwrap();
                assert!(left.len() * 6 / 8 <= before.len() + 2, "{before}: {left}");
            }
        }
        let short = self::patterns(&[("b", "abcd")]);
        assert_eq!(clean(&short, b"YWJjZAYWJjZA", 5), "YWJjZAYWJjZA", "so little turns up by chance");
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
