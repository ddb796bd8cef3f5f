//! What one kind of addresses may open to another: every cell of the slice against every word of the matrix.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP, highest_port};
use ebpf_common::table::{ALLOW, CELL_INDEX, DENY, Decision, LOG, NO_RULE_SLOT, Page, RECORD, UNIFORM};
use ebpf_common::{limit, reason};
use policy::{Cell, ClassId, Reason, RuleId, ServiceRange, Slice, Verdict};

use super::addresses::{Kind, Kinds, Where};
use super::{Difference, Direction, End, Names, Said, Services, Verification, Word};
use crate::lower::Tables;

/// Compares the cells between what the node stands for and everything else.
pub(super) fn compare(
    slice: &Slice,
    tables: &Tables,
    slots: &BTreeMap<RuleId, u32>,
    kinds: &Kinds,
    verification: &mut Verification,
) {
    let mut matrix = Rebuilt::new(slice, tables, slots);
    for (own, own_where) in &kinds.own {
        for (other, other_where) in &kinds.all {
            for direction in Direction::BOTH {
                verification.cells += 1;
                let found = matrix.compare(direction, *own, *other);
                if !found.is_equal() {
                    let ends = (own_where, other_where);
                    matrix.report(direction, ends, &found, verification);
                }
            }
        }
    }
}

/// What a pair of classes says of services, against what it should.
struct Compared {
    services: Rc<Vec<Wrong>>,
    /// (intended, found), where they differ and it matters.
    record: Option<(bool, bool)>,
}

impl Compared {
    fn is_equal(&self) -> bool {
        self.services.is_empty() && self.record.is_none()
    }
}

/// One run of services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wrong {
    services: Services,
    intended: Verdict,
    /// `None`: the tables refer to nothing, and the packet drops.
    found: Option<Decision>,
}

/// The tables' cells as they are asked for, each distinct one compared once.
struct Rebuilt<'a> {
    slice: &'a Slice,
    tables: &'a Tables,
    slots: &'a BTreeMap<RuleId, u32>,
    rules: BTreeMap<u32, RuleId>,
    /// Number of each distinct cell of the slice; those of pairs.
    distinct: Vec<&'a Cell>,
    numbers: HashMap<(ClassId, ClassId), usize>,
    open: Vec<(bool, bool)>,
    /// Runs of ports of which all 256 decisions are one.
    uniform: Vec<bool>,
    /// By word without RECORD and number of the intended cell.
    compared: HashMap<(Option<u32>, usize), Rc<Vec<Wrong>>>,
}

/// Number of the cell that an absent one is.
const CLOSED: usize = 0;
static CLOSED_CELL: Cell = Cell::CLOSED;

impl<'a> Rebuilt<'a> {
    fn new(slice: &'a Slice, tables: &'a Tables, slots: &'a BTreeMap<RuleId, u32>) -> Self {
        let mut distinct: Vec<&Cell> = vec![&CLOSED_CELL];
        let mut known: HashMap<&Cell, usize> = HashMap::from([(&CLOSED_CELL, CLOSED)]);
        let mut numbers = HashMap::with_capacity(slice.cells.len());
        for (pair, cell) in &slice.cells {
            let number = *known.entry(cell).or_insert_with(|| {
                distinct.push(cell);
                distinct.len() - 1
            });
            numbers.insert(*pair, number);
        }
        // Whether some service passes, and whether every one does.
        let open = distinct
            .iter()
            .map(|cell| (cell.verdicts().any(|one| one.is_allowed()), cell.verdicts().all(|one| one.is_allowed())))
            .collect();
        let uniform = tables.ports.iter().map(|run| run.decisions.iter().all(|one| *one == run.decisions[0])).collect();
        let rules = slots.iter().map(|(rule, slot)| (*slot, *rule)).collect();
        Self { slice, tables, slots, rules, distinct, numbers, open, uniform, compared: HashMap::new() }
    }

    /// The cell of the slice from one class to another.
    fn intended(&self, source: ClassId, destination: ClassId) -> usize {
        self.numbers.get(&(source, destination)).copied().unwrap_or(CLOSED)
    }

    fn compare(&mut self, direction: Direction, own: Kind, other: Kind) -> Compared {
        let (source, destination) = match direction {
            Direction::Egress => (own.1, other.1),
            Direction::Ingress => (other.1, own.1),
        };
        let (number, reverse) = (self.intended(source, destination), self.intended(destination, source));
        let word = self.word(direction, own.0, other.0);
        let key = (word.map(|word| word & !RECORD), number);
        let services = match self.compared.get(&key) {
            Some(services) => Rc::clone(services),
            None => {
                let services = Rc::new(self.services(key.0, self.distinct[number]));
                self.compared.insert(key, Rc::clone(&services));
                services
            }
        };
        // Where nothing is allowed nothing is recorded.
        let intended = !self.open[reverse].1;
        let found = word.is_some_and(|word| word & RECORD != 0);
        let record = (self.open[number].0 && word.is_some() && intended != found).then_some((intended, found));
        Compared { services, record }
    }

    /// The word of a pair of classes, as the program finds it.
    fn word(&self, direction: Direction, own: u32, other: u32) -> Option<u32> {
        let header = &self.tables.header;
        if own == 0 || own > header.own || other >= header.classes {
            return None;
        }
        // As `table::cell_index`, in a width in which no header overflows.
        let row = u64::from(direction.number()) * u64::from(header.own) + u64::from(own - 1);
        let index = usize::try_from(row * u64::from(header.classes) + u64::from(other)).ok()?;
        self.tables.matrix.get(index).copied()
    }

    fn services(&self, word: Option<u32>, intended: &Cell) -> Vec<Wrong> {
        let Some(word) = word else { return self.against(intended, |_, _, _| vec![(u16::MAX, None)]) };
        let index = (word & CELL_INDEX) as usize;
        if word & UNIFORM != 0 {
            let decision = self.decision(index as u16);
            return self.against(intended, |_, _, _| vec![(u16::MAX, decision)]);
        }
        match self.tables.pages.get(index) {
            Some(page) => self.against(intended, |protocol, low, high| self.in_page(page, protocol, low, high)),
            None => self.against(intended, |_, _, _| vec![(u16::MAX, None)]),
        }
    }

    /// Compares a cell with what `found` says of low to high: decisions with the port up to which each goes.
    fn against(&self, intended: &Cell, found: impl Fn(u8, u16, u16) -> Vec<(u16, Option<Decision>)>) -> Vec<Wrong> {
        let mut wrong: Vec<Wrong> = Vec::new();
        let mut some_right = false;
        let mut compare = |protocol: u8, low: u16, high: u16, verdict: Verdict| {
            let mut low = low;
            for (last, decision) in found(protocol, low, high) {
                let last = last.min(high);
                if self.means(verdict, decision) {
                    some_right = true;
                } else {
                    let services = Services::Range(ServiceRange { protocol, low, high: printed(protocol, last) });
                    wrong.push(Wrong { services, intended: verdict, found: decision });
                }
                low = last.saturating_add(1);
            }
        };
        for protocol in 0..=u8::MAX {
            let top = highest_port(protocol);
            let of_protocol = intended.entries.partition_point(|entry| entry.range.protocol < protocol);
            let mut next = 0u32;
            for entry in intended.entries[of_protocol..].iter().take_while(|entry| entry.range.protocol == protocol) {
                let (low, high) = (entry.range.low, entry.range.high.min(top));
                if u32::from(low) > u32::from(top) {
                    break;
                }
                if next < u32::from(low) {
                    compare(protocol, next as u16, low - 1, intended.otherwise);
                }
                compare(protocol, low, high, entry.verdict);
                next = u32::from(high) + 1;
            }
            if next <= u32::from(top) {
                compare(protocol, next as u16, top, intended.otherwise);
            }
        }
        match wrong.first() {
            // Everything, and all of it alike.
            Some(first) if !some_right && wrong.iter().all(|one| one.is_like(first)) => {
                vec![Wrong { services: Services::Any, ..*first }]
            }
            _ => wrong,
        }
    }

    fn in_page(&self, page: &Page, protocol: u8, low: u16, high: u16) -> Vec<(u16, Option<Decision>)> {
        let mut found: Vec<(u16, Option<Decision>)> = Vec::new();
        let mut add = |last: u16, decision: Option<Decision>| match found.last_mut() {
            Some((end, same)) if *same == decision => *end = last,
            _ => found.push((last, decision)),
        };
        if page.few.known != 0 {
            let service = |port: u16| u32::from(protocol) << 16 | u32::from(port);
            let mut next = Some(low).filter(|low| *low <= high);
            while let Some(first) = next {
                // Where the next range begins, in whatever order they are.
                let later = page.few.starts.iter().filter(|start| **start > service(first)).min();
                let last = later.map_or(high, |start| (start - 1 - service(0)).min(high.into()) as u16);
                add(last, page.few.decision(service(first)).and_then(|index| self.decision(index)));
                next = (last < high).then(|| last + 1);
            }
            return found;
        }
        match protocol {
            TCP | UDP => {
                let runs = if protocol == TCP { &page.tcp } else { &page.udp };
                for block in low >> 8..=high >> 8 {
                    let first = if block == low >> 8 { low & 0xff } else { 0 };
                    let last = if block == high >> 8 { high & 0xff } else { 0xff };
                    let run = runs[usize::from(block)];
                    if self.uniform.get(usize::from(run)) == Some(&true) {
                        add(block << 8 | last, self.in_run(run, first));
                        continue;
                    }
                    (first..=last).for_each(|byte| add(block << 8 | byte, self.in_run(run, byte)));
                }
            }
            ICMP | ICMPV6 => {
                let run = if protocol == ICMP { page.icmp } else { page.icmpv6 };
                (low..=high).for_each(|kind| add(kind, self.in_run(run, kind)));
            }
            other => add(high, self.in_run(page.protocol, other.into())),
        }
        found
    }

    fn in_run(&self, run: u16, entry: u16) -> Option<Decision> {
        let run = self.tables.ports.get(usize::from(run))?;
        self.decision(*run.decisions.get(usize::from(entry))?)
    }

    /// A decision that the program would follow.
    fn decision(&self, index: u16) -> Option<Decision> {
        let decision = self.tables.decisions.get(usize::from(index)).copied()?;
        let sound = matches!(
            (decision.verdict, decision.reason),
            (ALLOW, reason::RULE | reason::LINEAGE) | (DENY, reason::RULE | reason::DENY_RULE | reason::NO_RULE)
        );
        (sound && (decision.rule < limit::RULES || decision.rule == NO_RULE_SLOT)).then_some(decision)
    }

    fn means(&self, verdict: Verdict, decision: Option<Decision>) -> bool {
        decision.is_some_and(|decision| self.said(decision) == self.meant(verdict))
    }

    fn meant(&self, verdict: Verdict) -> Bare {
        let rule = verdict.rule.and_then(|rule| self.slice.rules.get(&rule));
        Bare {
            allow: verdict.is_allowed(),
            reason: match (verdict.reason, verdict.is_allowed()) {
                (Reason::Rule, true) => reason::RULE,
                (Reason::Rule, false) => reason::DENY_RULE,
                (Reason::Lineage, _) => reason::LINEAGE,
                // Between known classes there is no other.
                (Reason::NoRule | Reason::UnknownSource | Reason::UnknownDestination, _) => reason::NO_RULE,
            },
            slot: verdict.rule.map(|rule| self.slots.get(&rule).copied().unwrap_or(NO_RULE_SLOT)),
            log: rule.is_some_and(|rule| rule.log),
        }
    }

    fn said(&self, decision: Decision) -> Bare {
        let deny_rule = decision.verdict == DENY && decision.reason == reason::RULE;
        Bare {
            allow: decision.verdict == ALLOW,
            reason: if deny_rule { reason::DENY_RULE } else { decision.reason },
            slot: (decision.rule != NO_RULE_SLOT).then_some(decision.rule),
            log: decision.flags & LOG != 0,
        }
    }

    fn report(
        &self,
        direction: Direction,
        (own, other): (&Where, &Where),
        found: &Compared,
        verification: &mut Verification,
    ) {
        // No packet goes between families.
        let Some((own_range, other_range)) = own.ends(other) else { return };
        let names = Names(self.slice);
        let end = |addresses, place: &Where| End { addresses, cidr: names.cidr(place.cidr) };
        let (own, other) = (end(own_range, own), end(other_range, other));
        let (source, destination) = match direction {
            Direction::Egress => (own, other),
            Direction::Ingress => (other, own),
        };
        for wrong in found.services.iter() {
            verification.add(Difference::Cell {
                direction,
                source: source.clone(),
                destination: destination.clone(),
                service: wrong.services,
                intended: self.in_words(&names, self.meant(wrong.intended), wrong.intended.rule),
                found: match wrong.found {
                    Some(decision) => {
                        let bare = self.said(decision);
                        let rule = bare.slot.and_then(|slot| self.rules.get(&slot).copied());
                        self.in_words(&names, bare, rule)
                    }
                    None => Said {
                        verdict: Word::Deny,
                        reason: reason::name(reason::CORRUPT_TABLE),
                        rule: None,
                        slot: None,
                        log: false,
                    },
                },
            });
        }
        if let Some((intended, found)) = found.record {
            verification.add(Difference::Record { direction, source, destination, intended, found });
        }
    }

    fn in_words(&self, names: &Names<'_>, bare: Bare, rule: Option<RuleId>) -> Said {
        Said {
            verdict: if bare.allow { Word::Allow } else { Word::Deny },
            reason: reason::name(bare.reason),
            rule: rule.map(|rule| names.rule(rule)),
            slot: bare.slot.filter(|slot| *slot != NO_RULE_SLOT),
            log: bare.log,
        }
    }
}

/// What can be compared of what a verdict and a decision say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bare {
    allow: bool,
    reason: u8,
    slot: Option<u32>,
    log: bool,
}

impl Wrong {
    fn is_like(&self, other: &Self) -> bool {
        self.intended == other.intended && self.found == other.found
    }
}

/// As the policy writes the end of a range.
fn printed(protocol: u8, last: u16) -> u16 {
    if highest_port(protocol) == 0 { u16::MAX } else { last }
}
