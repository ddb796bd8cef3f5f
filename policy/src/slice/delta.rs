//! Deltas: what turns one slice into the next.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{Local, Map, Peer, Slice, SliceRule};
use crate::matrix::Cell;
use crate::object::id::{CidrId, CidrName, ClassId, NodeId, Revision, RuleId};

/// What turns the slice of revision `from` into that of `revision`. With `from` 0 it is a whole slice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SliceDelta {
    pub from: Revision,
    pub revision: Revision,
    /// Present in a whole slice, and when it changed.
    pub local: Option<Local>,
    pub peers: BTreeMap<NodeId, Peer>,
    pub removed_peers: BTreeSet<NodeId>,
    pub cidrs: BTreeMap<CidrId, CidrName>,
    pub removed_cidrs: BTreeSet<CidrId>,
    pub rules: BTreeMap<RuleId, SliceRule>,
    pub removed_rules: BTreeSet<RuleId>,
    pub prefixes: BTreeMap<IpNet, (ClassId, CidrId)>,
    pub removed_prefixes: BTreeSet<IpNet>,
    pub cells: Vec<Cells>,
    /// Classes that no prefix uses any more; their cells are gone.
    pub removed_classes: Vec<ClassId>,
}

/// Every ordered pair of a source and a destination gets this cell. One that denies everything with `no-rule` makes the
/// pair absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cells {
    pub sources: Vec<ClassId>,
    pub destinations: Vec<ClassId>,
    pub cell: Cell,
}

/// The entries of `new` that `old` lacks or has otherwise, and the keys that only `old` has.
fn changes<K: Ord + Copy, V: Clone + PartialEq>(old: &Map<K, V>, new: &Map<K, V>) -> (BTreeMap<K, V>, BTreeSet<K>) {
    let set = new.iter().filter(|&(key, value)| old.get(key) != Some(value));
    let removed = old.keys().filter(|key| !new.contains_key(*key));
    (set.map(|(key, value)| (*key, value.clone())).collect(), removed.copied().collect())
}

fn whole<K: Ord + Copy, V: Clone>(map: &Map<K, V>) -> BTreeMap<K, V> {
    map.iter().map(|(key, value)| (*key, value.clone())).collect()
}

impl Slice {
    /// What turns this slice into `new`: `old.apply(old.diff(&new))` gives `new`.
    pub fn diff(&self, new: &Slice) -> SliceDelta {
        let (peers, removed_peers) = changes(&self.peers, &new.peers);
        let (cidrs, removed_cidrs) = changes(&self.cidrs, &new.cidrs);
        let (rules, removed_rules) = changes(&self.rules, &new.rules);
        let (prefixes, removed_prefixes) = changes(&self.prefixes, &new.prefixes);
        let kept = new.classes();
        let gone: Vec<ClassId> = self.classes().difference(&kept).copied().collect();
        let lives = |(source, destination): &(ClassId, ClassId)| kept.contains(source) && kept.contains(destination);
        let (mut cells, closed) = changes(&self.cells, &new.cells);
        cells.extend(closed.into_iter().filter(lives).map(|pair| (pair, Cell::CLOSED)));
        SliceDelta {
            from: self.revision,
            revision: new.revision,
            local: (self.local != new.local).then(|| (*new.local).clone()),
            peers,
            removed_peers,
            cidrs,
            removed_cidrs,
            rules,
            removed_rules,
            prefixes,
            removed_prefixes,
            cells: rectangles(&cells),
            removed_classes: gone,
        }
    }

    /// The whole slice as a delta from nothing.
    pub fn to_delta(&self) -> SliceDelta {
        SliceDelta {
            from: Revision::default(),
            revision: self.revision,
            local: Some((*self.local).clone()),
            peers: whole(&self.peers),
            cidrs: whole(&self.cidrs),
            rules: whole(&self.rules),
            prefixes: whole(&self.prefixes),
            cells: rectangles(&self.cells),
            ..SliceDelta::default()
        }
    }

    /// The classes that prefixes have.
    pub(super) fn classes(&self) -> BTreeSet<ClassId> {
        self.prefixes.values().map(|&(class, _)| class).collect()
    }
}

impl SliceDelta {
    /// Whether it says nothing but the revision.
    pub fn is_empty(&self) -> bool {
        let nothing = Self { from: self.from, revision: self.revision, ..Self::default() };
        *self == nothing
    }
}

/// Groups equal cells into products of sources and destinations: one rule between two cidrs is one product.
fn rectangles<'a>(cells: impl IntoIterator<Item = (&'a (ClassId, ClassId), &'a Cell)>) -> Vec<Cells> {
    let mut rows: BTreeMap<(&Cell, ClassId), Vec<ClassId>> = BTreeMap::new();
    for (&(source, destination), cell) in cells {
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
