//! Reads the headers of a packet: the first step of docs/POLICY.md, section 3. Compiled for the kernel and for the host;
//! the version nibble alone decides the family, since nothing else about a packet can be trusted at every hook.

use crate::flow::FlowKey;
use crate::reason;
use crate::table::Address;

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMPV6: u8 = 58;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
/// Extension headers that are walked before a packet is refused.
const MAX_EXTENSION_HEADERS: u32 = 6;

const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
/// An IPv4 header with all the options that its length field can express.
const IPV4_HEADER_MAX: u32 = 60;
const TCP_HEADER: u32 = 20;
const UDP_HEADER: u32 = 8;
/// Of both families: type, code, checksum and 4 bytes that depend on the type.
const ICMP_HEADER: u32 = 8;
/// What an ICMP error must quote after the IP header.
const QUOTED_TRANSPORT: u32 = 8;

const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

/// Where the bytes come from.
pub trait Load {
    /// `N` bytes at `offset` from the IP header; `None` where the packet ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// [`walk_ipv4_options`], which the programs make a function of its own.
    #[inline(always)]
    fn walk_ipv4_options(&self, header_length: u32) -> Result<(), u8> {
        walk_ipv4_options(self, header_length)
    }

    /// [`Packet::walk_headers`], likewise.
    #[inline(always)]
    fn walk_headers(&self, packet: &mut Packet) -> Result<(), u8> {
        packet.walk_headers(self)
    }

    /// [`Packet::walk_quoted_headers`], likewise.
    #[inline(always)]
    fn walk_quoted_headers(&self, quoted: &mut Packet) -> bool {
        quoted.walk_quoted_headers(self)
    }
}

impl Load for [u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(offset as usize..)?.first_chunk().copied()
    }
}

/// In [`Packet::fragment`]: a whole datagram.
pub const UNFRAGMENTED: u8 = 0;
/// In [`Packet::fragment`]: the first of several, which has the transport header.
pub const FIRST_FRAGMENT: u8 = 1;
/// In [`Packet::fragment`]: one without a transport header.
pub const LATER_FRAGMENT: u8 = 2;

/// No datagram is longer: RFC 791, and RFC 8200 without jumbograms.
const DATAGRAM_MAX: u32 = 65_535;

/// What the policy needs to know of a packet. A field that was not reached is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    /// Where the transport header begins, from the IP header on.
    pub transport: u32,
    /// Where the packet ends, by its own word.
    pub end: u32,
    /// Host order. ICMP and ICMPv6: the identifier of an echo, else 0.
    pub source_port: u16,
    /// Host order. ICMP and ICMPv6: the type. Protocols without ports: 0.
    pub destination_port: u16,
    /// Identification of the datagram that this is a fragment of, host order.
    pub fragment_id: u32,
    /// In the fragmentable part of the datagram: of a later fragment where it begins, of a first one where it ends.
    pub fragment_edge: u32,
    /// Protocol number, behind the extension headers. Of a later IPv6 fragment, what its own header claims.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    /// As in the TCP header.
    pub tcp_flags: u8,
    /// One of [`UNFRAGMENTED`], [`FIRST_FRAGMENT`], [`LATER_FRAGMENT`].
    pub fragment: u8,
}

impl Packet {
    /// Reads a packet of `length` bytes from the IP header on into `self`, as far as it goes.
    ///
    /// # Errors
    /// The `reason` for which the packet is to be dropped.
    #[inline(always)]
    pub fn read(&mut self, bytes: &(impl Load + ?Sized), length: u32) -> Result<(), u8> {
        let header: [u8; IPV4_HEADER as usize] = bytes.load(0).ok_or(reason::MALFORMED)?;
        match header[0] >> 4 {
            4 => self.read_ipv4(bytes, &header, length)?,
            6 => self.read_ipv6(bytes, &header, length)?,
            _ => return Err(reason::MALFORMED),
        }
        if self.fragment == LATER_FRAGMENT {
            return Ok(());
        }
        self.read_transport(bytes)
    }

    /// Notes that this is a fragment, whose part of the datagram begins at `offset` and lies from `transport` to `end`.
    #[inline(always)]
    fn set_fragment(&mut self, id: u32, offset: u32, more: bool) -> Result<(), u8> {
        let length = self.end - self.transport;
        // All but the last hold whole units of 8 bytes (RFC 791, 3.2; RFC 8200, 4.5), and none holds nothing.
        if length == 0 || (more && !length.is_multiple_of(8)) || self.transport + offset + length > DATAGRAM_MAX {
            return Err(reason::MALFORMED);
        }
        self.fragment_id = id;
        if offset == 0 {
            (self.fragment, self.fragment_edge) = (FIRST_FRAGMENT, length);
        } else {
            (self.fragment, self.fragment_edge) = (LATER_FRAGMENT, offset);
        }
        Ok(())
    }

    #[inline(always)]
    fn read_ipv4(&mut self, bytes: &(impl Load + ?Sized), header: &[u8; 20], length: u32) -> Result<(), u8> {
        self.family = 4;
        self.protocol = header[9];
        self.source = Address::from_v4([header[12], header[13], header[14], header[15]]);
        self.destination = Address::from_v4([header[16], header[17], header[18], header[19]]);
        self.transport = ipv4_header_length(header);
        self.end = u32::from(be16(header, 2));
        if self.transport < IPV4_HEADER || self.end < self.transport || self.end > length {
            return Err(reason::MALFORMED);
        }
        if self.transport > IPV4_HEADER {
            bytes.walk_ipv4_options(self.transport)?;
        }
        let fragment = be16(header, 6);
        let (more, offset) = (fragment & 0x2000 != 0, u32::from(fragment & 0x1fff) * 8);
        if more || offset != 0 {
            self.set_fragment(u32::from(be16(header, 4)), offset, more)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn read_ipv6(&mut self, bytes: &(impl Load + ?Sized), header: &[u8; 20], length: u32) -> Result<(), u8> {
        let rest: [u8; 20] = bytes.load(20).ok_or(reason::MALFORMED)?;
        let [source, destination] = ipv6_addresses(header, &rest);
        self.family = 6;
        self.protocol = header[6];
        self.source = source;
        self.destination = destination;
        self.transport = IPV6_HEADER;
        self.end = IPV6_HEADER + u32::from(be16(header, 4));
        if self.end > length {
            return Err(reason::MALFORMED);
        }
        if is_extension_header(self.protocol) { bytes.walk_headers(self) } else { Ok(()) }
    }

    /// From the IPv6 header to the transport header.
    ///
    /// # Errors
    /// The `reason` for which the packet is to be dropped.
    #[inline(always)]
    pub fn walk_headers(&mut self, bytes: &(impl Load + ?Sized)) -> Result<(), u8> {
        self.walk_extension_headers::<false>(bytes)
    }

    /// `QUOTED`: what there is of a packet, which may be cut anywhere.
    #[inline(always)]
    fn walk_extension_headers<const QUOTED: bool>(&mut self, bytes: &(impl Load + ?Sized)) -> Result<(), u8> {
        let mut cut = false;
        for walked in 0..=MAX_EXTENSION_HEADERS {
            match self.protocol {
                HOP_BY_HOP if walked > 0 => return Err(reason::EXTENSION_HEADER),
                FRAGMENT if cut => return Err(reason::EXTENSION_HEADER),
                kind if is_extension_header(kind) => {}
                _ => return Ok(()),
            }
            if walked == MAX_EXTENSION_HEADERS {
                return Err(reason::EXTENSION_HEADER);
            }
            // The shortest extension header is 8 bytes.
            if self.transport + 8 > self.end {
                return Err(reason::MALFORMED);
            }
            let header: [u8; 8] = bytes.load(self.transport).ok_or(reason::MALFORMED)?;
            let [next, length, _, segments_left, a, b, c, d] = header;
            let kind = self.protocol;
            self.protocol = next;
            if kind == FRAGMENT {
                self.transport += 8;
                cut = true;
                let (offset, more) = (u32::from(be16(&header, 2) & 0xfff8), segments_left & 1 != 0);
                // One that is all of its datagram (RFC 6946) is read as if it had no such header.
                if QUOTED && offset != 0 {
                    return Err(reason::FRAGMENT);
                }
                if !QUOTED && (offset != 0 || more) {
                    self.set_fragment(u32::from_be_bytes([a, b, c, d]), offset, more)?;
                }
                if offset != 0 {
                    return Ok(());
                }
                continue;
            }
            self.transport += 8 + 8 * u32::from(length);
            if self.transport > self.end {
                return Err(reason::MALFORMED);
            }
            if kind == ROUTING && segments_left != 0 {
                return Err(reason::SOURCE_ROUTE);
            }
        }
        Err(reason::EXTENSION_HEADER)
    }

    /// From the IPv6 header of a quoted packet to its transport header; `false` where it is not told.
    #[inline(always)]
    pub fn walk_quoted_headers(&mut self, bytes: &(impl Load + ?Sized)) -> bool {
        self.walk_extension_headers::<true>(bytes).is_ok()
    }

    #[inline(always)]
    fn read_transport(&mut self, bytes: &(impl Load + ?Sized)) -> Result<(), u8> {
        let room = self.end - self.transport;
        match self.protocol {
            TCP => {
                let header: [u8; 14] = self.transport_header(bytes, TCP_HEADER)?;
                let header_length = u32::from(header[12] >> 4) * 4;
                if header_length < TCP_HEADER || header_length > room {
                    return Err(reason::MALFORMED);
                }
                self.source_port = be16(&header, 0);
                self.destination_port = be16(&header, 2);
                self.tcp_flags = header[13];
            }
            UDP => {
                let header: [u8; 8] = self.transport_header(bytes, UDP_HEADER)?;
                let length = u32::from(be16(&header, 4));
                // A first fragment holds a part of what the length counts.
                if length < UDP_HEADER || (length > room && self.fragment == UNFRAGMENTED) {
                    return Err(reason::MALFORMED);
                }
                self.source_port = be16(&header, 0);
                self.destination_port = be16(&header, 2);
            }
            ICMP | ICMPV6 => {
                let header = self.transport_header(bytes, ICMP_HEADER)?;
                self.set_icmp(&header);
            }
            _ => {}
        }
        Ok(())
    }

    /// The first bytes of a transport header, of which `whole` bytes must be there.
    #[inline(always)]
    fn transport_header<const N: usize>(&self, bytes: &(impl Load + ?Sized), whole: u32) -> Result<[u8; N], u8> {
        if self.transport + whole > self.end {
            return Err(reason::MALFORMED);
        }
        bytes.load(self.transport).ok_or(reason::MALFORMED)
    }

    #[inline(always)]
    fn set_icmp(&mut self, header: &[u8; 8]) {
        self.destination_port = u16::from(header[0]);
        if self.is_echo_request() || self.is_echo_reply() {
            self.source_port = be16(header, 4);
        }
    }

    /// Reads the packet that the ICMP error `self` quotes into `quoted`. `false`: it quotes too little, another family,
    /// a later fragment, extension headers that would be refused, or an ICMP error: nothing that a flow could be known by.
    #[inline(always)]
    pub fn read_quote(&self, bytes: &(impl Load + ?Sized), quoted: &mut Self) -> bool {
        let start = self.transport + ICMP_HEADER;
        let Some(header) = bytes.load::<{ IPV4_HEADER as usize }>(start) else { return false };
        if header[0] >> 4 != self.family {
            return false;
        }
        quoted.family = self.family;
        // A quote is cut: it ends where the error does, whatever the quoted packet says of its length.
        quoted.end = self.end;
        if self.family == 4 {
            quoted.protocol = header[9];
            quoted.source = Address::from_v4([header[12], header[13], header[14], header[15]]);
            quoted.destination = Address::from_v4([header[16], header[17], header[18], header[19]]);
            if be16(&header, 6) & 0x1fff != 0 || ipv4_header_length(&header) < IPV4_HEADER {
                return false;
            }
            quoted.transport = start + ipv4_header_length(&header);
        } else {
            let Some(rest) = bytes.load::<20>(start + 20) else { return false };
            quoted.protocol = header[6];
            [quoted.source, quoted.destination] = ipv6_addresses(&header, &rest);
            quoted.transport = start + IPV6_HEADER;
            if is_extension_header(quoted.protocol) && !bytes.walk_quoted_headers(quoted) {
                return false;
            }
        }
        if quoted.transport + QUOTED_TRANSPORT > self.end {
            return false;
        }
        let Some(transport) = bytes.load(quoted.transport) else { return false };
        match quoted.protocol {
            TCP | UDP => {
                quoted.source_port = be16(&transport, 0);
                quoted.destination_port = be16(&transport, 2);
            }
            ICMP | ICMPV6 => quoted.set_icmp(&transport),
            _ => {}
        }
        !quoted.is_icmp_error()
    }

    /// An ICMP message about another packet.
    #[inline(always)]
    pub fn is_icmp_error(&self) -> bool {
        match (self.family, self.protocol) {
            (4, ICMP) => matches!(self.destination_port, 3 | 11 | 12),
            (6, ICMPV6) => matches!(self.destination_port, 1..=4),
            _ => false,
        }
    }

    #[inline(always)]
    fn is_echo_request(&self) -> bool {
        matches!((self.protocol, self.destination_port), (ICMP, 8) | (ICMPV6, 128))
    }

    #[inline(always)]
    fn is_echo_reply(&self) -> bool {
        matches!((self.protocol, self.destination_port), (ICMP, 0) | (ICMPV6, 129))
    }

    #[inline(always)]
    fn is_icmp(&self) -> bool {
        matches!(self.protocol, ICMP | ICMPV6)
    }

    /// A TCP SYN without ACK: opens a connection, and is never a reply.
    #[inline(always)]
    pub fn is_opening(&self) -> bool {
        self.protocol == TCP && self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// A TCP RST, which opens nothing.
    #[inline(always)]
    pub fn is_reset(&self) -> bool {
        self.protocol == TCP && self.tcp_flags & TCP_RST != 0
    }

    /// A TCP FIN or RST.
    #[inline(always)]
    pub fn is_closing(&self) -> bool {
        self.protocol == TCP && self.tcp_flags & (TCP_FIN | TCP_RST) != 0
    }

    /// A TCP segment that begins or ends a connection.
    #[inline(always)]
    pub fn is_handshake(&self) -> bool {
        self.protocol == TCP && self.tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST) != 0
    }

    /// Whether a record of which this is the opener's packet can exist.
    #[inline(always)]
    pub fn can_open(&self) -> bool {
        !self.is_icmp() || self.is_echo_request()
    }

    /// Whether this can be the reverse of a recorded flow.
    #[inline(always)]
    pub fn can_reply(&self) -> bool {
        if self.is_icmp() { self.is_echo_reply() } else { !self.is_opening() }
    }

    /// The record of the flow that this packet is an opener's packet of.
    #[inline(always)]
    pub fn key(&self) -> FlowKey {
        FlowKey {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port,
            destination_port: if self.is_icmp() { 0 } else { self.destination_port },
            protocol: self.protocol,
            _pad: [0; 3],
        }
    }

    /// The record of the flow that this packet is the reverse of.
    #[inline(always)]
    pub fn reply_key(&self) -> FlowKey {
        let (source_port, destination_port) =
            if self.is_icmp() { (self.source_port, 0) } else { (self.destination_port, self.source_port) };
        FlowKey {
            source: self.destination,
            destination: self.source,
            source_port,
            destination_port,
            protocol: self.protocol,
            _pad: [0; 3],
        }
    }

    /// The destination port or ICMP type that the opener used, if this packet is the reverse of its flow.
    #[inline(always)]
    pub fn reply_service(&self) -> u16 {
        match self.protocol {
            ICMP => 8,
            ICMPV6 => 128,
            _ => self.source_port,
        }
    }

    /// Whether an end is an address that is never routed: section 3.2.
    #[inline(always)]
    pub fn is_out_of_scope(&self) -> bool {
        is_out_of_scope(self.source, self.family) || is_out_of_scope(self.destination, self.family)
    }
}

/// The highest destination port or ICMP type of a protocol's flows; those without either have 0.
pub const fn highest_port(protocol: u8) -> u16 {
    match protocol {
        TCP | UDP => u16::MAX,
        ICMP | ICMPV6 => 0xff,
        _ => 0,
    }
}

/// What is walked on the way to the transport header.
#[inline(always)]
const fn is_extension_header(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS | MOBILITY)
}

/// Link-local, multicast, broadcast, loopback or unspecified.
#[inline(always)]
fn is_out_of_scope(address: Address, family: u8) -> bool {
    if family == 4 {
        let (a, b) = (address.octet(12), address.octet(13));
        let rest = (address.octet(14), address.octet(15));
        return matches!((a, b), (127, _) | (224..=239, _) | (169, 254))
            || matches!((a, b, rest), (0, 0, (0, 0)) | (255, 255, (255, 255)));
    }
    let (a, b) = (address.octet(0), address.octet(1));
    let unspecified_or_loopback = address.0[0] == 0 && u64::from_be(address.0[1]) <= 1;
    a == 0xff || (a == 0xfe && b & 0xc0 == 0x80) || unspecified_or_loopback
}

/// Refuses source routes (RFC 791: loose is 131, strict 137) and options that run over the header.
///
/// # Errors
/// The `reason` for which the packet is to be dropped.
#[inline(always)]
pub fn walk_ipv4_options(bytes: &(impl Load + ?Sized), header_length: u32) -> Result<(), u8> {
    let mut offset = IPV4_HEADER;
    for _ in IPV4_HEADER..IPV4_HEADER_MAX {
        if offset >= header_length {
            return Ok(());
        }
        let [kind] = bytes.load(offset).ok_or(reason::MALFORMED)?;
        match kind {
            0 => return Ok(()),
            1 => offset += 1,
            131 | 137 => return Err(reason::SOURCE_ROUTE),
            _ => {
                if offset + 2 > header_length {
                    return Err(reason::MALFORMED);
                }
                let [length] = bytes.load(offset + 1).ok_or(reason::MALFORMED)?;
                let length = u32::from(length);
                if length < 2 || offset + length > header_length {
                    return Err(reason::MALFORMED);
                }
                offset += length;
            }
        }
    }
    Ok(())
}

/// In bytes; may be less than [`IPV4_HEADER`].
#[inline(always)]
fn ipv4_header_length(header: &[u8; 20]) -> u32 {
    u32::from(header[0] & 0xf) * 4
}

/// From the two halves of an IPv6 header.
#[inline(always)]
fn ipv6_addresses(first: &[u8; 20], rest: &[u8; 20]) -> [Address; 2] {
    let [.., a, b, c, d, e, f, g, h, i, j, k, l] = *first;
    let [m, n, o, p, destination @ ..] = *rest;
    [Address::from_bytes([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]), Address::from_bytes(destination)]
}

#[inline(always)]
fn be16<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
