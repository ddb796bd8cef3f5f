//! The compiled policy: who stands for which classes, and what one class may open to another.
//!
//! Classes and cells are not kept but found when they are asked for: there are as many cells as pairs of classes, and a
//! node needs those of its own classes only. What is kept follows a change at the cost of what the change touches.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use imbl::OrdSet;
use ipnet::IpNet;

use crate::Map;
use crate::limit::{self, Bounded, LimitError};
use crate::network::{DefaultPolicy, Network};
use crate::object::digest::Digest;
use crate::object::id::{CidrId, NodeId};
use crate::object::selector::Selector;
use crate::object::verdict::{Flow, Verdict};

mod affected;
mod cell;
mod class;
mod common;
mod decide;
mod follow;
mod members;
mod role;
mod room;
mod share;

pub use affected::Affected;
pub use cell::{Cell, CellEntry, CellError};
pub use class::Class;
pub use common::SliceCidr;
pub use role::Role;
pub(crate) use room::Strides;
pub use room::{Room, stride_room};
pub(crate) use share::Share;

pub(crate) use class::class_of;
pub(crate) use room::OWN_ROOM;

use class::{interest_within, related};
use decide::Decider;
use members::Members;
use role::Standing;

/// The compiled policy of one network. A clone costs nothing.
#[derive(Clone)]
pub struct Matrix {
    network: Network,
    /// By active node.
    standing: Map<NodeId, Standing>,
    /// The classes that active nodes stand for.
    members: Map<Class, Members>,
    /// The classes among them that have a mark.
    marked: OrdSet<(Selector, Class)>,
    /// Of what every slice says of the cidrs.
    common: Digest,
    /// At least what a node's table of all prefixes of interest takes.
    room: Room,
    shares: Arc<Mutex<Shares>>,
}

/// Shares that were asked for.
type Shares = imbl::HashMap<Arc<Role>, Arc<Share>>;

/// Shares that are kept for those who ask again; beyond it they are made anew.
const SHARES: usize = 4_096;

/// Matrices of one network are equal, however they came about.
impl PartialEq for Matrix {
    fn eq(&self, other: &Self) -> bool {
        let Self { network, standing, members, marked, common, room: _, shares: _ } = self;
        *network == other.network
            && *standing == other.standing
            && *members == other.members
            && *marked == other.marked
            && *common == other.common
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matrix").field("standing", &self.standing.len()).finish_non_exhaustive()
    }
}

impl Matrix {
    /// Fails only where the objects give more prefixes than `limit` allows.
    pub fn compile(network: &Network) -> Result<Self, LimitError> {
        let mut matrix = Self {
            network: network.clone(),
            standing: Map::new(),
            members: Map::new(),
            marked: OrdSet::new(),
            common: network.cidrs().keys().map(|cidr| common::digest(network, *cidr)).sum(),
            room: room_of(network),
            shares: Arc::default(),
        };
        matrix.check_prefixes()?;
        matrix.follow_nodes(network.nodes().keys().copied().collect());
        Ok(matrix)
    }

    /// What the matrix was compiled from.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// What the policy says of a new flow.
    pub fn verdict(&self, flow: &Flow) -> Verdict {
        let Some(source) = self.class_of(flow.source) else {
            return Verdict::UNKNOWN_SOURCE;
        };
        let Some(destination) = self.class_of(flow.destination) else {
            return Verdict::UNKNOWN_DESTINATION;
        };
        self.cell(&source, &destination).verdict(flow.protocol, flow.port)
    }

    /// The class of an address; none if it lies in no cidr.
    pub fn class_of(&self, address: IpAddr) -> Option<Class> {
        class_of(&self.network, IpNet::from(address))
    }

    /// What one class may open to another.
    pub fn cell(&self, source: &Class, destination: &Class) -> Cell {
        let network = &self.network;
        let (from, to) = (source.selectors(network), destination.selectors(network));
        let matching = |a: &BTreeSet<Selector>, b: &BTreeSet<Selector>, both: bool| {
            let rules = a.iter().flat_map(|selector| network.rules_from(*selector));
            let rules = rules.filter(|rule| rule.is_enforced() && (!both || rule.both) && !rule.to.is_disjoint(b));
            rules.map(|rule| rule.id).collect::<Vec<_>>()
        };
        let rules = [matching(&from, &to, false), matching(&to, &from, true)].concat();
        let lineage =
            network.default() == DefaultPolicy::Lineage && related(network, source.cidr).contains(&destination.cidr);
        let default = if lineage { Verdict::LINEAGE } else { Verdict::NO_RULE };
        Decider::new(network).cell(rules, default).as_ref().clone()
    }

    /// The classes of the addresses directly in a cidr.
    pub fn classes_of(&self, cidr: CidrId) -> BTreeSet<Class> {
        let prefixes = self.network.cidrs().get(&cidr).into_iter().flat_map(|cidr| cidr.prefixes.iter());
        let nets = prefixes.flat_map(|net| interest_within(&self.network, net));
        nets.filter_map(|net| class_of(&self.network, net)).filter(|class| class.cidr == cidr).collect()
    }

    /// What a node stands for; none if it is not active.
    pub fn role(&self, node: NodeId) -> Option<&Arc<Role>> {
        self.standing.get(&node).map(|standing| &standing.role)
    }

    /// The active nodes.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.standing.keys().copied()
    }

    /// What all nodes of a role have in common.
    pub(crate) fn share(&self, role: &Arc<Role>) -> Arc<Share> {
        let kept = || self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = kept().get(role) {
            return Arc::clone(share);
        }
        let share = Arc::new(Share::of(&self.network, role));
        let mut kept = kept();
        if kept.len() >= SHARES {
            kept.clear();
        }
        kept.insert(Arc::clone(role), Arc::clone(&share));
        share
    }

    /// The nodes that are peers of those of a role, which may themselves be among them.
    pub fn peers(&self, role: &Arc<Role>) -> BTreeSet<NodeId> {
        self.open_members(role).flat_map(|members| members.nodes.iter().copied().collect::<Vec<_>>()).collect()
    }

    /// The classes to which a role is open, in so far as active nodes stand for them.
    fn open_members(&self, role: &Arc<Role>) -> impl Iterator<Item = &Members> {
        let (role, share) = (Arc::clone(role), self.share(role));
        let cidrs: BTreeSet<CidrId> = share.open.iter().map(|class| class.cidr).collect();
        cidrs
            .into_iter()
            .flat_map(|cidr| self.members_in(cidr))
            .filter_map(move |(class, members)| share.open.contains(&share.seen(&role, class)).then_some(members))
    }

    /// The nodes in classes that only one of two matrices opens to the role that a node has in each.
    pub(crate) fn opened_otherwise(&self, role: &Arc<Role>, old: &Self, old_role: &Arc<Role>) -> BTreeSet<NodeId> {
        let (share, old_share) = (self.share(role), old.share(old_role));
        let cidrs: BTreeSet<CidrId> = share.open.iter().chain(&old_share.open).map(|class| class.cidr).collect();
        let classes = cidrs.into_iter().flat_map(|cidr| self.members_in(cidr).chain(old.members_in(cidr)));
        let differs = |class: &Class| {
            share.open.contains(&share.seen(role, class)) != old_share.open.contains(&old_share.seen(old_role, class))
        };
        let differing = classes.filter(|(class, _)| differs(class));
        differing.flat_map(|(_, members)| members.nodes.iter().copied()).collect()
    }

    /// The sum of the digests of a role's peers.
    pub(crate) fn peers_digest(&self, role: &Arc<Role>) -> Digest {
        let (mut sum, mut several) = (Digest::default(), BTreeSet::new());
        for members in self.open_members(role) {
            sum += members.sum;
            several.extend(members.several.iter().copied());
        }
        sum + several.iter().filter_map(|node| self.standing.get(node)).map(|standing| standing.peer).sum::<Digest>()
    }

    /// Whether a node is a peer of those of a role.
    pub(crate) fn is_peer(&self, role: &Arc<Role>, node: NodeId) -> bool {
        let Some(standing) = self.standing.get(&node) else { return false };
        let share = self.share(role);
        standing.role.classes().into_iter().any(|class| share.open.contains(&share.seen(role, class)))
    }

    pub(crate) fn common(&self) -> Digest {
        self.common
    }

    pub(crate) fn room(&self) -> Room {
        self.room
    }

    pub(crate) fn peer_digest(&self, node: NodeId) -> Option<Digest> {
        self.standing.get(&node).map(|standing| standing.peer)
    }

    fn members_in(&self, cidr: CidrId) -> impl Iterator<Item = (&Class, &Members)> {
        let first = Class::plain(cidr);
        self.members.range(first..).take_while(move |(class, _)| class.cidr == cidr)
    }

    fn check_prefixes(&self) -> Result<(), LimitError> {
        let count = self.network.prefixes().len() + self.network.marks().len();
        Bounded::Prefixes.check(count, limit::MAX_PREFIXES)
    }
}

/// What the table of a node takes that is told of every prefix of interest, and of every gateway's addresses.
fn room_of(network: &Network) -> Room {
    let gateways = network.gateways();
    let gateways = gateways.iter().filter_map(|id| network.nodes().get(id)).flat_map(|node| node.addresses.iter());
    let nets = network.prefixes().keys().chain(network.marks().keys()).copied();
    stride_room(nets.chain(gateways.map(IpNet::from)))
}
