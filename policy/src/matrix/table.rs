//! The enforced rules in the order in which they decide, and cells made from some of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::cell::{Cell, CellEntry};
use super::compile::{Used, index};
use crate::network::Network;
use crate::object::rule::{Action, Mode, Rule};
use crate::object::selector::Selector;
use crate::object::service::{Service, ServiceRange, ServiceRef};
use crate::object::verdict::Verdict;

/// Position of a rule in the order of decision: of those that match a flow the least decides.
pub(super) type Rank = u32;

/// A rule as the compiler sees it.
#[derive(Debug)]
pub(super) struct Ranked {
    pub(super) verdict: Verdict,
    pub(super) from: Vec<Used>,
    pub(super) to: Vec<Used>,
    pub(super) both: bool,
    services: Services,
}

impl Ranked {
    /// How many ranges of services it tells from others; none if it is about all of them.
    pub(super) fn ranges(&self) -> usize {
        match &self.services {
            Services::Any => 0,
            Services::Ranges(ranges) => ranges.len(),
        }
    }
}

#[derive(Debug)]
enum Services {
    Any,
    /// Sorted; may overlap.
    Ranges(Vec<ServiceRange>),
}

#[derive(Debug)]
pub(super) struct RuleTable {
    /// By rank.
    pub(super) rules: Vec<Ranked>,
    /// Every selector that a rule uses, by index.
    pub(super) selectors: Vec<Selector>,
    /// By selector: the ranks of the rules that have it in `from`, and in `to`.
    pub(super) from: Vec<Vec<Rank>>,
    pub(super) to: Vec<Vec<Rank>>,
}

impl RuleTable {
    pub(super) fn of(network: &Network) -> Self {
        let mut rules: Vec<&Rule> = network.rules().values().filter(|rule| rule.mode == Mode::Enforce).collect();
        rules.sort_unstable_by(|a, b| order(a).cmp(&order(b)));
        let mut selectors = Vec::new();
        let mut known: HashMap<Selector, Used> = HashMap::new();
        let mut use_all = |side: &BTreeSet<Selector>| -> Vec<Used> {
            let mut use_one = |selector: &Selector| {
                *known.entry(*selector).or_insert_with(|| {
                    selectors.push(*selector);
                    index(selectors.len() - 1)
                })
            };
            side.iter().map(&mut use_one).collect()
        };
        let mut table = Vec::with_capacity(rules.len());
        for rule in rules {
            let verdict = Verdict::of_rule(rule.action, rule.id);
            let (from, to) = (use_all(&rule.from), use_all(&rule.to));
            table.push(Ranked { verdict, from, to, both: rule.both, services: Services::of(network, rule) });
        }
        let (mut from, mut to) = (vec![Vec::new(); selectors.len()], vec![Vec::new(); selectors.len()]);
        for (rank, rule) in table.iter().enumerate() {
            rule.from.iter().for_each(|&used| from[used as usize].push(index(rank)));
            rule.to.iter().for_each(|&used| to[used as usize].push(index(rank)));
        }
        Self { rules: table, selectors, from, to }
    }

    /// The cell of a pair that these rules match, in the order of their ranks.
    pub(super) fn cell(&self, ranks: &[Rank], default: Verdict) -> Cell {
        let mut otherwise = default;
        let mut painted: BTreeMap<u8, Vec<(ServiceRange, Rank)>> = BTreeMap::new();
        for &rank in ranks {
            match &self.rules[rank as usize].services {
                Services::Any => {
                    // Whatever comes after decides nothing.
                    otherwise = self.rules[rank as usize].verdict;
                    break;
                }
                Services::Ranges(ranges) => {
                    for range in ranges {
                        painted.entry(range.protocol).or_default().push((*range, rank));
                    }
                }
            }
        }
        let entries = painted.into_values().flat_map(|ranges| self.flatten(&ranges));
        Cell::canonical(otherwise, entries.collect::<Vec<_>>())
    }

    /// Overlapping ranges of one protocol to disjoint ones, each with the verdict of the least rank over it.
    fn flatten(&self, ranges: &[(ServiceRange, Rank)]) -> Vec<CellEntry> {
        let mut edges: Vec<(u32, bool, Rank)> = Vec::with_capacity(2 * ranges.len());
        for &(range, rank) in ranges {
            edges.push((range.low.into(), true, rank));
            edges.push((u32::from(range.high) + 1, false, rank));
        }
        edges.sort_unstable();
        let mut entries = Vec::new();
        // How often each rule covers the run that begins at `start`: its own ranges may overlap.
        let mut covering: BTreeMap<Rank, usize> = BTreeMap::new();
        let mut start = 0;
        for (at, begins, rank) in edges {
            if let (Some((&least, _)), true) = (covering.first_key_value(), at > start) {
                let (low, high) = (port(start), port(at - 1));
                let range = ServiceRange { protocol: ranges[0].0.protocol, low, high };
                entries.push(CellEntry { range, verdict: self.rules[least as usize].verdict });
            }
            start = at;
            let count = covering.entry(rank).or_default();
            match begins {
                true => *count += 1,
                false => *count = count.saturating_sub(1),
            }
            if *count == 0 {
                covering.remove(&rank);
            }
        }
        entries
    }
}

/// Highest priority first, then what denies, then by name.
fn order(rule: &Rule) -> impl Ord + '_ {
    (std::cmp::Reverse(rule.priority), rule.action == Action::Allow, &rule.name)
}

fn port(value: u32) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

impl Services {
    fn of(network: &Network, rule: &Rule) -> Self {
        let named = |id| network.services().get(id).into_iter().flat_map(|named| &named.services);
        let mut services: Vec<&Service> = Vec::new();
        for service in &rule.services {
            match service {
                ServiceRef::Literal(service) => services.push(service),
                ServiceRef::Named(id) => services.extend(named(id)),
            }
        }
        match services.iter().any(|service| service.is_any()) {
            true => Self::Any,
            false => Self::Ranges(services.iter().flat_map(|service| service.ranges()).collect()),
        }
    }
}
