//! The parser against packets that etherparse builds, and against etherparse on whatever bytes.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_common::packet::{FIRST_FRAGMENT, LATER_FRAGMENT, Packet, UNFRAGMENTED};
use ebpf_common::reason::{EXTENSION_HEADER, MALFORMED, SOURCE_ROUTE};
use ebpf_common::table::Address;
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

const V4: [[u8; 4]; 2] = [[10, 42, 1, 2], [10, 42, 2, 2]];
const V6: [[u8; 16]; 2] =
    [[0xfd, 0x42, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2], [0xfd, 0x42, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2]];

fn read(bytes: &[u8]) -> Result<Packet, u8> {
    let mut packet = Packet::default();
    packet.read(bytes, bytes.len() as u32).map(|()| packet)
}

fn udp_v4() -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(V4[0], V4[1], 64).udp(1000, 53).write(&mut bytes, b"question").unwrap();
    bytes
}

fn udp_v6() -> Vec<u8> {
    let mut bytes = Vec::new();
    PacketBuilder::ipv6(V6[0], V6[1], 64).udp(1000, 53).write(&mut bytes, b"question").unwrap();
    bytes
}

/// A UDP packet over IPv4 with these options, whose length is a multiple of 4.
fn with_options(options: &[u8]) -> Vec<u8> {
    let mut bytes = udp_v4();
    bytes[0] = 0x45 + options.len() as u8 / 4;
    let length = (bytes.len() + options.len()) as u16;
    bytes[2..4].copy_from_slice(&length.to_be_bytes());
    bytes.splice(20..20, options.iter().copied());
    bytes
}

/// A UDP packet over IPv6 behind these extension headers, whose first byte is replaced by what follows.
fn with_extensions(headers: &[(u8, [u8; 8])]) -> Vec<u8> {
    let mut bytes = udp_v6();
    let mut chain = Vec::new();
    for (i, (_, header)) in headers.iter().enumerate() {
        chain.push(headers.get(i + 1).map_or(17, |(next, _)| *next));
        chain.extend(&header[1..]);
    }
    bytes[6] = headers[0].0;
    let length = (bytes.len() - 40 + chain.len()) as u16;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    bytes.splice(40..40, chain);
    bytes
}

#[test]
fn reads_both_families() {
    let packet = read(&udp_v4()).unwrap();
    assert_eq!((packet.family, packet.protocol), (4, 17));
    assert_eq!(packet.source, Address::from_v4(V4[0]));
    assert_eq!((packet.source_port, packet.destination_port), (1000, 53));
    let packet = read(&udp_v6()).unwrap();
    assert_eq!((packet.family, packet.protocol), (6, 17));
    assert_eq!(packet.destination, Address::from_bytes(V6[1]));
    assert_eq!((packet.transport, packet.end), (40, 56));
}

#[test]
fn tcp_flags_tell_who_opens() {
    let check = |flags: u8, opening: bool, reset: bool| {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4(V4[0], V4[1], 64).tcp(1, 2, 0, 0).write(&mut bytes, &[]).unwrap();
        bytes[33] = flags;
        let packet = read(&bytes).unwrap();
        assert_eq!((packet.is_opening(), packet.is_reset()), (opening, reset), "{flags:#x}");
        assert_eq!(packet.can_reply(), !opening, "{flags:#x}");
    };
    check(0x02, true, false);
    check(0x12, false, false);
    check(0x10, false, false);
    check(0x14, false, true);
    check(0xc2, true, false);
}

#[test]
fn every_shorter_packet_is_malformed() {
    let mut tcp = Vec::new();
    PacketBuilder::ipv6(V6[0], V6[1], 64).tcp(1, 2, 0, 0).write(&mut tcp, &[]).unwrap();
    let mut ping = Vec::new();
    PacketBuilder::ipv4(V4[0], V4[1], 64).icmpv4_echo_request(7, 1).write(&mut ping, &[]).unwrap();
    for whole in [udp_v4(), udp_v6(), tcp, ping, with_options(&[1; 8]), with_extensions(&[(0, [0; 8])])] {
        assert!(read(&whole).is_ok());
        for length in 0..whole.len() {
            assert_eq!(read(&whole[..length]), Err(MALFORMED), "{length} of {}", whole.len());
        }
    }
}

#[test]
fn a_header_that_its_own_length_cuts_is_malformed() {
    // The bytes are there, but not by the packet's own word.
    let mut bytes = udp_v4();
    bytes[3] = 27;
    assert_eq!(read(&bytes), Err(MALFORMED));
    let mut bytes = udp_v6();
    bytes[5] = 7;
    assert_eq!(read(&bytes), Err(MALFORMED));
    let mut bytes = udp_v4();
    bytes[25] = 7;
    assert_eq!(read(&bytes), Err(MALFORMED), "UDP length");
    let mut bytes = Vec::new();
    PacketBuilder::ipv4(V4[0], V4[1], 64).tcp(1, 2, 0, 0).write(&mut bytes, &[]).unwrap();
    for offset in [4, 6] {
        bytes[32] = offset << 4;
        assert_eq!(read(&bytes), Err(MALFORMED), "TCP data offset");
    }
}

#[test]
fn bytes_behind_the_packet_are_nobodys() {
    let mut bytes = udp_v4();
    let packet = read(&bytes).unwrap();
    bytes.extend([0; 12]);
    assert_eq!(read(&bytes), Ok(packet));
}

#[test]
fn ipv4_options() {
    let check = |options: &[u8], expected: Option<u8>| {
        assert_eq!(read(&with_options(options)).err(), expected, "{options:?}");
    };
    check(&[1, 1, 1, 1], None);
    check(&[0, 131, 1, 1], None); // behind the end of the list
    check(&[148, 4, 0, 0], None);
    check(&[1; 40], None);
    check(&[131, 7, 4, 1, 2, 3, 4, 0], Some(SOURCE_ROUTE));
    check(&[1, 1, 1, 137], Some(SOURCE_ROUTE));
    check(&[7, 4, 0, 0, 137, 3, 4, 0], Some(SOURCE_ROUTE));
    check(&[148, 5, 0, 0], Some(MALFORMED));
    check(&[148, 1, 0, 0], Some(MALFORMED));
    check(&[1, 1, 1, 148], Some(MALFORMED));
}

#[test]
fn ipv6_extension_headers() {
    let check = |headers: &[(u8, [u8; 8])], expected: Option<u8>| {
        assert_eq!(read(&with_extensions(headers)).err(), expected, "{headers:?}");
    };
    let plain = [0; 8];
    check(&[(0, plain), (60, plain), (43, plain), (135, plain), (60, plain), (60, plain)], None);
    check(&[(60, plain); 7], Some(EXTENSION_HEADER));
    check(&[(60, plain), (0, plain)], Some(EXTENSION_HEADER));
    check(&[(43, [0, 0, 0, 1, 0, 0, 0, 0])], Some(SOURCE_ROUTE));
    check(&[(60, [0, 4, 0, 0, 0, 0, 0, 0])], Some(MALFORMED));
    let packet = read(&with_extensions(&[(0, plain), (60, plain)])).unwrap();
    assert_eq!((packet.protocol, packet.transport, packet.destination_port), (17, 56, 53));
}

/// A UDP packet over IPv4 of 16 bytes behind its header, with these two bytes for flags and offset.
fn ipv4_fragment(flags: u8, offset: u8) -> Result<Packet, u8> {
    let mut bytes = udp_v4();
    bytes[4..8].copy_from_slice(&[0x12, 0x34, flags, offset]);
    read(&bytes)
}

#[test]
fn ipv4_fragments_say_what_they_are_of() {
    let whole = ipv4_fragment(0x40, 0).unwrap();
    assert_eq!((whole.fragment, whole.fragment_id, whole.destination_port), (UNFRAGMENTED, 0, 53), "don't fragment");
    let first = ipv4_fragment(0x20, 0).unwrap();
    assert_eq!((first.fragment, first.fragment_id, first.fragment_edge), (FIRST_FRAGMENT, 0x1234, 16));
    assert_eq!((first.source_port, first.destination_port), (1000, 53));
    for (flags, offset, edge) in [(0, 1, 8), (0x20, 2, 16), (0x1f, 0xf0, 65_408)] {
        let later = ipv4_fragment(flags, offset).unwrap();
        assert_eq!((later.fragment, later.fragment_id, later.fragment_edge), (LATER_FRAGMENT, 0x1234, edge));
        assert_eq!((later.protocol, later.source_port, later.destination_port), (17, 0, 0));
    }
    assert_eq!(ipv4_fragment(0x1f, 0xff), Err(MALFORMED), "a datagram of more than 65,535 bytes");
}

#[test]
fn fragments_hold_whole_units_and_a_whole_transport_header() {
    let cut = |length: usize, flags: u8, offset: u8| {
        let mut bytes = udp_v4();
        bytes.truncate(20 + length);
        bytes[2..4].copy_from_slice(&(20 + length as u16).to_be_bytes());
        (bytes[6], bytes[7]) = (flags, offset);
        read(&bytes).map(|packet| packet.fragment)
    };
    assert_eq!(cut(8, 0x20, 0), Ok(FIRST_FRAGMENT), "a header and no payload");
    assert_eq!(cut(0, 0x20, 0), Err(MALFORMED));
    assert_eq!(cut(12, 0x20, 0), Err(MALFORMED), "more follow, and 12 is no multiple of 8");
    assert_eq!(cut(12, 0x20, 1), Err(MALFORMED));
    assert_eq!(cut(12, 0, 1), Ok(LATER_FRAGMENT), "the last one may end anywhere");
    assert_eq!(cut(0, 0, 1), Err(MALFORMED), "nothing in it");
    let tcp = |options: u8, length: usize| {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4(V4[0], V4[1], 64).tcp(1, 2, 0, 0).write(&mut bytes, &[0; 40]).unwrap();
        bytes.truncate(20 + length);
        bytes[2..4].copy_from_slice(&(20 + length as u16).to_be_bytes());
        bytes[6] = 0x20;
        bytes[32] = (5 + options) << 4;
        read(&bytes).map(|packet| packet.fragment)
    };
    assert_eq!(tcp(0, 16), Err(MALFORMED), "16 bytes of a TCP header");
    assert_eq!(tcp(0, 24), Ok(FIRST_FRAGMENT));
    assert_eq!(tcp(1, 24), Ok(FIRST_FRAGMENT), "an option that ends with the fragment");
    assert_eq!(tcp(2, 24), Err(MALFORMED), "an option that goes on in the next one");
}

#[test]
fn ipv6_fragments_say_what_they_are_of() {
    let header = |offset: u16, more: bool| {
        let [high, low] = ((offset & 0xfff8) | u16::from(more)).to_be_bytes();
        [0, 0, high, low, 0xde, 0xad, 0xbe, 0xef]
    };
    let plain = [0; 8];
    let check = |headers: &[(u8, [u8; 8])]| read(&with_extensions(headers));
    let atomic = check(&[(44, header(0, false))]).unwrap();
    assert_eq!((atomic.fragment, atomic.fragment_id, atomic.destination_port), (UNFRAGMENTED, 0, 53), "RFC 6946");
    let first = check(&[(60, plain), (44, header(0, true))]).unwrap();
    assert_eq!((first.fragment, first.fragment_id, first.fragment_edge), (FIRST_FRAGMENT, 0xdead_beef, 16));
    assert_eq!(first.destination_port, 53);
    let first = check(&[(44, header(0, true)), (60, plain)]).unwrap();
    assert_eq!((first.fragment, first.fragment_edge, first.destination_port), (FIRST_FRAGMENT, 24, 53));
    let later = check(&[(44, header(1_280, true)), (60, plain)]).unwrap();
    assert_eq!((later.fragment, later.fragment_edge, later.destination_port), (LATER_FRAGMENT, 1_280, 0));
    assert_eq!(check(&[(44, header(0xfff8, false))]), Err(MALFORMED), "a datagram of more than 65,535 bytes");
    assert_eq!(check(&[(44, header(0, true)), (44, header(0, true))]), Err(EXTENSION_HEADER), "a fragment of one");
    assert_eq!(check(&[(44, header(0, false)), (44, header(0, true))]), Err(EXTENSION_HEADER));
}

#[test]
fn replies_have_the_key_of_what_they_answer() {
    let mut answer = Vec::new();
    PacketBuilder::ipv4(V4[1], V4[0], 64).udp(53, 1000).write(&mut answer, &[]).unwrap();
    let (question, answer) = (read(&udp_v4()).unwrap(), read(&answer).unwrap());
    assert_eq!(question.key(), answer.reply_key());
    assert_eq!(answer.reply_service(), 53);

    let echo = |request: bool, id: u16| {
        let mut bytes = Vec::new();
        let (builder, ends) = (PacketBuilder::ipv6, if request { V6 } else { [V6[1], V6[0]] });
        let builder = builder(ends[0], ends[1], 64);
        let builder = if request { builder.icmpv6_echo_request(id, 1) } else { builder.icmpv6_echo_reply(id, 1) };
        builder.write(&mut bytes, &[]).unwrap();
        read(&bytes).unwrap()
    };
    assert_eq!(echo(true, 7).key(), echo(false, 7).reply_key());
    assert_ne!(echo(true, 7).key(), echo(false, 8).reply_key());
    assert_eq!(echo(false, 7).reply_service(), 128);
    assert!(echo(true, 7).can_open() && !echo(true, 7).can_reply());
    assert!(!echo(false, 7).can_open() && echo(false, 7).can_reply());
}

#[test]
fn errors_quote() {
    let error = |quote: &[u8]| {
        let mut bytes = Vec::new();
        let unreachable =
            etherparse::Icmpv4Type::DestinationUnreachable(etherparse::icmpv4::DestUnreachableHeader::Port);
        PacketBuilder::ipv4(V4[1], V4[0], 64).icmpv4(unreachable).write(&mut bytes, quote).unwrap();
        bytes
    };
    let quote = |bytes: &[u8]| {
        let outer = read(bytes).unwrap();
        assert!(outer.is_icmp_error());
        let mut quoted = Packet::default();
        outer.read_quote(bytes, &mut quoted).then_some(quoted)
    };
    let quoted = quote(&error(&udp_v4()[..28])).unwrap();
    assert_eq!(quoted.key(), read(&udp_v4()).unwrap().key());
    assert_eq!(quote(&error(&with_options(&[1; 8])[..36])).unwrap().key(), quoted.key());
    assert_eq!(quote(&error(&udp_v4()[..27])), None, "too little");
    assert_eq!(quote(&error(&udp_v6())), None, "another family");
    assert_eq!(quote(&error(&error(&udp_v4()))), None, "an error");
    let mut later = udp_v4();
    later[7] = 1;
    assert_eq!(quote(&error(&later)), None, "a later fragment");
}

#[test]
fn errors_quote_behind_extension_headers() {
    let quote = |headers: &[(u8, [u8; 8])], cut: usize| {
        let inner = with_extensions(headers);
        let mut bytes = Vec::new();
        let unreachable = etherparse::Icmpv6Type::DestinationUnreachable(etherparse::icmpv6::DestUnreachableCode::Port);
        let quoted = &inner[..inner.len() - cut];
        PacketBuilder::ipv6(V6[1], V6[0], 64).icmpv6(unreachable).write(&mut bytes, quoted).unwrap();
        let outer = read(&bytes).unwrap();
        let mut quoted = Packet::default();
        outer.read_quote(&*bytes, &mut quoted).then(|| quoted.key())
    };
    let (plain, first, later) = ([0; 8], [0, 0, 0, 1, 0, 0, 0, 7], [0, 0, 5, 0, 0, 0, 0, 7]);
    let key = read(&udp_v6()).unwrap().key();
    assert_eq!(quote(&[(0, plain), (60, plain)], 0), Some(key));
    assert_eq!(quote(&[(60, plain)], 8), Some(key), "8 bytes of transport");
    assert_eq!(quote(&[(60, plain)], 9), None, "7 bytes of transport");
    assert_eq!(quote(&[(44, first)], 5), Some(key), "a first fragment, cut anywhere");
    assert_eq!(quote(&[(44, later)], 0), None, "a later fragment");
    assert_eq!(quote(&[(60, plain), (0, plain)], 0), None, "hop-by-hop in the wrong place");
    assert_eq!(quote(&[(60, plain); 7], 0), None, "too many");
}

#[test]
fn scope() {
    let check = |address: &str, expected: bool| {
        let address: IpAddr = address.parse().unwrap();
        let family = if address.is_ipv4() { 4 } else { 6 };
        let ordinary = if address.is_ipv4() { Address::from_v4(V4[0]) } else { Address::from_bytes(V6[0]) };
        for (source, destination) in [(address.into(), ordinary), (ordinary, address.into())] {
            let packet = Packet { source, destination, family, ..Packet::default() };
            assert_eq!(packet.is_out_of_scope(), expected, "{address}");
        }
    };
    for address in ["0.0.0.0", "127.0.0.1", "127.255.255.255", "169.254.0.1", "224.0.0.1", "239.255.255.255"] {
        check(address, true);
    }
    for address in ["255.255.255.255", "::", "::1", "fe80::1", "febf::1", "ff02::1", "ff0e::1"] {
        check(address, true);
    }
    for address in
        ["0.0.0.1", "10.0.0.0", "126.1.1.1", "169.253.1.1", "223.255.255.255", "240.0.0.1", "255.255.255.254"]
    {
        check(address, false);
    }
    for address in ["::2", "fd00::1", "fec0::1", "2001:db8::1", "fe7f::1", "1::", "0:0:0:1::"] {
        check(address, false);
    }
}

proptest! {
    /// Random bytes, half of them with a plausible beginning: no panic, and what is read is what etherparse reads.
    #[test]
    fn agrees_with_etherparse(
        mut bytes in prop::collection::vec(any::<u8>(), 0..160),
        first in prop::sample::select(vec![0x45, 0x46, 0x4f, 0x60, 0x00, 0x44]),
        protocol in prop::sample::select(vec![1_u8, 6, 17, 58, 47, 0, 43, 44, 60, 51]),
    ) {
        let length = bytes.len();
        if length >= 40 {
            bytes[0] = first;
            let v4 = first >> 4 == 4;
            bytes[if v4 { 9 } else { 6 }] = protocol;
            let field = if v4 { (2, length) } else { (4, length - 40) };
            bytes[field.0..field.0 + 2].copy_from_slice(&(field.1 as u16).to_be_bytes());
            if v4 {
                (bytes[6], bytes[7]) = (0, 0);
            }
        }
        if let Ok(packet) = read(&bytes) && packet.fragment == UNFRAGMENTED {
            let theirs = SlicedPacket::from_ip(&bytes);
            // It checks the contents of some headers that the policy does not care for.
            if let Ok(theirs) = theirs {
                let (source, destination, protocol): (IpAddr, IpAddr, u8) = match theirs.net.as_ref().unwrap() {
                    NetSlice::Ipv4(ip) => (
                        Ipv4Addr::from(ip.header().source()).into(),
                        Ipv4Addr::from(ip.header().destination()).into(),
                        ip.header().protocol().0,
                    ),
                    NetSlice::Ipv6(ip) => (
                        Ipv6Addr::from(ip.header().source()).into(),
                        Ipv6Addr::from(ip.header().destination()).into(),
                        if packet.transport == 40 { ip.header().next_header().0 } else { packet.protocol },
                    ),
                    NetSlice::Arp(_) => unreachable!("from_ip"),
                };
                prop_assert_eq!(packet.source, Address::from(source));
                prop_assert_eq!(packet.destination, Address::from(destination));
                prop_assert_eq!(packet.protocol, protocol);
                match theirs.transport {
                    Some(TransportSlice::Udp(udp)) => {
                        prop_assert_eq!(packet.source_port, udp.source_port());
                        prop_assert_eq!(packet.destination_port, udp.destination_port());
                    }
                    Some(TransportSlice::Tcp(tcp)) => {
                        prop_assert_eq!(packet.source_port, tcp.source_port());
                        prop_assert_eq!(packet.destination_port, tcp.destination_port());
                        prop_assert_eq!(packet.is_opening(), tcp.syn() && !tcp.ack());
                        prop_assert_eq!(packet.is_closing(), tcp.fin() || tcp.rst());
                    }
                    Some(TransportSlice::Icmpv4(icmp)) => {
                        prop_assert_eq!(packet.destination_port, u16::from(icmp.type_u8()));
                    }
                    Some(TransportSlice::Icmpv6(icmp)) => {
                        prop_assert_eq!(packet.destination_port, u16::from(icmp.type_u8()));
                    }
                    Some(TransportSlice::Igmp(_)) | None => {}
                }
            }
            prop_assert!(packet.transport <= packet.end && packet.end <= length as u32);
        }
    }

    /// An error about random bytes is read without a panic, and never as an error about an error.
    #[test]
    fn quotes_of_anything(mut bytes in prop::collection::vec(any::<u8>(), 28..120), first in 0x40_u8..0x4f) {
        let length = bytes.len() as u16;
        bytes[0] = 0x45;
        bytes[2..4].copy_from_slice(&length.to_be_bytes());
        (bytes[6], bytes[7], bytes[9], bytes[20]) = (0, 0, 1, 3);
        if let Some(quoted) = bytes.get_mut(28) {
            *quoted = first;
        }
        let packet = read(&bytes).unwrap();
        let mut quoted = Packet::default();
        if packet.read_quote(&*bytes, &mut quoted) {
            prop_assert!(!quoted.is_icmp_error());
            prop_assert!(quoted.transport + 8 <= packet.end);
        }
    }
}
