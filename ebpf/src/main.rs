//! The programs that a node loads: one classifier, loaded once for each direction, and one for XDP at ingress, where it is
//! asked for.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::bindings::{TC_ACT_SHOT, xdp_action};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use ebpf::hook::{Buffer, Skb};
use ebpf::maps::ALLOW;

#[classifier]
pub(crate) fn rampart(context: TcContext) -> i32 {
    if ebpf::pass(&Skb(&context)) { ALLOW.load() } else { TC_ACT_SHOT }
}

#[xdp]
pub(crate) fn early(context: XdpContext) -> u32 {
    if ebpf::may_pass(&Buffer(&context)) { xdp_action::XDP_PASS } else { xdp_action::XDP_DROP }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
