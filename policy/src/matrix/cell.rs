//! Cells: what one class of addresses may open to another.

use std::fmt;

use thiserror::Error;

use crate::object::rule::Action;
use crate::object::service::ServiceRange;
use crate::object::verdict::{Reason, Verdict};

/// The verdicts of one ordered pair of classes, in the one form that they have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cell {
    /// The verdict of services in none of the entries.
    pub otherwise: Verdict,
    /// Sorted, disjoint, merged where they touch with one verdict, and none with the verdict `otherwise`.
    pub entries: Vec<CellEntry>,
}

/// A run of services with one verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CellEntry {
    pub range: ServiceRange,
    pub verdict: Verdict,
}

/// Why a cell from elsewhere is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CellError {
    #[error("the range {0}-{1} of protocol {2} is reversed")]
    Reversed(u16, u16, u8),
    #[error("`{0}` is out of order, or overlaps `{1}`")]
    Order(ServiceRange, ServiceRange),
    #[error("`{0}` and `{1}` touch and have one verdict, but are not one entry")]
    Unmerged(ServiceRange, ServiceRange),
    #[error("`{0}` has the verdict of the services that have no entry")]
    Redundant(ServiceRange),
    #[error("the verdict `{0}` contradicts itself")]
    Verdict(Verdict),
}

impl Cell {
    /// Denies everything, as no rule allows it: what an absent cell says.
    pub const CLOSED: Self = Self { otherwise: Verdict::NO_RULE, entries: Vec::new() };

    pub const fn uniform(otherwise: Verdict) -> Self {
        Self { otherwise, entries: Vec::new() }
    }

    pub fn is_closed(&self) -> bool {
        *self == Self::CLOSED
    }

    pub fn verdict(&self, protocol: u8, port: u16) -> Verdict {
        let after = self.entries.partition_point(|entry| (entry.range.protocol, entry.range.low) <= (protocol, port));
        match after.checked_sub(1).map(|index| self.entries[index]) {
            Some(CellEntry { range, verdict }) if range.protocol == protocol && port <= range.high => verdict,
            _ => self.otherwise,
        }
    }

    /// Whether some service is allowed.
    pub fn allows_any(&self) -> bool {
        self.verdicts().any(|verdict| verdict.is_allowed())
    }

    /// Every verdict in it, possibly repeated.
    pub fn verdicts(&self) -> impl Iterator<Item = Verdict> + '_ {
        std::iter::once(self.otherwise).chain(self.entries.iter().map(|entry| entry.verdict))
    }

    /// Refuses a cell that is not in the one form, or whose verdicts no policy gives.
    pub fn validate(&self) -> Result<(), CellError> {
        for verdict in self.verdicts() {
            let sound = match (verdict.reason, verdict.rule) {
                (Reason::Rule, Some(rule)) => rule.0 != 0,
                (Reason::Lineage, None) => verdict.action == Action::Allow,
                (Reason::NoRule, None) => verdict.action == Action::Deny,
                _ => false,
            };
            if !sound {
                return Err(CellError::Verdict(verdict));
            }
        }
        for CellEntry { range, verdict } in &self.entries {
            if range.low > range.high {
                return Err(CellError::Reversed(range.low, range.high, range.protocol));
            }
            if *verdict == self.otherwise {
                return Err(CellError::Redundant(*range));
            }
        }
        for pair in self.entries.windows(2) {
            let (before, after) = (pair[0], pair[1]);
            if (before.range.protocol, before.range.high) >= (after.range.protocol, after.range.low) {
                return Err(CellError::Order(after.range, before.range));
            }
            if touches(before, after) {
                return Err(CellError::Unmerged(before.range, after.range));
            }
        }
        Ok(())
    }

    /// From disjoint, sorted entries to the one form.
    pub(crate) fn canonical(otherwise: Verdict, sorted: impl IntoIterator<Item = CellEntry>) -> Self {
        let mut entries: Vec<CellEntry> = Vec::new();
        for entry in sorted.into_iter().filter(|entry| entry.verdict != otherwise) {
            match entries.last_mut() {
                Some(last) if touches(*last, entry) => last.range.high = entry.range.high,
                _ => entries.push(entry),
            }
        }
        Self { otherwise, entries }
    }
}

/// Whether two entries in order should be one.
fn touches(before: CellEntry, after: CellEntry) -> bool {
    before.verdict == after.verdict
        && before.range.protocol == after.range.protocol
        && before.range.high.checked_add(1) == Some(after.range.low)
}

impl fmt::Display for CellEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.range, self.verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::id::RuleId;

    fn entry(protocol: u8, low: u16, high: u16, rule: u32) -> CellEntry {
        let verdict = Verdict::of_rule(Action::Allow, RuleId(rule));
        CellEntry { range: ServiceRange { protocol, low, high }, verdict }
    }

    #[test]
    fn entries_are_merged_and_found() {
        let cell = Cell::canonical(
            Verdict::NO_RULE,
            [entry(6, 1, 9, 1), entry(6, 10, 20, 1), entry(6, 21, 21, 2), entry(17, 0, 0, 2)],
        );
        assert_eq!(cell.entries, [entry(6, 1, 20, 1), entry(6, 21, 21, 2), entry(17, 0, 0, 2)]);
        assert_eq!(cell.validate(), Ok(()));
        let check = |protocol, port, rule: Option<u32>| assert_eq!(cell.verdict(protocol, port).rule, rule.map(RuleId));
        check(6, 0, None);
        check(6, 1, Some(1));
        check(6, 20, Some(1));
        check(6, 21, Some(2));
        check(6, 22, None);
        check(6, 65535, None);
        check(17, 0, Some(2));
        check(17, 1, None);
        check(5, 1, None);
        check(255, 65535, None);
    }

    #[test]
    fn a_cell_in_another_form_is_refused() {
        let check = |entries: Vec<CellEntry>| {
            assert!(Cell { otherwise: Verdict::NO_RULE, entries: entries.clone() }.validate().is_err(), "{entries:?}");
        };
        check(vec![entry(6, 2, 1, 1)]);
        check(vec![entry(6, 1, 5, 1), entry(6, 5, 6, 2)]);
        check(vec![entry(17, 1, 5, 1), entry(6, 5, 6, 2)]);
        check(vec![entry(6, 1, 5, 1), entry(6, 6, 7, 1)]);
        check(vec![entry(6, 1, 5, 0)]);
        check(vec![CellEntry { verdict: Verdict::NO_RULE, ..entry(6, 1, 5, 1) }]);
        check(vec![CellEntry { verdict: Verdict::UNKNOWN_SOURCE, ..entry(6, 1, 5, 1) }]);
    }
}
