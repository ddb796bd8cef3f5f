//! Slices: what one node needs of the matrix, and the peers that go with it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::Map;
use crate::matrix::{Cell, SliceCidr};
use crate::object::digest::Digest;
use crate::object::id::{CidrId, ClassId, NetworkName, NodeId, NodeName, Revision, RuleId, RuleName};
use crate::object::prefix::{Addresses, Prefixes, longest_match};
use crate::object::rule::Action;
use crate::object::verdict::{Flow, Verdict};
use crate::peer::Peer;

mod address_tally;
mod apply;
mod bound;
mod build;
mod delta;
mod digest;
mod places;
mod requires;
mod room;
mod size;
mod tally;
mod touched;
mod validate;

pub use bound::NodeLimitError;
pub use build::Fragment;
pub use delta::{Cells, SliceDelta};
pub use requires::Understanding;
pub(crate) use size::Size;
use tally::Kept;
pub use touched::Touched;
pub use validate::DeltaError;

/// Everything that one node enforces and configures, at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub revision: Revision,
    /// Of the rows that the slice came in.
    pub digest: Digest,
    pub local: Arc<Local>,
    pub peers: Map<NodeId, Peer>,
    pub cidrs: Map<CidrId, SliceCidr>,
    /// The rules that `cells` speaks of.
    pub rules: Map<RuleId, SliceRule>,
    /// What an address is, by longest match; an address without a match lies in no cidr. Follows from `cidrs`, `marked` and
    /// the node's own addresses.
    pub prefixes: Map<IpNet, (ClassId, CidrId)>,
    /// By source and destination, one of which is a class of addresses that the node stands for. An absent cell denies
    /// everything with `no-rule`, and no cell says only that.
    pub cells: Map<(ClassId, ClassId), Cell>,
    /// Prefixes that are told apart within cidrs.
    pub(crate) marked: Map<IpNet, (ClassId, CidrId)>,
    /// The node as its own peers configure it, where nodes like it are peers of each other.
    pub(crate) itself: Option<Peer>,
    /// What the next delta is checked against. No part of what the slice says.
    pub(crate) kept: Kept,
}

/// What a node must know of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    pub node: NodeId,
    pub name: NodeName,
    pub network: NetworkName,
    pub addresses: Addresses,
    /// Whether the IPv6 address has a class of its own ([`ClassId::OWN_V6`]).
    pub is_split: bool,
    /// Routed to the interface.
    pub roots: Prefixes,
    /// External prefixes whose active gateway is another node: routed to the interface too. Follows from the cidrs.
    pub external_routes: BTreeSet<IpNet>,
    /// External prefixes that this node is the active gateway of. An address that lies in prefixes of both sets belongs
    /// to the longest.
    pub gateway_for: BTreeSet<IpNet>,
    /// What a node must understand to enforce anything of the slice: one that does not denies everything.
    pub requires: BTreeSet<String>,
}

/// What a node must know of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceRule {
    pub name: RuleName,
    pub action: Action,
    pub log: bool,
    /// What a node must understand to enforce the rule: one that does not denies what the rule is about.
    pub requires: BTreeSet<String>,
}

impl Slice {
    /// What the policy says of a flow with an end at an address that the node stands for.
    pub fn verdict(&self, flow: &Flow) -> Verdict {
        let Some((source, _)) = self.lookup(flow.source) else {
            return Verdict::UNKNOWN_SOURCE;
        };
        let Some((destination, _)) = self.lookup(flow.destination) else {
            return Verdict::UNKNOWN_DESTINATION;
        };
        match self.cells.get(&(source, destination)) {
            Some(cell) => cell.verdict(flow.protocol, flow.port),
            None => Verdict::NO_RULE,
        }
    }

    /// The class and the deepest cidr of an address.
    pub fn lookup(&self, address: IpAddr) -> Option<(ClassId, CidrId)> {
        longest_match(&self.prefixes, IpNet::from(address)).map(|(_, &found)| found)
    }

    /// Whether the node stands for the address: its own, or behind it as the active gateway.
    pub fn stands_for(&self, address: IpAddr) -> bool {
        self.local.addresses.contains(address) || self.local.is_gateway_of(IpNet::from(address))
    }

    /// The classes that addresses have, and those that no address but the node's own would have.
    pub(crate) fn classes(&self) -> BTreeSet<ClassId> {
        let plain = self.cidrs.keys().map(|cidr| ClassId::of_cidr(*cidr));
        let places = self.prefixes.values().chain(self.marked.values());
        places.map(|&(class, _)| class).chain(plain).collect()
    }

    /// The classes of the addresses that the node stands for.
    pub fn own_classes(&self) -> BTreeSet<ClassId> {
        let addresses = self.local.addresses.iter().filter_map(|address| self.lookup(address));
        let behind = self.prefixes.iter().filter(|(prefix, _)| self.local.is_gateway_of(**prefix));
        addresses.chain(behind.map(|(_, &found)| found)).map(|(class, _)| class).collect()
    }
}

impl Local {
    fn is_gateway_of(&self, prefix: IpNet) -> bool {
        let longest =
            |set: &BTreeSet<IpNet>| set.iter().filter(|net| net.contains(&prefix)).map(IpNet::prefix_len).max();
        let served = longest(&self.gateway_for);
        served.is_some() && served > longest(&self.external_routes)
    }
}
