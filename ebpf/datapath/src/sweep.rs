//! Goes through the flows: cuts those that lost their rule, forgets those that ended, puts the counts right.
//!
//! Runs at every change of a policy and every few seconds. Only forgets and cuts: nothing that it does opens anything.

use crate::{
    DatapathError, Shared, bpffs, cut::Cutter, error::map_error, events::monotonic, groups, objects::absent,
    rules::Known,
};
use aya::maps::{HashMap, Map, MapData};
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tapgate_ebpf_common::{
    Verdict,
    judge::judge,
    maps::{FLOW_ANSWERED, FLOW_FIN_IN, FLOW_FIN_OUT, Flow, FlowKey, Vm},
    packet::{ACK, Header, TCP},
};

const EVERY: Duration = Duration::from_secs(5);
/// Soon after a change, to remove what it retired.
const SOON: Duration = Duration::from_millis(150);
/// Changes often come many at a time: one sweep for all of them.
const GATHER: Duration = Duration::from_millis(5);
/// Entries that are removed while others wait.
const AT_ONCE: usize = 256;
const SECOND: u64 = 1_000_000_000;

/// Sweeps until it is aborted.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut cutter: Option<Arc<Cutter>> = None;
    loop {
        let pause = if shared.state().slots.has_retired() { SOON } else { EVERY };
        tokio::select! {
            () = shared.changed.notified() => tokio::time::sleep(GATHER).await,
            () = tokio::time::sleep(pause) => {}
        }
        if cutter.is_none() {
            match Cutter::open(&shared.egress) {
                Ok(made) => cutter = Some(Arc::new(made)),
                Err(error) => tracing::warn!(%error, "connections cannot be reset when they lose their rule"),
            }
        }
        let (work, cutter) = (Arc::clone(&shared), cutter.clone());
        let done = tokio::task::spawn_blocking(move || sweep(&work, cutter.as_deref())).await;
        match done {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "flows could not be swept"),
            Err(_) => return,
        }
    }
}

/// Goes through the flows without holding anyone up: the state is locked for moments only.
fn sweep(shared: &Shared, cutter: Option<&Cutter>) -> Result<(), DatapathError> {
    purge(shared)?;
    let path = bpffs::maps(&shared.pins).join("FLOWS");
    let mut table: HashMap<MapData, FlowKey, Flow> = MapData::from_pin(path)
        .and_then(Map::from_map_data)
        .and_then(HashMap::try_from)
        .map_err(map_error("open", "FLOWS"))?;
    // Flows first, policies after: no flow is judged by a policy older than the one that it was made under.
    let flows: Vec<(FlowKey, Flow)> = table.iter().filter_map(Result::ok).collect();
    let (config, host, vms) = {
        let mut state = shared.state();
        let crate::State { tables, slots, .. } = &mut *state;
        let config = tables.config.get(&0, 0).map_err(map_error("read", "CONFIG"))?;
        let host: HashSet<[u8; 16]> = tables.host.keys().filter_map(Result::ok).collect();
        let vms: BTreeMap<u32, _> =
            slots.iter().map(|(&slot, known)| (slot, (known.vm, known.rules.clone()))).collect();
        (config, host, vms)
    };
    let now = monotonic();
    let mut held: BTreeMap<u32, u64> = BTreeMap::new();
    for (key, flow) in flows {
        // Flows of a VM that is not adopted yet are the kernel's to judge.
        let Some((vm, rules)) = vms.get(&u32::from(key.slot)) else { continue };
        let held = held.entry(u32::from(key.slot)).or_default();
        let known = Known { rules, config: &config, host: &host };
        let revoked = flow.policy != vm.policy && !passes(&key, vm, &known);
        if !revoked && !expired(&key, &flow, now) {
            *held += 1;
            continue;
        }
        match table.remove(&key) {
            Err(error) if !absent(&error) => return Err(map_error("remove a flow", "FLOWS")(error)),
            _ => {}
        }
        if revoked
            && key.protocol == TCP
            && let Some(cutter) = cutter
        {
            let v6 = key.v6 != 0;
            cutter.cut(&key, &flow, crate::rules::address_of(&vm.own(v6), v6));
        }
    }
    let mut state = shared.state();
    let tables = &mut state.tables;
    for (slot, held) in held {
        let Ok(counts) = tables.flow_counts.get(&slot, 0) else { continue };
        let expired = counts.opened.wrapping_sub(counts.closed).wrapping_sub(held);
        tables.flows_expired.insert(slot, expired, 0).map_err(map_error("put", "FLOWS_EXPIRED"))?;
    }
    Ok(())
}

/// Removes the rules that changes retired.
fn purge(shared: &Shared) -> Result<(), DatapathError> {
    let rules = shared.state().slots.purgeable();
    for some in rules.chunks(AT_ONCE) {
        let mut state = shared.state();
        some.iter().try_for_each(|key| groups::remove(&mut state.tables, key))?;
    }
    Ok(())
}

/// Whether the VM's policy of now lets the flow pass.
fn passes(key: &FlowKey, vm: &Vm, known: &Known<'_>) -> bool {
    let v6 = key.v6 != 0;
    let header = Header {
        v6,
        protocol: key.protocol,
        flags: ACK,
        icmp: if v6 { 128 } else { 8 },
        source: vm.own(v6),
        destination: key.remote.octets(),
        source_port: key.port,
        port: key.remote_port,
        ..Header::default()
    };
    matches!(judge(&header, vm, known), Verdict::Uplink(_) | Verdict::Tolerate(_))
}

/// Whether the flow has been silent for longer than flows of its kind are.
fn expired(key: &FlowKey, flow: &Flow, now: u64) -> bool {
    let over = flow.state & (FLOW_FIN_OUT | FLOW_FIN_IN) == FLOW_FIN_OUT | FLOW_FIN_IN;
    let answered = flow.state & FLOW_ANSWERED != 0;
    let limit = match (key.protocol == TCP, answered, over) {
        (true, _, true) => 10,
        (true, false, _) => 60,
        (true, true, _) => 24 * 3600,
        (false, false, _) => 30,
        (false, true, _) => 180,
    };
    now.saturating_sub(flow.seen) > limit * SECOND
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapgate_ebpf_common::packet::UDP;

    #[test]
    fn flows_are_forgotten_after_the_silence_of_their_kind() {
        let over = FLOW_FIN_OUT | FLOW_FIN_IN;
        for (protocol, state, seconds) in [
            (TCP, 0, 60),
            (TCP, FLOW_ANSWERED, 24 * 3600),
            (TCP, FLOW_ANSWERED | FLOW_FIN_OUT, 24 * 3600),
            (TCP, FLOW_ANSWERED | over, 10),
            (UDP, 0, 30),
            (UDP, FLOW_ANSWERED, 180),
        ] {
            let key = FlowKey { protocol, ..FlowKey::default() };
            let flow = Flow { state, seen: 7 * SECOND, ..Flow::default() };
            assert!(!expired(&key, &flow, (7 + seconds) * SECOND), "{protocol} {state}");
            assert!(expired(&key, &flow, (8 + seconds) * SECOND), "{protocol} {state}");
            // A clock that seems to go back forgets nothing.
            assert!(!expired(&key, &flow, 0));
        }
    }
}
