//! Fragments (docs/POLICY.md, section 3.4) and ICMP errors (3.5), and the verdict on each. They arrive while no flow is
//! recorded.

use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP};
use ebpf_common::{EGRESS, INGRESS, reason};
use node::kernel::datapath::packet::{Packet, checksum, ip};
use node::lower::Outcome;
use policy::{Flow, Network, arbitrary, interpret};

/// What follows a flow's first packet and the answer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deviation {
    None,
    Fragments,
    Errors,
}

/// Of so many flows one is sent in fragments, and errors come of another.
const ONE_OF: usize = 32;

impl Deviation {
    pub(super) fn of(number: usize) -> Self {
        match number % ONE_OF {
            3 => Self::Fragments,
            19 => Self::Errors,
            _ => Self::None,
        }
    }
}

/// A packet at a hook, and what must become of it.
pub(super) struct Deviant {
    pub(super) what: &'static str,
    pub(super) direction: u32,
    pub(super) bytes: Vec<u8>,
    pub(super) expected: Outcome,
}

fn dropped(reason: u8) -> Outcome {
    Outcome { passes: false, reason, rule: None, record: false, log: false }
}

/// The packets of one deviation, to be judged in their order. `lowered`: the verdict on the flow at `direction`, where one of
/// its ends is this node's; `id`: of no other datagram.
pub(super) fn deviants(
    deviation: Deviation,
    network: &Network,
    flow: &Flow,
    lowered: &Outcome,
    (direction, id): (u32, u32),
) -> Vec<Deviant> {
    let opening = Packet::opening(flow);
    match deviation {
        Deviation::None => Vec::new(),
        // A node that talks to itself is both ends.
        Deviation::Errors if flow.source == flow.destination => Vec::new(),
        Deviation::Fragments => fragments(network, flow, &opening, lowered, (direction, id)),
        Deviation::Errors => errors(flow, &opening, lowered, direction),
    }
}

fn fragments(
    network: &Network,
    flow: &Flow,
    opening: &Packet,
    lowered: &Outcome,
    (direction, id): (u32, u32),
) -> Vec<Deviant> {
    let alone = headless(network, flow, lowered);
    let (later, overlapping) =
        if lowered.passes { (*lowered, dropped(reason::FRAGMENT_OVERLAP)) } else { (alone, alone) };
    let mut datagram = opening.transport();
    datagram.resize(64, 0xaa);
    let part = |start: usize, end: usize| fragment(opening, id, start, &datagram[start..end], end < datagram.len());
    // The first has the longest transport header, and more.
    [
        ("a later fragment ahead of its first", part(24, 48), alone),
        ("a first fragment", part(0, 24), *lowered),
        ("the last fragment after its first", part(48, 64), later),
        ("the fragment between them", part(24, 48), later),
        ("a fragment that would overlap the first", part(16, 48), overlapping),
    ]
    .map(|(what, bytes, expected)| Deviant { what, direction, bytes, expected })
    .into()
}

/// A later fragment whose first is unknown passes if no transport header could make a difference: every service has the same
/// verdict, or the IPv4 header alone decides.
fn headless(network: &Network, flow: &Flow, lowered: &Outcome) -> Outcome {
    if matches!(lowered.reason, reason::UNKNOWN_SOURCE | reason::UNKNOWN_DESTINATION) {
        return *lowered;
    }
    let is_told = flow.source.is_ipv4() && !matches!(flow.protocol, TCP | UDP | ICMP | ICMPV6);
    let own = interpret(network, flow);
    let of_all = |(protocol, port)| interpret(network, &Flow { protocol, port, ..*flow }) == own;
    if lowered.passes && (is_told || arbitrary::points(network).into_iter().all(of_all)) {
        *lowered
    } else {
        dropped(reason::FRAGMENT)
    }
}

fn fragment(opening: &Packet, id: u32, start: usize, payload: &[u8], more: bool) -> Vec<u8> {
    let Packet { source, destination, protocol, .. } = *opening;
    if source.is_ipv4() {
        let mut packet = ip(source, destination, protocol, payload);
        packet[4..6].copy_from_slice(&(id as u16).to_be_bytes());
        let field = (start as u16 / 8) | if more { 0x2000 } else { 0 };
        packet[6..8].copy_from_slice(&field.to_be_bytes());
        packet
    } else {
        let field = start as u16 | u16::from(more);
        ip(source, destination, 44, &[&[protocol, 0][..], &field.to_be_bytes(), &id.to_be_bytes(), payload].concat())
    }
}

/// Errors about the flow's first packet, which come the other way.
fn errors(flow: &Flow, opening: &Packet, lowered: &Outcome, direction: u32) -> Vec<Deviant> {
    let back = EGRESS + INGRESS - direction;
    let related = Outcome { passes: true, ..dropped(reason::ICMP_ERROR) };
    let unrelated = dropped(reason::ICMP_ERROR_UNRELATED);
    let answer = if lowered.passes { related } else { unrelated };
    let quote = opening.to_bytes();
    let stranger = Packet { source: opening.destination, destination: opening.source, ..opening.clone() };
    let whole = error(flow, &quote);
    let in_parts = Packet { protocol: whole[0], ..stranger.clone() };
    let first = fragment(&in_parts, 7, 0, &whole[1..33], true);
    let packet = |message: &[u8]| ip(flow.destination, flow.source, message[0], &message[1..]);
    [
        ("an error about a packet of the flow", packet(&whole), answer),
        (
            "an error about a packet that its receiver did not send",
            packet(&error(flow, &stranger.to_bytes())),
            unrelated,
        ),
        ("an error about an error", packet(&error(flow, &packet(&whole))), unrelated),
        ("an error that quotes too little", packet(&error(flow, &quote[..quote.len().min(16)])), unrelated),
        ("an error in fragments", first, dropped(reason::FRAGMENT)),
    ]
    .map(|(what, bytes, expected)| Deviant { what, direction: back, bytes, expected })
    .into()
}

/// The protocol's number, and the message: destination unreachable, with what it quotes.
fn error(flow: &Flow, quote: &[u8]) -> Vec<u8> {
    let (protocol, kind) = if flow.source.is_ipv4() { (ICMP, 3) } else { (ICMPV6, 1) };
    let mut message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], quote].concat();
    // The programs leave checksums to the receiver.
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    [&[protocol][..], &message].concat()
}
