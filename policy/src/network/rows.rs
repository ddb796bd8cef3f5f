//! Rows: the objects by kind and id, as a store keeps them and a change touches them.

use std::collections::{BTreeMap, BTreeSet};

use super::{ChangeError, DefaultPolicy, Kind, Named, Network};
use crate::limit::{self, Bounded};
use crate::object::cidr::Cidr;
use crate::object::group::Group;
use crate::object::id::{
    CidrId, CidrName, GroupId, GroupName, NetworkName, NodeId, NodeName, RuleId, RuleName, ServiceId, ServiceName,
};
use crate::object::node::Node;
use crate::object::prefix::Prefixes;
use crate::object::rule::Rule;
use crate::object::service::NamedService;

/// Which objects a change touches: adds, alters or deletes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// The default.
    pub header: bool,
    pub cidrs: BTreeSet<CidrId>,
    pub nodes: BTreeSet<NodeId>,
    pub groups: BTreeSet<GroupId>,
    pub services: BTreeSet<ServiceId>,
    pub rules: BTreeSet<RuleId>,
}

impl Rows {
    /// Every object of a network.
    pub fn all(network: &Network) -> Self {
        Self {
            header: true,
            cidrs: network.cidrs().keys().copied().collect(),
            nodes: network.nodes().keys().copied().collect(),
            groups: network.groups().keys().copied().collect(),
            services: network.services().keys().copied().collect(),
            rules: network.rules().keys().copied().collect(),
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub fn extend(&mut self, other: &Self) {
        let Self { header, cidrs, nodes, groups, services, rules } = other;
        self.header |= header;
        self.cidrs.extend(cidrs);
        self.nodes.extend(nodes);
        self.groups.extend(groups);
        self.services.extend(services);
        self.rules.extend(rules);
    }
}

/// The network without its objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub name: NetworkName,
    pub roots: Prefixes,
    pub default: DefaultPolicy,
    /// The next id that has never been given out, one sequence for all kinds.
    pub next_id: u32,
}

/// Objects to put in the place of those with their ids; `None` deletes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replacement {
    pub header: Option<Header>,
    pub cidrs: BTreeMap<CidrId, Option<Cidr>>,
    pub nodes: BTreeMap<NodeId, Option<Node>>,
    pub groups: BTreeMap<GroupId, Option<Group>>,
    pub services: BTreeMap<ServiceId, Option<NamedService>>,
    pub rules: BTreeMap<RuleId, Option<Rule>>,
}

impl Network {
    pub fn header(&self) -> Header {
        Header { name: self.name.clone(), roots: self.roots, default: self.default, next_id: self.next_id }
    }

    /// Puts rows in their places, as another controller has committed them. What they touch is judged; a refused
    /// replacement leaves the network as it is.
    pub fn replace(&mut self, rows: Replacement) -> Result<(), ChangeError> {
        let mut next = self.clone();
        next.put_rows(rows)?;
        *self = next;
        Ok(())
    }

    fn put_rows(&mut self, rows: Replacement) -> Result<(), ChangeError> {
        let Replacement { header, cidrs, nodes, groups, services, rules } = rows;
        if let Some(Header { name, roots, default, next_id }) = header {
            self.touched.header |= self.default != default;
            (self.name, self.roots, self.default, self.next_id) = (name, roots, default, next_id);
        }
        // A name, a prefix, an address or a key may go from one object to another; what refers to others goes before them.
        rules.keys().for_each(|id| self.put_rule(*id, None));
        services.keys().for_each(|id| self.put_service(*id, None));
        groups.keys().for_each(|id| self.put_group(*id, None));
        nodes.keys().for_each(|id| self.put_node(*id, None));
        for id in cidrs.keys() {
            self.put_cidr(*id, None);
        }
        let ids = self.put_objects(cidrs, nodes, groups, services, rules)?;
        ids.into_iter().try_for_each(|id| self.check_tree(&self.cidrs[&id]))
    }

    /// Returns the cidrs that there are now, of those that were given.
    fn put_objects(
        &mut self,
        cidrs: BTreeMap<CidrId, Option<Cidr>>,
        nodes: BTreeMap<NodeId, Option<Node>>,
        groups: BTreeMap<GroupId, Option<Group>>,
        services: BTreeMap<ServiceId, Option<NamedService>>,
        rules: BTreeMap<RuleId, Option<Rule>>,
    ) -> Result<Vec<CidrId>, ChangeError> {
        let mut placed = Vec::new();
        for cidr in cidrs.into_values().flatten() {
            self.check_given(Kind::Cidr, cidr.id.0, cidr.name.as_str())?;
            self.check_cidr_bounds(&cidr)?;
            placed.push(cidr.id);
            self.put_cidr(cidr.id, Some(cidr));
        }
        for node in nodes.into_values().flatten() {
            self.check_given(Kind::Node, node.id.0, node.name.as_str())?;
            self.check_node(&node)?;
            self.put_node(node.id, Some(node));
        }
        for group in groups.into_values().flatten() {
            self.check_given(Kind::Group, group.id.0, group.name.as_str())?;
            self.check_group(&group)?;
            self.put_group(group.id, Some(group));
        }
        for service in services.into_values().flatten() {
            self.check_given(Kind::Service, service.id.0, service.name.as_str())?;
            Self::check_service(&service)?;
            self.put_service(service.id, Some(service));
        }
        for rule in rules.into_values().flatten() {
            self.check_given(Kind::Rule, rule.id.0, rule.name.as_str())?;
            self.check_rule(&rule)?;
            self.put_rule(rule.id, Some(rule));
        }
        Bounded::Cidrs.check(self.cidrs.len(), limit::MAX_CIDRS)?;
        Bounded::Nodes.check(self.nodes.len(), limit::MAX_NODES)?;
        Bounded::Groups.check(self.groups.len(), limit::MAX_GROUPS)?;
        Bounded::Services.check(self.services.len(), limit::MAX_SERVICES)?;
        Bounded::Rules.check(self.rules.len(), limit::MAX_RULES)?;
        Ok(placed)
    }

    /// Whether an object's id was given out, and no other of its kind has its name.
    fn check_given(&self, kind: Kind, id: u32, name: &str) -> Result<(), ChangeError> {
        let named = || Named::new(kind, name);
        if id == 0 {
            return Err(ChangeError::ZeroId(named()));
        }
        if id >= self.next_id {
            return Err(ChangeError::FutureId(named(), id, self.next_id));
        }
        let index = &self.index;
        let holder = match kind {
            Kind::Cidr => name.parse().ok().and_then(|name: CidrName| index.cidrs.get(&name)).map(|id| id.0),
            Kind::Node => name.parse().ok().and_then(|name: NodeName| index.nodes.get(&name)).map(|id| id.0),
            Kind::Group => name.parse().ok().and_then(|name: GroupName| index.groups.get(&name)).map(|id| id.0),
            Kind::Service => name.parse().ok().and_then(|name: ServiceName| index.services.get(&name)).map(|id| id.0),
            Kind::Rule => name.parse().ok().and_then(|name: RuleName| index.rules.get(&name)).map(|id| id.0),
        };
        let taken = holder.is_some_and(|holder| holder != id);
        if taken { Err(ChangeError::NameTaken(named())) } else { Ok(()) }
    }
}
