//! The guard on the underlay: what the kernel runs for every packet that arrives where WireGuard's own packets do, as a
//! classifier or as an XDP program. An object of its own, with maps of its own: the policy does not depend on it.
//!
//! What it does, and why in that order, is said in `ebpf-common`'s `underlay`. Unlike the policy it is open: whatever it does
//! not understand, or has no map for, passes.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

mod event;
mod frame;
mod maps;
mod verdict;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};

use crate::frame::{Buffer, Skb};

/// The classifier: whoever comes after it decides on.
#[classifier]
pub(crate) fn guard(context: TcContext) -> i32 {
    if verdict::pass(&Skb(&context)) { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

#[xdp(frags)]
pub(crate) fn guard_xdp(context: XdpContext) -> u32 {
    if verdict::pass(&Buffer(&context)) { xdp_action::XDP_PASS } else { xdp_action::XDP_DROP }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
