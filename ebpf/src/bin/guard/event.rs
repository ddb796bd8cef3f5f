//! Reports dropped datagrams to userspace, so many a second for each reason. A flood costs a look at a bucket that is empty
//! and an addition of this CPU's own: nothing that CPUs would have to fight over.
#![allow(unsafe_code, reason = "map values are shared with other CPUs; the ring buffer lends uninitialised memory")]

use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns};
use ebpf_common::underlay::{Datagram, EVENT_RATE, Event};

use crate::maps::{GUARD_EVENT_BUCKETS, GUARD_EVENTS, GUARD_UNREPORTED};
use crate::verdict::take;

/// What an event says of a frame that the datagram in it does not.
#[derive(Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) interface: u32,
    pub(crate) length: u32,
    pub(crate) port: u16,
}

/// A function of its own: what it needs of the stack is not the verdict's.
#[inline(never)]
pub(crate) fn report(datagram: &Datagram, arrival: &Arrival, reason: u8) -> u32 {
    let Some(unreported) = GUARD_UNREPORTED.get_ptr_mut(u32::from(reason)) else { return 0 };
    // SAFETY: the helper takes nothing and always succeeds.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let allowed = GUARD_EVENT_BUCKETS.get_ptr_mut(u32::from(reason)).is_some_and(|full| take(full, &EVENT_RATE, now));
    let entry = if allowed { GUARD_EVENTS.reserve::<Event>(0) } else { None };
    let Some(mut entry) = entry else {
        // SAFETY: the map's value, checked not to be null; per CPU, and the hooks run with bottom halves off.
        unsafe { *unreported += 1 };
        return 0;
    };
    // SAFETY: as above.
    let suppressed = unsafe { core::mem::take(&mut *unreported) };
    // SAFETY: the helper takes nothing and always succeeds.
    let time = unsafe { bpf_ktime_get_ns() };
    entry.write(Event {
        time,
        source: datagram.source,
        destination: datagram.destination,
        suppressed,
        interface: arrival.interface,
        length: arrival.length,
        source_port: datagram.source_port,
        destination_port: arrival.port,
        reason,
        _pad: [0; 3],
    });
    entry.submit(0);
    0
}
