//! The whole program, by what becomes of a packet: net of a program that does nothing, attached the same way.
//!
//! Over many packets, by a loop inside a program that puts one after the other into the buffer of its run and calls what
//! the node's program is. And over one packet again and again, by the node's own program as it is attached.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Result, ensure};
use ebpf_common::bench::SAMPLES;
use ebpf_common::{EGRESS, INGRESS};
use node::kernel::Datapath;
use node::kernel::datapath::packet::{Packet, ip};
use policy::Flow;

use super::lookup::{enforce, runs, sizes};
use super::program::{Cost, Programs};
use super::{FAMILIES, family_name, nanoseconds, of_family, thousands};
use crate::bench::Effort;
use crate::bench::report::{Report, Row, Target};
use crate::bench::scale::{Families, Layout, Scale, Size, Treatment};
use crate::bench::statistics::{Draw, Estimate, difference, median, minimum};
use crate::conformance::Lab;
use crate::mesh::Family;

/// Cidrs for which there are targets, and most nanoseconds of a packet, IPv4 and IPv6.
const TARGETS: (u32, (f64, f64)) = (1_000, (60.0, 110.0));
/// The most that a reply of a known flow adds, while its record is at hand.
const REPLY: f64 = 45.0;
/// Flows whose records stay at hand.
const HOT_FLOWS: u32 = 64;
/// Source port of the first flow.
const FIRST_PORT: u16 = 20_000;

/// Of the bench's object.
const PROGRAMS: [&str; 5] = ["empty", "packets_only", "whole", "headers", "counters"];

/// What becomes of a packet, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    AnyService,
    Port,
    RecordedPort,
    /// As many flows are recorded as there are packets, and none of the packets belongs to one.
    Denied,
    Reply {
        flows: u32,
    },
    NewFlow,
    FirstFragment,
    LaterFragment,
}

const FATES: [Fate; 9] = [
    Fate::AnyService,
    Fate::Port,
    Fate::Denied,
    Fate::Reply { flows: HOT_FLOWS },
    Fate::Reply { flows: SAMPLES },
    Fate::RecordedPort,
    Fate::NewFlow,
    Fate::FirstFragment,
    Fate::LaterFragment,
];

impl Fate {
    fn name(self) -> &'static str {
        match self {
            Self::AnyService => "allowed by any-service",
            Self::Port => "allowed by port",
            Self::RecordedPort => "allowed by port, flow recorded before",
            Self::Denied => "denied",
            Self::Reply { flows: HOT_FLOWS } => "reply of a known flow, 64 flows",
            Self::Reply { .. } => "reply of a known flow, 4,096 flows",
            Self::NewFlow => "new flow that needs a record",
            Self::FirstFragment => "first fragment, allowed by any-service",
            Self::LaterFragment => "later fragment, allowed by any-service",
        }
    }

    fn treatment(self) -> Treatment {
        match self {
            Self::AnyService | Self::FirstFragment | Self::LaterFragment => Treatment::AnyService,
            Self::Port => Treatment::Port,
            Self::RecordedPort | Self::NewFlow => Treatment::RecordedPort,
            Self::Denied | Self::Reply { .. } => Treatment::Replies,
        }
    }

    /// Whether there is a target for it on its own.
    fn is_plain(self) -> bool {
        matches!(self, Self::AnyService | Self::Port | Self::Denied)
    }
}

pub(super) fn measure(lab: &mut Lab, effort: Effort, report: &mut Report) -> Result<()> {
    lab.datapath.attach()?;
    for &cidrs in sizes(effort) {
        for layout in [Layout::Dense, Layout::Sparse] {
            for family in FAMILIES {
                let size = Size::mixed(cidrs, 10, layout, Families::One(family));
                measure_size(lab, size, family, effort, report)?;
            }
        }
    }
    Ok(())
}

fn measure_size(lab: &mut Lab, size: Size, family: Family, effort: Effort, report: &mut Report) -> Result<()> {
    let what = format!("{}, {} cidrs, {}", family_name(family), thousands(size.cidrs), size.layout.name());
    let target = (size.cidrs == TARGETS.0).then(|| of_family(family, TARGETS.1));
    let scale = Scale::new(size)?;
    if let Err(refused) = enforce(lab, &scale.slice(1)?)? {
        report.push(Row::missing(format!("whole program, {what}"), refused.to_string(), "ns").at_most(target));
        return Ok(());
    }
    let mut bench = Bench { programs: Programs::load(lab, &PROGRAMS)?, scale, family, runs: runs(effort) };
    for fate in FATES {
        let cost = bench.cost(fate)?;
        let row = nanoseconds(format!("whole program, {}, {what}", fate.name()), cost);
        report.push(row.at_most(target.filter(|_| fate.is_plain())));
        if fate == Fate::AnyService {
            bench.measure_parts(&what, report)?;
        }
    }
    let more =
        Row::estimate(format!("a known reply (64 flows) beyond any-service, {what}"), bench.cost_of_reply()?, "ns");
    report.push(if target.is_some() { more.target(Target::AtMost(REPLY)) } else { more });
    if size.layout == Layout::Dense {
        bench.measure_attached(lab, &what, report)?;
    }
    Ok(())
}

struct Bench {
    programs: Programs,
    scale: Scale,
    family: Family,
    runs: usize,
}

impl Bench {
    fn cost(&mut self, fate: Fate) -> Result<Cost> {
        let buffer = self.prepare(fate)?;
        if fate == Fate::NewFlow {
            return self.cost_of_new(&buffer);
        }
        self.programs.cost("whole", "packets_only", &buffer, self.runs)
    }

    /// What a known reply costs beyond a packet that a rule lets pass, the two by turns.
    fn cost_of_reply(&mut self) -> Result<Estimate> {
        let mut pairs = Vec::new();
        // Its flows stay recorded.
        let reply = Fate::Reply { flows: HOT_FLOWS };
        self.prepare(reply)?;
        let packets = [self.bytes(reply), self.bytes(Fate::AnyService)];
        for _ in 0..self.runs {
            let mut turn = [0.0; 2];
            for (packets, time) in packets.iter().zip(&mut turn) {
                let buffer = self.programs.set_packets(INGRESS, packets)?;
                self.programs.warm_up("whole", &buffer)?;
                *time = self.programs.run(INGRESS, "whole", &buffer)?.0;
            }
            pairs.push((turn[0], turn[1]));
        }
        Ok(difference(&pairs))
    }

    /// Makes the records that there are to be, and puts the packets in place; returns the buffer to run with.
    fn prepare(&mut self, fate: Fate) -> Result<Vec<u8>> {
        self.programs.forget()?;
        if fate == Fate::LaterFragment {
            // The first ones went before.
            let buffer = self.programs.set_packets(INGRESS, &self.bytes(Fate::FirstFragment))?;
            self.programs.passed(INGRESS, "whole", &buffer)?;
        }
        let buffer = self.programs.set_packets(INGRESS, &self.bytes(fate))?;
        // What is denied belongs to no flow, and there are flows.
        let opened = if fate == Fate::Denied { Fate::Reply { flows: SAMPLES } } else { fate };
        if let Fate::Reply { .. } = opened {
            // The subject opens the flows.
            let openers: Vec<Vec<u8>> = self.packets(opened).iter().map(|packet| packet.reply().to_bytes()).collect();
            let buffer = self.programs.set_packets(EGRESS, &openers)?;
            let opened = self.programs.passed(EGRESS, "whole", &buffer)?;
            ensure!(opened == SAMPLES, "{opened} of {SAMPLES} packets that open flows pass");
        }
        let passed = self.programs.passed(INGRESS, "whole", &buffer)?;
        let expected = if fate == Fate::Denied { 0 } else { SAMPLES };
        ensure!(passed == expected, "{passed} of {SAMPLES} packets pass and not {expected}: {}", fate.name());
        Ok(buffer)
    }

    /// What reading the headers and counting have in it, with the packets that are there.
    fn measure_parts(&mut self, what: &str, report: &mut Report) -> Result<()> {
        let buffer = self.packets(Fate::AnyService)[0].to_bytes();
        for (program, part) in [("headers", "reading the headers"), ("counters", "counting in 1,024 pairs")] {
            let passed = self.programs.passed(INGRESS, program, &buffer)?;
            ensure!(passed == SAMPLES, "`{program}` takes {passed} of {SAMPLES} packets");
            let cost = self.programs.cost(program, "packets_only", &buffer, self.runs)?;
            report.push(nanoseconds(format!("of it {part}, {what}"), cost));
        }
        Ok(())
    }

    /// Every packet of each run makes a record: they are deleted before the next.
    fn cost_of_new(&mut self, buffer: &[u8]) -> Result<Cost> {
        let (mut with, mut alone) = (Vec::new(), Vec::new());
        for _ in 0..self.runs.div_ceil(3) {
            let gone = self.programs.forget()?;
            ensure!(gone == SAMPLES as usize, "{gone} of {SAMPLES} flows were recorded");
            alone.push(self.programs.run(INGRESS, "packets_only", buffer)?.0);
            with.push(self.programs.run(INGRESS, "whole", buffer)?.0);
        }
        Ok(Cost { minimum: minimum(&with) - minimum(&alone), median: median(&with) - median(&alone) })
    }

    /// As they arrive at the subject.
    fn packets(&self, fate: Fate) -> Vec<Packet> {
        let partners = self.scale.with(fate.treatment());
        let mut draw = Draw::new(5);
        let flows = if let Fate::Reply { flows } = fate { flows } else { SAMPLES };
        let packet = |number: u32| {
            let partner = &partners[draw.below(partners.len())];
            let flow = self.scale.flow(partner, self.family);
            let port = FIRST_PORT + number as u16;
            match fate {
                // From the port that the subject may talk to.
                Fate::Reply { .. } => Packet::opening(&Flow { port, ..flow }).with_source_port(partner.port),
                Fate::Denied => Packet::opening(&Flow { port: 9, ..flow }).with_source_port(port),
                _ => Packet::opening(&flow).with_source_port(port),
            }
        };
        (0..flows).map(packet).collect()
    }

    fn bytes(&self, fate: Fate) -> Vec<Vec<u8>> {
        let mut ids: BTreeMap<IpAddr, u16> = BTreeMap::new();
        let bytes = |packet: &Packet| {
            if !matches!(fate, Fate::FirstFragment | Fate::LaterFragment) {
                return packet.to_bytes();
            }
            // A datagram each, numbered by their senders.
            let id = ids.entry(packet.source).and_modify(|id| *id += 1).or_default();
            fragment(packet, *id, fate == Fate::FirstFragment)
        };
        self.packets(fate).iter().map(bytes).collect()
    }

    /// The node's own program, one packet a run: everything is at hand, and there is no loop.
    fn measure_attached(&mut self, lab: &mut Lab, what: &str, report: &mut Report) -> Result<()> {
        let pin = lab.pin("programs/ingress");
        for fate in [Fate::AnyService, Fate::Port, Fate::Denied] {
            let packet = self.packets(fate).remove(0);
            let (repeat, runs) = (if self.runs > 10 { 20_000 } else { 100 }, self.runs.min(20));
            let cost = self.programs.cost_of_pinned(&pin, &packet.to_bytes(), repeat, runs)?;
            report.push(nanoseconds(format!("the attached program, one packet {}, {what}", fate.name()), cost));
        }
        Ok(())
    }
}

/// The first 16 bytes of a datagram, its UDP header among them, or those after them, more of which follow.
fn fragment(packet: &Packet, id: u16, first: bool) -> Vec<u8> {
    const FRAGMENT: u8 = 44;
    const MORE: u16 = 1;
    let transport = packet.transport();
    let offset = if first { 0 } else { transport.len() as u16 };
    if packet.source.is_ipv4() {
        let mut bytes = ip(packet.source, packet.destination, packet.protocol, &transport);
        bytes[4..6].copy_from_slice(&id.to_be_bytes());
        bytes[6..8].copy_from_slice(&((offset / 8) | (MORE << 13)).to_be_bytes());
        return bytes;
    }
    let header = [&[packet.protocol, 0][..], &(offset | MORE).to_be_bytes(), &u32::from(id).to_be_bytes(), &transport];
    ip(packet.source, packet.destination, FRAGMENT, &header.concat())
}
