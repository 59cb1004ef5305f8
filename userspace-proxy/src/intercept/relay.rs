//! Moves what is not HTTP between the two sides of opened TLS, both ways, until both are done; values that come back are turned
//! into placeholders.
//!
//! Must never give the guest an octet that was not looked at under the secrets of the moment.

use crate::{
    http::body::HELD_BACK,
    io::Prefixed,
    peek::{self, First},
    secret::{clean::Cleaner, known::Scope},
    table::VmEntry,
};
use bytes::{Bytes, BytesMut};
use std::{io, sync::Arc, time::Duration};
use tapgate_model::{HostName, Reason, SecretBinding};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split},
    time::timeout,
};

/// What is read at once.
const PIECE: usize = 16 * 1024;

/// Why it ended before both sides were done.
pub(super) enum Broken {
    /// One side broke off.
    Off,
    /// It may not go on, or never began.
    For(Reason),
}

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self::Off
    }
}

/// Whether some server could take it for HTTP.
pub(super) fn is_http(first: &First) -> bool {
    matches!(first, First::Http1 | First::Http2 | First::BadHttp)
}

/// What is looked for in what comes back: the secrets that apply to the name, also those that come to apply while it lasts,
/// since the server may be sent them on another connection.
pub(super) struct Lookout<'a> {
    entry: &'a Arc<VmEntry>,
    name: &'a HostName,
    of: Option<Arc<[SecretBinding]>>,
    cleaner: Option<Cleaner>,
}

impl<'a> Lookout<'a> {
    pub(super) fn new(entry: &'a Arc<VmEntry>, name: &'a HostName) -> Self {
        Self { entry, name, of: None, cleaner: None }
    }

    /// Takes up the secrets of the moment. What was looked for before and no secret replaces is looked for still.
    async fn refresh(&mut self) -> Result<(), Broken> {
        let policy = self.entry.policy.load_full();
        if self.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, &policy.secrets)) {
            return Ok(());
        }
        let made = self.entry.patterns(&policy, Some((self.name, Scope::Applying))).await;
        if let Some(patterns) = made.map_err(|_| Broken::For(Reason::Fault))? {
            match &mut self.cleaner {
                Some(cleaner) => cleaner.look_for(patterns),
                None => self.cleaner = Some(Cleaner::new(patterns)),
            }
        }
        self.of = Some(policy.secrets.clone());
        Ok(())
    }

    /// What of it is certain.
    async fn look(&mut self, piece: Bytes) -> Result<Bytes, Broken> {
        self.refresh().await?;
        Ok(match &mut self.cleaner {
            Some(cleaner) => cleaner.feed_bytes(piece),
            None => piece,
        })
    }

    fn is_waiting(&self) -> bool {
        self.cleaner.as_ref().is_some_and(Cleaner::is_waiting)
    }

    fn show(&mut self) -> Vec<u8> {
        self.cleaner.as_mut().map_or(Vec::new(), Cleaner::show)
    }

    fn finish(&mut self) -> Vec<u8> {
        self.cleaner.as_mut().map_or(Vec::new(), Cleaner::finish)
    }
}

/// Relays until both directions have ended or one breaks. With `judging`, what the guest begins with is looked at, for so long
/// at most: where the server spoke first, it may be HTTP that follows (a server of HTTP/2 need not wait).
pub(super) async fn both<G, U>(
    guest: G,
    upstream: U,
    lookout: Lookout<'_>,
    judging: Option<Duration>,
) -> Result<(), Broken>
where
    G: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let ((guest_says, guest_hears), (upstream_says, upstream_hears)) = (split(guest), split(upstream));
    tokio::try_join!(there(guest_says, upstream_hears, judging), back(upstream_says, guest_hears, lookout))
        .map(|_| ())
}

async fn there(
    mut guest: impl AsyncRead + Unpin,
    mut upstream: impl AsyncWrite + Unpin,
    judging: Option<Duration>,
) -> Result<(), Broken> {
    let mut piece = BytesMut::with_capacity(PIECE);
    let mut read = guest.read_buf(&mut piece).await?;
    if let Some(patience) = judging.filter(|_| read > 0) {
        let (first, all) =
            peek::peek(&mut Prefixed::new(piece.split().freeze(), &mut guest), patience, patience).await?;
        if is_http(&first) {
            return Err(Broken::For(Reason::BadRequest));
        }
        read = all.len();
        piece.extend_from_slice(&all);
    }
    while read > 0 {
        // Why nothing can be written is told by what comes back, if anything is.
        if upstream.write_all_buf(&mut piece).await.is_err() || upstream.flush().await.is_err() {
            return Ok(());
        }
        piece.clear();
        piece.reserve(PIECE);
        read = guest.read_buf(&mut piece).await?;
    }
    let _ = upstream.shutdown().await;
    Ok(())
}

async fn back(
    mut upstream: impl AsyncRead + Unpin,
    mut guest: impl AsyncWrite + Unpin,
    mut lookout: Lookout<'_>,
) -> Result<(), Broken> {
    let mut piece = BytesMut::with_capacity(PIECE);
    let mut heard = false;
    loop {
        piece.reserve(PIECE);
        // A message whose end is held back would wait for the next one, which may wait for its answer.
        let read = match lookout.is_waiting() {
            false => upstream.read_buf(&mut piece).await,
            true => match timeout(HELD_BACK, upstream.read_buf(&mut piece)).await {
                Ok(read) => read,
                Err(_) => {
                    guest.write_all(&lookout.show()).await?;
                    guest.flush().await?;
                    continue;
                }
            },
        };
        match read {
            Ok(0) => {
                guest.write_all(&lookout.finish()).await?;
                return Ok(guest.shutdown().await?);
            }
            Ok(_) => {
                heard = true;
                guest.write_all(&lookout.look(piece.split().freeze()).await?).await?;
                guest.flush().await?;
            }
            // As much as would be seen if it stood still. Who never said a word was not reached: it wants a certificate of the
            // guest's, perhaps, and there is none to show.
            Err(_) => {
                guest.write_all(&lookout.show()).await?;
                guest.flush().await?;
                return Err(if heard { Broken::Off } else { Broken::For(Reason::Unreachable) });
            }
        }
    }
}
