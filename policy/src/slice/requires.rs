//! What a node denies because it does not understand it: a newer controller says what must be understood.

use std::collections::BTreeSet;

use super::delta::differing;
use super::{Slice, SliceRule};
use crate::Map;
use crate::matrix::{Cell, CellEntry};
use crate::object::id::RuleId;
use crate::object::rule::Action;
use crate::object::verdict::Verdict;

/// What of one slice after the other a node does not understand, looked for where they differ.
#[derive(Debug, Default)]
pub struct Understanding {
    rules: Map<RuleId, SliceRule>,
    strange: BTreeSet<RuleId>,
}

impl Understanding {
    /// Whether a node that knows these features, always the same, understands all of the next slice.
    pub fn follow(&mut self, slice: &Slice, known: &[&str]) -> bool {
        for id in differing(&self.rules, &slice.rules) {
            match slice.rules.get(&id) {
                Some(rule) if !knows(known, &rule.requires) => self.strange.insert(id),
                _ => self.strange.remove(&id),
            };
        }
        self.rules = slice.rules.clone();
        self.strange.is_empty() && knows(known, &slice.local.requires)
    }
}

fn knows(known: &[&str], required: &BTreeSet<String>) -> bool {
    required.iter().all(|feature| known.contains(&feature.as_str()))
}

impl Slice {
    /// What is required that is not among the features `known`.
    pub fn lacks(&self, known: &[&str]) -> BTreeSet<String> {
        let required = self.local.requires.iter().chain(self.rules.values().flat_map(|rule| &rule.requires));
        required.filter(|feature| !known.contains(&feature.as_str())).cloned().collect()
    }

    /// The slice as a node enforces it that knows these features: what it does not understand it denies. `None`: it
    /// understands everything.
    pub fn understood(&self, known: &[&str]) -> Option<Self> {
        if self.lacks(known).is_empty() {
            return None;
        }
        let mut slice = self.clone();
        if !knows(known, &self.local.requires) {
            (slice.peers, slice.rules, slice.cells) = (Map::new(), Map::new(), Map::new());
            return Some(slice);
        }
        let strange: BTreeSet<RuleId> =
            self.rules.iter().filter(|(_, rule)| !knows(known, &rule.requires)).map(|(id, _)| *id).collect();
        for id in &strange {
            if let Some(rule) = self.rules.get(id) {
                slice.rules.insert(*id, SliceRule { action: Action::Deny, ..rule.clone() });
            }
        }
        for (pair, cell) in &self.cells {
            if cell.verdicts().filter_map(|verdict| verdict.rule).any(|rule| strange.contains(&rule)) {
                slice.cells.insert(*pair, denying(cell, &strange));
            }
        }
        Some(slice)
    }
}

/// The cell with every verdict of these rules a denial.
fn denying(cell: &Cell, strange: &BTreeSet<RuleId>) -> Cell {
    let denied = |verdict: Verdict| match verdict.rule {
        Some(rule) if strange.contains(&rule) => Verdict::of_rule(Action::Deny, rule),
        _ => verdict,
    };
    let entries = cell.entries.iter().map(|entry| CellEntry { verdict: denied(entry.verdict), ..*entry });
    Cell::canonical(denied(cell.otherwise), entries)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Understanding;
    use crate::matrix::Matrix;
    use crate::{Revision, arbitrary};

    proptest! {
        /// Breaks if a node allows what a rule says that it does not understand, or denies more than that.
        #[test]
        fn what_is_not_understood_is_denied(
            (network, flows) in arbitrary::network().prop_flat_map(|network| {
                let flows = prop::collection::vec(arbitrary::flow(&network), 64);
                (Just(network), flows)
            }),
            which in any::<prop::sample::Index>(),
        ) {
            let matrix = Matrix::compile(&network).unwrap();
            for node in matrix.nodes() {
                let mut slice = matrix.slice(node, Revision(1)).unwrap();
                let mut understanding = Understanding::default();
                prop_assert!(understanding.follow(&slice, &["sun"]));
                let plain = slice.clone();
                prop_assert_eq!(slice.understood(&["other"]), None);
                let Some(id) = (!slice.rules.is_empty()).then(|| *which.get(&slice.rules.keys().collect::<Vec<_>>())) else { continue };
                let id = *id;
                let mut rule = slice.rules[&id].clone();
                rule.requires = ["moon".to_owned()].into();
                slice.rules.insert(id, rule);
                prop_assert_eq!(slice.understood(&["moon"]), None);
                prop_assert!(!understanding.follow(&slice, &["sun"]));
                prop_assert!(!understanding.follow(&slice, &["sun"]), "it is still there");
                prop_assert!(understanding.follow(&plain, &["sun"]));
                let understood = slice.understood(&["sun"]).unwrap();
                prop_assert_eq!(understood.validate(), Ok(()));
                for flow in &flows {
                    let (said, enforced) = (slice.verdict(flow), understood.verdict(flow));
                    if said.rule == Some(id) {
                        prop_assert!(!enforced.is_allowed(), "{}", flow);
                    } else {
                        prop_assert_eq!(said, enforced, "{}", flow);
                    }
                }
                let mut whole = slice.clone();
                std::sync::Arc::make_mut(&mut whole.local).requires = ["moon".to_owned()].into();
                prop_assert!(!Understanding::default().follow(&whole, &["sun"]));
                let nothing = whole.understood(&[]).unwrap();
                prop_assert!(nothing.peers.is_empty() && flows.iter().all(|flow| !nothing.verdict(flow).is_allowed()));
            }
        }
    }
}
