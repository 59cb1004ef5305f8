//! What can go wrong in the datapath, and what to do about it.

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use std::{io, path::PathBuf};
use tapgate_netns::NetnsError;

/// A failure of the datapath. Nothing is open because of it: what was half made is closed or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatapathError {
    /// A value of the configuration that cannot be.
    #[error("{0}")]
    Config(String),
    /// Namespaces, links, routes or nftables.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The file system that keeps programs and maps.
    #[error("cannot {what} {path}; the BPF file system needs root and a kernel with CONFIG_BPF_SYSCALL")]
    Pins {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel refused the programs or maps.
    #[error("cannot load the BPF programs; they need Linux 6.1 or later, root, and CONFIG_BPF_SYSCALL")]
    Load(#[source] Box<EbpfError>),
    /// The kernel lacks what the programs need.
    #[error(
        "this kernel lacks {0}; tapgate needs Linux 6.1 or later with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF"
    )]
    Kernel(String),
    /// A program was refused by the verifier, or could not be attached.
    #[error("cannot {what} the BPF program `{program}` on `{link}`")]
    Program {
        /// What was tried.
        what: &'static str,
        /// Which program.
        program: &'static str,
        /// Which link.
        link: String,
        /// Why it failed.
        source: Box<ProgramError>,
    },
    /// A map could not be read or written.
    #[error("cannot {what} in the BPF map `{map}`")]
    Map {
        /// What was tried.
        what: &'static str,
        /// Which map.
        map: &'static str,
        /// Why it failed.
        source: Box<MapError>,
    },
    /// A VM's rules do not fit.
    #[error("the rules of slot {slot} do not fit: the datapath holds {limit} CIDR rules of all VMs together")]
    TooManyRules {
        /// Whose.
        slot: u32,
        /// The limit.
        limit: u32,
    },
    /// There are not so many slots.
    #[error("there is no slot {slot}; the datapath holds {limit} VMs")]
    NoSuchSlot {
        /// Which.
        slot: u32,
        /// The limit.
        limit: u32,
    },
    /// The slot is in use.
    #[error("slot {0} has a VM already; detach it first")]
    Attached(u32),
    /// The slot has no VM.
    #[error("slot {0} has no VM; attach it first")]
    NotAttached(u32),
    /// What an earlier daemon left of this VM is not whole.
    #[error("slot {slot} cannot be adopted: {why}; stop the VM and start it again")]
    NotAdoptable {
        /// Whose.
        slot: u32,
        /// What is missing.
        why: String,
    },
    /// The event ring buffer.
    #[error("cannot read the event ring buffer")]
    Events(#[source] io::Error),
    /// A raw socket for resets.
    #[error("cannot open a raw socket in the egress namespace")]
    Raw(#[source] io::Error),
}

impl From<EbpfError> for DatapathError {
    fn from(error: EbpfError) -> Self {
        Self::Load(Box::new(error))
    }
}

/// Names a map's failure.
pub(crate) fn map_error(what: &'static str, map: &'static str) -> impl FnOnce(MapError) -> DatapathError {
    move |source| DatapathError::Map { what, map, source: Box::new(source) }
}
