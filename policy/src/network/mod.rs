//! A network: the objects of one policy, always valid.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use thiserror::Error;

use crate::Map;
use crate::object::cidr::Cidr;
use crate::object::group::Group;
use crate::object::id::{
    CidrId, CidrName, GroupId, GroupName, NetworkName, NodeId, NodeName, RuleId, RuleName, ServiceId, ServiceName,
};
use crate::object::node::Node;
use crate::object::prefix::{Prefixes, longest_above, longest_match, outermost_below};
use crate::object::rule::Rule;
use crate::object::selector::{Hint, MemberSpec, Selector, SelectorSpec};
use crate::object::service::{NamedService, ServiceRef, ServiceSpec};

mod change;
mod cidrs;
mod error;
mod groups;
mod index;
mod marks;
mod nodes;
mod parts;
mod rows;
mod rules;
#[cfg(test)]
mod tests;

pub use change::Change;
pub use error::Named;
pub use error::{ChangeError, Kind, Warning};
pub(crate) use marks::Marks;
pub use parts::NetworkParts;
pub use rows::{Header, Replacement, Rows};

use index::Index;

/// What happens to a flow that no rule speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DefaultPolicy {
    /// Peers reach peers of their own cidr, of its ancestors and of its descendants.
    Lineage,
    Deny,
}

/// Text that is no default.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{0}` is not a default; write `lineage` or `deny`{1}")]
pub struct ParseDefaultError(String, Hint);

impl fmt::Display for DefaultPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Lineage => "lineage",
            Self::Deny => "deny",
        })
    }
}

impl FromStr for DefaultPolicy {
    type Err = ParseDefaultError;

    fn from_str(text: &str) -> Result<Self, ParseDefaultError> {
        match text {
            "lineage" => Ok(Self::Lineage),
            "deny" => Ok(Self::Deny),
            _ => Err(ParseDefaultError(text.to_owned(), Hint::nearest(text, ["lineage", "deny"]))),
        }
    }
}

/// The objects of one policy. A clone costs nothing, and shares what neither of the two changes.
#[derive(Clone, Debug)]
pub struct Network {
    name: NetworkName,
    roots: Prefixes,
    default: DefaultPolicy,
    next_id: u32,
    cidrs: Map<CidrId, Cidr>,
    nodes: Map<NodeId, Node>,
    groups: Map<GroupId, Group>,
    services: Map<ServiceId, NamedService>,
    rules: Map<RuleId, Rule>,
    index: Index,
    /// Since [`Network::take_touched`] was called last.
    touched: Rows,
}

/// The index follows from the objects, and what was touched is no part of the policy.
impl PartialEq for Network {
    fn eq(&self, other: &Self) -> bool {
        let objects = |network: &Self| {
            let Self { name: _, roots, default, next_id, cidrs, nodes, groups, services, rules, index: _, touched: _ } =
                network.clone();
            (roots, default, next_id, cidrs, nodes, groups, services, rules)
        };
        self.name == other.name && objects(self) == objects(other)
    }
}

impl Eq for Network {}

impl Network {
    /// A network without objects.
    pub fn new(name: NetworkName, roots: Prefixes, default: DefaultPolicy) -> Result<Self, ChangeError> {
        Ok(Self {
            name,
            roots,
            default,
            next_id: 1,
            cidrs: Map::new(),
            nodes: Map::new(),
            groups: Map::new(),
            services: Map::new(),
            rules: Map::new(),
            index: Index::default(),
            touched: Rows::default(),
        })
    }

    pub fn name(&self) -> &NetworkName {
        &self.name
    }

    pub fn roots(&self) -> &Prefixes {
        &self.roots
    }

    pub fn default(&self) -> DefaultPolicy {
        self.default
    }

    pub fn cidrs(&self) -> &Map<CidrId, Cidr> {
        &self.cidrs
    }

    pub fn nodes(&self) -> &Map<NodeId, Node> {
        &self.nodes
    }

    pub fn groups(&self) -> &Map<GroupId, Group> {
        &self.groups
    }

    pub fn services(&self) -> &Map<ServiceId, NamedService> {
        &self.services
    }

    pub fn rules(&self) -> &Map<RuleId, Rule> {
        &self.rules
    }

    /// What the changes since the last call have touched; a refused one may have touched more than it changed.
    pub fn take_touched(&mut self) -> Rows {
        std::mem::take(&mut self.touched)
    }

    pub fn cidr_named(&self, name: &CidrName) -> Option<&Cidr> {
        self.cidrs.get(self.index.cidrs.get(name)?)
    }

    pub fn node_named(&self, name: &NodeName) -> Option<&Node> {
        self.nodes.get(self.index.nodes.get(name)?)
    }

    pub fn group_named(&self, name: &GroupName) -> Option<&Group> {
        self.groups.get(self.index.groups.get(name)?)
    }

    pub fn rule_named(&self, name: &RuleName) -> Option<&Rule> {
        self.rules.get(self.index.rules.get(name)?)
    }

    pub fn service_named(&self, name: &ServiceName) -> Option<&NamedService> {
        self.services.get(self.index.services.get(name)?)
    }

    /// The deepest cidr that contains the address.
    pub fn cidr_of(&self, address: IpAddr) -> Option<&Cidr> {
        let (_, id) = longest_match(&self.index.prefixes, IpNet::from(address))?;
        self.cidrs.get(id)
    }

    /// The node that has the address.
    pub fn node_at(&self, address: IpAddr) -> Option<&Node> {
        self.nodes.get(self.index.addresses.get(&address)?)
    }

    /// The cidr of a node.
    pub fn cidr_of_node(&self, node: NodeId) -> Option<&Cidr> {
        self.cidr_of(self.nodes.get(&node)?.addresses.iter().next()?)
    }

    /// The parent, which is that of either family.
    pub fn parent_of(&self, cidr: CidrId) -> Option<CidrId> {
        let prefixes = self.cidrs.get(&cidr)?.prefixes;
        prefixes.iter().find_map(|prefix| self.parent_in(prefix))
    }

    /// The cidrs whose parent it is, by id.
    pub fn children_of(&self, cidr: CidrId) -> Vec<CidrId> {
        let Some(cidr) = self.cidrs.get(&cidr) else {
            return Vec::new();
        };
        let below = cidr.prefixes.iter().flat_map(|prefix| outermost_below(&self.index.prefixes, prefix));
        let mut children: Vec<CidrId> = below.map(|(_, &id)| id).collect();
        children.sort_unstable();
        children.dedup();
        children
    }

    /// The cidr, its parent, and so on to the top.
    pub fn lineage_of(&self, cidr: CidrId) -> Vec<CidrId> {
        std::iter::successors(Some(cidr), |&cidr| self.parent_of(cidr)).collect()
    }

    /// A selector as its author would write it.
    pub fn selector_spec(&self, selector: &Selector) -> Option<SelectorSpec> {
        Some(match selector {
            Selector::Any => SelectorSpec::Any,
            Selector::Cidr(id) => SelectorSpec::Cidr(self.cidrs.get(id)?.name.clone()),
            Selector::Node(id) => SelectorSpec::Node(self.nodes.get(id)?.name.clone()),
            Selector::Group(id) => SelectorSpec::Group(self.groups.get(id)?.name.clone()),
            Selector::Prefix(prefix) => SelectorSpec::Prefix(*prefix),
        })
    }

    /// A rule's service as its author would write it.
    pub fn service_spec(&self, service: &ServiceRef) -> Option<ServiceSpec> {
        Some(match service {
            ServiceRef::Literal(service) => ServiceSpec::Literal(service.clone()),
            ServiceRef::Named(id) => ServiceSpec::Named(self.services.get(id)?.name.clone()),
        })
    }

    /// The members of a group as their author would write them.
    pub fn member_specs(&self, group: &Group) -> Vec<MemberSpec> {
        let nodes =
            group.nodes.iter().filter_map(|id| self.nodes.get(id)).map(|node| MemberSpec::Node(node.name.clone()));
        let cidrs =
            group.cidrs.iter().filter_map(|id| self.cidrs.get(id)).map(|cidr| MemberSpec::Cidr(cidr.name.clone()));
        nodes.chain(cidrs).collect()
    }

    /// The smallest cidr with a shorter prefix that contains this one.
    fn parent_in(&self, prefix: IpNet) -> Option<CidrId> {
        longest_above(&self.index.prefixes, prefix).map(|(_, &id)| id)
    }
}
