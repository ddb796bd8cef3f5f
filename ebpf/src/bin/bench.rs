//! Programs that measure: they call what the node's programs are made of, in loops, and stand beside what others do.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

/// Does nothing: what running a program costs.
#[classifier]
pub(crate) fn empty(_: TcContext) -> i32 {
    0
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
