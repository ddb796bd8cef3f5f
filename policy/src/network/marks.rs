//! The prefixes that rules mark within cidrs, kept as rules, groups and nodes come and go.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::Network;
use crate::Map;
use crate::object::cidr::Cidr;
use crate::object::group::Group;
use crate::object::id::{CidrId, GroupId, NodeId, RuleId, ServiceId};
use crate::object::node::{Node, NodeState};
use crate::object::rule::Rule;
use crate::object::selector::Selector;
use crate::object::service::NamedService;

pub(crate) use super::index::Marks;

impl Network {
    /// The prefixes at which addresses of a selector begin that no cidr tells: of nodes, members of groups, and literals.
    pub(crate) fn marked_by(&self, selector: Selector) -> BTreeSet<IpNet> {
        let of_node = |id: &NodeId| self.nodes.get(id).into_iter().flat_map(|node| node.addresses.iter());
        match selector {
            Selector::Any | Selector::Cidr(_) => BTreeSet::new(),
            Selector::Prefix(prefix) => BTreeSet::from([prefix]),
            Selector::Node(id) => of_node(&id).map(IpNet::from).collect(),
            Selector::Group(id) => self
                .groups
                .get(&id)
                .into_iter()
                .flat_map(|group| &group.nodes)
                .flat_map(of_node)
                .map(IpNet::from)
                .collect(),
        }
    }

    pub(crate) fn marks(&self) -> &Map<IpNet, Marks> {
        &self.index.marks
    }

    pub(crate) fn prefixes(&self) -> &Map<IpNet, CidrId> {
        &self.index.prefixes
    }

    pub(crate) fn rules_from(&self, selector: Selector) -> impl Iterator<Item = &Rule> {
        self.index.rules_from(selector).filter_map(|id| self.rules.get(&id))
    }

    pub(crate) fn rules_to(&self, selector: Selector) -> impl Iterator<Item = &Rule> {
        self.index.rules_to(selector).filter_map(|id| self.rules.get(&id))
    }

    pub(crate) fn rules_with(&self, service: ServiceId) -> impl Iterator<Item = RuleId> {
        self.index.rules_with(service)
    }

    pub(crate) fn groups_of_cidr(&self, cidr: CidrId) -> impl Iterator<Item = GroupId> {
        self.index.groups_of_cidr(cidr)
    }

    /// The nodes with an address in a prefix.
    pub(crate) fn nodes_within(&self, prefix: IpNet) -> impl Iterator<Item = NodeId> {
        self.index.addresses.range(prefix.network()..=prefix.broadcast()).map(|(_, node)| *node)
    }

    /// The nodes that can be a gateway.
    pub(crate) fn gateways(&self) -> BTreeSet<NodeId> {
        self.index.gateways.iter().map(|(_, node)| *node).collect()
    }

    /// The active gateway of an external cidr: of those that can be, the active one with the lowest id.
    pub(crate) fn gateway_of(&self, cidr: CidrId) -> Option<NodeId> {
        let active = |node: &NodeId| self.nodes.get(node).is_some_and(|node| node.state == NodeState::Active);
        self.index.gateways_of(cidr).find(active)
    }

    /// Replaces a cidr without judging.
    pub(super) fn put_cidr(&mut self, id: CidrId, new: Option<Cidr>) -> Option<Cidr> {
        self.touched.cidrs.insert(id);
        let old = self.cidrs.remove(&id);
        if let Some(old) = &old {
            self.index.remove_cidr(old);
        }
        if let Some(new) = new {
            self.index.insert_cidr(&new);
            self.cidrs.insert(id, new);
        }
        old
    }

    /// Replaces a node without judging.
    pub(super) fn put_node(&mut self, id: NodeId, new: Option<Node>) {
        self.touched.nodes.insert(id);
        let groups = self.index.groups_of_node(id).map(Selector::Group);
        let named: Vec<Selector> =
            groups.chain([Selector::Node(id)]).filter(|selector| self.index.is_named(*selector)).collect();
        let nets = |node: Option<&Node>| -> BTreeSet<IpNet> {
            node.into_iter().flat_map(|node| node.addresses.iter()).map(IpNet::from).collect()
        };
        let (before, after) = (nets(self.nodes.get(&id)), nets(new.as_ref()));
        for selector in named {
            self.remark(selector, &before, &after);
        }
        if let Some(old) = self.nodes.remove(&id) {
            self.index.remove_node(&old);
        }
        if let Some(new) = new {
            self.index.insert_node(&new);
            self.nodes.insert(id, new);
        }
    }

    /// Replaces a group without judging.
    pub(super) fn put_group(&mut self, id: GroupId, new: Option<Group>) {
        self.touched.groups.insert(id);
        let selector = Selector::Group(id);
        let before = self.marked_by(selector);
        if let Some(old) = self.groups.remove(&id) {
            self.index.remove_group(&old);
        }
        if let Some(new) = new {
            self.index.insert_group(&new);
            self.groups.insert(id, new);
        }
        if self.index.is_named(selector) {
            let after = self.marked_by(selector);
            self.remark(selector, &before, &after);
        }
    }

    /// Replaces a named service without judging.
    pub(super) fn put_service(&mut self, id: ServiceId, new: Option<NamedService>) {
        self.touched.services.insert(id);
        if let Some(old) = self.services.remove(&id) {
            self.index.services.remove(&old.name);
        }
        if let Some(new) = new {
            self.index.services.insert(new.name.clone(), id);
            self.services.insert(id, new);
        }
    }

    /// Replaces a rule without judging.
    pub(super) fn put_rule(&mut self, id: RuleId, new: Option<Rule>) {
        self.touched.rules.insert(id);
        let old = self.rules.remove(&id);
        let selectors = |rule: &Rule| rule.from.union(&rule.to).copied().collect::<Vec<_>>();
        if let Some(old) = &old {
            self.index.remove_rule(old);
            for selector in selectors(old) {
                if !self.index.is_named(selector) {
                    let marked = self.marked_by(selector);
                    self.remark(selector, &marked, &BTreeSet::new());
                }
            }
        }
        if let Some(new) = new {
            for selector in selectors(&new) {
                if !self.index.is_named(selector) {
                    let marked = self.marked_by(selector);
                    self.remark(selector, &BTreeSet::new(), &marked);
                }
            }
            self.index.insert_rule(&new);
            self.rules.insert(id, new);
        }
    }

    fn remark(&mut self, selector: Selector, before: &BTreeSet<IpNet>, after: &BTreeSet<IpNet>) {
        let only = |a: &BTreeSet<IpNet>, b: &BTreeSet<IpNet>| a.difference(b).copied().collect::<Vec<_>>();
        self.index.unmark(&only(before, after), selector);
        self.index.mark(&only(after, before), selector);
    }
}
