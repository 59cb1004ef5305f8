//! The BPF programs on each guest's tap: `from_guest` judges what a VM sends, `to_guest` what reaches it.
//!
//! The decisions are `tapgate_ebpf_common`'s; what is here reads packets and maps and carries verdicts out. Must fail
//! closed: a look-up that finds nothing, or a helper that fails, drops the frame and counts it.
#![no_std]
#![no_main]
// For the one call that no crate has a way to write.
#![feature(asm_experimental_arch)]

mod failures;
mod flows;
mod fragments;
mod from_guest;
mod maps;
mod offload;
mod report;
mod skb;
mod sockets;
mod to_guest;

use aya_ebpf::{macros::classifier, programs::TcContext};

/// Judges a frame from the guest.
#[classifier]
pub fn from_guest(ctx: TcContext) -> i32 {
    from_guest::run(&skb::Skb::new(ctx.skb.skb))
}

/// Judges a frame to the guest.
#[classifier]
pub fn to_guest(ctx: TcContext) -> i32 {
    to_guest::run(&skb::Skb::new(ctx.skb.skb))
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The helpers that look sockets up and write to ring buffers are open to programs of a GPL-compatible licence only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
