//! The parser held against two other readings of the same bytes. Used by the test beside it and by the fuzz target in
//! tests/fuzz; a disagreement panics.
//!
//! The first is [`expected`]: docs/POLICY.md, section 3, in terms of etherparse's headers one by one. It must agree in
//! everything. The second is etherparse's own reading of whole packets, which knows other extension headers and lengths:
//! what one takes and the other refuses must be one of the differences that [`is_known_difference`] lists.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_common::packet::{FIRST_FRAGMENT, LATER_FRAGMENT, Packet, UNFRAGMENTED};
use ebpf_common::reason;
use ebpf_common::table::Address;
use etherparse::{
    IpNumber, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice, Ipv6RawExtHeaderSlice, NetSlice, SlicedPacket,
    TcpHeaderSlice, TransportSlice, UdpHeaderSlice,
};

/// Why a packet is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// Neither 4 nor 6.
    Version,
    /// It ends before a header does, or before it says.
    Truncated,
    /// An IPv4 option runs over the header, or is shorter than itself.
    Option,
    /// An IPv4 option that routes, or a routing header with segments left.
    SourceRoute,
    /// An IPv6 extension header out of place, a second fragment header, or more than six of them.
    Extension,
    /// A fragment of nothing, of half a unit, or beyond the longest datagram.
    Fragment,
    /// The transport header contradicts itself, or is not whole.
    Transport,
    /// Of quotes only: no part of a datagram has its ports, or it is itself an error, or of another family.
    Quote,
}

impl Refusal {
    fn reason(self) -> u8 {
        match self {
            Self::SourceRoute => reason::SOURCE_ROUTE,
            Self::Extension => reason::EXTENSION_HEADER,
            Self::Version | Self::Truncated | Self::Option | Self::Fragment | Self::Transport | Self::Quote => {
                reason::MALFORMED
            }
        }
    }
}

/// Panics where the readings differ.
pub(crate) fn compare(bytes: &[u8]) {
    let mut packet = Packet::default();
    let ours = packet.read(bytes, bytes.len() as u32).map(|()| packet);
    let expected = expected(bytes);
    let same = match (&ours, &expected) {
        (Ok(ours), Ok(expected)) => ours == expected,
        (Err(ours), Err(expected)) => *ours == expected.reason(),
        _ => false,
    };
    assert!(same, "{bytes:02x?}\nparser:   {ours:?}\nexpected: {expected:?}");
    let theirs = SlicedPacket::from_ip(bytes);
    if ours.is_ok() != theirs.is_ok() {
        let known = is_known_difference(bytes, expected.as_ref().err().copied());
        assert!(known, "{bytes:02x?}\nparser:     {ours:?}\netherparse: {theirs:?}");
    }
    if let (Ok(ours), Ok(theirs)) = (ours, theirs) {
        compare_whole(bytes, &ours, &theirs);
        if ours.is_icmp_error() && ours.fragment != LATER_FRAGMENT {
            compare_quotes(bytes, &ours);
        }
    }
}

/// What etherparse's reading of the whole packet says must be what the parser says.
fn compare_whole(bytes: &[u8], ours: &Packet, theirs: &SlicedPacket<'_>) {
    let (source, destination): (IpAddr, IpAddr) = match theirs.net.as_ref() {
        Some(NetSlice::Ipv4(ip)) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        Some(NetSlice::Ipv6(ip)) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        other => panic!("{bytes:02x?}: an IP packet is {other:?}"),
    };
    assert_eq!((ours.source, ours.destination), (source.into(), destination.into()), "{bytes:02x?}");
    if ours.fragment != UNFRAGMENTED || walks_otherwise(bytes) {
        return;
    }
    let ports = (ours.source_port, ours.destination_port);
    match &theirs.transport {
        Some(TransportSlice::Udp(udp)) => {
            assert_eq!((ours.protocol, ports), (17, (udp.source_port(), udp.destination_port())), "{bytes:02x?}");
        }
        Some(TransportSlice::Tcp(tcp)) => {
            assert_eq!((ours.protocol, ports), (6, (tcp.source_port(), tcp.destination_port())), "{bytes:02x?}");
            assert_eq!(ours.is_opening(), tcp.syn() && !tcp.ack(), "{bytes:02x?}");
            assert_eq!(ours.is_reset(), tcp.rst(), "{bytes:02x?}");
            assert_eq!(ours.is_closing(), tcp.fin() || tcp.rst(), "{bytes:02x?}");
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            assert_eq!((ours.protocol, ports.1), (1, icmp.type_u8().into()), "{bytes:02x?}");
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            assert_eq!((ours.protocol, ports.1), (58, icmp.type_u8().into()), "{bytes:02x?}");
        }
        // The policy knows no ports of IGMP.
        Some(TransportSlice::Igmp(_)) | None => assert!(!matches!(ours.protocol, 1 | 6 | 17 | 58), "{bytes:02x?}"),
    }
}

fn compare_quotes(bytes: &[u8], error: &Packet) {
    let mut packet = Packet::default();
    let ours = error.read_quote(bytes, &mut packet).then_some(packet);
    let quote = &bytes[error.transport as usize + 8..error.end as usize];
    let expected = expected_quote(quote, error);
    match (ours, expected) {
        (Some(ours), Ok(expected)) => {
            assert_eq!(ours, expected, "{bytes:02x?}: what it quotes");
        }
        (None, Err(_)) => {}
        (ours, expected) => panic!("{bytes:02x?}: quotes\nparser:   {ours:?}\nexpected: {expected:?}"),
    }
}

/// Every way in which etherparse's reading of a whole packet differs on purpose; `refusal` is the policy's.
fn is_known_difference(bytes: &[u8], refusal: Option<Refusal>) -> bool {
    match refusal {
        // It looks at no options, follows any route, and walks as many headers as there are.
        Some(Refusal::Option | Refusal::SourceRoute | Refusal::Extension) => true,
        // It does not put datagrams together, so it knows no bounds of them.
        Some(Refusal::Fragment) => true,
        // It takes a payload length of 0 for a jumbogram's, and a UDP length of 0 for one's; both are refused here.
        // It reads no transport header of a fragment.
        Some(Refusal::Truncated | Refusal::Transport) => {
            is_ipv6_of_no_length(bytes)
                || has_udp_of_no_length(bytes)
                || is_any_fragment(bytes)
                || walks_otherwise(bytes)
        }
        Some(Refusal::Version | Refusal::Quote) => false,
        // It takes 51 for an extension header and reads on behind it, also in later fragments; 2 (IGMP) and the time
        // stamps of ICMP have lengths that the policy does not care for.
        None => walks_otherwise(bytes) || has_contents_that_it_checks(bytes) || is_any_fragment(bytes),
    }
}

/// Whether there is a header that only one of both walks: 51 is a protocol here, 135 is one there.
fn walks_otherwise(bytes: &[u8]) -> bool {
    headers(bytes).any(|(kind, _)| matches!(kind, 51 | 135))
}

fn is_ipv6_of_no_length(bytes: &[u8]) -> bool {
    Ipv6HeaderSlice::from_slice(bytes).is_ok_and(|header| header.payload_length() == 0)
}

fn has_udp_of_no_length(bytes: &[u8]) -> bool {
    let last = headers(bytes).last();
    last.is_some_and(|(kind, rest)| kind == 17 && rest.get(4..6) == Some(&[0, 0]))
}

fn is_any_fragment(bytes: &[u8]) -> bool {
    match Ipv4HeaderSlice::from_slice(bytes) {
        Ok(header) => header.is_fragmenting_payload(),
        Err(_) => headers(bytes).any(|(kind, _)| kind == 44),
    }
}

fn has_contents_that_it_checks(bytes: &[u8]) -> bool {
    headers(bytes).any(|(kind, rest)| kind == 2 || (kind == 1 && matches!(rest.first(), Some(13 | 14))))
}

/// The numbers of all headers behind the IP header, with what begins there; as far as it goes.
fn headers(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut next = match (Ipv4HeaderSlice::from_slice(bytes), Ipv6HeaderSlice::from_slice(bytes)) {
        (Ok(header), _) => bytes.get(header.slice().len()..).map(|rest| (header.protocol().0, rest, false)),
        (_, Ok(header)) => bytes.get(40..).map(|rest| (header.next_header().0, rest, true)),
        _ => None,
    };
    core::iter::from_fn(move || {
        let (kind, rest, is_v6) = next?;
        let length = rest.get(1).map(|length| match kind {
            44 => 8,
            _ => 8 + 8 * usize::from(*length),
        });
        next = match (is_v6, kind) {
            (true, 0 | 43 | 44 | 60 | 135) => {
                length.and_then(|length| Some((*rest.first()?, rest.get(length..)?, is_v6)))
            }
            _ => None,
        };
        Some((kind, rest))
    })
}

/// Section 3.1, header by header.
fn expected(bytes: &[u8]) -> Result<Packet, Refusal> {
    let mut packet = match bytes.first().map(|first| first >> 4) {
        // The shortest packet of either family has 20 bytes.
        _ if bytes.len() < 20 => return Err(Refusal::Truncated),
        Some(4) => expected_ipv4(bytes)?,
        Some(6) => expected_ipv6(bytes)?,
        _ => return Err(Refusal::Version),
    };
    if packet.fragment != LATER_FRAGMENT {
        expected_transport(&mut packet, bytes)?;
    }
    Ok(packet)
}

fn expected_ipv4(bytes: &[u8]) -> Result<Packet, Refusal> {
    let header = Ipv4HeaderSlice::from_slice(bytes).map_err(|_| Refusal::Truncated)?;
    let (start, end) = (header.slice().len(), usize::from(header.total_len()));
    if end < start || end > bytes.len() {
        return Err(Refusal::Truncated);
    }
    expected_options(header.options())?;
    let mut packet = Packet {
        family: 4,
        protocol: header.protocol().0,
        source: address(header.source_addr()),
        destination: address(header.destination_addr()),
        transport: start as u32,
        end: end as u32,
        ..Packet::default()
    };
    let offset = header.fragments_offset().byte_offset();
    if offset != 0 || header.more_fragments() {
        let (id, more) = (header.identification(), header.more_fragments());
        expected_fragment(&mut packet, id.into(), offset, more)?;
    }
    Ok(packet)
}

/// RFC 791: one byte for 0 and 1, else a length that counts itself. Behind an end of options there are none.
fn expected_options(mut options: &[u8]) -> Result<(), Refusal> {
    while let [kind, rest @ ..] = options {
        options = match (kind, rest) {
            (0, _) => return Ok(()),
            (1, rest) => rest,
            (131 | 137, _) => return Err(Refusal::SourceRoute),
            (_, [length, ..]) if *length >= 2 && usize::from(*length) <= options.len() => {
                &options[usize::from(*length)..]
            }
            _ => return Err(Refusal::Option),
        };
    }
    Ok(())
}

fn expected_ipv6(bytes: &[u8]) -> Result<Packet, Refusal> {
    let header = Ipv6HeaderSlice::from_slice(bytes).map_err(|_| Refusal::Truncated)?;
    let end = 40 + usize::from(header.payload_length());
    if end > bytes.len() {
        return Err(Refusal::Truncated);
    }
    let mut packet = Packet {
        family: 6,
        protocol: header.next_header().0,
        source: address(header.source_addr()),
        destination: address(header.destination_addr()),
        transport: 40,
        end: end as u32,
        ..Packet::default()
    };
    expected_extensions(&mut packet, bytes, false)?;
    Ok(packet)
}

/// The headers that are walked: 0 (first only), 43, 44 (one), 60, 135, six at most.
fn expected_extensions(packet: &mut Packet, bytes: &[u8], quoted: bool) -> Result<(), Refusal> {
    let (mut count, mut fragmented) = (0, false);
    loop {
        let kind = packet.protocol;
        if !matches!(kind, 0 | 43 | 44 | 60 | 135) {
            return Ok(());
        }
        if count == 6 || (kind == 0 && count > 0) || (kind == 44 && fragmented) {
            return Err(Refusal::Extension);
        }
        count += 1;
        let rest = &bytes[packet.transport as usize..packet.end as usize];
        if kind == 44 {
            fragmented = true;
            let header = Ipv6FragmentHeaderSlice::from_slice(rest).map_err(|_| Refusal::Truncated)?;
            packet.protocol = header.next_header().0;
            packet.transport += 8;
            let offset = header.fragment_offset().byte_offset();
            if quoted && offset != 0 {
                return Err(Refusal::Quote);
            }
            if !quoted && header.is_fragmenting_payload() {
                expected_fragment(packet, header.identification(), offset, header.more_fragments())?;
            }
            if offset != 0 {
                return Ok(());
            }
            continue;
        }
        let header = Ipv6RawExtHeaderSlice::from_slice(rest).map_err(|_| Refusal::Truncated)?;
        packet.protocol = header.next_header().0;
        packet.transport += header.slice().len() as u32;
        // Type, then segments left.
        if kind == 43 && header.payload()[1] != 0 {
            return Err(Refusal::SourceRoute);
        }
    }
}

/// Whole units of 8 bytes but in the last, something in each, and nothing beyond 65,535. IPv6 could go further by the length
/// of its headers; nobody sends such.
fn expected_fragment(packet: &mut Packet, id: u32, offset: u16, more: bool) -> Result<(), Refusal> {
    let length = packet.end - packet.transport;
    let offset = u32::from(offset);
    if length == 0 || more && !length.is_multiple_of(8) || packet.transport + offset + length > 65_535 {
        return Err(Refusal::Fragment);
    }
    packet.fragment_id = id;
    packet.fragment = if offset == 0 { FIRST_FRAGMENT } else { LATER_FRAGMENT };
    packet.fragment_edge = if offset == 0 { length } else { offset };
    Ok(())
}

/// The header of TCP, UDP and ICMP is whole.
fn expected_transport(packet: &mut Packet, bytes: &[u8]) -> Result<(), Refusal> {
    let rest = &bytes[packet.transport as usize..packet.end as usize];
    match IpNumber(packet.protocol) {
        IpNumber::TCP => {
            let header = TcpHeaderSlice::from_slice(rest).map_err(|_| Refusal::Transport)?;
            packet.tcp_flags = header.slice()[13];
            (packet.source_port, packet.destination_port) = (header.source_port(), header.destination_port());
        }
        IpNumber::UDP => {
            let header = UdpHeaderSlice::from_slice(rest).map_err(|_| Refusal::Transport)?;
            let length = usize::from(header.length());
            // The length counts what comes in later fragments too.
            if length < 8 || packet.fragment == UNFRAGMENTED && length > rest.len() {
                return Err(Refusal::Transport);
            }
            (packet.source_port, packet.destination_port) = (header.source_port(), header.destination_port());
        }
        IpNumber::ICMP | IpNumber::IPV6_ICMP => {
            if rest.len() < 8 {
                return Err(Refusal::Transport);
            }
            expected_icmp(packet, rest);
        }
        _ => {}
    }
    Ok(())
}

/// The type stands where ports have the destination; echoes have their identifier where ports have the source.
fn expected_icmp(packet: &mut Packet, header: &[u8]) {
    packet.destination_port = header[0].into();
    if matches!((packet.protocol, header[0]), (1, 0 | 8) | (58, 128 | 129)) {
        packet.source_port = u16::from_be_bytes([header[4], header[5]]);
    }
}

/// Section 3.5: a packet of the error's family, as far as it is quoted, with 8 bytes of its transport header.
fn expected_quote(quote: &[u8], error: &Packet) -> Result<Packet, Refusal> {
    let mut quoted = if error.family == 4 {
        let header = Ipv4HeaderSlice::from_slice(quote).map_err(|_| Refusal::Quote)?;
        if header.fragments_offset().value() != 0 {
            return Err(Refusal::Quote);
        }
        Packet {
            protocol: header.protocol().0,
            source: address(header.source_addr()),
            destination: address(header.destination_addr()),
            transport: header.slice().len() as u32,
            ..Packet::default()
        }
    } else {
        let header = Ipv6HeaderSlice::from_slice(quote).map_err(|_| Refusal::Quote)?;
        let mut quoted = Packet {
            protocol: header.next_header().0,
            source: address(header.source_addr()),
            destination: address(header.destination_addr()),
            transport: 40,
            end: quote.len() as u32,
            ..Packet::default()
        };
        expected_extensions(&mut quoted, quote, true)?;
        quoted
    };
    let rest = quote.get(quoted.transport as usize..).filter(|rest| rest.len() >= 8).ok_or(Refusal::Quote)?;
    match quoted.protocol {
        6 | 17 => {
            quoted.source_port = u16::from_be_bytes([rest[0], rest[1]]);
            quoted.destination_port = u16::from_be_bytes([rest[2], rest[3]]);
        }
        1 | 58 => expected_icmp(&mut quoted, rest),
        _ => {}
    }
    let is_error = match (error.family, quoted.protocol) {
        (4, 1) => matches!(quoted.destination_port, 3 | 11 | 12),
        (6, 58) => matches!(quoted.destination_port, 1..=4),
        _ => false,
    };
    if is_error {
        return Err(Refusal::Quote);
    }
    // Where things are is counted from the error's own header.
    quoted.family = error.family;
    quoted.transport += error.transport + 8;
    quoted.end = error.end;
    Ok(quoted)
}

trait AnyAddress: Into<IpAddr> {}
impl AnyAddress for Ipv4Addr {}
impl AnyAddress for Ipv6Addr {}

fn address(address: impl AnyAddress) -> Address {
    match address.into() {
        IpAddr::V4(v4) => Address::from_v4(v4.octets()),
        // Not by way of `IpAddr`, which takes a mapped address for what it maps.
        IpAddr::V6(v6) => Address::from_bytes(v6.octets()),
    }
}
