//! Aggregates (GSO, GRO): several packets on the wire, of which only the headers are linear.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use ebpf_common::counter::Counter;
use ebpf_common::packet::{TCP, UDP};
use ebpf_common::{EGRESS, INGRESS, reason};
use nix::sys::socket::{setsockopt, sockopt};
use node::kernel::datapath::packet::{ACK, Packet, SYN, ip};
use node::kernel::{AttachMethod, Inspect};

use super::network::{ENDS, allowing, flow, node, small};
use super::{INTERFACE, Lab, attachments, foreign};

/// `struct virtio_net_hdr`, which is ahead of each packet on such an interface.
const VIRTIO: usize = 10;
const NEEDS_CHECKSUM: u8 = 1;
const TCP_V4: u8 = 1;
const TCP_V6: u8 = 4;
const UDP_ANY: u8 = 5;

/// Bytes of a segment's payload.
const SEGMENT: usize = 1_300;

fn count(lab: &mut Lab, direction: u32, reason: u8) -> Counter {
    lab.datapath.counters(&[]).expect("readable").reasons.get(&(direction, reason)).copied().unwrap_or_default()
}

fn enforce(lab: &mut Lab) {
    lab.tun = foreign::tun_with_offloads(INTERFACE).expect("a TUN interface");
    lab.give_addresses();
    let network = allowing(small(), "in", "cidr:db", "cidr:web", "tcp/443");
    let network = allowing(network, "out", "cidr:web", "cidr:db", "tcp/80");
    let network = allowing(network, "udp-in", "cidr:db", "cidr:web", "udp/443");
    let network = allowing(network, "udp-out", "cidr:web", "cidr:db", "udp/80");
    lab.enforce(&network, node(&network, "web1"));
}

/// As a receiver that puts segments together hands them up.
pub fn is_judged_whole_at_ingress(lab: &mut Lab) {
    lab.take_interface_away();
    enforce(lab);
    for [web, db, ..] in ENDS {
        for (service, expected) in [
            ("tcp/443", reason::RULE),
            ("tcp/444", reason::NO_RULE),
            ("udp/443", reason::RULE),
            ("udp/444", reason::NO_RULE),
        ] {
            for payload in [SEGMENT / 2, SEGMENT, SEGMENT + 1, 10 * SEGMENT, 40 * SEGMENT + 7] {
                let before = count(lab, INGRESS, expected);
                let packet = Packet { payload: vec![1; payload], ..Packet::opening(&flow(db, web, service)) };
                let bytes = packet.clone().with_flags(ACK).to_bytes();
                let kind = (payload > SEGMENT).then_some(packet.protocol);
                let written = lab.tun.write_all(&[virtio(web, kind), bytes.clone()].concat());
                if kind == Some(UDP) && !joins_udp() {
                    assert!(written.is_err(), "a kernel before 6.2 knows no joined UDP");
                    continue;
                }
                written.expect("written");
                let after = count(lab, INGRESS, expected);
                let seen =
                    (after.packets - before.packets, after.bytes - before.bytes, after.segments - before.segments);
                let segments = payload.div_ceil(SEGMENT) as u64;
                assert_eq!(seen, (1, bytes.len() as u64, segments), "{payload} bytes to {service} of {web}");
            }
        }
    }
}

/// Whether a TUN takes UDP that is several on the wire: since 6.2, and TCX came with 6.6. (There is no release between the two
/// that is tested.)
fn joins_udp() -> bool {
    attachments()[0] == AttachMethod::Tcx
}

/// `kind`: the protocol of what is several on the wire.
fn virtio(address: &str, kind: Option<u8>) -> Vec<u8> {
    let Some(protocol) = kind else { return vec![0; VIRTIO] };
    let header = if address.contains(':') { 40_u16 } else { 20 };
    let (kind, transport, checksum) = match (protocol, header) {
        (UDP, _) => (UDP_ANY, 8, 6),
        (_, 40) => (TCP_V6, 20, 16),
        _ => (TCP_V4, 20, 16),
    };
    let mut bytes = vec![NEEDS_CHECKSUM, kind];
    for field in [header + transport, SEGMENT as u16, header, checksum] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes
}

/// As UDP of this host sends what its program has it cut (`UDP_SEGMENT`): the program of the interface sees one packet, and
/// the interface's reader as many as it is cut into.
pub fn is_counted_by_segments_where_udp_is_cut(lab: &mut Lab) {
    lab.take_interface_away();
    enforce(lab);
    for [web, db, ..] in ENDS {
        let socket = UdpSocket::bind((web, 0)).expect("a socket");
        setsockopt(&socket, sockopt::UdpGsoSegment, &(SEGMENT as i32)).expect("a socket that cuts");
        let headers = if web.contains(':') { 48 } else { 28 };
        for (port, expected) in [(80, reason::RULE), (81, reason::NO_RULE)] {
            for payload in [SEGMENT / 2, SEGMENT, SEGMENT + 1, 9 * SEGMENT, 40 * SEGMENT + 7] {
                let before = count(lab, EGRESS, expected);
                socket.send_to(&vec![3; payload], (db, port)).expect("taken by the kernel");
                let after = count(lab, EGRESS, expected);
                let seen =
                    (after.packets - before.packets, after.bytes - before.bytes, after.segments - before.segments);
                let segments = payload.div_ceil(SEGMENT) as u64;
                assert_eq!(seen, (1, (headers + payload) as u64, segments), "{payload} bytes from {web}");
                if expected == reason::RULE {
                    let left: Vec<usize> = (0..segments).map(|_| datagram(lab, web) - headers).collect();
                    let whole = payload / SEGMENT;
                    assert!(left[..whole].iter().all(|length| *length == SEGMENT), "{left:?}");
                    assert_eq!(left.iter().sum::<usize>(), payload, "{left:?}");
                }
            }
        }
    }
}

/// The length of the next UDP packet of this host.
fn datagram(lab: &mut Lab, web: &str) -> usize {
    let mut buffer = vec![0; 70_000];
    loop {
        let length = lab.tun.read(&mut buffer).expect("read") - VIRTIO;
        let packet = &buffer[VIRTIO..];
        let (version, protocol) = if web.contains(':') { (6, packet[6]) } else { (4, packet[9]) };
        if packet[0] >> 4 == version && protocol == UDP {
            return length;
        }
    }
}

/// TCP of this host with segmentation offload: the payload lies in separate pages.
pub fn is_judged_whole_at_egress(lab: &mut Lab) {
    lab.take_interface_away();
    enforce(lab);
    for [web, db, ..] in ENDS {
        let before = count(lab, EGRESS, reason::RULE);
        let to = SocketAddr::new(db.parse().expect("an address"), 80);
        let (connected, mut sent) = thread::scope(|scope| {
            let connecting = scope.spawn(move || TcpStream::connect_timeout(&to, Duration::from_secs(20)));
            let mut sent = Sent::default();
            let opening = sent.read(lab, web);
            answer(lab, &opening);
            (connecting.join().expect("no panic").expect("connected"), sent)
        });
        const PAYLOAD: usize = 9 * SEGMENT;
        (&connected).write_all(&[2; PAYLOAD]).expect("sent");
        while sent.payload < PAYLOAD {
            sent.read(lab, web);
        }
        // Nothing is acknowledged, so the host retransmits; retransmissions are read too.
        let seen = loop {
            let after = count(lab, EGRESS, reason::RULE);
            let seen = (after.packets - before.packets, after.bytes - before.bytes, after.segments - before.segments);
            if seen.0 <= sent.packets {
                break seen;
            }
            while sent.packets < seen.0 {
                sent.read(lab, web);
            }
        };
        assert_eq!(seen, (sent.packets, sent.bytes, sent.segments), "from {web}");
        assert!(sent.segments > sent.packets, "the host sent no packet that is several: {sent:?}");
        // Ended at once, or it would go on sending while the other family is counted.
        let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&connected, sockopt::Linger, &at_once).expect("a socket");
    }
}

/// What was read of one connection.
#[derive(Debug, Default)]
struct Sent {
    packets: u64,
    bytes: u64,
    segments: u64,
    payload: usize,
}

impl Sent {
    /// Reads the next TCP packet of this host.
    fn read(&mut self, lab: &mut Lab, web: &str) -> Vec<u8> {
        let mut buffer = vec![0; 70_000];
        loop {
            let length = lab.tun.read(&mut buffer).expect("read");
            let (virtio, packet) = buffer[..length].split_at(VIRTIO);
            let v6 = web.contains(':');
            let (version, protocol, header) = if v6 { (6, packet[6], 40) } else { (4, packet[9], 20) };
            if packet[0] >> 4 != version || protocol != TCP {
                continue;
            }
            let payload = packet.len() - header - usize::from(packet[header + 12] >> 4) * 4;
            let size = usize::from(u16::from_ne_bytes([virtio[4], virtio[5]]));
            self.packets += 1;
            self.bytes += packet.len() as u64;
            self.segments += if size == 0 { 1 } else { payload.div_ceil(size) as u64 };
            self.payload += payload;
            return packet.to_vec();
        }
    }
}

/// The other end takes the connection, with segments of this size.
fn answer(lab: &mut Lab, opening: &[u8]) {
    let (v6, header) = (opening[0] >> 4 == 6, if opening[0] >> 4 == 6 { 40 } else { 20 });
    let word = |at: usize| <[u8; 4]>::try_from(&opening[at..at + 4]).expect("4 bytes");
    let address = |at: usize| -> IpAddr {
        if v6 { <[u8; 16]>::try_from(&opening[at..at + 16]).expect("an address").into() } else { word(at).into() }
    };
    let (source, destination) = if v6 { (address(8), address(24)) } else { (address(12), address(16)) };
    let mut transport = opening[header + 2..header + 4].to_vec();
    transport.extend(&opening[header..header + 2]);
    transport.extend(1_u32.to_be_bytes());
    transport.extend((u32::from_be_bytes(word(header + 4)) + 1).to_be_bytes());
    transport.extend([6 << 4, SYN | ACK, 0xff, 0xff, 0, 0, 0, 0, 2, 4]);
    transport.extend((SEGMENT as u16 + 12).to_be_bytes());
    let packet = ip(destination, source, TCP, &transport);
    // The kernel is told that the checksum is still to be made, and believes that the bytes are right.
    let mut virtio = vec![NEEDS_CHECKSUM, 0];
    for field in [0, 0, header as u16, 16] {
        virtio.extend(field.to_ne_bytes());
    }
    lab.tun.write_all(&[virtio, packet].concat()).expect("written");
}

/// Lengths that say nothing, or leave the length to a jumbogram's option.
pub fn is_refused_without_a_length(lab: &mut Lab) {
    let network = allowing(small(), "all", "any", "any", "any");
    lab.enforce(&network, node(&network, "web1"));
    let mut judge = lab.judge();
    let [[web4, db4, ..], [web6, db6, ..]] = ENDS;
    let mut v4 = Packet::opening(&flow(web4, db4, "tcp/443")).to_bytes();
    v4[2..4].copy_from_slice(&[0, 0]);
    judge.expect_bytes(EGRESS, &v4, reason::MALFORMED, "an IPv4 length of 0");
    let v6 = Packet::opening(&flow(web6, db6, "tcp/443"));
    for protocol in [TCP, 17, 58, 0, 43, 44, 60] {
        let mut bytes = v6.to_bytes();
        (bytes[4], bytes[5], bytes[6]) = (0, 0, protocol);
        judge.expect_bytes(EGRESS, &bytes, reason::MALFORMED, &format!("an IPv6 length of 0 before header {protocol}"));
    }
    // RFC 2675: hop-by-hop, with the option 194 of 4 bytes.
    let transport = v6.transport();
    let length = (8 + transport.len() as u32).to_be_bytes();
    let mut jumbo = vec![TCP, 0, 194, 4];
    jumbo.extend(length);
    jumbo.extend(&transport);
    let mut bytes = ip(v6.source, v6.destination, 0, &jumbo);
    judge.expect_bytes(EGRESS, &bytes, reason::RULE, "the option beside a true length");
    bytes[4..6].copy_from_slice(&[0, 0]);
    judge.expect_bytes(EGRESS, &bytes, reason::MALFORMED, "a jumbogram");
}
