//! What is looked for in answers: the values of an account's secrets, and beside them the credentials of one request.
//!
//! The first are made once for a set of secrets, so that a request costs the same however many there are. Memory and time
//! are bounded; what cannot be looked for is an error, and never "nothing to look for".

use aho_corasick::{AhoCorasick, AhoCorasickKind, Input, Match, MatchKind};
use base64::{
    Engine as _,
    engine::general_purpose::{GeneralPurpose, STANDARD, URL_SAFE},
};
use std::{cmp::Reverse, fmt, ops::Range, sync::Arc};
use tapgate_model::SecretBinding;
use zeroize::Zeroizing;

/// Shorter values would turn up by chance in any text, and are guessed as fast as read.
const SHORTEST: usize = 4;
/// The same in Base64, where fewer characters stand for less.
const SHORTEST_BASE64: usize = 8;
/// Most octets that are looked for, all spellings together: what an account may have, each octet at its longest.
pub(super) const MOST: usize = 7 * 1024 * 1024;
/// The beginning of a value is known by pieces of so many octets. Who tries to find out what the next one is, by whether
/// something is held back, has to guess all of it at once: 2⁴⁸ tries for the digits of a hash. As little of a value can come
/// through where it is torn in two by a pause.
const PIECE: usize = 12;
/// How much is held back is a multiple of this, so that it says little of how long a value is.
const REACH: usize = 64;

/// Values that are too many or too long to look for. Nothing may pass that could hold one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the account's secrets are too long together to be looked for in answers; delete some")]
pub struct Unsearchable;

struct Pair {
    value: Zeroizing<Vec<u8>>,
    placeholder: Vec<u8>,
}

/// Values with what is put in their stead.
struct Set {
    /// In the order of the values.
    pairs: Vec<Pair>,
    automaton: AhoCorasick,
    /// How much of an end is held back at most.
    reach: usize,
    /// What an end is made of that is held back.
    held: Kinds,
}

/// Kinds of octets. An end is held back by the kinds in it alone, so that it says nothing of a value but which kinds it has.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Kinds(u8);

impl Kinds {
    /// The kind of an octet: what tokens are made of, other graphic characters, spaces, controls, and the rest.
    const fn of(octet: u8) -> Self {
        Self(match octet {
            b'A'..=b'Z'
            | b'a'..=b'z'
            | b'0'..=b'9'
            | b'-'
            | b'_'
            | b'.'
            | b'~'
            | b'+'
            | b'/'
            | b'='
            | b'%' => 1,
            b'!'..=b'~' => 2,
            b' ' | b'\t' => 4,
            0..=31 | 127 => 8,
            128.. => 16,
        })
    }

    /// All of both.
    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the kind is one of these.
    const fn have(self, kind: Self) -> bool {
        self.0 & kind.0 != 0
    }
}

impl Set {
    /// `None` if there is nothing to look for.
    fn new(mut pairs: Vec<Pair>) -> Result<Option<Arc<Self>>, Unsearchable> {
        pairs.retain(|pair| pair.value.len() >= SHORTEST);
        // Of equal values the one that was there first stays: the sort keeps their order.
        pairs.sort_by(|a, b| a.value.cmp(&b.value));
        pairs.dedup_by(|later, first| later.value == first.value);
        let Some(longest) = pairs.iter().map(|pair| pair.value.len()).max() else { return Ok(None) };
        if octets(&pairs) > MOST {
            return Err(Unsearchable);
        }
        let all = pairs.iter().flat_map(|pair| pair.value.iter());
        let held = all.fold(Kinds::default(), |kinds, octet| kinds.and(Kinds::of(*octet)));
        let reach = (longest - 1).next_multiple_of(REACH);
        // A DFA, which few patterns would get otherwise, takes a kilobyte for each octet of them.
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(pairs.iter().map(|pair| pair.value.as_slice()))
            .map_err(|_| Unsearchable)?;
        Ok(Some(Arc::new(Self { pairs, automaton, reach, held })))
    }

    /// Where the end begins that is held back.
    fn held_from(&self, text: &[u8]) -> usize {
        let from = text.len().saturating_sub(self.reach);
        let other = text[from..].iter().rposition(|octet| !self.held.have(Kinds::of(*octet)));
        other.map_or(from, |other| from + other + 1)
    }

    /// Where the longest end begins that is a value's beginning, as far as whole pieces of it tell.
    fn kept_from(&self, text: &[u8]) -> usize {
        let last = (text.len() + 1).saturating_sub(PIECE);
        (self.held_from(text)..last).find(|at| self.begins(&text[*at..])).unwrap_or(text.len())
    }

    /// Whether a value is longer than this and has its whole pieces.
    fn begins(&self, end: &[u8]) -> bool {
        let known = &end[..end.len() / PIECE * PIECE];
        // In their order, the values that begin with it come one after the other.
        let from = self.pairs.partition_point(|pair| pair.value.as_slice() < known);
        let like = self.pairs[from..].iter().take_while(|pair| pair.value.starts_with(known));
        like.into_iter().any(|pair| pair.value.len() > end.len())
    }
}

fn octets(pairs: &[Pair]) -> usize {
    pairs.iter().map(|pair| pair.value.len()).sum()
}

/// What is looked for, and what is put in its stead.
pub struct Patterns {
    sets: Vec<Arc<Set>>,
}

impl fmt::Debug for Patterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Patterns({})", self.sets.iter().map(|set| set.pairs.len()).sum::<usize>())
    }
}

impl Patterns {
    /// The values of all these secrets. `None` if there is nothing to look for.
    pub fn new<'a>(
        secrets: impl IntoIterator<Item = &'a SecretBinding>,
    ) -> Result<Option<Arc<Self>>, Unsearchable> {
        let mut pairs: Vec<Pair> = Vec::new();
        let mut left = MOST;
        for secret in secrets {
            let placeholder = secret.placeholder();
            let mut of_one: Vec<Zeroizing<Vec<u8>>> = Vec::new();
            for value in spellings(secret.value.expose()) {
                if !of_one.contains(&value) {
                    left = left.checked_sub(value.len()).ok_or(Unsearchable)?;
                    of_one.push(value);
                }
            }
            pairs.extend(
                of_one.into_iter().map(|value| Pair { value, placeholder: placeholder.clone().into_bytes() }),
            );
        }
        Ok(Set::new(pairs)?.map(|set| Arc::new(Self { sets: vec![set] })))
    }

    /// What was to be looked for already, and these credentials that hold a value, each with what the guest sent.
    pub fn with(
        base: Option<Arc<Self>>,
        credentials: Vec<(Zeroizing<Vec<u8>>, Vec<u8>)>,
    ) -> Result<Option<Arc<Self>>, Unsearchable> {
        let pairs = credentials.into_iter().map(|(value, placeholder)| Pair { value, placeholder });
        let Some(own) = Set::new(pairs.collect())? else { return Ok(base) };
        let mut sets = base.map_or_else(Vec::new, |base| base.sets.clone());
        sets.push(own);
        Ok(Some(Arc::new(Self { sets })))
    }

    /// Whether there is a value in the text.
    pub(super) fn is_in(&self, text: &[u8]) -> bool {
        self.sets.iter().any(|set| set.automaton.is_match(text))
    }

    /// The values in the text from left to right, each with what is put in its stead: of several that overlap the one that
    /// begins first, and of those the longest.
    pub(super) fn find<'a>(&'a self, text: &'a [u8]) -> impl Iterator<Item = (Range<usize>, &'a [u8])> {
        let mut next: Vec<Option<Match>> = self.sets.iter().map(|set| set.automaton.find(text)).collect();
        let mut at = 0;
        std::iter::from_fn(move || {
            for (set, next) in self.sets.iter().zip(&mut next) {
                if next.is_some_and(|found| found.start() < at) {
                    *next = set.automaton.find(Input::new(text).range(at..));
                }
            }
            let found = self.sets.iter().zip(&next).filter_map(|(set, next)| Some((set, (*next)?)));
            let (set, found) = found.min_by_key(|(_, found)| (found.start(), Reverse(found.end())))?;
            at = found.end();
            Some((found.range(), set.pairs[found.pattern().as_usize()].placeholder.as_slice()))
        })
    }

    /// Where the end begins that is held back for a moment: of what follows, values could be made.
    pub(super) fn held_from(&self, text: &[u8]) -> usize {
        self.sets.iter().map(|set| set.held_from(text)).min().unwrap_or(text.len())
    }

    /// Where the end begins that is held back for as long as nothing follows.
    pub(super) fn kept_from(&self, text: &[u8]) -> usize {
        self.sets.iter().map(|set| set.kept_from(text)).min().unwrap_or(text.len())
    }

    /// How much is looked for, in octets.
    pub(super) fn octets(&self) -> usize {
        self.sets.iter().map(|set| octets(&set.pairs)).sum()
    }

    /// Whether the secrets' part is the very same.
    #[cfg(test)]
    pub(crate) fn shares_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.sets[0], &other.sets[0])
    }
}

/// The ways in which a value is written by servers that do not mean to hide it.
fn spellings(value: &[u8]) -> Vec<Zeroizing<Vec<u8>>> {
    let mut all = vec![Zeroizing::new(value.to_vec())];
    let escape = |escape: &dyn Fn(u8, &mut Vec<u8>)| {
        let mut out = Zeroizing::new(Vec::with_capacity(value.len() * 6));
        value.iter().for_each(|b| escape(*b, &mut out));
        out
    };
    let json = |slash: bool| {
        escape(&move |b, out| match b {
            b'"' | b'\\' => out.extend([b'\\', b]),
            b'/' if slash => out.extend(b"\\/"),
            _ => out.push(b),
        })
    };
    let url = |digits: &'static [u8; 16]| {
        escape(&move |b, out| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(b),
            _ => out.extend([b'%', digits[usize::from(b >> 4)], digits[usize::from(b & 15)]]),
        })
    };
    let html = escape(&|b, out| match b {
        b'&' => out.extend(b"&amp;"),
        b'<' => out.extend(b"&lt;"),
        b'>' => out.extend(b"&gt;"),
        b'"' => out.extend(b"&quot;"),
        b'\'' => out.extend(b"&#39;"),
        _ => out.push(b),
    });
    all.extend([json(false), json(true), url(b"0123456789ABCDEF"), url(b"0123456789abcdef"), html]);
    all.extend(
        (0..3).flat_map(|before| [base64(value, before, &STANDARD), base64(value, before, &URL_SAFE)]),
    );
    all.retain(|spelling| !spelling.is_empty());
    all
}

/// What Base64 makes of a value with so many octets before it, but for the characters that it shares with what is before and
/// after. Empty if it is too short to be looked for.
fn base64(value: &[u8], before: usize, engine: &GeneralPurpose) -> Zeroizing<Vec<u8>> {
    let text = Zeroizing::new([&[0; 3][..before], value].concat());
    let encoded = Zeroizing::new(engine.encode(&text));
    let whole = (before * 8).div_ceil(6)..text.len() * 8 / 6;
    let own = encoded.as_bytes().get(whole).filter(|own| own.len() >= SHORTEST_BASE64);
    Zeroizing::new(own.unwrap_or_default().to_vec())
}
