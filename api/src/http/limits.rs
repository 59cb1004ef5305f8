//! How often: per key, and per address for those who have none. Bounded memory, whatever comes.

use super::ApiError;
use super::streams::Streams;
use axum::extract::{ConnectInfo, FromRequestParts};
use axum::http::request::Parts;
use std::collections::HashMap;
use std::convert::Infallible;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Callers remembered for one limit. Beyond it, strangers share one allowance.
const CALLERS: usize = 50_000;
/// How long after its last use a token is known to have been good.
const TRUSTED_FOR: Duration = Duration::from_secs(3600);
/// Mails with a link that somebody asked for, to one account: at once, and the time after which there is one more. A link works for
/// an hour, so whoever was mailed as many has one that works.
const MAILS: (u32, Duration) = (3, Duration::from_secs(1200));

/// An allowance: so many at once, so many a minute in the long run.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// At once.
    pub burst: u32,
    /// In the long run.
    pub per_minute: u32,
}

/// The limits of the API.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Requests with one key.
    pub key: Rate,
    /// Requests of one account, with all of its keys.
    pub account: Rate,
    /// Requests without a valid key from one address.
    pub refused: Rate,
    /// Sign-ups, logins and other uses of a password from one address.
    pub password: Rate,
    /// Device codes asked for and polled from one address.
    pub device: Rate,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            key: Rate { burst: 1000, per_minute: 30_000 },
            account: Rate { burst: 4000, per_minute: 120_000 },
            refused: Rate { burst: 30, per_minute: 60 },
            password: Rate { burst: 10, per_minute: 20 },
            device: Rate { burst: 30, per_minute: 120 },
        }
    }
}

/// Where a request came from, as limits and device codes know it: a whole /64 for IPv6, for that is one subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer(Option<IpAddr>);

impl Peer {
    /// The peer of an address.
    pub fn of(address: IpAddr) -> Self {
        Self(Some(match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) >> 64 << 64)),
            v4 => v4,
        }))
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(IpAddr::V6(v6)) => write!(f, "{v6}/64"),
            Some(v4) => v4.fmt(f),
            None => f.write_str("unknown"),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        Ok(peer.map_or(Self(None), |ConnectInfo(address)| Self::of(address.ip())))
    }
}

/// One limit over many callers: a leaky bucket for each, kept as the moment when it is empty again.
#[derive(Debug)]
pub(crate) struct Limiter<K> {
    interval: Duration,
    burst: u32,
    empty_at: Mutex<HashMap<Option<K>, Instant>>,
}

impl<K: Clone + Eq + Hash> Limiter<K> {
    pub(crate) fn new(rate: Rate) -> Self {
        Self::every(rate.burst, Duration::from_secs(60) / rate.per_minute.max(1))
    }

    fn every(burst: u32, interval: Duration) -> Self {
        Self { interval, burst: burst.max(1), empty_at: Mutex::default() }
    }

    /// Takes one, or says how long to wait.
    pub(crate) fn take(&self, caller: &K) -> Result<(), ApiError> {
        self.at(caller, Instant::now(), true).map_err(too_many)
    }

    /// Whether one could be taken.
    pub(crate) fn peek(&self, caller: &K) -> Result<(), ApiError> {
        self.at(caller, Instant::now(), false).map_err(too_many)
    }

    fn at(&self, caller: &K, now: Instant, take: bool) -> Result<(), Duration> {
        let mut cells = self.empty_at.lock().unwrap_or_else(PoisonError::into_inner);
        if cells.len() >= CALLERS {
            cells.retain(|_, empty_at| *empty_at > now);
        }
        let mut caller = Some(caller.clone());
        if cells.len() >= CALLERS && !cells.contains_key(&caller) {
            caller = None;
        }
        let empty_at = cells.get(&caller).copied().unwrap_or(now).max(now);
        let full = now + self.interval * (self.burst - 1);
        if empty_at > full {
            return Err(empty_at - full);
        }
        if take {
            cells.insert(caller, empty_at + self.interval);
        }
        Ok(())
    }
}

fn too_many(wait: Duration) -> ApiError {
    ApiError::rate_limited(wait.as_secs() + 1)
}

/// Tokens that were good lately: who has one is not shut out by others behind the same address. It only says that the database may
/// be asked, so what is kept need not be the token.
#[derive(Debug, Default)]
pub(crate) struct Trusted {
    hasher: RandomState,
    until: Mutex<HashMap<u64, Instant>>,
}

impl Trusted {
    pub(crate) fn knows(&self, token: &str) -> bool {
        let until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.get(&self.hasher.hash_one(token)).is_some_and(|until| *until > Instant::now())
    }

    pub(crate) fn add(&self, token: &str) {
        let (key, now) = (self.hasher.hash_one(token), Instant::now());
        let mut all = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= CALLERS {
            all.retain(|_, until| *until > now);
        }
        if all.len() < CALLERS || all.contains_key(&key) {
            all.insert(key, now + TRUSTED_FOR);
        }
    }

    pub(crate) fn remove(&self, token: &str) {
        self.until.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.hasher.hash_one(token));
    }
}

/// All limits, with their memories.
#[derive(Debug)]
pub(crate) struct Limits {
    pub(crate) key: Limiter<tapgate_model::ApiKeyId>,
    pub(crate) account: Limiter<tapgate_model::UserId>,
    pub(crate) refused: Limiter<Peer>,
    pub(crate) password: Limiter<Peer>,
    pub(crate) device: Limiter<Peer>,
    /// By the account that is mailed, whoever asks.
    pub(crate) mail: Limiter<tapgate_model::UserId>,
    pub(crate) trusted: Trusted,
    pub(crate) streams: Streams,
}

impl Limits {
    pub(crate) fn new(rates: Rates) -> Self {
        let Rates { key, account, refused, password, device } = rates;
        Self {
            key: Limiter::new(key),
            account: Limiter::new(account),
            refused: Limiter::new(refused),
            password: Limiter::new(password),
            device: Limiter::new(device),
            mail: Limiter::every(MAILS.0, MAILS.1),
            trusted: Trusted::default(),
            streams: Streams::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_one_an_interval() {
        let limiter = Limiter::new(Rate { burst: 3, per_minute: 60 });
        let start = Instant::now();
        for _ in 0..3 {
            assert_eq!(limiter.at(&1, start, true), Ok(()));
        }
        assert_eq!(limiter.at(&1, start, true), Err(Duration::from_secs(1)));
        assert_eq!(limiter.at(&2, start, true), Ok(()), "another caller");
        let later = start + Duration::from_secs(1);
        assert_eq!(limiter.at(&1, later, false), Ok(()));
        assert_eq!(limiter.at(&1, later, true), Ok(()));
        assert!(limiter.at(&1, later, true).is_err());
    }

    #[test]
    fn memory_is_bounded_and_strangers_share() {
        let limiter = Limiter::new(Rate { burst: 1, per_minute: 1 });
        let start = Instant::now();
        for caller in 0..CALLERS {
            assert!(limiter.at(&caller, start, true).is_ok());
        }
        assert!(limiter.at(&CALLERS, start, true).is_ok());
        assert!(limiter.at(&(CALLERS + 1), start, true).is_err());
        assert!(limiter.empty_at.lock().unwrap().len() <= CALLERS + 1);
        let later = start + Duration::from_secs(61);
        assert!(limiter.at(&(CALLERS + 1), later, true).is_ok());
        assert_eq!(limiter.empty_at.lock().unwrap().len(), 1);
    }

    #[test]
    fn one_subscriber_is_one_peer() {
        let of = |text: &str| Peer::of(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_eq!(of("2001:db8::1").to_string(), "2001:db8::/64");
    }
}
