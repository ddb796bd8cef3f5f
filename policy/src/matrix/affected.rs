//! Whom a change affects.

use std::collections::BTreeSet;

use super::Matrix;
use super::class::{marks_at, selectors_of, within};
use crate::network::{DefaultPolicy, Network, Rows};
use crate::object::cidr::Cidr;
use crate::object::group::Group;
use crate::object::id::{CidrId, NodeId, RuleId};
use crate::object::rule::Rule;
use crate::object::selector::Selector;

/// The nodes whose slices may differ after a change: at least those whose do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Affected {
    /// What every slice says of the cidrs has changed.
    pub common: bool,
    /// Every node may have other cells.
    pub is_everybody: bool,
    /// The nodes that may have other cells, rules, peers, or something else of their own.
    pub nodes: BTreeSet<NodeId>,
    /// The nodes that stand for other classes, or are other peers to those whose peers they are.
    pub changed: BTreeSet<NodeId>,
}

impl Affected {
    pub fn is_nobody(&self) -> bool {
        !self.common && !self.is_everybody && self.nodes.is_empty()
    }

    /// Whom this change or another one affects.
    pub fn extend(&mut self, other: &Self) {
        self.common |= other.common;
        self.is_everybody |= other.is_everybody;
        self.nodes.extend(&other.nodes);
        self.changed.extend(&other.changed);
    }
}

/// Two matrices, and what lies between them.
pub(super) struct Between<'a> {
    pub(super) old: &'a Matrix,
    pub(super) new: &'a Matrix,
    pub(super) rows: &'a Rows,
    /// The nodes that stand for other classes, or are other peers.
    pub(super) changed: &'a BTreeSet<NodeId>,
}

impl Between<'_> {
    pub(super) fn affected(&self, common: bool) -> Affected {
        let mut nodes: BTreeSet<NodeId> = self.rows.nodes.union(self.changed).copied().collect();
        let is_everybody = self.rows.header;
        for matrix in [self.old, self.new] {
            if is_everybody {
                nodes.extend(matrix.nodes());
                continue;
            }
            self.add_peers(matrix, &mut nodes);
            let mut rules: BTreeSet<RuleId> = self.rows.rules.clone();
            rules.extend(self.rows.services.iter().flat_map(|service| matrix.network.rules_with(*service)));
            for rule in rules.iter().filter_map(|rule| matrix.network.rules().get(rule)) {
                matrix.add_selected(rule.from.iter().chain(&rule.to), &mut nodes);
            }
            self.add_groups(matrix, &mut nodes);
            self.add_cidrs(matrix, &mut nodes);
        }
        Affected { common, is_everybody, nodes, changed: self.changed.clone() }
    }

    /// The peers of nodes that are other peers now. One that only stands for another class is told apart by a rule, and
    /// that rule's other end is affected for its own sake.
    fn add_peers(&self, matrix: &Matrix, nodes: &mut BTreeSet<NodeId>) {
        for node in self.changed.iter().filter(|node| self.old.peer_digest(**node) != self.new.peer_digest(**node)) {
            if let Some(role) = matrix.role(*node) {
                nodes.extend(matrix.peers(role));
            }
        }
    }

    fn add_groups(&self, matrix: &Matrix, nodes: &mut BTreeSet<NodeId>) {
        let group = |matrix: &Matrix, id| matrix.network.groups().get(id).cloned();
        for id in &self.rows.groups {
            let (before, after) = (group(self.old, id), group(self.new, id));
            let members =
                |group: &Option<Group>| group.as_ref().map(|group| (group.nodes.clone(), group.cidrs.clone()));
            if members(&before) == members(&after) {
                continue;
            }
            matrix.add_other_ends(Selector::Group(*id), nodes);
            let cidrs = |group: &Option<Group>| group.as_ref().map(|group| group.cidrs.clone()).unwrap_or_default();
            for cidr in cidrs(&before).symmetric_difference(&cidrs(&after)) {
                matrix.add_selected([&Selector::Cidr(*cidr)], nodes);
            }
        }
    }

    /// Those who reach, or are reached by, what lies in a cidr that was changed.
    fn add_cidrs(&self, matrix: &Matrix, nodes: &mut BTreeSet<NodeId>) {
        let cidr = |matrix: &Matrix, id| matrix.network.cidrs().get(id).cloned();
        for id in &self.rows.cidrs {
            let of_cells = |cidr: &Option<Cidr>| cidr.as_ref().map(|cidr| (cidr.prefixes, cidr.isolated));
            if of_cells(&cidr(self.old, id)) == of_cells(&cidr(self.new, id)) {
                continue;
            }
            let Some(cidr) = cidr(matrix, id) else { continue };
            for selector in touching(&matrix.network, &cidr) {
                matrix.add_other_ends(selector, nodes);
            }
            let inside = within(&matrix.network, cidr.id);
            let related = if matrix.network.default() == DefaultPolicy::Lineage {
                matrix.network.lineage_of(cidr.id)
            } else {
                Vec::new()
            };
            for cidr in inside.into_iter().chain(related) {
                matrix.add_members(cidr, nodes);
            }
            // What lies in its prefixes may have been in another cidr, or may be in another one now.
            for network in [&self.old.network, &self.new.network] {
                nodes.extend(cidr.prefixes.iter().flat_map(|net| network.nodes_within(net)));
            }
        }
    }
}

/// The selectors of which some addresses of a cidr have one.
fn touching(network: &Network, cidr: &Cidr) -> BTreeSet<Selector> {
    let mut selectors: BTreeSet<Selector> = selectors_of(network, cidr.id).into_iter().collect();
    for net in cidr.prefixes.iter() {
        let last = ipnet::IpNet::from(net.broadcast());
        selectors.extend(marks_at(network, net).iter());
        selectors.extend(network.marks().range(net..=last).flat_map(|(_, marks)| marks.iter()));
    }
    selectors
}

impl Matrix {
    /// The nodes that stand for an address that one of the selectors selects.
    fn add_selected<'a>(&self, selectors: impl IntoIterator<Item = &'a Selector>, nodes: &mut BTreeSet<NodeId>) {
        for selector in selectors {
            match selector {
                Selector::Any => nodes.extend(self.nodes()),
                Selector::Cidr(cidr) => {
                    within(&self.network, *cidr).into_iter().for_each(|cidr| self.add_members(cidr, nodes))
                }
                Selector::Group(id) => {
                    let cidrs = self.network.groups().get(id).into_iter().flat_map(|group| &group.cidrs);
                    for cidr in cidrs.flat_map(|cidr| within(&self.network, *cidr)) {
                        self.add_members(cidr, nodes);
                    }
                    self.add_marked(*selector, nodes);
                }
                Selector::Node(_) | Selector::Prefix(_) => self.add_marked(*selector, nodes),
            }
        }
    }

    fn add_members(&self, cidr: CidrId, nodes: &mut BTreeSet<NodeId>) {
        nodes.extend(self.members_in(cidr).flat_map(|(_, members)| members.nodes.iter()));
    }

    fn add_marked(&self, selector: Selector, nodes: &mut BTreeSet<NodeId>) {
        let first = (selector, super::Class::plain(CidrId(0)));
        let classes = self.marked.range(first..).take_while(|(mark, _)| *mark == selector);
        nodes.extend(classes.filter_map(|(_, class)| self.members.get(class)).flat_map(|members| members.nodes.iter()));
    }

    /// The nodes at the other ends of the rules that have a selector.
    fn add_other_ends(&self, selector: Selector, nodes: &mut BTreeSet<NodeId>) {
        let enforced = |rule: &&Rule| rule.is_enforced();
        for rule in self.network.rules_from(selector).filter(enforced) {
            self.add_selected(&rule.to, nodes);
        }
        for rule in self.network.rules_to(selector).filter(enforced) {
            self.add_selected(&rule.from, nodes);
        }
    }
}
