//! Passes the programs' human-readable logs on to the daemon's own; in development builds alone. The last daemon to open
//! an instance reads them.

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::JoinHandle,
};

/// Reads until it is aborted.
pub(crate) fn forward(programs: &mut Ebpf) -> Option<JoinHandle<()>> {
    let logger = match EbpfLogger::init(programs) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!(%error, "the BPF programs' logs cannot be read");
            return None;
        }
    };
    Some(tokio::spawn(async move {
        let Ok(mut ring) = watch(logger) else { return };
        while let Ok(mut ready) = ring.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }))
}

type Logger = EbpfLogger<&'static dyn log::Log>;

#[expect(unsafe_code, reason = "the descriptor of a map that is owned by what is watched")]
fn watch(logger: Logger) -> std::io::Result<AsyncFd<Logger>> {
    // SAFETY: the logger owns its map's descriptor and always answers with that one, until it is dropped.
    unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }.map_err(Into::into)
}
