//! What this daemon knows of its slots, and how a policy gets into the kernel.
//!
//! A policy is in force with one write of the VM's entry, which names the group of its rules and its generation.

use crate::{
    DatapathError,
    error::map_error,
    groups::Groups,
    objects::{Tables, absent},
};
use aya::maps::lpm_trie::Key;
use std::collections::BTreeMap;
use tapgate_ebpf_common::maps::{
    Address, Bucket, EVENT_BURST, FlowCount, MAX_VMS, NO_RULES, RuleKey, VM_IPV6, VM_SECRETS, VM_WARN, Vm,
    halves,
};
use tapgate_model::{GuestNet, Mode, RuleSet, VmId, VmPolicy};

/// One VM.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Whose it is.
    pub owner: VmId,
    /// Index of its tap.
    pub link: u32,
    /// Its entry in the kernel.
    pub vm: Vm,
    /// Its rules.
    pub rules: RuleSet,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Slots {
    /// The generation given last.
    generation: u32,
    by_slot: BTreeMap<u32, Slot>,
    groups: Groups,
}

impl Slots {
    /// Starts from what the maps hold.
    pub(crate) fn adopt(tables: &mut Tables) -> Result<Self, DatapathError> {
        let taps: Vec<(u32, Vm)> = tables.vms.iter().filter_map(Result::ok).collect();
        tables.taps.adopt(&taps);
        let vms: Vec<Vm> = taps.into_iter().map(|(_, vm)| vm).collect();
        let mut used = BTreeMap::new();
        for group in vms.iter().flat_map(|vm| vm.rules).filter(|group| *group != NO_RULES) {
            *used.entry(group).or_default() += 1;
        }
        let groups = Groups::adopt(tables, &used)?;
        let generation = vms.iter().map(|vm| vm.policy).max().unwrap_or(0);
        Ok(Self { generation, by_slot: BTreeMap::new(), groups })
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
            let bucket = Bucket { filled: 0, tokens: EVENT_BURST, made: 0 };
            tables.buckets.insert(slot, bucket, 0).map_err(map_error("put", "BUCKETS"))?;
            tables.attempts_gone.insert(slot, 0, 0).map_err(map_error("put", "ATTEMPTS_GONE"))?;
        }
        let old = tables.vms.get(&link, 0).ok();
        let rules = policy.rules.clone();
        let own = self.groups.acquire(tables, slot, rules.own())?;
        let account = match self.groups.acquire(tables, slot, rules.account()) {
            Ok(account) => account,
            Err(error) => {
                self.groups.release(own);
                return Err(error);
            }
        };
        let vm = self.entry(net, [own, account], policy);
        // Judged by the table until both are there.
        tables.taps.clear(link);
        if let Err(error) = tables.vms.insert(link, vm, 0) {
            vm.rules.iter().for_each(|group| self.groups.release(*group));
            return Err(map_error("put a VM", "VMS")(error));
        }
        tables.taps.put(link, &vm);
        self.by_slot.insert(slot, Slot { owner: policy.vm.clone(), link, vm, rules });
        if let Some(old) = old {
            old.rules.iter().for_each(|group| self.groups.disown(*group));
        }
        Ok(())
    }

    /// Puts another policy in force.
    pub(crate) fn set_policy(
        &mut self,
        tables: &mut Tables,
        net: &GuestNet,
        policy: &VmPolicy,
    ) -> Result<(), DatapathError> {
        let slot = net.slot;
        let known = self.by_slot.get(&slot).ok_or(DatapathError::NotAttached(slot))?;
        let (link, old) = (known.link, known.vm.rules);
        let rules = policy.rules.clone();
        // The one that cannot be made in place first, so that nothing is changed if it fails.
        let account = self.groups.acquire(tables, slot, rules.account())?;
        let own = match self.groups.revise(tables, slot, old[0], rules.own()) {
            Ok(true) => Ok((old[0], true)),
            Ok(false) => self.groups.acquire(tables, slot, rules.own()).map(|own| (own, false)),
            Err(error) => Err(error),
        };
        let (own, in_place) = own.inspect_err(|_| self.groups.release(account))?;
        let vm = self.entry(net, [own, account], policy);
        if let Err(error) = tables.vms.insert(link, vm, 0) {
            self.groups.release(account);
            if !in_place {
                self.groups.release(own);
            }
            return Err(map_error("put a VM", "VMS")(error));
        }
        tables.taps.put(link, &vm);
        self.by_slot.insert(slot, Slot { owner: policy.vm.clone(), link, vm, rules });
        self.groups.release(old[1]);
        if !in_place {
            self.groups.release(old[0]);
        }
        Ok(())
    }

    /// Takes the VM out of the programs' sight: what comes from its tap is dropped until it has a policy again. Takes no memory, so
    /// it works where a policy cannot be put.
    pub(crate) fn shut(&mut self, tables: &mut Tables, slot: u32) -> Result<(), DatapathError> {
        let link = self.by_slot.get(&slot).ok_or(DatapathError::NotAttached(slot))?.link;
        tables.taps.clear(link);
        match tables.vms.remove(&link) {
            Err(error) if !absent(&error) => Err(map_error("remove", "VMS")(error)),
            _ => Ok(()),
        }
    }

    /// Removes the VM's entries. What comes from its tap from now on is dropped.
    pub(crate) fn remove(&mut self, tables: &mut Tables, slot: u32) -> Result<(), DatapathError> {
        let known = self.by_slot.remove(&slot);
        let entry = match &known {
            Some(known) => Some((known.link, known.vm)),
            None => tables.find(slot),
        };
        let fine = |done: Result<(), aya::maps::MapError>, map| match done {
            Err(error) if !absent(&error) => Err(map_error("remove", map)(error)),
            _ => Ok(()),
        };
        if let Some((link, _)) = entry {
            tables.taps.clear(link);
            fine(tables.vms.remove(&link), "VMS")?;
        }
        // A slot that was never used has no flows to look for.
        if tables.flow_counts.get(&slot, 0).is_ok() {
            let flows: Vec<_> = tables
                .flows
                .keys()
                .filter_map(Result::ok)
                .filter(|key| u32::from(key.slot) == slot)
                .collect();
            for key in flows {
                fine(tables.flows.remove(&key), "FLOWS")?;
            }
        }
        if tables.attempts_gone.get(&slot, 0).is_ok() {
            let attempts: Vec<_> =
                tables.attempts.keys().filter_map(Result::ok).filter(|key| key.slot == slot).collect();
            for key in attempts {
                fine(tables.attempts.remove(&key), "ATTEMPTS")?;
                fine(tables.attempts_told.remove(&key), "ATTEMPTS_TOLD")?;
            }
        }
        fine(tables.attempts_gone.remove(&slot), "ATTEMPTS_GONE")?;
        fine(tables.flow_counts.remove(&slot), "FLOW_COUNTS")?;
        fine(tables.flows_expired.remove(&slot), "FLOWS_EXPIRED")?;
        fine(tables.drops.remove(&slot), "DROPS")?;
        fine(tables.buckets.remove(&slot), "BUCKETS")?;
        match (known, entry) {
            (Some(slot), _) => slot.vm.rules.iter().for_each(|group| self.groups.release(*group)),
            (None, Some((_, vm))) => vm.rules.iter().for_each(|group| self.groups.disown(*group)),
            (None, None) => {}
        }
        Ok(())
    }

    /// Takes the rules that no frame can still be judged by, to be removed.
    pub(crate) fn purgeable(&mut self) -> Vec<Key<RuleKey>> {
        self.groups.purgeable()
    }

    /// Whether there are rules to remove.
    pub(crate) fn has_retired(&self) -> bool {
        self.groups.has_retired()
    }

    fn entry(&mut self, net: &GuestNet, rules: [u32; 2], policy: &VmPolicy) -> Vm {
        self.generation = self.generation.wrapping_add(1);
        entry(net, self.generation, rules, policy)
    }
}

fn entry(net: &GuestNet, generation: u32, rules: [u32; 2], policy: &VmPolicy) -> Vm {
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
        policy: generation,
        rules,
        flags,
        mac: halves(net.mac),
        pad: 0,
        v4: u32::from_ne_bytes(net.v4.octets()),
        v6: net.v6.map(|v6| Address::new(v6.octets())).unwrap_or_default(),
    }
}
