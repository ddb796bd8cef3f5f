//! The rows and columns of one class: its cells with all others, made together.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::classes::Class;
use super::table::Rank;
use super::{Cell, Matrix};
use crate::id::ClassId;
use crate::verdict::Verdict;

/// One class's cells that do not deny everything for want of a rule, by the other class. Equal cells are shared.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Cross {
    /// As the source.
    pub(crate) row: BTreeMap<ClassId, Arc<Cell>>,
    /// As the destination.
    pub(crate) column: BTreeMap<ClassId, Arc<Cell>>,
}

/// Cells by the rules that they come from.
type Memo = HashMap<(Vec<Rank>, Verdict), Arc<Cell>>;

impl Matrix {
    /// The cells of one class in both directions.
    pub(crate) fn cross(&self, own: ClassId) -> Cross {
        let Some(own) = self.classes.get(own) else {
            return Cross::default();
        };
        let rules = &self.rules;
        let is_both = |rank: &&Rank| rules.rules[**rank as usize].both;
        let ranks = |by_selector: &[Vec<Rank>]| {
            let mut ranks: Vec<Rank> =
                own.selected.iter().flat_map(|&used| &by_selector[used as usize]).copied().collect();
            ranks.sort_unstable();
            ranks.dedup();
            ranks
        };
        let (from, to) = (ranks(&rules.from), ranks(&rules.to));
        // The rules that would match, by the selector that the other class must have.
        let mut row = vec![Vec::new(); rules.selectors.len()];
        let mut column = row.clone();
        for &rank in &from {
            let rule = &rules.rules[rank as usize];
            rule.to.iter().for_each(|&used| row[used as usize].push(rank));
            if rule.both {
                rule.to.iter().for_each(|&used| column[used as usize].push(rank));
            }
        }
        for rank in &to {
            let rule = &rules.rules[*rank as usize];
            rule.from.iter().for_each(|&used| column[used as usize].push(*rank));
        }
        for rank in to.iter().filter(is_both) {
            rules.rules[*rank as usize].from.iter().for_each(|&used| row[used as usize].push(*rank));
        }
        let mut memo = Memo::new();
        Cross { row: self.line(own, &row, &mut memo), column: self.line(own, &column, &mut memo) }
    }

    /// The cells with every other class, given the rules by the selector that the other must have.
    fn line(&self, own: &Class, by_selector: &[Vec<Rank>], memo: &mut Memo) -> BTreeMap<ClassId, Arc<Cell>> {
        let mut line = Vec::new();
        for id in self.classes.ids() {
            let Some(other) = self.classes.get(id) else { continue };
            let mut ranks: Vec<Rank> =
                other.selected.iter().flat_map(|&used| &by_selector[used as usize]).copied().collect();
            ranks.sort_unstable();
            ranks.dedup();
            let default = self.default(own, other);
            if ranks.is_empty() && default == Verdict::NO_RULE {
                continue;
            }
            let cell = memo
                .entry((ranks, default))
                .or_insert_with_key(|(ranks, default)| Arc::new(self.rules.cell(ranks, *default)));
            if !cell.is_closed() {
                line.push((id, Arc::clone(cell)));
            }
        }
        line.into_iter().collect()
    }
}
