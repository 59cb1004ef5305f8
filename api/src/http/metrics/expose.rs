//! One scrape: the lasting metrics, and those that are read off the parts at this moment, as OpenMetrics text.

use super::Metrics;
use crate::traffic::VmTraffic;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};
use prometheus_client::registry::{Registry, Unit};
use std::collections::HashMap;
use tapgate_model::{StatusDetail, VmId};
use tapgate_store::{AuditLoad, QueueLoad};

/// What the parts say of themselves at the moment of a scrape.
#[derive(Default)]
pub(crate) struct Now {
    pub(crate) vms: Vec<(StatusDetail, u64)>,
    pub(crate) queues: Vec<QueueLoad>,
    pub(crate) audit: AuditLoad,
    /// Audit events of each VM that were not kept.
    pub(crate) dropped: HashMap<VmId, u64>,
    pub(crate) traffic: Vec<(VmId, VmTraffic)>,
    pub(crate) stray: Option<VmTraffic>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfState {
    status_detail: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfQueue {
    database: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfVm {
    vm: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDirection {
    vm: String,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReason {
    vm: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfBuild {
    version: &'static str,
}

/// The whole exposition.
pub(crate) fn expose(metrics: &Metrics, now: Now) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("tapgate");
    let build = Family::<OfBuild, Gauge>::default();
    build.get_or_create(&OfBuild { version: env!("CARGO_PKG_VERSION") }).set(1);
    registry.register("build_info", "The version that runs", build);
    gauge(&mut registry, "uptime_seconds", "Since the daemon started", metrics.started.elapsed().as_secs());
    process(&mut registry);
    store(&mut registry, &now);
    vms(&mut registry, now);
    let mut text = String::new();
    encode_registry(&mut text, &metrics.registry)?;
    encode_registry(&mut text, &registry)?;
    encode_eof(&mut text)?;
    Ok(text)
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    registry.register(name, help, gauge);
}

fn counter(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter: Counter = Counter::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

/// The daemon's own memory and descriptors, where `/proc` tells.
fn process(registry: &mut Registry) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    if let Some(kib) = kib {
        let resident: Gauge = Gauge::default();
        resident.set(i64::try_from(kib.saturating_mul(1024)).unwrap_or(i64::MAX));
        registry.register_with_unit("resident_memory", "Of the daemon", Unit::Bytes, resident);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        gauge(registry, "open_descriptors", "Of the daemon", open.count() as u64);
    }
}

fn store(registry: &mut Registry, now: &Now) {
    let waiting = Family::<OfQueue, Gauge>::default();
    for QueueLoad { database, kind, waiting: count } in &now.queues {
        let labels = OfQueue { database, kind };
        waiting.get_or_create(&labels).set(i64::try_from(*count).unwrap_or(i64::MAX));
    }
    registry.register("store_waiting_jobs", "Jobs that wait for a database thread", waiting);
    let AuditLoad { waiting, written, dropped, aggregated } = now.audit;
    gauge(registry, "audit_waiting_events", "Audit events not yet written", waiting);
    counter(registry, "audit_events_written", "Audit events written since the start", written);
    counter(registry, "audit_events_dropped", "Audit events not kept since the start", dropped);
    let help = "Audit events counted on an equal one instead of written for themselves, since the start";
    counter(registry, "audit_events_aggregated", help, aggregated);
}

fn vms(registry: &mut Registry, now: Now) {
    let states = Family::<OfState, Gauge>::default();
    for (detail, count) in now.vms {
        let labels = OfState { status_detail: detail.word() };
        states.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    registry.register("vms", "VMs that are not destroyed, by state", states);

    let packets = Family::<OfDirection, Counter>::default();
    let bytes = Family::<OfDirection, Counter>::default();
    let passed = Family::<OfReason, Counter>::default();
    let dropped = Family::<OfReason, Counter>::default();
    let lost = Family::<OfVm, Counter>::default();
    let flows = Family::<OfVm, Gauge>::default();
    let unkept = Family::<OfVm, Counter>::default();
    let stray = now.stray.map(|traffic| ("none".to_owned(), traffic));
    let all = now.traffic.into_iter().map(|(vm, traffic)| (String::from(vm), traffic)).chain(stray);
    for (vm, traffic) in all {
        for (direction, frames, octets) in
            [("out", traffic.packets_out, traffic.bytes_out), ("in", traffic.packets_in, traffic.bytes_in)]
        {
            let labels = OfDirection { vm: vm.clone(), direction };
            packets.get_or_create(&labels).inc_by(frames);
            bytes.get_or_create(&labels).inc_by(octets);
        }
        for (family, counted) in [(&passed, &traffic.passed), (&dropped, &traffic.dropped)] {
            for (reason, count) in counted {
                family.get_or_create(&OfReason { vm: vm.clone(), reason: reason.word() }).inc_by(*count);
            }
        }
        lost.get_or_create(&OfVm { vm: vm.clone() }).inc_by(traffic.events_lost);
        flows.get_or_create(&OfVm { vm }).set(i64::try_from(traffic.flows).unwrap_or(i64::MAX));
    }
    for (vm, count) in now.dropped {
        unkept.get_or_create(&OfVm { vm: vm.into() }).inc_by(count);
    }
    registry.register("vm_packets", "Frames of a VM since its gate was attached; `none` is no VM", packets);
    registry.register("vm_bytes", "Octets of a VM since its gate was attached", bytes);
    registry.register("vm_packets_passed", "Frames let through, by reason", passed);
    registry.register("vm_packets_dropped", "Frames dropped or refused, by reason", dropped);
    registry.register("vm_events_lost", "Kernel events kept back because there were too many", lost);
    registry.register("vm_flows", "Flows that the kernel forwards just now", flows);
    registry.register("vm_audit_events_dropped", "Audit events of a VM that were not kept", unkept);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapgate_model::Reason;

    #[test]
    fn a_vm_is_shown_by_direction_and_reason() {
        let vm = VmId::generate();
        let traffic = VmTraffic {
            packets_out: 12,
            bytes_in: 600,
            passed: vec![(Reason::Cidr, 7)],
            dropped: vec![(Reason::Spoofed, 2)],
            events_lost: 4,
            flows: 3,
            ..VmTraffic::default()
        };
        let stray = VmTraffic { dropped: vec![(Reason::NoRule, 1)], ..VmTraffic::default() };
        let now = Now {
            vms: vec![(StatusDetail::Ready, 1)],
            dropped: [(vm.clone(), 9)].into(),
            traffic: vec![(vm.clone(), traffic)],
            stray: Some(stray),
            ..Now::default()
        };
        let text = expose(&Metrics::new(), now).unwrap();
        for line in [
            &format!("tapgate_vm_packets_total{{vm=\"{vm}\",direction=\"out\"}} 12"),
            &format!("tapgate_vm_bytes_total{{vm=\"{vm}\",direction=\"in\"}} 600"),
            &format!("tapgate_vm_packets_dropped_total{{vm=\"{vm}\",reason=\"spoofed\"}} 2"),
            &format!("tapgate_vm_packets_passed_total{{vm=\"{vm}\",reason=\"cidr\"}} 7"),
            &format!("tapgate_vm_events_lost_total{{vm=\"{vm}\"}} 4"),
            &format!("tapgate_vm_audit_events_dropped_total{{vm=\"{vm}\"}} 9"),
            &format!("tapgate_vm_flows{{vm=\"{vm}\"}} 3"),
            "tapgate_vm_packets_dropped_total{vm=\"none\",reason=\"no_rule\"} 1",
            "tapgate_vms{status_detail=\"ready\"} 1",
        ] {
            assert!(text.lines().any(|given| given == line), "{line}\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
