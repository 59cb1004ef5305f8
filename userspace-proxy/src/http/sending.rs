//! Which upstream connection a request goes out on, and where it goes next if that one took it no more.
//!
//! Must never send a request again that an upstream may have acted on, unless acting twice is acting once (RFC 9110 §9.2.2), nor
//! try without end. Requests of one guest's connection that wait for the same server wait for one dial: a server that lets a
//! connection go (GOAWAY) would be dialled once for each of them otherwise.

use super::{
    body::Body,
    interim::Turn,
    received::Received,
    request::HttpConn,
    target::{address, repeatable},
    upstream::{Key, Sender, Upstream, UpstreamError},
};
use crate::{intercept::leaf::Alpn, registry::Ticket};
use http::{Request, Response};
use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Connections that may give one request back.
const GIVEN_BACK: usize = 32;

/// What a guest's connection goes on with.
#[derive(Default)]
pub(crate) struct Parked {
    upstream: Mutex<Option<Upstream>>,
    /// Its upstreams take many requests at a time, as the last one did.
    many: AtomicBool,
    /// Held by whoever dials for all.
    dialling: tokio::sync::Mutex<()>,
    /// Dials for all that failed.
    failed: AtomicU64,
}

impl Parked {
    fn replace(&self, upstream: Option<Upstream>) -> Option<Upstream> {
        std::mem::replace(&mut *self.upstream.lock().unwrap_or_else(PoisonError::into_inner), upstream)
    }
}

impl HttpConn {
    /// An upstream connection to begin with, or to go on with.
    pub(crate) fn park(&self, upstream: Upstream) {
        let many = matches!(upstream.sender, Sender::Http2(_));
        self.parked.many.store(many, Ordering::Relaxed);
        let before = self.parked.replace(Some(upstream));
        if let Some(before) = before.filter(|before| matches!(before.sender, Sender::Http1(_))) {
            self.shared.pool.give(&self.entry, before);
        }
    }

    /// Parks another handle on one that takes many requests at a time.
    fn share(&self, upstream: &Upstream) {
        if let Some(shared) = upstream.share() {
            self.park(shared);
        }
    }

    /// For the guest's next connection.
    pub(super) fn give_back(&self) {
        if let Some(upstream) = self.parked.replace(None) {
            self.shared.pool.give(&self.entry, upstream);
        }
    }

    /// The connection used before; one that takes many requests at a time stays for others. Of a guest that has many requests at
    /// a time the one before may still be answered there, without end perhaps.
    fn unpark(&self) -> Option<Upstream> {
        let mut parked = self.parked.upstream.lock().unwrap_or_else(PoisonError::into_inner);
        let upstream = parked.take_if(|upstream| self.alpn == Alpn::Http1 || upstream.at_rest())?;
        *parked = upstream.share();
        Some(upstream)
    }

    /// One that is there already: the one used before, or one at rest.
    async fn found(&self, ticket: &Ticket, key: &Key) -> Result<Option<Upstream>, UpstreamError> {
        let dialer = &self.shared.connector.dialer;
        let policy = self.entry.policy.load_full();
        for pooled in [false, true] {
            let candidate = if pooled { self.shared.pool.take(&policy.vm, key) } else { self.unpark() };
            let fits = |upstream: &Upstream| {
                upstream.key == *key && dialer.admits(&policy, upstream.address.ip()).is_ok()
            };
            if let Some(mut upstream) = candidate.filter(fits)
                && upstream.ready().await
            {
                dialer.enter(&self.entry, ticket, upstream.address.ip())?;
                if pooled {
                    self.share(&upstream);
                }
                return Ok(Some(upstream));
            }
        }
        Ok(None)
    }

    async fn dialled(&self, ticket: &Ticket, key: &Key) -> Result<Upstream, UpstreamError> {
        let connector = &self.shared.connector;
        let mut upstream = connector.connect(&self.entry, key.clone()).await?;
        connector.dialer.enter(&self.entry, ticket, upstream.address.ip())?;
        upstream.ready().await;
        self.share(&upstream);
        Ok(upstream)
    }

    /// A connection for the key: one that is there already, or a new one. True if others' requests may go out on it too, or did.
    async fn upstream(
        &self,
        ticket: &Ticket,
        key: &Key,
        fresh: bool,
    ) -> Result<(Upstream, bool), UpstreamError> {
        if fresh {
            return Ok((Box::pin(self.dialled(ticket, key)).await?, false));
        }
        if let Some(upstream) = self.found(ticket, key).await? {
            return Ok((upstream, true));
        }
        let parked = &self.parked;
        if parked.many.load(Ordering::Relaxed) {
            let failed = parked.failed.load(Ordering::Relaxed);
            let _turn = parked.dialling.lock().await;
            if let Some(upstream) = self.found(ticket, key).await? {
                return Ok((upstream, true));
            }
            // Where it failed for another, all try at once: nobody waits for one patience after the other.
            if parked.failed.load(Ordering::Relaxed) == failed {
                let dialled = Box::pin(self.dialled(ticket, key)).await;
                if dialled.is_err() {
                    parked.failed.fetch_add(1, Ordering::Relaxed);
                }
                return Ok((dialled?, true));
            }
        }
        let upstream = Box::pin(self.dialled(ticket, key)).await?;
        let shared = matches!(upstream.sender, Sender::Http2(_));
        Ok((upstream, shared))
    }

    /// Sends a request; `fresh` on a connection of its own.
    pub(super) async fn send(
        &self,
        ticket: &Ticket,
        key: Key,
        mut request: Request<Body>,
        mut fresh: bool,
        turn: Option<&Turn>,
    ) -> Result<(Response<Received>, Upstream), UpstreamError> {
        let (mut again, mut given_back) = (true, 0);
        loop {
            let copy = repeatable(&request);
            let (mut upstream, used) = self.upstream(ticket, &key, fresh).await?;
            address(&mut request, &upstream.sender, key.tls.is_some());
            let (error, back) = match upstream.send(request, turn).await {
                Ok(response) => return Ok((response, upstream)),
                Err(failed) => failed,
            };
            // It was closed while at rest, or took no more: nothing was sent, or nothing looked at.
            let untouched = back.is_some() || error.is_refusal();
            let Some(next) = back.or(copy).filter(|_| used) else { return Err(error) };
            if untouched && given_back < GIVEN_BACK {
                given_back += 1;
            } else if again {
                // It ended between two requests (a keep-alive that ran out), or on the way to this one.
                again = false;
            } else {
                return Err(error);
            }
            request = next;
            fresh = !untouched && matches!(upstream.sender, Sender::Http1(_));
        }
    }

    /// For the next request, once the answer to this one has begun.
    pub(super) fn keep(&self, upstream: Upstream) {
        if matches!(upstream.sender, Sender::Http1(_)) {
            self.park(upstream);
        }
    }
}
