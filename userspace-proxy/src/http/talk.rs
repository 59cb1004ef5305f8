//! What both sides say on a WebSocket: passed on, and what the server says cleaned, frame by frame.
//!
//! Must never give the guest an octet that was not looked at under the secrets of the moment, where there are any for the host.

use super::frames::{Frames, NoFrame};
use crate::{
    secret::{known::Scope, patterns::Patterns},
    table::VmEntry,
};
use bytes::BytesMut;
use std::{io, sync::Arc};
use tapgate_model::{HostName, Reason, SecretBinding};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};

/// What is read at once.
const PIECE: usize = 16 * 1024;

/// Why it ended before both sides were done.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// One side broke off.
    #[error(transparent)]
    Off(#[from] io::Error),
    /// The server says what is no frame.
    #[error("the server sent {0}")]
    NoFrame(#[from] NoFrame),
    /// There is something to look for since, in what was not agreed on to be searched.
    #[error("a secret for this host came to apply")]
    Secret,
    /// What is to be looked for cannot be.
    #[error("the secrets cannot be looked for")]
    Unsearchable,
}

impl End {
    /// The word for the audit, if it is not the two sides' own doing.
    pub(super) const fn reason(&self) -> Option<Reason> {
        match self {
            Self::Off(_) => None,
            Self::NoFrame(_) => Some(Reason::Unreachable),
            Self::Secret => Some(Reason::Revoked),
            Self::Unsearchable => Some(Reason::Fault),
        }
    }
}

/// What is looked for: the secrets that the host can have been sent, also those that come to apply while it lasts.
pub(super) struct Sought {
    entry: Arc<VmEntry>,
    host: Option<(HostName, Scope)>,
    of: Arc<[SecretBinding]>,
    frames: Option<Frames>,
}

impl Sought {
    /// `patterns` is what the request's answer is searched for, made of the secrets `of` then.
    pub(super) fn new(
        entry: Arc<VmEntry>,
        host: Option<(HostName, Scope)>,
        of: Arc<[SecretBinding]>,
        patterns: Option<Arc<Patterns>>,
    ) -> Self {
        Self { entry, host, of, frames: patterns.map(Frames::new) }
    }

    async fn refresh(&mut self) -> Result<(), End> {
        let policy = self.entry.policy.load_full();
        if Arc::ptr_eq(&self.of, &policy.secrets) {
            return Ok(());
        }
        let sought = self.host.as_ref().map(|(host, scope)| (host, *scope));
        let made = self.entry.patterns(&policy, sought).await.map_err(|_| End::Unsearchable)?;
        // What was looked for before and no secret replaces is looked for still.
        if let Some(patterns) = made {
            self.frames.as_mut().ok_or(End::Secret)?.look_for(patterns);
        }
        self.of = policy.secrets.clone();
        Ok(())
    }
}

/// Lets both speak until both are done or one breaks off.
pub(super) async fn both<G, U>(guest: G, upstream: U, sought: Sought) -> Result<(), End>
where
    G: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let ((guest_says, guest_hears), (upstream_says, upstream_hears)) = (split(guest), split(upstream));
    tokio::try_join!(there(guest_says, upstream_hears), back(upstream_says, guest_hears, sought)).map(|_| ())
}

async fn there(mut guest: impl AsyncRead + Unpin, mut upstream: impl AsyncWrite + Unpin) -> Result<(), End> {
    let mut piece = BytesMut::with_capacity(PIECE);
    while guest.read_buf(&mut piece).await? > 0 {
        upstream.write_all_buf(&mut piece).await?;
        upstream.flush().await?;
        piece.clear();
        piece.reserve(PIECE);
    }
    Ok(upstream.shutdown().await?)
}

async fn back(
    mut upstream: impl AsyncRead + Unpin,
    mut guest: impl AsyncWrite + Unpin,
    mut sought: Sought,
) -> Result<(), End> {
    let mut piece = BytesMut::with_capacity(PIECE);
    let mut clean = Vec::new();
    while upstream.read_buf(&mut piece).await? > 0 {
        sought.refresh().await?;
        match &mut sought.frames {
            Some(frames) => {
                // What came before it is no worse for what is no frame.
                let fed = frames.feed(&piece, &mut clean);
                guest.write_all(&clean).await?;
                guest.flush().await?;
                clean.clear();
                fed?;
            }
            None => {
                guest.write_all(&piece).await?;
                guest.flush().await?;
            }
        }
        piece.clear();
        piece.reserve(PIECE);
    }
    Ok(guest.shutdown().await?)
}
