//! What VMs go on trying: the programs tell the first time of it and count the others; here the counts become events, one
//! for each thing that is tried and each interval.
//!
//! What was told is kept in a map of its own, so that neither this daemon's death nor the next one's start tells anything
//! twice or not at all. An attempt at the very moment when its entry is forgotten is in the VM's drop counters alone.

use crate::{DatapathError, bpffs, error::map_error, objects::absent};
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuHashMap};
use std::{
    collections::{self, HashSet, VecDeque},
    path::Path,
};
use tapgate_ebpf_common::maps::{AttemptKey, Attempts};

/// Looks without anything new after which an entry is forgotten.
const SILENT: u8 = 3;

/// One thing that was tried since the last look.
pub(crate) struct Repeated {
    pub key: AttemptKey,
    /// How often.
    pub count: u64,
    /// The last time: nanoseconds of the monotonic clock.
    pub seen: u64,
}

/// What this daemon knows of an entry.
#[derive(Clone, Copy)]
struct Known {
    told: u64,
    silent: u8,
}

/// The counts, and what of them was told.
pub(crate) struct Counts {
    attempts: PerCpuHashMap<MapData, AttemptKey, Attempts>,
    told: HashMap<MapData, AttemptKey, u64>,
    gone: HashMap<MapData, u32, u32>,
    known: collections::HashMap<AttemptKey, Known>,
}

impl Counts {
    pub(crate) fn open(pins: &Path) -> Result<Self, DatapathError> {
        let open = |name| MapData::from_pin(bpffs::maps(pins).join(name)).and_then(Map::from_map_data);
        let failed = |name| map_error("open", name);
        Ok(Self {
            attempts: open("ATTEMPTS").and_then(PerCpuHashMap::try_from).map_err(failed("ATTEMPTS"))?,
            told: open("ATTEMPTS_TOLD").and_then(HashMap::try_from).map_err(failed("ATTEMPTS_TOLD"))?,
            gone: open("ATTEMPTS_GONE").and_then(HashMap::try_from).map_err(failed("ATTEMPTS_GONE"))?,
            known: collections::HashMap::new(),
        })
    }

    /// Finds what was tried since the last look. An entry that fails keeps none of the others back, and what was found is
    /// in `found` whatever the answer is: it counts as told.
    pub(crate) fn look(&mut self, found: &mut VecDeque<Repeated>) -> Result<(), DatapathError> {
        let before = std::mem::take(&mut self.known);
        self.look_for(|_| true, &before, found)
    }

    /// The same of the VMs that end, and of no other. They are known no more afterwards: who has the slot next counts anew.
    pub(crate) fn look_last(
        &mut self,
        ends: impl Fn(u32) -> bool,
        found: &mut VecDeque<Repeated>,
    ) -> Result<(), DatapathError> {
        let looked = self.look_for(&ends, &collections::HashMap::new(), found);
        self.known.retain(|key, _| !ends(key.slot));
        looked
    }

    fn look_for(
        &mut self,
        of: impl Fn(u32) -> bool,
        before: &collections::HashMap<AttemptKey, Known>,
        found: &mut VecDeque<Repeated>,
    ) -> Result<(), DatapathError> {
        let (keys, result) = keys_of(self.attempts.keys(), of);
        let mut result = result.map_err(map_error("read", "ATTEMPTS"));
        for key in keys {
            let looked = self.look_at(key, before.get(&key), found);
            result = result.and(looked);
        }
        result
    }

    fn look_at(
        &mut self,
        key: AttemptKey,
        known: Option<&Known>,
        found: &mut VecDeque<Repeated>,
    ) -> Result<(), DatapathError> {
        let Some((count, seen)) = self.count(&key)? else { return Ok(()) };
        let known = match known {
            Some(known) => *known,
            // Told by an earlier daemon, or new.
            None => Known { told: self.told.get(&key, 0).unwrap_or(0), silent: 0 },
        };
        // An entry that counts less than was told is a new one of the same name.
        let more = count.checked_sub(known.told).unwrap_or(count);
        if more > 0 {
            self.told.insert(key, count, 0).map_err(map_error("put", "ATTEMPTS_TOLD"))?;
            self.known.insert(key, Known { told: count, silent: 0 });
            found.push_back(Repeated { key, count: more, seen });
        } else if known.silent < SILENT {
            self.known.insert(key, Known { told: count, silent: known.silent + 1 });
        } else {
            self.forget(key, count, found)?;
        }
        Ok(())
    }

    /// How often in all, and when last; `None` if the VM went meanwhile.
    fn count(&self, key: &AttemptKey) -> Result<Option<(u64, u64)>, DatapathError> {
        match self.attempts.get(key, 0) {
            Ok(values) => {
                let count = values.iter().map(|one| one.count).sum();
                Ok(Some((count, values.iter().map(|one| one.seen).max().unwrap_or(0))))
            }
            Err(error) if absent(&error) => Ok(None),
            Err(error) => Err(map_error("read", "ATTEMPTS")(error)),
        }
    }

    /// Forgets an entry that has been silent. Finds what came in the last moment.
    fn forget(
        &mut self,
        key: AttemptKey,
        told: u64,
        found: &mut VecDeque<Repeated>,
    ) -> Result<(), DatapathError> {
        let last = self.count(&key)?;
        if !gone(self.attempts.remove(&key)).map_err(map_error("remove", "ATTEMPTS"))? {
            return Ok(());
        }
        if let Some((count, seen)) = last.filter(|(count, _)| *count > told) {
            found.push_back(Repeated { key, count: count - told, seen });
        }
        gone(self.told.remove(&key)).map_err(map_error("remove", "ATTEMPTS_TOLD"))?;
        // Its VM has room for one more.
        if let Ok(number) = self.gone.get(&key.slot, 0) {
            let put = self.gone.insert(key.slot, number.wrapping_add(1), 0);
            put.map_err(map_error("put", "ATTEMPTS_GONE"))?;
        }
        Ok(())
    }
}

/// Each key once: where an entry is removed meanwhile, as another VM's is that goes, the kernel begins anew and names those
/// before it again. With the failure that ended it, if one did.
fn keys_of(
    all: impl Iterator<Item = Result<AttemptKey, MapError>>,
    of: impl Fn(u32) -> bool,
) -> (HashSet<AttemptKey>, Result<(), MapError>) {
    let (mut keys, mut result) = (HashSet::new(), Ok(()));
    for key in all {
        match key {
            Ok(key) if of(key.slot) => drop(keys.insert(key)),
            Ok(_) => {}
            Err(error) => result = Err(error),
        }
    }
    (keys, result)
}

/// Whether it was there and is gone.
fn gone(removed: Result<(), MapError>) -> Result<bool, MapError> {
    match removed {
        Ok(()) => Ok(true),
        Err(error) if absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_names_twice_is_looked_at_once() {
        let key = |slot, port| AttemptKey { slot, port, ..AttemptKey::default() };
        // The entry after the second was removed while it was the last one named.
        let named = [key(0, 1), key(1, 1), key(0, 2), key(0, 1), key(1, 1), key(0, 2), key(0, 3)];
        let (keys, result) = keys_of(named.into_iter().map(Ok), |slot| slot == 0);
        assert!(result.is_ok());
        let mut keys: Vec<AttemptKey> = keys.into_iter().collect();
        keys.sort_by_key(|key| key.port);
        assert_eq!(keys, [key(0, 1), key(0, 2), key(0, 3)]);
        let (keys, result) = keys_of([Ok(key(0, 1)), Err(MapError::KeyNotFound)].into_iter(), |_| true);
        assert!(result.is_err() && keys.len() == 1);
    }
}
