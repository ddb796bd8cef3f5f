//! What the address table of a slice's node takes.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{Peer, Slice};
use crate::matrix::{Room, stride_room};
use crate::object::prefix::longest_match;

impl Slice {
    /// The peers that stand for more than themselves.
    fn gateways(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values().filter(|peer| !peer.allowed_ips.is_disjoint(&self.local.external_routes))
    }

    /// An upper bound of what the address table of the node has, which is made of all prefixes at which class, cidr or
    /// holder may change. The same for every node that stands for the same classes.
    pub fn room(&self) -> Room {
        let local = &self.local;
        let routes = local.external_routes.iter().chain(&local.gateway_for);
        let gateways = self.gateways().flat_map(|peer| &peer.allowed_ips);
        stride_room(self.prefixes.keys().chain(routes).chain(gateways).copied())
    }

    /// How many kinds of addresses the table tells apart because a gateway holds them.
    pub fn held_leaves(&self) -> usize {
        let local = &self.local;
        let mut holders: BTreeMap<IpNet, Option<usize>> =
            local.external_routes.iter().chain(&local.gateway_for).map(|&net| (net, None)).collect();
        for (number, peer) in self.gateways().enumerate() {
            holders.extend(peer.allowed_ips.iter().map(|&net| (net, Some(number))));
        }
        if holders.is_empty() {
            return 0;
        }
        let held = self.prefixes.keys().chain(holders.keys()).filter_map(|&net| {
            let gateway = (*longest_match(&holders, net)?.1)?;
            let (_, place) = longest_match(&self.prefixes, net)?;
            Some((place, gateway))
        });
        held.collect::<BTreeSet<_>>().len()
    }
}
