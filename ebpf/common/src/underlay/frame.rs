//! Finds a datagram to the port in a frame. What it does not understand is none.

use super::{ETHERNET, EXTENSION_HEADERS};
use crate::table::Address;

/// Where the bytes come from, link header included.
pub trait Frame {
    /// `N` bytes at an offset; `None` where the frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// Bytes in all.
    fn length(&self) -> u32;

    /// What follows an IPv6 header, which the programs make a function of its own.
    #[inline(always)]
    fn walk_ipv6(&self, start: u32, protocol: u8) -> Transport {
        walk_ipv6(self, start, protocol)
    }
}

impl Frame for [u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(offset as usize..)?.first_chunk().copied()
    }

    fn length(&self) -> u32 {
        self.len() as u32
    }
}

/// A UDP datagram to the port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Datagram {
    pub source: Address,
    pub destination: Address,
    /// Where the message begins in the frame.
    pub message: u32,
    /// Bytes of the message by the UDP header's word; 0 where that makes no sense.
    pub length: u32,
    /// Host order.
    pub source_port: u16,
    /// 1: only the first fragment of one.
    pub fragment: u8,
}

const UDP: u8 = 17;
const UDP_HEADER: u32 = 8;
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const VLAN_OUTER: u16 = 0x88a8;
const VLAN_TAG: u32 = 4;

impl Datagram {
    /// Reads a frame with `link_header` bytes of link header into `self`; whether it is UDP to `port`. Later fragments say
    /// nothing about ports: they are not.
    #[inline(always)]
    pub fn find(&mut self, frame: &(impl Frame + ?Sized), link_header: u32, port: u16) -> bool {
        let Some((start, ethertype)) = network(frame, link_header) else { return false };
        let Some(header) = frame.load::<{ IPV4_HEADER as usize }>(start) else { return false };
        match (header[0] >> 4, ethertype) {
            (4, IPV4 | 0) => self.find_ipv4(frame, start, &header, port),
            (6, IPV6 | 0) => self.find_ipv6(frame, start, &header, port),
            _ => false,
        }
    }

    #[inline(always)]
    fn find_ipv4(&mut self, frame: &(impl Frame + ?Sized), start: u32, header: &[u8; 20], port: u16) -> bool {
        const MORE: u16 = 0x2000;
        const OFFSET: u16 = 0x1fff;
        let fragment = be16(header, 6);
        if header[9] != UDP || fragment & OFFSET != 0 {
            return false;
        }
        let length = u32::from(header[0] & 0xf) * 4;
        if length < IPV4_HEADER {
            return false;
        }
        self.source = Address::from_v4([header[12], header[13], header[14], header[15]]);
        self.destination = Address::from_v4([header[16], header[17], header[18], header[19]]);
        self.fragment = u8::from(fragment & MORE != 0);
        self.find_udp(frame, start + length, start + u32::from(be16(header, 2)), port)
    }

    #[inline(always)]
    fn find_ipv6(&mut self, frame: &(impl Frame + ?Sized), start: u32, header: &[u8; 20], port: u16) -> bool {
        // Most packets end here: only their protocol is looked at.
        let direct = header[6] == UDP;
        if !direct && !is_extension(header[6]) {
            return false;
        }
        let Some(rest) = frame.load::<20>(start + 20) else { return false };
        let transport = if direct {
            Transport::new(start + IPV6_HEADER, false)
        } else {
            frame.walk_ipv6(start + IPV6_HEADER, header[6])
        };
        if !transport.is_udp() {
            return false;
        }
        let (source, destination) = ipv6_addresses(header, &rest);
        self.source = source;
        self.destination = destination;
        self.fragment = u8::from(transport.is_fragment());
        self.find_udp(frame, transport.offset(), start + IPV6_HEADER + u32::from(be16(header, 4)), port)
    }

    /// `end`: of the packet, by the IP header's word.
    #[inline(always)]
    fn find_udp(&mut self, frame: &(impl Frame + ?Sized), at: u32, end: u32, port: u16) -> bool {
        let Some(header) = frame.load::<{ UDP_HEADER as usize }>(at) else { return false };
        if be16(&header, 2) != port {
            return false;
        }
        self.source_port = be16(&header, 0);
        self.message = at + UDP_HEADER;
        let length = u32::from(be16(&header, 4));
        // Of a fragmented datagram the rest is elsewhere.
        let inside = self.fragment != 0 || (at + length <= end && end <= frame.length());
        self.length = if length >= UDP_HEADER && inside { length - UDP_HEADER } else { 0 };
        true
    }
}

/// Where the IP header begins, and the EtherType ahead of it; 0: the link has none.
#[inline(always)]
fn network(frame: &(impl Frame + ?Sized), link_header: u32) -> Option<(u32, u16)> {
    if link_header == 0 {
        return Some((0, 0));
    }
    let mut at = ETHERNET;
    let mut ethertype = u16::from_be_bytes(frame.load(at - 2)?);
    // Tags that the device has not taken off.
    for _ in 0..2 {
        if ethertype != VLAN && ethertype != VLAN_OUTER {
            break;
        }
        at += VLAN_TAG;
        ethertype = u16::from_be_bytes(frame.load(at - 2)?);
    }
    Some((at, ethertype))
}

/// Where the UDP header behind IPv6 headers is, in one word, as a function of a program returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport(pub u32);

impl Transport {
    /// There is none.
    pub const NONE: Self = Self(0);
    const UDP: u32 = 1 << 31;
    const FRAGMENT: u32 = 1 << 30;

    #[inline(always)]
    fn new(offset: u32, fragment: bool) -> Self {
        Self(offset & 0xffff | Self::UDP | if fragment { Self::FRAGMENT } else { 0 })
    }

    #[inline(always)]
    fn is_udp(self) -> bool {
        self.0 & Self::UDP != 0
    }

    #[inline(always)]
    fn is_fragment(self) -> bool {
        self.0 & Self::FRAGMENT != 0
    }

    #[inline(always)]
    fn offset(self) -> u32 {
        self.0 & 0xffff
    }
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS | MOBILITY)
}

/// Walks the extension headers from `at` on.
#[inline(always)]
pub fn walk_ipv6(frame: &(impl Frame + ?Sized), at: u32, protocol: u8) -> Transport {
    let (mut at, mut protocol, mut fragment) = (at, protocol, false);
    for _ in 0..=EXTENSION_HEADERS {
        if protocol == UDP {
            return Transport::new(at, fragment);
        }
        if !is_extension(protocol) || at > 0xffff {
            break;
        }
        let Some(header) = frame.load::<4>(at) else { break };
        if protocol == FRAGMENT {
            let place = be16(&header, 2);
            if place & 0xfff8 != 0 {
                break;
            }
            fragment |= place & 1 != 0;
            at += 8;
        } else {
            at += (u32::from(header[1]) + 1) * 8;
        }
        protocol = header[0];
    }
    Transport::NONE
}

#[inline(always)]
fn ipv6_addresses(header: &[u8; 20], rest: &[u8; 20]) -> (Address, Address) {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = [
        header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15], header[16],
        header[17], header[18], header[19],
    ];
    let source = [a, b, c, d, e, f, g, h, i, j, k, l, rest[0], rest[1], rest[2], rest[3]];
    let [a, b, c, d, e, f, g, h] = [rest[4], rest[5], rest[6], rest[7], rest[8], rest[9], rest[10], rest[11]];
    let [i, j, k, l, m, n, o, p] = [rest[12], rest[13], rest[14], rest[15], rest[16], rest[17], rest[18], rest[19]];
    (Address::from_bytes(source), Address::from_bytes([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]))
}

#[inline(always)]
fn be16<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
