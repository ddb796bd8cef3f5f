//! The time of records and events. The coarse clock moves on with the kernel's tick, so that a CPU asks for it once a tick:
//! reading the tick is a load, asking a call.
#![allow(unsafe_code, reason = "map values; helpers that take nothing and always succeed")]

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use ebpf_common::event::Clock;

use crate::maps::CLOCK;

/// The kernel's tick: within one, [`now`] stands still.
#[inline(always)]
pub(crate) fn tick() -> u64 {
    // SAFETY: takes nothing and always succeeds.
    unsafe { bpf_jiffies64() }
}

/// Nanoseconds since boot, a few milliseconds coarse.
#[inline(always)]
pub(crate) fn now() -> u64 {
    let tick = tick();
    // SAFETY: as above.
    let read = || unsafe { bpf_ktime_get_coarse_ns() };
    let Some(clock) = CLOCK.get_ptr_mut(0) else { return read() };
    // SAFETY: the map's value, checked not to be null; per CPU, and the hooks run with bottom halves off.
    unsafe {
        if (*clock).tick != tick {
            *clock = Clock { tick, time: read() };
        }
        (*clock).time
    }
}
