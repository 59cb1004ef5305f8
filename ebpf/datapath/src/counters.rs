//! What a VM sent and was sent, summed over the processors.

use tapgate_ebpf_common::{
    Reason,
    maps::{Drops, PASSING, REASONS, Traffic},
};

/// A VM's counters since it was attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    passed: [u64; PASSING],
    dropped: [u64; REASONS],
    /// Frames from the guest.
    pub packets_out: u64,
    /// Octets from the guest.
    pub bytes_out: u64,
    /// Frames to the guest.
    pub packets_in: u64,
    /// Octets to the guest.
    pub bytes_in: u64,
    /// Events that were kept back because the VM sent too many, or because nobody read them.
    pub events_lost: u64,
}

impl Counters {
    pub(crate) fn sum<'a>(
        traffic: impl Iterator<Item = &'a Traffic>,
        drops: impl Iterator<Item = &'a Drops>,
    ) -> Self {
        let mut sum = Self {
            passed: [0; PASSING],
            dropped: [0; REASONS],
            packets_out: 0,
            bytes_out: 0,
            packets_in: 0,
            bytes_in: 0,
            events_lost: 0,
        };
        for one in traffic {
            for (to, from) in sum.passed.iter_mut().zip(one.passed) {
                *to += from;
            }
            sum.packets_out += one.packets_out;
            sum.bytes_out += one.bytes_out;
            sum.packets_in += one.packets_in;
            sum.bytes_in += one.bytes_in;
        }
        for one in drops {
            for (to, from) in sum.dropped.iter_mut().zip(one.dropped) {
                *to += from;
            }
            sum.events_lost += one.events_lost;
        }
        sum
    }

    /// Frames that were let through for this reason, both ways.
    pub fn passed(&self, reason: Reason) -> u64 {
        self.passed.get(reason as usize).copied().unwrap_or(0)
    }

    /// Frames that were dropped or refused for this reason, both ways.
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.dropped[reason as usize]
    }

    /// Every reason that something was let through or dropped for: reason, passed, dropped.
    pub fn reasons(&self) -> impl Iterator<Item = (Reason, u64, u64)> {
        Reason::ALL
            .iter()
            .map(|&reason| (reason, self.passed(reason), self.dropped(reason)))
            .filter(|(_, passed, dropped)| passed + dropped > 0)
    }
}
