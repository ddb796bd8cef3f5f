//! The programs that a node loads: one classifier, loaded once for each direction.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ebpf::hook::Skb;
use ebpf::maps::ALLOW;

#[classifier]
pub(crate) fn rampart(context: TcContext) -> i32 {
    if ebpf::pass(&Skb(&context)) { ALLOW.load() } else { TC_ACT_SHOT }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
