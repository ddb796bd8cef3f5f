//! One slice lowered after the other, against each lowered by itself.

use std::collections::BTreeMap;

use ebpf_common::limit;
use ebpf_common::table::CELL_INDEX;
use proptest::test_runner::TestRunner;

use super::*;
use crate::lower::{Lowering, tree};
use crate::verify::verify;

/// What a node keeps that follows.
struct Follower {
    slice: Slice,
    slots: RuleSlots,
    lowering: Lowering,
    tables: Tables,
}

impl Follower {
    fn new(slice: &Slice) -> Self {
        let slice = Slice::from_snapshot(slice.to_delta()).expect("a sound slice");
        let (mut slots, mut lowering) = (RuleSlots::new(), Lowering::default());
        let tables = lowering.lower(&slice, &mut slots).expect("within limits");
        Self { slice, slots, lowering, tables }
    }

    /// Goes on to a slice that the controller would send; the tables before.
    fn follow(&mut self, next: &Slice) -> Tables {
        let delta = arbitrary::sealed(Some(&self.slice), self.slice.diff(next));
        self.slice.apply(delta).expect("a sound delta");
        let tables = self.lowering.lower(&self.slice, &mut self.slots).expect("within limits");
        std::mem::replace(&mut self.tables, tables)
    }

    /// Whether the tables say what the slice says, and are no larger than they need be.
    fn check(&self) -> Result<(), TestCaseError> {
        let tables = &self.tables;
        tables.check().expect("whole");
        let verification = verify(&self.slice, tables, &self.slots.pairs());
        prop_assert!(verification.is_equal(), "{:?}", verification.differences);
        let mut slots = self.slots.clone();
        let mut anew = Lowering::default();
        let fresh = anew.lower(&self.slice, &mut slots).expect("within limits");
        prop_assert_eq!(&slots, &self.slots, "no rule asks for another counter");
        prop_assert_eq!(
            (tables.revision, tables.header.own, &tables.rule_slots),
            (fresh.revision, fresh.header.own, &fresh.rule_slots)
        );
        // Not their lengths: what one cell did not need in the end leaves a hole that no other cell may come to fill.
        let used = |lowering: &Lowering| {
            let last = lowering.0.as_ref().expect("it was lowered");
            let [blocks, paths, leaves] = last.strides.used();
            ([blocks, paths], (leaves, last.classes.used(), last.cells.used()))
        };
        let ((nodes, used), (least, needed)) = (used(&self.lowering), used(&anew));
        prop_assert_eq!(used, needed, "something is left over");
        // A part of the tree with many prefixes keeps what it once needed.
        let kept = self.slice.prefixes.len() / tree::FEW * 16;
        prop_assert!(
            nodes.iter().zip(least).all(|(used, least)| *used <= least + kept),
            "{:?}, not {:?}",
            nodes,
            least
        );
        self.check_ends()
    }

    /// Whoever reads the tables back reads as far as something refers to: that is all there is.
    fn check_ends(&self) -> Result<(), TestCaseError> {
        let Tables { matrix, pages, ports, decisions, .. } = &self.tables;
        let words = |uniform: bool| {
            let words = matrix.iter().filter(move |word| (**word & UNIFORM != 0) == uniform);
            words.map(|word| (word & CELL_INDEX) as usize + 1).max().unwrap_or(0)
        };
        let runs = pages
            .iter()
            .flat_map(|page| page.tcp.iter().chain(&page.udp).chain([&page.icmp, &page.icmpv6, &page.protocol]));
        let runs = runs.max().map_or(0, |run| usize::from(*run) + 1);
        let ranges = pages.iter().flat_map(|page| &page.few.decisions);
        let last =
            ports.iter().flat_map(|run| &run.decisions).chain(ranges).max().map_or(1, |one| usize::from(*one) + 1);
        prop_assert_eq!((pages.len(), ports.len(), decisions.len()), (words(false), runs, last.max(words(true))));
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Breaks if a node that follows the policy enforces something else than one that begins with it.
    #[test]
    fn followed_tables_say_what_the_slice_says((mut network, changes) in arbitrary::history(12)) {
        let mut followers: BTreeMap<NodeId, Follower> = BTreeMap::new();
        for change in changes {
            let _refused = network.apply(&change);
            let matrix = Matrix::compile(&network).expect("within limits");
            for node in network.nodes().keys().take(2) {
                let held = followers.remove(node);
                let Some(slice) = matrix.slice(*node, Revision(8)) else { continue };
                let follower = match held {
                    Some(mut held) => {
                        let before = held.follow(&slice);
                        held.tables.check_after(&before).expect("whole");
                        held.slots.release(&held.slots.retired());
                        held
                    }
                    None => Follower::new(&slice),
                };
                follower.check()?;
                followers.insert(*node, follower);
            }
        }
    }
}

/// A step of a policy of many addresses.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A rule to or from one node, of this service.
    Rule { node: u8, port: u16, to: bool },
    /// Some rule goes.
    Unrule(prop::sample::Index),
    /// A cidr within the one of this number, or it goes.
    Cidr(u8),
    /// A node of this number is on or off.
    Node(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..120_u8, 0..4_u16, any::<bool>()).prop_map(|(node, port, to)| Step::Rule { node, port, to }),
        4 => any::<prop::sample::Index>().prop_map(Step::Unrule),
        1 => (0..24_u8).prop_map(Step::Cidr),
        1 => (0..120_u8).prop_map(Step::Node),
    ]
}

/// `small` with many nodes and a network behind a gateway.
fn crowded() -> Network {
    let mut network = small();
    let prefixes = policy::Prefixes::from_nets(["192.168.0.0/16".parse().expect("a prefix")]).expect("one");
    let name = "site".parse().expect("a name");
    apply(&mut network, Change::AddCidr { name, prefixes, isolated: false, external: true });
    join(&mut network, "gate", "db", Some("site"), 6);
    for number in 0..120 {
        join(&mut network, &format!("m{number}"), if number % 3 == 0 { "web" } else { "db" }, None, 100 + number);
    }
    network
}

fn take(network: &mut Network, turn: usize, step: Step) {
    let is_off = |name: &str| {
        let name = name.parse().expect("a name");
        network.node_named(&name).is_some_and(|node| node.state != policy::NodeState::Active)
    };
    let change = match step {
        Step::Rule { node, port, to } => {
            let (one, other) = (format!("node:m{node}"), "cidr:web".to_owned());
            let (from, to) = if to { (&other, &one) } else { (&one, &other) };
            allow(&format!("r{turn}"), from, to, &format!("tcp/{}", 1 + port))
        }
        Step::Unrule(which) if !network.rules().is_empty() => {
            let rules: Vec<_> = network.rules().values().collect();
            Change::DeleteRule { name: which.get(&rules).name.clone() }
        }
        Step::Unrule(_) => return,
        Step::Cidr(number) => {
            let name: policy::CidrName = format!("part{number}").parse().expect("a name");
            if network.cidrs().values().any(|cidr| cidr.name == name) {
                Change::DeleteCidr { name }
            } else {
                let net = match number {
                    0..12 => format!("10.42.2.{}/28", 16 * (number + 3)),
                    12..20 => format!("10.42.{}.0/24", 100 + number),
                    _ => format!("192.168.{}.0/24", number),
                };
                let prefixes = policy::Prefixes::from_nets([net.parse().expect("a prefix")]).expect("one");
                Change::AddCidr { name, prefixes, isolated: number % 2 == 0, external: number >= 20 }
            }
        }
        Step::Node(number) => {
            let name = format!("m{number}");
            let off = is_off(&name);
            let name = name.parse().expect("a name");
            if off { Change::EnableNode { name } } else { Change::DisableNode { name } }
        }
    };
    // A cidr that a rule or a node is in stays.
    let _refused = network.apply(&change);
}

/// Breaks if tables that are followed for long drift from the slice, or are seldom followed at all.
#[test]
fn hundreds_of_steps_in_crowded_prefixes_are_followed() {
    let mut runner = TestRunner::new(ProptestConfig { cases: 3, ..ProptestConfig::default() });
    let steps = prop::collection::vec(step(), 250..300);
    let outcome = runner.run(&steps, |steps| {
        let mut network = crowded();
        let subjects = [node(&network), network.node_named(&"gate".parse().expect("a name")).expect("it is there").id];
        let slices = |network: &Network| {
            let matrix = Matrix::compile(network).expect("within limits");
            subjects.map(|node| matrix.slice(node, Revision(7)).expect("an active node"))
        };
        let mut followers = slices(&network).map(|slice| Follower::new(&slice));
        let (mut followed, mut all) = (0, 0);
        for (turn, step) in steps.into_iter().enumerate() {
            take(&mut network, turn, step);
            for (follower, slice) in followers.iter_mut().zip(slices(&network)) {
                let before = follower.follow(&slice);
                follower.tables.check_after(&before).expect("whole");
                follower.check()?;
                follower.slots.release(&follower.slots.retired());
                all += 1;
                followed += usize::from(follower.lowering.is_followed());
            }
        }
        // Made anew where cidrs become a gateway's, classes the node's own, or the tree would need another top.
        prop_assert!(followed * 10 >= all * 8, "only {} of {} were followed", followed, all);
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

/// Breaks if a rule between two known ends costs more than its cells.
#[test]
fn a_rule_that_comes_and_goes_leaves_addresses_alone_and_nothing_behind() {
    let mut network = small();
    apply(&mut network, allow("r1", "cidr:web", "cidr:db", "tcp/443"));
    let node = node(&network);
    let mut follower = Follower::new(&slice_of(&network, node));
    let before = follower.tables.clone();
    for turn in 0..3 {
        apply(&mut network, allow("r2", "cidr:db", "cidr:web", "udp/53"));
        follower.follow(&slice_of(&network, node));
        follower.check().expect("equal");
        assert!(follower.tables.blocks.is_same(&before.blocks) && follower.tables.leaves.is_same(&before.leaves));
        assert_eq!(follower.tables.pages.len(), 2, "turn {turn}");
        apply(&mut network, Change::DeleteRule { name: "r2".parse().expect("a name") });
        follower.follow(&slice_of(&network, node));
        follower.check().expect("equal");
        assert_eq!(
            (&follower.tables.matrix, &follower.tables.pages, &follower.tables.ports, &follower.tables.decisions),
            (&before.matrix, &before.pages, &before.ports, &before.decisions)
        );
        follower.slots.release(&follower.slots.retired());
    }
}

/// Breaks if a family that loses its last prefix keeps a path to nowhere, or one that gets its first has no way to it.
#[test]
fn a_family_that_goes_and_comes_leaves_nothing_behind() {
    let whole = slice_of(&small(), node(&small()));
    let mut v6 = whole.clone();
    let local = std::sync::Arc::make_mut(&mut v6.local);
    local.addresses = policy::Addresses::new(None, local.addresses.v6()).expect("one");
    v6.prefixes =
        whole.prefixes.iter().filter(|(net, _)| net.addr().is_ipv6()).map(|(net, place)| (*net, *place)).collect();
    let mut more = v6.clone();
    let net: ipnet::IpNet = "10.42.2.0/24".parse().expect("a prefix");
    more.prefixes.insert(net, whole.prefixes[&net]);
    let (mut slots, mut lowering) = (RuleSlots::new(), Lowering::default());
    for (turn, slice) in [&v6, &more, &v6, &more].into_iter().enumerate() {
        let tables = lowering.lower(slice, &mut slots).expect("within limits");
        tables.check().expect("whole");
        assert!(verify(slice, &tables, &slots.pairs()).is_equal());
        assert_eq!((lowering.is_followed(), tables.paths.len()), (turn > 0, lowered(slice).paths.len()));
    }
}

/// Breaks if a rule that is reported from now on is not, or takes a place of its own.
#[test]
fn a_rule_that_is_reported_keeps_its_decision() {
    let mut network = small();
    for (name, service) in [("r1", "tcp/443"), ("r2", "any")] {
        apply(&mut network, allow(name, "cidr:web", "cidr:db", service));
    }
    let mut follower = Follower::new(&slice_of(&network, node(&network)));
    let decisions = follower.tables.decisions.len();
    let mut next = follower.slice.clone();
    for log in [true, false] {
        let id = *next.rules.keys().next().expect("two rules");
        next.rules.get_mut(&id).expect("it is there").log = log;
        let before = follower.follow(&next);
        follower.check().expect("equal");
        assert_eq!((&follower.tables.matrix, follower.tables.decisions.len()), (&before.matrix, decisions));
        assert_ne!(follower.tables.decisions, before.decisions);
    }
}

/// Breaks if a slice that no controller sends, whose cells are decided by rules that it does not have, becomes tables.
#[test]
fn a_rule_that_is_gone_and_still_decides_is_refused() {
    let mut network = small();
    apply(&mut network, allow("r1", "cidr:web", "cidr:db", "tcp/443"));
    let mut follower = Follower::new(&slice_of(&network, node(&network)));
    let mut broken = follower.slice.clone();
    broken.rules.clear();
    let (rule, slots) = (*follower.slice.rules.keys().next().expect("one rule"), follower.slots.clone());
    assert_eq!(follower.lowering.lower(&broken, &mut follower.slots), Err(LowerError::UnknownRule(rule)));
    assert_eq!(follower.slots, slots);
    // And what comes after it is lowered as if nothing had happened.
    follower.follow(&slice_of(&network, node(&network)));
    follower.check().expect("equal");
}

/// Breaks if tables that lost what others refer to pass because the others are known.
#[test]
fn what_is_shared_is_not_sound_where_what_it_refers_to_is_gone() {
    let mut network = small();
    apply(&mut network, allow("r1", "cidr:web", "cidr:db", "tcp/443"));
    let few = lowered(&slice_of(&network, node(&network)));
    few.check_after(&few).expect("whole");
    let mut broken = few.clone();
    broken.decisions.pop();
    assert_eq!(broken.check_after(&few).expect_err("its ranges refer to it").table, "PAGES");
    for (name, service) in [("r2", "udp/53"), ("r3", "tcp/1"), ("r4", "icmp/8")] {
        apply(&mut network, allow(name, "cidr:web", "cidr:db", service));
    }
    let whole = lowered(&slice_of(&network, node(&network)));
    whole.check_after(&whole).expect("whole");
    type Break = fn(&mut Tables);
    let breaks: [(&str, Break); 6] = [
        ("MATRIX", |tables| {
            tables.pages.pop();
        }),
        ("PAGES", |tables| {
            tables.ports.pop();
        }),
        ("PORTS", |tables| {
            tables.decisions.pop();
        }),
        ("BLOCKS", |tables| {
            tables.leaves.pop();
        }),
        ("MATRIX", |tables| tables.matrix[1] = limit::PAGES - 1),
        ("HEADER", |tables| tables.header.root_v4 = u32::MAX),
    ];
    for (table, break_it) in breaks {
        let mut broken = whole.clone();
        break_it(&mut broken);
        assert_eq!(broken.check_after(&whole).expect_err(table).table, table);
    }
}
