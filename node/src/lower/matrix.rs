//! Cells to the flat matrix, its pages, runs of ports and decisions.

use std::collections::{BTreeMap, HashMap};

use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP};
use ebpf_common::table::{
    ALLOW, CELL_INDEX, DENY, Decision, LOG, NO_RULE_SLOT, Page, Ports, RECORD, UNIFORM, cell_index,
};
use ebpf_common::{EGRESS, INGRESS, limit, reason};
use policy::{Action, Cell, ClassId, Reason, RuleId, Slice, Verdict};

use super::{Classes, FEWER_PREFIXES, FEWER_RULES, FEWER_SERVICES, LowerError, within};

#[derive(Debug)]
pub(super) struct Cells {
    pub(super) matrix: Vec<u32>,
    pub(super) pages: Vec<Page>,
    pub(super) ports: Vec<Ports>,
    pub(super) decisions: Vec<Decision>,
}

/// What a pair of classes without a cell gets, and the unknown class.
const NO_RULE: Decision = Decision { verdict: DENY, reason: reason::NO_RULE, flags: 0, rule: NO_RULE_SLOT };

pub(super) fn lower(
    slice: &Slice,
    classes: &Classes,
    slot: impl Fn(RuleId) -> Option<u32>,
) -> Result<Cells, LowerError> {
    let count = classes.count();
    let cells = 2 * classes.own as usize * count as usize;
    within("cells of the matrix", cells, limit::CELLS, FEWER_PREFIXES)?;
    let mut sets = Sets::new(slice, slot);
    let closed = UNIFORM | sets.decision(NO_RULE);
    let mut matrix = vec![closed; cells];
    let mut words: HashMap<&Cell, u32> = HashMap::new();
    let number = |class: &ClassId| classes.get(*class);
    for ((source, destination), cell) in &slice.cells {
        // A class that no prefix has any more is no class.
        let (Some(from), Some(to)) = (number(source), number(destination)) else { continue };
        let word = match words.get(cell) {
            Some(word) => *word,
            None => {
                let word = sets.cell(cell)?;
                words.insert(cell, word);
                word
            }
        };
        let answered = slice.cells.get(&(*destination, *source)).is_some_and(allows_every_service);
        let word = if answered { word } else { word | RECORD };
        if classes.is_own(from) {
            matrix[cell_index(classes.own, count, EGRESS, from, to) as usize] = word;
        }
        if classes.is_own(to) {
            matrix[cell_index(classes.own, count, INGRESS, to, from) as usize] = word;
        }
    }
    within("distinct decisions", sets.decisions.list.len(), limit::DECISIONS, FEWER_RULES)?;
    within("distinct sets of services", sets.pages.list.len(), limit::PAGES, FEWER_SERVICES)?;
    within("distinct runs of 256 ports", sets.ports.list.len(), limit::PORTS, FEWER_SERVICES)?;
    Ok(Cells { matrix, pages: sets.pages.list, ports: sets.ports.list, decisions: sets.decisions.list })
}

fn allows_every_service(cell: &Cell) -> bool {
    cell.otherwise.action == Action::Allow && cell.entries.iter().all(|entry| entry.verdict.action == Action::Allow)
}

/// The deduplicated tables while they grow.
struct Sets<'a, F> {
    slice: &'a Slice,
    slot: F,
    pages: Interned<Page>,
    ports: Interned<Ports>,
    decisions: Interned<Decision>,
}

impl<'a, F: Fn(RuleId) -> Option<u32>> Sets<'a, F> {
    fn new(slice: &'a Slice, slot: F) -> Self {
        Self { slice, slot, pages: Interned::new(), ports: Interned::new(), decisions: Interned::new() }
    }

    fn cell(&mut self, cell: &Cell) -> Result<u32, LowerError> {
        let otherwise = self.verdict(&cell.otherwise)?;
        if cell.entries.is_empty() {
            return Ok(UNIFORM | otherwise);
        }
        // Stop before the indices outgrow their 16 bits; the caller's check names the limit.
        within("distinct sets of services", self.pages.list.len() + 1, limit::PAGES, FEWER_SERVICES)?;
        within("distinct runs of 256 ports", self.ports.list.len(), limit::PORTS, FEWER_SERVICES)?;
        let mut runs = Runs::new(otherwise as u16);
        for entry in &cell.entries {
            let decision = self.verdict(&entry.verdict)? as u16;
            runs.set(entry.range.protocol, entry.range.low, entry.range.high, decision);
        }
        let page = runs.page(|run| self.ports.intern(run) as u16);
        Ok(self.pages.intern(page) & CELL_INDEX)
    }

    fn verdict(&mut self, verdict: &Verdict) -> Result<u32, LowerError> {
        let (rule, log) = match verdict.rule {
            Some(rule) => {
                let log = self.slice.rules.get(&rule).ok_or(LowerError::UnknownRule(rule))?.log;
                ((self.slot)(rule).ok_or(LowerError::UnknownRule(rule))?, log)
            }
            None => (NO_RULE_SLOT, false),
        };
        let index = self.decision(Decision {
            verdict: if verdict.action == Action::Allow { ALLOW } else { DENY },
            reason: match verdict.reason {
                Reason::Rule => reason::RULE,
                Reason::Lineage => reason::LINEAGE,
                // Cells are between known classes; whatever else one says, it has no rule.
                Reason::NoRule | Reason::UnknownSource | Reason::UnknownDestination => reason::NO_RULE,
            },
            flags: if log { LOG } else { 0 },
            rule,
        });
        within("distinct decisions", index as usize + 1, limit::DECISIONS, FEWER_RULES)?;
        Ok(index)
    }

    fn decision(&mut self, decision: Decision) -> u32 {
        self.decisions.intern(decision)
    }
}

/// A list without repetitions.
struct Interned<T> {
    list: Vec<T>,
    index: HashMap<T, u32>,
}

impl<T: Copy + Eq + std::hash::Hash> Interned<T> {
    fn new() -> Self {
        Self { list: Vec::new(), index: HashMap::new() }
    }

    fn intern(&mut self, value: T) -> u32 {
        *self.index.entry(value).or_insert_with(|| {
            self.list.push(value);
            self.list.len() as u32 - 1
        })
    }
}

/// The decisions of one cell, spread out; only runs that differ from `otherwise` are stored.
struct Runs {
    otherwise: u16,
    /// By protocol and high byte of the port.
    ported: BTreeMap<(u8, u8), [u16; 256]>,
    icmp: [u16; 256],
    icmpv6: [u16; 256],
    protocol: [u16; 256],
}

impl Runs {
    fn new(otherwise: u16) -> Self {
        let run = [otherwise; 256];
        Self { otherwise, ported: BTreeMap::new(), icmp: run, icmpv6: run, protocol: run }
    }

    fn set(&mut self, protocol: u8, low: u16, high: u16, decision: u16) {
        match protocol {
            TCP | UDP => {
                for run in low >> 8..=high >> 8 {
                    let first = if run == low >> 8 { low & 0xff } else { 0 };
                    let last = if run == high >> 8 { high & 0xff } else { 0xff };
                    let decisions = self.ported.entry((protocol, run as u8)).or_insert([self.otherwise; 256]);
                    decisions[usize::from(first)..=usize::from(last)].fill(decision);
                }
            }
            ICMP | ICMPV6 => {
                let types = if protocol == ICMP { &mut self.icmp } else { &mut self.icmpv6 };
                if low <= 0xff {
                    types[usize::from(low)..=usize::from(high.min(0xff))].fill(decision);
                }
            }
            // Flows of the others have port 0.
            other if low == 0 => self.protocol[usize::from(other)] = decision,
            _ => {}
        }
    }

    fn page(&self, mut intern: impl FnMut(Ports) -> u16) -> Page {
        let otherwise = intern(Ports { decisions: [self.otherwise; 256] });
        let mut page = Page {
            tcp: [otherwise; 256],
            udp: [otherwise; 256],
            icmp: intern(Ports { decisions: self.icmp }),
            icmpv6: intern(Ports { decisions: self.icmpv6 }),
            protocol: intern(Ports { decisions: self.protocol }),
            _pad: 0,
        };
        for ((protocol, run), decisions) in &self.ported {
            let runs = if *protocol == TCP { &mut page.tcp } else { &mut page.udp };
            runs[usize::from(*run)] = intern(Ports { decisions: *decisions });
        }
        page
    }
}
