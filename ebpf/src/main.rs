//! What the kernel runs for every packet on the WireGuard interface.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

mod maps;

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

#[classifier]
pub(crate) fn rampart(_ctx: TcContext) -> i32 {
    if maps::CONTROL.get(0).is_some_and(|control| control.generation != 0) {
        return TC_ACT_SHOT;
    }
    if maps::DIRECTION.load() > 1 || maps::LINK_HEADER.load() > 64 || maps::TRACE.load() > 1 {
        return maps::ALLOW.load();
    }
    TC_ACT_SHOT
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
