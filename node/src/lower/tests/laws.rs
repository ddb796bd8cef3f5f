//! The laws of docs/POLICY.md on tables that are walked: what must be said the same of two networks is lowered to the same.

use policy::arbitrary::law;

use super::*;

/// What tables say of a flow in each direction, in ids.
type Said = [(bool, u8, Option<policy::RuleId>, bool); 2];

fn said(tables: &Tables, flow: &Flow) -> Said {
    [EGRESS, INGRESS].map(|direction| {
        let outcome = tables.verdict(flow, direction);
        (outcome.passes, outcome.reason, outcome.rule.and_then(|slot| tables.rule_of(slot)), outcome.record)
    })
}

/// Flows of each node, with what its tables say before and after.
fn compared(before: &Network, after: &Network, flows: &[(NodeId, Flow)]) -> Vec<(Said, Said, Flow)> {
    let tables = by_node(after, flows).into_iter().map(|(_, tables, _)| tables);
    let pairs = by_node(before, flows).into_iter().zip(tables);
    let compare = |((_, before, flows), after): ((Slice, Tables, Vec<Flow>), Tables)| {
        flows.into_iter().map(move |flow| (said(&before, &flow), said(&after, &flow), flow))
    };
    pairs.flat_map(compare).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn tables_know_neither_order_nor_names((network, flows) in network_and_flows()) {
        let (reordered, moved) = law::reordered(&network);
        let renamed = law::renamed(&network, true);
        let moved: std::collections::BTreeMap<_, _> = moved.into_iter().collect();
        for (before, after, flow) in compared(&network, &reordered, &flows) {
            let expected = before.map(|(passes, reason, rule, record)| (passes, reason, rule.map(|rule| moved[&rule]), record));
            prop_assert_eq!(expected, after, "{} reordered", flow);
        }
        for (before, after, flow) in compared(&network, &renamed, &flows) {
            prop_assert_eq!(before, after, "{} renamed", flow);
        }
    }

    #[test]
    fn tables_say_of_halves_what_they_say_of_the_whole(
        (network, flows) in network_and_flows(),
        which in any::<prop::sample::Index>(),
    ) {
        for (before, after, flow) in compared(&network, &law::halved_selectors(&network), &flows) {
            prop_assert_eq!(before, after, "{}", flow);
        }
        prop_assume!(!network.cidrs().is_empty());
        let cidr = **which.get(&Vec::from_iter(network.cidrs().keys()));
        for (after, is_split) in [(law::split(&network, cidr), true), (law::merged(&network, cidr), false)] {
            let Some(after) = after else { continue };
            for (before, after, flow) in compared(&network, &after, &flows) {
                let back = reversed(&flow);
                // Whether a flow is recorded hangs on what is said of its answers.
                if [flow, back].iter().all(|flow| !law::lineage_may_differ(&network, cidr, flow, is_split)) {
                    prop_assert_eq!(before, after, "{}", flow);
                }
            }
        }
    }

    #[test]
    fn a_wider_rule_only_does_in_tables_what_the_rule_does(
        (network, flows) in network_and_flows(),
        which in any::<prop::sample::Index>(),
        (prefix, service) in (prop::option::of(arbitrary::prefix()), arbitrary::service()),
        (to, both) in any::<(bool, bool)>(),
    ) {
        prop_assume!(!network.rules().is_empty());
        let rules: Vec<_> = network.rules().values().collect();
        let rule = which.get(&rules);
        let wider = law::widened(&network, rule.id, prefix, to, both, service);
        for (before, after, flow) in compared(&network, &wider, &flows) {
            for (before, after) in before.iter().zip(&after) {
                match rule.action {
                    Action::Allow => prop_assert!(!before.0 || after.0, "{}", flow),
                    Action::Deny => prop_assert!(before.0 || !after.0, "{}", flow),
                }
            }
        }
    }
}
