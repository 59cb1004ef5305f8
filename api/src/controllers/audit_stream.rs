//! The audit log as a stream: following by server-sent events, and export as NDJSON.
//!
//! A stream reads a step at a time, when the client has taken the step before: it never holds more than one.

use super::audit::EventView;
use crate::http::{Account, ApiError, AppState, Code, OpenStream, params_invalid as invalid};
use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use std::convert::Infallible;
use std::time::Duration;
use tapgate_store::{AuditFilter, AuditRecord, Order, StoreError, now_us};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

/// How long a revoked key may go on listening.
const RECHECK: Duration = Duration::from_secs(10);
/// Events read at a time for an export.
const PAGE: u32 = 500;

struct Follower {
    state: AppState,
    account: Account,
    filter: AuditFilter,
    place: i64,
    written: watch::Receiver<u64>,
    checked: Instant,
    until: Instant,
    _open: OpenStream,
}

impl Follower {
    /// The next events; `None` when the key is no longer good, or the answer has lasted long enough.
    async fn next(&mut self) -> Result<Option<Vec<AuditRecord>>, StoreError> {
        loop {
            if Instant::now() >= self.until {
                return Ok(None);
            }
            if self.checked.elapsed() >= RECHECK {
                if !self.state.store().key_lives(&self.account.key).await? {
                    return Ok(None);
                }
                self.checked = Instant::now();
            }
            self.written.mark_unchanged();
            let audit = self.state.store().audit();
            let (events, place) = audit.follow(&self.account.user, &self.filter, self.place).await?;
            let stood_still = place == self.place;
            self.place = place;
            if !events.is_empty() {
                return Ok(Some(events));
            }
            if stood_still {
                // Nothing new, or time to look at the key again: both go round once more.
                let most = RECHECK.min(self.until.saturating_duration_since(Instant::now()));
                let _ = timeout(most, self.written.changed()).await;
            }
        }
    }
}

/// Events as they are written. A client that comes back with `Last-Event-ID` goes on where it was.
pub(super) async fn follow(
    state: AppState,
    account: Account,
    filter: AuditFilter,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    if filter.page.cursor.is_some() {
        return Err(invalid("cursor", "cannot be given together with `follow`; give `since`"));
    }
    let open = state.limits().streams.open(&account.user)?;
    let audit = state.store().audit();
    let place = match headers.get("last-event-id") {
        // A place says nothing of another account's events: it is a number, and every step looks at the owner.
        Some(value) => {
            let place = value.to_str().ok().and_then(|text| text.parse().ok());
            place.ok_or_else(|| ApiError::new(Code::InvalidCursor, "Last-Event-ID is not one of ours"))?
        }
        None => audit.follow_from(&account.user, filter.since_us).await?,
    };
    let written = audit.watch();
    let now = Instant::now();
    let until = now + state.settings().follow_for;
    let follower = Follower { state, account, filter, place, written, checked: now, until, _open: open };
    let steps = stream::unfold(follower, |mut follower| async move {
        match follower.next().await {
            Ok(Some(events)) => {
                let place = follower.place;
                Some((messages(events, place), follower))
            }
            Ok(None) => None,
            Err(error) => {
                tracing::error!(%error, "following the audit log ended");
                None
            }
        }
    });
    // Without data it is no event; a client that is cut off before the first one comes back with it.
    let begin = stream::iter([Event::default().id(place.to_string())]);
    let events = begin.chain(steps.flat_map(stream::iter));
    let sse = Sse::new(events.map(Ok::<_, Infallible>));
    Ok(sse.keep_alive(KeepAlive::new().interval(Duration::from_secs(15))).into_response())
}

/// The last message of a step carries the place: a client cut off before it gets the step again, never less.
fn messages(events: Vec<AuditRecord>, place: i64) -> Vec<Event> {
    let count = events.len();
    let message = |(index, event): (usize, AuditRecord)| {
        let message = Event::default().json_data(EventView::from(event)).unwrap_or_default().event("egress");
        if index + 1 == count { message.id(place.to_string()) } else { message }
    };
    events.into_iter().enumerate().map(message).collect()
}

/// Everything that matches by now, one object a line. What is wrong with the request or the log is said before it begins.
pub(super) async fn export(
    state: AppState,
    account: Account,
    mut filter: AuditFilter,
) -> Result<Response, ApiError> {
    let open = state.limits().streams.open(&account.user)?;
    filter.page.limit = PAGE;
    filter.page.order = Order::Asc;
    // It holds what there is now, so that it ends however fast more is written.
    filter.until_us = Some(filter.until_us.map_or(now_us(), |until| until.min(now_us())));
    let first = state.store().audit().list(&account.user, filter.clone()).await?;
    let rest = first.cursor.map(|cursor| (state, account, filter, open, cursor));
    let rest = stream::try_unfold(rest, |rest| async move {
        let Some((state, account, mut filter, open, cursor)) = rest else { return Ok::<_, StoreError>(None) };
        // Broken off, so that a part is not taken for the whole.
        if !state.store().key_lives(&account.key).await? {
            return Err(StoreError::Unavailable("its key was revoked".into()));
        }
        filter.page.cursor = Some(cursor);
        let page = state.store().audit().list(&account.user, filter.clone()).await?;
        Ok(Some((lines(page.items), page.cursor.map(|cursor| (state, account, filter, open, cursor)))))
    });
    let pages = stream::iter([Ok(lines(first.items))]).chain(rest);
    let pages = pages.inspect_err(|error| tracing::error!(%error, "an export of the audit log broke off"));
    let kind = HeaderValue::from_static("application/x-ndjson");
    Ok(([(header::CONTENT_TYPE, kind)], Body::from_stream(pages)).into_response())
}

fn lines(events: Vec<AuditRecord>) -> Vec<u8> {
    let mut lines = Vec::new();
    for event in events {
        if serde_json::to_writer(&mut lines, &EventView::from(event)).is_ok() {
            lines.push(b'\n');
        }
    }
    lines
}
