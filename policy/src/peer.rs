//! Peers: docs/POLICY.md, section 4.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::network::Network;
use crate::object::digest::Digest;
use crate::object::id::{NodeId, NodeName};
use crate::object::key::PublicKey;
use crate::object::node::{Node, NodeState};

/// A node with which some service is allowed in some direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: NodeName,
    pub public_key: PublicKey,
    /// The configured one. Where there is none, what was observed counts, which is no part of the policy.
    pub endpoint: Option<SocketAddr>,
    /// Where it was seen. Not part of the policy: no delta says it, and no digest counts it.
    pub seen: Option<SocketAddr>,
    /// Shared: a peer is copied with its neighbours in a map whenever one of these is another.
    pub allowed_ips: Arc<BTreeSet<IpNet>>,
}

impl Peer {
    /// A node as its peers configure it; none if it is not active.
    pub(crate) fn of(network: &Network, node: NodeId) -> Option<Self> {
        let node = network.nodes().get(&node).filter(|node| node.state == NodeState::Active)?;
        Some(Self {
            name: node.name.clone(),
            public_key: node.public_key?,
            endpoint: node.endpoint,
            seen: None,
            allowed_ips: Arc::new(node.addresses.iter().map(IpNet::from).chain(served(network, node)).collect()),
        })
    }

    /// Where it is reached: where an operator says, else where it was seen.
    pub fn reached_at(&self) -> Option<SocketAddr> {
        self.endpoint.or(self.seen)
    }

    pub(crate) fn digest(&self, id: NodeId) -> Digest {
        let Self { name, public_key, endpoint, seen: _, allowed_ips } = self;
        Digest::of_row(b'p', |row| {
            row.number(id.0.into());
            row.bytes(name.as_str().as_bytes());
            row.bytes(public_key.as_bytes());
            row.bytes(endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default().as_bytes());
            row.nets(allowed_ips.iter().copied());
        })
    }
}

/// The external prefixes that a node is the active gateway of.
pub(crate) fn served(network: &Network, node: &Node) -> BTreeSet<IpNet> {
    let served = node.gateway_for.iter().filter(|cidr| network.gateway_of(**cidr) == Some(node.id));
    served.filter_map(|cidr| network.cidrs().get(cidr)).flat_map(|cidr| cidr.prefixes.iter()).collect()
}
