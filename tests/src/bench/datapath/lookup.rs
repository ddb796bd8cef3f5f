//! The policy lookup alone, timed by a loop inside a program, beside the shapes that others use.

use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, Result, ensure};
use ebpf_common::INGRESS;
use ebpf_common::bench::{Ends, Pair, SAMPLES, Service, map};
use ebpf_common::packet::UDP;
use ipnet::IpNet;
use node::kernel::Datapath;
use node::lower::{LowerError, RuleSlots, lower};
use policy::{ClassId, Flow, Slice};

use super::program::{Costs, Programs};
use super::{FAMILIES, family_name, nanoseconds, of_family, thousands};
use crate::bench::Effort;
use crate::bench::report::{Report, Row, Target};
use crate::bench::scale::{Families, Layout, Scale, Size, Treatment};
use crate::bench::statistics::{Draw, ratio};
use crate::conformance::Lab;
use crate::mesh::Family;

/// Most nanoseconds of a lookup by number of cidrs, IPv4 and IPv6.
const TARGETS: [(u32, (f64, f64)); 2] = [(1_000, (30.0, 70.0)), (10_000, (45.0, 130.0))];
/// How many times faster than Cilium's shape, where there is a target.
const FASTER_THAN_CILIUM: f64 = 5.0;
/// The most that ten times the rules may add: what the noise of two runs does.
const GROWTH: f64 = 1.1;
/// Any buffer that the kernel takes for a run.
const BUFFER: [u8; 64] = [0x45; 64];

/// Of the bench's object.
const PROGRAMS_V4: [&str; 5] = ["ends_only", "lookup", "lpm_v4", "cilium_v4", "pair_v4"];
const PROGRAMS_V6: [&str; 5] = ["ends_only", "lookup", "lpm_v6", "cilium_v6", "pair_v6"];

pub(super) fn sizes(effort: Effort) -> &'static [u32] {
    effort.choose(&[100, 1_000, 10_000], &[100])
}

/// Passes through all samples: enough for the median to be steady.
pub(super) fn runs(effort: Effort) -> usize {
    effort.choose(100, 3)
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
    let cidrs = effort.choose(1_000, 100);
    for family in FAMILIES {
        measure_growth(lab, cidrs, family, effort, report)?;
    }
    Ok(())
}

fn measure_size(lab: &mut Lab, size: Size, family: Family, effort: Effort, report: &mut Report) -> Result<()> {
    let what = format!("{}, {} cidrs, {}", family_name(family), thousands(size.cidrs), size.layout.name());
    let target = TARGETS.iter().find(|(cidrs, _)| *cidrs == size.cidrs).map(|(_, both)| of_family(family, *both));
    let name = format!("policy lookup, {what}");
    let scale = Scale::new(size)?;
    let slice = scale.slice(1)?;
    if let Err(refused) = enforce(lab, &slice)? {
        report.push(Row::missing(name, refused.to_string(), "ns").at_most(target));
        return Ok(());
    }
    let mut race = Race::start(lab, &scale, &slice, family, runs(effort))?;
    let shapes = of_family(family, (["lpm_v4", "cilium_v4", "pair_v4"], ["lpm_v6", "cilium_v6", "pair_v6"]));
    let [own, lpm, cilium, pair] = race.run(["lookup", shapes[0], shapes[1], shapes[2]])?;
    report.push(nanoseconds(name, own.cost()).at_most(target));
    report.push(nanoseconds(format!("one LPM lookup, {what}"), lpm.cost()));
    report.push(nanoseconds(format!("Cilium's shape, {what}"), cilium.cost()));
    report.push(nanoseconds(format!("two LPM and a hash, {what}"), pair.cost()));
    let times = ratio(&cilium.beside(&own));
    let times = Row::estimate(format!("Cilium's shape / policy lookup, {what}"), times, "times");
    report.push(if target.is_some() { times.target(Target::AtLeast(FASTER_THAN_CILIUM)) } else { times });
    Ok(())
}

/// The same cidrs with one rule each, and with ten, by turns.
fn measure_growth(lab: &mut Lab, cidrs: u32, family: Family, effort: Effort, report: &mut Report) -> Result<()> {
    let side = |rules_per_cidr| {
        let size = Size::mixed(cidrs, rules_per_cidr, Layout::Dense, Families::One(family));
        let scale = Scale::new(size)?;
        let tables = lower(&scale.slice(1)?, &mut RuleSlots::new()).context("a small network does not fit")?;
        let ends: Vec<Ends> = flows(&scale, family).iter().map(ends).collect();
        anyhow::Ok((tables, ends, Costs::new()))
    };
    let mut sides = [side(1)?, side(10)?];
    let mut programs = Programs::load(lab, &["ends_only", "lookup"])?;
    for _ in 0..runs(effort) {
        for (tables, ends, costs) in &mut sides {
            lab.datapath.switch(tables)?;
            programs.set(INGRESS, map::ENDS, ends)?;
            costs.alone.push(programs.run(INGRESS, "ends_only", &BUFFER)?.0);
            programs.warm_up("lookup", &BUFFER)?;
            costs.with.push(programs.run(INGRESS, "lookup", &BUFFER)?.0);
        }
    }
    let times = ratio(&sides[1].2.beside(&sides[0].2));
    let name = format!("policy lookup, {}, {} cidrs, ten times the rules", family_name(family), thousands(cidrs));
    report.push(Row::estimate(name, times, "times").target(Target::AtMost(GROWTH)));
    Ok(())
}

/// Puts a slice in force, unless the tables have no room for it.
pub(super) fn enforce(lab: &mut Lab, slice: &Slice) -> Result<Result<(), LowerError>> {
    match lower(slice, &mut RuleSlots::new()) {
        Ok(tables) => {
            lab.datapath.switch(&tables)?;
            Ok(Ok(()))
        }
        Err(refused) => Ok(Err(refused)),
    }
}

/// The same questions for every shape.
struct Race {
    programs: Programs,
    /// How many of the samples the policy allows.
    allowed: u32,
    runs: usize,
}

impl Race {
    fn start(lab: &Lab, scale: &Scale, slice: &Slice, family: Family, runs: usize) -> Result<Self> {
        let programs = of_family(family, (PROGRAMS_V4, PROGRAMS_V6));
        let mut programs = Programs::load(lab, &programs)?;
        let flows = flows(scale, family);
        let ends: Vec<Ends> = flows.iter().map(ends).collect();
        programs.set(INGRESS, map::ENDS, &ends)?;
        let allowed = flows.iter().filter(|flow| slice.verdict(flow).action == policy::Action::Allow);
        let allowed = u32::try_from(allowed.count())?;
        fill_others(&mut programs, scale, slice, family, &flows)?;
        Ok(Self { programs, allowed, runs })
    }

    /// What one flow costs each program, which must say of them all what the policy says; but one LPM lookup says nothing.
    fn run<const N: usize>(&mut self, programs: [&str; N]) -> Result<[Costs; N]> {
        for program in programs {
            let passed = self.programs.passed(INGRESS, program, &BUFFER)?;
            ensure!(
                program.starts_with("lpm") || passed == self.allowed,
                "`{program}` lets {passed} of {SAMPLES} flows pass and not {}",
                self.allowed
            );
        }
        self.programs.costs(programs, "ends_only", &BUFFER, self.runs)
    }
}

/// From random partners to the subject: of those whose port is open, every fourth to a closed one.
fn flows(scale: &Scale, family: Family) -> Vec<Flow> {
    let mut draw = Draw::new(3);
    let flow = |_| {
        let partner = &scale.partners[draw.below(scale.partners.len())];
        let flow = scale.flow(partner, family);
        if draw.below(4) == 0 { Flow { port: 9, ..flow } } else { flow }
    };
    (0..SAMPLES).map(flow).collect()
}

fn ends(flow: &Flow) -> Ends {
    Ends {
        source: flow.source.into(),
        destination: flow.destination.into(),
        destination_port: flow.port,
        protocol: flow.protocol,
        family: if flow.source.is_ipv4() { 4 } else { 6 },
        _pad: [0; 4],
    }
}

/// The same policy as others keep it: an identity for each class.
fn fill_others(programs: &mut Programs, scale: &Scale, slice: &Slice, family: Family, flows: &[Flow]) -> Result<()> {
    let classes: BTreeSet<ClassId> = slice.prefixes.values().map(|(class, _)| *class).collect();
    let numbers: HashMap<ClassId, u32> = classes.into_iter().zip(1..).collect();
    let prefixes = || slice.prefixes.iter().map(|(net, (class, _))| (*net, numbers[class]));
    programs.fill_trie(
        map::IDENTITY_V4,
        prefixes().filter_map(|(net, identity)| match net {
            IpNet::V4(net) => Some((net.prefix_len().into(), net.network().octets(), identity)),
            IpNet::V6(_) => None,
        }),
    )?;
    programs.fill_trie(
        map::IDENTITY_V6,
        prefixes().filter_map(|(net, identity)| match net {
            IpNet::V4(_) => None,
            IpNet::V6(net) => Some((net.prefix_len().into(), net.network().octets(), identity)),
        }),
    )?;
    let identity = |address| slice.lookup(address).map_or(0, |(class, _)| numbers[&class]);
    let (direction, protocol) = (1, UDP);
    let services = scale.partners.iter().filter_map(|partner| {
        let identity = identity(partner.address(family));
        match partner.treatment {
            // The identity's 32 bits and the direction's 8.
            Treatment::AnyService => Some((40, Service { identity, direction, ..Service::default() }, 1)),
            Treatment::Port | Treatment::RecordedPort => {
                Some((64, Service { identity, direction, protocol, port: partner.port.to_be_bytes() }, 1))
            }
            Treatment::Replies => None,
        }
    });
    programs.fill_trie(map::POLICY, services)?;
    let pairs = flows.iter().map(|flow| {
        let service = u32::from(flow.protocol) << 16 | u32::from(flow.port);
        let pair = Pair { source: identity(flow.source), destination: identity(flow.destination), service };
        (pair, u32::from(slice.verdict(flow).action == policy::Action::Allow))
    });
    programs.fill_hash(map::PAIRS, pairs)
}
