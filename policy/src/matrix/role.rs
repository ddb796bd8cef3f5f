//! Roles: what a node stands for, as classes. Nodes of one role share everything but what is their own.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;

use super::class::{Class, class_of, interest_within};
use crate::network::Network;
use crate::object::digest::Digest;
use crate::object::id::{CidrId, ClassId, NodeId};
use crate::object::node::{Node, NodeState};
use crate::peer::{Peer, served};

/// The classes of the addresses that a node stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Role {
    /// Of its own addresses. Both are the same but where a literal selects one of them only.
    v4: Option<Class>,
    v6: Option<Class>,
    /// Of the addresses behind it, as the active gateway.
    behind: BTreeSet<Class>,
}

/// An active node in the matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) role: Arc<Role>,
    /// Of the node as its peers configure it.
    pub(super) peer: Digest,
}

impl Standing {
    /// None if the node is not active.
    pub(super) fn of(network: &Network, id: NodeId) -> Option<Self> {
        let node = network.nodes().get(&id).filter(|node| node.state == NodeState::Active)?;
        let peer = Peer::of(network, id)?.digest(id);
        Some(Self { role: Arc::new(Role::of(network, node)), peer })
    }
}

impl Role {
    fn of(network: &Network, node: &Node) -> Self {
        let class = |net: IpNet| class_of(network, net);
        let v4 = node.addresses.v4().and_then(|address| class(IpNet::from(std::net::IpAddr::V4(address))));
        let v6 = node.addresses.v6().and_then(|address| class(IpNet::from(std::net::IpAddr::V6(address))));
        let within = served(network, node).into_iter().flat_map(|net| interest_within(network, net));
        let behind = within.filter_map(class).filter(|class| holder(network, class.cidr) == Some(node.id)).collect();
        Self { v4, v6, behind }
    }

    /// The classes with the ids that they have in the slices of the role: those of the node's own addresses have ids of
    /// their own, so that they stay what they are when the node begins to be named.
    pub(crate) fn own(&self) -> Vec<(ClassId, &Class)> {
        let v6 = if self.is_split() { ClassId::OWN_V6 } else { ClassId::OWN };
        let mut own: Vec<(ClassId, &Class)> = Vec::new();
        own.extend(self.v4.as_ref().map(|class| (ClassId::OWN, class)));
        own.extend(self.v6.as_ref().filter(|_| self.is_split() || self.v4.is_none()).map(|class| (v6, class)));
        own.extend(self.behind.iter().map(|class| (class.id(), class)));
        own
    }

    /// Whether a rule tells the two own addresses apart.
    pub(crate) fn is_split(&self) -> bool {
        self.v4.is_some() && self.v6.is_some() && self.v4 != self.v6
    }

    pub(super) fn classes(&self) -> BTreeSet<&Class> {
        self.v4.iter().chain(&self.v6).chain(&self.behind).collect()
    }

    /// Whether the node stands for these addresses as a gateway.
    pub(super) fn is_behind(&self, class: &Class) -> bool {
        self.behind.contains(class)
    }
}

/// The active gateway of the addresses directly in a cidr: that of the deepest cidr around them that has one.
fn holder(network: &Network, cidr: CidrId) -> Option<NodeId> {
    network.lineage_of(cidr).into_iter().find_map(|cidr| network.gateway_of(cidr))
}
