//! Closing a connection whose client may still be sending, without destroying the answer on its way.
//!
//! A socket closed over unread bytes is reset, and the client's kernel drops the answer that it had (RFC 9112 section 9.6). So
//! our side ends first, and what still comes is thrown away. Must never hold a connection longer than `PATIENCE`, nor read
//! more than `MOST`.

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

/// How long a client may take to see that it was answered.
const PATIENCE: Duration = Duration::from_secs(1);
/// What is read of it meanwhile.
const MOST: usize = 16 << 20;

/// A stream whose shutdown waits for the other side's end.
#[derive(Debug)]
pub(crate) struct Lingering<T> {
    stream: T,
    ending: Option<Ending>,
}

#[derive(Debug)]
struct Ending {
    patience: Pin<Box<Sleep>>,
    left: usize,
}

impl<T> Lingering<T> {
    pub(crate) const fn new(stream: T) -> Self {
        Self { stream, ending: None }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Lingering<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Lingering<T> {
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

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, ending } = self.get_mut();
        if ending.is_none() {
            ready!(Pin::new(&mut *stream).poll_shutdown(context))?;
        }
        let ending = ending
            .get_or_insert_with(|| Ending { patience: Box::pin(tokio::time::sleep(PATIENCE)), left: MOST });
        let mut bytes = [0; 4096];
        while ending.left > 0 && ending.patience.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut bytes);
            // A reset is an end as well: nobody is left to read the answer.
            let read = ready!(Pin::new(&mut *stream).poll_read(context, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                break;
            }
            ending.left = ending.left.saturating_sub(buffer.filled().len());
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        time::{Instant, timeout},
    };

    async fn pair() -> (Lingering<TcpStream>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (Lingering::new(listener.accept().await.unwrap().0), client)
    }

    #[tokio::test]
    async fn a_client_that_goes_on_sending_reads_its_answer() {
        let (mut server, mut client) = pair().await;
        let server = tokio::spawn(async move {
            server.read_exact(&mut [0; 1024]).await.unwrap();
            server.write_all(b"too much").await.unwrap();
            server.shutdown().await.unwrap();
        });
        client.write_all(&vec![0; 8 << 20]).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "too much");
        drop(client);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_does_not_end_is_not_waited_for() {
        let (mut server, client) = pair().await;
        let began = Instant::now();
        timeout(10 * PATIENCE, server.shutdown()).await.unwrap().unwrap();
        assert!(began.elapsed() >= PATIENCE);
        drop(client);
    }

    #[tokio::test]
    async fn a_client_that_never_stops_sending_is_cut() {
        let (mut server, mut client) = pair().await;
        let sender = tokio::spawn(async move { while client.write_all(&[0; 65536]).await.is_ok() {} });
        server.shutdown().await.unwrap();
        drop(server);
        timeout(10 * PATIENCE, sender).await.unwrap().unwrap();
    }
}
