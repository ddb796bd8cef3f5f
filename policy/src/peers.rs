//! Who stands for which addresses, and so who is a peer of whom: docs/POLICY.md, section 4.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::network::Network;
use crate::object::id::{CidrId, ClassId, NodeId};
use crate::object::node::{Node, NodeState};
use crate::object::prefix::longest_match;
use crate::slice::Peer;

/// What the active nodes stand for: their own addresses, and what is behind them as the active gateway.
#[derive(Debug, Default)]
pub(crate) struct Stands {
    /// External prefixes with their active gateway, by longest match.
    gateways: BTreeMap<IpNet, NodeId>,
    /// Each with the cidrs in which it is met: classes know no cidrs.
    classes: BTreeMap<NodeId, BTreeSet<(ClassId, CidrId)>>,
    nodes: BTreeMap<ClassId, BTreeSet<NodeId>>,
}

impl Stands {
    /// `prefixes` say of each prefix of interest which class it has, and which cidr it lies in.
    pub(crate) fn of(network: &Network, prefixes: &BTreeMap<IpNet, (ClassId, CidrId)>) -> Self {
        let mut stands = Self { gateways: gateways(network), ..Self::default() };
        for node in active(network) {
            for address in node.addresses.iter().map(IpNet::from) {
                if let Some((_, &found)) = longest_match(prefixes, address) {
                    stands.add(node.id, found);
                }
            }
        }
        if !stands.gateways.is_empty() {
            for (&prefix, &found) in prefixes {
                if let Some((_, &node)) = longest_match(&stands.gateways, prefix) {
                    stands.add(node, found);
                }
            }
        }
        stands
    }

    fn add(&mut self, node: NodeId, (class, cidr): (ClassId, CidrId)) {
        self.classes.entry(node).or_default().insert((class, cidr));
        self.nodes.entry(class).or_default().insert(node);
    }

    /// The classes that a node stands for, none if it is not active.
    pub(crate) fn classes_of(&self, node: NodeId) -> BTreeSet<(ClassId, CidrId)> {
        self.classes.get(&node).cloned().unwrap_or_default()
    }

    /// Every set of classes that some node stands for, with the first of the nodes that do.
    pub(crate) fn distinct(&self) -> BTreeMap<&BTreeSet<(ClassId, CidrId)>, NodeId> {
        let mut distinct = BTreeMap::new();
        for (&node, classes) in &self.classes {
            distinct.entry(classes).or_insert(node);
        }
        distinct
    }

    /// The active nodes that stand for addresses of a class.
    pub(crate) fn nodes_in(&self, class: ClassId) -> impl Iterator<Item = NodeId> + '_ {
        self.nodes.get(&class).into_iter().flatten().copied()
    }

    /// The nodes that are the active gateway of something.
    pub(crate) fn gateways(&self) -> BTreeSet<NodeId> {
        self.gateways.values().copied().collect()
    }

    /// The external prefixes that a node is the active gateway of.
    pub(crate) fn behind(&self, node: NodeId) -> impl Iterator<Item = IpNet> + '_ {
        self.gateways.iter().filter(move |(_, gateway)| **gateway == node).map(|(prefix, _)| *prefix)
    }

    /// The external prefixes whose active gateway is another node.
    pub(crate) fn elsewhere(&self, node: NodeId) -> impl Iterator<Item = IpNet> + '_ {
        self.gateways.iter().filter(move |(_, gateway)| **gateway != node).map(|(prefix, _)| *prefix)
    }

    /// A node as its peers configure it; none if it is not active.
    pub(crate) fn peer(&self, network: &Network, node: NodeId) -> Option<Peer> {
        let node = network.nodes().get(&node).filter(|node| node.state == NodeState::Active)?;
        Some(Peer {
            name: node.name.clone(),
            public_key: node.public_key?,
            endpoint: node.endpoint.map(|endpoint| endpoint.address),
            allowed_ips: node.addresses.iter().map(IpNet::from).chain(self.behind(node.id)).collect(),
        })
    }
}

fn active(network: &Network) -> impl Iterator<Item = &Node> {
    network.nodes().values().filter(|node| node.state == NodeState::Active)
}

/// One active gateway for each external cidr that has any: the one with the lowest id.
fn gateways(network: &Network) -> BTreeMap<IpNet, NodeId> {
    let mut gateways = BTreeMap::new();
    for node in active(network) {
        for cidr in node.gateway_for.iter().filter_map(|id| network.cidrs().get(id)) {
            for prefix in cidr.prefixes.iter() {
                gateways.entry(prefix).or_insert(node.id);
            }
        }
    }
    gateways
}
