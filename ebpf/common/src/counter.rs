//! Counters. Each lives in a per-CPU map; userspace adds the CPUs up.

/// Packets with one fate.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets as the hook saw them (a GSO packet is one).
    pub packets: u64,
    /// Bytes from the IP header on.
    pub bytes: u64,
    /// Segments on the wire (a GSO packet is several).
    pub segments: u64,
}

/// Which counter of a pair of cidrs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PairKey {
    /// Id of the source's cidr; 0: none.
    pub source: u32,
    /// Id of the destination's cidr; 0: none.
    pub destination: u32,
    /// `EGRESS` or `INGRESS`.
    pub direction: u8,
    /// A `reason`.
    pub reason: u8,
    pub _pad: [u8; 2],
}

/// In LOSSES: packets that PAIR_COUNTERS had no room for.
pub const LOSS_PAIR: u32 = 0;
/// In LOSSES: records that FLOWS had no room for.
pub const LOSS_FLOW: u32 = 1;
/// In LOSSES: events that the rate limit suppressed.
pub const LOSS_EVENT_LIMITED: u32 = 2;
/// In LOSSES: events that the ring buffer had no room for.
pub const LOSS_EVENT_FULL: u32 = 3;
/// In LOSSES: records that were refused because FLOWS is half full and the remote node has more than its share.
pub const LOSS_FLOW_QUOTA: u32 = 4;
/// In LOSSES: datagrams in fragments that FRAGMENTS had no room for.
pub const LOSS_FRAGMENT: u32 = 5;
/// Entries of LOSSES.
pub const LOSSES: u32 = 6;

/// Names of the losses by number, for other versions.
pub const LOSS_NAMES: [&str; LOSSES as usize] =
    ["pair", "flow", "event-limited", "event-full", "flow-quota", "fragment"];

const _: () = assert!(size_of::<Counter>() == 24);
const _: () = assert!(size_of::<PairKey>() == 12);

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: repr(C), no hidden padding, no invalid bit pattern.
    unsafe impl aya::Pod for super::Counter {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PairKey {}
}
