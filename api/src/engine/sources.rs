//! How many connections each source has with one VM: so many and no more, so that nobody takes all of the places. Over IPv6 a source
//! is its /64, for a host has all of its addresses. Must never count a connection beyond its end.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Connections of one source at a time.
pub(super) const MOST: usize = 64;

/// They. Those that have none are not in it, so that there are no more than connections.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources(Arc<Mutex<HashMap<IpAddr, Source>>>);

#[derive(Debug, Default)]
struct Source {
    connections: usize,
    refused: bool,
}

/// It has as many as it may.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// Whether it is the first one since it had fewer.
    pub first: bool,
}

/// One connection's, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    sources: Sources,
    source: IpAddr,
}

impl Sources {
    /// A place for one more connection from there.
    pub(super) fn take(&self, peer: IpAddr) -> Result<Place, Refused> {
        let source = of(peer);
        let mut all = self.all();
        let known = all.entry(source).or_default();
        if known.connections >= MOST {
            return Err(Refused { first: !std::mem::replace(&mut known.refused, true) });
        }
        known.connections += 1;
        Ok(Place { sources: self.clone(), source })
    }

    fn all(&self) -> MutexGuard<'_, HashMap<IpAddr, Source>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.sources.all();
        let Some(known) = all.get_mut(&self.source) else { return };
        known.connections -= 1;
        known.refused = false;
        if known.connections == 0 {
            all.remove(&self.source);
        }
    }
}

fn of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_takes_its_own_places_and_gives_them_back() {
        let sources = Sources::default();
        let from = |text: &str| sources.take(text.parse().unwrap());
        let mut places: Vec<_> = (0..MOST).map(|_| from("192.0.2.1").unwrap()).collect();
        assert_eq!(from("192.0.2.1").unwrap_err(), Refused { first: true });
        assert_eq!(from("::ffff:192.0.2.1").unwrap_err(), Refused { first: false }, "the same, over IPv6");
        let other = from("192.0.2.2").unwrap();
        drop(places.pop());
        places.push(from("192.0.2.1").unwrap());
        assert_eq!(from("192.0.2.1").unwrap_err(), Refused { first: true });
        let own: Vec<_> = (0..MOST).map(|n| from(&format!("2001:db8:0:1::{n:x}")).unwrap()).collect();
        assert!(from("2001:db8:0:1:ffff::1").is_err(), "a host has all of a /64");
        assert!(from("2001:db8:0:2::1").is_ok());
        drop((places, other, own));
        assert!(sources.all().is_empty());
    }
}
