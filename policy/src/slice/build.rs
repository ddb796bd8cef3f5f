//! From matrices to slices and deltas. What is alike for many nodes is one fragment, which is found and written once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::delta::rectangles;
use super::digest::{of_cell, of_prefix};
use super::{Local, Slice, SliceDelta, SliceRule};
use crate::matrix::{Cell, Matrix, Role, Share};
use crate::object::digest::Digest;
use crate::object::id::{CidrId, NodeId, Revision, RuleId};
use crate::peer::{Peer, served};
use imbl::ordmap::DiffItem;

/// A part of a delta, and what it adds to the digest of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// Without revisions and digests.
    pub rows: SliceDelta,
    pub difference: Digest,
}

impl Fragment {
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// What every node is told of the cidrs. `old`: what it knows; `None`: nothing.
    pub fn of_cidrs(old: Option<&Matrix>, new: &Matrix) -> Self {
        let mut rows = SliceDelta::default();
        for id in touched_cidrs(old, new) {
            let before = old.and_then(|old| old.slice_cidr(id));
            match new.slice_cidr(id) {
                Some(cidr) if before.as_ref() != Some(&cidr) => drop(rows.cidrs.insert(id, cidr)),
                None if before.is_some() => drop(rows.removed_cidrs.insert(id)),
                _ => {}
            }
        }
        let before = old.map(Matrix::common).unwrap_or_default();
        Self { rows, difference: new.common() - before }
    }

    /// What every node of a role is told of rules, cells and peers. `old`: what it stood for and what it knows.
    pub fn of_role(
        old: Option<(&Matrix, &Arc<Role>)>,
        new: (&Matrix, &Arc<Role>),
        changed: Option<&BTreeSet<NodeId>>,
    ) -> Self {
        let (matrix, role) = new;
        let share = matrix.share(role);
        let before = old.map(|(matrix, role)| matrix.share(role)).unwrap_or_default();
        let mut rows = SliceDelta::default();
        (rows.prefixes, rows.removed_prefixes) = changes(&before.prefixes, &share.prefixes);
        let (mut cells, closed) = changes(&before.cells, &share.cells);
        cells.extend(closed.into_iter().map(|pair| (pair, Arc::new(Cell::CLOSED))));
        rows.cells = rectangles(cells.iter().map(|(pair, cell)| (*pair, cell.as_ref())));
        for id in before.rules.union(&share.rules) {
            let known = old.filter(|_| before.rules.contains(id)).and_then(|(matrix, _)| rule(matrix, *id));
            match rule(matrix, *id).filter(|_| share.rules.contains(id)) {
                Some(rule) if known.as_ref() != Some(&rule) => drop(rows.rules.insert(*id, rule)),
                None if known.is_some() => drop(rows.removed_rules.insert(*id)),
                _ => {}
            }
        }
        let known = old.map(|(matrix, role)| share_digest(matrix, &matrix.share(role))).unwrap_or_default();
        let mut difference = share_digest(matrix, &share) - known;
        difference += peers(old, new, changed, &mut rows);
        Self { rows, difference }
    }

    /// What only one node is told. `old`: what it knows.
    pub fn of_node(old: Option<&Matrix>, new: &Matrix, node: NodeId) -> Option<Self> {
        let local = local(new, node)?;
        let before = old.and_then(|old| self::local(old, node));
        let difference = local.digest() - before.as_ref().map(Local::digest).unwrap_or_default();
        let local = Some(local).filter(|local| before.as_ref() != Some(local));
        Some(Self { rows: SliceDelta { local, ..SliceDelta::default() }, difference })
    }
}

impl Matrix {
    /// Everything that a node needs; none if it is not active.
    pub fn slice(&self, node: NodeId, revision: Revision) -> Option<Slice> {
        Slice::assembled(self.snapshot(node, revision)?).ok()
    }

    /// The same as a delta from nothing.
    pub fn snapshot(&self, node: NodeId, revision: Revision) -> Option<SliceDelta> {
        self.delta(None, node, (Revision::default(), revision))
    }

    /// What turns the slice that a node had in `old` into the one that it has here; with no `old` everything. `revisions`:
    /// of the two. None if the node is not active.
    pub fn delta(&self, old: Option<&Matrix>, node: NodeId, revisions: (Revision, Revision)) -> Option<SliceDelta> {
        let role = self.role(node)?;
        let known = old.and_then(|old| Some((old, old.role(node)?)));
        let old = known.map(|(old, _)| old);
        let (cidrs, own) = (Fragment::of_cidrs(old, self), Fragment::of_node(old, self, node)?);
        let shared = Fragment::of_role(known, (self, role), None);
        let SliceDelta { cidrs, removed_cidrs, .. } = cidrs.rows;
        Some(SliceDelta {
            from: if known.is_some() { revisions.0 } else { Revision::default() },
            base: old.and_then(|old| old.digest(node)).unwrap_or_default(),
            revision: revisions.1,
            digest: self.digest(node)?,
            local: own.rows.local,
            cidrs,
            removed_cidrs,
            ..shared.rows
        })
    }

    /// Of a node's slice; none if it is not active.
    pub fn digest(&self, node: NodeId) -> Option<Digest> {
        let role = self.role(node)?;
        let shared = share_digest(self, &self.share(role)) + self.peers_digest(role);
        Some(self.common() + shared + local(self, node)?.digest())
    }
}

fn local(matrix: &Matrix, id: NodeId) -> Option<Local> {
    let network = matrix.network();
    let (node, role) = (network.nodes().get(&id)?, matrix.role(id)?);
    Some(Local {
        node: id,
        name: node.name.clone(),
        network: network.name().clone(),
        addresses: node.addresses,
        is_split: role.is_split(),
        roots: *network.roots(),
        external_routes: BTreeSet::new(),
        gateway_for: served(network, node),
        requires: BTreeSet::new(),
    })
}

fn rule(matrix: &Matrix, id: RuleId) -> Option<SliceRule> {
    let rule = matrix.network().rules().get(&id)?;
    Some(SliceRule { name: rule.name.clone(), action: rule.action, log: rule.log, requires: BTreeSet::new() })
}

/// Of everything in a role's share but its peers. A share is kept as long as no rule in it is touched.
fn share_digest(matrix: &Matrix, share: &Share) -> Digest {
    *share.digest.get_or_init(|| {
        let prefixes = share.prefixes.iter().map(|(net, place)| of_prefix(*net, *place));
        let cells = share.cells.iter().map(|(pair, cell)| of_cell(*pair, cell));
        let rules = share.rules.iter().filter_map(|id| Some(rule(matrix, *id)?.digest(*id)));
        prefixes.chain(cells).chain(rules).sum()
    })
}

/// The peers that came, went or are others now; returns what they add to the digest. `changed`: the nodes that stand for
/// other classes or are other peers, if that is known.
fn peers(
    old: Option<(&Matrix, &Arc<Role>)>,
    (matrix, role): (&Matrix, &Arc<Role>),
    changed: Option<&BTreeSet<NodeId>>,
    rows: &mut SliceDelta,
) -> Digest {
    let candidates = match (old, changed) {
        (Some((old, old_role)), Some(changed)) => &matrix.opened_otherwise(role, old, old_role) | changed,
        (Some((old, old_role)), None) => &old.peers(old_role) | &matrix.peers(role),
        (None, _) => matrix.peers(role),
    };
    let mut difference = Digest::default();
    for id in candidates {
        let known = old.filter(|(matrix, role)| matrix.is_peer(role, id));
        let known = known.and_then(|(matrix, _)| Peer::of(matrix.network(), id));
        match Peer::of(matrix.network(), id).filter(|_| matrix.is_peer(role, id)) {
            Some(peer) if known.as_ref() != Some(&peer) => {
                difference += peer.digest(id);
                rows.peers.insert(id, peer);
            }
            None if known.is_some() => drop(rows.removed_peers.insert(id)),
            _ => continue,
        }
        difference -= known.map(|known| known.digest(id)).unwrap_or_default();
    }
    difference
}

/// Cidrs that two matrices may have to say different things of.
fn touched_cidrs(old: Option<&Matrix>, new: &Matrix) -> BTreeSet<CidrId> {
    let Some(old) = old else { return new.network().cidrs().keys().copied().collect() };
    let differ = old.network().cidrs().diff(new.network().cidrs()).map(|item| match item {
        DiffItem::Add(id, _) | DiffItem::Remove(id, _) | DiffItem::Update { new: (id, _), .. } => *id,
    });
    let mut cidrs: BTreeSet<CidrId> = differ.collect();
    // Whether an external one is routed depends on its gateways.
    for network in [old.network(), new.network()] {
        let gateways = network.gateways();
        let nodes = gateways.iter().filter_map(|id| network.nodes().get(id));
        cidrs.extend(nodes.flat_map(|node| node.gateway_for.iter()));
    }
    cidrs
}

/// The entries of `new` that `old` lacks or has otherwise, and the keys that only `old` has.
fn changes<K: Ord + Copy, V: Clone + PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> (BTreeMap<K, V>, BTreeSet<K>) {
    let set = new.iter().filter(|&(key, value)| old.get(key) != Some(value));
    let removed = old.keys().filter(|key| !new.contains_key(*key));
    (set.map(|(key, value)| (*key, value.clone())).collect(), removed.copied().collect())
}
