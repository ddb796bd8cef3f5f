//! A delta applied to a slice, whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;

use super::delta::differing;
use super::digest::{of_cell, of_prefix};
use super::tally::{Kept, Tally};
use super::{Cells, DeltaError, Local, Slice, SliceDelta, SliceRule, Touched};
use crate::Map;
use crate::limit::{self, Bounded};
use crate::matrix::SliceCidr;
use crate::object::digest::Digest;
use crate::object::id::{NodeId, Revision};
use crate::peer::Peer;

impl Slice {
    /// Applies a delta whole, or refuses it and stays as it is. What follows a slice that came in the same way is checked
    /// by what it touches.
    pub fn apply(&mut self, delta: SliceDelta) -> Result<(), DeltaError> {
        if delta.from != self.revision {
            return Err(DeltaError::From { from: delta.from, revision: self.revision });
        }
        if delta.base != self.digest {
            return Err(DeltaError::Base { base: delta.base, digest: self.digest });
        }
        let mut next = self.clone();
        next.change(delta)?;
        let touched = Touched::between(self, &next);
        let tally = match self.kept.of(self) {
            Some(tally) => {
                let (known, tally) = (tally, tally.followed(self, &next, &touched));
                if !tally.proves(known, self, &next, &touched) {
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
    pub fn from_snapshot(delta: SliceDelta) -> Result<Slice, DeltaError> {
        let mut slice = Self::assembled(delta)?;
        slice.validate()?;
        slice.kept = Kept::new(Tally::of(&slice));
        Ok(slice)
    }

    /// As [`Slice::from_snapshot`], of rows that came without a digest: they get the one that they have.
    pub fn from_rows(mut delta: SliceDelta) -> Result<Slice, DeltaError> {
        if let Err(DeltaError::Digest { found, .. }) = Self::assembled(delta.clone()) {
            delta.digest = found;
        }
        Self::from_snapshot(delta)
    }

    /// Takes note of where peers were seen; returns whether that is news. Of others nothing is kept.
    pub fn see(&mut self, endpoints: impl IntoIterator<Item = (NodeId, SocketAddr)>) -> bool {
        let (mut is_news, tally) = (false, self.kept.of(self).cloned());
        for (id, endpoint) in endpoints {
            if let Some(peer) = self.peers.get(&id).filter(|peer| peer.seen != Some(endpoint)) {
                let peer = Peer { seen: Some(endpoint), ..peer.clone() };
                self.peers.insert(id, peer);
                is_news = true;
            }
        }
        if let Some(tally) = tally.filter(|_| is_news) {
            self.kept = Kept::new(tally.of_seen(self));
        }
        is_news
    }

    /// Where peers were seen.
    pub fn seen(&self) -> impl Iterator<Item = (NodeId, SocketAddr)> {
        self.peers.iter().filter_map(|(id, peer)| Some((*id, peer.seen?)))
    }

    /// Where peers were seen that were not seen there in another slice.
    pub fn seen_since(&self, old: &Self) -> Vec<(NodeId, SocketAddr)> {
        let differing = differing(&old.peers, &self.peers);
        let seen = |slice: &Self, id: &NodeId| slice.peers.get(id).and_then(|peer| peer.seen);
        differing
            .into_iter()
            .filter(|id| seen(self, id) != seen(old, id))
            .filter_map(|id| Some((id, seen(self, &id)?)))
            .collect()
    }

    /// The slice of a node that has no part in the network (any more): it knows itself, and nothing is allowed.
    pub fn emptied(&self, revision: Revision) -> Slice {
        let local = Local { gateway_for: BTreeSet::new(), ..self.local.as_sent() };
        let digest = local.digest();
        Slice {
            revision,
            digest,
            local: local.into(),
            peers: Map::new(),
            cidrs: Map::new(),
            rules: Map::new(),
            prefixes: Map::new(),
            cells: Map::new(),
            marked: Map::new(),
            itself: None,
            kept: Kept::default(),
        }
    }

    /// As [`Slice::from_snapshot`], but not held against any limit.
    pub(super) fn assembled(mut delta: SliceDelta) -> Result<Slice, DeltaError> {
        let local = match delta.local.take() {
            Some(local) if delta.from == Revision::default() => local,
            _ => return Err(DeltaError::NotWhole(delta.from)),
        };
        let mut slice = Slice {
            revision: delta.revision,
            digest: local.digest(),
            local: local.into(),
            peers: Map::new(),
            cidrs: Map::new(),
            rules: Map::new(),
            prefixes: Map::new(),
            cells: Map::new(),
            marked: Map::new(),
            itself: None,
            kept: Kept::default(),
        };
        slice.change(delta)?;
        Ok(slice)
    }

    fn change(&mut self, delta: SliceDelta) -> Result<(), DeltaError> {
        let SliceDelta {
            from: _,
            base: _,
            revision,
            digest: expected,
            local,
            mut peers,
            mut removed_peers,
            cidrs,
            removed_cidrs,
            rules,
            removed_rules,
            prefixes,
            removed_prefixes,
            cells,
        } = delta;
        let before = self.clone();
        self.revision = revision;
        if let Some(local) = local {
            self.digest = self.digest - self.local.digest() + local.digest();
            let external_routes = self.local.external_routes.clone();
            self.local = Local { external_routes, ..local }.into();
        }
        for (id, peer) in &mut peers {
            peer.seen = self.peers.get(id).and_then(|known| known.seen);
        }
        self.change_itself(peers.remove(&self.local.node), removed_peers.remove(&self.local.node))?;
        let digest = &mut self.digest;
        merge("peer", &mut self.peers, peers, &removed_peers, digest, |id, peer: &Peer| peer.digest(*id))?;
        merge("rule", &mut self.rules, rules, &removed_rules, digest, |id, rule: &SliceRule| rule.digest(*id))?;
        let nets: BTreeSet<_> = prefixes.keys().chain(&removed_prefixes).copied().collect();
        let ids: BTreeSet<_> = cidrs.keys().chain(&removed_cidrs).copied().collect();
        merge("cidr", &mut self.cidrs, cidrs, &removed_cidrs, digest, |id, cidr: &SliceCidr| cidr.digest(*id))?;
        merge("prefix", &mut self.marked, prefixes, &removed_prefixes, digest, |net, place| of_prefix(*net, *place))?;
        self.follow_places(&before, &nets, &ids);
        self.set_cells(cells)?;
        if self.digest != expected {
            return Err(DeltaError::Digest { expected, found: self.digest });
        }
        Ok(())
    }

    fn change_itself(&mut self, new: Option<Peer>, is_removed: bool) -> Result<(), DeltaError> {
        let id = self.local.node;
        if is_removed && new.is_some() {
            return Err(DeltaError::Twice(format!("peer {id}")));
        }
        if is_removed && self.itself.is_none() {
            return Err(DeltaError::NotThere(format!("peer {id}")));
        }
        if is_removed || new.is_some() {
            let of = |peer: &Option<Peer>| peer.as_ref().map(|peer| peer.digest(id)).unwrap_or_default();
            self.digest = self.digest - of(&self.itself) + of(&new);
            self.itself = new;
        }
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
                    let pair = (source, destination);
                    if !seen.insert(pair) {
                        return Err(DeltaError::CellTwice(source, destination));
                    }
                    let old = match cell.is_closed() {
                        true => self.cells.remove(&pair),
                        false => {
                            self.digest += of_cell(pair, &cell);
                            self.cells.insert(pair, cell.clone())
                        }
                    };
                    self.digest -= old.map(|old| of_cell(pair, &old)).unwrap_or_default();
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
    digest: &mut Digest,
    of: impl Fn(&K, &V) -> Digest,
) -> Result<(), DeltaError> {
    for key in removed {
        if set.contains_key(key) {
            return Err(DeltaError::Twice(format!("{what} {key}")));
        }
        match current.remove(key) {
            Some(old) => *digest -= of(key, &old),
            None => return Err(DeltaError::NotThere(format!("{what} {key}"))),
        }
    }
    for (key, value) in set {
        *digest += of(&key, &value);
        if let Some(old) = current.insert(key.clone(), value) {
            *digest -= of(&key, &old);
        }
    }
    Ok(())
}
