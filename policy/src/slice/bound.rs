//! Whether every node has room for its slice, asked before a policy is committed, of those whom the change affects.

use std::collections::BTreeSet;
use std::sync::Arc;

use thiserror::Error;

use super::Size;
use super::size::runs;
use crate::limit::LimitError;
use crate::matrix::{Affected, Cell, Matrix, OWN_ROOM, Role};
use crate::object::id::{NodeId, NodeName, Revision};
use crate::object::verdict::Verdict;

/// A policy of which one node could not hold its part.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("policy asks too much of node `{node}`")]
pub struct NodeLimitError {
    pub node: NodeName,
    #[source]
    pub limit: LimitError,
}

impl Matrix {
    /// Refuses a policy of which some active node could not hold its part.
    pub fn check(&self) -> Result<(), NodeLimitError> {
        self.check_nodes(self.nodes())
    }

    /// Likewise, for a policy that came of one that was not refused, by a change that affects these.
    pub fn check_affected(&self, affected: &Affected) -> Result<(), NodeLimitError> {
        self.check_nodes(affected.nodes.iter().copied())?;
        // All others have only more cidrs to tell apart. What that takes at most hangs on how much they stand for.
        if affected.common && !self.has_room_for_all() {
            self.check()?;
        }
        Ok(())
    }

    fn check_nodes(&self, nodes: impl Iterator<Item = NodeId>) -> Result<(), NodeLimitError> {
        let mut seen: BTreeSet<&Arc<Role>> = BTreeSet::new();
        for node in nodes {
            let Some(role) = self.role(node) else { continue };
            if !seen.insert(role) || self.bound(role).check().is_ok() {
                continue;
            }
            let Some(slice) = self.slice(node, Revision::default()) else { continue };
            slice.size().check().map_err(|limit| NodeLimitError { node: slice.local.name.clone(), limit })?;
        }
        Ok(())
    }

    /// Whether a node that stands for as many classes as any has room for every prefix of interest.
    fn has_room_for_all(&self) -> bool {
        let network = self.network();
        let places = network.cidrs().len() + network.marks().len() + OWN;
        let gateways = network.gateways();
        let own = gateways.iter().filter_map(|node| self.role(*node)).map(|role| role.own().len()).max();
        let size = Size {
            room: self.room() + OWN_ROOM,
            leaves: Size::leaves(places, own.unwrap_or_default() * gateways.len()),
            cells: Size::cells(own.unwrap_or_default().max(OWN), places),
            ..Size::default()
        };
        size.check().is_ok()
    }

    /// At least the size of the slice of a node of this role.
    fn bound(&self, role: &Arc<Role>) -> Size {
        let share = self.share(role);
        let own = role.own().len();
        let marked: BTreeSet<_> = share.prefixes.values().collect();
        let places = self.network().cidrs().len() + marked.len() + OWN;
        let distinct: BTreeSet<&Cell> = share.cells.values().map(AsRef::as_ref).collect();
        let verdicts: BTreeSet<Verdict> = distinct.iter().flat_map(|cell| cell.verdicts()).collect();
        let gateways = self.network().gateways();
        let held: usize = gateways.iter().filter_map(|node| self.role(*node)).map(|role| role.own().len() + OWN).sum();
        Size {
            room: self.room() + OWN_ROOM,
            leaves: Size::leaves(places, held),
            cells: Size::cells(own, places),
            rules: share.rules.len(),
            decisions: Size::decisions(verdicts.len()),
            pages: distinct.iter().filter(|cell| !cell.entries.is_empty()).count(),
            ports: distinct.iter().flat_map(|cell| runs(cell)).collect::<BTreeSet<_>>().len(),
        }
    }
}

/// Classes of a node's own addresses, at most.
const OWN: usize = 2;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arbitrary;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Breaks if a policy could pass the bound, be committed, and then be refused by a node.
        #[test]
        fn the_bound_is_never_below_the_slice(network in arbitrary::network()) {
            let matrix = Matrix::compile(&network).unwrap();
            for node in network.nodes().keys() {
                let Some(slice) = matrix.slice(*node, Revision(1)) else { continue };
                let size = slice.size();
                let bound = matrix.bound(matrix.role(*node).unwrap());
                for (exact, bound) in [
                    (size.room.blocks, bound.room.blocks),
                    (size.room.paths, bound.room.paths),
                    (size.leaves, bound.leaves),
                    (size.cells, bound.cells),
                    (size.rules, bound.rules),
                    (size.decisions, bound.decisions),
                    (size.pages, bound.pages),
                    (size.ports, bound.ports),
                ] {
                    prop_assert!(exact <= bound, "{:?} {:?}", size, bound);
                }
            }
            prop_assert_eq!(matrix.check(), Ok(()));
        }
    }
}
