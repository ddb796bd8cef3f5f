//! Deltas: what turns one slice into the next.

use std::collections::{BTreeMap, BTreeSet};

use imbl::ordmap::DiffItem;
use ipnet::IpNet;

use super::{Local, Slice, SliceRule};
use crate::Map;
use crate::matrix::{Cell, SliceCidr};
use crate::object::digest::Digest;
use crate::object::id::{CidrId, ClassId, NodeId, Revision, RuleId};
use crate::peer::Peer;

/// What turns the slice of revision `from` with the digest `base` into that of `revision` with `digest`. With `from` 0 it
/// is a whole slice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SliceDelta {
    pub from: Revision,
    pub base: Digest,
    pub revision: Revision,
    pub digest: Digest,
    /// Present in a whole slice, and when it changed. Its `external_routes` are empty: they follow from the cidrs.
    pub local: Option<Local>,
    pub peers: BTreeMap<NodeId, Peer>,
    pub removed_peers: BTreeSet<NodeId>,
    pub cidrs: BTreeMap<CidrId, SliceCidr>,
    pub removed_cidrs: BTreeSet<CidrId>,
    pub rules: BTreeMap<RuleId, SliceRule>,
    pub removed_rules: BTreeSet<RuleId>,
    /// Prefixes that are told apart within cidrs.
    pub prefixes: BTreeMap<IpNet, (ClassId, CidrId)>,
    pub removed_prefixes: BTreeSet<IpNet>,
    pub cells: Vec<Cells>,
}

/// Every ordered pair of a source and a destination gets this cell. One that denies everything with `no-rule` makes the
/// pair absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cells {
    pub sources: Vec<ClassId>,
    pub destinations: Vec<ClassId>,
    pub cell: Cell,
}

impl Slice {
    /// What turns this slice into `new`: `old.apply(old.diff(&new))` gives `new`.
    pub fn diff(&self, new: &Slice) -> SliceDelta {
        let (peers, mut removed_peers) = changes(&self.peers, &new.peers);
        let mut peers = unseen(peers);
        // Where a peer was seen is not part of the policy.
        peers.retain(|id, peer| self.peers.get(id).is_none_or(|known| Peer { seen: None, ..known.clone() } != *peer));
        match &new.itself {
            Some(peer) if self.itself.as_ref() != Some(peer) => drop(peers.insert(new.local.node, peer.clone())),
            None if self.itself.is_some() => drop(removed_peers.insert(self.local.node)),
            _ => {}
        }
        let (cidrs, removed_cidrs) = changes(&self.cidrs, &new.cidrs);
        let (rules, removed_rules) = changes(&self.rules, &new.rules);
        let (prefixes, removed_prefixes) = changes(&self.marked, &new.marked);
        let (mut cells, closed) = changes(&self.cells, &new.cells);
        cells.extend(closed.into_iter().map(|pair| (pair, Cell::CLOSED)));
        let local = new.local.as_sent();
        SliceDelta {
            from: self.revision,
            base: self.digest,
            revision: new.revision,
            digest: new.digest,
            local: (self.local.as_sent() != local).then_some(local),
            peers,
            removed_peers,
            cidrs,
            removed_cidrs,
            rules,
            removed_rules,
            prefixes,
            removed_prefixes,
            cells: rectangles(cells.iter().map(|(pair, cell)| (*pair, cell))),
        }
    }

    /// The whole slice as a delta from nothing.
    pub fn to_delta(&self) -> SliceDelta {
        let mut peers = unseen(whole(&self.peers));
        peers.extend(self.itself.clone().map(|peer| (self.local.node, peer)));
        SliceDelta {
            revision: self.revision,
            digest: self.digest,
            local: Some(self.local.as_sent()),
            peers,
            cidrs: whole(&self.cidrs),
            rules: whole(&self.rules),
            prefixes: whole(&self.marked),
            cells: rectangles(self.cells.iter().map(|(pair, cell)| (*pair, cell))),
            ..SliceDelta::default()
        }
    }
}

impl Local {
    /// Without what follows from the cidrs.
    pub(super) fn as_sent(&self) -> Self {
        Self { external_routes: BTreeSet::new(), ..self.clone() }
    }
}

/// The entries of `new` that `old` lacks or has otherwise, and the keys that only `old` has.
fn changes<K: Ord + Copy, V: Clone + PartialEq>(old: &Map<K, V>, new: &Map<K, V>) -> (BTreeMap<K, V>, BTreeSet<K>) {
    let (mut set, mut removed) = (BTreeMap::new(), BTreeSet::new());
    for key in differing(old, new) {
        match new.get(&key) {
            Some(value) => drop(set.insert(key, value.clone())),
            None => drop(removed.insert(key)),
        }
    }
    (set, removed)
}

/// The keys that one of two maps lacks, or has otherwise. Parts that they share are passed over.
pub(super) fn differing<K: Ord + Copy, V: PartialEq>(old: &Map<K, V>, new: &Map<K, V>) -> BTreeSet<K> {
    if old.ptr_eq(new) {
        return BTreeSet::new();
    }
    let key = |item| match item {
        DiffItem::Add(key, _) | DiffItem::Remove(key, _) | DiffItem::Update { new: (key, _), .. } => *key,
    };
    old.diff(new).map(key).collect()
}

/// As a controller sends them.
fn unseen(peers: BTreeMap<NodeId, Peer>) -> BTreeMap<NodeId, Peer> {
    peers.into_iter().map(|(id, peer)| (id, Peer { seen: None, ..peer })).collect()
}

fn whole<K: Ord + Copy, V: Clone>(map: &Map<K, V>) -> BTreeMap<K, V> {
    map.iter().map(|(key, value)| (*key, value.clone())).collect()
}

impl SliceDelta {
    /// Whether it says nothing but the revision.
    pub fn is_empty(&self) -> bool {
        let Self { from, base, revision, digest, .. } = *self;
        *self == Self { from, base, revision, digest, ..Self::default() }
    }
}

/// Groups equal cells into products of sources and destinations: one rule between two cidrs is one product.
pub(super) fn rectangles<'a>(cells: impl IntoIterator<Item = ((ClassId, ClassId), &'a Cell)>) -> Vec<Cells> {
    let mut rows: BTreeMap<(&Cell, ClassId), Vec<ClassId>> = BTreeMap::new();
    for ((source, destination), cell) in cells {
        rows.entry((cell, source)).or_default().push(destination);
    }
    let mut products: BTreeMap<(&Cell, Vec<ClassId>), Vec<ClassId>> = BTreeMap::new();
    for ((cell, source), destinations) in rows {
        products.entry((cell, destinations)).or_default().push(source);
    }
    let product =
        |((cell, destinations), sources): ((&Cell, _), _)| Cells { sources, destinations, cell: cell.clone() };
    products.into_iter().map(product).collect()
}
