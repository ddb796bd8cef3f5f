//! Counts that a predecessor of the tables came to, in this one's terms. They lie in a map of their own, which no
//! program touches; whoever reads counters adds them.

use std::collections::BTreeMap;

use ebpf_common::counter::{Counter, PairKey};
use ebpf_common::{DIRECTIONS, reason};

use crate::kernel::datapath::upgrade::description::Description;

/// What is counted: a kind and up to three numbers. The reasons in it are those of the version that wrote it.
pub(crate) type Key = [u32; 4];
/// Packets, bytes, segments.
pub(crate) type Value = [u64; 3];

/// The counts of that version are in: they are not added again.
const VERSION: u32 = 0;
const REASON: u32 = 1;
const RULE: u32 = 2;
const PAIR: u32 = 3;
const LOSS: u32 = 4;

/// Counts by what they count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inherited(BTreeMap<Key, Value>);

/// The counters' maps of a predecessor, read raw: keys, and the values of all CPUs one after the other.
#[derive(Clone, Debug, Default)]
pub(crate) struct PredecessorCounts {
    pub(crate) version: u32,
    pub(crate) reasons: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) rules: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of PAIR_COUNTERS.
    pub(crate) pairs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of PAIR_TABLE.
    pub(crate) slots: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) losses: Vec<(Vec<u8>, Vec<u8>)>,
    /// What it had inherited itself.
    pub(crate) inherited: Inherited,
}

/// The maps are not as they are described.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not as its version describes it")]
pub(crate) struct Unlike(&'static str);

impl Inherited {
    pub(crate) fn new(entries: BTreeMap<Key, Value>) -> Self {
        Self(entries)
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (Key, Value)> {
        self.0.iter().map(|(key, value)| (*key, *value))
    }

    pub(crate) fn has(&self, version: u32) -> bool {
        self.0.contains_key(&[VERSION, version, 0, 0])
    }

    /// Adds what a predecessor counted. Counts of reasons that are no more are left out.
    pub(crate) fn add(&mut self, predecessor: &PredecessorCounts, described: &Description) -> Result<(), Unlike> {
        let mut sum = Self(self.0.clone());
        sum.add_reasons(predecessor, described)?;
        for (key, value) in &predecessor.rules {
            let slot = word(key, 0).ok_or(Unlike("RULE_COUNTERS"))?;
            sum.count([RULE, slot, 0, 0], described.counter(value).ok_or(Unlike("RULE_COUNTERS"))?);
        }
        sum.add_pairs(predecessor, described)?;
        for (key, value) in &predecessor.losses {
            let number = word(key, 0).ok_or(Unlike("LOSSES"))?;
            let count = value.chunks(8).try_fold(0u64, |sum, one| Some(sum.wrapping_add(long(one, 0)?)));
            let count = count.ok_or(Unlike("LOSSES"))?;
            let name = described.losses.get(number as usize);
            let own = ebpf_common::counter::LOSS_NAMES.iter().position(|own| Some(*own) == name.map(String::as_str));
            if let Some(own) = own {
                sum.count([LOSS, own as u32, 0, 0], [count, 0, 0]);
            }
        }
        sum.add_inherited(&predecessor.inherited, described);
        sum.0.insert([VERSION, predecessor.version, 0, 0], [0; 3]);
        *self = sum;
        Ok(())
    }

    fn add_reasons(&mut self, predecessor: &PredecessorCounts, described: &Description) -> Result<(), Unlike> {
        let count = described.reasons.len() as u32;
        for (key, value) in &predecessor.reasons {
            let index = word(key, 0).ok_or(Unlike("REASON_COUNTERS"))?;
            let value = described.counter(value).ok_or(Unlike("REASON_COUNTERS"))?;
            if index >= DIRECTIONS * count {
                return Err(Unlike("REASON_COUNTERS"));
            }
            if let Some(reason) = described.reason(index % count) {
                self.count([REASON, index / count, reason, 0], value);
            }
        }
        Ok(())
    }

    fn add_pairs(&mut self, predecessor: &PredecessorCounts, described: &Description) -> Result<(), Unlike> {
        let Some(slot) = described.slot else {
            let unlike = Unlike("PAIR_COUNTERS");
            return predecessor.pairs.iter().try_for_each(|(key, value)| {
                described.counter(value).and_then(|value| self.add_pair(key, value, described)).ok_or(unlike)
            });
        };
        let unlike = Unlike("PAIR_TABLE");
        for (_, buckets) in &predecessor.slots {
            if !buckets.len().is_multiple_of(slot.size) {
                return Err(unlike);
            }
            for bytes in buckets.chunks(slot.size) {
                if slot.taken.iter().all(|at| bytes[*at] != 0) {
                    let key = &bytes[slot.key..][..described.pair.size];
                    let value = described.one_counter(&bytes[slot.counter..]);
                    value.and_then(|value| self.add_pair(key, value, described)).ok_or(unlike)?;
                }
            }
        }
        Ok(())
    }

    fn add_pair(&mut self, key: &[u8], value: Value, described: &Description) -> Option<()> {
        let layout = described.pair;
        let (source, destination) = (word(key, layout.source)?, word(key, layout.destination)?);
        let (direction, number) = (*key.get(layout.direction)?, *key.get(layout.reason)?);
        if key.len() != layout.size {
            return None;
        }
        if let Some(reason) = described.reason(number.into()) {
            self.count([PAIR, source, destination, pair_rest(direction.into(), reason)], value);
        }
        Some(())
    }

    fn add_inherited(&mut self, inherited: &Self, described: &Description) {
        let loss = |number: u32| {
            let name = described.losses.get(number as usize)?;
            ebpf_common::counter::LOSS_NAMES.iter().position(|own| own == name)
        };
        for (key, value) in inherited.entries() {
            let key = match key {
                [REASON, direction, number, _] => described.reason(number).map(|own| [REASON, direction, own, 0]),
                [PAIR, source, destination, rest] => {
                    described.reason(rest & 0xff).map(|own| [PAIR, source, destination, pair_rest(rest >> 8, own)])
                }
                [LOSS, number, ..] => loss(number).map(|own| [LOSS, own as u32, 0, 0]),
                [RULE, ..] | [VERSION, ..] => Some(key),
                _ => None,
            };
            if let Some(key) = key {
                self.count(key, value);
            }
        }
    }

    fn count(&mut self, key: Key, value: Value) {
        if value == [0; 3] && key[0] != VERSION {
            return;
        }
        let sum = self.0.entry(key).or_default();
        *sum = [0, 1, 2].map(|at| sum[at].wrapping_add(value[at]));
    }

    fn get(&self, key: Key) -> Counter {
        let [packets, bytes, segments] = self.0.get(&key).copied().unwrap_or_default();
        Counter { packets, bytes, segments }
    }

    pub(crate) fn reason(&self, direction: u32, reason: u8) -> Counter {
        self.get([REASON, direction, reason.into(), 0])
    }

    pub(crate) fn rule(&self, slot: u32) -> Counter {
        self.get([RULE, slot, 0, 0])
    }

    pub(crate) fn loss(&self, number: u32) -> u64 {
        self.get([LOSS, number, 0, 0]).packets
    }

    pub(crate) fn pairs(&self) -> impl Iterator<Item = (PairKey, Counter)> {
        self.0.range([PAIR, 0, 0, 0]..[PAIR + 1, 0, 0, 0]).map(|(key, [packets, bytes, segments])| {
            let [_, source, destination, rest] = *key;
            let (direction, reason) = ((rest >> 8) as u8, rest as u8);
            let key = PairKey { source, destination, direction, reason, _pad: [0; 2] };
            (key, Counter { packets: *packets, bytes: *bytes, segments: *segments })
        })
    }

    /// Forgets the counts of these rule slots; returns the keys that are gone.
    pub(crate) fn reset_rules(&mut self, slots: &[u32]) -> Vec<Key> {
        let keys = slots.iter().map(|slot| [RULE, *slot, 0, 0]);
        keys.filter(|key| self.0.remove(key).is_some()).collect()
    }
}

fn pair_rest(direction: u32, reason: u32) -> u32 {
    direction << 8 | reason
}

impl Description {
    /// A counter of all CPUs; the kernel rounds each CPU's up to 8 bytes.
    fn counter(&self, values: &[u8]) -> Option<Value> {
        let layout = self.counter;
        let stride = layout.size.next_multiple_of(8);
        if values.is_empty() || !values.len().is_multiple_of(stride) {
            return None;
        }
        values.chunks(stride).try_fold([0u64; 3], |sum, one| {
            let one = self.one_counter(one)?;
            Some([0, 1, 2].map(|at| one[at].wrapping_add(sum[at])))
        })
    }

    fn one_counter(&self, bytes: &[u8]) -> Option<Value> {
        let layout = self.counter;
        let packets = long(bytes, layout.packets)?;
        // A packet is a segment at least.
        let segments = layout.segments.map_or(Some(packets), |at| long(bytes, at))?;
        Some([packets, long(bytes, layout.bytes)?, segments])
    }

    /// This build's number of a reason; `None`: it has none of that name.
    fn reason(&self, number: u32) -> Option<u32> {
        let name = self.reasons.get(number as usize)?;
        reason::ALL.iter().find(|(_, own, _)| own == name).map(|(own, ..)| u32::from(*own))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::datapath::upgrade::description::{CounterLayout, PairLayout, SlotLayout};
    use ebpf_common::{EGRESS, INGRESS};

    /// Of an older kind: bytes first, no segments, 20 bytes that the kernel rounds up, reasons in another order.
    fn older() -> Description {
        Description {
            reasons: ["no-rule", "whim", "rule"].map(str::to_owned).to_vec(),
            losses: ["flow", "luck"].map(str::to_owned).to_vec(),
            counter: CounterLayout { size: 20, packets: 8, bytes: 0, segments: None },
            pair: PairLayout { size: 16, source: 8, destination: 12, direction: 1, reason: 0 },
            slot: None,
            flow: 1,
        }
    }

    /// On two CPUs.
    fn counter(packets: [u64; 2]) -> Vec<u8> {
        packets.iter().flat_map(|packets| [packets * 100, *packets, u64::MAX].map(u64::to_ne_bytes).concat()).collect()
    }

    fn index(number: u32) -> Vec<u8> {
        number.to_ne_bytes().to_vec()
    }

    fn predecessor() -> PredecessorCounts {
        let pair = [&[2, INGRESS as u8, 0, 0, 0, 0, 0, 0][..], &3u32.to_ne_bytes(), &4u32.to_ne_bytes()].concat();
        PredecessorCounts {
            version: 1,
            // By direction, then reason: egress no-rule, egress whim, ingress rule.
            reasons: vec![(index(0), counter([1, 2])), (index(1), counter([9, 9])), (index(5), counter([3, 4]))],
            rules: vec![(index(7), counter([0, 5])), (index(8), counter([0, 0]))],
            pairs: vec![(pair, counter([6, 0]))],
            slots: Vec::new(),
            losses: vec![
                (index(0), [1u64, 2].map(u64::to_ne_bytes).concat()),
                (index(1), [5u64, 5].map(u64::to_ne_bytes).concat()),
            ],
            inherited: Inherited::default(),
        }
    }

    fn counted(packets: u64) -> Counter {
        Counter { packets, bytes: packets * 100, segments: packets }
    }

    #[test]
    fn counts_of_an_older_layout_are_understood_by_name() {
        let mut inherited = Inherited::default();
        inherited.add(&predecessor(), &older()).unwrap();
        assert_eq!(inherited.reason(EGRESS, reason::NO_RULE), counted(3));
        assert_eq!(inherited.reason(INGRESS, reason::RULE), counted(7));
        assert_eq!(inherited.reason(INGRESS, reason::NO_RULE), counted(0));
        assert_eq!((inherited.rule(7), inherited.rule(8)), (counted(5), counted(0)));
        let key = PairKey { source: 3, destination: 4, direction: INGRESS as u8, reason: reason::RULE, _pad: [0; 2] };
        assert_eq!(inherited.pairs().collect::<Vec<_>>(), [(key, counted(6))]);
        assert_eq!(inherited.loss(ebpf_common::counter::LOSS_FLOW), 3);
        assert!(inherited.has(1) && !inherited.has(2));
        let reasons = inherited.entries().filter(|(key, _)| key[0] == REASON).count();
        assert_eq!(reasons, 2, "a reason that is no more is nobody's");
    }

    /// A mark, 4 bytes of nothing, the key, the counter, another mark.
    fn in_slots() -> Description {
        let slot = SlotLayout { size: 48, key: 8, taken: [0, 47], counter: 24 };
        Description { slot: Some(slot), ..older() }
    }

    fn slot(taken: [u8; 2], destination: u32, packets: u64) -> Vec<u8> {
        let key = [&[2, EGRESS as u8, 0, 0, 0, 0, 0, 0][..], &3u32.to_ne_bytes(), &destination.to_ne_bytes()].concat();
        let counter = [packets * 100, packets].map(u64::to_ne_bytes).concat();
        [&[taken[0], 0, 0, 0, 0, 0, 0, 0][..], &key, &counter, &[0; 7], &[taken[1]]].concat()
    }

    #[test]
    fn pairs_in_slots_are_added_up_by_key_and_half_written_ones_left_out() {
        // Each bucket: two slots of one CPU, then two of another.
        let buckets = [
            [slot([1, 1], 4, 5), slot([0, 0], 0, 0), slot([1, 1], 5, 6), slot([1, 1], 4, 7)].concat(),
            [slot([1, 0], 8, 1), slot([0, 1], 9, 1), slot([0, 0], 0, 1), slot([1, 1], 4, 100)].concat(),
        ];
        let slots = buckets.into_iter().zip(0..).map(|(bucket, number)| (index(number), bucket)).collect();
        let predecessor = PredecessorCounts { slots, pairs: Vec::new(), ..predecessor() };
        let mut inherited = Inherited::default();
        inherited.add(&predecessor, &in_slots()).unwrap();
        let key = |destination| PairKey {
            source: 3,
            destination,
            direction: EGRESS as u8,
            reason: reason::RULE,
            _pad: [0; 2],
        };
        assert_eq!(inherited.pairs().collect::<Vec<_>>(), [(key(4), counted(112)), (key(5), counted(6))]);
        let mut torn = predecessor;
        torn.slots[1].1.truncate(95);
        let mut inherited = Inherited::default();
        assert_eq!(inherited.add(&torn, &in_slots()), Err(Unlike("PAIR_TABLE")));
        assert_eq!(inherited, Inherited::default());
    }

    #[test]
    fn what_was_inherited_before_is_passed_on_and_sums_up() {
        let mut first = Inherited::default();
        first.add(&predecessor(), &older()).unwrap();
        // The next version has this build's own numbers.
        let mut second = Inherited::default();
        let next = PredecessorCounts { version: 5, inherited: first, ..PredecessorCounts::default() };
        second.add(&next, &Description::own()).unwrap();
        assert_eq!(second.reason(INGRESS, reason::RULE), counted(7));
        assert_eq!(second.pairs().count(), 1);
        assert!(second.has(1) && second.has(5));
        let again = PredecessorCounts { version: 6, ..predecessor() };
        second.add(&again, &older()).unwrap();
        assert_eq!((second.reason(INGRESS, reason::RULE), second.rule(7)), (counted(14), counted(10)));
        assert_eq!(second.reset_rules(&[7, 8]).len(), 1);
        assert_eq!(second.rule(7), counted(0));
    }

    #[test]
    fn maps_unlike_their_description_change_nothing() {
        type Spoil = fn(&mut PredecessorCounts);
        let wrong: [(&str, Spoil); 5] = [
            ("REASON_COUNTERS", |predecessor| predecessor.reasons[0].0 = index(6)),
            ("REASON_COUNTERS", |predecessor| predecessor.reasons[0].1.truncate(7)),
            ("RULE_COUNTERS", |predecessor| predecessor.rules[0].1.clear()),
            ("PAIR_COUNTERS", |predecessor| predecessor.pairs[0].0.truncate(7)),
            ("LOSSES", |predecessor| predecessor.losses[0].1.truncate(7)),
        ];
        for (map, change) in wrong {
            let mut predecessor = predecessor();
            change(&mut predecessor);
            let mut inherited = Inherited::default();
            assert_eq!(inherited.add(&predecessor, &older()), Err(Unlike(map)));
            assert_eq!(inherited, Inherited::default());
        }
    }
}
