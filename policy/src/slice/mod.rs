//! Slices: what one node needs of the matrix, and the peers that go with it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::matrix::Cell;
use crate::object::id::{CidrId, CidrName, ClassId, NetworkName, NodeId, NodeName, Revision, RuleId, RuleName};
use crate::object::key::PublicKey;
use crate::object::prefix::{Addresses, Prefixes, longest_match};
use crate::object::rule::Action;
use crate::object::verdict::{Flow, Verdict};

mod blocks;
pub(crate) mod build;
mod delta;
mod size;
mod tally;
mod touched;
mod validate;

pub(crate) use blocks::{OWN_ROOM, ROOM_EACH};
pub use blocks::{Room, stride_room};
pub use delta::{Cells, SliceDelta};
pub(crate) use size::Size;
use tally::Kept;
pub use touched::Touched;
pub use validate::DeltaError;

/// What a slice is made of: a copy costs nothing, and shares with the former slice what a delta leaves alone.
pub type Map<K, V> = imbl::OrdMap<K, V>;

/// Everything that one node enforces and configures, at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub revision: Revision,
    pub local: Arc<Local>,
    pub peers: Map<NodeId, Peer>,
    /// The cidrs that `prefixes` speaks of.
    pub cidrs: Map<CidrId, CidrName>,
    /// The rules that `cells` speaks of.
    pub rules: Map<RuleId, SliceRule>,
    /// What an address is, by longest match; an address without a match lies in no cidr.
    pub prefixes: Map<IpNet, (ClassId, CidrId)>,
    /// By source and destination, one of which is a class of addresses that the node stands for. An absent cell denies
    /// everything with `no-rule`, and no cell says only that.
    pub cells: Map<(ClassId, ClassId), Cell>,
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
    /// Routed to the interface.
    pub roots: Prefixes,
    /// External prefixes whose active gateway is another node: routed to the interface too.
    pub external_routes: BTreeSet<IpNet>,
    /// External prefixes that this node is the active gateway of. An address that lies in prefixes of both sets belongs
    /// to the longest.
    pub gateway_for: BTreeSet<IpNet>,
}

/// A node with which some service is allowed in some direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: NodeName,
    pub public_key: PublicKey,
    pub endpoint: Option<SocketAddr>,
    pub allowed_ips: BTreeSet<IpNet>,
}

/// What a node must know of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceRule {
    pub name: RuleName,
    pub action: Action,
    pub log: bool,
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
