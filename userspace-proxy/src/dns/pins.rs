//! Which addresses the gateway's DNS gave one VM for which names: the only names that a connection without one has.
//!
//! Per VM, so that one VM's questions never widen what another reaches. Bounded in addresses, names and time.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tapgate_model::HostName;

/// A pin outlives the answer, for clients that look up once and connect for a while.
const MIN_LIFE: Duration = Duration::from_secs(120);
/// Nothing that a zone's owner writes makes a pin live longer than this.
const MAX_LIFE: Duration = Duration::from_secs(3600);
/// Names kept for one address; a shared address of a CDN has many.
const NAMES_PER_ADDRESS: usize = 16;

/// The pins of one VM.
pub(crate) struct Pins {
    by_address: Mutex<HashMap<IpAddr, Vec<(HostName, Instant)>>>,
    most: usize,
}

impl Pins {
    /// No pins; at most so many addresses.
    pub(crate) fn new(most: usize) -> Self {
        Self { by_address: Mutex::default(), most }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Vec<(HostName, Instant)>>> {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the address is about to be given for the name. Called before the answer is sent.
    pub(crate) fn pin(&self, address: IpAddr, name: &HostName, ttl: Duration, now: Instant) {
        let until = now + ttl.clamp(MIN_LIFE, MAX_LIFE);
        let mut pins = self.lock();
        if pins.len() >= self.most && !pins.contains_key(&address) {
            pins.retain(|_, names| {
                names.retain(|(_, until)| *until > now);
                !names.is_empty()
            });
            if pins.len() >= self.most {
                // The one that would end first makes room: a VM only ever pushes out its own.
                let oldest = pins.iter().min_by_key(|(_, names)| names.iter().map(|(_, until)| *until).max());
                if let Some(address) = oldest.map(|(address, _)| *address) {
                    pins.remove(&address);
                }
            }
        }
        let names = pins.entry(address).or_default();
        if let Some(known) = names.iter_mut().find(|(known, _)| known == name) {
            known.1 = known.1.max(until);
            return;
        }
        names.retain(|(_, until)| *until > now);
        if names.len() >= NAMES_PER_ADDRESS {
            names.remove(0);
        }
        names.push((name.clone(), until));
    }

    /// The names that the address was given for and that still hold, the latest first.
    pub(crate) fn names(&self, address: IpAddr, now: Instant) -> Vec<HostName> {
        let pins = self.lock();
        let names = pins.get(&address).map(Vec::as_slice).unwrap_or_default();
        names.iter().rev().filter(|(_, until)| *until > now).map(|(name, _)| name.clone()).collect()
    }

    /// How many addresses are pinned.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn name(text: &str) -> HostName {
        text.parse().unwrap()
    }

    #[test]
    fn a_pin_ends_and_never_lives_as_long_as_a_zone_says() {
        let pins = Pins::new(8);
        let address = "192.0.2.1".parse().unwrap();
        let start = Instant::now();
        pins.pin(address, &name("a.example"), Duration::from_secs(u64::from(u32::MAX)), start);
        assert_eq!(pins.names(address, start), [name("a.example")]);
        assert!(pins.names(address, start + MAX_LIFE).is_empty());
        pins.pin(address, &name("b.example"), Duration::ZERO, start);
        assert_eq!(pins.names(address, start + MIN_LIFE / 2), [name("b.example"), name("a.example")]);
    }

    #[test]
    fn a_flood_of_answers_stays_bounded() {
        let pins = Pins::new(8);
        let now = Instant::now();
        for n in 0..1000u32 {
            pins.pin(Ipv4Addr::from(0xc000_0200 + n).into(), &name("a.example"), Duration::ZERO, now);
            pins.pin("192.0.2.1".parse().unwrap(), &name(&format!("n{n}.example")), Duration::ZERO, now);
        }
        assert!(pins.len() <= 8);
        assert!(pins.names("192.0.2.1".parse().unwrap(), now).len() <= NAMES_PER_ADDRESS);
    }
}
