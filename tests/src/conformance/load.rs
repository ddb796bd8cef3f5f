//! Counters, to the packet and to the byte, against a model that knows what was sent: on two processors at full speed, in both
//! directions, while the policy is switched and agents come and go.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use ebpf_common::counter::{Counter, LOSS_FLOW, LOSS_PAIR, PairKey};
use ebpf_common::{EGRESS, INGRESS, reason};
use nix::net::if_::if_nametoindex;
use node::kernel::datapath::packet::Packet;
use node::kernel::inspect::Counters;
use node::kernel::{Datapath, Inspect};
use node::lower::Tables;
use policy::{Action, Flow, Network, Reason, interpret};

use super::network::{ENDS, allowing, flow, lineage, node, small, with_rule};
use super::{DIRECTIONS, INTERFACE, Lab, foreign, on_processor, share};

/// Switches while packets are counted, and every so many of them another agent.
const SWITCHES: u64 = 40;
const AGENT: u64 = 10;
const SENDERS: u64 = 2;

/// One packet and what the model says that is counted of it.
#[derive(Clone)]
struct Shot {
    bytes: Vec<u8>,
    direction: u32,
    reason: u8,
    rule: Option<u32>,
    pair: [u32; 2],
}

fn network() -> Network {
    let network = allowing(lineage(small()), "web", "cidr:db", "cidr:web", "tcp/443");
    let network = allowing(network, "dns", "cidr:web", "cidr:db", "udp/53");
    with_rule(network, "no-telnet", Action::Deny, "cidr:db", "cidr:web", "tcp/23")
}

/// A packet that opens a flow has the fate that the interpreter gives it, if its own end is this node's.
fn of_policy(network: &Network, tables: &Tables, direction: u32, flow: &Flow, length: usize) -> Shot {
    let verdict = interpret(network, flow);
    let reason = match (verdict.reason, verdict.action) {
        (Reason::Rule, Action::Allow) => reason::RULE,
        (Reason::Rule, Action::Deny) => reason::DENY_RULE,
        (Reason::Lineage, _) => reason::LINEAGE,
        (Reason::NoRule, _) => reason::NO_RULE,
        (Reason::UnknownSource, _) => reason::UNKNOWN_SOURCE,
        (Reason::UnknownDestination, _) => reason::UNKNOWN_DESTINATION,
    };
    let packet = Packet { payload: vec![7; length], ..Packet::opening(flow) };
    Shot {
        bytes: packet.to_bytes(),
        direction,
        reason,
        rule: verdict.rule.map(|rule| tables.rule_slots[&rule]),
        pair: [flow.source, flow.destination].map(|address| cidr(tables, address)),
    }
}

fn cidr(tables: &Tables, address: IpAddr) -> u32 {
    tables.leaf(address).expect("whole tables").cidr
}

fn mix(network: &Network, tables: &Tables) -> Vec<Shot> {
    let mut shots = Vec::new();
    for ([web, db, other, lan], [foreign, local]) in
        ENDS.into_iter().zip([["8.8.8.8", "169.254.3.4"], ["2001:4860::8", "fe80::9"]])
    {
        let inward =
            [(db, "tcp/443"), (db, "tcp/23"), (db, "udp/9"), (other, "udp/7"), (foreign, "udp/7"), (lan, "tcp/443")];
        let outward = [(db, "udp/53"), (db, "tcp/25"), (other, "tcp/22"), (foreign, "udp/7"), (lan, "udp/53")];
        for (at, (end, service)) in inward.into_iter().enumerate() {
            shots.push(of_policy(network, tables, INGRESS, &flow(end, web, service), 10 * at));
        }
        for (at, (end, service)) in outward.into_iter().enumerate() {
            shots.push(of_policy(network, tables, EGRESS, &flow(web, end, service), 400 + at));
        }
        let without_rule = |shot: Shot, reason, pair| Shot { reason, rule: None, pair, ..shot };
        // Not of this node.
        for (direction, flow) in [(INGRESS, flow(db, other, "tcp/443")), (EGRESS, flow(other, db, "udp/53"))] {
            let shot = of_policy(network, tables, direction, &flow, 3);
            let pair = shot.pair;
            shots.push(without_rule(shot, reason::NOT_LOCAL, pair));
        }
        for (direction, flow) in [(INGRESS, flow(local, web, "udp/9")), (EGRESS, flow(web, local, "udp/9"))] {
            shots.push(without_rule(of_policy(network, tables, direction, &flow, 5), reason::SCOPE, [0; 2]));
        }
        // Cut short in the middle of the transport header.
        for (direction, flow) in [(INGRESS, flow(db, web, "tcp/443")), (EGRESS, flow(web, db, "udp/53"))] {
            let mut shot = of_policy(network, tables, direction, &flow, 0);
            shot.bytes.truncate(if web.contains(':') { 45 } else { 25 });
            shots.push(without_rule(shot, reason::MALFORMED, [0; 2]));
        }
        // The answer to what is sent at egress, known by its record.
        let asked = flow(web, db, "udp/53");
        let rule = of_policy(network, tables, EGRESS, &asked, 0).rule;
        let bytes = Packet::opening(&asked).reply().to_bytes();
        let pair = [db, web].map(|end| cidr(tables, end.parse().expect("an address")));
        shots.push(Shot { bytes, direction: INGRESS, reason: reason::REPLY, rule, pair });
    }
    shots
}

pub fn is_exact(lab: &mut Lab) {
    lab.silence();
    let network = network();
    let tables = [network.clone(), allowing(network.clone(), "more", "cidr:db", "cidr:web", "udp/4000")]
        .map(|network| lab.lower(&network, node(&network, "web1")).1);
    lab.datapath.attach().expect("attached");
    lab.datapath.switch(&tables[0]).expect("switched");
    let shots = mix(&network, &tables[0]);
    let tun = &lab.tun.try_clone().expect("a descriptor");
    let mut expected = Counters::default();
    // What the answers answer.
    for shot in shots.iter().filter(|shot| shot.direction == EGRESS && shot.reason == reason::RULE) {
        foreign::Out::new(if_nametoindex(INTERFACE).expect("the interface"))
            .expect("a socket")
            .send(&shot.bytes)
            .expect("sent");
        add(&mut expected, shot, 1);
    }
    let over = &AtomicBool::new(false);
    let shots = &shots;
    let rounds: u64 = thread::scope(|scope| {
        let _end = End(over);
        scope.spawn(|| drain(tun, over));
        let senders: Vec<_> =
            (0..SENDERS).map(|cpu| scope.spawn(move || send(tun, cpu as usize, shots, over))).collect();
        for number in 1..=share(SWITCHES) {
            if number % AGENT == 0 {
                lab.restart();
                lab.datapath.attach().expect("taken over");
            }
            lab.datapath.switch(&tables[(number % 2) as usize]).expect("switched");
        }
        over.store(true, Ordering::Release);
        senders.into_iter().map(|sender| sender.join().expect("a sender")).sum()
    });
    for shot in shots {
        add(&mut expected, shot, rounds);
    }
    println!("{} packets", rounds * shots.len() as u64);
    compare(lab, &tables[1], &expected);
    overflows(lab, &network, &tables[0], &mut expected);
}

/// A pair whose slot is taken is counted in another one; a pair without room is counted as lost; all else counts as always.
fn overflows(lab: &mut Lab, network: &Network, tables: &Tables, expected: &mut Counters) {
    // Each processor has its own slots: a pair is new to the other one.
    on_processor(0);
    let of_no_network =
        |number: u32| PairKey { source: number, destination: u32::MAX, direction: 9, ..PairKey::default() };
    let table = lab.pin("maps/PAIR_TABLE");
    let [web, db, other, _] = ENDS[0];
    // Two of pairs that were seen by now, one that was not: the source route.
    let mut shots = [("icmp/8", 3), ("tcp/443", 4)]
        .map(|(service, number)| (of_policy(network, tables, INGRESS, &flow(db, web, service), 8), number))
        .to_vec();
    let mut routed = of_policy(network, tables, INGRESS, &flow(db, web, "tcp/443"), 0);
    let option = [131, 3, 4, 0];
    routed.bytes.splice(20..20, option);
    routed.bytes[0] += 1;
    routed.bytes[3] += option.len() as u8;
    shots.push((Shot { reason: reason::SOURCE_ROUTE, rule: None, pair: [0; 2], ..routed }, 5));
    // The buckets in which a pair is looked for are of every remainder.
    foreign::fill_pairs(&table, of_no_network, |bucket| bucket % 4 == 3).expect("filled");
    for free in [true, false] {
        for (shot, number) in &shots {
            for _ in 0..*number {
                lab.tun.write_all(&shot.bytes).expect("written");
            }
            add(expected, shot, *number);
        }
        compare(lab, tables, expected);
        let filled = foreign::fill_pairs(&table, of_no_network, |_| false).expect("filled");
        assert_eq!(filled > 1_000, free, "{filled} slots were free");
    }
    // Another that was not seen yet.
    let shot = of_policy(network, tables, INGRESS, &flow(other, db, "udp/53"), 3);
    let shot = Shot { reason: reason::NOT_LOCAL, rule: None, ..shot };
    for _ in 0..6 {
        lab.tun.write_all(&shot.bytes).expect("written");
    }
    let before = expected.pairs.clone();
    add(expected, &shot, 6);
    expected.pairs = before;
    expected.losses[LOSS_PAIR as usize] += 6;
    compare(lab, tables, expected);
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Whole rounds of every packet on one processor; returns how many.
fn send(mut tun: &File, cpu: usize, shots: &[Shot], over: &AtomicBool) -> u64 {
    on_processor(cpu);
    let out = foreign::Out::new(if_nametoindex(INTERFACE).expect("the interface")).expect("a socket");
    let mut rounds = 0;
    while !over.load(Ordering::Acquire) {
        for shot in shots {
            if shot.direction == INGRESS {
                tun.write_all(&shot.bytes).expect("written");
            } else {
                out.send(&shot.bytes).expect("sent");
            }
        }
        rounds += 1;
    }
    rounds
}

fn drain(mut tun: &File, over: &AtomicBool) {
    while !over.load(Ordering::Acquire) {
        if foreign::becomes_readable(tun, 10) {
            let _ = tun.read(&mut [0; 2_048]).expect("read");
        }
    }
}

fn add(counters: &mut Counters, shot: &Shot, times: u64) {
    let add = |counter: &mut Counter| {
        counter.packets += times;
        counter.bytes += times * shot.bytes.len() as u64;
        counter.segments += times;
    };
    add(counters.reasons.entry((shot.direction, shot.reason)).or_default());
    if let Some(rule) = shot.rule {
        add(counters.rules.entry(rule).or_default());
    }
    let [source, destination] = shot.pair;
    let key = PairKey { source, destination, direction: shot.direction as u8, reason: shot.reason, _pad: [0; 2] };
    add(counters.pairs.entry(key).or_default());
    counters.losses.resize(LOSS_FLOW as usize + 1, 0);
}

fn compare(lab: &mut Lab, tables: &Tables, expected: &Counters) {
    let slots: Vec<u32> = tables.rule_slots.values().copied().collect();
    let mut counters = lab.datapath.counters(&slots).expect("readable");
    let none = Counter::default();
    counters.reasons.retain(|_, counter| *counter != none);
    counters.rules.retain(|_, counter| *counter != none);
    counters.pairs.retain(|key, _| DIRECTIONS.contains(&key.direction.into()));
    let by_name = |reasons: &BTreeMap<(u32, u8), Counter>| -> BTreeMap<(u32, &str), Counter> {
        reasons.iter().map(|((direction, reason), counter)| ((*direction, reason::name(*reason)), *counter)).collect()
    };
    assert_eq!(by_name(&counters.reasons), by_name(&expected.reasons), "by reason");
    assert_eq!(counters.rules, expected.rules, "by rule");
    assert_eq!(counters.pairs, expected.pairs, "by pair");
    assert_eq!(counters.losses[..expected.losses.len()], expected.losses, "lost pairs and records");
}
