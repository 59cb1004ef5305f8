//! Groups of `cidr` rules in the kernel's trie. VMs with equal rules share one group; a change of one rule of a group with
//! one user is made in place, any other by a new group and one write of the VM's entry. So a frame is never judged by half
//! a change, and a change for a thousand VMs costs a thousand small writes.
//!
//! A group that nobody uses any more is removed later, when no frame can be under way that still looks it up.

use crate::{
    DatapathError,
    error::map_error,
    objects::{Tables, absent, octets},
};
use aya::maps::{MapError, lpm_trie::Key};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};
use tapgate_ebpf_common::maps::{MAX_RULES, RuleKey};
use tapgate_model::Cidr;

/// Longer than any frame is looked at.
const GRACE: Duration = Duration::from_millis(100);
/// Group numbers have 31 bits in the keys of rules.
const NUMBERS: u32 = 1 << 31;

/// What a group holds: sorted, each range once.
pub(crate) type Content = Arc<[Cidr]>;

/// The content of a list of rules.
pub(crate) fn content(cidrs: impl Iterator<Item = Cidr>) -> Content {
    let mut all: Vec<Cidr> = cidrs.collect();
    all.sort_unstable();
    all.dedup();
    all.into()
}

#[derive(Debug)]
struct Group {
    content: Content,
    users: usize,
}

/// All groups of an instance.
#[derive(Default)]
pub(crate) struct Groups {
    last: u32,
    by_number: HashMap<u32, Group>,
    by_content: HashMap<Content, u32>,
    /// What an earlier daemon wrote and VMs still use that this one has not adopted.
    inherited: HashMap<u32, Inherited>,
    retired: Vec<(Instant, Vec<Key<RuleKey>>)>,
}

/// A group of an earlier daemon.
struct Inherited {
    keys: Vec<Key<RuleKey>>,
    users: usize,
}

impl std::fmt::Debug for Groups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Groups").field("by_number", &self.by_number).finish_non_exhaustive()
    }
}

impl Groups {
    /// Starts from what the trie holds; removes what none of the used groups is, left by a crash.
    pub(crate) fn adopt(tables: &mut Tables, used: &BTreeMap<u32, usize>) -> Result<Self, DatapathError> {
        let mut groups = Self { last: used.keys().last().copied().unwrap_or(0), ..Self::default() };
        let keys: Vec<Key<RuleKey>> = tables.rules.keys().filter_map(Result::ok).collect();
        for key in keys {
            let number = key.data().group >> 1;
            groups.last = groups.last.max(number);
            match used.get(&number) {
                Some(&users) => {
                    let group =
                        groups.inherited.entry(number).or_insert(Inherited { keys: Vec::new(), users });
                    group.keys.push(key);
                }
                None => remove(tables, &key)?,
            }
        }
        Ok(groups)
    }

    /// A group with this content, written if there is none yet. It has one user more.
    pub(crate) fn acquire(
        &mut self,
        tables: &mut Tables,
        slot: u32,
        content: &Content,
    ) -> Result<u32, DatapathError> {
        if let Some(&number) = self.by_content.get(content) {
            if let Some(group) = self.by_number.get_mut(&number) {
                group.users += 1;
            }
            return Ok(number);
        }
        self.last = (self.last + 1) % NUMBERS;
        let number = self.last;
        let mut written = Vec::with_capacity(content.len());
        for cidr in content.iter() {
            let key = key(number, cidr);
            if let Err(error) = tables.rules.insert(&key, 1, 0) {
                // Nothing refers to them.
                self.retired.push((Instant::now(), written));
                return Err(full(error, slot));
            }
            written.push(key);
        }
        self.by_content.insert(Arc::clone(content), number);
        self.by_number.insert(number, Group { content: Arc::clone(content), users: 1 });
        Ok(number)
    }

    /// Changes the group in place, if it has one user and the contents differ in one rule. Says whether it did.
    pub(crate) fn revise(
        &mut self,
        tables: &mut Tables,
        slot: u32,
        number: u32,
        content: &Content,
    ) -> Result<bool, DatapathError> {
        // Another group with this content is there to be shared.
        if self.by_content.contains_key(content) {
            return Ok(false);
        }
        let Some(group) = self.by_number.get_mut(&number).filter(|group| group.users == 1) else {
            return Ok(false);
        };
        match difference(&group.content, content) {
            Some(Change::Added(cidr)) => {
                tables.rules.insert(&key(number, &cidr), 1, 0).map_err(|error| full(error, slot))?;
            }
            Some(Change::Removed(cidr)) => remove(tables, &key(number, &cidr))?,
            None => return Ok(false),
        }
        self.by_content.remove(&group.content);
        self.by_content.insert(Arc::clone(content), number);
        group.content = Arc::clone(content);
        Ok(true)
    }

    /// The group has one user less. Without any it is removed, after a while.
    pub(crate) fn release(&mut self, number: u32) {
        let Some(group) = self.by_number.get_mut(&number) else { return };
        group.users -= 1;
        if group.users > 0 {
            return;
        }
        if let Some(group) = self.by_number.remove(&number) {
            self.by_content.remove(&group.content);
            let keys = group.content.iter().map(|cidr| key(number, cidr)).collect();
            self.retired.push((Instant::now(), keys));
        }
    }

    /// A group of an earlier daemon has one user less.
    pub(crate) fn disown(&mut self, number: u32) {
        let Some(group) = self.inherited.get_mut(&number) else { return };
        group.users -= 1;
        if group.users == 0
            && let Some(group) = self.inherited.remove(&number)
        {
            self.retired.push((Instant::now(), group.keys));
        }
    }

    /// Removes what no frame can still be judged by.
    pub(crate) fn purge(&mut self, tables: &mut Tables) -> Result<(), DatapathError> {
        let now = Instant::now();
        let (gone, kept) =
            self.retired.drain(..).partition::<Vec<_>, _>(|(since, _)| now.duration_since(*since) >= GRACE);
        self.retired = kept;
        for (_, keys) in gone {
            for key in keys {
                remove(tables, &key)?;
            }
        }
        Ok(())
    }

    /// Whether there is something to remove.
    pub(crate) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }
}

enum Change {
    Added(Cidr),
    Removed(Cidr),
}

/// The one rule that the sorted contents differ in; `None` if it is not one.
fn difference(old: &[Cidr], new: &[Cidr]) -> Option<Change> {
    let (longer, shorter) = if old.len() < new.len() { (new, old) } else { (old, new) };
    if longer.len() != shorter.len() + 1 {
        return None;
    }
    let at = longer.iter().zip(shorter).position(|(a, b)| a != b).unwrap_or(shorter.len());
    if longer[at + 1..] != shorter[at..] {
        return None;
    }
    Some(if old.len() < new.len() { Change::Added(longer[at]) } else { Change::Removed(longer[at]) })
}

fn key(number: u32, cidr: &Cidr) -> Key<RuleKey> {
    let v6 = cidr.network().is_ipv6();
    Key::new(RuleKey::prefix(v6, cidr.prefix_len()), RuleKey::new(number, v6, octets(cidr.network())))
}

fn remove(tables: &mut Tables, key: &Key<RuleKey>) -> Result<(), DatapathError> {
    match tables.rules.remove(key) {
        Err(error) if !absent(&error) => Err(map_error("remove a rule", "RULES")(error)),
        _ => Ok(()),
    }
}

fn full(error: MapError, slot: u32) -> DatapathError {
    match error {
        MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::ENOSPC) => {
            DatapathError::TooManyRules { slot, limit: MAX_RULES }
        }
        error => map_error("put a rule", "RULES")(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(texts: &[&str]) -> Content {
        content(texts.iter().map(|text| text.parse().unwrap()))
    }

    #[test]
    fn one_rule_more_or_less_is_told_from_any_other_change() {
        let base = of(&["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32"]);
        for extra in ["1.0.0.0/8", "172.16.0.0/12", "ffff::/16"] {
            let more = of(&["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32", extra]);
            assert!(
                matches!(difference(&base, &more), Some(Change::Added(c)) if c == extra.parse().unwrap())
            );
            assert!(
                matches!(difference(&more, &base), Some(Change::Removed(c)) if c == extra.parse().unwrap())
            );
        }
        assert!(difference(&base, &base).is_none());
        assert!(difference(&base, &of(&["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/33"])).is_none());
        assert!(difference(&base, &of(&["10.0.0.0/8", "1.0.0.0/8", "2.0.0.0/8", "3.0.0.0/8"])).is_none());
        assert!(difference(&of(&[]), &base).is_none());
        assert!(matches!(difference(&of(&[]), &of(&["::/0"])), Some(Change::Added(_))));
    }
}
