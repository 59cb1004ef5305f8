//! Groups of `cidr` rules in the kernel's trie. VMs with the same rules share one group: those of an account have one, and
//! each VM one of its own. A change of one rule of a group with one user is made in place, any other by a new group and
//! one write of each VM's entry. So a frame is never judged by half a change, and a change for a thousand VMs costs a
//! thousand small writes.
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
use tapgate_ebpf_common::maps::{MAX_RULES, NO_RULES, RuleKey};
use tapgate_model::{Cidr, RuleLayer};

/// Longer than any frame is looked at.
const GRACE: Duration = Duration::from_millis(100);
/// Group numbers have 31 bits in the keys of rules.
const NUMBERS: u32 = 1 << 31;

#[derive(Debug)]
struct Group {
    /// Kept, so that no other layer gets its address.
    layer: Arc<RuleLayer>,
    users: usize,
}

/// All groups of an instance.
#[derive(Default)]
pub(crate) struct Groups {
    last: u32,
    by_number: HashMap<u32, Group>,
    /// By where the layer is in memory: who reads policies shares what is the same.
    by_layer: HashMap<usize, u32>,
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

    /// The layer's group, written if there is none yet. It has one user more.
    pub(crate) fn acquire(
        &mut self,
        tables: &mut Tables,
        slot: u32,
        layer: &Arc<RuleLayer>,
    ) -> Result<u32, DatapathError> {
        if layer.ranges().is_empty() {
            return Ok(NO_RULES);
        }
        if let Some(&number) = self.by_layer.get(&place(layer)) {
            if let Some(group) = self.by_number.get_mut(&number) {
                group.users += 1;
            }
            return Ok(number);
        }
        let number = self.next();
        let mut written = Vec::with_capacity(layer.ranges().len());
        for cidr in layer.ranges() {
            let key = key(number, cidr);
            if let Err(error) = tables.rules.insert(&key, 1, 0) {
                // Nothing refers to them.
                self.retired.push((Instant::now(), written));
                return Err(full(error, slot));
            }
            written.push(key);
        }
        self.by_layer.insert(place(layer), number);
        self.by_number.insert(number, Group { layer: Arc::clone(layer), users: 1 });
        Ok(number)
    }

    fn next(&mut self) -> u32 {
        loop {
            self.last = (self.last + 1) % NUMBERS;
            let taken = self.by_number.contains_key(&self.last) || self.inherited.contains_key(&self.last);
            if self.last != NO_RULES && !taken {
                return self.last;
            }
        }
    }

    /// Makes the group the layer's, in place, if it has one user and the ranges differ in one or none. Says whether it is.
    pub(crate) fn revise(
        &mut self,
        tables: &mut Tables,
        slot: u32,
        number: u32,
        layer: &Arc<RuleLayer>,
    ) -> Result<bool, DatapathError> {
        if let Some(&known) = self.by_layer.get(&place(layer)) {
            // It is the group's already, or another's, which is to be shared.
            return Ok(known == number);
        }
        if layer.ranges().is_empty() {
            return Ok(false);
        }
        let Some(group) = self.by_number.get_mut(&number).filter(|group| group.users == 1) else {
            return Ok(false);
        };
        match difference(group.layer.ranges(), layer.ranges()) {
            Change::None => {}
            Change::Added(cidr) => {
                tables.rules.insert(&key(number, &cidr), 1, 0).map_err(|error| full(error, slot))?;
            }
            Change::Removed(cidr) => remove(tables, &key(number, &cidr))?,
            Change::More => return Ok(false),
        }
        self.by_layer.remove(&place(&group.layer));
        self.by_layer.insert(place(layer), number);
        group.layer = Arc::clone(layer);
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
            self.by_layer.remove(&place(&group.layer));
            let keys = group.layer.ranges().iter().map(|cidr| key(number, cidr)).collect();
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

    /// Takes what no frame can still be judged by, to be removed without holding anyone up.
    pub(crate) fn purgeable(&mut self) -> Vec<Key<RuleKey>> {
        let now = Instant::now();
        let (gone, kept): (Vec<_>, Vec<_>) =
            self.retired.drain(..).partition(|(since, _)| now.duration_since(*since) >= GRACE);
        self.retired = kept;
        gone.into_iter().flat_map(|(_, keys)| keys).collect()
    }

    /// Whether there is something to remove.
    pub(crate) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }
}

/// Where the layer is in memory: its name, as long as its group keeps it.
fn place(layer: &Arc<RuleLayer>) -> usize {
    Arc::as_ptr(layer).addr()
}

#[derive(Debug, PartialEq, Eq)]
enum Change {
    None,
    Added(Cidr),
    Removed(Cidr),
    More,
}

/// How the sorted ranges differ, as far as one step makes the one into the other.
fn difference(old: &[Cidr], new: &[Cidr]) -> Change {
    let at = old.iter().zip(new).position(|(a, b)| a != b).unwrap_or(old.len().min(new.len()));
    let (old, new) = (&old[at..], &new[at..]);
    match (old, new) {
        ([], []) => Change::None,
        (_, [first, rest @ ..]) if rest == old => Change::Added(*first),
        ([first, rest @ ..], _) if rest == new => Change::Removed(*first),
        _ => Change::More,
    }
}

fn key(number: u32, cidr: &Cidr) -> Key<RuleKey> {
    let v6 = cidr.network().is_ipv6();
    Key::new(RuleKey::prefix(v6, cidr.prefix_len()), RuleKey::new(number, v6, octets(cidr.network())))
}

/// Removes a rule, if it is there.
pub(crate) fn remove(tables: &mut Tables, key: &Key<RuleKey>) -> Result<(), DatapathError> {
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

    fn of(texts: &[&str]) -> Vec<Cidr> {
        let mut all: Vec<Cidr> = texts.iter().map(|text| text.parse().unwrap()).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn one_rule_more_or_less_is_told_from_any_other_change() {
        let base = of(&["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32"]);
        for extra in ["1.0.0.0/8", "172.16.0.0/12", "ffff::/16"] {
            let more = of(&["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32", extra]);
            assert_eq!(difference(&base, &more), Change::Added(extra.parse().unwrap()));
            assert_eq!(difference(&more, &base), Change::Removed(extra.parse().unwrap()));
        }
        assert_eq!(difference(&base, &base), Change::None);
        assert_eq!(difference(&base, &of(&["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/33"])), Change::More);
        let four = of(&["10.0.0.0/8", "1.0.0.0/8", "2.0.0.0/8", "3.0.0.0/8"]);
        assert_eq!(difference(&base, &four), Change::More);
        assert_eq!(difference(&of(&[]), &base), Change::More);
        assert_eq!(difference(&of(&[]), &of(&["::/0"])), Change::Added("::/0".parse().unwrap()));
        assert_eq!(difference(&of(&["::/0"]), &of(&[])), Change::Removed("::/0".parse().unwrap()));
    }
}
