//! What the kernel counted for each VM, as the API shows it.

use crate::engine::VmCounters;
use tapgate_datapath::Counters;
use tapgate_model::Reason;

/// A VM's frames and octets since its gate was attached.
#[derive(Clone, Debug, Default)]
pub struct VmTraffic {
    /// Frames from the guest.
    pub packets_out: u64,
    /// Octets from the guest.
    pub bytes_out: u64,
    /// Frames to the guest.
    pub packets_in: u64,
    /// Octets to the guest.
    pub bytes_in: u64,
    /// Frames let through, by reason, both ways; reasons that never came up are left out.
    pub passed: Vec<(Reason, u64)>,
    /// Frames dropped or refused, by reason, both ways.
    pub dropped: Vec<(Reason, u64)>,
    /// Events that the kernel kept back because there were too many.
    pub events_lost: u64,
    /// Flows that the kernel forwards just now.
    pub flows: u64,
}

impl From<VmCounters> for VmTraffic {
    fn from(of: VmCounters) -> Self {
        Self { flows: of.flows, ..of.counters.into() }
    }
}

impl From<Counters> for VmTraffic {
    fn from(counters: Counters) -> Self {
        let mut traffic = Self {
            packets_out: counters.packets_out,
            bytes_out: counters.bytes_out,
            packets_in: counters.packets_in,
            bytes_in: counters.bytes_in,
            events_lost: counters.events_lost,
            ..Self::default()
        };
        for (reason, passed, dropped) in counters.reasons() {
            if passed > 0 {
                traffic.passed.push((reason, passed));
            }
            if dropped > 0 {
                traffic.dropped.push((reason, dropped));
            }
        }
        traffic
    }
}
