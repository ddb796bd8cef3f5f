//! Lowered tables against the slice, and the slice against the interpreter.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ebpf_common::packet::{TCP, UDP, highest_port};
use ebpf_common::table::{
    BLOCK, EXTERNAL, Few, HOLDER_SHIFT, INDEX, LOCAL, Leaf, PATH, UNIFORM, UNKNOWN, block_entry, block_of,
};
use ebpf_common::{EGRESS, INGRESS, reason};
use policy::{
    Action, Change, Flow, Matrix, Network, NodeId, Revision, Slice, arbitrary, interpret, parse_flow_service,
};
use proptest::prelude::*;

use super::{LowerError, RuleSlots, Tables, lower};

mod following;
mod holders;
mod laws;
mod room;

fn slice_of(network: &Network, node: NodeId) -> Slice {
    let matrix = Matrix::compile(network).expect("within limits");
    matrix.slice(node, Revision(7)).expect("an active node")
}

fn lowered(slice: &Slice) -> Tables {
    let tables = lower(slice, &mut RuleSlots::new()).expect("within limits");
    tables.check().expect("whole");
    tables
}

/// A network with flows that an active node has an end of.
fn network_and_flows() -> impl Strategy<Value = (Network, Vec<(NodeId, Flow)>)> {
    arbitrary::network().prop_flat_map(|network| {
        let flows = match arbitrary::flow_at(&network) {
            Some(flow) => prop::collection::vec(flow, 1..60).boxed(),
            None => Just(Vec::new()).boxed(),
        };
        (Just(network), flows)
    })
}

fn reversed(flow: &Flow) -> Flow {
    Flow { source: flow.destination, destination: flow.source, ..*flow }
}

/// The flows of each node, with its slice and tables.
fn by_node(network: &Network, flows: &[(NodeId, Flow)]) -> Vec<(Slice, Tables, Vec<Flow>)> {
    let matrix = Matrix::compile(network).expect("within limits");
    let nodes: BTreeSet<NodeId> = flows.iter().map(|(node, _)| *node).collect();
    nodes
        .into_iter()
        .map(|node| {
            let slice = matrix.slice(node, Revision(7)).expect("an active node");
            let tables = lowered(&slice);
            (slice, tables, flows.iter().filter(|(of, _)| *of == node).map(|(_, flow)| *flow).collect())
        })
        .collect()
}

/// A page that says what it says twice says the same. Asked of the services about the ends of each range and each run.
fn check_pages(tables: &Tables) -> Result<(), TestCaseError> {
    let at_ends = || (0..=u8::MAX).flat_map(|protocol| [(protocol, 0), (protocol, highest_port(protocol))]);
    let in_runs = || (0..=u8::MAX).flat_map(|high| [0, 255].map(|low| u16::from(high) << 8 | low));
    for page in tables.pages.iter().filter(|page| page.few.known != 0) {
        let starts = page.few.starts.iter().filter(|start| **start != Few::NO_START);
        let about = starts.flat_map(|start| [start - 1, *start, start + 1]);
        let services = about.map(|service| ((service >> 16) as u8, service as u16));
        let ported = in_runs().flat_map(|port| [TCP, UDP].map(|protocol| (protocol, port)));
        for (protocol, port) in services.chain(at_ends()).chain(ported) {
            if port > highest_port(protocol) {
                continue;
            }
            let ranges = page.few.decision(u32::from(protocol) << 16 | u32::from(port));
            let runs = tables.decision_in_runs(page, protocol, port);
            prop_assert_eq!(ranges, runs, "protocol {} port {}: {:?}", protocol, port, page.few);
        }
    }
    Ok(())
}

/// What each direction must say of a flow.
fn check_flow(network: &Network, slice: &Slice, tables: &Tables, flow: &Flow) -> Result<(), TestCaseError> {
    let expected = interpret(network, flow);
    for (direction, own) in [(EGRESS, flow.source), (INGRESS, flow.destination)] {
        let outcome = tables.verdict(flow, direction);
        if outcome.reason == reason::SCOPE {
            continue;
        }
        prop_assert_eq!(outcome.reason != reason::NOT_LOCAL, slice.stands_for(own), "locality of {} in {}", own, flow);
        if outcome.reason == reason::NOT_LOCAL {
            continue;
        }
        prop_assert_eq!(slice.verdict(flow), expected, "slice on {}", flow);
        prop_assert_eq!(tables.in_policy(&outcome), Some(expected), "tables on {}: {:?}", flow, outcome);
        let rule = expected.rule.and_then(|rule| slice.rules.get(&rule));
        prop_assert_eq!(outcome.log, rule.is_some_and(|rule| rule.log));
        if outcome.passes && !outcome.record {
            prop_assert_eq!(interpret(network, &reversed(flow)).action, Action::Allow, "{} has no record", flow);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn tables_say_what_the_interpreter_says((network, flows) in network_and_flows()) {
        for (slice, tables, flows) in by_node(&network, &flows) {
            check_pages(&tables)?;
            for flow in flows {
                check_flow(&network, &slice, &tables, &flow)?;
                check_flow(&network, &slice, &tables, &reversed(&flow))?;
            }
        }
    }

    #[test]
    fn an_address_is_in_the_tables_what_it_is_in_the_slice((network, flows) in network_and_flows()) {
        for (slice, tables, flows) in by_node(&network, &flows) {
            let ends = slice.prefixes.keys().flat_map(|net| [net.network(), net.broadcast()]);
            let own = slice.own_classes();
            for address in ends.chain(flows.iter().flat_map(|flow| [flow.source, flow.destination])) {
                let leaf = tables.leaf(address).expect("whole");
                let cidr = slice.lookup(address).map_or(0, |(_, cidr)| cidr.0);
                prop_assert_eq!((leaf.cidr, leaf.flags & LOCAL != 0), (cidr, slice.stands_for(address)), "{}", address);
                if let Some((class, _)) = slice.lookup(address) {
                    prop_assert_eq!(own.contains(&class), (1..=tables.header.own).contains(&leaf.class), "{} is own", address);
                }
            }
        }
    }

    #[test]
    fn counters_stay_with_their_rules_while_the_policy_changes((mut network, changes) in arbitrary::history(12)) {
        let mut slots = RuleSlots::new();
        for change in changes {
            let _refused = network.apply(&change);
            let Some(node) = network.nodes().values().find(|node| node.state == policy::NodeState::Active) else { continue };
            let slice = slice_of(&network, node.id);
            let before = slots.pairs();
            let tables = lower(&slice, &mut slots).expect("within limits");
            tables.check().expect("whole");
            prop_assert_eq!(tables.rule_slots.keys().collect::<Vec<_>>(), slice.rules.keys().collect::<Vec<_>>());
            for (rule, slot) in &before {
                prop_assert_eq!(slots.pairs().get(rule).copied(), Some(*slot), "no slot moves");
            }
            let distinct: BTreeSet<u32> = slots.pairs().into_values().collect();
            prop_assert_eq!(distinct.len(), slots.pairs().len(), "no slot is shared");
        }
    }

    #[test]
    fn a_cell_reads_back_as_it_was_lowered((network, flows) in network_and_flows()) {
        let Some((_, tables, flows)) = by_node(&network, &flows).pop() else { return Ok(()) };
        let class = |leaf: Option<ebpf_common::table::Leaf>| leaf.map(|leaf| leaf.class).expect("whole");
        for flow in flows.iter().take(3) {
            let (source, destination) = (class(tables.leaf(flow.source)), class(tables.leaf(flow.destination)));
            if source == 0 || destination == 0 || source > tables.header.own {
                continue;
            }
            let cell = tables.cell(EGRESS, source, destination).expect("known classes");
            let entry = cell.entries.iter().find(|(range, _)| {
                range.protocol == flow.protocol && (range.low..=range.high).contains(&flow.port)
            });
            let decision = entry.map_or(cell.otherwise, |(_, decision)| *decision);
            let verdict = interpret(&network, flow);
            prop_assert_eq!(decision.verdict == 1, verdict.action == Action::Allow);
            prop_assert_eq!(tables.rule_of(decision.rule), verdict.rule);
            prop_assert!(cell.entries.is_sorted_by_key(|(range, _)| (range.protocol, range.low)));
        }
    }
}

/// A network whose node `n0` is at 10.42.1.1 and fd42:0:0:1::1.
fn small() -> Network {
    let roots = ["10.42.0.0/16", "fd42::/48"].map(|net| net.parse().expect("a prefix"));
    let roots = policy::Prefixes::from_nets(roots).expect("one of each");
    let mut network =
        Network::new("corp".parse().expect("a name"), roots, policy::DefaultPolicy::Deny).expect("no objects");
    for (name, prefixes) in [("web", ["10.42.1.0/24", "fd42:0:0:1::/64"]), ("db", ["10.42.2.0/24", "fd42:0:0:2::/64"])]
    {
        apply(
            &mut network,
            Change::AddCidr {
                name: name.parse().expect("a name"),
                prefixes: policy::Prefixes::from_nets(prefixes.map(|net| net.parse().expect("a prefix")))
                    .expect("both"),
                isolated: false,
                external: false,
            },
        );
    }
    join(&mut network, "n0", "web", None, 7);
    network
}

/// Adds an active node, which may be a gateway.
fn join(network: &mut Network, name: &str, cidr: &str, gateway_for: Option<&str>, key: u8) {
    let name: policy::NodeName = name.parse().expect("a name");
    apply(
        network,
        Change::AddNode {
            name: name.clone(),
            cidr: cidr.parse().expect("a name"),
            addresses: None,
            groups: Vec::new(),
            gateway_for: gateway_for.iter().map(|name| name.parse().expect("a name")).collect(),
        },
    );
    let public_key = policy::PublicKey::try_from([key; 32].as_slice()).expect("a key");
    apply(network, Change::ActivateNode { name, public_key });
}

fn apply(network: &mut Network, change: Change) {
    network.apply(&change).expect("a valid change");
}

fn allow(name: &str, from: &str, to: &str, service: &str) -> Change {
    Change::AddRule(policy::RuleSpec {
        name: name.parse().expect("a name"),
        action: Action::Allow,
        from: vec![from.parse().expect("a selector")],
        to: vec![to.parse().expect("a selector")],
        services: vec![service.parse().expect("a service")],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    })
}

fn node(network: &Network) -> NodeId {
    *network.nodes().keys().next().expect("one node")
}

#[test]
fn an_empty_policy_denies_and_has_no_pages() {
    let network = small();
    let tables = lowered(&slice_of(&network, node(&network)));
    assert!(tables.pages.is_empty() && tables.ports.is_empty());
    assert_eq!(tables.decisions.len(), 1);
    assert!(tables.matrix.iter().all(|cell| *cell == UNIFORM));
}

#[test]
fn equal_sets_of_services_share_a_page_and_runs_of_ports() {
    let mut network = small();
    apply(&mut network, allow("r1", "cidr:web", "cidr:db", "tcp/443"));
    let tables = lowered(&slice_of(&network, node(&network)));
    assert_eq!(tables.pages.len(), 1, "one for the pair, whatever the direction");
    assert_eq!(tables.ports.len(), 2, "all denied, and the run of port 443");
    assert_eq!(tables.decisions.len(), 2);
    let flow = |service: &str, source: &str, destination: &str| {
        let (protocol, port) = parse_flow_service(service).expect("a service");
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        Flow { source: address(source), destination: address(destination), protocol, port }
    };
    for (service, passes) in
        [("tcp/443", true), ("tcp/442", false), ("tcp/444", false), ("tcp/699", false), ("udp/443", false)]
    {
        for (source, destination) in [("10.42.1.1", "10.42.2.9"), ("fd42:0:0:1::1", "fd42:0:0:2::9")] {
            let outcome = tables.verdict(&flow(service, source, destination), EGRESS);
            assert_eq!(outcome.passes, passes, "{service}");
            assert_eq!(outcome.record, passes, "replies need a record");
        }
    }
    let foreign = tables.verdict(&flow("tcp/443", "10.42.1.2", "10.42.2.9"), EGRESS);
    assert_eq!(foreign.reason, reason::NOT_LOCAL, "another node of the same class is not this node");
}

#[test]
fn a_sparse_address_costs_one_path_below_its_root() {
    let network = small();
    let tables = lowered(&slice_of(&network, node(&network)));
    let follow = |entry: u32| {
        assert_eq!(entry & (BLOCK | PATH), PATH, "{entry:#x}");
        let path = &tables.paths[(entry & INDEX) as usize];
        let mask = u128::from_be_bytes(path.mask.to_bytes());
        (mask.leading_ones(), path.inside, path.outside)
    };
    let (bits, inside, outside) = follow(tables.header.root_v6);
    assert_eq!((bits, outside), (48, UNKNOWN), "the network's root");
    // fd42:0:0:1::/64 and fd42:0:0:2::/64 differ in byte 7; byte 6 is skipped.
    let (bits, block, _) = follow(inside);
    assert_eq!(bits, 56);
    assert_eq!(block_of(block).1, 7);
    // The node's own /128 in the first.
    let (bits, leaf, around) = follow(tables.blocks[block_of(block).0 as usize].entries[1]);
    assert_eq!(bits, 128);
    assert_eq!(tables.leaves[leaf as usize].flags, LOCAL);
    assert_eq!(tables.leaves[around as usize].flags, 0);
    assert_eq!(tables.blocks.len(), 2, "one of each family");
}

#[test]
fn tables_that_contradict_themselves_are_found() {
    let mut network = small();
    apply(&mut network, allow("r1", "cidr:web", "cidr:db", "tcp/443"));
    let whole = lowered(&slice_of(&network, node(&network)));
    type Break = fn(&mut Tables);
    let breaks: [(&str, Break); 24] = [
        ("HEADER", |tables| tables.header.root_v4 = PATH | tables.paths.len() as u32),
        ("HEADER", |tables| tables.header.root_v4 = tables.header.root_v6),
        ("HEADER", |tables| tables.header.root_v6 = BLOCK | PATH | 3),
        ("HEADER", |tables| tables.header.own = tables.header.classes),
        ("HEADER", |tables| tables.header.revision += 1),
        ("BLOCKS", |tables| tables.blocks[0].entries[9] = tables.leaves.len() as u32),
        ("BLOCKS", |tables| tables.blocks[0].entries[9] = block_entry(0, 15)),
        ("BLOCKS", |tables| tables.blocks[0].entries[9] = block_entry(tables.blocks.len() as u32, 15)),
        ("PATHS", |tables| tables.paths[0].outside = 99),
        ("PATHS", |tables| tables.paths[0].inside = PATH),
        ("PATHS", |tables| tables.paths[0].mask.0[1] = 0),
        ("LEAVES", |tables| tables.leaves[1].class = tables.header.classes),
        ("LEAVES", |tables| tables.leaves[1].flags = 4),
        ("LEAVES", |tables| tables.leaves[1].flags = EXTERNAL | LOCAL),
        ("LEAVES", |tables| tables.leaves.push(Leaf { class: 0, cidr: 0, flags: EXTERNAL })),
        ("LEAVES", |tables| tables.leaves[1].flags = 1 << HOLDER_SHIFT | LOCAL),
        ("LEAVES", |tables| tables.leaves.push(Leaf { class: 0, cidr: 0, flags: 1 << HOLDER_SHIFT })),
        ("MATRIX", |tables| tables.matrix[0] = 7),
        ("MATRIX", |tables| tables.matrix.push(UNIFORM)),
        ("PAGES", |tables| tables.pages[0].udp[255] = 2),
        ("PAGES", |tables| tables.pages[0].few.known = 2),
        ("PAGES", |tables| tables.pages[0].few.starts[6] = 1),
        ("PAGES", |tables| tables.pages[0].few.decisions[7] = tables.decisions.len() as u16),
        ("DECISIONS", |tables| tables.decisions[1].rule = ebpf_common::limit::RULES),
    ];
    for (table, break_it) in breaks {
        let mut broken = whole.clone();
        break_it(&mut broken);
        assert_eq!(broken.check().expect_err(table).table, table);
        assert!(!whole.differences(&broken).is_empty(), "{table}");
    }
    assert!(whole.differences(&whole).is_empty());
}

#[test]
fn a_few_services_are_ranges_on_one_line_and_many_are_runs() {
    let ranges = |services: &[&str]| {
        let mut network = small();
        for (number, service) in services.iter().enumerate() {
            apply(&mut network, allow(&format!("r{number}"), "cidr:web", "cidr:db", service));
        }
        let tables = lowered(&slice_of(&network, node(&network)));
        check_pages(&tables).expect("ranges and runs agree");
        let few = tables.pages[0].few;
        (few.known != 0).then(|| 1 + few.starts.iter().filter(|start| **start != Few::NO_START).count())
    };
    assert_eq!(ranges(&["tcp/443"]), Some(3));
    assert_eq!(ranges(&["tcp/8000-8999"]), Some(3));
    assert_eq!(ranges(&["tcp"]), Some(3));
    assert_eq!(ranges(&["tcp/443", "udp/53", "icmp/8"]), Some(7));
    assert_eq!(ranges(&["tcp/443", "udp/53", "icmp/8", "proto/255"]), Some(8));
    assert_eq!(ranges(&["tcp/1", "tcp/3", "udp/53", "icmp/8"]), None, "nine");
}

#[test]
fn a_rule_that_the_slice_does_not_carry_is_refused_and_no_slot_taken() {
    let mut network = small();
    apply(&mut network, allow("r1", "cidr:web", "cidr:db", "tcp/443"));
    let mut slice = slice_of(&network, node(&network));
    let rule = *slice.rules.keys().next().expect("one rule");
    slice.rules.clear();
    let mut slots = RuleSlots::new();
    assert_eq!(lower(&slice, &mut slots), Err(LowerError::UnknownRule(rule)));
    assert_eq!(slots, RuleSlots::new());
}

#[test]
fn limits_of_the_policy_fit_the_tables() {
    use ebpf_common::limit;
    use policy::limit::*;
    let fits = [
        ("blocks", MAX_SLICE_BLOCKS, limit::BLOCKS),
        ("paths", MAX_SLICE_PATHS, limit::PATHS),
        ("leaves", MAX_SLICE_LEAVES, limit::LEAVES),
        ("cells in two directions", MAX_SLICE_CELLS, limit::CELLS),
        ("rules", MAX_SLICE_RULES, limit::RULES),
        ("decisions", MAX_SLICE_DECISIONS, limit::DECISIONS),
        ("pages", MAX_SLICE_PAGES, limit::PAGES),
        ("runs of ports", MAX_SLICE_PORTS, limit::PORTS),
    ];
    for (what, policy, tables) in fits {
        assert!(policy <= tables as usize, "{what}: {policy} > {tables}");
    }
}
