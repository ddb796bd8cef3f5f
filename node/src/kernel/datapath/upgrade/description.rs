//! What lies in the counters' maps, described so that another version of `noded` understands them: text beside the maps.

use aya::maps::{Array, Map, MapData};
use ebpf_common::counter::{Counter, LOSS_NAMES, PairSlot};
use ebpf_common::{flow, map, reason};
use serde::{Deserialize, Serialize};

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin::{self, Pins};
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::read_raw;

/// Bytes of the description; what JSON leaves is zero.
const SIZE: usize = 4_096;

/// How one version of the tables counts. Fields that a later version adds are not looked at.
///
/// What no version changes: REASON_COUNTERS is indexed by direction times the number of reasons, plus the reason;
/// RULE_COUNTERS by rule slot; LOSSES holds u64 by loss; each has one value for every possible CPU; CONTROL begins with
/// the u32 number of the copy in force, and each value of TABLES (of HEADER until version 3) with the u64 revision; CARRIED is as `inherited` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Description {
    /// Names by number.
    pub(crate) reasons: Vec<String>,
    pub(crate) losses: Vec<String>,
    pub(crate) counter: CounterLayout,
    pub(crate) pair: PairLayout,
    /// Pairs are in slots of the per-CPU array PAIR_TABLE; `None`: they are the keys of PAIR_COUNTERS.
    #[serde(default)]
    pub(crate) slot: Option<SlotLayout>,
    /// `flow::LAYOUT`.
    pub(crate) flow: u32,
}

/// Where in a counter its u64s are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct CounterLayout {
    pub(crate) size: usize,
    pub(crate) packets: usize,
    pub(crate) bytes: usize,
    /// `None`: not counted.
    pub(crate) segments: Option<usize>,
}

/// Where in the key of a pair's counter things are: two u32 ids of cidrs, a direction and a reason of a byte each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct PairLayout {
    pub(crate) size: usize,
    pub(crate) source: usize,
    pub(crate) destination: usize,
    pub(crate) direction: usize,
    pub(crate) reason: usize,
}

/// A slot: where in it the pair's key and counter are, and bytes that are all set once the key is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct SlotLayout {
    pub(crate) size: usize,
    pub(crate) key: usize,
    pub(crate) taken: [usize; 2],
    pub(crate) counter: usize,
}

impl Description {
    /// Of this build.
    pub(crate) fn own() -> Self {
        Self {
            reasons: reason::ALL.iter().map(|(_, name, _)| (*name).to_owned()).collect(),
            losses: LOSS_NAMES.map(str::to_owned).to_vec(),
            counter: CounterLayout {
                size: size_of::<Counter>(),
                packets: std::mem::offset_of!(Counter, packets),
                bytes: std::mem::offset_of!(Counter, bytes),
                segments: Some(std::mem::offset_of!(Counter, segments)),
            },
            // `PairKey::to_words`.
            pair: PairLayout { size: 16, source: 0, destination: 8, direction: 4, reason: 5 },
            slot: Some(SlotLayout {
                size: size_of::<PairSlot>(),
                key: std::mem::offset_of!(PairSlot, key),
                taken: [7, 15].map(|at| std::mem::offset_of!(PairSlot, key) + at),
                counter: std::mem::offset_of!(PairSlot, counter),
            }),
            flow: flow::LAYOUT,
        }
    }

    /// Of a version that did not describe itself.
    fn of_version(version: u32) -> Option<Self> {
        if version != 2 {
            return None;
        }
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Some(Self {
            reasons: names(&[
                "rule",
                "lineage",
                "reply",
                "icmp-error",
                "deny-rule",
                "no-rule",
                "unknown-source",
                "unknown-destination",
                "not-local",
                "scope",
                "malformed",
                "source-route",
                "fragment",
                "extension-header",
                "icmp-error-unrelated",
                "revoked",
                "no-policy",
                "corrupt-table",
            ]),
            losses: names(&["pair", "flow", "event-limited", "event-full"]),
            counter: CounterLayout { size: 24, packets: 0, bytes: 8, segments: Some(16) },
            pair: PairLayout { size: 12, source: 0, destination: 4, direction: 8, reason: 9 },
            slot: None,
            flow: 2,
        })
    }

    fn to_bytes(&self) -> Result<[u8; SIZE], KernelError> {
        let text = serde_json::to_vec(self).map_err(|error| KernelError::with("failed to describe the maps", error))?;
        let mut bytes = [0; SIZE];
        let place = bytes.get_mut(..text.len());
        place.ok_or_else(|| KernelError::new("the maps' description is too long: a bug"))?.copy_from_slice(&text);
        Ok(bytes)
    }

    /// `None`: it says nothing that this build understands.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let text = bytes.split(|byte| *byte == 0).next()?;
        serde_json::from_slice::<Self>(text).ok().filter(Self::is_sound)
    }

    /// Whether every field lies where it says.
    fn is_sound(&self) -> bool {
        let Self { counter, pair, slot, .. } = self;
        let inside = |at: usize, length: usize, size: usize| at.checked_add(length).is_some_and(|end| end <= size);
        counter.size <= 1_024
            && [Some(counter.packets), Some(counter.bytes), counter.segments]
                .iter()
                .flatten()
                .all(|at| inside(*at, 8, counter.size))
            && [pair.source, pair.destination].iter().all(|at| inside(*at, 4, pair.size))
            && [pair.direction, pair.reason].iter().all(|at| inside(*at, 1, pair.size))
            && slot.is_none_or(|slot| {
                (1..=1_024).contains(&slot.size)
                    && inside(slot.key, pair.size, slot.size)
                    && inside(slot.counter, counter.size, slot.size)
                    && slot.taken.iter().all(|at| inside(*at, 1, slot.size))
            })
            && self.reasons.len() <= 256
    }

    /// Puts this build's beside its maps.
    pub(crate) fn pin(pins: &Pins) -> Result<(), KernelError> {
        let own = Self::own();
        let path = pins.map(map::LAYOUT);
        if Self::read(pins)? == Some(own.clone()) && path.exists() {
            return Ok(());
        }
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            KernelError::with("failed to make the map `LAYOUT`, which describes the others", error)
        };
        let fd = sys::create_array(SIZE as u32, 1).map_err(|error| failed(error.into()))?;
        let data = MapData::from_fd(fd).map_err(|error| failed(error.into()))?;
        let array = Array::try_from(Map::Array(data));
        let mut array: Array<MapData, [u8; SIZE]> = array.map_err(|error| failed(error.into()))?;
        array.set(0, own.to_bytes()?, 0).map_err(|error| failed(error.into()))?;
        pin::replace(&path, |path| array.pin(path))
    }

    /// Of the maps that are pinned; `None`: it cannot be known.
    pub(crate) fn read(pins: &Pins) -> Result<Option<Self>, KernelError> {
        Ok(match read_raw(&pins.map(map::LAYOUT))? {
            Some(entries) => entries.first().and_then(|(_, bytes)| Self::from_bytes(bytes)),
            None => Self::of_version(pins.version),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebpf_common::counter::PairKey;

    #[test]
    fn a_description_comes_back_and_one_that_lies_is_none() {
        let own = Description::own();
        let slot = own.slot.unwrap();
        assert_eq!(Description::from_bytes(&own.to_bytes().unwrap()), Some(own.clone()));
        let mut longer = serde_json::to_value(&own).unwrap();
        longer["pipes"] = 7.into();
        assert_eq!(Description::from_bytes(longer.to_string().as_bytes()), Some(own.clone()), "more is no matter");
        for lie in [
            Description { counter: CounterLayout { bytes: 20, ..own.counter }, ..own.clone() },
            Description { counter: CounterLayout { packets: usize::MAX, ..own.counter }, ..own.clone() },
            Description { pair: PairLayout { source: 13, ..own.pair }, ..own.clone() },
            Description { pair: PairLayout { reason: 16, ..own.pair }, ..own.clone() },
            Description { slot: Some(SlotLayout { size: 0, ..slot }), ..own.clone() },
            Description { slot: Some(SlotLayout { key: usize::MAX, ..slot }), ..own.clone() },
            Description { slot: Some(SlotLayout { taken: [0, 40], ..slot }), ..own.clone() },
            Description { slot: Some(SlotLayout { counter: 17, ..slot }), ..own.clone() },
        ] {
            assert_eq!(Description::from_bytes(&lie.to_bytes().unwrap()), None, "{lie:?}");
        }
        assert_eq!(Description::from_bytes(b"gibberish"), None);
        assert_eq!(Description::from_bytes(&[]), None);
    }

    #[test]
    fn the_own_layout_is_that_of_the_programs() {
        let pair = PairKey { source: 0x0102_0304, destination: 0x0506_0708, direction: 9, reason: 10, _pad: [0; 2] };
        let counter = Counter { packets: 11, bytes: 12, segments: 13 };
        let words = [pair.to_words(), [counter.packets, counter.bytes]].concat();
        let slot: Vec<u8> = [words, vec![counter.segments]].concat().into_iter().flat_map(u64::to_ne_bytes).collect();
        let (own, layout) = (Description::own(), Description::own().slot.unwrap());
        assert_eq!(slot.len(), layout.size);
        let key = &slot[layout.key..][..own.pair.size];
        assert_eq!(key[own.pair.source..][..4], pair.source.to_ne_bytes());
        assert_eq!(key[own.pair.destination..][..4], pair.destination.to_ne_bytes());
        assert_eq!([key[own.pair.direction], key[own.pair.reason]], [9, 10]);
        assert!(layout.taken.iter().all(|at| slot[*at] != 0));
        assert_eq!(slot[layout.counter + own.counter.packets..][..8], 11u64.to_ne_bytes());
    }

    #[test]
    fn version_2_is_known_and_others_describe_themselves() {
        let known = Description::of_version(2).unwrap();
        assert!(known.is_sound());
        let own = Description::own();
        assert!(known.reasons.iter().all(|reason| own.reasons.contains(reason)), "none of its counts is lost");
        assert!(known.losses.iter().all(|loss| own.losses.contains(loss)));
        assert_eq!((Description::of_version(1), Description::of_version(9)), (None, None));
    }
}
