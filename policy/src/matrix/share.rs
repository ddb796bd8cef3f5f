//! Shares: what all nodes of one role have of the matrix.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;

use super::cell::Cell;
use super::class::{Class, class_of, interest_around, interest_within, related, within};
use super::decide::Decider;
use super::role::Role;
use crate::network::{DefaultPolicy, Network};
use crate::object::digest::Digest;
use crate::object::id::{CidrId, ClassId, RuleId};
use crate::object::rule::Rule;
use crate::object::selector::Selector;
use crate::object::verdict::Verdict;

/// What the nodes of one role enforce, but for what is each one's own. Classes that no cell of theirs tells apart are one:
/// only marks of `relevant` selectors count.
#[derive(Debug, Default)]
pub(crate) struct Share {
    /// Prefixes within cidrs that are told apart, each with its class.
    pub(crate) prefixes: BTreeMap<IpNet, (ClassId, CidrId)>,
    /// By source and destination, one of which the role stands for; none that is closed.
    pub(crate) cells: BTreeMap<(ClassId, ClassId), Arc<Cell>>,
    /// The rules that decide in some cell.
    pub(crate) rules: BTreeSet<RuleId>,
    /// The classes with which some service is allowed, in either direction.
    pub(crate) open: BTreeSet<Class>,
    /// The selectors of nodes, groups and literals that the other end of a rule about the role has.
    pub(crate) relevant: BTreeSet<Selector>,
    /// Of the rows that follow.
    pub(crate) digest: OnceLock<Digest>,
}

impl Share {
    pub(super) fn of(network: &Network, role: &Role) -> Self {
        let mut maker = Maker::new(network, role);
        maker.find_rules();
        maker.find_prefixes();
        maker.find_pairs();
        maker.finish()
    }

    /// The class as the role sees it.
    pub(crate) fn seen(&self, role: &Role, class: &Class) -> Class {
        if role.is_behind(class) { class.clone() } else { class.with_marks_of(&self.relevant) }
    }
}

/// One end of a pair that the role stands for, by its position; and whether it is the source.
type Side = (usize, bool);

struct Maker<'a> {
    network: &'a Network,
    role: &'a Role,
    own: Vec<(ClassId, &'a Class)>,
    selectors: Vec<BTreeSet<Selector>>,
    /// The rules about an own class, with the selectors of which the other end needs one.
    rules: BTreeMap<(Side, RuleId), BTreeSet<Selector>>,
    relevant: BTreeSet<Selector>,
    prefixes: BTreeMap<IpNet, (ClassId, CidrId)>,
    classes: HashMap<ClassId, Class>,
    marked_in: BTreeMap<CidrId, BTreeSet<ClassId>>,
    marked_by: BTreeMap<Selector, BTreeSet<ClassId>>,
    within: HashMap<CidrId, BTreeSet<CidrId>>,
    pairs: BTreeMap<(Side, ClassId), Vec<RuleId>>,
    /// By own class: the cidrs that the lineage default relates it to.
    related: Vec<BTreeSet<CidrId>>,
}

impl<'a> Maker<'a> {
    fn new(network: &'a Network, role: &'a Role) -> Self {
        let own = role.own();
        let selectors = own.iter().map(|(_, class)| class.selectors(network)).collect();
        let related = own.iter().map(|(_, class)| match network.default() {
            DefaultPolicy::Lineage => related(network, class.cidr),
            DefaultPolicy::Deny => BTreeSet::new(),
        });
        Self {
            network,
            role,
            related: related.collect(),
            own,
            selectors,
            rules: BTreeMap::new(),
            relevant: BTreeSet::new(),
            prefixes: BTreeMap::new(),
            classes: HashMap::new(),
            marked_in: BTreeMap::new(),
            marked_by: BTreeMap::new(),
            within: HashMap::new(),
            pairs: BTreeMap::new(),
        }
    }

    fn find_rules(&mut self) {
        let network = self.network;
        for own in 0..self.own.len() {
            for selector in std::mem::take(&mut self.selectors[own]) {
                let enforced = |rule: &&Rule| rule.is_enforced();
                for rule in network.rules_from(selector).filter(enforced) {
                    self.add_rule(own, true, rule, &rule.to);
                }
                for rule in network.rules_to(selector).filter(enforced) {
                    self.add_rule(own, false, rule, &rule.from);
                }
                self.selectors[own].insert(selector);
            }
        }
        let others = self.rules.values().flatten().copied();
        self.relevant = others.filter(|selector| !matches!(selector, Selector::Any | Selector::Cidr(_))).collect();
    }

    fn add_rule(&mut self, own: usize, is_source: bool, rule: &Rule, others: &BTreeSet<Selector>) {
        for is_source in [is_source, !is_source].into_iter().take(if rule.both { 2 } else { 1 }) {
            self.rules.entry(((own, is_source), rule.id)).or_default().extend(others);
        }
    }

    /// What is told apart within cidrs: where relevant marks lie, and behind the node.
    fn find_prefixes(&mut self) {
        let network = self.network;
        let marked = self.relevant.iter().flat_map(|selector| network.marked_by(*selector));
        let behind: BTreeSet<CidrId> =
            self.own.iter().filter(|(id, _)| !id.is_own()).map(|(_, class)| class.cidr).collect();
        let behind = behind.iter().filter_map(|cidr| network.cidrs().get(cidr)).flat_map(|cidr| cidr.prefixes.iter());
        let nets: BTreeSet<IpNet> = marked.chain(behind).flat_map(|net| interest_within(network, net)).collect();
        for net in nets {
            let Some(class) = self.seen(net) else { continue };
            let is_cidr = network.prefixes().contains_key(&net);
            let around =
                if is_cidr { None } else { interest_around(network, net).and_then(|around| self.seen(around)) };
            let around = around.unwrap_or_else(|| Class::plain(class.cidr));
            if class == around {
                continue;
            }
            let id = class.id();
            self.prefixes.insert(net, (id, class.cidr));
            if !class.marks.is_empty() {
                self.marked_in.entry(class.cidr).or_default().insert(id);
                for selector in class.marks.iter() {
                    self.marked_by.entry(*selector).or_default().insert(id);
                }
                self.classes.insert(id, class);
            }
        }
    }

    fn seen(&self, net: IpNet) -> Option<Class> {
        let class = class_of(self.network, net)?;
        Some(if self.role.is_behind(&class) { class } else { class.with_marks_of(&self.relevant) })
    }

    /// Which classes each rule and the default speak of.
    fn find_pairs(&mut self) {
        let rules = std::mem::take(&mut self.rules);
        let mut selected: HashMap<Selector, Vec<ClassId>> = HashMap::new();
        for ((side, rule), others) in rules {
            for selector in others {
                let classes = selected.entry(selector).or_insert_with(|| self.selected_by(selector));
                for class in classes.iter() {
                    self.pairs.entry((side, *class)).or_default().push(rule);
                }
            }
        }
        for own in 0..self.own.len() {
            let related = self.related[own].clone();
            let mut classes: Vec<ClassId> = related.iter().flat_map(|cidr| self.classes_in(*cidr)).collect();
            classes.extend(
                self.own.iter().filter(|(id, class)| id.is_own() && related.contains(&class.cidr)).map(|(id, _)| *id),
            );
            for class in classes {
                for is_source in [true, false] {
                    self.pairs.entry(((own, is_source), class)).or_default();
                }
            }
        }
    }

    fn selected_by(&mut self, selector: Selector) -> Vec<ClassId> {
        let network = self.network;
        let mut found: Vec<ClassId> = match selector {
            Selector::Any => network.cidrs().keys().flat_map(|cidr| self.classes_in(*cidr)).collect(),
            Selector::Cidr(cidr) => self.classes_within(cidr),
            Selector::Group(id) => {
                let cidrs: Vec<CidrId> =
                    network.groups().get(&id).into_iter().flat_map(|group| &group.cidrs).copied().collect();
                cidrs.into_iter().flat_map(|cidr| self.classes_within(cidr)).collect()
            }
            Selector::Node(_) | Selector::Prefix(_) => Vec::new(),
        };
        found.extend(self.marked_by.get(&selector).into_iter().flatten());
        let is_selected = |own: &usize| self.own[*own].0.is_own() && self.selectors[*own].contains(&selector);
        found.extend((0..self.own.len()).filter(is_selected).map(|own| self.own[own].0));
        found.sort_unstable();
        found.dedup();
        found
    }

    fn classes_within(&mut self, cidr: CidrId) -> Vec<ClassId> {
        let cidrs = self.within.entry(cidr).or_insert_with(|| within(self.network, cidr)).clone();
        cidrs.into_iter().flat_map(|cidr| self.classes_in(cidr)).collect()
    }

    fn classes_in(&self, cidr: CidrId) -> Vec<ClassId> {
        let marked = self.marked_in.get(&cidr).into_iter().flatten().copied();
        std::iter::once(ClassId::of_cidr(cidr)).chain(marked).collect()
    }

    fn finish(self) -> Share {
        let mut decider = Decider::new(self.network);
        let mut share = Share { prefixes: self.prefixes, relevant: self.relevant, ..Share::default() };
        for (((own, is_source), other), rules) in self.pairs {
            let own_id = self.own[own].0;
            let class = self.classes.get(&other);
            let cidr = match (class, other.cidr()) {
                (Some(class), _) => class.cidr,
                (None, Some(cidr)) => cidr,
                (None, None) => match self.own.iter().find(|(id, _)| *id == other) {
                    Some((_, class)) => class.cidr,
                    None => continue,
                },
            };
            let default = if self.related[own].contains(&cidr) { Verdict::LINEAGE } else { Verdict::NO_RULE };
            let cell = decider.cell(rules, default);
            if cell.is_closed() {
                continue;
            }
            if cell.allows_any() && !other.is_own() {
                share.open.insert(class.cloned().unwrap_or_else(|| Class::plain(cidr)));
            }
            share.rules.extend(cell.verdicts().filter_map(|verdict| verdict.rule));
            let pair = if is_source { (own_id, other) } else { (other, own_id) };
            // Both of the pair may be own, and found from either side.
            share.cells.entry(pair).or_insert(cell);
        }
        share
    }
}
