//! A network as a store keeps it.

use std::collections::BTreeSet;

use super::{ChangeError, DefaultPolicy, Kind, Named, Network, Rows};
use crate::limit::{self, Bounded};
use crate::object::cidr::Cidr;
use crate::object::group::Group;
use crate::object::id::NetworkName;
use crate::object::node::Node;
use crate::object::prefix::Prefixes;
use crate::object::rule::Rule;
use crate::object::service::NamedService;

/// The objects of a network, valid or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkParts {
    pub name: NetworkName,
    pub roots: Prefixes,
    pub default: DefaultPolicy,
    /// The next id that has never been given out, one sequence for all kinds.
    pub next_id: u32,
    pub cidrs: Vec<Cidr>,
    pub nodes: Vec<Node>,
    pub groups: Vec<Group>,
    pub services: Vec<NamedService>,
    pub rules: Vec<Rule>,
}

impl Network {
    /// Checks everything that a sequence of changes would have.
    pub fn from_parts(parts: NetworkParts) -> Result<Self, ChangeError> {
        let NetworkParts { name, roots, default, next_id, cidrs, nodes, groups, services, rules } = parts;
        let mut network = Self::new(name, roots, default)?;
        network.next_id = next_id.max(1);
        Bounded::Cidrs.check(cidrs.len(), limit::MAX_CIDRS)?;
        Bounded::Nodes.check(nodes.len(), limit::MAX_NODES)?;
        Bounded::Groups.check(groups.len(), limit::MAX_GROUPS)?;
        Bounded::Services.check(services.len(), limit::MAX_SERVICES)?;
        Bounded::Rules.check(rules.len(), limit::MAX_RULES)?;
        check_ids(Kind::Cidr, next_id, cidrs.iter().map(|cidr| (cidr.id.0, cidr.name.as_str())))?;
        check_ids(Kind::Node, next_id, nodes.iter().map(|node| (node.id.0, node.name.as_str())))?;
        check_ids(Kind::Group, next_id, groups.iter().map(|group| (group.id.0, group.name.as_str())))?;
        check_ids(Kind::Service, next_id, services.iter().map(|service| (service.id.0, service.name.as_str())))?;
        check_ids(Kind::Rule, next_id, rules.iter().map(|rule| (rule.id.0, rule.name.as_str())))?;
        for cidr in cidrs {
            network.check_cidr_bounds(&cidr)?;
            network.put_cidr(cidr.id, Some(cidr));
        }
        network.cidrs.values().try_for_each(|cidr| network.check_tree(cidr))?;
        for node in nodes {
            network.check_node(&node)?;
            network.put_node(node.id, Some(node));
        }
        for group in groups {
            network.check_group(&group)?;
            network.put_group(group.id, Some(group));
        }
        for service in services {
            Self::check_service(&service)?;
            network.put_service(service.id, Some(service));
        }
        for rule in rules {
            network.check_rule(&rule)?;
            network.put_rule(rule.id, Some(rule));
        }
        network.touched = Rows::default();
        Ok(network)
    }

    /// The objects, each kind by id.
    pub fn to_parts(&self) -> NetworkParts {
        NetworkParts {
            name: self.name.clone(),
            roots: self.roots,
            default: self.default,
            next_id: self.next_id,
            cidrs: self.cidrs.values().cloned().collect(),
            nodes: self.nodes.values().cloned().collect(),
            groups: self.groups.values().cloned().collect(),
            services: self.services.values().cloned().collect(),
            rules: self.rules.values().cloned().collect(),
        }
    }
}

/// Ids and names are unique among their kind, and the ids were given out.
fn check_ids<'a>(kind: Kind, next_id: u32, objects: impl Iterator<Item = (u32, &'a str)>) -> Result<(), ChangeError> {
    let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
    for (id, name) in objects {
        let named = || Named::new(kind, name);
        if id == 0 {
            return Err(ChangeError::ZeroId(named()));
        }
        if id >= next_id {
            return Err(ChangeError::FutureId(named(), id, next_id));
        }
        if !ids.insert(id) {
            return Err(ChangeError::SharedId(named(), id));
        }
        if !names.insert(name) {
            return Err(ChangeError::NameTaken(named()));
        }
    }
    Ok(())
}
