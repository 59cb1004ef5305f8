//! What this daemon knows of its slots, and how a policy gets into the kernel.
//!
//! A policy is in force with one write of the VM's entry, which names the group of its rules and its generation.

use crate::{
    DatapathError,
    error::map_error,
    groups::{Groups, content},
    objects::{Tables, absent},
    rules::Rules,
};
use std::{collections::BTreeMap, sync::Arc};
use tapgate_ebpf_common::maps::{Bucket, EVENT_BURST, FlowCount, MAX_VMS, VM_IPV6, VM_SECRETS, VM_WARN, Vm};
use tapgate_model::{GuestNet, Mode, VmPolicy};

/// One VM.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Index of its tap.
    pub link: u32,
    /// Its entry in the kernel.
    pub vm: Vm,
    /// Its rules.
    pub rules: Arc<Rules>,
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
        let vms: Vec<Vm> = tables.vms.iter().filter_map(|entry| entry.ok().map(|(_, vm)| vm)).collect();
        let mut used = BTreeMap::new();
        for vm in &vms {
            *used.entry(vm.rules).or_default() += 1;
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
            let bucket = Bucket { filled: 0, tokens: EVENT_BURST, pad: 0 };
            tables.buckets.insert(slot, bucket, 0).map_err(map_error("put", "BUCKETS"))?;
        }
        let old = tables.vms.get(&link, 0).ok();
        let rules = Arc::new(Rules::new(policy));
        let group = self.groups.acquire(tables, slot, &content(rules.cidrs()))?;
        let vm = self.entry(net, group, policy);
        if let Err(error) = tables.vms.insert(link, vm, 0) {
            self.groups.release(group);
            return Err(map_error("put a VM", "VMS")(error));
        }
        self.by_slot.insert(slot, Slot { link, vm, rules });
        if let Some(old) = old {
            self.groups.disown(old.rules);
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
        let rules = Arc::new(Rules::new(policy));
        let content = content(rules.cidrs());
        let in_place = self.groups.revise(tables, slot, old, &content)?;
        let group = if in_place { old } else { self.groups.acquire(tables, slot, &content)? };
        let vm = self.entry(net, group, policy);
        if let Err(error) = tables.vms.insert(link, vm, 0) {
            if !in_place {
                self.groups.release(group);
            }
            return Err(map_error("put a VM", "VMS")(error));
        }
        self.by_slot.insert(slot, Slot { link, vm, rules });
        if !in_place {
            self.groups.release(old);
        }
        Ok(())
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
            (Some(slot), _) => self.groups.release(slot.vm.rules),
            (None, Some((_, vm))) => self.groups.disown(vm.rules),
            (None, None) => {}
        }
        Ok(())
    }

    /// Removes the rules that no frame can still be judged by.
    pub(crate) fn purge(&mut self, tables: &mut Tables) -> Result<(), DatapathError> {
        self.groups.purge(tables)
    }

    /// Whether there are rules to remove.
    pub(crate) fn has_retired(&self) -> bool {
        self.groups.has_retired()
    }

    fn entry(&mut self, net: &GuestNet, group: u32, policy: &VmPolicy) -> Vm {
        self.generation = self.generation.wrapping_add(1);
        entry(net, self.generation, group, policy)
    }
}

fn entry(net: &GuestNet, generation: u32, group: u32, policy: &VmPolicy) -> Vm {
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
        rules: group,
        flags,
        mac: net.mac,
        pad: [0; 2],
        v4: net.v4.octets(),
        v6: net.v6.map(|v6| v6.octets()).unwrap_or_default(),
    }
}
