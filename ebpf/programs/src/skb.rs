//! An skb as the classifier reads it, linear or paged, and the few fields of it that the programs use.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_skb_load_bytes};
use core::mem::MaybeUninit;
use tapgate_ebpf_common::{glance::Piece, packet::Packet};

/// Lets the frame go on.
pub const PASS: i32 = 0;
/// Drops the frame.
pub const DROP: i32 = 2;

/// The frame that the program was called for.
pub struct Skb(*mut __sk_buff);

impl Skb {
    #[inline(always)]
    pub fn new(raw: *mut __sk_buff) -> Self {
        Self(raw)
    }

    #[inline(always)]
    pub fn raw(&self) -> *mut __sk_buff {
        self.0
    }

    /// The device that the program is attached to.
    #[inline(always)]
    pub fn link(&self) -> u32 {
        // SAFETY: the context is valid for the whole run; the verifier checks each field.
        unsafe { (*self.0).ifindex }
    }

    /// The device that the frame came in by; 0 for what this machine sent.
    #[inline(always)]
    pub fn came_by(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ingress_ifindex }
    }

    /// The part of the frame that lies in one piece, for words to be read from.
    #[inline(always)]
    pub fn front(&self) -> Front<'_> {
        // SAFETY: as above.
        let (data, end) = unsafe { ((*self.0).data as usize, (*self.0).data_end as usize) };
        Front { skb: self, data, end }
    }

    #[inline(always)]
    pub fn set_mark(&self, mark: u32) {
        // SAFETY: as above.
        unsafe { (*self.0).mark = mark }
    }

    #[inline(always)]
    pub fn len(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).len }
    }
}

/// The first octets of a frame, read where they lie.
pub struct Front<'a> {
    skb: &'a Skb,
    data: usize,
    end: usize,
}

// The processors that BPF programs are compiled for here read words at any address, and the verifier knows which of the
// reads it has seen a bound for.
impl Piece for Front<'_> {
    #[inline(always)]
    fn length(&self) -> usize {
        self.skb.len() as usize
    }
    #[inline(always)]
    fn tagged(&self) -> bool {
        Packet::tagged(self.skb)
    }
    #[inline(always)]
    fn has(&self, octets: usize) -> bool {
        self.data + octets <= self.end
    }
    #[inline(always)]
    fn octet(&self, at: usize) -> u8 {
        // SAFETY: the verifier refuses the program unless `has` was asked for more than `at` octets before.
        unsafe { ((self.data + at) as *const u8).read() }
    }
    #[inline(always)]
    fn half(&self, at: usize) -> u16 {
        // SAFETY: as above.
        unsafe { ((self.data + at) as *const u16).read() }
    }
    #[inline(always)]
    fn word(&self, at: usize) -> u32 {
        // SAFETY: as above.
        unsafe { ((self.data + at) as *const u32).read() }
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn length(&self) -> usize {
        self.len() as usize
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        // SAFETY: as above.
        let (data, end) = unsafe { ((*self.0).data as usize, (*self.0).data_end as usize) };
        if data + offset + N <= end {
            // SAFETY: the verifier knows from the comparison that these octets are there.
            return Some(unsafe { ((data + offset) as *const [u8; N]).read() });
        }
        // In the paged part, or not there at all.
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes exactly `N` octets or fails.
        let failed =
            unsafe { bpf_skb_load_bytes(self.0.cast(), offset as u32, bytes.as_mut_ptr().cast(), N as u32) };
        // SAFETY: it did not fail, so all of it is written.
        if failed == 0 { Some(unsafe { bytes.assume_init() }) } else { None }
    }

    #[inline(always)]
    fn tagged(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).vlan_present != 0 }
    }
}
