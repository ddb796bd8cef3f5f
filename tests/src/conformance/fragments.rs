//! Datagrams in fragments (docs/POLICY.md, section 3.4).

use std::net::IpAddr;

use ebpf_common::packet::UDP;
use ebpf_common::{EGRESS, INGRESS, reason};
use node::kernel::datapath::packet::{Packet, ip};
use policy::Action;

use super::network::{ENDS, allowing, flow, node, small, with_rule};
use super::{DIRECTIONS, Judge, Lab};

/// A UDP datagram of 64 bytes behind its header, and the fragments it is sent in.
#[derive(Clone, Debug)]
struct Datagram {
    source: IpAddr,
    destination: IpAddr,
    id: u32,
    bytes: Vec<u8>,
}

impl Datagram {
    fn new(source: &str, destination: &str, service: &str, id: u32) -> Self {
        let opening = Packet::opening(&flow(source, destination, service));
        let mut bytes = opening.transport();
        bytes.resize(64, 0xaa);
        if opening.protocol == UDP {
            bytes[4..6].copy_from_slice(&64_u16.to_be_bytes());
        }
        Self { source: opening.source, destination: opening.destination, id, bytes }
    }

    /// What answers it.
    fn reply(&self) -> Self {
        let mut reply = Self { source: self.destination, destination: self.source, ..self.clone() };
        reply.bytes[..2].copy_from_slice(&self.bytes[2..4]);
        reply.bytes[2..4].copy_from_slice(&self.bytes[..2]);
        reply
    }

    /// The bytes from `start` to `end`, with `protocol` for what the fragment claims to carry.
    fn part(&self, start: usize, end: usize, protocol: u8) -> Vec<u8> {
        let (payload, more) = (&self.bytes[start..end], end < self.bytes.len());
        if self.source.is_ipv4() {
            let mut packet = ip(self.source, self.destination, protocol, payload);
            packet[4..6].copy_from_slice(&(self.id as u16).to_be_bytes());
            let field = (start as u16 / 8) | if more { 0x2000 } else { 0 };
            packet[6..8].copy_from_slice(&field.to_be_bytes());
            packet
        } else {
            let field = start as u16 | u16::from(more);
            let header = [&[protocol, 0][..], &field.to_be_bytes(), &self.id.to_be_bytes(), payload].concat();
            ip(self.source, self.destination, 44, &header)
        }
    }

    /// The first 24 bytes.
    fn first(&self) -> Vec<u8> {
        self.part(0, 24, UDP)
    }

    /// What comes after them.
    fn later(&self) -> [Vec<u8>; 2] {
        [self.part(24, 48, UDP), self.part(48, 64, UDP)]
    }
}

fn expect_later(judge: &mut Judge, direction: u32, datagram: &Datagram, expected: u8, what: &str) {
    for fragment in datagram.later() {
        judge.expect_bytes(direction, &fragment, expected, &format!("{what}: {datagram:?}"));
    }
}

/// Later fragments have the fate of the first, in whatever order they come after it, and without one none passes.
pub fn follow_their_first(lab: &mut Lab) {
    let network = allowing(small(), "dns", "cidr:web", "cidr:db", "udp/53");
    lab.enforce(&network, node(&network, "web1"));
    let mut judge = lab.judge();
    for [web, db, ..] in ENDS {
        let allowed = Datagram::new(web, db, "udp/53", 0x0102_0304);
        let denied = Datagram::new(web, db, "udp/54", 0x0a0b_0c0d);
        expect_later(&mut judge, EGRESS, &allowed, reason::FRAGMENT, "before the first");
        judge.expect_bytes(EGRESS, &allowed.first(), reason::RULE, "the first");
        let [second, third] = allowed.later();
        judge.expect_bytes(EGRESS, &third, reason::RULE, "the third");
        judge.expect_bytes(EGRESS, &second, reason::RULE, "the second");
        judge.expect_bytes(EGRESS, &second, reason::RULE, "the second again");

        judge.expect_bytes(EGRESS, &denied.first(), reason::NO_RULE, "the first of what is denied");
        expect_later(&mut judge, EGRESS, &denied, reason::FRAGMENT, "its first was denied");
        let other = Datagram { id: 0x0102_0305, ..allowed.clone() };
        expect_later(&mut judge, EGRESS, &other, reason::FRAGMENT, "another datagram");
        let same_slot = Datagram { id: 0x0304_0102, ..allowed.clone() };
        expect_later(&mut judge, EGRESS, &same_slot, reason::FRAGMENT, "another of the same slot");

        // Answers come in fragments too.
        let reply = allowed.reply();
        expect_later(&mut judge, INGRESS, &reply, reason::FRAGMENT, "an answer before its first");
        judge.expect_bytes(INGRESS, &reply.first(), reason::REPLY, "the first of an answer");
        expect_later(&mut judge, INGRESS, &reply, reason::REPLY, "an answer");
        let records = judge.probe.fragments().expect("readable");
        assert!(records.iter().all(|(_, record)| record.edge == 24), "{records:?}");
    }
}

/// What the first fragment said stays said.
pub fn cannot_overlap_their_first(lab: &mut Lab) {
    let network = allowing(small(), "dns", "cidr:web", "cidr:db", "udp/53");
    lab.enforce(&network, node(&network, "web1"));
    let mut judge = lab.judge();
    for [web, db, ..] in ENDS {
        let datagram = Datagram::new(web, db, "udp/53", 7);
        judge.expect_bytes(EGRESS, &datagram.first(), reason::RULE, "the first");
        for start in [8, 16] {
            let overlapping = datagram.part(start, 40, UDP);
            judge.expect_bytes(EGRESS, &overlapping, reason::FRAGMENT_OVERLAP, &format!("from byte {start} on"));
        }
        judge.expect_bytes(EGRESS, &datagram.part(24, 40, UDP), reason::RULE, "right behind it");
        // Another first fragment replaces the verdict.
        let other = Datagram { id: 7, ..Datagram::new(web, db, "udp/54", 7) };
        judge.expect_bytes(EGRESS, &other.first(), reason::NO_RULE, "another first one");
    }
}

/// A change of policy counts for the fragments that come after it.
pub fn are_judged_again(lab: &mut Lab) {
    let open = allowing(small(), "dns", "cidr:web", "cidr:db", "udp/53");
    let closed = with_rule(open.clone(), "no", Action::Deny, "cidr:web", "cidr:db", "udp/53");
    let web1 = node(&open, "web1");
    for [web, db, ..] in ENDS {
        lab.enforce(&open, web1);
        let mut judge = lab.judge();
        let datagram = Datagram::new(web, db, "udp/53", 9);
        judge.expect_bytes(EGRESS, &datagram.first(), reason::RULE, "the first");
        judge.expect_bytes(INGRESS, &datagram.reply().first(), reason::REPLY, "the first of the answer");
        lab.enforce(&closed, web1);
        judge.slots = lab.slots.pairs().into_values().collect();
        expect_later(&mut judge, EGRESS, &datagram, reason::DENY_RULE, "revoked");
        expect_later(&mut judge, INGRESS, &datagram.reply(), reason::REVOKED, "the answer to what is revoked");
    }
}

/// Where every service is allowed, later fragments need no first one; where every port is not, they do.
pub fn pass_alone_where_nothing_could_matter(lab: &mut Lab) {
    let network = allowing(small(), "all", "cidr:web", "cidr:db", "any");
    let network = allowing(network, "gre", "cidr:db", "cidr:web", "proto/47");
    let network = allowing(network, "udp", "cidr:db", "cidr:web", "udp");
    lab.enforce(&network, node(&network, "web1"));
    let mut judge = lab.judge();
    for [web, db, ..] in ENDS {
        let any = Datagram::new(web, db, "udp/53", 11);
        expect_later(&mut judge, EGRESS, &any, reason::RULE, "any service");
        let back = Datagram::new(db, web, "udp/53", 12);
        expect_later(&mut judge, INGRESS, &back, reason::FRAGMENT, "every UDP port, and not every service");
        let expected = if web.contains(':') { reason::FRAGMENT } else { reason::RULE };
        judge.expect_bytes(INGRESS, &back.part(24, 48, 47), expected, "IPv4 says its protocol in every fragment");
    }
}

/// The transport header is whole in the first fragment, and no error about a packet comes in several.
pub fn hold_whole_headers(lab: &mut Lab) {
    let network = allowing(small(), "all", "any", "any", "any");
    lab.enforce(&network, node(&network, "web1"));
    let mut judge = lab.judge();
    for [web, db, ..] in ENDS {
        let tcp = Datagram::new(web, db, "tcp/443", 13);
        judge.expect_bytes(EGRESS, &tcp.part(0, 16, 6), reason::MALFORMED, "16 bytes of a TCP header");
        judge.expect_bytes(EGRESS, &tcp.part(0, 24, 6), reason::RULE, "a TCP header and 4 bytes");
        let (protocol, kind) = if web.contains(':') { (58, 1) } else { (1, 3) };
        let mut error = Datagram::new(web, db, "udp/1", 14);
        error.bytes[0] = kind;
        for direction in DIRECTIONS {
            let error = if direction == EGRESS { error.clone() } else { error.reply() };
            let error = Datagram { bytes: [&[kind][..], &error.bytes[1..]].concat(), ..error };
            judge.expect_bytes(direction, &error.part(0, 24, protocol), reason::FRAGMENT, "the first of an ICMP error");
        }
    }
}

/// A sender of many datagrams has so many records and no more.
pub fn take_the_place_of_old_ones(lab: &mut Lab) {
    let network = allowing(small(), "dns", "cidr:web", "cidr:db", "udp/53");
    lab.enforce(&network, node(&network, "web1"));
    let mut judge = lab.judge();
    for [web, db, ..] in ENDS {
        for id in 0..600 {
            let datagram = Datagram::new(web, db, "udp/53", id);
            judge.expect_bytes(EGRESS, &datagram.first(), reason::RULE, "the first");
            expect_later(&mut judge, EGRESS, &datagram, reason::RULE, "right after it");
        }
        expect_later(&mut judge, EGRESS, &Datagram::new(web, db, "udp/53", 3), reason::FRAGMENT, "long ago");
    }
    assert!(judge.probe.fragments().expect("readable").len() <= 2 * 256);
}
