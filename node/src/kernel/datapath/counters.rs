//! Counters, added up over CPUs.

use std::collections::BTreeMap;
use std::path::Path;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use ebpf_common::counter::{Counter, LOSSES, PairKey};
use ebpf_common::{DIRECTIONS, map, reason};

use super::carried::{Carried, Former, Key, Value};
use super::description::Description;
use super::map::open;
use super::pairs::Pairs;
use super::{pin, sys};
use crate::kernel::KernelError;
use crate::kernel::inspect::Counters;

/// The pinned counters.
pub(super) struct CounterMaps {
    reasons: PerCpuArray<MapData, Counter>,
    rules: PerCpuArray<MapData, Counter>,
    pairs: Pairs,
    losses: PerCpuArray<MapData, u64>,
    /// Of former versions.
    carried: Carried,
}

impl CounterMaps {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            reasons: per_cpu(folder, map::REASON_COUNTERS)?,
            rules: per_cpu(folder, map::RULE_COUNTERS)?,
            pairs: Pairs::open(folder)?,
            losses: per_cpu(folder, map::LOSSES)?,
            carried: read_carried(folder)?,
        })
    }

    /// Adds what former versions counted, once for each. The new sum takes the old one's place at once.
    pub(super) fn carry(&mut self, folder: &Path, former: &Former, described: &Description) -> Result<(), KernelError> {
        if self.carried.has(former.version) {
            return Ok(());
        }
        let mut carried = self.carried.clone();
        carried
            .add(former, described)
            .map_err(|error| KernelError::with("the former counters make no sense", error))?;
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            KernelError::with("failed to make the map of what former versions counted", error)
        };
        let entries = carried.entries().count() as u32;
        let fd = sys::create_hash(size_of::<Key>() as u32, size_of::<Value>() as u32, entries)
            .map_err(|error| failed(error.into()))?;
        let data = MapData::from_fd(fd).map_err(|error| failed(error.into()))?;
        let sums = HashMap::try_from(Map::HashMap(data));
        let mut sums: HashMap<MapData, Key, Value> = sums.map_err(|error| failed(error.into()))?;
        for (key, value) in carried.entries() {
            sums.insert(key, value, 0).map_err(|error| failed(error.into()))?;
        }
        pin::replace(&folder.join(map::CARRIED), |path| sums.pin(path))?;
        self.carried = carried;
        Ok(())
    }

    pub(super) fn read(&self, slots: impl IntoIterator<Item = u32>) -> Result<Counters, KernelError> {
        let loss = |index| {
            let own: u64 = self.losses.get(&index, 0).map_err(failed)?.iter().sum();
            Ok(own.wrapping_add(self.carried.loss(index)))
        };
        let of_rule = |slot| Ok((slot, self.rule(slot)?));
        Ok(Counters {
            reasons: self.reasons()?,
            rules: slots.into_iter().map(of_rule).collect::<Result<_, KernelError>>()?,
            pairs: self.pairs()?,
            losses: (0..LOSSES).map(loss).collect::<Result<_, KernelError>>()?,
        })
    }

    pub(super) fn reasons(&self) -> Result<BTreeMap<(u32, u8), Counter>, KernelError> {
        let every =
            (0..DIRECTIONS).flat_map(|direction| reason::ALL.iter().map(move |(reason, ..)| (direction, *reason)));
        every
            .map(|(direction, reason)| {
                let index = direction * reason::COUNT + u32::from(reason);
                let own = sum(&self.reasons.get(&index, 0).map_err(failed)?);
                Ok(((direction, reason), plus(own, self.carried.reason(direction, reason))))
            })
            .collect()
    }

    pub(super) fn rule(&self, slot: u32) -> Result<Counter, KernelError> {
        Ok(plus(sum(&self.rules.get(&slot, 0).map_err(failed)?), self.carried.rule(slot)))
    }

    fn pairs(&self) -> Result<BTreeMap<PairKey, Counter>, KernelError> {
        let mut pairs: BTreeMap<PairKey, Counter> = self.carried.pairs().collect();
        self.pairs.add_to(&mut pairs)?;
        Ok(pairs)
    }

    /// Sets the counters of rule slots to zero.
    pub(super) fn reset_rules(&mut self, folder: &Path, slots: &[u32]) -> Result<(), KernelError> {
        self.reset_carried(folder, slots)?;
        let cpus =
            nr_cpus().map_err(|(path, error)| KernelError::with(format!("failed to count CPUs in `{path}`"), error))?;
        for slot in slots {
            let zero = PerCpuValues::try_from(vec![Counter::default(); cpus])
                .map_err(|error| KernelError::with("failed to make zero counters", error))?;
            self.rules.set(*slot, zero, 0).map_err(|error| {
                KernelError::with(format!("failed to reset the counter of rule slot {slot}"), error)
            })?;
        }
        Ok(())
    }

    fn reset_carried(&mut self, folder: &Path, slots: &[u32]) -> Result<(), KernelError> {
        let gone = self.carried.reset_rules(slots);
        if gone.is_empty() {
            return Ok(());
        }
        let mut sums = open_carried(folder)?;
        for key in gone {
            match sums.remove(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(KernelError::with("failed to reset what a former version counted", error)),
            }
        }
        Ok(())
    }
}

/// What former versions counted.
pub(super) fn read_carried(folder: &Path) -> Result<Carried, KernelError> {
    let path = folder.join(map::CARRIED);
    if !path.exists() {
        return Ok(Carried::default());
    }
    let sums = open_carried(folder)?;
    let entries: Result<_, _> = sums.iter().collect();
    entries.map(Carried::new).map_err(failed)
}

fn open_carried(folder: &Path) -> Result<HashMap<MapData, Key, Value>, KernelError> {
    HashMap::try_from(Map::HashMap(open(folder, map::CARRIED)?))
        .map_err(|error| KernelError::with("`CARRIED` is no hash map of counts", error))
}

fn per_cpu<V: Pod>(folder: &Path, name: &str) -> Result<PerCpuArray<MapData, V>, KernelError> {
    PerCpuArray::try_from(Map::PerCpuArray(open(folder, name)?))
        .map_err(|error| KernelError::with(format!("`{name}` is no array for each CPU"), error))
}

pub(super) fn sum(values: &PerCpuValues<Counter>) -> Counter {
    values.iter().fold(Counter::default(), |sum, one| plus(sum, *one))
}

pub(super) fn plus(a: Counter, b: Counter) -> Counter {
    Counter {
        packets: a.packets.wrapping_add(b.packets),
        bytes: a.bytes.wrapping_add(b.bytes),
        segments: a.segments.wrapping_add(b.segments),
    }
}

fn failed(error: aya::maps::MapError) -> KernelError {
    KernelError::with("failed to read counters", error)
}
