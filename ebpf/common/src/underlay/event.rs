//! Dropped datagrams as userspace hears of them.

use super::{Address, Rate};

/// One frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `bpf_ktime_get_ns`.
    pub time: u64,
    pub source: Address,
    pub destination: Address,
    /// Frames of this reason that this CPU did not report since it last reported one.
    pub suppressed: u64,
    /// Index of the interface that it came by.
    pub interface: u32,
    /// Bytes behind the link header.
    pub length: u32,
    /// Host order.
    pub source_port: u16,
    /// Host order.
    pub destination_port: u16,
    /// A `reason` of the guard's.
    pub reason: u8,
    pub _pad: [u8; 3],
}

/// Bytes of the ring buffer; a power of two, a multiple of the page size.
pub const EVENT_BYTES: u32 = 65_536;
/// Events of each reason that are reported a second, and the largest burst. A quarter of what the policy's get: a flood
/// goes on for long, and one of its packets says as much as all of them.
pub const EVENT_RATE: Rate = Rate::new(8, 8);

const _: () = assert!(size_of::<Event>() == 64);

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: repr(C), no hidden padding, no invalid bit pattern.
    unsafe impl aya::Pod for super::Event {}
}
