//! Which rule counts in which slot of RULE_COUNTERS.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::limit;
use policy::{Map, RuleId};

use super::{FEWER_RULES, LowerError, within};
use crate::difference::differing_keys;

/// Rule to counter slot, stable for as long as the rule is in the node's slice and longer.
///
/// The slot of a rule that went is *retired*: the running tables may still count in it, and it holds the old rule's
/// figures. It is given out again after [`RuleSlots::release`], which the caller does once tables without the rule are in
/// force and the slot's counter was reset. A rule that returns before that finds its slot again. Only where more rules
/// come at once than there are other slots is a retired one given out as it is; it stays among those to be reset.
///
/// The counters are pinned and outlive the agent, so the slots must too: keep [`RuleSlots::pairs`] with the node's state,
/// and where that is lost reset all rule counters before [`RuleSlots::new`] is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSlots {
    active: Map<RuleId, u32>,
    retired: BTreeMap<RuleId, u32>,
    /// Given out with another rule's figures in them.
    stained: BTreeSet<u32>,
    /// Active or retired.
    taken: Taken,
}

/// A bit for each slot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Taken([u64; WORDS]);

const WORDS: usize = limit::RULES.div_ceil(u64::BITS) as usize;

impl RuleSlots {
    pub fn new() -> Self {
        Self::default()
    }

    /// From [`RuleSlots::pairs`]. All are retired until a slice claims them. Pairs that contradict each other or no
    /// map are left out.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (RuleId, u32)>) -> Self {
        let mut taken = Taken::default();
        let retired = pairs.into_iter().filter(|(_, slot)| *slot < limit::RULES && taken.take(*slot)).collect();
        Self { active: Map::new(), retired, stained: BTreeSet::new(), taken }
    }

    /// Every rule that has a slot, retired ones included.
    pub fn pairs(&self) -> BTreeMap<RuleId, u32> {
        self.active.iter().chain(&self.retired).map(|(rule, slot)| (*rule, *slot)).collect()
    }

    /// The pairs that `old` lacks or has otherwise, and the rules that only `old` has a slot for.
    pub fn changes_since(&self, old: &Self) -> (BTreeMap<RuleId, u32>, BTreeSet<RuleId>) {
        let mut rules = differing_keys(&old.active, &self.active);
        rules.extend(old.retired.keys().chain(self.retired.keys()));
        let (mut set, mut removed) = (BTreeMap::new(), BTreeSet::new());
        for rule in rules {
            match (old.pair(rule), self.pair(rule)) {
                (before, Some(slot)) if before != Some(slot) => drop(set.insert(rule, slot)),
                (Some(_), None) => drop(removed.insert(rule)),
                _ => {}
            }
        }
        (set, removed)
    }

    fn pair(&self, rule: RuleId) -> Option<u32> {
        self.active.get(&rule).or_else(|| self.retired.get(&rule)).copied()
    }

    /// The slot of a rule of the current slice.
    pub fn slot(&self, rule: RuleId) -> Option<u32> {
        self.active.get(&rule).copied()
    }

    /// The rule that counts in a slot, also a retired one.
    pub fn rule(&self, slot: u32) -> Option<RuleId> {
        self.active.iter().chain(&self.retired).find(|(_, taken)| **taken == slot).map(|(rule, _)| *rule)
    }

    /// Slots with the figures of rules that went: reset their counters after the next successful switch, then release
    /// them.
    pub fn retired(&self) -> Vec<u32> {
        self.retired.values().chain(&self.stained).copied().collect()
    }

    /// Makes slots that were reset free again.
    pub fn release(&mut self, slots: &[u32]) {
        let slots: BTreeSet<&u32> = slots.iter().collect();
        for (_, slot) in self.retired.extract_if(.., |_, slot| slots.contains(slot)) {
            self.taken.give_back(slot);
        }
        self.stained.retain(|slot| !slots.contains(slot));
    }

    /// The slots of the rules of the current slice.
    pub(super) fn active(&self) -> &Map<RuleId, u32> {
        &self.active
    }

    /// As it will be when exactly these rules are in the slice.
    pub(super) fn assigned(&self, rules: impl IntoIterator<Item = RuleId>) -> Result<Self, LowerError> {
        let rules: BTreeSet<RuleId> = rules.into_iter().collect();
        let gone: Vec<RuleId> = self.active.keys().filter(|rule| !rules.contains(rule)).copied().collect();
        self.changed(&gone, rules.iter().copied())
    }

    /// As it will be when the slice has lost some rules and has others besides.
    pub(super) fn changed(&self, gone: &[RuleId], come: impl Iterator<Item = RuleId>) -> Result<Self, LowerError> {
        let mut next = self.clone();
        for rule in gone {
            if let Some(slot) = next.active.remove(rule) {
                next.retired.insert(*rule, slot);
            }
        }
        // Those that return find theirs again before others look for one.
        let mut new = Vec::new();
        for rule in come.filter(|rule| !self.active.contains_key(rule)) {
            match next.retired.remove(&rule) {
                Some(slot) => drop(next.active.insert(rule, slot)),
                None => new.push(rule),
            }
        }
        within("rules", next.active.len() + new.len(), limit::RULES, FEWER_RULES)?;
        for rule in new {
            let slot = next.taken.take_first().or_else(|| {
                let (_, slot) = next.retired.pop_first()?;
                next.stained.insert(slot);
                Some(slot)
            });
            // There is one: no more rules than slots.
            next.active.insert(rule, slot.ok_or(LowerError::UnknownRule(rule))?);
        }
        Ok(next)
    }
}

impl Default for Taken {
    fn default() -> Self {
        Self([0; WORDS])
    }
}

impl Taken {
    /// Whether the slot was free.
    fn take(&mut self, slot: u32) -> bool {
        let (word, bit) = Self::place(slot);
        let free = self.0[word] & bit == 0;
        self.0[word] |= bit;
        free
    }

    /// The first that is free.
    fn take_first(&mut self) -> Option<u32> {
        let word = self.0.iter().position(|word| *word != u64::MAX)?;
        let slot = word as u32 * u64::BITS + self.0[word].trailing_ones();
        (slot < limit::RULES).then(|| {
            self.take(slot);
            slot
        })
    }

    fn give_back(&mut self, slot: u32) {
        let (word, bit) = Self::place(slot);
        self.0[word] &= !bit;
    }

    fn place(slot: u32) -> (usize, u64) {
        ((slot / u64::BITS) as usize, 1 << (slot % u64::BITS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assigned(slots: &RuleSlots, rules: &[u32]) -> RuleSlots {
        slots.assigned(rules.iter().map(|rule| RuleId(*rule))).expect("few rules")
    }

    #[test]
    fn a_slot_is_kept_retired_found_again_and_reused_only_after_release() {
        let slots = assigned(&RuleSlots::new(), &[7, 9]);
        assert_eq!((slots.slot(RuleId(7)), slots.slot(RuleId(9))), (Some(0), Some(1)));
        let slots = assigned(&slots, &[9, 11]);
        assert_eq!(
            (slots.slot(RuleId(9)), slots.slot(RuleId(11))),
            (Some(1), Some(2)),
            "slot 0 still counts for rule 7"
        );
        assert_eq!(slots.retired(), [0]);
        let mut slots = assigned(&slots, &[7, 9]);
        assert_eq!(slots.slot(RuleId(7)), Some(0), "back before its counter was reset");
        assert_eq!(slots.retired(), [2]);
        slots.release(&[2]);
        assert_eq!(assigned(&slots, &[7, 9, 12]).slot(RuleId(12)), Some(2));
    }

    #[test]
    fn changes_turn_the_pairs_of_one_into_those_of_the_other() {
        let first = assigned(&RuleSlots::new(), &[1, 2, 3]);
        let restored = RuleSlots::from_pairs(first.pairs());
        assert_eq!(restored.changes_since(&first), Default::default(), "retired or not, the slots are the same");
        let mut released = assigned(&first, &[2, 4]);
        released.release(&[0]);
        for (old, new) in [(&first, &assigned(&first, &[2, 4])), (&first, &released), (&released, &first)] {
            let (set, removed) = new.changes_since(old);
            let mut pairs = old.pairs();
            pairs.retain(|rule, _| !removed.contains(rule));
            pairs.extend(set);
            assert_eq!(pairs, new.pairs());
        }
    }

    #[test]
    fn pairs_survive_a_restart() {
        let slots = assigned(&RuleSlots::new(), &[3, 4]);
        let restored = assigned(&RuleSlots::from_pairs(slots.pairs()), &[4]);
        assert_eq!(restored.slot(RuleId(4)), Some(1));
        assert_eq!(restored.retired(), [0]);
        let broken = RuleSlots::from_pairs([(RuleId(1), 5), (RuleId(2), 5), (RuleId(3), limit::RULES)]);
        assert_eq!(broken.pairs(), BTreeMap::from([(RuleId(1), 5)]));
    }

    #[test]
    fn a_whole_new_policy_fits_and_its_borrowed_slots_are_reset() {
        let most = limit::RULES;
        let old = RuleSlots::new().assigned((1..=most).map(RuleId)).expect("as many as fit");
        let mut new = old.assigned((most..2 * most).map(RuleId)).expect("as many as fit");
        assert_eq!(new.slot(RuleId(most)), old.slot(RuleId(most)));
        assert_eq!(new.active.values().collect::<BTreeSet<_>>().len(), most as usize);
        assert_eq!(new.retired().len(), most as usize - 1);
        new.release(&new.retired());
        assert!(new.retired().is_empty());
    }

    #[test]
    fn more_rules_than_counters_are_refused() {
        let error = RuleSlots::new().assigned((1..=limit::RULES + 1).map(RuleId)).expect_err("too many");
        assert!(matches!(error, LowerError::TooMany { wanted, .. } if wanted == limit::RULES as usize + 1));
    }
}
