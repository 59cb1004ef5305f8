//! A socket towards an upstream, with its place among those of its VM, and its window. Whatever the socket becomes (TLS,
//! HTTP, WebSocket, at rest), both are held for as long as it is open.

use crate::{
    place::Place,
    window::{Size, Window, Windows},
};
use std::{
    io::{self, IoSlice},
    ops::Deref,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// An upstream's socket.
pub(crate) struct Socket {
    stream: TcpStream,
    _place: Place,
    window: Option<Window>,
}

impl Socket {
    pub(crate) fn new(stream: TcpStream, place: Place) -> Self {
        Self { stream, _place: place, window: None }
    }

    /// Takes a window for it, which its HTTP keeps to.
    pub(crate) fn open(&mut self, windows: &Windows) -> Size {
        self.window.insert(windows.take()).size
    }
}

impl Deref for Socket {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.stream
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
