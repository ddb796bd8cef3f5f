//! The rows and columns of one class: its cells with all others, made together.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::classes::Class;
use super::compile::Used;
use super::table::Rank;
use super::{Cell, Matrix};
use crate::object::id::ClassId;
use crate::object::verdict::Verdict;

/// One class's cells that do not deny everything for want of a rule, by the other class. Equal cells are shared.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Cross {
    /// As the source.
    pub(crate) row: BTreeMap<ClassId, Arc<Cell>>,
    /// As the destination.
    pub(crate) column: BTreeMap<ClassId, Arc<Cell>>,
}

/// Ranks of rules by a selector, in their order.
type Wanted = BTreeMap<Used, Vec<Rank>>;

/// Cells by the rules that they come from.
type Memo = HashMap<(Vec<Rank>, Verdict), Arc<Cell>>;

impl Matrix {
    /// The cells of one class in both directions.
    pub(crate) fn cross(&self, own: ClassId) -> Cross {
        let Some(own) = self.classes.get(own) else {
            return Cross::default();
        };
        let rules = &self.rules;
        let ranks = |by_selector: &[Vec<Rank>]| {
            let mut ranks: Vec<Rank> =
                own.selected.iter().flat_map(|&used| &by_selector[used as usize]).copied().collect();
            ranks.sort_unstable();
            ranks.dedup();
            ranks
        };
        let (from, to) = (ranks(&rules.from), ranks(&rules.to));
        // The rules that would match, by the selector that the other class must have.
        let (mut row, mut column) = (Wanted::new(), Wanted::new());
        for &rank in &from {
            let rule = &rules.rules[rank as usize];
            rule.to.iter().for_each(|&used| row.entry(used).or_default().push(rank));
            if rule.both {
                rule.to.iter().for_each(|&used| column.entry(used).or_default().push(rank));
            }
        }
        for &rank in &to {
            let rule = &rules.rules[rank as usize];
            rule.from.iter().for_each(|&used| column.entry(used).or_default().push(rank));
            if rule.both {
                rule.from.iter().for_each(|&used| row.entry(used).or_default().push(rank));
            }
        }
        let mut memo = Memo::new();
        Cross { row: self.line(own, &row, &mut memo), column: self.line(own, &column, &mut memo) }
    }

    /// The cells with the other classes. Only those that a rule or the default could speak of are looked at.
    fn line(&self, own: &Class, wanted: &Wanted, memo: &mut Memo) -> BTreeMap<ClassId, Arc<Cell>> {
        let mut touched: BTreeMap<ClassId, Vec<Rank>> = BTreeMap::new();
        for (&used, ranks) in wanted {
            for &class in self.classes.selected_by(used) {
                touched.entry(class).or_default().extend(ranks);
            }
        }
        for class in self.classes.related_to(own) {
            touched.entry(class).or_default();
        }
        let mut line = BTreeMap::new();
        for (id, mut ranks) in touched {
            let Some(other) = self.classes.get(id) else { continue };
            ranks.sort_unstable();
            ranks.dedup();
            let default = self.default(own, other);
            let make = |(ranks, default): &(Vec<Rank>, Verdict)| Arc::new(self.rules.cell(ranks, *default));
            let cell = memo.entry((ranks, default)).or_insert_with_key(make);
            if !cell.is_closed() {
                line.insert(id, Arc::clone(cell));
            }
        }
        line
    }
}
