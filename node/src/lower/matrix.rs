//! Cells to the flat matrix, its pages, runs of ports and decisions.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP, highest_port};
use ebpf_common::table::{
    ALLOW, CELL_INDEX, DENY, Decision, Few, LOG, NO_RULE_SLOT, Page, Ports, RECORD, UNIFORM, cell_index,
};
use ebpf_common::{EGRESS, INGRESS, limit, reason};
use foldhash::quality::RandomState;
use policy::{Action, Cell, ClassId, Map, Reason, RuleId, ServiceRange, Slice, Touched, Verdict};

use super::classes::{Classes, Renumbered};
use super::interned::Interned;
use super::rows::Rows;
use super::{FEWER_PREFIXES, FEWER_RULES, FEWER_SERVICES, LowerError, RuleSlots, within};

/// A page that nothing refers to.
const EMPTY: Page =
    Page { few: Few::UNKNOWN, icmp: 0, icmpv6: 0, protocol: 0, _pad: [0; 5], tcp: [0; 256], udp: [0; 256] };
/// What a pair of classes without a cell gets, and the unknown class.
const NO_RULE: Decision = Decision { verdict: DENY, reason: reason::NO_RULE, flags: 0, rule: NO_RULE_SLOT };
/// The word of such a pair: decision 0 is always there.
const CLOSED: u32 = UNIFORM;

/// What the cells of a slice became, and who refers to what, so that the next slice costs what it changes.
#[derive(Debug)]
pub(super) struct Cells {
    pub(super) matrix: Rows<u32>,
    /// The length of its rows.
    row: u32,
    pages: Interned<Page>,
    ports: Interned<Ports>,
    decisions: Interned<Decision>,
    /// Of each distinct cell, with the number of pairs that have it.
    words: HashMap<Cell, (u32, usize), RandomState>,
}

/// What cells are lowered by.
pub(super) struct Terms<'a> {
    pub(super) slice: &'a Slice,
    pub(super) classes: &'a Classes,
    pub(super) slots: &'a RuleSlots,
}

impl Cells {
    pub(super) fn lower(terms: &Terms<'_>) -> Result<Self, LowerError> {
        let cells = 2 * terms.classes.owns() as usize * terms.classes.row() as usize;
        within("cells of the matrix", cells, limit::CELLS, FEWER_PREFIXES)?;
        let mut lowered = Self {
            matrix: vec![CLOSED; cells].into(),
            row: terms.classes.row(),
            pages: Interned::new(EMPTY),
            ports: Interned::new(Ports { decisions: [0; 256] }),
            decisions: Interned::new(NO_RULE),
            words: HashMap::default(),
        };
        let no_rule = lowered.decisions.intern(NO_RULE);
        lowered.decisions.hold(no_rule);
        for (pair, cell) in &terms.slice.cells {
            if terms.numbers(*pair).is_some() {
                let word = lowered.hold(terms, cell)?;
                lowered.place(terms, *pair, Some(word));
            }
        }
        lowered.check()?;
        Ok(lowered)
    }

    /// Makes of `old`'s cells those of the terms' slice, in which the classes of the node's own addresses are those of
    /// `old`. An error leaves them unfit for use.
    pub(super) fn follow(
        &mut self,
        terms: &Terms<'_>,
        old: &Slice,
        old_slots: &Map<RuleId, u32>,
        touched: &Touched,
        renumbered: &Renumbered,
    ) -> Result<(), LowerError> {
        for rule in &touched.rules {
            self.follow_rule(terms, old, *rule)?;
        }
        let Renumbered { come, gone } = renumbered;
        self.widen(terms.classes);
        gone.values().for_each(|number| self.close(terms.classes, *number));
        // Every cell has an end among the own classes.
        let own = terms.classes.own();
        let with_own =
            |other: &ClassId| own.iter().flat_map(|own| [(*own, *other), (*other, *own)]).collect::<Vec<_>>();
        let pairs: BTreeSet<(ClassId, ClassId)> =
            touched.cells.iter().copied().chain(come.iter().chain(gone.keys()).flat_map(with_own)).collect();
        let had = |class| gone.contains_key(&class) || terms.classes.get(class).is_some() && !come.contains(&class);
        for pair in &pairs {
            if let Some(cell) = terms.slice.cells.get(pair).filter(|_| terms.numbers(*pair).is_some()) {
                self.hold(terms, cell)?;
            }
            if let Some(cell) = old.cells.get(pair).filter(|_| had(pair.0) && had(pair.1)) {
                self.let_go(cell);
            }
        }
        for rule in touched.rules.iter().filter(|rule| !terms.slice.rules.contains_key(*rule)) {
            // A cell that was left alone may still be decided by it.
            let still = |slot: &u32| self.decisions.values().any(|decision| decision.rule == *slot);
            if old_slots.get(rule).is_some_and(still) {
                return Err(LowerError::UnknownRule(*rule));
            }
        }
        for &(source, destination) in &pairs {
            // Whether a flow is recorded is for the opposite cell to say.
            for pair in [(source, destination), (destination, source)] {
                let word = terms.slice.cells.get(&pair).and_then(|cell| self.words.get(cell)).map(|(word, _)| *word);
                self.place(terms, pair, word);
            }
        }
        self.check()
    }

    pub(super) fn pages(&self) -> Rows<Page> {
        self.pages.list.clone()
    }

    pub(super) fn ports(&self) -> Rows<Ports> {
        self.ports.list.clone()
    }

    pub(super) fn decisions(&self) -> Rows<Decision> {
        self.decisions.list.clone()
    }

    /// How many pages, runs and decisions there are.
    #[cfg(test)]
    pub(super) fn used(&self) -> [usize; 3] {
        [self.pages.used(), self.ports.used(), self.decisions.used()]
    }

    fn check(&self) -> Result<(), LowerError> {
        within("distinct decisions", self.decisions.list.len(), limit::DECISIONS, FEWER_RULES)?;
        within("distinct sets of services", self.pages.list.len(), limit::PAGES, FEWER_SERVICES)?;
        within("distinct runs of 256 ports", self.ports.list.len(), limit::PORTS, FEWER_SERVICES)
    }

    /// Writes the word of a pair wherever it is read.
    fn place(&mut self, terms: &Terms<'_>, (source, destination): (ClassId, ClassId), word: Option<u32>) {
        // A class that no prefix has any more is no class.
        let Some((from, to)) = terms.numbers((source, destination)) else { return };
        let answered = || terms.slice.cells.get(&(destination, source)).is_some_and(allows_every_service);
        let word = match word {
            Some(word) if answered() => word,
            Some(word) => word | RECORD,
            None => CLOSED,
        };
        let (own, row) = (terms.classes.owns(), self.row);
        if terms.classes.is_own(from) {
            self.matrix.set(cell_index(own, row, EGRESS, from, to) as usize, word);
        }
        if terms.classes.is_own(to) {
            self.matrix.set(cell_index(own, row, INGRESS, to, from) as usize, word);
        }
    }

    /// Closes whatever the class of a number may open, or others to it.
    fn close(&mut self, classes: &Classes, number: u32) {
        for own in 1..=classes.owns() {
            for direction in [EGRESS, INGRESS] {
                self.matrix.set(cell_index(classes.owns(), self.row, direction, own, number) as usize, CLOSED);
            }
        }
    }

    /// Makes rows as long as the classes want them.
    fn widen(&mut self, classes: &Classes) {
        if self.row == classes.row() {
            return;
        }
        let (old, new) = (self.row as usize, classes.row() as usize);
        let rows = 0..2 * classes.owns() as usize;
        let word = |row: usize, column: usize| if column < old { self.matrix[row * old + column] } else { CLOSED };
        let words = rows.flat_map(|row| (0..new).map(move |column| (row, column)));
        (self.matrix, self.row) = (words.map(|(row, column)| word(row, column)).collect(), classes.row());
    }

    /// The word of a cell that one more pair has.
    fn hold(&mut self, terms: &Terms<'_>, cell: &Cell) -> Result<u32, LowerError> {
        if let Some((word, pairs)) = self.words.get_mut(cell) {
            *pairs += 1;
            return Ok(*word);
        }
        let word = self.lower_cell(terms, cell)?;
        self.words.insert(cell.clone(), (word, 1));
        Ok(word)
    }

    /// One pair less has the cell.
    fn let_go(&mut self, cell: &Cell) {
        match self.words.get_mut(cell) {
            Some((_, pairs)) if *pairs > 1 => *pairs -= 1,
            Some(_) => {
                let Some((word, _)) = self.words.remove(cell) else { return };
                let index = word & CELL_INDEX;
                if word & UNIFORM != 0 {
                    self.decisions.let_go(index);
                } else if let Some(page) = self.pages.let_go(index) {
                    for run in runs_of(&page) {
                        let gone = self.ports.let_go(run);
                        for decision in gone.iter().flat_map(decisions_of) {
                            self.decisions.let_go(decision);
                        }
                    }
                }
            }
            None => {}
        }
    }

    /// The word of a new cell, which holds what it refers to.
    fn lower_cell(&mut self, terms: &Terms<'_>, cell: &Cell) -> Result<u32, LowerError> {
        let otherwise = self.verdict(terms, &cell.otherwise)?;
        if cell.entries.is_empty() {
            self.decisions.hold(otherwise);
            return Ok(UNIFORM | otherwise);
        }
        // Stop before the indices outgrow their 16 bits; the caller's check names the limit.
        within("distinct sets of services", self.pages.used() + 1, limit::PAGES, FEWER_SERVICES)?;
        within("distinct runs of 256 ports", self.ports.list.len(), limit::PORTS, FEWER_SERVICES)?;
        let mut runs = Runs::new(otherwise as u16);
        let mut ranges = Ranges::new(otherwise as u16);
        let mut decisions = vec![otherwise];
        for entry in &cell.entries {
            let decision = self.verdict(terms, &entry.verdict)?;
            runs.set(entry.range.protocol, entry.range.low, entry.range.high, decision as u16);
            ranges.push(entry.range, decision as u16);
            decisions.push(decision);
        }
        let mut interned = Vec::new();
        let page = runs.page(|run| {
            interned.push(self.ports.intern(run));
            interned[interned.len() - 1] as u16
        });
        let page = Page { few: ranges.few(), ..page };
        let index = self.pages.intern(page);
        if self.pages.hold(index) {
            for run in runs_of(&page) {
                if self.ports.hold(run) {
                    for decision in decisions_of(&self.ports.list[run as usize]) {
                        self.decisions.hold(decision);
                    }
                }
            }
        }
        // Where entries leave nothing to the rest its run is in no page, and those of services that no packet has are in no
        // run.
        interned.iter().for_each(|run| self.ports.free_unheld(*run));
        decisions.iter().for_each(|decision| self.decisions.free_unheld(*decision));
        Ok(index & CELL_INDEX)
    }

    fn verdict(&mut self, terms: &Terms<'_>, verdict: &Verdict) -> Result<u32, LowerError> {
        let index = self.decisions.intern(terms.decision(verdict)?);
        within("distinct decisions", index as usize + 1, limit::DECISIONS, FEWER_RULES)?;
        Ok(index)
    }

    /// A rule that is reported now, or no longer, keeps its place.
    fn follow_rule(&mut self, terms: &Terms<'_>, old: &Slice, rule: RuleId) -> Result<(), LowerError> {
        let (Some(before), Some(after)) = (old.rules.get(&rule), terms.slice.rules.get(&rule)) else { return Ok(()) };
        let decision = terms.decision(&Verdict::of_rule(before.action, rule))?;
        let flags = |log: bool| if log { LOG } else { 0 };
        let (before, after) = (flags(before.log), flags(after.log));
        self.decisions.replace(Decision { flags: before, ..decision }, Decision { flags: after, ..decision });
        Ok(())
    }
}

impl Terms<'_> {
    fn numbers(&self, (source, destination): (ClassId, ClassId)) -> Option<(u32, u32)> {
        Some((self.classes.get(source)?, self.classes.get(destination)?))
    }

    fn decision(&self, verdict: &Verdict) -> Result<Decision, LowerError> {
        let (rule, log) = match verdict.rule {
            Some(rule) => {
                let log = self.slice.rules.get(&rule).ok_or(LowerError::UnknownRule(rule))?.log;
                (self.slots.slot(rule).ok_or(LowerError::UnknownRule(rule))?, log)
            }
            None => (NO_RULE_SLOT, false),
        };
        Ok(Decision {
            verdict: if verdict.action == Action::Allow { ALLOW } else { DENY },
            reason: match verdict.reason {
                Reason::Rule => reason::RULE,
                Reason::Lineage => reason::LINEAGE,
                // Cells are between known classes; whatever else one says, it has no rule.
                Reason::NoRule | Reason::UnknownSource | Reason::UnknownDestination => reason::NO_RULE,
            },
            flags: if log { LOG } else { 0 },
            rule,
        })
    }
}

fn allows_every_service(cell: &Cell) -> bool {
    cell.otherwise.action == Action::Allow && cell.entries.iter().all(|entry| entry.verdict.action == Action::Allow)
}

/// The runs that a page refers to, each once.
fn runs_of(page: &Page) -> BTreeSet<u32> {
    distinct(page.tcp.iter().chain(&page.udp).chain([&page.icmp, &page.icmpv6, &page.protocol]))
}

/// The decisions that a run refers to, each once.
fn decisions_of(ports: &Ports) -> BTreeSet<u32> {
    distinct(&ports.decisions)
}

/// Most are like the one before.
fn distinct<'a>(indices: impl IntoIterator<Item = &'a u16>) -> BTreeSet<u32> {
    let mut last = None;
    let parted = indices.into_iter().filter(|index| last.replace(**index) != Some(**index));
    parted.map(|index| u32::from(*index)).collect()
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
            ..EMPTY
        };
        for ((protocol, run), decisions) in &self.ported {
            let runs = if *protocol == TCP { &mut page.tcp } else { &mut page.udp };
            runs[usize::from(*run)] = intern(Ports { decisions: *decisions });
        }
        page
    }
}

/// The decisions of one cell as ranges of the services that packets have, one after the other without a gap: neighbours have
/// different decisions, and each is that of some packet.
struct Ranges {
    otherwise: u16,
    /// First service and decision of each.
    ranges: Vec<(u32, u16)>,
    /// The service after the last entry's; `None`: there is none.
    next: Option<u32>,
}

impl Ranges {
    fn new(otherwise: u16) -> Self {
        Self { otherwise, ranges: Vec::new(), next: Some(0) }
    }

    /// The next entry of a cell, whose entries are in order.
    fn push(&mut self, ServiceRange { protocol, low, high }: ServiceRange, decision: u16) {
        let highest = highest_port(protocol);
        if low > highest {
            return;
        }
        let service = |port: u16| u32::from(protocol) << 16 | u32::from(port);
        if let Some(next) = self.next.filter(|next| *next < service(low)) {
            self.add(next, self.otherwise);
        }
        self.add(service(low), decision);
        self.next = if high < highest {
            Some(service(high + 1))
        } else {
            protocol.checked_add(1).map(|next| u32::from(next) << 16)
        };
    }

    fn add(&mut self, start: u32, decision: u16) {
        if self.ranges.last().is_none_or(|(_, last)| *last != decision) {
            self.ranges.push((start, decision));
        }
    }

    fn few(mut self) -> Few {
        if let Some(next) = self.next {
            self.add(next, self.otherwise);
        }
        let mut few = Few { known: 1, ..Few::UNKNOWN };
        if self.ranges.len() > few.decisions.len() {
            return Few::UNKNOWN;
        }
        for (place, (start, decision)) in self.ranges.into_iter().enumerate() {
            if let Some(before) = place.checked_sub(1) {
                few.starts[before] = start;
            }
            few.decisions[place] = decision;
        }
        few
    }
}
