//! What differs between two slices.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;

use super::Slice;
use super::delta::differing;
use crate::object::id::{CidrId, ClassId, NodeId, RuleId};
use crate::peer::Peer;

/// Where two slices are not alike. Found at the cost of what differs, where one was made from the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// What a node knows of itself.
    pub local: bool,
    /// Which peers are gateways, or what they stand for.
    pub gateways: bool,
    /// What an address is.
    pub prefixes: BTreeSet<IpNet>,
    /// What is told apart within cidrs, if only where the node's own addresses hide it.
    pub marked: BTreeSet<IpNet>,
    pub peers: BTreeSet<NodeId>,
    pub cidrs: BTreeSet<CidrId>,
    pub rules: BTreeSet<RuleId>,
    pub cells: BTreeSet<(ClassId, ClassId)>,
}

impl Touched {
    pub fn between(old: &Slice, new: &Slice) -> Self {
        let peers = differing(&old.peers, &new.peers);
        let is_gateway = |slice: &Slice, peer: &Peer| !peer.allowed_ips.is_disjoint(&slice.local.external_routes);
        let gateways = peers.iter().any(|id| {
            let both @ [(_, before), (_, after)] = [old, new].map(|slice| (slice, slice.peers.get(id)));
            before.map(|peer| &peer.allowed_ips) != after.map(|peer| &peer.allowed_ips)
                && both.iter().any(|(slice, peer)| peer.is_some_and(|peer| is_gateway(slice, peer)))
        });
        Self {
            local: !Arc::ptr_eq(&old.local, &new.local) && old.local != new.local,
            gateways,
            prefixes: differing(&old.prefixes, &new.prefixes),
            marked: differing(&old.marked, &new.marked),
            peers,
            cidrs: differing(&old.cidrs, &new.cidrs),
            rules: differing(&old.rules, &new.rules),
            cells: differing(&old.cells, &new.cells),
        }
    }

    /// Whether an address is something else than it was, or who stands for it.
    pub fn addresses(&self) -> bool {
        self.local || self.gateways || !self.prefixes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Map;

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
                }
            }
        }
    }
}
