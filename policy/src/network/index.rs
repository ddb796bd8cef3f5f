//! What is found by name, prefix, address or key, and who refers to what. Follows from the objects.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdSet;
use ipnet::IpNet;

use crate::Map;
use crate::object::cidr::Cidr;
use crate::object::group::Group;
use crate::object::id::{
    CidrId, CidrName, GroupId, GroupName, NodeId, NodeName, RuleId, RuleName, ServiceId, ServiceName,
};
use crate::object::key::PublicKey;
use crate::object::node::Node;
use crate::object::rule::Rule;
use crate::object::selector::Selector;
use crate::object::service::ServiceRef;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) cidrs: Map<CidrName, CidrId>,
    pub(super) nodes: Map<NodeName, NodeId>,
    pub(super) groups: Map<GroupName, GroupId>,
    pub(super) services: Map<ServiceName, ServiceId>,
    pub(super) rules: Map<RuleName, RuleId>,
    pub(super) prefixes: Map<IpNet, CidrId>,
    pub(super) addresses: Map<IpAddr, NodeId>,
    pub(super) keys: Map<PublicKey, NodeId>,
    /// The rules that have a selector in `from`, and in `to`.
    pub(super) from: OrdSet<(Selector, RuleId)>,
    pub(super) to: OrdSet<(Selector, RuleId)>,
    pub(super) of_service: OrdSet<(ServiceId, RuleId)>,
    /// The groups that a node or a cidr is a member of.
    pub(super) of_node: OrdSet<(NodeId, GroupId)>,
    pub(super) of_cidr: OrdSet<(CidrId, GroupId)>,
    /// The nodes that can be the gateway of an external cidr.
    pub(super) gateways: OrdSet<(CidrId, NodeId)>,
    /// The prefixes at which nodes, members of groups and literals lie that some rule names.
    pub(super) marks: Map<IpNet, Marks>,
}

/// The selectors of one marked prefix.
pub(crate) type Marks = Arc<BTreeSet<Selector>>;

impl Index {
    pub(super) fn insert_cidr(&mut self, cidr: &Cidr) {
        self.cidrs.insert(cidr.name.clone(), cidr.id);
        self.prefixes.extend(cidr.prefixes.iter().map(|prefix| (prefix, cidr.id)));
    }

    pub(super) fn remove_cidr(&mut self, cidr: &Cidr) {
        self.cidrs.remove(&cidr.name);
        for prefix in cidr.prefixes.iter() {
            self.prefixes.remove(&prefix);
        }
    }

    pub(super) fn insert_node(&mut self, node: &Node) {
        self.nodes.insert(node.name.clone(), node.id);
        self.addresses.extend(node.addresses.iter().map(|address| (address, node.id)));
        self.gateways.extend(node.gateway_for.iter().map(|cidr| (*cidr, node.id)));
        if let Some(key) = node.public_key {
            self.keys.insert(key, node.id);
        }
    }

    pub(super) fn remove_node(&mut self, node: &Node) {
        self.nodes.remove(&node.name);
        for address in node.addresses.iter() {
            self.addresses.remove(&address);
        }
        for cidr in &node.gateway_for {
            self.gateways.remove(&(*cidr, node.id));
        }
        if let Some(key) = node.public_key {
            self.keys.remove(&key);
        }
    }

    pub(super) fn insert_group(&mut self, group: &Group) {
        self.groups.insert(group.name.clone(), group.id);
        self.of_node.extend(group.nodes.iter().map(|node| (*node, group.id)));
        self.of_cidr.extend(group.cidrs.iter().map(|cidr| (*cidr, group.id)));
    }

    pub(super) fn remove_group(&mut self, group: &Group) {
        self.groups.remove(&group.name);
        for node in &group.nodes {
            self.of_node.remove(&(*node, group.id));
        }
        for cidr in &group.cidrs {
            self.of_cidr.remove(&(*cidr, group.id));
        }
    }

    pub(super) fn insert_rule(&mut self, rule: &Rule) {
        self.rules.insert(rule.name.clone(), rule.id);
        self.from.extend(rule.from.iter().map(|selector| (*selector, rule.id)));
        self.to.extend(rule.to.iter().map(|selector| (*selector, rule.id)));
        self.of_service.extend(named(rule).map(|service| (service, rule.id)));
    }

    pub(super) fn remove_rule(&mut self, rule: &Rule) {
        self.rules.remove(&rule.name);
        for selector in &rule.from {
            self.from.remove(&(*selector, rule.id));
        }
        for selector in &rule.to {
            self.to.remove(&(*selector, rule.id));
        }
        for service in named(rule) {
            self.of_service.remove(&(service, rule.id));
        }
    }

    pub(super) fn mark(&mut self, prefixes: &[IpNet], selector: Selector) {
        for prefix in prefixes {
            let mut marks = self.marks.get(prefix).cloned().unwrap_or_default();
            Arc::make_mut(&mut marks).insert(selector);
            self.marks.insert(*prefix, marks);
        }
    }

    pub(super) fn unmark(&mut self, prefixes: &[IpNet], selector: Selector) {
        for prefix in prefixes {
            let Some(mut marks) = self.marks.get(prefix).cloned() else { continue };
            Arc::make_mut(&mut marks).remove(&selector);
            if marks.is_empty() {
                self.marks.remove(prefix);
            } else {
                self.marks.insert(*prefix, marks);
            }
        }
    }

    /// The rules that have the selector in `from`, and those that have it in `to`, each by id.
    pub(super) fn rules_from(&self, selector: Selector) -> impl Iterator<Item = RuleId> + '_ {
        second(&self.from, selector, RuleId(0), RuleId(u32::MAX))
    }

    pub(super) fn rules_to(&self, selector: Selector) -> impl Iterator<Item = RuleId> + '_ {
        second(&self.to, selector, RuleId(0), RuleId(u32::MAX))
    }

    pub(super) fn is_named(&self, selector: Selector) -> bool {
        self.rules_from(selector).chain(self.rules_to(selector)).next().is_some()
    }

    pub(super) fn rules_with(&self, service: ServiceId) -> impl Iterator<Item = RuleId> + '_ {
        second(&self.of_service, service, RuleId(0), RuleId(u32::MAX))
    }

    pub(super) fn groups_of_node(&self, node: NodeId) -> impl Iterator<Item = GroupId> + '_ {
        second(&self.of_node, node, GroupId(0), GroupId(u32::MAX))
    }

    pub(super) fn groups_of_cidr(&self, cidr: CidrId) -> impl Iterator<Item = GroupId> + '_ {
        second(&self.of_cidr, cidr, GroupId(0), GroupId(u32::MAX))
    }

    pub(super) fn gateways_of(&self, cidr: CidrId) -> impl Iterator<Item = NodeId> + '_ {
        second(&self.gateways, cidr, NodeId(0), NodeId(u32::MAX))
    }
}

/// The second halves of the pairs that begin with `first`.
fn second<A: Ord + Copy, B: Ord + Copy>(
    pairs: &OrdSet<(A, B)>,
    first: A,
    low: B,
    high: B,
) -> impl Iterator<Item = B> + '_ {
    pairs.range((first, low)..=(first, high)).map(|(_, second)| *second)
}

fn named(rule: &Rule) -> impl Iterator<Item = ServiceId> + '_ {
    rule.services.iter().filter_map(|service| match service {
        ServiceRef::Named(id) => Some(*id),
        ServiceRef::Literal(_) => None,
    })
}
