//! The numbers that classes have in the tables.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::limit;
use policy::ClassId;

use super::own::{ChangedEntry, Entries, Entry, Holder};

/// The slice's classes numbered as the matrix wants them: 0 unknown, then those of the node's own addresses, then the
/// others. Spare numbers let a new class come without another one being renumbered.
#[derive(Debug)]
pub(super) struct Classes {
    /// Those of the node's own addresses, which have the first numbers.
    own: BTreeSet<ClassId>,
    /// The length of a row of the matrix.
    row: u32,
    numbers: BTreeMap<ClassId, u32>,
    free: BTreeSet<u32>,
    entries: BTreeMap<ClassId, Occurrences>,
}

/// How many entries are of a class.
#[derive(Clone, Copy, Debug, Default)]
struct Occurrences {
    all: usize,
    local: usize,
}

/// The classes that have a number now and had none, and those that had one.
#[derive(Debug, Default)]
pub(super) struct Renumbered {
    pub(super) come: BTreeSet<ClassId>,
    pub(super) gone: BTreeMap<ClassId, u32>,
}

/// A row of the matrix is at least so long, where there is room.
const SHORT_ROW: u32 = 64;

impl Classes {
    pub(super) fn new(entries: &Entries) -> Self {
        let mut classes = Self {
            own: BTreeSet::new(),
            row: 0,
            numbers: BTreeMap::new(),
            free: BTreeSet::new(),
            entries: BTreeMap::new(),
        };
        entries.iter().for_each(|(_, entry)| classes.add(entry));
        let is_local = |(_, entries): &(&ClassId, &Occurrences)| entries.local > 0;
        classes.own = classes.entries.iter().filter(is_local).map(|(class, _)| *class).collect();
        let others = classes.entries.keys().filter(|class| !classes.own.contains(*class));
        classes.numbers = classes.own.iter().chain(others).copied().zip(1..).collect();
        classes.widen(classes.used().next_power_of_two().max(SHORT_ROW));
        classes
    }

    /// Brings the numbers up to date with entries that are others. `None`: the classes of the node's own addresses are
    /// others, or the matrix has no room for a longer row.
    pub(super) fn follow(&mut self, changed: &[ChangedEntry]) -> Option<Renumbered> {
        let both = |changed: &ChangedEntry| [changed.before, changed.after].into_iter().flatten().collect::<Vec<_>>();
        let touched: BTreeSet<ClassId> = changed.iter().flat_map(both).filter_map(|entry| entry.class()).collect();
        for ChangedEntry { before, after, .. } in changed {
            before.iter().for_each(|entry| self.remove(entry));
            after.iter().for_each(|entry| self.add(entry));
        }
        let is_local = |class: &ClassId| self.entries.get(class).is_some_and(|entries| entries.local > 0);
        if touched.iter().any(|class| self.own.contains(class) != is_local(class)) {
            return None;
        }
        let mut renumbered = Renumbered::default();
        let (come, gone): (Vec<ClassId>, Vec<ClassId>) =
            touched.iter().partition(|class| self.entries.contains_key(*class));
        for class in gone {
            if let Some(number) = self.numbers.remove(&class) {
                self.free.insert(number);
                renumbered.gone.insert(class, number);
            }
        }
        for class in come {
            if self.numbers.contains_key(&class) {
                continue;
            }
            if self.free.is_empty() {
                self.widen(self.row.saturating_mul(2));
            }
            self.numbers.insert(class, self.free.pop_first()?);
            renumbered.come.insert(class);
        }
        Some(renumbered)
    }

    pub(super) fn get(&self, class: ClassId) -> Option<u32> {
        self.numbers.get(&class).copied()
    }

    /// The classes of the node's own addresses.
    pub(super) fn own(&self) -> &BTreeSet<ClassId> {
        &self.own
    }

    /// How many those are.
    pub(super) fn owns(&self) -> u32 {
        self.own.len() as u32
    }

    /// The length of a row of the matrix.
    pub(super) fn row(&self) -> u32 {
        self.row
    }

    /// With the unknown class 0.
    pub(super) fn used(&self) -> u32 {
        self.numbers.len() as u32 + 1
    }

    pub(super) fn is_own(&self, number: u32) -> bool {
        (1..=self.owns()).contains(&number)
    }

    /// Makes rows as long as wanted, or as long as the matrix has room for.
    fn widen(&mut self, wanted: u32) {
        let most = limit::CELLS / (2 * self.owns().max(1));
        let row = wanted.min(most).max(self.row).max(self.used());
        self.free.extend(self.row.max(self.used())..row);
        self.row = row;
    }

    fn add(&mut self, entry: &Entry) {
        let Some(class) = entry.class() else { return };
        let entries = self.entries.entry(class).or_default();
        entries.all += 1;
        entries.local += usize::from(entry.holder == Holder::Local);
    }

    fn remove(&mut self, entry: &Entry) {
        let Some(class) = entry.class() else { return };
        let Some(entries) = self.entries.get_mut(&class) else { return };
        entries.all -= 1;
        entries.local -= usize::from(entry.holder == Holder::Local);
        if entries.all == 0 {
            self.entries.remove(&class);
        }
    }
}
