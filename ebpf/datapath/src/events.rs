//! What VMs tried and the proxy does not see: the ring buffer, and the counts of what they go on trying. What is lost
//! before it gets here is counted per VM.

use crate::{
    DatapathError, Shared,
    attempts::{Counts, Repeated},
    bpffs,
    error::map_error,
    rules::address_of,
};
use aya::{
    Pod,
    maps::{Map, MapData, RingBuf},
};
use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tapgate_ebpf_common::{
    maps::{EVENT_ALLOWED, EVENT_TOLERATED, Event as Raw, RING_BYTES},
    packet::{ICMP, ICMP6, TCP, UDP},
};
use tapgate_model::{Protocol, Reason, Verdict};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Interval, MissedTickBehavior, interval},
};

/// How often what goes on is told.
const EVERY: Duration = Duration::from_secs(1);

/// One thing that a VM tried: a flow that the kernel forwards, or a frame that it refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub time: SystemTime,
    /// The same by the monotonic clock, in nanoseconds ([`monotonic`]): that one is never set.
    pub moment: u64,
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
    /// Source port, where the protocol has ports and the event stands for one attempt.
    pub source_port: Option<u16>,
    /// Destination port, where the protocol has ports.
    pub port: Option<u16>,
    /// What was decided; the rule that allowed it included.
    pub verdict: Verdict,
    /// Octets of the frame; 0 for one that stands for several.
    pub length: u32,
    /// How many attempts this stands for: the first of its kind is told at once, those that follow once a second.
    pub count: u32,
}

/// The stream of events.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    counts: Counts,
    repeated: VecDeque<Repeated>,
    tick: Interval,
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
        let counts = Counts::open(&shared.pins)?;
        let mut tick = interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ring = watch(map).map_err(DatapathError::Events)?;
        Ok(Self { ring, counts, repeated: VecDeque::new(), tick, shared })
    }

    /// The next event. Neither cancelling the wait nor a failure loses anything: the next call goes on. It may look through all
    /// counts, so it belongs where blocking is allowed.
    pub async fn next(&mut self) -> Result<Event, DatapathError> {
        loop {
            if let Some(repeated) = self.repeated.pop_front() {
                return Ok(self.of_repeated(&repeated));
            }
            let mut ready = tokio::select! {
                biased;
                _ = self.tick.tick() => {
                    // A few thousand system calls at worst, and nothing that may be cut in two.
                    self.counts.look(&mut self.repeated)?;
                    continue;
                }
                ready = self.ring.readable_mut() => ready.map_err(DatapathError::Events)?,
            };
            match ready.get_inner_mut().next().and_then(|item| read(&item)) {
                Some(raw) => return Ok(self.of_ring(&raw)),
                None => ready.clear_ready(),
            }
        }
    }

    /// Adds all that can be told by now of the VMs that end, without waiting; `ends` knows them by their slots. Others' events
    /// are among it, but nobody else's counts are gone through. Where it fails, `told` has what could be taken: that is not
    /// told again.
    pub fn rest(&mut self, ends: impl Fn(u32) -> bool, told: &mut Vec<Event>) -> Result<(), DatapathError> {
        // No more than the ring holds: a flood is not followed for ever.
        for _ in 0..RING_BYTES as usize / size_of::<Raw>() {
            let Some(item) = self.ring.get_mut().next() else { break };
            let raw = read(&item);
            drop(item);
            told.extend(raw.map(|raw| self.of_ring(&raw)));
        }
        let looked = self.counts.look_last(ends, &mut self.repeated);
        let repeated = std::mem::take(&mut self.repeated);
        told.extend(repeated.iter().map(|repeated| self.of_repeated(repeated)));
        looked
    }

    fn of_ring(&self, raw: &Raw) -> Event {
        let v6 = raw.v6 != 0;
        let ports = raw.protocol == TCP || raw.protocol == UDP;
        let what = What {
            slot: raw.slot,
            protocol: raw.protocol,
            verdict: raw.verdict,
            reason: raw.reason,
            destination: address_of(&raw.destination, v6),
            port: raw.port,
        };
        Event {
            source: address_of(&raw.source, v6),
            source_port: ports.then_some(raw.source_port),
            length: raw.length,
            ..self.event(&what, raw.time, 1)
        }
    }

    fn of_repeated(&self, repeated: &Repeated) -> Event {
        let key = &repeated.key;
        let what = What {
            slot: key.slot,
            protocol: key.protocol,
            verdict: key.verdict,
            reason: key.reason,
            destination: address_of(&key.destination.octets(), key.v6 != 0),
            port: key.port,
        };
        self.event(&what, repeated.seen, u32::try_from(repeated.count).unwrap_or(u32::MAX))
    }

    fn event(&self, what: &What, time: u64, count: u32) -> Event {
        let reason = Reason::from_u8(what.reason).unwrap_or(Reason::Fault);
        let state = self.shared.state();
        let slot = state.slots.get(what.slot);
        let verdict = match what.verdict {
            EVENT_ALLOWED => Verdict::Allow {
                rule: slot.and_then(|slot| slot.rules.cidr(what.destination)).cloned(),
                reason,
            },
            EVENT_TOLERATED => Verdict::Tolerate { reason },
            _ => Verdict::Deny { reason },
        };
        let v6 = what.destination.is_ipv6();
        let ports = what.protocol == TCP || what.protocol == UDP;
        Event {
            time: wall_clock(time),
            moment: time,
            slot: what.slot,
            ip_protocol: what.protocol,
            protocol: match what.protocol {
                TCP => Protocol::Tcp,
                UDP => Protocol::Udp,
                ICMP | ICMP6 => Protocol::Icmp,
                _ => Protocol::Icmp,
            },
            source: slot.map_or(IpAddr::from([0; 4]), |slot| address_of(&slot.vm.own(v6), v6)),
            destination: what.destination,
            source_port: None,
            port: ports.then_some(what.port),
            verdict,
            length: 0,
            count,
        }
    }
}

/// What an event is about, however it was told.
struct What {
    slot: u32,
    protocol: u8,
    verdict: u8,
    reason: u8,
    destination: IpAddr,
    port: u16,
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
pub fn monotonic() -> u64 {
    let time =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    time.as_nanos() as u64
}
