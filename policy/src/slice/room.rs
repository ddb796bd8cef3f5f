//! What the address table of a slice's node takes.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{Peer, Slice};
use crate::Map;
use crate::matrix::{Room, stride_room};
use crate::object::id::{CidrId, ClassId, NodeId};
use crate::object::prefix::longest_match;

/// What a gateway holds of one kind of addresses.
pub(super) type Held = ((ClassId, CidrId), NodeId);

impl Slice {
    /// The peers that stand for more than themselves.
    fn gateways(&self) -> impl Iterator<Item = (NodeId, &Peer)> {
        let routes = &self.local.external_routes;
        // Most nodes know of no external cidr.
        let peers = (!routes.is_empty()).then_some(&self.peers).into_iter().flatten();
        peers.map(|(id, peer)| (*id, peer)).filter(|(_, peer)| !peer.allowed_ips.is_disjoint(routes))
    }

    /// An upper bound of what the address table of the node has, which is made of all prefixes at which class, cidr or
    /// holder may change. The same for every node that stands for the same classes.
    pub fn room(&self) -> Room {
        stride_room(self.prefixes.keys().copied().chain(self.held_prefixes()))
    }

    /// The prefixes at which the holder may change, some of them more than once.
    pub(super) fn held_prefixes(&self) -> impl Iterator<Item = IpNet> {
        let local = &self.local;
        let routes = local.external_routes.iter().chain(&local.gateway_for);
        routes.chain(self.gateways().flat_map(|(_, peer)| peer.allowed_ips.iter())).copied()
    }

    /// Which gateway holds what; `None`: no peer does, or this node.
    pub(super) fn gateway_holders(&self) -> Map<IpNet, Option<NodeId>> {
        let local = &self.local;
        let routes = local.external_routes.iter().chain(&local.gateway_for).map(|&net| (net, None));
        let gateways = self.gateways().flat_map(|(id, peer)| peer.allowed_ips.iter().map(move |&net| (net, Some(id))));
        routes.chain(gateways).collect()
    }

    /// What the longest prefixes around one say of it, if a gateway holds it.
    pub(super) fn held(&self, holders: &Map<IpNet, Option<NodeId>>, net: IpNet) -> Option<Held> {
        let gateway = (*longest_match(holders, net)?.1)?;
        let (_, place) = longest_match(&self.prefixes, net)?;
        Some((*place, gateway))
    }

    /// How many kinds of addresses the table tells apart because a gateway holds them.
    pub fn held_leaves(&self) -> usize {
        let holders = self.gateway_holders();
        if holders.is_empty() {
            return 0;
        }
        let nets = self.prefixes.keys().chain(holders.keys());
        nets.filter_map(|&net| self.held(&holders, net)).collect::<BTreeSet<_>>().len()
    }
}
