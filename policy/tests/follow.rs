//! What follows a change is what is made anew: matrices, whom they affect, and deltas, through hundreds of changes.

use std::collections::{BTreeMap, BTreeSet};

use policy::{Affected, Fragment, Matrix, Network, NodeId, Replacement, Revision, Rows, Slice, SliceDelta, arbitrary};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Breaks if a change costs a node what it should have heard, tells it what is not so, or names no row that it touches.
    #[test]
    fn incremental_equals_full((network, changes) in arbitrary::history(250)) {
        let mut network = network;
        network.take_touched();
        let mut matrix = Matrix::compile(&network).unwrap();
        let mut loaded = network.clone();
        let mut held: BTreeMap<NodeId, Slice> =
            matrix.nodes().map(|node| (node, matrix.slice(node, Revision(1)).unwrap())).collect();
        for (number, change) in changes.iter().enumerate() {
            let revision = Revision(number as u64 + 2);
            let refused = network.apply(change).is_err();
            let rows = network.take_touched();
            if refused {
                continue;
            }
            // The road of the store's log.
            loaded.replace(replacement(&network, &rows)).unwrap();
            prop_assert_eq!(&loaded, &network, "{:?}", change);
            prop_assert_eq!(&Network::from_parts(network.to_parts()).unwrap(), &loaded);

            let (next, affected) = matrix.follow(&network, &rows).unwrap();
            let full = Matrix::compile(&network).unwrap();
            prop_assert!(next == full, "{:?}", change);
            let fragments = Fragments::between(&matrix, &next);
            let mut slices = BTreeMap::new();
            for node in next.nodes() {
                let expected = full.slice(node, revision).unwrap();
                prop_assert_eq!(next.digest(node), Some(expected.digest));
                let mut slice = held.remove(&node).unwrap_or_else(|| expected.clone());
                let delta = fragments.delta(&affected, node, &slice, revision);
                prop_assert_eq!(slice.apply(delta), Ok(()), "{:?} at {}", change, node);
                prop_assert_eq!(&slice, &expected, "{:?} at {}", change, node);
                slices.insert(node, slice);
            }
            prop_assert_eq!(next.check_affected(&affected), full.check());
            (held, matrix) = (slices, next);
        }
    }

    /// Breaks if a node that was away for long resumes elsewhere than it should.
    #[test]
    fn a_delta_over_many_changes_is_right((network, changes) in arbitrary::history(60)) {
        let mut network = network;
        let old = Matrix::compile(&network).unwrap();
        for change in &changes {
            let _refused = network.apply(change);
        }
        let new = Matrix::compile(&network).unwrap();
        for node in new.nodes() {
            let expected = new.slice(node, Revision(9)).unwrap();
            let delta = new.delta(Some(&old), node, (Revision(7), Revision(9))).unwrap();
            let followed = match old.slice(node, Revision(7)) {
                Some(mut slice) => slice.apply(delta).map(|()| slice),
                None => Slice::from_snapshot(delta),
            };
            prop_assert_eq!(followed, Ok(expected));
        }
    }
}

/// What the controller makes of one change: fragments that are shared by whom they concern.
struct Fragments<'a> {
    old: &'a Matrix,
    new: &'a Matrix,
    cidrs: Fragment,
}

impl<'a> Fragments<'a> {
    fn between(old: &'a Matrix, new: &'a Matrix) -> Self {
        Self { old, new, cidrs: Fragment::of_cidrs(Some(old), new) }
    }

    /// As a node hears it that holds `slice`, which is of any earlier revision.
    fn delta(&self, affected: &Affected, node: NodeId, slice: &Slice, revision: Revision) -> SliceDelta {
        let (base, mut digest) = (slice.digest, slice.digest + self.cidrs.difference);
        let mut delta = SliceDelta::default();
        if affected.nodes.contains(&node) && self.old.role(node).is_some() {
            let roles = ((self.old, self.old.role(node).unwrap()), (self.new, self.new.role(node).unwrap()));
            let shared = Fragment::of_role(Some(roles.0), roles.1, Some(&affected.changed));
            let own = Fragment::of_node(Some(self.old), self.new, node).unwrap();
            digest = digest + shared.difference + own.difference;
            delta = SliceDelta { local: own.rows.local, ..shared.rows };
        }
        if self.old.role(node).is_some() {
            delta.cidrs = self.cidrs.rows.cidrs.clone();
            delta.removed_cidrs = self.cidrs.rows.removed_cidrs.clone();
        } else {
            digest = base;
        }
        SliceDelta { from: slice.revision, base, revision, digest, ..delta }
    }
}

/// The touched rows as they are now.
fn replacement(network: &Network, rows: &Rows) -> Replacement {
    fn now<K: Ord + Copy, V: Clone>(ids: &BTreeSet<K>, map: &policy::Map<K, V>) -> BTreeMap<K, Option<V>> {
        ids.iter().map(|id| (*id, map.get(id).cloned())).collect()
    }
    Replacement {
        header: Some(network.header()),
        cidrs: now(&rows.cidrs, network.cidrs()),
        nodes: now(&rows.nodes, network.nodes()),
        groups: now(&rows.groups, network.groups()),
        services: now(&rows.services, network.services()),
        rules: now(&rows.rules, network.rules()),
    }
}
