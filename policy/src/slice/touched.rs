//! What differs between two slices.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Slice;
use super::delta::differing;
use crate::Map;
use crate::object::id::{CidrId, ClassId, NodeId, RuleId};
use crate::peer::Peer;

/// Where two slices are not alike. Found at the cost of what differs, where one was made from the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// What an address is, or who stands for it: prefixes, what is local, and the peers that are gateways.
    pub addresses: bool,
    /// What is told apart within cidrs, if only where the node's own addresses hide it.
    pub marked: bool,
    pub peers: BTreeSet<NodeId>,
    pub cidrs: BTreeSet<CidrId>,
    pub rules: BTreeSet<RuleId>,
    pub cells: BTreeSet<(ClassId, ClassId)>,
}

impl Touched {
    pub fn between(old: &Slice, new: &Slice) -> Self {
        let local = !Arc::ptr_eq(&old.local, &new.local) && old.local != new.local;
        let peers = differing(&old.peers, &new.peers);
        let is_gateway = |slice: &Slice, peer: &Peer| !peer.allowed_ips.is_disjoint(&slice.local.external_routes);
        let mut both = peers.iter().flat_map(|id| [(old, old.peers.get(id)), (new, new.peers.get(id))]);
        let gateways = both.any(|(slice, peer)| peer.is_some_and(|peer| is_gateway(slice, peer)));
        Self {
            addresses: local || gateways || !same(&old.prefixes, &new.prefixes),
            marked: !same(&old.marked, &new.marked),
            peers,
            cidrs: differing(&old.cidrs, &new.cidrs),
            rules: differing(&old.rules, &new.rules),
            cells: differing(&old.cells, &new.cells),
        }
    }
}

fn same<K: Ord + PartialEq, V: PartialEq>(old: &Map<K, V>, new: &Map<K, V>) -> bool {
    old.ptr_eq(new) || old == new
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Breaks with a version of the maps that overlooks what differs beside a part that both share.
    #[test]
    fn whichever_key_differs_is_found() {
        for size in [1, 17, 300, 8_000_u32] {
            let map: Map<u32, u32> = (0..size).map(|key| (2 * key, key)).collect();
            for at in (0..size).step_by(1 + size as usize / 2_000) {
                let (mut changed, mut less, mut more) = (map.clone(), map.clone(), map.clone());
                changed.insert(2 * at, u32::MAX);
                less.remove(&(2 * at));
                more.insert(2 * at + 1, at);
                for (other, key) in [(changed, 2 * at), (less, 2 * at), (more, 2 * at + 1)] {
                    assert_eq!(differing(&map, &other), BTreeSet::from([key]), "of {size}");
                    assert_eq!(differing(&other, &map), BTreeSet::from([key]), "of {size}");
                    assert!(!same(&map, &other) && !same(&other, &map), "{key} of {size}");
                }
            }
        }
    }
}
