//! Hands a frame to a socket of the egress namespace: an established one by itself, a listener for a new connection.
//!
//! Every path releases the socket that it looked up; merging two look-ups makes the verifier lose the types.

use crate::{maps::LISTENERS, skb::Skb};
use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_tuple},
    helpers::{bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release, bpf_skc_lookup_tcp},
};
use core::{ffi::c_void, mem::MaybeUninit};
use tapgate_ebpf_common::{maps::Listener, packet::Header};

const THIS_NAMESPACE: u64 = u64::MAX;
const TIME_WAIT: u32 = 6;
const LISTEN: u32 = 10;
const AF_INET6: u32 = 10;

/// What a look-up of the frame's connection found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Found {
    Nothing,
    /// A connection, in whatever state of opening or closing.
    Connection,
    TimeWait,
}

/// Looks up the connection that a TCP frame belongs to. A function of its own, for the sake of the stack.
#[inline(never)]
pub fn connection(skb: &Skb, header: &Header) -> Found {
    let mut tuple = MaybeUninit::<bpf_sock_tuple>::zeroed();
    let raw = tuple.as_mut_ptr();
    // SAFETY: all zeroes is a valid tuple; each arm writes the fields of its own family.
    let size = unsafe {
        if header.v6 {
            let v6 = &raw mut (*raw).__bindgen_anon_1.ipv6;
            (*v6).saddr = words(&header.source);
            (*v6).daddr = words(&header.destination);
            (*v6).sport = header.source_port.to_be();
            (*v6).dport = header.port.to_be();
            36
        } else {
            let v4 = &raw mut (*raw).__bindgen_anon_1.ipv4;
            (*v4).saddr = words(&header.source)[3];
            (*v4).daddr = words(&header.destination)[3];
            (*v4).sport = header.source_port.to_be();
            (*v4).dport = header.port.to_be();
            12
        }
    };
    if size == 36 { lookup(skb, raw, 36) } else { lookup(skb, raw, 12) }
}

#[inline(always)]
fn words(a: &[u8; 16]) -> [u32; 4] {
    [
        u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
        u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
        u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
        u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
    ]
}

#[inline(always)]
fn lookup(skb: &Skb, tuple: *mut bpf_sock_tuple, size: u32) -> Found {
    // SAFETY: the tuple is initialised up to `size`; a socket that is found is released below.
    let socket = unsafe { bpf_skc_lookup_tcp(skb.raw().cast(), tuple, size, THIS_NAMESPACE, 0) };
    if socket.is_null() {
        return Found::Nothing;
    }
    // SAFETY: not null, and held until the release.
    let state = unsafe { (*socket).state };
    // SAFETY: looked up above and released once.
    unsafe { bpf_sk_release(socket.cast()) };
    match state {
        LISTEN => Found::Nothing,
        TIME_WAIT => Found::TimeWait,
        _ => Found::Connection,
    }
}

/// Assigns the frame to a listener. Says whether that worked: without a listener it does not, and the frame must go.
/// An IPv4 socket must never be given an IPv6 frame: the kernel does not check, and would read a part that it has not.
#[inline(always)]
pub fn assign(skb: &Skb, listener: Listener, v6: bool) -> bool {
    let index = listener.index(v6);
    // SAFETY: the map lives as long as the program; the key is a `u32` as the map wants it.
    let socket = unsafe {
        bpf_map_lookup_elem((&raw const LISTENERS).cast::<c_void>().cast_mut(), (&raw const index).cast())
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: not null, and held until the release.
    let family = unsafe { (*socket.cast::<bpf_sock>()).family };
    let failed = if v6 && family != AF_INET6 {
        1
    } else {
        // SAFETY: not null; released once after the use.
        unsafe { bpf_sk_assign(skb.raw().cast(), socket, 0) }
    };
    // SAFETY: looked up above and released once.
    unsafe { bpf_sk_release(socket) };
    failed == 0
}
