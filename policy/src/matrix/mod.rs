//! The compiled policy: prefixes to classes, and for each ordered pair of classes a cell.
//!
//! Classes are made when the matrix is compiled, cells when they are asked for: there are as many as pairs of classes,
//! and a node needs those of its own classes only.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::limit::LimitError;
use crate::network::Network;
use crate::object::id::{CidrId, ClassId, NodeId, Revision};
use crate::object::verdict::{Flow, Verdict};
use crate::peers::Stands;
use crate::slice::{Slice, build};

mod blocks;
mod bound;
mod cell;
mod classes;
mod compile;
mod row;
mod table;

pub use bound::NodeLimitError;
pub use cell::{Cell, CellEntry, CellError};
pub(crate) use row::Cross;

pub(crate) use classes::Place;

use classes::{Class, Classes};
use table::{Rank, RuleTable};

/// The compiled policy of one network.
#[derive(Debug)]
pub struct Matrix {
    rules: RuleTable,
    classes: Classes,
    /// Which classes the active nodes stand for.
    pub(crate) stands: Stands,
}

impl Matrix {
    /// Fails only where the objects give more prefixes or classes than `limit` allows.
    pub fn compile(network: &Network) -> Result<Matrix, LimitError> {
        let rules = RuleTable::of(network);
        let classes = compile::partition(network, &rules)?;
        let stands = Stands::of(network, &classes.prefixes);
        Ok(Self { rules, classes, stands })
    }

    /// What the policy says of a new flow.
    pub fn verdict(&self, flow: &Flow) -> Verdict {
        let Some((source, _)) = self.class_of(flow.source) else {
            return Verdict::UNKNOWN_SOURCE;
        };
        let Some((destination, _)) = self.class_of(flow.destination) else {
            return Verdict::UNKNOWN_DESTINATION;
        };
        self.cell(source, destination).verdict(flow.protocol, flow.port)
    }

    /// The class and the deepest cidr of an address; none if it lies in no cidr.
    pub fn class_of(&self, address: IpAddr) -> Option<(ClassId, CidrId)> {
        self.classes.find(compile::host(address))
    }

    /// What one class may open to another. A class that does not exist may nothing.
    pub fn cell(&self, source: ClassId, destination: ClassId) -> Cell {
        let (Some(source), Some(destination)) = (self.classes.get(source), self.classes.get(destination)) else {
            return Cell::CLOSED;
        };
        let mut ranks = self.matching(source, destination, |_| true);
        ranks.extend(self.matching(destination, source, |rank| self.rules.rules[rank as usize].both));
        self.rules.cell(&Vec::from_iter(ranks), self.default(source, destination))
    }

    /// The classes of the addresses directly in a cidr.
    pub fn classes_of(&self, cidr: CidrId) -> Vec<ClassId> {
        let classes = self.classes.prefixes.values().filter(|(_, of)| *of == cidr).map(|(class, _)| *class);
        classes.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// All classes.
    pub fn classes(&self) -> impl Iterator<Item = ClassId> + use<> {
        self.classes.ids()
    }

    /// Everything that a node needs; none if it is not active. `network` is what the matrix was compiled from. Classes
    /// keep the ids that they have in `previous`, so that the difference is small.
    pub fn slice(
        &self,
        network: &Network,
        revision: Revision,
        node: NodeId,
        previous: Option<&Slice>,
    ) -> Option<Slice> {
        build::build(self, network, revision, node, previous)
    }

    /// Every class as far as it is met in one cidr, sorted.
    pub(crate) fn places(&self) -> &[Place] {
        self.classes.places()
    }

    /// The prefixes of interest in order, each with the index of its place.
    pub(crate) fn placed(&self) -> &[(IpNet, usize)] {
        self.classes.placed()
    }

    /// The ranks of the rules that match from one class to the other, not exchanged.
    fn matching(&self, from: &Class, to: &Class, wanted: impl Fn(Rank) -> bool) -> BTreeSet<Rank> {
        let ranks = |class: &Class, by_selector: &[Vec<Rank>]| -> BTreeSet<Rank> {
            class.selected.iter().flat_map(|&used| &by_selector[used as usize]).copied().collect()
        };
        let to = ranks(to, &self.rules.to);
        ranks(from, &self.rules.from).into_iter().filter(|rank| to.contains(rank) && wanted(*rank)).collect()
    }

    /// The verdict where no rule matches.
    fn default(&self, a: &Class, b: &Class) -> Verdict {
        match self.classes.related(a, b) {
            true => Verdict::LINEAGE,
            false => Verdict::NO_RULE,
        }
    }
}
