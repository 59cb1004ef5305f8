//! A client that has connected has to say something before long.
//!
//! The HTTP library waits without a limit for the octets that tell HTTP/2 from HTTP/1 (RFC 9113 section 3.4); its own limits
//! begin after them. Must never cut off a connection whose client has said which it speaks.

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

/// What HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream that fails if it is not clear in time what is spoken on it.
#[derive(Debug)]
pub(crate) struct Prompt<T> {
    stream: T,
    undecided: Option<Undecided>,
}

#[derive(Debug)]
struct Undecided {
    /// Octets of the preface that have come.
    seen: usize,
    patience: Pin<Box<Sleep>>,
}

impl<T> Prompt<T> {
    pub(crate) fn new(stream: T, patience: Duration) -> Self {
        let patience = Box::pin(tokio::time::sleep(patience));
        Self { stream, undecided: Some(Undecided { seen: 0, patience }) }
    }
}

impl Undecided {
    /// Whether it is still open after these octets; none are the end.
    fn is_open_after(&mut self, new: &[u8]) -> bool {
        let rest = PREFACE.get(self.seen..).unwrap_or_default();
        self.seen += new.len();
        !new.is_empty() && new.len() < rest.len() && rest.starts_with(new)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Prompt<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, undecided } = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(stream).poll_read(context, buffer);
        let Some(open) = undecided else { return read };
        match read {
            Poll::Pending => {
                ready!(open.patience.as_mut().poll(context));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            Poll::Ready(_) => {
                let new = buffer.filled().get(before..).unwrap_or_default();
                if !open.is_open_after(new) {
                    *undecided = None;
                }
                read
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Prompt<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
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

    const PATIENCE: Duration = Duration::from_secs(3);

    /// What is read until nothing more comes, and whether that is an error; the client waits between its pieces.
    async fn read(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut client, server) = tokio::io::duplex(1024);
        let mut server = Prompt::new(server, PATIENCE);
        let client = async {
            for piece in pieces {
                client.write_all(piece).await.unwrap();
                tokio::time::sleep(PATIENCE / 30).await;
            }
            tokio::time::sleep(PATIENCE * 2).await;
            drop(client);
        };
        let server = async {
            let mut read = Vec::new();
            let failed = server.read_to_end(&mut read).await.is_err();
            (read, failed)
        };
        tokio::join!(client, server).1
    }

    #[tokio::test]
    async fn who_says_too_little_is_cut_off_and_who_said_enough_may_rest() {
        let (nothing, line, nearly, whole, letter, word, request) = tokio::join!(
            read(&[]),
            read(&[b"PRI * HTTP/2.0\r\n"]),
            read(&[b"PRI", b" * HTTP/2.0\r\n\r\nSM\r\n\r"]),
            read(&[b"PRI", b" * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"more"]),
            read(&[b"G"]),
            read(&[b"PRO"]),
            read(&[b"POST / HTTP/1.1\r\n"]),
        );
        assert_eq!(nothing, (vec![], true));
        assert!(line.1 && nearly.1);
        assert!(!whole.1 && whole.0.ends_with(b"more"));
        assert_eq!((letter.0.as_slice(), letter.1), (b"G".as_slice(), false));
        assert_eq!((word.0.as_slice(), word.1), (b"PRO".as_slice(), false));
        assert_eq!((request.0.as_slice(), request.1), (b"POST / HTTP/1.1\r\n".as_slice(), false));
    }
}
