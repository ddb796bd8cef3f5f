//! What the kernel runs for every packet on the WireGuard interface: one classifier, loaded once for each direction.
//!
//! The order of a packet's judgement is that of docs/POLICY.md, section 3, and stands in `verdict`. Nothing here returns
//! "pass" but a decision of the tables or a record that they still allow; whatever goes wrong drops.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

mod atomic;
mod case;
mod event;
mod flow;
mod maps;
mod verdict;

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ebpf_common::reason;

use crate::case::Case;

#[classifier]
pub(crate) fn rampart(context: TcContext) -> i32 {
    let mut case = Case::new(&context);
    case.reason = verdict::judge(&context, &mut case);
    maps::count(&case);
    event::report(&context, &case);
    if reason::passes(case.reason) { maps::ALLOW.load() } else { TC_ACT_SHOT }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
