//! What this daemon knows of its slots, and how a policy gets into the kernel.
//!
//! A policy's rules are written under a number of their own; then one write of the VM's entry puts all of them in force.
//! The old ones are removed later, when no frame can be under way that still looks them up.

use crate::{
    DatapathError,
    error::map_error,
    objects::{Tables, absent},
    rules::Rules,
};
use aya::maps::lpm_trie::Key;
use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};
use tapgate_ebpf_common::maps::{
    Bucket, EVENT_BURST, FlowCount, MAX_RULES, MAX_VMS, RuleKey, VM_IPV6, VM_SECRETS, VM_WARN, Vm,
};
use tapgate_model::{GuestNet, Mode, VmPolicy};

/// Longer than any frame is looked at.
const GRACE: Duration = Duration::from_millis(100);
/// Policy numbers have 31 bits in the keys of rules.
const NUMBERS: u32 = 1 << 31;

/// One VM.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Index of its tap.
    pub link: u32,
    /// Its entry in the kernel.
    pub vm: Vm,
    /// Its rules.
    pub rules: Rules,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Slots {
    next: u32,
    by_slot: BTreeMap<u32, Slot>,
    retired: Vec<(Instant, Rules)>,
}

impl Slots {
    /// Starts from what the maps hold. Rules that no VM uses, left by a crash, are removed.
    pub(crate) fn adopt(tables: &mut Tables) -> Result<Self, DatapathError> {
        let vms: Vec<Vm> = tables.vms.iter().filter_map(|entry| entry.ok().map(|(_, vm)| vm)).collect();
        let used: HashSet<u32> = vms.iter().map(|vm| vm.policy).collect();
        let keys: Vec<Key<RuleKey>> = tables.rules.keys().filter_map(Result::ok).collect();
        let mut last = used.iter().copied().max().unwrap_or(0);
        for key in keys {
            let number = key.data().group >> 1;
            last = last.max(number);
            if !used.contains(&number) {
                remove_rule(tables, &key)?;
            }
        }
        Ok(Self { next: last, by_slot: BTreeMap::new(), retired: Vec::new() })
    }

    pub(crate) fn get(&self, slot: u32) -> Option<&Slot> {
        self.by_slot.get(&slot)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&u32, &Slot)> {
        self.by_slot.iter()
    }

    /// Makes the VM's entries, with its tap not yet up. `fresh` begins its counters anew.
    pub(crate) fn add(
        &mut self,
        tables: &mut Tables,
        net: &GuestNet,
        link: u32,
        policy: &VmPolicy,
        fresh: bool,
    ) -> Result<(), DatapathError> {
        let slot = net.slot;
        if slot >= MAX_VMS {
            return Err(DatapathError::NoSuchSlot { slot, limit: MAX_VMS });
        }
        if fresh {
            tables.zero_counters(slot)?;
            tables
                .flow_counts
                .insert(slot, FlowCount::default(), 0)
                .map_err(map_error("put", "FLOW_COUNTS"))?;
            tables.flows_expired.insert(slot, 0, 0).map_err(map_error("put", "FLOWS_EXPIRED"))?;
            let bucket = Bucket { filled: 0, tokens: EVENT_BURST, pad: 0 };
            tables.buckets.insert(slot, bucket, 0).map_err(map_error("put", "BUCKETS"))?;
        }
        let old = tables.vms.get(&link, 0).ok();
        let rules = self.write_rules(tables, slot, policy)?;
        let vm = entry(net, rules.number, policy);
        tables.vms.insert(link, vm, 0).map_err(map_error("put a VM", "VMS"))?;
        if let Some(old) = old.filter(|old| old.policy != vm.policy) {
            self.forget_number(tables, old.policy)?;
        }
        self.by_slot.insert(slot, Slot { link, vm, rules });
        Ok(())
    }

    /// Puts another policy in force.
    pub(crate) fn set_policy(
        &mut self,
        tables: &mut Tables,
        net: &GuestNet,
        policy: &VmPolicy,
    ) -> Result<(), DatapathError> {
        let link = self.by_slot.get(&net.slot).ok_or(DatapathError::NotAttached(net.slot))?.link;
        let rules = self.write_rules(tables, net.slot, policy)?;
        let vm = entry(net, rules.number, policy);
        if let Err(error) = tables.vms.insert(link, vm, 0) {
            self.retired.push((Instant::now(), rules));
            return Err(map_error("put a VM", "VMS")(error));
        }
        if let Some(old) = self.by_slot.insert(net.slot, Slot { link, vm, rules }) {
            self.retired.push((Instant::now(), old.rules));
        }
        Ok(())
    }

    /// Removes the VM's entries. What comes from its tap from now on is dropped.
    pub(crate) fn remove(&mut self, tables: &mut Tables, slot: u32) -> Result<(), DatapathError> {
        let known = self.by_slot.remove(&slot);
        let entry = tables.find(slot);
        let fine = |done: Result<(), aya::maps::MapError>, map| match done {
            Err(error) if !absent(&error) => Err(map_error("remove", map)(error)),
            _ => Ok(()),
        };
        if let Some((link, _)) = entry {
            fine(tables.vms.remove(&link), "VMS")?;
        }
        // A slot that was never used has no flows to look for.
        if tables.flow_counts.get(&slot, 0).is_ok() {
            let flows: Vec<_> =
                tables.flows.keys().filter_map(Result::ok).filter(|key| key.slot == slot).collect();
            for key in flows {
                fine(tables.flows.remove(&key), "FLOWS")?;
            }
        }
        fine(tables.flow_counts.remove(&slot), "FLOW_COUNTS")?;
        fine(tables.flows_expired.remove(&slot), "FLOWS_EXPIRED")?;
        fine(tables.drops.remove(&slot), "DROPS")?;
        fine(tables.buckets.remove(&slot), "BUCKETS")?;
        match (known, entry) {
            (Some(slot), _) => self.retired.push((Instant::now(), slot.rules)),
            (None, Some((_, vm))) => self.forget_number(tables, vm.policy)?,
            (None, None) => {}
        }
        Ok(())
    }

    /// Removes the rules that no frame can still be judged by.
    pub(crate) fn purge(&mut self, tables: &mut Tables) -> Result<(), DatapathError> {
        let now = Instant::now();
        let (gone, kept) =
            self.retired.drain(..).partition::<Vec<_>, _>(|(since, _)| now.duration_since(*since) >= GRACE);
        self.retired = kept;
        for (_, rules) in gone {
            for key in rules.keys() {
                remove_rule(tables, &key)?;
            }
        }
        Ok(())
    }

    /// Whether there are rules to remove.
    pub(crate) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    fn write_rules(
        &mut self,
        tables: &mut Tables,
        slot: u32,
        policy: &VmPolicy,
    ) -> Result<Rules, DatapathError> {
        self.next = (self.next + 1) % NUMBERS;
        let rules = Rules::new(self.next, policy);
        let failed = rules.keys().find_map(|key| tables.insert_rule(&key).err());
        let Some(error) = failed else { return Ok(rules) };
        // Nothing refers to them yet; what was written is removed as any retired policy.
        self.retired.push((Instant::now(), rules));
        Err(match error {
            aya::maps::MapError::SyscallError(error)
                if error.io_error.raw_os_error() == Some(libc::ENOSPC) =>
            {
                DatapathError::TooManyRules { slot, limit: MAX_RULES }
            }
            error => map_error("put a rule", "RULES")(error),
        })
    }

    /// Removes the rules of a number that an earlier daemon gave.
    fn forget_number(&mut self, tables: &mut Tables, number: u32) -> Result<(), DatapathError> {
        let keys: Vec<Key<RuleKey>> = tables
            .rules
            .keys()
            .filter_map(Result::ok)
            .filter(|key| key.data().group >> 1 == number)
            .collect();
        for key in keys {
            remove_rule(tables, &key)?;
        }
        Ok(())
    }
}

fn entry(net: &GuestNet, number: u32, policy: &VmPolicy) -> Vm {
    let mut flags = 0;
    if policy.mode == Mode::Warn {
        flags |= VM_WARN;
    }
    if !policy.secrets.is_empty() {
        flags |= VM_SECRETS;
    }
    if net.v6.is_some() {
        flags |= VM_IPV6;
    }
    Vm {
        slot: net.slot,
        policy: number,
        flags,
        mac: net.mac,
        pad: [0; 2],
        v4: net.v4.octets(),
        v6: net.v6.map(|v6| v6.octets()).unwrap_or_default(),
    }
}

fn remove_rule(tables: &mut Tables, key: &Key<RuleKey>) -> Result<(), DatapathError> {
    match tables.rules.remove(key) {
        Err(error) if !absent(&error) => Err(map_error("remove a rule", "RULES")(error)),
        _ => Ok(()),
    }
}
