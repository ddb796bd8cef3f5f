//! Records of datagrams in fragments: what the later ones are judged by.

use crate::packet::Packet;
use crate::table::Address;

/// A datagram in fragments, but for the bits of its identification that `slot` leaves out.
///
/// There are so many records for each pair of addresses and protocol and no more: a datagram takes the place of one that
/// was sent long before it, so that a sender of many fragments needs no more room than one of few.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FragmentKey {
    pub source: Address,
    pub destination: Address,
    /// IPv4: the protocol, which is part of a datagram's identity (RFC 791). IPv6: 0.
    pub protocol: u8,
    /// The identification, folded.
    pub slot: u8,
    pub _pad: [u8; 6],
}

/// What the first fragment said.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// `bpf_ktime_get_coarse_ns` of the first fragment.
    pub seen: u64,
    /// The identification, host order.
    pub id: u32,
    /// Where the first fragment ends in the datagram. None of the others may begin before.
    pub edge: u32,
    pub source_port: u16,
    pub destination_port: u16,
    /// Behind the extension headers.
    pub protocol: u8,
    pub tcp_flags: u8,
    pub _pad: [u8; 2],
}

/// How long a record counts (docs/POLICY.md, section 3.4): as long as Linux waits for the rest of a datagram.
pub const LIFETIME_NS: u64 = 30_000_000_000;

impl FragmentKey {
    /// Of a packet that is a fragment.
    #[inline(always)]
    pub fn new(packet: &Packet) -> Self {
        let [a, b, c, d] = packet.fragment_id.to_ne_bytes();
        Self {
            source: packet.source,
            destination: packet.destination,
            // An IPv6 fragment's own word for the protocol counts in the first one only.
            protocol: if packet.family == 4 { packet.protocol } else { 0 },
            slot: a ^ b ^ c ^ d,
            _pad: [0; 6],
        }
    }
}

const _: () = assert!(size_of::<FragmentKey>() == 40);
const _: () = assert!(size_of::<Fragment>() == 24);

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: repr(C), no hidden padding, no invalid bit pattern.
    unsafe impl aya::Pod for super::FragmentKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Fragment {}
}
