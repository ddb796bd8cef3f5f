//! What the kernel runs for every packet on the WireGuard interface, as a library that the programs are made of:
//! `main.rs` has what nodes load, `bin/bench.rs` what measures it.
//!
//! The order of a packet's judgement is that of docs/POLICY.md, section 3, and stands in `verdict`. Nothing here returns
//! "pass" but a decision of the tables or a record that they still allow; whatever goes wrong drops.
#![cfg_attr(target_arch = "bpf", no_std, feature(asm_experimental_arch))]

mod atomic;
mod clock;
pub mod context;
pub mod count;
mod event;
mod flow;
mod fragment;
pub mod hook;
pub mod maps;
mod settled;
pub mod verdict;

use ebpf_common::reason;

use crate::context::PacketContext;
use crate::hook::Hook;

/// Judges, counts and reports a packet; whether it passes.
#[inline(always)]
pub fn pass<H: Hook>(hook: &H) -> bool {
    let mut context = PacketContext::new(hook);
    context.reason = verdict::judge(hook, &mut context);
    context.segments = hook.segments(&context.packet);
    count::count(&context);
    event::report(hook, &context);
    reason::passes(context.reason)
}

/// Whether a packet is worth a full judgement; counts and reports it if not. Reads, and drops early, and nothing else: what
/// it lets pass is judged and counted by [`pass`].
#[inline(always)]
pub fn may_pass<H: Hook>(hook: &H) -> bool {
    let mut context = PacketContext::new(hook);
    let Some(reason) = verdict::judge_early(hook, &mut context) else { return true };
    context.reason = reason;
    count::count(&context);
    event::report(hook, &context);
    reason::passes(reason)
}
