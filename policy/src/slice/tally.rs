//! What is counted of a slice, so that a delta is checked by what it touches.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

use super::address_tally::AddressTally;
use super::size::{Run, Size, runs};
use super::{Local, Slice, SliceRule, Touched};
use crate::Map;
use crate::count::{less, more};
use crate::matrix::{Cell, SliceCidr};
use crate::object::id::{CidrId, ClassId, NodeId, RuleId};
use crate::object::key::PublicKey;
use crate::object::prefix::check_prefix;
use crate::object::rule::Action;
use crate::object::verdict::Verdict;
use crate::peer::Peer;

/// The tally of a slice, if there is one. Slices are equal whether they have one or not.
#[derive(Clone, Default)]
pub(crate) struct Kept(Option<Arc<Tally>>);

impl Kept {
    pub(super) fn new(tally: Tally) -> Self {
        Self(Some(Arc::new(tally)))
    }

    /// The tally, if it is that of the slice as it is now: whoever holds a slice may change it.
    pub(super) fn of(&self, slice: &Slice) -> Option<&Tally> {
        self.0.as_deref().filter(|tally| tally.of.are_those_of(slice))
    }
}

impl PartialEq for Kept {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Kept {}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "counted" } else { "not counted" })
    }
}

/// How often everything occurs that a limit or a contradiction is about.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    of: Parts,
    addresses: AddressTally,
    keys: Map<PublicKey, usize>,
    /// The prefixes of peers, and the node's own.
    allowed: Map<IpNet, usize>,
    cells: Map<Cell, usize>,
    /// By distinct cells, as are runs and pages.
    verdicts: Map<Verdict, usize>,
    runs: Map<Run, usize>,
    pages: usize,
}

/// The parts of the slice that was counted.
#[derive(Clone, Debug)]
struct Parts {
    local: Arc<Local>,
    peers: Map<NodeId, Peer>,
    cidrs: Map<CidrId, SliceCidr>,
    rules: Map<RuleId, SliceRule>,
    prefixes: Map<IpNet, (ClassId, CidrId)>,
    marked: Map<IpNet, (ClassId, CidrId)>,
    cells: Map<(ClassId, ClassId), Cell>,
}

impl Tally {
    pub(super) fn of(slice: &Slice) -> Self {
        let mut tally = Self {
            of: Parts::of(slice),
            addresses: AddressTally::of(slice),
            keys: Map::new(),
            allowed: Map::new(),
            cells: Map::new(),
            verdicts: Map::new(),
            runs: Map::new(),
            pages: 0,
        };
        tally.count_peers(slice);
        slice.cells.values().for_each(|cell| tally.add_cell(cell));
        tally
    }

    /// That of `new`, which differs from `old`, the slice of this tally, where it is touched.
    pub(super) fn followed(&self, old: &Slice, new: &Slice, touched: &Touched) -> Self {
        let mut tally = self.clone();
        tally.of = Parts::of(new);
        tally.addresses = self.addresses.followed(old, new, touched);
        if touched.local {
            tally.count_peers(new);
        } else {
            for id in &touched.peers {
                if let Some(peer) = old.peers.get(id) {
                    less(&mut tally.keys, &peer.public_key);
                    for net in peer.allowed_ips.iter() {
                        less(&mut tally.allowed, net);
                    }
                }
                if let Some(peer) = new.peers.get(id) {
                    tally.add_peer(peer);
                }
            }
        }
        for pair in &touched.cells {
            if let Some(cell) = old.cells.get(pair) {
                tally.remove_cell(cell);
            }
            if let Some(cell) = new.cells.get(pair) {
                tally.add_cell(cell);
            }
        }
        tally
    }

    /// That of the slice once peers were seen elsewhere, of which nothing is counted.
    pub(super) fn of_seen(self, slice: &Slice) -> Self {
        Self { of: Parts::of(slice), ..self }
    }

    /// Whether `new`, of which this is the tally, is sound for certain, as the slice was from which it differs where it is
    /// touched. What this says no to is for [`Slice::validate`] to judge.
    pub(super) fn proves(&self, before: &Self, old: &Slice, new: &Slice, touched: &Touched) -> bool {
        !touched.local
            && self.addresses.prove(&before.addresses, old, new, touched)
            && touched.peers.iter().all(|id| self.proves_peer(new, *id))
            && touched.rules.iter().all(|id| self.proves_rule(new, *id))
            && touched.cells.iter().all(|pair| self.proves_cell(new, *pair))
            && self.size(new).check().is_ok()
    }

    fn proves_peer(&self, new: &Slice, id: NodeId) -> bool {
        let Some(peer) = new.peers.get(&id) else { return true };
        let once = |net: &IpNet| check_prefix(*net).is_ok() && self.allowed.get(net) == Some(&1);
        id.0 != 0
            && id != new.local.node
            && self.keys.get(&peer.public_key) == Some(&1)
            && peer.allowed_ips.iter().all(once)
    }

    fn proves_rule(&self, new: &Slice, id: RuleId) -> bool {
        let decides = |action| self.verdicts.contains_key(&Verdict::of_rule(action, id));
        match new.rules.get(&id).map(|rule| rule.action) {
            Some(Action::Allow) => id.0 != 0 && !decides(Action::Deny),
            Some(Action::Deny) => id.0 != 0 && !decides(Action::Allow),
            None => !decides(Action::Allow) && !decides(Action::Deny),
        }
    }

    fn proves_cell(&self, new: &Slice, pair: (ClassId, ClassId)) -> bool {
        let Some(cell) = new.cells.get(&pair) else { return true };
        let AddressTally { classes, own, .. } = &self.addresses;
        let said = |verdict: Verdict| match verdict.rule {
            Some(id) => new.rules.get(&id).is_some_and(|rule| rule.action == verdict.action),
            None => true,
        };
        [pair.0, pair.1].iter().all(|class| classes.contains_key(class))
            && (own.contains_key(&pair.0) || own.contains_key(&pair.1))
            && !cell.is_closed()
            && cell.validate().is_ok()
            && cell.verdicts().all(said)
    }

    fn size(&self, slice: &Slice) -> Size {
        let AddressTally { classes, own, .. } = &self.addresses;
        Size {
            room: self.addresses.room(),
            leaves: self.addresses.leaves(),
            cells: Size::cells(own.len(), classes.len()),
            rules: slice.rules.len(),
            decisions: Size::decisions(self.verdicts.len()),
            pages: self.pages,
            ports: self.runs.len(),
        }
    }

    fn count_peers(&mut self, slice: &Slice) {
        (self.keys, self.allowed) = (Map::new(), Map::new());
        let Local { addresses, gateway_for, .. } = &*slice.local;
        let own: BTreeSet<IpNet> = addresses.iter().map(IpNet::from).chain(gateway_for.iter().copied()).collect();
        for net in &own {
            more(&mut self.allowed, net);
        }
        slice.peers.values().for_each(|peer| self.add_peer(peer));
    }

    fn add_peer(&mut self, peer: &Peer) {
        more(&mut self.keys, &peer.public_key);
        for net in peer.allowed_ips.iter() {
            more(&mut self.allowed, net);
        }
    }

    fn add_cell(&mut self, cell: &Cell) {
        if more(&mut self.cells, cell) {
            self.pages += usize::from(!cell.entries.is_empty());
            for verdict in &distinct_verdicts(cell) {
                more(&mut self.verdicts, verdict);
            }
            for run in &runs(cell) {
                more(&mut self.runs, run);
            }
        }
    }

    fn remove_cell(&mut self, cell: &Cell) {
        if less(&mut self.cells, cell) {
            self.pages -= usize::from(!cell.entries.is_empty());
            for verdict in &distinct_verdicts(cell) {
                less(&mut self.verdicts, verdict);
            }
            for run in &runs(cell) {
                less(&mut self.runs, run);
            }
        }
    }
}

impl Parts {
    fn of(slice: &Slice) -> Self {
        let Slice { revision: _, digest: _, local, peers, cidrs, rules, prefixes, cells, marked, itself: _, kept: _ } =
            slice.clone();
        Self { local, peers, cidrs, rules, prefixes, marked, cells }
    }

    fn are_those_of(&self, slice: &Slice) -> bool {
        Arc::ptr_eq(&self.local, &slice.local)
            && self.peers.ptr_eq(&slice.peers)
            && self.cidrs.ptr_eq(&slice.cidrs)
            && self.rules.ptr_eq(&slice.rules)
            && self.prefixes.ptr_eq(&slice.prefixes)
            && self.marked.ptr_eq(&slice.marked)
            && self.cells.ptr_eq(&slice.cells)
    }
}

fn distinct_verdicts(cell: &Cell) -> BTreeSet<Verdict> {
    cell.verdicts().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::matrix::Matrix;
    use crate::{Change, Network, NodeId, Revision, arbitrary};

    fn counts(tally: &Tally) -> impl PartialEq + fmt::Debug + use<> {
        let Tally { of: _, addresses, keys, allowed, cells, verdicts, runs, pages } = tally.clone();
        (addresses, keys, allowed, cells, verdicts, runs, pages)
    }

    /// Every node's slice is followed by deltas, and counted.
    fn check(mut network: Network, changes: &[Change]) -> Result<(), TestCaseError> {
        let mut held: std::collections::BTreeMap<NodeId, Slice> = Default::default();
        for (number, change) in changes.iter().enumerate() {
            let _refused = network.apply(change);
            let matrix = Matrix::compile(&network).unwrap();
            for &node in network.nodes().keys() {
                let old = held.remove(&node);
                let Some(new) = matrix.slice(node, Revision(number as u64 + 1)) else { continue };
                let mut followed = match &old {
                    Some(old) => old.clone(),
                    None => Slice::from_snapshot(new.to_delta()).unwrap(),
                };
                if let Some(old) = &old {
                    followed.apply(old.diff(&new)).unwrap();
                }
                let tally = followed.kept.of(&followed).expect("every slice that came as a delta was counted");
                prop_assert_eq!(counts(tally), counts(&Tally::of(&new)));
                prop_assert_eq!(tally.size(&followed), new.size());
                if let Some(peer) = followed.peers.keys().next().copied() {
                    followed.see([(peer, ([192, 0, 2, 1], 1 + number as u16).into())]);
                    prop_assert!(followed.kept.of(&followed).is_some(), "where a peer is seen changes no count");
                }
                let mut by_hand = followed.clone();
                let cidr = by_hand.cidrs.values().next().cloned().expect("the node is in one");
                by_hand.cidrs.insert(CidrId(9_999), cidr);
                prop_assert!(by_hand.kept.of(&by_hand).is_none(), "what was counted is of another slice");
                held.insert(node, followed);
            }
        }
        Ok(())
    }

    proptest! {
        /// Breaks if a count drifts from what is there, so that a limit would be missed or met too early.
        #[test]
        fn a_followed_tally_is_that_of_the_slice((network, changes) in arbitrary::history(24)) {
            check(network, &changes)?;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        /// Likewise, after hundreds of steps.
        #[test]
        fn a_tally_that_is_followed_for_long_is_that_of_the_slice((network, changes) in arbitrary::history(400)) {
            check(network, &changes)?;
        }
    }
}
