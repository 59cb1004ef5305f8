//! Whether a guest is ready: its SSH server says `SSH-`. Asked from inside the egress namespace, as the daemon reaches it.

use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;
use tapgate_model::GuestNet;
use tapgate_netns::Netns;

const SSH: u16 = 22;
/// One attempt; a guest without a server on the port refuses at once, one that is not up is silent.
const ATTEMPT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(200);

/// Comes back when the guest's SSH server has answered. Never gives up: the caller sets the limit.
pub async fn ssh(egress: &Netns, net: &GuestNet) {
    let address = SocketAddr::from((net.v4, SSH));
    loop {
        let egress = egress.clone();
        let answered =
            tokio::task::spawn_blocking(move || egress.run(|| greets(address)).unwrap_or(false)).await;
        if answered.unwrap_or(false) {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Connects and reads the first bytes of the server's banner.
fn greets(address: SocketAddr) -> bool {
    let read = || -> std::io::Result<[u8; 4]> {
        let mut stream = TcpStream::connect_timeout(&address, ATTEMPT)?;
        stream.set_read_timeout(Some(ATTEMPT))?;
        let mut banner = [0u8; 4];
        stream.read_exact(&mut banner)?;
        Ok(banner)
    };
    read().is_ok_and(|banner| banner == *b"SSH-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::net::TcpListener;

    #[test]
    fn only_an_ssh_banner_counts() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for banner in ["SSH-2.0-x\r\n", "HTTP/1.1 400\r\n", ""] {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(banner.as_bytes()).unwrap();
            }
        });
        assert!(greets(address));
        assert!(!greets(address));
        assert!(!greets(address));
    }
}
