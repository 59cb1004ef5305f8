//! A client that asks has to take what it is answered.
//!
//! The HTTP library waits without a limit for room on a socket, so that whoever reads nothing would hold a connection for as long as
//! it likes. Must never cut off a client that takes anything at all, however slowly.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

/// A stream that fails when it could not be written to for so long.
#[derive(Debug)]
pub(crate) struct Taking<T> {
    stream: T,
    patience: Patience,
}

#[derive(Debug)]
struct Patience {
    whole: Duration,
    /// Since something waits.
    left: Option<Pin<Box<Sleep>>>,
}

impl<T> Taking<T> {
    pub(crate) const fn new(stream: T, patience: Duration) -> Self {
        Self { stream, patience: Patience { whole: patience, left: None } }
    }
}

impl Patience {
    fn judge<R>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if written.is_ready() {
            self.left = None;
            return written;
        }
        let whole = self.whole;
        let left = self.left.get_or_insert_with(|| Box::pin(tokio::time::sleep(whole)));
        ready!(left.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Taking<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Taking<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Self { stream, patience } = self.get_mut();
        let written = Pin::new(stream).poll_write(context, bytes);
        patience.judge(context, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { stream, patience } = self.get_mut();
        let written = Pin::new(stream).poll_write_vectored(context, bytes);
        patience.judge(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const PATIENCE: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn who_takes_a_little_goes_on_and_who_takes_nothing_does_not() {
        let (mut client, server) = tokio::io::duplex(16);
        let mut server = Taking::new(server, PATIENCE);
        let slowly = async {
            for _ in 0..6 {
                tokio::time::sleep(PATIENCE / 4).await;
                client.read_exact(&mut [0; 16]).await.unwrap();
            }
        };
        let whole = async {
            // Together longer than the patience.
            server.write_all(&[0; 96]).await.unwrap();
            server
        };
        let ((), mut server) = tokio::join!(slowly, whole);
        let cut = server.write_all(&[0; 32]).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::TimedOut);
    }
}
