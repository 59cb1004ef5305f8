//! What a guest leaves to the host's network driver: a checksum, to be written where the guest says, after everything was judged.
//!
//! The virtio header of a frame names that place, and the kernel only makes sure that it lies in the frame: it could be the
//! destination's last octets. No field of `__sk_buff` shows it, so it is read from the kernel's own `struct sk_buff`, whose
//! layout user space found in the kernel's BTF. Must let no other place through than that of the judged header's checksum.

use crate::skb::Skb;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use tapgate_ebpf_common::{
    maps::SkbLayout,
    packet::{ETHERNET, IPV4, IPV6, TCP, UDP},
};

/// Written before the programs are loaded.
#[unsafe(no_mangle)]
static SKB_LAYOUT: SkbLayout = SkbLayout { ip_summed: 0, csum_start: 0, mac_header: 0 };

/// `CHECKSUM_PARTIAL` (include/linux/skbuff.h): the checksum is still to be written.
const PARTIAL: u8 = 3;

/// Whether nothing of the frame is still to be written but, if anything, the checksum of its transport header. `protocol` is 0 where
/// it has none.
#[inline(always)]
pub fn fits(skb: &Skb, v6: bool, protocol: u8) -> bool {
    // SAFETY: a constant of this program, which user space has set.
    let layout = unsafe { (&raw const SKB_LAYOUT).read_volatile() };
    if layout.csum_start == 0 {
        return false;
    }
    let Some(octet) = read::<u8>(skb, layout.ip_summed / 8) else { return false };
    if octet >> (layout.ip_summed % 8) & 3 != PARTIAL {
        return true;
    }
    let Some([start, offset]) = read::<[u16; 2]>(skb, layout.csum_start) else { return false };
    let Some(frame) = read::<u16>(skb, layout.mac_header) else { return false };
    let header = ETHERNET + if v6 { IPV6 } else { IPV4 };
    let field = match protocol {
        TCP => 16,
        UDP => 6,
        _ => return false,
    };
    start.wrapping_sub(frame) == header as u16 && offset == field
}

/// A member of the kernel's buffer: the program's context is its address.
#[inline(always)]
fn read<T>(skb: &Skb, at: u32) -> Option<T> {
    let address = skb.raw() as usize + at as usize;
    // SAFETY: the helper reads any kernel address, or fails.
    unsafe { bpf_probe_read_kernel(address as *const T) }.ok()
}
