//! A VM's gate: the proof that its tap has its programs, without which no VMM boots a VM.

use crate::{Datapath, DatapathError, Programs, Shared, State, hook, spare::Spare, world};
use std::os::fd::OwnedFd;
use tapgate_ebpf_common::net::{GATEWAY_MAC, GATEWAY_V4};
use tapgate_fault::point;
use tapgate_model::{GuestNet, VmId, VmPolicy};
use tapgate_netns::{Netns, Route, RouteKind, Rtnl, Tap, Veth};

/// The device of a guest that is a namespace.
const GUEST_LINK: &str = "eth0";

/// Made by attaching or adopting alone: whoever holds it knows that the programs are on the VM's tap.
#[derive(Debug)]
pub struct Gate {
    vm: VmId,
    net: GuestNet,
    tap: Option<OwnedFd>,
}

impl Gate {
    /// Whose it is.
    pub fn vm(&self) -> &VmId {
        &self.vm
    }

    /// The addresses that the programs let through.
    pub fn net(&self) -> GuestNet {
        self.net
    }

    /// The tap's descriptor for the VMM; none for a namespace, an adopted VM, or a second time.
    pub fn take_tap(&mut self) -> Option<OwnedFd> {
        self.tap.take()
    }
}

impl Datapath {
    /// Makes the VM's tap with both programs on it. Frames flow once the VMM has the descriptor.
    pub async fn attach_tap(
        &self,
        vm: &VmId,
        net: GuestNet,
        policy: &VmPolicy,
    ) -> Result<Gate, DatapathError> {
        let _replaced = self.shared.replace_spare();
        let inside = self.free_slot(&net).await?;
        if let Some(spare) = self.shared.take_spare() {
            match self.use_spare(&inside, spare, &net, policy).await {
                Ok(tap) => return Ok(Gate { vm: vm.clone(), net, tap: Some(tap.into()) }),
                Err(error) => tracing::warn!(slot = net.slot, %error, "a spare tap was of no use"),
            }
            self.detach_slot(net.slot).await?;
        }
        let name = net.link();
        let tap = Tap::create(&self.shared.egress, &name)?;
        point("gate.link");
        let index = inside.link(&name).await?;
        inside.configure_link(index, Some(GATEWAY_MAC), world::MTU).await?;
        self.close_on_failure(self.gate(&inside, index, &net, policy, false).await, net).await?;
        Ok(Gate { vm: vm.clone(), net, tap: Some(tap.into()) })
    }

    async fn use_spare(
        &self,
        inside: &Rtnl,
        spare: Spare,
        net: &GuestNet,
        policy: &VmPolicy,
    ) -> Result<Tap, DatapathError> {
        let (tap, index) = spare.become_tap(&self.shared, inside, net.slot, &net.link()).await?;
        point("gate.link");
        self.gate(inside, index, net, policy, true).await?;
        Ok(tap)
    }

    /// Makes a pair of devices with both programs on the near end; the far end becomes `eth0` of the guest namespace,
    /// with the guest's addresses and routes.
    pub async fn attach_netns(
        &self,
        vm: &VmId,
        net: GuestNet,
        policy: &VmPolicy,
        guest: &Netns,
    ) -> Result<Gate, DatapathError> {
        let inside = self.free_slot(&net).await?;
        let name = net.link();
        let veth = Veth {
            name: &name,
            mac: Some(GATEWAY_MAC),
            peer: GUEST_LINK,
            peer_mac: Some(net.mac),
            peer_netns: guest,
        };
        let index = inside.add_veth(&veth).await?;
        point("gate.link");
        let done = async {
            inside.configure_link(index, None, world::MTU).await?;
            configure_guest(guest, &net).await?;
            self.gate(&inside, index, &net, policy, false).await
        };
        self.close_on_failure(done.await, net).await?;
        Ok(Gate { vm: vm.clone(), net, tap: None })
    }

    /// Takes over a VM that runs since before this daemon: its tap and its programs must be there. The programs are
    /// replaced by this daemon's, the policy by the given one; flows go on. Of a VM that was adopted already (its VMM could not be
    /// taken over yet) they are looked at, and the policy stays.
    pub async fn adopt(&self, vm: &VmId, net: GuestNet, policy: &VmPolicy) -> Result<Gate, DatapathError> {
        let slot = net.slot;
        let inside = Rtnl::connect(&self.shared.egress)?;
        let Some(index) = inside.find_link(&net.link()).await? else {
            return Err(DatapathError::NotAdoptable { slot, why: format!("its tap {} is gone", net.link()) });
        };
        if !inside.is_up(&net.link()).await? {
            return Err(DatapathError::NotAdoptable {
                slot,
                why: format!("its tap {} is half made", net.link()),
            });
        }
        {
            let mut state = self.shared.state();
            let State { tables, slots } = &mut *state;
            match slots.get(slot).map(|known| known.owner == *vm && known.link == index) {
                None => {}
                Some(true) => {
                    return self.still_attached(net).map(|()| Gate { vm: vm.clone(), net, tap: None });
                }
                Some(false) => return Err(DatapathError::Attached(slot)),
            }
            // An entry for another tap of this slot is a leftover, and another VM's counters with it.
            let known = tables.find(slot);
            let fresh = known.is_none_or(|(link, _)| link != index)
                || tables.flow_counts.get(&slot, 0).is_err()
                || tables.attempts_gone.get(&slot, 0).is_err()
                || tables.counters(slot).is_err();
            if known.is_some_and(|(link, _)| link != index) {
                slots.remove(tables, slot)?;
            }
            slots.add(tables, &net, index, policy, fresh)?;
            let replaced = self.with_programs(|programs| {
                hook::replace(
                    self.shared.attachment,
                    programs,
                    &self.shared.egress,
                    &self.shared.pins,
                    slot,
                    &net.link(),
                )
            });
            if let Err(error) = replaced {
                // Without its entry whatever program is there drops everything; without a program nothing passes.
                slots.remove(tables, slot)?;
                return Err(error);
            }
        }
        world::route_guest(&inside, index, &net).await?;
        self.shared.changed.notify_one();
        Ok(Gate { vm: vm.clone(), net, tap: None })
    }

    /// Removes a VM's tap, programs, routes, rules, flows and counters. Removing what is not there is no error.
    pub async fn detach(&self, net: GuestNet) -> Result<(), DatapathError> {
        self.detach_slot(net.slot).await
    }

    /// Removes what earlier daemons left of slots that are not among these. For once after the start, when every VM that
    /// runs is adopted. Answers the slots that were removed.
    pub async fn detach_others(&self, keep: &[GuestNet]) -> Result<Vec<u32>, DatapathError> {
        let inside = Rtnl::connect(&self.shared.egress)?;
        let taps = inside.links().await?;
        let mut found: Vec<u32> =
            taps.iter().filter_map(|(name, _)| name.strip_prefix("tg")?.parse().ok()).collect();
        found.extend(hook::pinned(&self.shared.pins));
        found.extend(self.slots()?);
        found.sort_unstable();
        found.dedup();
        found.retain(|slot| keep.iter().all(|net| net.slot != *slot));
        for &slot in &found {
            self.detach_slot(slot).await?;
        }
        crate::bpffs::remove_other_versions(&self.shared.pins)?;
        Ok(found)
    }

    pub(crate) async fn detach_slot(&self, slot: u32) -> Result<(), DatapathError> {
        {
            let mut state = self.shared.state();
            let State { tables, slots } = &mut *state;
            slots.remove(tables, slot)?;
        }
        point("detach.entries");
        let inside = Rtnl::connect(&self.shared.egress)?;
        // The link goes before its programs: there is no moment with one and without the other.
        inside.delete_link(&format!("tg{slot}")).await?;
        point("detach.link");
        hook::detach(&self.shared.pins, slot)?;
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Makes sure that nothing of the slot is there.
    async fn free_slot(&self, net: &GuestNet) -> Result<Rtnl, DatapathError> {
        if self.shared.state().slots.get(net.slot).is_some() {
            return Err(DatapathError::Attached(net.slot));
        }
        self.detach_slot(net.slot).await?;
        Ok(Rtnl::connect(&self.shared.egress)?)
    }

    /// Entries, programs unless they are there already (`hooked`), and only then up: a link that is up is whole but for its routes, which adoption makes anew.
    async fn gate(
        &self,
        inside: &Rtnl,
        index: u32,
        net: &GuestNet,
        policy: &VmPolicy,
        hooked: bool,
    ) -> Result<(), DatapathError> {
        let Shared { attachment, egress, pins, .. } = &*self.shared;
        {
            let mut state = self.shared.state();
            let State { tables, slots } = &mut *state;
            slots.add(tables, net, index, policy, true)?;
        }
        point("gate.entries");
        let (slot, link) = (net.slot, net.link());
        // Whatever happened to it since it was made.
        match hooked {
            true => self.still_attached(*net)?,
            false => self.with_programs(|programs| {
                hook::attach(*attachment, programs, egress, pins, &slot.to_string(), &link)
            })?,
        }
        point("gate.programs");
        if net.v6.is_some() {
            let gateway = std::net::Ipv6Addr::from(tapgate_ebpf_common::net::GATEWAY_V6);
            inside.add_address(index, gateway.into(), 64).await?;
        }
        inside.set_up(index).await?;
        point("gate.up");
        world::route_guest(inside, index, net).await
    }

    /// Whether both programs are on the tap.
    fn still_attached(&self, net: GuestNet) -> Result<(), DatapathError> {
        let Shared { attachment, egress, .. } = &*self.shared;
        match self.with_programs(|programs| hook::are_attached(*attachment, programs, egress, &net.link()))? {
            true => Ok(()),
            false => Err(DatapathError::NotAdoptable {
                slot: net.slot,
                why: "a program is no longer on its tap".into(),
            }),
        }
    }

    fn with_programs<T>(
        &self,
        work: impl FnOnce(&mut Programs) -> Result<T, DatapathError>,
    ) -> Result<T, DatapathError> {
        let removed = || DatapathError::Config("the datapath is being removed".into());
        work(self.shared.programs().as_mut().ok_or_else(removed)?)
    }

    async fn close_on_failure(
        &self,
        done: Result<(), DatapathError>,
        net: GuestNet,
    ) -> Result<(), DatapathError> {
        if done.is_err()
            && let Err(error) = self.detach_slot(net.slot).await
        {
            tracing::warn!(slot = net.slot, %error, "a half-made tap could not be removed");
        }
        done
    }
}

/// Gives a guest namespace its addresses and its way out, as a guest's own network configuration would.
async fn configure_guest(guest: &Netns, net: &GuestNet) -> Result<(), DatapathError> {
    let inside = Rtnl::connect(guest)?;
    let index = inside.link(GUEST_LINK).await?;
    if net.v6.is_some() {
        guest.sysctl(&format!("ipv6/conf/{GUEST_LINK}/accept_ra"), "0")?;
    }
    inside.add_address(index, net.v4.into(), 32).await?;
    inside.configure_link(index, None, world::MTU).await?;
    inside.set_up(index).await?;
    let loopback = inside.link("lo").await?;
    inside.set_up(loopback).await?;
    let gateway = std::net::Ipv4Addr::from(GATEWAY_V4);
    let out = Route {
        to: (std::net::Ipv4Addr::UNSPECIFIED.into(), 0),
        kind: RouteKind::Unicast,
        link: Some(index),
        via: Some(gateway.into()),
        source: None,
        table: 254,
    };
    inside.add_route(&out).await?;
    if let Some(v6) = net.v6 {
        inside.add_address(index, v6.into(), 128).await?;
        let gateway = std::net::Ipv6Addr::from(tapgate_ebpf_common::net::GATEWAY_V6);
        let to = (std::net::Ipv6Addr::UNSPECIFIED.into(), 0);
        inside.add_route(&Route { to, via: Some(gateway.into()), ..out }).await?;
    }
    Ok(())
}
