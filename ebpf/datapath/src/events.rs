//! Reads the ring buffer: what VMs tried and the proxy does not see. What is lost before it is counted per VM.

use crate::{DatapathError, Shared, bpffs, error::map_error, rules::address_of};
use aya::{
    Pod,
    maps::{Map, MapData, RingBuf},
};
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tapgate_ebpf_common::{
    maps::{EVENT_ALLOWED, EVENT_TOLERATED, Event as Raw},
    packet::{ICMP, ICMP6, TCP, UDP},
};
use tapgate_model::{Protocol, Reason, Verdict};
use tokio::io::{Interest, unix::AsyncFd};

/// One thing that a VM tried: a flow that the kernel forwards, or a frame that it refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub time: SystemTime,
    /// The VM's slot.
    pub slot: u32,
    /// IP protocol number.
    pub ip_protocol: u8,
    /// The protocol as the audit log names it. What is none of TCP, UDP and ICMP counts as `icmp`: a protocol without
    /// ports.
    pub protocol: Protocol,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Source port, where the protocol has ports.
    pub source_port: Option<u16>,
    /// Destination port, where the protocol has ports.
    pub port: Option<u16>,
    /// What was decided; the rule that allowed it included.
    pub verdict: Verdict,
    /// Octets of the frame.
    pub length: u32,
    /// How many attempts this stands for.
    pub count: u32,
}

/// The stream of events.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    pub(crate) fn open(shared: Arc<Shared>) -> Result<Self, DatapathError> {
        let path = bpffs::maps(&shared.pins).join("EVENTS");
        let map = MapData::from_pin(path)
            .and_then(Map::from_map_data)
            .and_then(RingBuf::try_from)
            .map_err(map_error("open", "EVENTS"))?;
        Ok(Self { ring: watch(map).map_err(DatapathError::Events)?, shared })
    }

    /// The next event. Cancelling the wait loses nothing.
    pub async fn next(&mut self) -> Result<Event, DatapathError> {
        loop {
            let mut ready = self.ring.readable_mut().await.map_err(DatapathError::Events)?;
            match ready.get_inner_mut().next().and_then(|item| read(&item)) {
                Some(raw) => return Ok(self.understand(&raw)),
                None => ready.clear_ready(),
            }
        }
    }

    fn understand(&self, raw: &Raw) -> Event {
        let v6 = raw.v6 != 0;
        let destination = address_of(&raw.destination, v6);
        let reason = Reason::from_u8(raw.reason).unwrap_or(Reason::Fault);
        let verdict = match raw.verdict {
            EVENT_ALLOWED => Verdict::Allow {
                rule: self
                    .shared
                    .state()
                    .slots
                    .get(raw.slot)
                    .and_then(|slot| slot.rules.of(destination))
                    .cloned(),
                reason,
            },
            EVENT_TOLERATED => Verdict::Tolerate { reason },
            _ => Verdict::Deny { reason },
        };
        let ports = raw.protocol == TCP || raw.protocol == UDP;
        Event {
            time: wall_clock(raw.time),
            slot: raw.slot,
            ip_protocol: raw.protocol,
            protocol: match raw.protocol {
                TCP => Protocol::Tcp,
                UDP => Protocol::Udp,
                ICMP | ICMP6 => Protocol::Icmp,
                _ => Protocol::Icmp,
            },
            source: address_of(&raw.source, v6),
            destination,
            source_port: ports.then_some(raw.source_port),
            port: ports.then_some(raw.port),
            verdict,
            length: raw.length,
            count: 1,
        }
    }
}

#[expect(unsafe_code, reason = "the descriptor of a map that is owned by what is watched")]
fn watch(ring: RingBuf<MapData>) -> std::io::Result<AsyncFd<RingBuf<MapData>>> {
    // SAFETY: the ring owns its map's descriptor and always answers with that one, until it is dropped.
    unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(Into::into)
}

#[expect(unsafe_code, reason = "plain data out of a buffer of the kernel's")]
fn read(bytes: &[u8]) -> Option<Raw> {
    const fn plain<T: Pod>() {}
    plain::<Raw>();
    if bytes.len() < size_of::<Raw>() {
        return None;
    }
    // SAFETY: long enough, and `Raw` is `Pod`: any octets are a value of it.
    Some(unsafe { bytes.as_ptr().cast::<Raw>().read_unaligned() })
}

/// The wall clock's time of a moment of the monotonic clock.
fn wall_clock(nanoseconds: u64) -> SystemTime {
    let ago = monotonic().saturating_sub(nanoseconds);
    SystemTime::now() - Duration::from_nanos(ago)
}

/// Nanoseconds of the monotonic clock: the programs' time.
pub(crate) fn monotonic() -> u64 {
    let time =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    time.as_nanos() as u64
}
