//! Tap devices: made inside a namespace, handed to a VMM as a descriptor, gone with the last descriptor.

use crate::{Netns, NetnsError, rtnl::check_link_name};
use nix::libc;
use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
};

nix::ioctl_write_ptr_bad!(
    /// Attaches the descriptor to a device.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets the length of the header in front of each frame.
    tun_set_vnet_header_size,
    libc::TUNSETVNETHDRSZ,
    libc::c_int
);

/// The header that carries checksum and segmentation offloads: `struct virtio_net_hdr_v1`.
pub const VNET_HEADER: usize = 12;

/// The host's end of a guest's network: `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. The device is not persistent: when the
/// last holder of the descriptor dies, it goes, and its routes with it.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    /// Makes the device inside the namespace, down and without addresses.
    pub fn create(netns: &Netns, name: &str) -> Result<Self, NetnsError> {
        check_link_name(name)?;
        let failed = |what| move |source| NetnsError::Tap { what, name: name.to_owned(), source };
        let file = netns
            .run(|| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
                    .open("/dev/net/tun")
            })?
            .map_err(failed("open /dev/net/tun for"))?;
        configure(&file, name).map_err(failed("create"))?;
        Ok(Self(file.into()))
    }
}

#[expect(unsafe_code, reason = "two ioctls that std and nix have no safe wrapper for")]
fn configure(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // IFF_TUN_EXCL: taking over a device that is there would hand one VM's tap to another.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open, `request` is an `ifreq` that outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &request) }?;
    let size = VNET_HEADER as libc::c_int;
    // SAFETY: the descriptor is open, `size` is an int that outlives the call.
    unsafe { tun_set_vnet_header_size(file.as_raw_fd(), &size) }?;
    Ok(())
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.0
    }
}
