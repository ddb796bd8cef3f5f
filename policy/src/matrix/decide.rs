//! From the rules that match a pair of classes to its cell.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::cell::{Cell, CellEntry};
use crate::network::Network;
use crate::object::id::RuleId;
use crate::object::rule::{Action, Rule};
use crate::object::service::{Service, ServiceRange, ServiceRef};
use crate::object::verdict::Verdict;

/// Makes cells of one network, equal ones once.
pub(super) struct Decider<'a> {
    network: &'a Network,
    services: HashMap<RuleId, Services>,
    cells: HashMap<(Vec<RuleId>, Verdict), Arc<Cell>>,
}

enum Services {
    Any,
    /// May overlap.
    Ranges(Vec<ServiceRange>),
}

/// Position of a rule in the order of decision: of those that match a flow the least decides.
type Rank = usize;

impl<'a> Decider<'a> {
    pub(super) fn new(network: &'a Network) -> Self {
        Self { network, services: HashMap::new(), cells: HashMap::new() }
    }

    /// The cell of a pair that these rules match. `default`: where none does.
    pub(super) fn cell(&mut self, mut rules: Vec<RuleId>, default: Verdict) -> Arc<Cell> {
        rules.sort_unstable();
        rules.dedup();
        let key = (rules, default);
        if let Some(cell) = self.cells.get(&key) {
            return Arc::clone(cell);
        }
        let cell = Arc::new(self.decide(&key.0, default));
        self.cells.insert(key, Arc::clone(&cell));
        cell
    }

    fn decide(&mut self, rules: &[RuleId], default: Verdict) -> Cell {
        let network = self.network;
        let mut rules: Vec<&Rule> = rules.iter().filter_map(|id| network.rules().get(id)).collect();
        rules.sort_unstable_by(|a, b| order(a).cmp(&order(b)));
        let verdicts: Vec<Verdict> = rules.iter().map(|rule| Verdict::of_rule(rule.action, rule.id)).collect();
        let mut otherwise = default;
        let mut painted: BTreeMap<u8, Vec<(ServiceRange, Rank)>> = BTreeMap::new();
        for (rank, rule) in rules.into_iter().enumerate() {
            match self.services.entry(rule.id).or_insert_with(|| Services::of(network, rule)) {
                Services::Any => {
                    // Whatever comes after decides nothing.
                    otherwise = verdicts[rank];
                    break;
                }
                Services::Ranges(ranges) => {
                    for range in ranges {
                        painted.entry(range.protocol).or_default().push((*range, rank));
                    }
                }
            }
        }
        let entries = painted.into_values().flat_map(|ranges| flatten(&ranges, &verdicts));
        Cell::canonical(otherwise, entries.collect::<Vec<_>>())
    }
}

/// Overlapping ranges of one protocol to disjoint ones, each with the verdict of the least rank over it.
fn flatten(ranges: &[(ServiceRange, Rank)], verdicts: &[Verdict]) -> Vec<CellEntry> {
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
            entries.push(CellEntry { range, verdict: verdicts[least] });
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
