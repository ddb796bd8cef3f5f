//! No difference where there is none; every change of a word that changes an answer is found and named.

use std::collections::BTreeSet;

use policy::{Flow, Matrix, Network, NodeId, Revision, Slice, arbitrary};
use proptest::prelude::*;

use super::{Verification, verify};
use crate::lower::{RuleSlots, Tables, lower};

/// As read back: whose counter is whose is not in the kernel.
fn read_back(tables: &Tables) -> Tables {
    Tables { rule_slots: Default::default(), ..tables.clone() }
}

/// A random network as one of its nodes enforces it, with flows that the node has an end of.
fn enforced() -> impl Strategy<Value = (Slice, Tables, Vec<Flow>)> {
    arbitrary::network()
        .prop_filter_map("no active node", |network: Network| arbitrary::flow_at(&network).map(|flow| (network, flow)))
        .prop_flat_map(|(network, flow)| (Just(network), prop::collection::vec(flow, 1..200)))
        .prop_map(|(network, flows): (Network, Vec<(NodeId, Flow)>)| {
            let node = flows[0].0;
            let matrix = Matrix::compile(&network).expect("within limits");
            let slice = matrix.slice(&network, Revision(7), node, None).expect("active");
            let tables = lower(&slice, &mut RuleSlots::new()).expect("within limits");
            let flows = flows.into_iter().filter(|(of, _)| *of == node).map(|(_, flow)| flow).collect();
            (slice, tables, flows)
        })
}

fn check(slice: &Slice, tables: &Tables) -> Verification {
    verify(slice, &read_back(tables), &tables.rule_slots)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Breaks if the watch that runs by itself cries wolf.
    #[test]
    fn what_was_lowered_is_what_was_meant((slice, tables, _) in enforced()) {
        let verification = check(&slice, &tables);
        prop_assert_eq!(&verification.differences, &Vec::new());
        prop_assert_eq!(verification.prefixes, slice.prefixes.len());
        let own = slice.own_classes().len();
        let classes: BTreeSet<_> = slice.prefixes.values().map(|(class, _)| *class).collect();
        prop_assert!(verification.cells >= own * classes.len(), "every pair in both directions");
    }
}
