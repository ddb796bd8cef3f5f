//! Records of flows: what a reply is a reply to.

use crate::limit;
use crate::table::Address;

/// Number of this layout and meaning of the records: another `noded` takes records over only if it has the same. Raised
/// with every change of either.
pub const LAYOUT: u32 = 3;

/// A flow as its opener sends it. Replies are looked up with the ends exchanged.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    pub source: Address,
    pub destination: Address,
    /// Host order. ICMP and ICMPv6 echo: the identifier. Protocols without ports: 0.
    pub source_port: u16,
    /// Host order. ICMP and ICMPv6 echo: 0. Protocols without ports: 0.
    pub destination_port: u16,
    /// Protocol number.
    pub protocol: u8,
    pub _pad: [u8; 3],
}

impl FlowKey {
    /// Where [`FlowFilter`] says whether there may be a record: the same for both directions of a flow. Another bit for the
    /// same key is another [`crate::ABI_VERSION`].
    #[inline(always)]
    pub const fn filter_bit(&self) -> u32 {
        // Not of an end and its port: the identifier of an echo stands for both directions.
        let rest = (self.source_port ^ self.destination_port) as u64 | (self.protocol as u64) << 16;
        let ends = spread(self.source).wrapping_mul(spread(self.destination));
        let sum = ends.wrapping_add(rest.wrapping_mul(0xc2b2_ae3d_27d4_eb4f));
        ((sum ^ sum >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - limit::FLOW_BITS.ilog2())) as u32
    }

    /// As it lies in memory, in words: the programs hand it to the kernel's hash function as they have just written it,
    /// and what was written in smaller pieces than it is read takes a while to arrive.
    #[inline(always)]
    pub const fn to_words(self) -> [u64; 5] {
        let Self { source, destination, source_port, destination_port, protocol, _pad: [e, f, g] } = self;
        let ([a, b], [c, d]) = (source_port.to_ne_bytes(), destination_port.to_ne_bytes());
        let rest = u64::from_ne_bytes([a, b, c, d, protocol, e, f, g]);
        [source.0[0], source.0[1], destination.0[0], destination.0[1], rest]
    }
}

/// The bits of an address all over a word; odd, so that in the product of two of them none makes the other's vanish.
#[inline(always)]
const fn spread(address: Address) -> u64 {
    let [high, low] = address.0;
    let sum = high.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(low.wrapping_mul(0xd6e8_feb8_6659_fd93));
    (sum ^ sum >> 32).wrapping_mul(0xff51_afd7_ed55_8ccd) | 1
}

/// What is known of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// `bpf_ktime_get_coarse_ns` of the first packet.
    pub opened: u64,
    /// The same clock, of the last packet.
    pub seen: u64,
    /// Packets and bytes from the opener, and to it.
    pub packets: u64,
    pub bytes: u64,
    pub reply_packets: u64,
    pub reply_bytes: u64,
    /// Generation in which the record was last judged.
    pub generation: u32,
    /// Counter slot of the deciding rule when last judged.
    pub rule: u32,
    /// One of the `STATE_*`.
    pub state: u8,
    /// The reason that allowed the opener when last judged.
    pub reason: u8,
    /// `EGRESS` or `INGRESS`: which way the opener's packets go.
    pub direction: u8,
    pub _pad: u8,
    /// Of the other end, where a gateway stands for it: its cidr, else 0. See [`Remote`].
    pub behind: u32,
}

/// Who shares the room for records with whom: the other end of a flow, by its address, or by its cidr where a gateway
/// stands for it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Remote {
    /// Unspecified where `behind` tells.
    pub address: Address,
    /// Id of the external cidr; 0: none.
    pub behind: u32,
    pub _pad: u32,
}

impl Remote {
    /// The other end is at `address`; `behind` as in [`Flow::behind`].
    #[inline(always)]
    pub const fn new(address: Address, behind: u32) -> Self {
        let address = if behind == 0 { address } else { Address([0, 0]) };
        Self { address, behind, _pad: 0 }
    }

    /// Of a record.
    #[inline(always)]
    pub const fn of(key: &FlowKey, flow: &Flow) -> Self {
        let address = if flow.direction as u32 == crate::EGRESS { key.destination } else { key.source };
        Self::new(address, flow.behind)
    }
}

/// Words of one half of [`FlowFilter`].
pub const FILTER_WORDS: usize = limit::FLOW_BITS as usize / 64;

/// Most packets that no rule allows belong to no flow either. A bit that is not set says so, without two searches among
/// the records: there is none whose [`FlowKey::filter_bit`] that is.
///
/// Whoever makes a record sets its bit first, in both halves. Who deletes one clears nothing: bits that are nobody's any
/// more go when userspace fills the other half anew, from the records that there are, and has the programs look there.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FlowFilter {
    /// [`FILTER_UNKNOWN`], or the number of the half that holds and one more. Anything else is as good as unknown.
    pub state: u64,
    /// The halves, one after the other.
    pub bits: [u64; 2 * FILTER_WORDS],
}

/// Nobody filled the filter yet: the records are to be asked. As a map that was just made has it.
pub const FILTER_UNKNOWN: u64 = 0;

/// In FLOW_TOTALS: records that the programs made, ever.
pub const TOTAL_OPENED: u32 = 0;
/// In FLOW_TOTALS: those of them that are no more, as userspace counted last.
pub const TOTAL_GONE: u32 = 1;
/// Entries of FLOW_TOTALS.
pub const TOTALS: u32 = 2;

/// Opened, no reply seen.
pub const STATE_OPENING: u8 = 0;
/// Replied to.
pub const STATE_ESTABLISHED: u8 = 1;
/// TCP: a FIN or RST was seen.
pub const STATE_CLOSING: u8 = 2;
/// Revoked: the policy denies what the flow was opened for. Nothing but a new opener's packet replaces it.
pub const STATE_TOMBSTONE: u8 = 3;

/// Idle time-outs in seconds (docs/POLICY.md, section 3).
pub mod timeout {
    /// TCP, both ends heard.
    pub const TCP_ESTABLISHED: u64 = 7_200;
    /// TCP, opening or closing; and a tombstone of TCP.
    pub const TCP_OPENING: u64 = 60;
    /// UDP without an answer.
    pub const UDP_OPENING: u64 = 30;
    /// UDP once answered.
    pub const UDP_ESTABLISHED: u64 = 180;
    /// ICMP and ICMPv6.
    pub const ICMP: u64 = 30;
    /// Every other protocol; and a tombstone of UDP.
    pub const OTHER: u64 = 120;
}

/// The idle time-out of a record in nanoseconds.
#[inline(always)]
pub const fn idle_timeout_ns(protocol: u8, state: u8) -> u64 {
    let seconds = match (protocol, state) {
        (6, STATE_ESTABLISHED) => timeout::TCP_ESTABLISHED,
        (6, _) => timeout::TCP_OPENING,
        (17, STATE_ESTABLISHED) => timeout::UDP_ESTABLISHED,
        (17, STATE_OPENING) => timeout::UDP_OPENING,
        (1 | 58, _) => timeout::ICMP,
        _ => timeout::OTHER,
    };
    seconds * 1_000_000_000
}

const _: () = assert!(size_of::<FlowKey>() == 40);
const _: () = assert!(size_of::<Flow>() == 64);
const _: () = assert!(size_of::<Remote>() == 24);
const _: () = assert!(size_of::<FlowFilter>() == 8 + limit::FLOW_BITS as usize / 4);
const _: () = assert!(FILTER_WORDS.is_power_of_two());

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use core::mem::offset_of;

    fn key(client: u32, server: u32, ports: [u16; 2]) -> FlowKey {
        let address = |last: u32| Address::from_v4((0x0a2a_0000 | last).to_be_bytes());
        FlowKey {
            source: address(client),
            destination: address(server),
            source_port: ports[0],
            destination_port: ports[1],
            protocol: 6,
            _pad: [0; 3],
        }
    }

    #[test]
    fn both_directions_of_a_flow_have_one_bit() {
        let key = key(7, 9, [40_000, 443]);
        let reply = FlowKey {
            source: key.destination,
            destination: key.source,
            source_port: key.destination_port,
            destination_port: key.source_port,
            ..key
        };
        assert_eq!(key.filter_bit(), reply.filter_bit());
        assert_ne!(key.filter_bit(), FlowKey { protocol: 17, ..key }.filter_bit());
        assert_eq!(key.filter_bit(), 133_649, "another filter needs another ABI_VERSION");
    }

    /// Neighbours, ports in a row, one server: what a poor hash does not tell apart.
    #[test]
    fn flows_that_look_alike_have_bits_of_their_own() {
        let bits = |keys: &mut dyn Iterator<Item = FlowKey>| {
            let mut bits: std::vec::Vec<u32> = keys.map(|key| key.filter_bit()).collect();
            assert!(bits.iter().all(|bit| *bit < limit::FLOW_BITS));
            bits.sort_unstable();
            bits.dedup();
            bits.len()
        };
        let count = 1 << 16;
        // Of so many bits drawn at random 97 % would differ.
        let enough = count as usize * 96 / 100;
        let clients = bits(&mut (0..count).map(|n| key(0x1_0000 + n, 9, [40_000, 443])));
        let ports = bits(&mut (0..count).map(|n| key(7, 9, [n as u16, 443])));
        let both = bits(&mut (0..count).map(|n| key(n >> 8, 9, [32_768 + (n as u16 & 255), 443])));
        let pairs = bits(&mut (0..count).map(|n| key(n >> 8, 0x100 + (n & 255), [443, 443])));
        let v6 = bits(&mut (0..count).map(|n| FlowKey {
            source: Address([0xfd42 << 48, u64::from(n).to_be()]),
            destination: Address([0xfd42 << 48, 1]),
            ..key(0, 0, [40_000, 443])
        }));
        for found in [clients, ports, both, pairs, v6] {
            assert!(found >= enough, "{found} of {count}: {clients} {ports} {both} {pairs} {v6}");
        }
    }

    #[test]
    fn the_words_of_a_key_are_the_key() {
        let key = FlowKey {
            source: Address([1, 2]),
            destination: Address([3, 4]),
            source_port: 0x0506,
            destination_port: 0x0708,
            protocol: 9,
            _pad: [0; 3],
        };
        let mut bytes = [0; 40];
        for (place, word) in bytes.chunks_exact_mut(8).zip(key.to_words()) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        let long = |at: usize| u64::from_ne_bytes(bytes[at..][..8].try_into().unwrap());
        let short = |at: usize| u16::from_ne_bytes(bytes[at..][..2].try_into().unwrap());
        assert_eq!([0, 8].map(|at| long(offset_of!(FlowKey, source) + at)), key.source.0);
        assert_eq!([0, 8].map(|at| long(offset_of!(FlowKey, destination) + at)), key.destination.0);
        assert_eq!(short(offset_of!(FlowKey, source_port)), key.source_port);
        assert_eq!(short(offset_of!(FlowKey, destination_port)), key.destination_port);
        assert_eq!(bytes[offset_of!(FlowKey, protocol)], key.protocol);
        assert_eq!(bytes[offset_of!(FlowKey, _pad)..][..3], key._pad);
    }
}

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: repr(C), no hidden padding, no invalid bit pattern.
    unsafe impl aya::Pod for super::FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Remote {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::FlowFilter {}
}
