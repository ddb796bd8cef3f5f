//! A slice or a delta from elsewhere is whole and within limits, or refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;
use thiserror::Error;

use super::size::Size;
use super::tally::{Kept, Tally};
use super::{Cells, Local, Map, Slice, SliceDelta, Touched};
use crate::limit::{self, Bounded, LimitError};
use crate::matrix::{Cell, CellError};
use crate::object::id::{ClassId, Revision};
use crate::object::prefix::{PrefixError, check_prefix};

/// Why a delta or a slice is refused. Whoever sent it is wrong: ask for a whole slice.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeltaError {
    #[error("the delta is from revision {from}, but the slice is of revision {revision}; ask for a whole slice")]
    From { from: Revision, revision: Revision },
    #[error("a whole slice is from revision 0 and says what is local; this is a delta from revision {0}")]
    NotWhole(Revision),
    #[error("{0} is both set and removed, or removed twice")]
    Twice(String),
    #[error("{0} is removed, but was not there")]
    NotThere(String),
    #[error("{0} speaks of {1}, which is not in the slice")]
    Dangling(String, String),
    #[error("the cell from class {0} to class {1} is set twice")]
    CellTwice(ClassId, ClassId),
    #[error("the cell from class {0} to class {1} concerns no address that the node stands for")]
    Foreign(ClassId, ClassId),
    #[error("the cell from class {0} to class {1} says only what an absent one says")]
    ClosedCell(ClassId, ClassId),
    #[error("a cell is malformed")]
    Cell(#[from] CellError),
    #[error("a product of cells has no sources or no destinations")]
    EmptyProduct,
    #[error("class {0} is removed, but a prefix has it")]
    LivingClass(ClassId),
    #[error("{0} has the id 0")]
    ZeroId(&'static str),
    #[error("a prefix is malformed")]
    Prefix(#[from] PrefixError),
    #[error("the prefix `{0}` is that of two peers, or of a peer and of this node")]
    SharedPrefix(IpNet),
    #[error("two peers have one public key, or a peer has the id of this node")]
    SharedIdentity,
    #[error("the slice is too large")]
    Limit(#[from] LimitError),
}

impl Slice {
    /// Applies a delta whole, or refuses it and stays as it is. What follows a slice that came in the same way is checked
    /// by what it touches.
    pub fn apply(&mut self, delta: SliceDelta) -> Result<(), DeltaError> {
        if delta.from != self.revision {
            return Err(DeltaError::From { from: delta.from, revision: self.revision });
        }
        let mut next = self.clone();
        next.change(delta)?;
        let touched = Touched::between(self, &next);
        let tally = match self.kept.of(self) {
            Some(tally) => {
                let tally = tally.followed(self, &next, &touched);
                if !tally.proves(&next, &touched) {
                    next.validate()?;
                }
                tally
            }
            None => {
                next.validate()?;
                Tally::of(&next)
            }
        };
        next.kept = Kept::new(tally);
        *self = next;
        Ok(())
    }

    /// The inverse of [`Slice::to_delta`].
    pub fn from_snapshot(mut delta: SliceDelta) -> Result<Slice, DeltaError> {
        let local = match delta.local.take() {
            Some(local) if delta.from == Revision::default() => local,
            _ => return Err(DeltaError::NotWhole(delta.from)),
        };
        let mut slice = Slice {
            revision: delta.revision,
            local: local.into(),
            peers: Map::new(),
            cidrs: Map::new(),
            rules: Map::new(),
            prefixes: Map::new(),
            cells: Map::new(),
            kept: Kept::default(),
        };
        slice.change(delta)?;
        slice.validate()?;
        slice.kept = Kept::new(Tally::of(&slice));
        Ok(slice)
    }

    fn change(&mut self, delta: SliceDelta) -> Result<(), DeltaError> {
        let SliceDelta {
            from: _,
            revision,
            local,
            peers,
            removed_peers,
            cidrs,
            removed_cidrs,
            rules,
            removed_rules,
            prefixes,
            removed_prefixes,
            cells,
            removed_classes,
        } = delta;
        // Only a delta that removes classes need know them all.
        let before = if removed_classes.is_empty() { BTreeSet::new() } else { self.classes() };
        self.revision = revision;
        if let Some(local) = local {
            self.local = local.into();
        }
        merge("peer", &mut self.peers, peers, &removed_peers)?;
        merge("cidr", &mut self.cidrs, cidrs, &removed_cidrs)?;
        merge("rule", &mut self.rules, rules, &removed_rules)?;
        merge("prefix", &mut self.prefixes, prefixes, &removed_prefixes)?;
        self.remove_classes(&before, &removed_classes)?;
        self.set_cells(cells)
    }

    fn remove_classes(&mut self, before: &BTreeSet<ClassId>, removed: &[ClassId]) -> Result<(), DeltaError> {
        if removed.is_empty() {
            return Ok(());
        }
        let (after, gone) = (self.classes(), removed.iter().copied().collect::<BTreeSet<_>>());
        for class in removed {
            if after.contains(class) {
                return Err(DeltaError::LivingClass(*class));
            }
            if !before.contains(class) {
                return Err(DeltaError::NotThere(format!("class {class}")));
            }
        }
        if gone.len() != removed.len() {
            return Err(DeltaError::Twice("a removed class".to_owned()));
        }
        let is_gone = |(source, destination): &(ClassId, ClassId)| gone.contains(source) || gone.contains(destination);
        let doomed: Vec<_> = self.cells.keys().filter(|pair| is_gone(pair)).copied().collect();
        doomed.iter().for_each(|pair| drop(self.cells.remove(pair)));
        Ok(())
    }

    fn set_cells(&mut self, cells: Vec<Cells>) -> Result<(), DeltaError> {
        let mut seen = BTreeSet::new();
        for Cells { sources, destinations, cell } in cells {
            if sources.is_empty() || destinations.is_empty() {
                return Err(DeltaError::EmptyProduct);
            }
            // Before the product is made: it may be far larger than the message that it came in.
            let count = sources.len().saturating_mul(destinations.len()).saturating_add(seen.len());
            Bounded::SliceCells.check(count, limit::MAX_SLICE_CELLS)?;
            for &source in &sources {
                for &destination in &destinations {
                    if !seen.insert((source, destination)) {
                        return Err(DeltaError::CellTwice(source, destination));
                    }
                    match cell.is_closed() {
                        true => self.cells.remove(&(source, destination)),
                        false => self.cells.insert((source, destination), cell.clone()),
                    };
                }
            }
        }
        Ok(())
    }

    /// Refuses a slice that refers to what is not in it, that contradicts itself, or that a node has no room for.
    pub fn validate(&self) -> Result<(), DeltaError> {
        let classes = self.classes();
        self.validate_ids(&classes)?;
        self.validate_prefixes()?;
        let own = self.own_classes();
        self.validate_cells(&classes, &own)?;
        self.validate_peers()?;
        Size::of(self, &classes, own.len()).check()?;
        Ok(())
    }

    fn validate_ids(&self, classes: &BTreeSet<ClassId>) -> Result<(), DeltaError> {
        let zero = [
            ("a node", self.local.node.0 == 0 || self.peers.keys().any(|id| id.0 == 0)),
            ("a cidr", self.cidrs.keys().any(|id| id.0 == 0)),
            ("a rule", self.rules.keys().any(|id| id.0 == 0)),
            ("a class", classes.iter().any(|id| id.0 == 0)),
        ];
        match zero.into_iter().find(|&(_, found)| found) {
            Some((what, _)) => Err(DeltaError::ZeroId(what)),
            None => Ok(()),
        }
    }

    fn validate_prefixes(&self) -> Result<(), DeltaError> {
        for (&prefix, (_, cidr)) in &self.prefixes {
            check_prefix(prefix)?;
            if !self.cidrs.contains_key(cidr) {
                return Err(DeltaError::Dangling(format!("the prefix `{prefix}`"), format!("cidr {cidr}")));
            }
        }
        let Local { external_routes, gateway_for, .. } = &*self.local;
        let peers = self.peers.values().flat_map(|peer| &peer.allowed_ips);
        for &prefix in external_routes.iter().chain(gateway_for).chain(peers) {
            check_prefix(prefix)?;
        }
        Ok(())
    }

    fn validate_cells(&self, classes: &BTreeSet<ClassId>, own: &BTreeSet<ClassId>) -> Result<(), DeltaError> {
        // Equal cells are many and checked once.
        let mut checked: BTreeSet<&Cell> = BTreeSet::new();
        for (&(source, destination), cell) in &self.cells {
            let what = || format!("the cell from class {source} to class {destination}");
            for class in [source, destination] {
                if !classes.contains(&class) {
                    return Err(DeltaError::Dangling(what(), format!("class {class}")));
                }
            }
            if !own.contains(&source) && !own.contains(&destination) {
                return Err(DeltaError::Foreign(source, destination));
            }
            if cell.is_closed() {
                return Err(DeltaError::ClosedCell(source, destination));
            }
            if !checked.insert(cell) {
                continue;
            }
            cell.validate()?;
            for verdict in cell.verdicts() {
                let Some(id) = verdict.rule else { continue };
                let Some(rule) = self.rules.get(&id) else {
                    return Err(DeltaError::Dangling(what(), format!("rule {id}")));
                };
                if rule.action != verdict.action {
                    return Err(CellError::Verdict(verdict).into());
                }
            }
        }
        Ok(())
    }

    fn validate_peers(&self) -> Result<(), DeltaError> {
        let own = self.local.addresses.iter().map(IpNet::from).chain(self.local.gateway_for.iter().copied());
        let mut prefixes: BTreeSet<IpNet> = own.collect();
        let mut keys = BTreeSet::new();
        for (id, peer) in &self.peers {
            if *id == self.local.node || !keys.insert(peer.public_key) {
                return Err(DeltaError::SharedIdentity);
            }
            for &prefix in &peer.allowed_ips {
                if !prefixes.insert(prefix) {
                    return Err(DeltaError::SharedPrefix(prefix));
                }
            }
        }
        Ok(())
    }
}

/// Applies one part of a delta to one part of a slice.
fn merge<K: Ord + Clone + fmt::Display, V: Clone>(
    what: &str,
    current: &mut Map<K, V>,
    set: BTreeMap<K, V>,
    removed: &BTreeSet<K>,
) -> Result<(), DeltaError> {
    for key in removed {
        if set.contains_key(key) {
            return Err(DeltaError::Twice(format!("{what} {key}")));
        }
        if current.remove(key).is_none() {
            return Err(DeltaError::NotThere(format!("{what} {key}")));
        }
    }
    current.extend(set);
    Ok(())
}
