//! The random networks are worth testing with: they have what the properties speak of.

use std::collections::BTreeMap;

use policy::{Action, Matrix, Reason, Revision, arbitrary, interpret};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// Breaks if the generator stops making something that the other properties need, and they pass for want of cases.
#[test]
fn every_kind_of_verdict_and_object_comes_up() {
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut count = |what: String, number: usize| *seen.entry(what).or_default() += number;
    for _ in 0..300 {
        let network = arbitrary::network().new_tree(&mut runner).unwrap().current();
        let flows = prop::collection::vec(arbitrary::flow(&network), 50).new_tree(&mut runner).unwrap().current();
        for flow in &flows {
            let verdict = interpret(&network, flow);
            let action = if verdict.reason == Reason::Rule && verdict.action == Action::Deny { "deny-" } else { "" };
            count(format!("verdict {action}{}", verdict.reason), 1);
        }
        for cidr in network.cidrs().values() {
            count("cidr".into(), 1);
            count("child".into(), network.parent_of(cidr.id).is_some().into());
            count("external".into(), cidr.external.into());
            count("isolated".into(), cidr.isolated.into());
        }
        for rule in network.rules().values() {
            count("rule".into(), 1);
            count("both".into(), rule.both.into());
        }
        count(
            "group member".into(),
            network.groups().values().map(|group| group.nodes.len() + group.cidrs.len()).sum(),
        );
        for &cidr in network.cidrs().keys() {
            count("split cidr".into(), arbitrary::law::split(&network, cidr).is_some().into());
            count("merged cidr".into(), arbitrary::law::merged(&network, cidr).is_some().into());
        }
        let literal = |selector: &&policy::Selector| matches!(selector, policy::Selector::Prefix(_));
        count("literal prefix".into(), network.rules().values().flat_map(|rule| &rule.from).filter(literal).count());
        let matrix = Matrix::compile(&network).unwrap();
        for &node in network.nodes().keys() {
            let Some(slice) = matrix.slice(node, Revision(1)) else { continue };
            count("slice".into(), 1);
            count("peer".into(), slice.peers.len());
            count("stranger".into(), network.nodes().len() - 1 - slice.peers.len());
            count("gateway".into(), slice.local.gateway_for.len());
            count("external route".into(), slice.local.external_routes.len());
            count("split own classes".into(), (slice.own_classes().len() > 1).into());
        }
    }
    for (what, least) in [
        ("verdict rule", 700),
        ("verdict deny-rule", 500),
        ("verdict lineage", 100),
        ("verdict no-rule", 1_000),
        ("verdict unknown-source", 500),
        ("verdict unknown-destination", 200),
        ("cidr", 1_000),
        ("child", 300),
        ("external", 200),
        ("isolated", 100),
        ("rule", 1_000),
        ("both", 200),
        ("group member", 200),
        ("slice", 300),
        ("peer", 100),
        ("stranger", 100),
        ("gateway", 30),
        ("external route", 15),
        ("split own classes", 30),
        ("split cidr", 500),
        ("merged cidr", 100),
        ("literal prefix", 300),
    ] {
        assert!(seen.get(what).is_some_and(|count| *count >= least), "{what}: fewer than {least} of {seen:#?}");
    }
}
