//! Packets per second into a namespace: no policy, Rampart, nftables and iptables with the same policy.
//!
//! Each has a namespace behind a TUN interface. One process writes the same packets into one after the other,
//! in turns; what arrives goes through the whole of the kernel's input, in the same system call, to a socket that throws it
//! away. So a packet's time is the stack's and the filter's together, and a difference of two is that of the filters.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use node::kernel::datapath::packet::Packet;

use super::receiver::{Filter, PAYLOAD, Receiver};
use super::{FAMILIES, family_name, thousands};
use crate::bench::Effort;
use crate::bench::report::{Report, Row, Target};
use crate::bench::scale::{Scale, Size};
use crate::bench::statistics::{Draw, difference, estimate, ratio};
use crate::conformance::Lab;
use crate::mesh::Family;

/// Flows, each with packets of one kind: many, so that each packet needs what the one before did not; and few.
const FLOWS: usize = 4_096;
const FEW_FLOWS: usize = 64;
const FIRST_PORT: u16 = 20_000;

pub(super) fn measure(lab: &mut Lab, effort: Effort, report: &mut Report) -> Result<()> {
    for &rules in effort.choose(&[10, 100, 1_000, 10_000][..], &[10]) {
        for family in FAMILIES {
            measure_size(lab, rules, family, effort, report)?;
        }
    }
    Ok(())
}

fn measure_size(lab: &Lab, rules: u32, family: Family, effort: Effort, report: &mut Report) -> Result<()> {
    let scale = Scale::new(Size::ports(rules, family))?;
    let packets = packets(&scale, family);
    let bytes: Vec<Vec<u8>> = packets.iter().map(Packet::to_bytes).collect();
    let openers: Vec<SocketAddr> =
        packets.iter().map(|packet| SocketAddr::new(packet.source, packet.source_port)).collect();
    let mut receivers = Vec::new();
    for filter in Filter::ALL {
        let mut receiver = Receiver::new(filter, &scale, family, &lab.bpffs)?;
        receiver.establish(&bytes, &openers)?;
        let received = receiver.received()?;
        ensure!(received == FLOWS as u64, "{}: {received} of {FLOWS} packets arrived", filter.name());
        receivers.push(receiver);
    }
    for flows in [FLOWS, FEW_FLOWS] {
        let times = race(&mut receivers, &bytes[..flows], effort)?;
        let what = format!("{}, {} rules, {} flows", family_name(family), thousands(rules), thousands(flows as u32));
        tell(&times, &what, report);
    }
    Ok(())
}

/// Nanoseconds of a packet, by receiver and turn.
fn race(receivers: &mut [Receiver], packets: &[Vec<u8>], effort: Effort) -> Result<Vec<Vec<f64>>> {
    let (turns, time) = (effort.choose(32, 3), effort.choose(Duration::from_millis(15), Duration::from_millis(2)));
    let mut times = vec![Vec::with_capacity(turns); receivers.len()];
    for turn in 0..turns {
        // Each is first as often as last.
        for place in 0..receivers.len() {
            let index = if turn % 2 == 0 { place } else { receivers.len() - 1 - place };
            times[index].push(receivers[index].receive(packets, time)?);
        }
    }
    Ok(times)
}

/// `times` is what [`race`] found, in the order of [`Filter::ALL`].
fn tell(times: &[Vec<f64>], what: &str, report: &mut Report) {
    let paired =
        |a: usize, b: usize| -> Vec<(f64, f64)> { times[a].iter().copied().zip(times[b].iter().copied()).collect() };
    let [none, rampart] = [Filter::None, Filter::Rampart]
        .map(|wanted| Filter::ALL.iter().position(|filter| *filter == wanted).unwrap_or_default());
    for (index, filter) in Filter::ALL.iter().enumerate() {
        let rates: Vec<f64> = times[index].iter().map(|time| 1e9 / time).collect();
        report.push(Row::estimate(format!("received, {}, {what}", filter.name()), estimate(&rates), "packets/s"));
        if index != none {
            let cost = difference(&paired(index, none));
            report.push(Row::estimate(
                format!("a packet's cost beyond no policy, {}, {what}", filter.name()),
                cost,
                "ns",
            ));
        }
    }
    for (index, filter) in Filter::ALL.iter().enumerate() {
        if index == rampart || *filter == Filter::Empty {
            continue;
        }
        // Packets per second are one over the time, so the ratio is turned round.
        let row = Row::estimate(
            format!("received, Rampart / {}, {what}", filter.name()),
            ratio(&paired(index, rampart)),
            "times",
        );
        let nftables = matches!(filter, Filter::NftLinear { .. } | Filter::NftSet { .. });
        report.push(if nftables { row.target(Target::AtLeast(1.0)) } else { row });
    }
}

/// Of random partners, to the port that is open to them, each of a flow of its own.
fn packets(scale: &Scale, family: Family) -> Vec<Packet> {
    let mut draw = Draw::new(11);
    let packet = |number: usize| {
        let partner = &scale.partners[draw.below(scale.partners.len())];
        let port = FIRST_PORT + number as u16;
        Packet { payload: vec![0; PAYLOAD], ..Packet::opening(&scale.flow(partner, family)).with_source_port(port) }
    };
    (0..FLOWS).map(packet).collect()
}
