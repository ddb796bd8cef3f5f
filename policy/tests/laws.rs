//! The laws that docs/POLICY.md states, on random networks.

use std::collections::BTreeMap;

use policy::arbitrary::law;
use policy::{
    Action, Change, Flow, Matrix, Network, NodeId, Reason, Revision, RuleId, RuleSpec, Service, ServiceSpec, Slice,
    Verdict, arbitrary, interpret,
};
use proptest::prelude::*;

/// A network with flows.
fn with_flows() -> impl Strategy<Value = (Network, Vec<Flow>)> {
    arbitrary::network().prop_flat_map(|network| {
        let flows = prop::collection::vec(arbitrary::flow(&network), 64);
        (Just(network), flows)
    })
}

/// A rule as its author wrote it.
fn spec(network: &Network, rule: RuleId) -> RuleSpec {
    let rule = &network.rules()[&rule];
    RuleSpec {
        name: rule.name.clone(),
        action: rule.action,
        from: rule.from.iter().filter_map(|selector| network.selector_spec(selector)).collect(),
        to: rule.to.iter().filter_map(|selector| network.selector_spec(selector)).collect(),
        services: rule.services.iter().filter_map(|service| network.service_spec(service)).collect(),
        priority: rule.priority,
        both: rule.both,
        log: rule.log,
        comment: rule.comment.clone(),
    }
}

/// The network with one rule in place of another.
fn replaced(network: &Network, rule: RuleSpec) -> Network {
    let mut network = network.clone();
    network.apply(&Change::DeleteRule { name: rule.name.clone() }).unwrap();
    network.apply(&Change::AddRule(rule)).unwrap();
    network
}

/// What is said of flows before and after, by the interpreter and by the matrix.
fn verdicts(before: &Network, after: &Network, flows: &[Flow]) -> Vec<((Verdict, Verdict), Flow)> {
    let [compiled_before, compiled_after] = [before, after].map(|network| Matrix::compile(network).unwrap());
    let interpreted = flows.iter().map(|flow| ((interpret(before, flow), interpret(after, flow)), *flow));
    let compiled = flows.iter().map(|flow| ((compiled_before.verdict(flow), compiled_after.verdict(flow)), *flow));
    interpreted.chain(compiled).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Breaks if a verdict depends on the order of rules, or on anyone's id.
    #[test]
    fn neither_order_nor_ids_matter((network, flows) in with_flows()) {
        let (after, moved) = law::reordered(&network);
        let moved: BTreeMap<RuleId, RuleId> = moved.into_iter().collect();
        let expected = |verdict: Verdict| Verdict { rule: verdict.rule.map(|rule| moved[&rule]), ..verdict };
        for ((before, after), flow) in verdicts(&network, &after, &flows) {
            prop_assert_eq!(expected(before), after, "{}", flow);
        }
    }

    /// Breaks if a name means anything but which of equals decides.
    #[test]
    fn names_only_say_which_of_equals_decides((network, flows) in with_flows()) {
        for ((before, after), flow) in verdicts(&network, &law::renamed(&network, true), &flows) {
            prop_assert_eq!(before, after, "{}", flow);
        }
        for ((before, after), flow) in verdicts(&network, &law::renamed(&network, false), &flows) {
            prop_assert_eq!((before.action, before.reason), (after.action, after.reason), "{}", flow);
            let priority = |verdict: Verdict| verdict.rule.map(|rule| network.rules()[&rule].priority);
            prop_assert_eq!(priority(before), priority(after), "{}", flow);
        }
    }

    /// Breaks if saying more in an allow rule denies something, or saying more in a deny rule allows something.
    #[test]
    fn widening_a_rule_only_does_what_the_rule_does(
        (network, flows) in with_flows(),
        which in any::<prop::sample::Index>(),
        (prefix, service) in (prop::option::of(arbitrary::prefix()), arbitrary::service()),
        (to, both) in any::<(bool, bool)>(),
    ) {
        prop_assume!(!network.rules().is_empty());
        let rules: Vec<_> = network.rules().values().collect();
        let rule = which.get(&rules);
        let wider = law::widened(&network, rule.id, prefix, to, both, service);
        for ((before, after), flow) in verdicts(&network, &wider, &flows) {
            match rule.action {
                Action::Allow => prop_assert!(!before.is_allowed() || after.is_allowed(), "{}", flow),
                Action::Deny => prop_assert!(before.is_allowed() || !after.is_allowed(), "{}", flow),
            }
        }
    }

    /// Breaks if a prefix in a rule is more or less than its two halves.
    #[test]
    fn a_prefix_in_a_rule_is_its_halves((network, flows) in with_flows()) {
        for ((before, after), flow) in verdicts(&network, &law::halved_selectors(&network), &flows) {
            prop_assert_eq!(before, after, "{}", flow);
        }
    }

    /// Breaks if rules say something else of a cidr than of its halves, or of a cidr given up to its parent.
    #[test]
    fn splitting_and_merging_cidrs_changes_no_rule(
        (network, flows) in with_flows(),
        which in any::<prop::sample::Index>(),
    ) {
        prop_assume!(!network.cidrs().is_empty());
        let cidr = *which.get(&Vec::from_iter(network.cidrs().keys()));
        for (after, is_split) in [(law::split(&network, *cidr), true), (law::merged(&network, *cidr), false)] {
            let Some(after) = after else { continue };
            for ((before, after), flow) in verdicts(&network, &after, &flows) {
                let is_ruled = [before, after].iter().any(|verdict| verdict.reason == Reason::Rule);
                if is_ruled || !law::lineage_may_differ(&network, *cidr, &flow, is_split) {
                    prop_assert_eq!(before, after, "{}", flow);
                }
            }
        }
    }

    /// Breaks if `both` is anything but two rules, or exchanges the ports.
    #[test]
    fn both_is_the_rule_and_its_mirror((network, flows) in with_flows()) {
        let mut pairs = network.clone();
        for id in network.rules().keys().copied() {
            let rule = spec(&network, id);
            if rule.both {
                pairs = replaced(&pairs, RuleSpec { both: false, ..rule.clone() });
                let name = format!("{}.mirror", rule.name).parse().unwrap();
                pairs.apply(&Change::AddRule(RuleSpec { name, from: rule.to, to: rule.from, both: false, ..rule })).unwrap();
            }
        }
        let (before, after) = (Matrix::compile(&network).unwrap(), Matrix::compile(&pairs).unwrap());
        for flow in &flows {
            prop_assert_eq!(before.verdict(flow).action, after.verdict(flow).action, "{}", flow);
            prop_assert_eq!(before.verdict(flow).reason, after.verdict(flow).reason, "{}", flow);
        }
    }

    /// Breaks if splitting a rule's services into several rules changes what they allow.
    #[test]
    fn services_of_a_rule_are_a_union((network, flows) in with_flows()) {
        let mut split = network.clone();
        for id in network.rules().keys().copied() {
            let rule = spec(&network, id);
            split.apply(&Change::DeleteRule { name: rule.name.clone() }).unwrap();
            for (number, service) in rule.services.iter().enumerate() {
                let name = format!("{}.{number}", rule.name).parse().unwrap();
                split.apply(&Change::AddRule(RuleSpec { name, services: vec![service.clone()], ..rule.clone() })).unwrap();
            }
        }
        let (before, after) = (Matrix::compile(&network).unwrap(), Matrix::compile(&split).unwrap());
        for flow in &flows {
            prop_assert_eq!(before.verdict(flow).action, after.verdict(flow).action, "{}", flow);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Section 4. Breaks if two nodes know each other without need, or do not know each other where a flow is allowed.
    #[test]
    fn peers_are_those_with_an_allowed_flow(network in arbitrary::network()) {
        let matrix = Matrix::compile(&network).unwrap();
        let slice = |node: &NodeId| Some((*node, matrix.slice(*node, Revision(1))?));
        let slices: BTreeMap<NodeId, Slice> = network.nodes().keys().filter_map(slice).collect();
        let mut addresses = arbitrary::addresses(&network);
        addresses.sort();
        addresses.dedup();
        let points = arbitrary::points(&network);
        for (a, slice_a) in &slices {
            for (b, slice_b) in slices.range(a..).skip(1) {
                let sources = || addresses.iter().filter(|address| slice_a.stands_for(**address));
                let destinations = || addresses.iter().filter(|address| slice_b.stands_for(**address));
                let allowed = sources().any(|&source| destinations().any(|&destination| points.iter().any(|&(protocol, port)| {
                    let there = Flow { source, destination, protocol, port };
                    let back = Flow { source: destination, destination: source, protocol, port };
                    interpret(&network, &there).is_allowed() || interpret(&network, &back).is_allowed()
                })));
                prop_assert_eq!(slice_a.peers.contains_key(b), allowed);
                prop_assert_eq!(slice_b.peers.contains_key(a), allowed);
                if let Some(peer) = slice_a.peers.get(b) {
                    let own = slice_b.local.addresses.iter().map(ipnet::IpNet::from);
                    let stands: std::collections::BTreeSet<_> = own.chain(slice_b.local.gateway_for.iter().copied()).collect();
                    prop_assert_eq!(&*peer.allowed_ips, &stands);
                }
            }
        }
        // Every address has one node that stands for it, or none.
        for address in addresses {
            prop_assert!(slices.values().filter(|slice| slice.stands_for(address)).count() <= 1, "{}", address);
        }
    }
}

/// Breaks if a cidr's rules lose, with the cidr, a descendant's prefix of the family that the cidr itself has not.
#[test]
fn a_cidr_means_its_descendants_in_both_families() {
    let mut network = network(
        &["10.0.0.0/8", "fd00::/8"],
        &[("outer", &["10.0.0.0/8"]), ("middle", &["10.1.0.0/16"]), ("inner", &["10.1.1.0/24", "fd00:1::/64"])],
    );
    network.apply(&Change::AddRule(allow("middle", "middle"))).unwrap();
    let middle = network.cidrs().values().find(|cidr| cidr.name.as_str() == "middle").unwrap().id;
    let flow = |source: &str, destination: &str| {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        Flow { source, destination, protocol: 6, port: 5432 }
    };
    let flows = [flow("fd00:1::1", "fd00:1::2"), flow("10.1.1.1", "10.1.2.1"), flow("10.1.2.1", "10.2.0.1")];
    for after in [law::split(&network, middle).unwrap(), law::merged(&network, middle).unwrap()] {
        for ((before, after), flow) in verdicts(&network, &after, &flows) {
            assert_eq!(before, after, "{flow}");
            assert_eq!(before.is_allowed(), flow != flows[2], "{flow}");
        }
    }
}

/// Breaks if one rule opens both directions.
#[test]
fn a_rule_is_one_way() {
    let mut network = network(&["10.0.0.0/8"], &[("web", &["10.1.0.0/16"]), ("db", &["10.2.0.0/16"])]);
    network.apply(&Change::AddRule(allow("web", "db"))).unwrap();
    let (web, db) = ("10.1.0.1".parse().unwrap(), "10.2.0.1".parse().unwrap());
    let allowed =
        |source, destination| interpret(&network, &Flow { source, destination, protocol: 6, port: 5432 }).is_allowed();
    assert!(allowed(web, db));
    assert!(!allowed(db, web));
    assert!(!allowed(web, web));
}

/// A network in which nothing is allowed but by rules.
fn network(roots: &[&str], cidrs: &[(&str, &[&str])]) -> Network {
    let mut network = Network::new("corp".parse().unwrap(), prefixes(roots), policy::DefaultPolicy::Deny).unwrap();
    for (name, texts) in cidrs {
        let (name, prefixes) = (name.parse().unwrap(), prefixes(texts));
        network.apply(&Change::AddCidr { name, prefixes, isolated: false, external: false }).unwrap();
    }
    network
}

/// A rule that allows everything from one cidr to another.
fn allow(from: &str, to: &str) -> RuleSpec {
    RuleSpec {
        name: format!("{from}-to-{to}").parse().unwrap(),
        action: Action::Allow,
        from: vec![format!("cidr:{from}").parse().unwrap()],
        to: vec![format!("cidr:{to}").parse().unwrap()],
        services: vec![ServiceSpec::Literal(Service::ANY)],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    }
}

fn prefixes(texts: &[&str]) -> policy::Prefixes {
    policy::Prefixes::from_nets(texts.iter().map(|text| text.parse().unwrap())).unwrap()
}
