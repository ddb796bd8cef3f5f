//! The laws that docs/POLICY.md states, on random networks.

use std::collections::BTreeMap;

use policy::{
    Action, Change, Flow, Matrix, Network, NodeId, Revision, RuleId, RuleSpec, SelectorSpec, Service, ServiceSpec,
    Slice, arbitrary, interpret,
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Breaks if a verdict depends on the order of rules, or on anyone's id.
    #[test]
    fn neither_order_nor_ids_matter((network, flows) in with_flows()) {
        let mut parts = network.to_parts();
        let ids: Vec<RuleId> = parts.rules.iter().map(|rule| rule.id).collect();
        for (rule, id) in parts.rules.iter_mut().zip(ids.iter().rev()) {
            rule.id = *id;
        }
        parts.nodes.reverse();
        parts.cidrs.reverse();
        let shuffled = Network::from_parts(parts).unwrap();
        let (before, after) = (Matrix::compile(&network).unwrap(), Matrix::compile(&shuffled).unwrap());
        let named = |network: &Network, verdict: policy::Verdict| {
            (verdict.action, verdict.reason, verdict.rule.map(|id| network.rules()[&id].name.clone()))
        };
        for flow in &flows {
            prop_assert_eq!(named(&network, before.verdict(flow)), named(&shuffled, after.verdict(flow)));
            prop_assert_eq!(named(&network, interpret(&network, flow)), named(&shuffled, interpret(&shuffled, flow)));
        }
    }

    /// Breaks if saying more in an allow rule denies something, or saying more in a deny rule allows something.
    #[test]
    fn widening_a_rule_only_does_what_the_rule_does(
        (network, flows) in with_flows(),
        which in any::<prop::sample::Index>(),
        prefix in arbitrary::prefix(),
        service in arbitrary::service(),
        (from, to, both) in any::<(bool, bool, bool)>(),
    ) {
        prop_assume!(!network.rules().is_empty());
        let ids: Vec<RuleId> = network.rules().keys().copied().collect();
        let mut rule = spec(&network, *which.get(&ids));
        if from {
            rule.from.push(SelectorSpec::Prefix(prefix));
        }
        if to {
            rule.to.push(SelectorSpec::Any);
        }
        rule.both |= both;
        rule.services.push(ServiceSpec::Literal(service));
        let action = rule.action;
        let wider = replaced(&network, rule);
        let (before, after) = (Matrix::compile(&network).unwrap(), Matrix::compile(&wider).unwrap());
        for flow in &flows {
            match action {
                Action::Allow => prop_assert!(!before.verdict(flow).is_allowed() || after.verdict(flow).is_allowed(), "{}", flow),
                Action::Deny => prop_assert!(before.verdict(flow).is_allowed() || !after.verdict(flow).is_allowed(), "{}", flow),
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
        let slice = |node: &NodeId| Some((*node, matrix.slice(&network, Revision(1), *node, None)?));
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
                    prop_assert_eq!(&peer.allowed_ips, &stands);
                }
            }
        }
        // Every address has one node that stands for it, or none.
        for address in addresses {
            prop_assert!(slices.values().filter(|slice| slice.stands_for(address)).count() <= 1, "{}", address);
        }
    }
}

/// Breaks if one rule opens both directions.
#[test]
fn a_rule_is_one_way() {
    let mut network =
        Network::new("corp".parse().unwrap(), prefixes("10.0.0.0/8"), policy::DefaultPolicy::Deny).unwrap();
    for (name, prefix) in [("web", "10.1.0.0/16"), ("db", "10.2.0.0/16")] {
        let (name, prefixes) = (name.parse().unwrap(), prefixes(prefix));
        network.apply(&Change::AddCidr { name, prefixes, isolated: false, external: false }).unwrap();
    }
    let rule = RuleSpec {
        name: "web-to-db".parse().unwrap(),
        action: Action::Allow,
        from: vec!["cidr:web".parse().unwrap()],
        to: vec!["cidr:db".parse().unwrap()],
        services: vec![ServiceSpec::Literal(Service::ANY)],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    };
    network.apply(&Change::AddRule(rule)).unwrap();
    let (web, db) = ("10.1.0.1".parse().unwrap(), "10.2.0.1".parse().unwrap());
    let allowed =
        |source, destination| interpret(&network, &Flow { source, destination, protocol: 6, port: 5432 }).is_allowed();
    assert!(allowed(web, db));
    assert!(!allowed(db, web));
    assert!(!allowed(web, web));
}

fn prefixes(text: &str) -> policy::Prefixes {
    policy::Prefixes::from_nets([text.parse().unwrap()]).unwrap()
}
