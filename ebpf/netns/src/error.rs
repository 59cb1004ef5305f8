//! What can go wrong with namespaces and links, and what to do about it.

use std::{io, path::PathBuf};

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetnsError {
    /// A name that cannot be a namespace's or a link's.
    #[error("`{0}` is not a usable name; use 1 to {1} letters, digits, `-`, `_` and `.`")]
    Name(String, usize),
    /// The namespace exists already.
    #[error(
        "network namespace `{0}` exists already; remove it with `ip netns delete {0}` or choose another name"
    )]
    Exists(String),
    /// There is no such namespace.
    #[error("there is no network namespace `{0}`")]
    Missing(String),
    /// Making, entering or removing a namespace failed.
    #[error("cannot {what} network namespace `{name}` (this needs root, CAP_SYS_ADMIN)")]
    Namespace {
        /// What was tried.
        what: &'static str,
        /// Which namespace.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A file under `/proc/sys` could not be written.
    #[error("cannot set {path} to `{value}`")]
    Sysctl {
        /// The file.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("cannot {what}")]
    Netlink {
        /// What was tried.
        what: String,
        /// What the kernel answered.
        source: rtnetlink::Error,
    },
    /// A netlink socket could not be opened.
    #[error("cannot open a netlink socket in network namespace `{name}`")]
    Socket {
        /// The namespace.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no such link.
    #[error("there is no link `{link}` in network namespace `{namespace}`")]
    NoLink {
        /// The link.
        link: String,
        /// Where it was looked for.
        namespace: String,
    },
    /// A tap device could not be made.
    #[error("cannot {what} tap `{name}`; is the `tun` module loaded (`modprobe tun`)?")]
    Tap {
        /// What was tried.
        what: &'static str,
        /// The device.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
    /// `nft` could not be started.
    #[error("cannot run `nft`; install it with `apt-get install nftables`")]
    NoNft(#[source] io::Error),
    /// `nft` refused the rules.
    #[error("nft refused the rules: {0}")]
    Nft(String),
}

/// The errno of a netlink failure, where there is one.
pub(crate) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| code.get().abs()),
        _ => None,
    }
}
