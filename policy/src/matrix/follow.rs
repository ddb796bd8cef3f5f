//! From one matrix to the next, by what a change touches.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use imbl::ordmap::DiffItem;
use ipnet::IpNet;

use super::affected::{Affected, Between};
use super::role::Standing;
use super::room::ROOM_EACH;
use super::{Matrix, Shares, common, room_of};
use crate::limit::LimitError;
use crate::network::{Network, Rows};
use crate::object::cidr::Cidr;
use crate::object::id::{CidrId, NodeId};

impl Matrix {
    /// The matrix of a network that differs from this one's in the rows that are named, at most; and whom it affects.
    pub fn follow(&self, network: &Network, rows: &Rows) -> Result<(Self, Affected), LimitError> {
        let old = &self.network;
        let mut next = Self { network: network.clone(), shares: Arc::default(), ..self.clone() };
        let common = next.follow_cidrs(old, self.routed_by(network, rows));
        next.follow_room(self, rows);
        let changed = next.follow_nodes(self.standing_anew(network, rows));
        next.check_prefixes()?;
        let affected = Between { old: self, new: &next, rows, changed: &changed }.affected(common);
        next.shares = Arc::new(Mutex::new(self.shares_kept(&affected)));
        Ok((next, affected))
    }

    /// The shares of roles that no affected node has or had.
    fn shares_kept(&self, affected: &Affected) -> Shares {
        if affected.is_everybody {
            return Shares::default();
        }
        let mut kept = self.shares.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for role in affected.nodes.iter().filter_map(|node| self.role(*node)) {
            kept.remove(role);
        }
        kept
    }

    /// Cidrs that every slice may have to say something else of: those touched, and those whose gateway may come or go.
    fn routed_by(&self, network: &Network, rows: &Rows) -> BTreeSet<CidrId> {
        let nodes = rows.nodes.iter().flat_map(|id| [self.network.nodes().get(id), network.nodes().get(id)]);
        let served = nodes.flatten().flat_map(|node| node.gateway_for.iter().copied());
        rows.cidrs.iter().copied().chain(served).collect()
    }

    /// Keeps the digest of what every slice says; returns whether any of it has changed.
    pub(super) fn follow_cidrs(&mut self, old: &Network, cidrs: BTreeSet<CidrId>) -> bool {
        let before = self.common;
        for cidr in cidrs {
            self.common -= common::digest(old, cidr);
            self.common += common::digest(&self.network, cidr);
        }
        self.common != before
    }

    /// Looks at nodes again; returns those that stand for other classes now, or are another peer.
    pub(super) fn follow_nodes(&mut self, nodes: BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        let mut changed = BTreeSet::new();
        for node in nodes {
            let before = self.standing.get(&node).cloned();
            let after = Standing::of(&self.network, node);
            if before == after {
                continue;
            }
            changed.insert(node);
            if let Some(before) = before {
                self.withdraw(node, &before);
                self.standing.remove(&node);
            }
            if let Some(after) = after {
                self.place(node, &after);
                self.standing.insert(node, after);
            }
        }
        changed
    }

    /// Each prefix more takes so much at most; what was taken away is found out when the bound is no use any more.
    fn follow_room(&mut self, old: &Self, rows: &Rows) {
        let count = |matrix: &Self| matrix.network.prefixes().len() + matrix.network.marks().len();
        let mut more = 0;
        for item in old.network.marks().diff(self.network.marks()) {
            more += usize::from(matches!(item, DiffItem::Add(..)));
        }
        // Two prefixes of a cidr, or two addresses of a gateway.
        more += 2 * (rows.cidrs.len() + rows.nodes.len());
        if count(self) != count(old) || !rows.cidrs.is_empty() || !rows.nodes.is_empty() {
            self.room = self.room + ROOM_EACH * more;
        }
        if self.room.check().is_err() {
            self.room = room_of(&self.network);
        }
    }

    fn place(&mut self, node: NodeId, standing: &Standing) {
        let classes = standing.role.classes();
        let is_in_several = classes.len() > 1;
        for class in classes {
            let mut members = self.members.get(class).cloned().unwrap_or_default();
            members.insert(node, is_in_several, standing.peer);
            self.members.insert(class.clone(), members);
            self.marked.extend(class.marks.iter().map(|selector| (*selector, class.clone())));
        }
    }

    fn withdraw(&mut self, node: NodeId, standing: &Standing) {
        for class in standing.role.classes() {
            let Some(mut members) = self.members.get(class).cloned() else { continue };
            members.remove(node, standing.peer);
            if members.nodes.is_empty() {
                self.members.remove(class);
                for selector in class.marks.iter() {
                    self.marked.remove(&(*selector, class.clone()));
                }
            } else {
                self.members.insert(class.clone(), members);
            }
        }
    }

    /// The nodes that may stand for other classes than they do here.
    fn standing_anew(&self, network: &Network, rows: &Rows) -> BTreeSet<NodeId> {
        let old = &self.network;
        let mut nodes = rows.nodes.clone();
        let nets = moved_prefixes(old, network, rows);
        for net in &nets {
            nodes.extend(old.nodes_within(*net).chain(network.nodes_within(*net)));
        }
        let in_roots = |net: &IpNet| network.roots().iter().any(|root| root.contains(net));
        let serves = |id: &NodeId| {
            [old, network].iter().filter_map(|network| network.nodes().get(id)).any(|node| !node.gateway_for.is_empty())
        };
        if !nets.iter().all(in_roots) || rows.nodes.iter().any(serves) {
            nodes.extend(old.gateways().union(&network.gateways()));
        }
        nodes
    }
}

/// The prefixes within which an address may have another class.
fn moved_prefixes(old: &Network, new: &Network, rows: &Rows) -> BTreeSet<IpNet> {
    let marks = old.marks().diff(new.marks()).map(|item| match item {
        DiffItem::Add(net, _) | DiffItem::Remove(net, _) | DiffItem::Update { new: (net, _), .. } => *net,
    });
    let mut nets: BTreeSet<IpNet> = marks.collect();
    for cidr in &rows.cidrs {
        let prefixes = |network: &Network| network.cidrs().get(cidr).map(|cidr: &Cidr| cidr.prefixes);
        let (before, after) = (prefixes(old), prefixes(new));
        if before != after {
            nets.extend(before.into_iter().chain(after).flat_map(|prefixes| prefixes.iter()));
        }
    }
    nets
}
