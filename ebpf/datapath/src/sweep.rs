//! Goes through the flows: cuts those that lost their rule, forgets those that ended, puts the counts right.
//!
//! Runs at every change of a policy and every few seconds. Only forgets and cuts: nothing that it does opens anything.

use crate::{DatapathError, Shared, State, cut::Cutter, events::monotonic, objects::absent, rules::Known};
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};
use tapgate_ebpf_common::{
    Verdict,
    judge::judge,
    maps::{FLOW_ANSWERED, FLOW_FIN_IN, FLOW_FIN_OUT, Flow, FlowKey, mapped},
    packet::{ACK, Header, TCP},
};

const EVERY: Duration = Duration::from_secs(5);
/// Soon after a change, to remove what it retired.
const SOON: Duration = Duration::from_millis(150);
const SECOND: u64 = 1_000_000_000;

/// Sweeps until it is aborted.
pub(crate) async fn run(shared: Arc<Shared>) {
    let mut cutter: Option<Arc<Cutter>> = None;
    loop {
        let pause = if shared.state().slots.has_retired() { SOON } else { EVERY };
        tokio::select! {
            () = shared.changed.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
        if cutter.is_none() {
            match Cutter::open(&shared.egress) {
                Ok(made) => cutter = Some(Arc::new(made)),
                Err(error) => tracing::warn!(%error, "connections cannot be reset when they lose their rule"),
            }
        }
        let (work, cutter) = (Arc::clone(&shared), cutter.clone());
        let done = tokio::task::spawn_blocking(move || sweep(&mut work.state(), cutter.as_deref())).await;
        match done {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "flows could not be swept"),
            Err(_) => return,
        }
    }
}

fn sweep(state: &mut State, cutter: Option<&Cutter>) -> Result<(), DatapathError> {
    let State { tables, slots, .. } = state;
    slots.purge(tables)?;
    let now = monotonic();
    let config = tables.config.get(&0, 0).map_err(crate::error::map_error("read", "CONFIG"))?;
    let host: HashSet<[u8; 16]> = tables.host.keys().filter_map(Result::ok).collect();
    let flows: Vec<(FlowKey, Flow)> = tables.flows.iter().filter_map(Result::ok).collect();
    let mut held: BTreeMap<u32, u64> = slots.iter().map(|(&slot, _)| (slot, 0)).collect();
    for (key, flow) in flows {
        // Flows of a VM that is not adopted yet are the kernel's to judge.
        let Some(slot) = slots.get(key.slot) else { continue };
        let known = Known { rules: &slot.rules, config: &config, host: &host };
        let revoked = flow.policy != slot.vm.policy && !passes(&key, slot, &known);
        if revoked || expired(&key, &flow, now) {
            match tables.flows.remove(&key) {
                Err(error) if !absent(&error) => {
                    return Err(crate::error::map_error("remove a flow", "FLOWS")(error));
                }
                _ => {}
            }
            if revoked
                && key.protocol == TCP
                && let Some(cutter) = cutter
            {
                let own = if key.v6 != 0 { slot.vm.v6 } else { mapped(slot.vm.v4) };
                cutter.cut(&key, &flow, crate::rules::address_of(&own, key.v6 != 0));
            }
        } else {
            *held.entry(key.slot).or_default() += 1;
        }
    }
    for (slot, held) in held {
        let Ok(counts) = tables.flow_counts.get(&slot, 0) else { continue };
        let expired = counts.opened.wrapping_sub(counts.closed).wrapping_sub(held);
        tables
            .flows_expired
            .insert(slot, expired, 0)
            .map_err(crate::error::map_error("put", "FLOWS_EXPIRED"))?;
    }
    Ok(())
}

/// Whether the VM's policy of now lets the flow pass.
fn passes(key: &FlowKey, slot: &crate::slots::Slot, known: &Known<'_>) -> bool {
    let v6 = key.v6 != 0;
    let header = Header {
        v6,
        protocol: key.protocol,
        flags: ACK,
        icmp: if v6 { 128 } else { 8 },
        source: if v6 { slot.vm.v6 } else { mapped(slot.vm.v4) },
        destination: key.remote,
        source_port: key.port,
        port: key.remote_port,
        sequence: 0,
        acknowledged: 0,
        payload: 0,
    };
    matches!(judge(&header, &slot.vm, known), Verdict::Uplink(_) | Verdict::Tolerate(_))
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
