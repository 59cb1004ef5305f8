//! Keys and values of the BPF maps. Plain data without padding: what one side writes, the other reads as it is.
//!
//! Addresses are 16 octets everywhere; an IPv4 address is written as `::ffff:a.b.c.d`, which no frame can carry as
//! IPv6 (the ranges deny it), so the two families never meet.

mod address;
mod flow;
mod report;
mod vm;

pub use address::*;
pub use flow::*;
pub use report::*;
pub use vm::*;

/// Rises with every change of these files or of what the programs expect of the maps: names the pin directory.
pub const VERSION: u32 = 6;
/// Most VMs that the maps hold; slots are below it.
pub const MAX_VMS: u32 = 8192;
const _: () = assert!(MAX_VMS <= u16::MAX as u32);
/// Most `cidr` rules of all VMs together, both generations of a change counted.
pub const MAX_RULES: u32 = 4_000_000;
/// Most addresses of the host.
pub const MAX_HOST_ADDRESSES: u32 = 4096;

/// Where the kernel that runs the programs keeps what `__sk_buff` does not show, in its `struct sk_buff`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SkbLayout {
    /// The octet with `ip_summed`.
    pub ip_summed: u32,
    /// The two bits of `ip_summed` in it. Both are set in `CHECKSUM_PARTIAL` alone (include/linux/skbuff.h): the checksum is still
    /// to be written.
    pub partial: u32,
    /// `csum_start`, in octets; `csum_offset` follows it.
    pub csum_start: u32,
    /// `mac_header`, in octets.
    pub mac_header: u32,
    /// Number of the kernel's function `bpf_cast_to_kern_ctx` in its BTF, whose answer lets fields be read as such; 0 where the
    /// kernel has none. The loader puts it into every [`CAST_CALL`] too.
    pub cast: u32,
}

/// A call of a kernel function (Documentation/bpf/standardization/instruction-set.rst: BPF_CALL with source 2) as it stands in
/// the object, with a number that is none where the loader writes the function's.
pub const CAST_CALL: u64 = 0x7467_cca5_0000_2085;

/// Where a listener of the proxy is in the socket map.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// TCP that is not for a gateway service.
    Tcp = 0,
    /// DNS over TCP.
    DnsTcp = 1,
    /// DNS over UDP.
    DnsUdp = 2,
    /// The guest service.
    Service = 3,
}

/// How many listeners there are: four for IPv4, then the same four for IPv6.
pub const LISTENERS: u32 = 8;

impl Listener {
    /// The listener's place in the map: a socket takes packets of its own family only.
    #[inline(always)]
    pub const fn index(self, v6: bool) -> u32 {
        self as u32 + if v6 { LISTENERS / 2 } else { 0 }
    }
}

#[cfg(feature = "user")]
mod pod {
    #![expect(unsafe_code, reason = "a marker that plain data is plain data")]
    use super::*;

    macro_rules! plain {
        ($($name:ty = $size:literal),+ $(,)?) => {$(
            const _: () = assert!(size_of::<$name>() == $size);
            // SAFETY: `repr(C)`, integers and arrays of them only, and the size says that there is no padding.
            unsafe impl aya::Pod for $name {}
        )+};
    }

    plain! {
        Vm = 48, Tap = 48, Config = 48, RuleKey = 20, FlowKey = 24, Flow = 64, FlowCount = 32, Bucket = 16,
        Traffic = 96, Drops = 520, Event = 56, FragmentKey = 28, Fragment = 16, AttemptKey = 28, Attempts = 16, SkbLayout = 20,
    }
}
