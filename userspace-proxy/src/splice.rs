//! Moves bytes between two sockets inside the kernel (`splice(2)`), both ways, until both are done.
//!
//! Short messages are copied instead, which costs less. A pipe is borrowed only while bytes are in it, so an idle
//! connection holds none. Bytes are counted as they arrive. Back-pressure is the sockets' own: nothing is read that was not written on.

use crate::{audit::Counters, throttle::Throttle};
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{io::Interest, net::TcpStream};

/// A pipe's capacity: larger ones gain little and pin more memory.
const CAPACITY: usize = 256 * 1024;
/// Less than this is copied.
const LITTLE: usize = 8 * 1024;
/// So many short pieces in a row end splicing.
const STAY: u8 = 16;
/// Pipes kept for the next connection.
const POOL: usize = 64;

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

/// Pipes at rest, empty.
#[derive(Default)]
pub(crate) struct Pipes(Mutex<Vec<Pipe>>);

impl Pipes {
    fn take(&self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(pipe);
        }
        let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        let wanted = libc::c_int::try_from(CAPACITY).unwrap_or(libc::c_int::MAX);
        // Beyond the user's share of pipe memory the kernel refuses to enlarge; the default is 64 KiB.
        let capacity = fcntl(&write, FcntlArg::F_SETPIPE_SZ(wanted))
            .or_else(|_| fcntl(&write, FcntlArg::F_GETPIPE_SZ))?;
        Ok(Pipe { read, write, capacity: usize::try_from(capacity).unwrap_or(64 * 1024) })
    }

    /// Takes back a pipe that is empty.
    fn give(&self, pipe: Pipe) {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < POOL {
            pool.push(pipe);
        }
    }
}

/// Relays until both directions have ended, one has failed, or nothing moved for `idle`.
pub(crate) async fn relay(
    guest: &TcpStream,
    upstream: &TcpStream,
    pipes: &Pipes,
    counters: &Arc<Counters>,
    throttle: &Throttle,
    idle: Duration,
) -> io::Result<()> {
    let both = async {
        tokio::try_join!(
            one_way(guest, upstream, pipes, &counters.out, throttle),
            one_way(upstream, guest, pipes, &counters.r#in, throttle),
        )
    };
    tokio::select! {
        ended = both => ended.map(|_| ()),
        () = counters.still(idle) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// What one reading step found.
enum Read {
    /// All that was there, and it was little; what of it could not be written on at once.
    Little {
        moved: usize,
        rest: Vec<u8>,
    },
    /// As much as fits: more will be there, which splicing moves cheaper.
    Much {
        moved: usize,
        rest: Vec<u8>,
    },
    Nothing,
    End,
}

/// Copies what is there, if it is little: for short messages that is cheaper than a pipe. Knows from a short read that
/// nothing is left, which saves the next one.
fn copy(from: &TcpStream, to: &TcpStream) -> io::Result<Read> {
    let mut buffer = [0u8; LITTLE];
    let mut got = None;
    let read = from.try_io(Interest::READABLE, || {
        let length = nix::unistd::read(from, &mut buffer)?;
        got = Some(length);
        // With edges reported, a short read is as good as the error that would follow it; the end is kept apart from it.
        match length {
            1..LITTLE => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    });
    let moved = match (got, read) {
        (Some(0), _) => return Ok(Read::End),
        (Some(length), _) => length,
        (None, Err(error)) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
        (None, _) => return Ok(Read::Nothing),
    };
    let written = match to.try_write(&buffer[..moved]) {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(error) => return Err(error),
    };
    let rest = buffer[written..moved].to_vec();
    Ok(if moved < LITTLE { Read::Little { moved, rest } } else { Read::Much { moved, rest } })
}

/// Writes what could not be written at once.
async fn write_on(to: &TcpStream, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        to.writable().await?;
        match to.try_write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => rest = &rest[length..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn one_way(
    from: &TcpStream,
    to: &TcpStream,
    pipes: &Pipes,
    count: &AtomicU64,
    throttle: &Throttle,
) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    // How many short pieces in a row are still spliced: a bulk flow whose pieces vary does not go to and fro.
    let mut splices = 0u8;
    loop {
        from.readable().await?;
        if splices == 0 {
            let (moved, rest) = match copy(from, to)? {
                Read::End => break,
                Read::Nothing => continue,
                Read::Little { moved, rest } => (moved, rest),
                Read::Much { moved, rest } => {
                    splices = STAY;
                    (moved, rest)
                }
            };
            count.fetch_add(moved as u64, Ordering::Relaxed);
            write_on(to, &rest).await?;
            throttle.moved(moved).await;
            continue;
        }
        let pipe = pipes.take()?;
        let read = || Ok(splice(from, None, &pipe.write, None, pipe.capacity, flags)?);
        let mut held = match from.try_io(Interest::READABLE, read) {
            Ok(0) => {
                pipes.give(pipe);
                break;
            }
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                pipes.give(pipe);
                continue;
            }
            Err(error) => return Err(error),
        };
        splices = if held >= LITTLE { STAY } else { splices - 1 };
        count.fetch_add(held as u64, Ordering::Relaxed);
        let moved = held;
        while held > 0 {
            let write = || Ok(splice(&pipe.read, None, to, None, held, flags)?);
            match to.async_io(Interest::WRITABLE, write).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                length => held -= length,
            }
        }
        pipes.give(pipe);
        throttle.moved(moved).await;
    }
    match nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(to), nix::sys::socket::Shutdown::Write) {
        Ok(()) | Err(nix::errno::Errno::ENOTCONN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (a, b) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (a.unwrap(), b.unwrap().0)
    }

    #[tokio::test]
    async fn bytes_arrive_whole_are_counted_and_half_close_is_kept() {
        let ((mut client, guest), (upstream, mut server)) = (pair().await, pair().await);
        let counters = Arc::<Counters>::default();
        let data: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let pipes = Arc::new(Pipes::default());
        let relayed = tokio::spawn({
            let (counters, pipes) = (counters.clone(), pipes.clone());
            async move {
                relay(&guest, &upstream, &pipes, &counters, &Throttle::new(None), Duration::from_secs(60))
                    .await
            }
        });
        let sent = data.clone();
        let client = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            answer
        });
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert!(got == data);
        // The client has closed its side; the answer still comes.
        server.write_all(b"received").await.unwrap();
        drop(server);
        assert_eq!(client.await.unwrap(), b"received");
        relayed.await.unwrap().unwrap();
        assert_eq!(counters.out.load(Ordering::Relaxed), data.len() as u64);
        assert_eq!(counters.r#in.load(Ordering::Relaxed), 8);
        assert!(pipes.0.lock().unwrap().len() <= 2, "pipes are given back and few");
    }

    #[tokio::test]
    async fn a_reset_ends_both_directions() {
        let ((client, guest), (upstream, server)) = (pair().await, pair().await);
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        let relayed = relay(
            &guest,
            &upstream,
            &Pipes::default(),
            &Arc::default(),
            &Throttle::new(None),
            Duration::from_secs(60),
        )
        .await;
        assert!(relayed.is_err());
        drop(server);
    }

    #[tokio::test]
    async fn what_the_other_side_does_not_read_is_not_read_either() {
        let ((mut client, guest), (upstream, server)) = (pair().await, pair().await);
        let counters = Arc::<Counters>::default();
        let relayed = tokio::spawn({
            let counters = counters.clone();
            async move {
                let (pipes, throttle) = (Pipes::default(), Throttle::new(None));
                relay(&guest, &upstream, &pipes, &counters, &throttle, Duration::from_secs(60)).await
            }
        });
        // Writes until nothing more is taken: the buffers of two connections and one pipe, and no more.
        let piece = vec![0; 64 * 1024];
        let mut written = 0;
        while let Ok(Ok(length)) =
            tokio::time::timeout(Duration::from_millis(500), client.write(&piece)).await
        {
            written += length;
            assert!(written < 64 << 20, "without bound");
        }
        // Taken up again when it is read.
        let mut server = server;
        let mut buffer = vec![0; 256 * 1024];
        let mut read = 0;
        while read < written {
            read += server.read(&mut buffer).await.unwrap();
        }
        assert_eq!(counters.out.load(Ordering::Relaxed), written as u64);
        relayed.abort();
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed() {
        let ((_client, guest), (upstream, _server)) = (pair().await, pair().await);
        let relayed = relay(
            &guest,
            &upstream,
            &Pipes::default(),
            &Arc::default(),
            &Throttle::new(None),
            Duration::from_millis(20),
        )
        .await;
        assert_eq!(relayed.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
