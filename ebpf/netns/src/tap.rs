//! Tap devices: made inside a namespace, handed to a VMM as a descriptor, gone with the last descriptor.

use crate::{Netns, NetnsError, rtnl::check_link_name};
use nix::libc;
use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
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

nix::ioctl_write_int_bad!(
    /// Lets this user attach to the device without any right.
    tun_set_owner,
    libc::TUNSETOWNER
);
nix::ioctl_write_int_bad!(
    /// Keeps the device when nobody is attached to it.
    tun_set_persist,
    libc::TUNSETPERSIST
);
nix::ioctl_none_bad!(
    /// The network namespace of the device, as a new descriptor.
    tun_get_netns,
    SIOCGSKNS
);

/// `include/uapi/linux/sockios.h`.
const SIOCGSKNS: libc::c_ulong = 0x894c;

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

/// Lends a tap to a user whose VMM opens taps by name: that user alone can attach to it, the device stays when it is let go,
/// and goes when its link is deleted. Answers the network namespace that it is in, where the VMM has to start.
#[expect(unsafe_code, reason = "three ioctls that std and nix have no safe wrapper for")]
pub fn lend(tap: OwnedFd, uid: u32) -> io::Result<OwnedFd> {
    let uid = i32::try_from(uid).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open; the argument is a number.
    unsafe { tun_set_owner(tap.as_raw_fd(), uid) }?;
    // SAFETY: as above.
    unsafe { tun_set_persist(tap.as_raw_fd(), 1) }?;
    // SAFETY: the descriptor is open; the call answers a new descriptor or an error.
    let netns = unsafe { tun_get_netns(tap.as_raw_fd()) }?;
    // SAFETY: the descriptor is new and nobody else's.
    let netns = unsafe { OwnedFd::from_raw_fd(netns) };
    let flags = nix::fcntl::FdFlag::FD_CLOEXEC;
    nix::fcntl::fcntl(&netns, nix::fcntl::FcntlArg::F_SETFD(flags))?;
    Ok(netns)
}

/// Attaches to a tap of this thread's network namespace by its name, as a VMM does that a tap was lent to.
#[expect(unsafe_code, reason = "an ioctl that std and nix have no safe wrapper for")]
pub fn attach(name: &str) -> io::Result<OwnedFd> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let request = request(name, 0);
    // SAFETY: the descriptor is open, `request` is an `ifreq` that outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &request) }?;
    Ok(file.into())
}

#[expect(unsafe_code, reason = "all zeroes have to be said to be valid")]
fn request(name: &str, more: libc::c_int) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

#[expect(unsafe_code, reason = "two ioctls that std and nix have no safe wrapper for")]
fn configure(file: &File, name: &str) -> io::Result<()> {
    // IFF_TUN_EXCL: taking over a device that is there would hand one VM's tap to another.
    let request = request(name, libc::IFF_TUN_EXCL);
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
