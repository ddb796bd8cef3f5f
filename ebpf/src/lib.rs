//! What the kernel runs for every packet on the WireGuard interface, as a library that the programs are made of:
//! `main.rs` has what nodes load, `bin/bench.rs` what measures it.
//!
//! The order of a packet's judgement is that of docs/POLICY.md, section 3, and stands in `verdict`. Nothing here returns
//! "pass" but a decision of the tables or a record that they still allow; whatever goes wrong drops.
#![cfg_attr(target_arch = "bpf", no_std, feature(asm_experimental_arch))]

mod atomic;
pub mod case;
mod clock;
mod event;
mod flow;
mod fragment;
pub mod hook;
pub mod maps;
mod settled;
pub mod verdict;

use ebpf_common::reason;

use crate::case::Case;
use crate::hook::Hook;

/// Judges, counts and reports a packet; whether it passes.
#[inline(always)]
pub fn pass<H: Hook>(hook: &H) -> bool {
    let mut case = Case::new(hook);
    case.reason = verdict::judge(hook, &mut case);
    case.segments = hook.segments(&case.packet);
    maps::count(&case);
    event::report(hook, &case);
    reason::passes(case.reason)
}

/// Whether a packet is worth a full judgement; counts and reports it if not. Reads, and drops early, and nothing else: what
/// it lets pass is judged and counted by [`pass`].
#[inline(always)]
pub fn may_pass<H: Hook>(hook: &H) -> bool {
    let mut case = Case::new(hook);
    let Some(reason) = verdict::judge_early(hook, &mut case) else { return true };
    case.reason = reason;
    maps::count(&case);
    event::report(hook, &case);
    reason::passes(reason)
}
