//! Connecting to a VMM's Unix sockets: by names of any length, and never waiting in the kernel.
//!
//! The other side may be a VMM that a guest has taken over. One that stops accepting fills its queue, and a blocking connect would
//! then hold a thread that serves others, for good.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long a full queue is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// Connects to a socket whose path may be longer than the 107 octets that an address has.
pub async fn connect_any_length(path: &Path) -> io::Result<UnixStream> {
    let (_folder, short) = short_path(path)?;
    connect(&short).await
}

/// Connects; an error of kind `TimedOut` if nobody accepts.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    connect_within(path, PATIENCE).await
}

async fn connect_within(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let until = Instant::now() + patience;
    loop {
        match tokio::net::UnixStream::connect(path).await {
            Ok(stream) => return stream.into_std(),
            // Its queue is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                sleep(PAUSE).await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
    }
}

/// The socket's short name and the open folder that the name goes through.
pub fn short_path(path: &Path) -> io::Result<(File, PathBuf)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = File::open(parent)?;
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    Ok((folder, short))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

    /// On one thread, as if it were the daemon's last: others go on, and who does not accept is found out.
    #[tokio::test]
    async fn who_does_not_accept_holds_no_thread() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let _fills_the_queue = connect(&path).await.unwrap();
        let patience = Duration::from_millis(500);
        let others = tokio::spawn(sleep(patience / 5));
        let error = connect_within(&path, patience).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(others.is_finished());
        assert_eq!(connect(&folder.path().join("none")).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
