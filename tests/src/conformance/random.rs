//! Random networks and packets: the interpreter, the matrix, the slice, the lowered tables and the loaded program say the
//! same.
//!
//! A verdict here is one packet that a loaded program judged at one hook, held against the tables walked in userspace
//! (reason, rule and whether it passes); and where the policy speaks of it, these against the interpreter, the matrix and
//! the slice. XDP sees every packet that TC ingress sees, before it: what it drops must be dropped there for the same reason,
//! and it must drop all that the tables deny of the first packet of a flow and of the answer to one that was denied. Some flows
//! come in fragments too, and of some come ICMP errors ([`deviant`]). What only userspace compares is not counted.

mod deviant;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use ebpf_common::counter::{LOSS_EVENT_FULL, LOSS_FLOW};
use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP};
use ebpf_common::{EGRESS, INGRESS, reason};
use node::kernel::datapath::Probe;
use node::kernel::datapath::packet::{ACK, Packet};
use node::kernel::inspect::{Counters, Probed};
use node::kernel::{Datapath, Inspect, KernelError};
use node::lower::{Outcome, Tables, lower};
use policy::{Flow, Matrix, Network, NodeId, NodeState, Revision, Slice, Verdict, arbitrary, interpret};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use self::deviant::{Deviant, Deviation, deviants};
use super::shrink::{InWords, shrink};
use super::{Lab, name};

/// Names the seed to repeat one network with.
pub const SEED: &str = "RAMPART_SEED";

/// Where packets are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    pub name: &'static str,
    /// Which end of a packet is this node's, and the copy of the policy's matrix that is asked.
    pub direction: u32,
}

/// Where flows are opened. XDP is asked ahead of TC ingress.
pub const HOOKS: [Hook; 2] =
    [Hook { name: "tc ingress", direction: INGRESS }, Hook { name: "tc egress", direction: EGRESS }];

/// Flows of one node of one network; each is asked about at every hook, in both directions.
const FLOWS: usize = 800;
/// Nodes of one network whose slices are enforced, at most.
const NODES: usize = 3;
/// Flows after which the probe's records are deleted: fewer than it has room for.
const FORGET: usize = 500;

/// How long to go on.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    Verdicts(u64),
    Time(Duration),
    /// One network, that of the seed.
    Seed(u64),
}

/// What one side could be made to say instead of the truth, to see that it is found.
#[derive(Clone, Copy)]
pub struct Sides<'a> {
    pub interpret: &'a (dyn Fn(&Network, &Flow) -> Verdict + Sync),
    /// What is loaded into the kernel for these tables.
    pub load: &'a (dyn Fn(&Tables) -> Tables + Sync),
}

impl Sides<'_> {
    pub const TRUE: Self = Self { interpret: &interpret, load: &Tables::clone };
}

impl fmt::Debug for Sides<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sides")
    }
}

/// What was compared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Agreement {
    pub networks: u64,
    pub flows: u64,
    pub verdicts: u64,
    pub took: Duration,
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { networks, flows, verdicts, took } = *self;
        let rate = verdicts as f64 / took.as_secs_f64().max(0.001);
        write!(
            f,
            "{verdicts} verdicts of the loaded program on {flows} flows of {networks} networks in {:.1} s, {rate:.0}/s",
            took.as_secs_f64()
        )
    }
}

/// Two sides that disagree, on the least network and one flow.
#[derive(Debug)]
pub struct Found {
    pub network: Network,
    pub node: NodeId,
    pub flow: Flow,
    pub hook: Hook,
    pub what: String,
    pub seed: u64,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { network, node, flow, hook, what, seed } = self;
        let node = network.nodes().get(node).map_or_else(|| format!("{node}"), |node| node.name.to_string());
        writeln!(
            f,
            "{what}\npacket {flow} at {} of node {node}\n{}repeat with {SEED}={seed}",
            hook.name,
            InWords(network)
        )
    }
}

/// Judges packets of random networks. An error has the least network and the packet on which two sides disagree.
pub fn agree(lab: &mut Lab, until: Until, sides: Sides<'_>) -> Result<Agreement, Box<Found>> {
    lab.datapath.attach().expect("attached");
    let probe = lab.datapath.new_reporting_probe().expect("a probe");
    let mut bench = Bench { lab, probe, sides, agreement: Agreement::default(), id: rand::random() };
    let started = Instant::now();
    let first = if let Until::Seed(seed) = until { seed } else { rand::random() };
    let goes_on = |agreement: &Agreement| match until {
        Until::Verdicts(wanted) => agreement.verdicts < wanted,
        Until::Time(time) => started.elapsed() < time,
        Until::Seed(_) => agreement.networks == 0,
    };
    while goes_on(&bench.agreement) {
        bench.network(first.wrapping_add(bench.agreement.networks))?;
    }
    bench.agreement.took = started.elapsed();
    println!("{} ({SEED}={first} and the numbers after it)", bench.agreement);
    Ok(bench.agreement)
}

struct Bench<'a> {
    lab: &'a mut Lab,
    probe: Probe,
    sides: Sides<'a>,
    agreement: Agreement,
    /// Of the last datagram in fragments.
    id: u32,
}

/// One flow at one hook.
#[derive(Clone, Copy)]
struct Asked {
    flow: Flow,
    hook: Hook,
    deviation: Deviation,
}

/// A node's policy, in every form but the network's own.
struct Enforced {
    matrix: Matrix,
    slice: Slice,
    tables: Tables,
}

/// What the probe should have counted since its counters were read.
#[derive(Default)]
struct Model {
    reasons: BTreeMap<(u32, u8), u64>,
    rules: BTreeMap<u32, u64>,
}

impl Bench<'_> {
    /// One random network: some of its nodes, many flows of each.
    fn network(&mut self, seed: u64) -> Result<(), Box<Found>> {
        let (network, mut random) = (random_network(seed), StdRng::seed_from_u64(seed));
        self.agreement.networks += 1;
        let active = network.nodes().values().filter(|node| node.state == NodeState::Active).take(NODES);
        for node in active.map(|node| node.id).collect::<Vec<_>>() {
            let flows = random_flows(&network, node, &mut random);
            if let Err((asked, what)) = self.node(&network, node, &flows) {
                return Err(Box::new(self.least(network, node, asked, what, seed)));
            }
        }
        Ok(())
    }

    fn node(&mut self, network: &Network, node: NodeId, flows: &[Flow]) -> Result<(), (Asked, String)> {
        let enforced = self.enforce(network, node);
        let slots: Vec<u32> = enforced.tables.rule_slots.values().copied().collect();
        let before = self.probe.counters(slots.iter().copied()).expect("readable");
        let (mut model, mut ports) = (Model::default(), ports(network));
        for (number, flow) in flows.iter().enumerate() {
            if number % FORGET == 0 {
                self.probe.forget().expect("no records");
            }
            for hook in HOOKS {
                let port = ports.next().expect("there are more ports than packets");
                let asked = Asked { flow: *flow, hook, deviation: Deviation::of(number) };
                self.flow(network, &enforced, &asked, port, &mut model).map_err(|what| (asked, what))?;
            }
        }
        self.agreement.flows += flows.len() as u64;
        let after = self.probe.counters(slots).expect("readable");
        model.check(&before, &after);
        Ok(())
    }

    fn enforce(&mut self, network: &Network, node: NodeId) -> Enforced {
        let matrix = Matrix::compile(network).expect("within limits");
        self.lab.revision += 1;
        let slice = matrix.slice(node, Revision(self.lab.revision)).expect("an active node");
        let tables = lower(&slice, &mut self.lab.slots).expect("within limits");
        let loaded = (self.sides.load)(&tables);
        self.lab.datapath.switch(&loaded).expect("switched");
        let read = self.lab.datapath.read_tables().expect("read back");
        assert_eq!(loaded.differences(&read), Vec::<String>::new(), "what was read back");
        let slots = tables.rule_slots.iter().map(|(rule, slot)| (*rule, *slot)).collect();
        let verification = node::verify::verify(&slice, &read, &slots);
        assert!(loaded != tables || verification.is_equal(), "{verification:?}");
        Enforced { matrix, slice, tables }
    }

    /// One flow at one hook: its first packet, the answer at the opposite hook, then packets that belong to no flow.
    fn flow(
        &mut self,
        network: &Network,
        enforced: &Enforced,
        asked: &Asked,
        port: u16,
        model: &mut Model,
    ) -> Result<(), String> {
        let Enforced { matrix, slice, tables } = enforced;
        let Asked { flow, hook, deviation } = asked;
        let lowered = tables.verdict(flow, hook.direction);
        let own = if hook.direction == EGRESS { flow.source } else { flow.destination };
        if lowered.reason != reason::SCOPE {
            let stands = slice.stands_for(own);
            if (lowered.reason != reason::NOT_LOCAL) != stands {
                let is = if stands { "is" } else { "is not" };
                return Err(format!("the tables say {}, the slice that {own} {is} this node's", said(&lowered)));
            }
            if stands {
                let expected = (self.sides.interpret)(network, flow);
                let others = [
                    ("matrix", Some(matrix.verdict(flow))),
                    ("slice", Some(slice.verdict(flow))),
                    ("tables", tables.in_policy(&lowered)),
                ];
                for (side, verdict) in others {
                    if verdict != Some(expected) {
                        let verdict = verdict.map_or_else(|| said(&lowered), |verdict| verdict.to_string());
                        return Err(format!("the interpreter says {expected}, the {side} {verdict}"));
                    }
                }
            }
        }
        let opening = Packet::opening(flow).with_source_port(port);
        let is_portless = !matches!(flow.protocol, TCP | UDP | ICMP | ICMPV6);
        if is_portless {
            // Another flow of these addresses would have this one's record.
            self.probe.forget().expect("no records");
        }
        let (seen, early) = self.judge(&opening.to_bytes(), hook.direction, slice, model)?;
        if !is(&seen, &lowered) {
            return Err(format!("the program says {}, the tables {}", probed(&seen), said(&lowered)));
        }
        // Nothing is recorded of it yet, so that the tables alone decide.
        if hook.direction == INGRESS && early.is_none() != lowered.passes {
            let early = early.map_or_else(|| "pass".to_owned(), |early| probed(&early));
            return Err(format!("xdp says {early}, the tables {}", said(&lowered)));
        }
        if !slice.stands_for(own) || lowered.reason == reason::SCOPE {
            return Ok(());
        }
        let reply = opening.reply().with_flags(ACK);
        let reversed = Flow {
            source: reply.source,
            destination: reply.destination,
            protocol: flow.protocol,
            port: if is_portless { 0 } else { reply.destination_port },
        };
        if !can_be_sent(&reversed) {
            return Ok(());
        }
        let back = EGRESS + INGRESS - hook.direction;
        let by_rules = tables.verdict(&reversed, back);
        let is_answer = match flow.protocol {
            ICMP => flow.port == 8,
            ICMPV6 => flow.port == 128,
            _ => true,
        };
        let expected = if !by_rules.passes && seen.passes && is_answer {
            Outcome { passes: true, reason: reason::REPLY, rule: seen.rule, ..by_rules }
        } else {
            by_rules
        };
        let (answered, early) = self.judge(&reply.to_bytes(), back, slice, model)?;
        if !is(&answered, &expected) {
            let at = name(back);
            return Err(format!(
                "the program says {} of the answer at {at}, and should {}",
                probed(&answered),
                said(&expected)
            ));
        }
        if back == INGRESS && early.is_none() && !expected.passes && !seen.passes {
            return Err(format!(
                "xdp lets the answer pass, of which nothing is recorded; it is to {}",
                said(&expected)
            ));
        }
        if *deviation != Deviation::None {
            self.id = self.id.wrapping_add(1);
            let deviants = deviants(*deviation, network, flow, &lowered, (hook.direction, self.id));
            self.deviate(deviants, slice, model)?;
        }
        Ok(())
    }

    fn deviate(&mut self, deviants: Vec<Deviant>, slice: &Slice, model: &mut Model) -> Result<(), String> {
        self.probe.forget().expect("no records");
        for Deviant { what, direction, bytes, expected } in deviants {
            let (seen, early) = self.judge(&bytes, direction, slice, model)?;
            if !is(&seen, &expected) {
                let at = name(direction);
                return Err(format!(
                    "the program says {} of {what} at {at}, and should {}",
                    probed(&seen),
                    said(&expected)
                ));
            }
            if let Some(early) = early {
                return Err(format!("xdp says {} of {what}, which is the classifier's to judge", probed(&early)));
            }
        }
        Ok(())
    }

    /// What the program says, and at ingress what XDP said before it: a drop there must be the program's own verdict.
    fn judge(
        &mut self,
        bytes: &[u8],
        direction: u32,
        slice: &Slice,
        model: &mut Model,
    ) -> Result<(Probed, Option<Probed>), String> {
        let failed = |error: KernelError| format!("{error}: {:?}", std::error::Error::source(&error));
        let mut early = None;
        if direction == INGRESS {
            early = self.probe.report_early(bytes).map_err(failed)?;
            self.agreement.verdicts += 1;
        }
        let (seen, event) = self.probe.report(direction, bytes).map_err(failed)?;
        self.agreement.verdicts += 1;
        if event.revision != slice.revision.0 {
            return Err(format!("the program judged by revision {}, not {}", event.revision, slice.revision));
        }
        if let Some(early) = early
            && early != seen
        {
            return Err(format!("xdp says {}, tc ingress {}", probed(&early), probed(&seen)));
        }
        for seen in early.iter().chain([&seen]) {
            *model.reasons.entry((direction, seen.reason)).or_default() += 1;
            if let Some(rule) = seen.rule {
                *model.rules.entry(rule).or_default() += 1;
            }
        }
        Ok((seen, early))
    }

    /// The least network in which this packet divides the sides.
    fn least(&mut self, network: Network, node: NodeId, asked: Asked, what: String, seed: u64) -> Found {
        let Asked { flow, hook, .. } = asked;
        let mut last = what;
        let mut fails = |network: &Network| {
            if network.nodes().get(&node).is_none_or(|node| node.state != NodeState::Active) {
                return None;
            }
            let enforced = self.enforce(network, node);
            self.probe.forget().expect("no records");
            let port = ports(network).next().expect("a port");
            self.flow(network, &enforced, &asked, port, &mut Model::default()).err()
        };
        if fails(&network).is_none() {
            last.push_str("; only after the flows before it, so that the policy could not be shrunk");
            return Found { network, node, flow, hook, what: last, seed };
        }
        let network = shrink(network, |network| match fails(network) {
            Some(what) => {
                last = what;
                true
            }
            None => false,
        });
        Found { network, node, flow, hook, what: last, seed }
    }
}

impl Model {
    /// Panics unless the probe counted what was judged, and had room for all.
    fn check(&self, before: &Counters, after: &Counters) {
        let moved = |key: &(u32, u8)| after.reasons[key].packets - before.reasons[key].packets;
        let reasons: BTreeMap<(u32, u8), u64> =
            after.reasons.keys().map(|key| (*key, moved(key))).filter(|(_, packets)| *packets > 0).collect();
        assert_eq!(reasons, self.reasons, "packets by direction and reason");
        for (slot, counter) in &after.rules {
            let packets = counter.packets - before.rules[slot].packets;
            assert_eq!(packets, self.rules.get(slot).copied().unwrap_or(0), "packets of rule slot {slot}");
        }
        for loss in [LOSS_FLOW, LOSS_EVENT_FULL] {
            assert_eq!(after.losses[loss as usize], before.losses[loss as usize], "loss {loss}");
        }
    }
}

fn random_network(seed: u64) -> Network {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, rng);
    arbitrary::network().new_tree(&mut runner).expect("no network is rejected").current()
}

/// Flows with an end at the node, between addresses and of services that matter to the network.
fn random_flows(network: &Network, node: NodeId, random: &mut StdRng) -> Vec<Flow> {
    let own = arbitrary::stood_for(network, &network.nodes()[&node]);
    let (all, points) = (arbitrary::addresses(network), arbitrary::points(network));
    let mut flows = Vec::with_capacity(FLOWS);
    while flows.len() < FLOWS {
        let own = own[random.random_range(0..own.len())];
        let other = all[random.random_range(0..all.len())];
        let (protocol, port) = points[random.random_range(0..points.len())];
        let (source, destination) = if random.random() { (own, other) } else { (other, own) };
        let flow = Flow { source, destination, protocol, port };
        if can_be_sent(&flow) {
            flows.push(flow);
        }
    }
    flows
}

/// Source ports that no service of the network has: with one for each packet no two flows have one record.
fn ports(network: &Network) -> impl Iterator<Item = u16> + use<> {
    let taken: Vec<u16> = arbitrary::points(network).into_iter().map(|(_, port)| port).collect();
    (1..u16::MAX).filter(move |port| !taken.contains(port))
}

/// Whether a packet of the flow exists and is judged by the rules alone.
fn can_be_sent(flow: &Flow) -> bool {
    let v4 = flow.source.is_ipv4();
    let is_extension_header = !v4 && matches!(flow.protocol, 0 | 43 | 44 | 60 | 135);
    let is_icmp_error = match flow.protocol {
        ICMP => v4 && matches!(flow.port, 3 | 11 | 12),
        ICMPV6 => !v4 && matches!(flow.port, 1..=4),
        _ => false,
    };
    v4 == flow.destination.is_ipv4() && !is_extension_header && !is_icmp_error
}

fn is(seen: &Probed, expected: &Outcome) -> bool {
    (seen.passes, seen.reason, seen.rule) == (expected.passes, expected.reason, expected.rule)
}

fn said(outcome: &Outcome) -> String {
    in_words(outcome.passes, outcome.reason, outcome.rule)
}

fn probed(probed: &Probed) -> String {
    in_words(probed.passes, probed.reason, probed.rule)
}

fn in_words(passes: bool, reason: u8, rule: Option<u32>) -> String {
    let (verdict, reason) = (if passes { "pass" } else { "drop" }, reason::name(reason));
    match rule {
        Some(slot) => format!("{verdict} ({reason} of slot {slot})"),
        None => format!("{verdict} ({reason})"),
    }
}
