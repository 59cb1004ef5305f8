//! What a guest leaves to the host's network driver: a checksum, to be written where the guest says, after everything was judged.
//!
//! The virtio header of a frame names that place, and the kernel only makes sure that it lies in the frame: it could be the
//! destination's last octets. No field of `__sk_buff` shows it, so it is read from the kernel's own `struct sk_buff`, whose
//! layout user space found in the kernel's BTF: as fields, where the kernel lets programs (6.2), which costs nothing; else by a
//! helper that reads any address. Must let no other place through than that of the judged header's checksum.

use crate::skb::Skb;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use core::arch::asm;
use tapgate_ebpf_common::{
    maps::{CAST_CALL, SkbLayout},
    packet::{ETHERNET, IPV4, IPV6, TCP, UDP},
};

/// Written before the programs are loaded.
#[unsafe(no_mangle)]
static SKB_LAYOUT: SkbLayout = SkbLayout { ip_summed: 0, partial: 0, csum_start: 0, mac_header: 0, cast: 0 };

/// One number of it.
macro_rules! layout {
    ($field:ident) => {
        // SAFETY: a constant of this program, which user space has set.
        unsafe { (&raw const SKB_LAYOUT.$field).read_volatile() }
    };
}

/// Whether nothing of the frame is still to be written but, if anything, the checksum of its transport header. `protocol` is 0 where
/// it has none.
#[inline(always)]
pub fn fits(skb: &Skb, v6: bool, protocol: u8) -> bool {
    let buffer = Buffer::of(skb);
    let Some(octet) = buffer.read::<u8>(layout!(ip_summed)) else { return false };
    let partial = layout!(partial);
    if u32::from(octet) & partial != partial {
        return true;
    }
    // Without a layout, everything comes here.
    let place = layout!(csum_start);
    if place == 0 {
        return false;
    }
    let Some(start) = buffer.read::<u16>(place) else { return false };
    let Some(offset) = buffer.read::<u16>(place + 2) else { return false };
    let Some(frame) = buffer.read::<u16>(layout!(mac_header)) else { return false };
    let header = ETHERNET + if v6 { IPV6 } else { IPV4 };
    let field = match protocol {
        TCP => 16,
        UDP => 6,
        _ => return false,
    };
    start.wrapping_sub(frame) == header as u16 && offset == field
}

/// The kernel's buffer of the frame.
enum Buffer {
    /// The verifier knows its type, and lets its fields be read.
    Typed(*const u8),
    /// An address.
    Raw(usize),
}

impl Buffer {
    #[inline(always)]
    fn of(skb: &Skb) -> Self {
        // The program's context is the buffer's address.
        let context = skb.raw();
        if layout!(cast) == 0 {
            return Self::Raw(context as usize);
        }
        let typed: *const u8;
        // SAFETY: a call of the kernel's function `bpf_cast_to_kern_ctx`, once the loader has put its number in. It takes the
        // context in r1 and answers in r0; like every call it leaves r1 to r5 undefined.
        unsafe {
            asm!(
                ".quad {call}",
                call = const CAST_CALL,
                inout("r1") context => _,
                lateout("r0") typed,
                lateout("r2") _,
                lateout("r3") _,
                lateout("r4") _,
                lateout("r5") _,
                options(nostack),
            );
        }
        Self::Typed(typed)
    }

    #[inline(always)]
    fn read<T: Copy>(&self, at: u32) -> Option<T> {
        match self {
            // SAFETY: the verifier refuses a load that is not of a field.
            Self::Typed(start) => Some(unsafe { start.add(at as usize).cast::<T>().read_volatile() }),
            // SAFETY: the helper reads any kernel address, or fails.
            Self::Raw(start) => unsafe { bpf_probe_read_kernel((start + at as usize) as *const T) }.ok(),
        }
    }
}
