//! Random networks and flows: the interpreter, the slice, the lowered tables and the loaded program say the same.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP};
use ebpf_common::{EGRESS, INGRESS, reason};
use node::kernel::Datapath;
use node::kernel::datapath::packet::{ACK, Packet};
use policy::{Flow, Network, NodeId, Slice, arbitrary, interpret};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::{DIRECTIONS, Judge, Lab, name};
use node::lower::Tables;

/// Names the seed to repeat a run with.
pub const SEED: &str = "RAMPART_SEED";

/// Networks judged with one seed.
const BATCH: u32 = 25;

/// Judges flows of random networks until the time is over. Panics with the smallest network and flow found that two of
/// the four disagree on, and with the seed.
pub fn agree(lab: &mut Lab, time: Duration) {
    lab.datapath.attach().expect("attached");
    let judge = RefCell::new(lab.judge());
    let lab = RefCell::new(lab);
    let case = |(network, flows): (Network, Vec<(NodeId, Flow)>)| {
        judge_network(&mut lab.borrow_mut(), &mut judge.borrow_mut(), &network, &flows)
    };
    if let Ok(seed) = std::env::var(SEED) {
        let seed = seed.parse().unwrap_or_else(|error| panic!("{SEED}=`{seed}`: {error}"));
        return run_batch(seed, case);
    }
    let (started, first) = (Instant::now(), rand::random::<u64>());
    let mut batches = 0;
    while started.elapsed() < time {
        run_batch(first.wrapping_add(batches), case);
        batches += 1;
    }
    println!("{} networks with {SEED}={first} and the numbers after it", batches * u64::from(BATCH));
}

fn run_batch(seed: u64, case: impl Fn((Network, Vec<(NodeId, Flow)>)) -> Result<(), TestCaseError>) {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases: BATCH, failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    if let Err(error) = runner.run(&network_and_flows(), case) {
        panic!("{error}\nrepeat with {SEED}={seed}");
    }
}

fn network_and_flows() -> impl Strategy<Value = (Network, Vec<(NodeId, Flow)>)> {
    arbitrary::network().prop_flat_map(|network| {
        let flows = match arbitrary::flow_at(&network) {
            Some(flow) => prop::collection::vec(flow, 1..60).boxed(),
            None => Just(Vec::new()).boxed(),
        };
        (Just(network), flows)
    })
}

fn judge_network(
    lab: &mut Lab,
    judge: &mut Judge,
    network: &Network,
    flows: &[(NodeId, Flow)],
) -> Result<(), TestCaseError> {
    let mut flows = flows.to_vec();
    flows.sort_by_key(|(node, _)| *node);
    for at_node in flows.chunk_by(|(a, _), (b, _)| a == b) {
        let (slice, tables) = lab.enforce(network, at_node[0].0);
        judge.slots = tables.rule_slots.values().copied().collect();
        let read = node::kernel::Inspect::read_tables(&mut lab.datapath).expect("read back");
        prop_assert_eq!(tables.differences(&read), Vec::<String>::new(), "what was read back");
        for (_, flow) in at_node.iter().filter(|(_, flow)| can_be_sent(flow)) {
            for direction in DIRECTIONS {
                judge_flow(judge, network, &slice, &tables, flow, direction)?;
            }
        }
    }
    Ok(())
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

fn judge_flow(
    judge: &mut Judge,
    network: &Network,
    slice: &Slice,
    tables: &Tables,
    flow: &Flow,
    direction: u32,
) -> Result<(), TestCaseError> {
    let at = name(direction);
    let lowered = tables.verdict(flow, direction);
    let own = if direction == EGRESS { flow.source } else { flow.destination };
    if lowered.reason != reason::SCOPE {
        prop_assert_eq!(lowered.reason != reason::NOT_LOCAL, slice.stands_for(own), "{} at {}", flow, at);
        if lowered.reason != reason::NOT_LOCAL {
            let expected = interpret(network, flow);
            prop_assert_eq!(slice.verdict(flow), expected, "slice, {} at {}", flow, at);
            prop_assert_eq!(tables.in_policy(&lowered), Some(expected), "tables, {} at {}", flow, at);
        }
    }

    judge.probe.forget().expect("no records");
    let opening = Packet::opening(flow);
    let seen = judge.packet(direction, &opening);
    prop_assert_eq!(reason::name(seen.reason), reason::name(lowered.reason), "program, {} at {}", flow, at);
    prop_assert_eq!((seen.passes, seen.rule), (lowered.passes, lowered.rule), "program, {} at {}", flow, at);

    // The answer, at the other hook of the same node.
    if !slice.stands_for(own) || lowered.reason == reason::SCOPE {
        return Ok(());
    }
    let reply = opening.reply().with_flags(ACK);
    let service = if matches!(flow.protocol, TCP | UDP | ICMP | ICMPV6) { reply.destination_port } else { 0 };
    let reversed =
        Flow { source: reply.source, destination: reply.destination, protocol: flow.protocol, port: service };
    if !can_be_sent(&reversed) {
        return Ok(());
    }
    let back = EGRESS + INGRESS - direction;
    let by_rules = tables.verdict(&reversed, back);
    let answers = match flow.protocol {
        ICMP => flow.port == 8,
        ICMPV6 => flow.port == 128,
        _ => true,
    };
    let expected = if !by_rules.passes && seen.passes && answers {
        (reason::REPLY, seen.rule)
    } else {
        (by_rules.reason, by_rules.rule)
    };
    let answered = judge.packet(back, &reply);
    prop_assert_eq!(
        reason::name(answered.reason),
        reason::name(expected.0),
        "the answer to {} at {}",
        flow,
        name(back)
    );
    prop_assert_eq!(answered.rule, expected.1, "the answer to {} at {}", flow, name(back));
    Ok(())
}
