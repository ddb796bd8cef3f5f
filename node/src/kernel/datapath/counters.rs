//! Counters, added up over CPUs.

use std::collections::BTreeMap;
use std::path::Path;

use aya::Pod;
use aya::maps::{Map, MapData, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::util::nr_cpus;
use ebpf_common::counter::{Counter, LOSSES, PairKey};
use ebpf_common::{DIRECTIONS, map, reason};

use super::map::open;
use crate::kernel::KernelError;
use crate::kernel::inspect::Counters;

/// The pinned counters.
pub(super) struct CounterMaps {
    reasons: PerCpuArray<MapData, Counter>,
    rules: PerCpuArray<MapData, Counter>,
    pairs: PerCpuHashMap<MapData, PairKey, Counter>,
    losses: PerCpuArray<MapData, u64>,
}

impl CounterMaps {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        let pairs = PerCpuHashMap::try_from(Map::PerCpuHashMap(open(folder, map::PAIR_COUNTERS)?));
        Ok(Self {
            reasons: per_cpu(folder, map::REASON_COUNTERS)?,
            rules: per_cpu(folder, map::RULE_COUNTERS)?,
            pairs: pairs.map_err(|error| KernelError::with("`PAIR_COUNTERS` is no hash map", error))?,
            losses: per_cpu(folder, map::LOSSES)?,
        })
    }

    pub(super) fn read(&self, slots: impl IntoIterator<Item = u32>) -> Result<Counters, KernelError> {
        let loss = |index| Ok(self.losses.get(&index, 0).map_err(failed)?.iter().sum());
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
                Ok(((direction, reason), sum(&self.reasons.get(&index, 0).map_err(failed)?)))
            })
            .collect()
    }

    pub(super) fn rule(&self, slot: u32) -> Result<Counter, KernelError> {
        Ok(sum(&self.rules.get(&slot, 0).map_err(failed)?))
    }

    fn pairs(&self) -> Result<BTreeMap<PairKey, Counter>, KernelError> {
        self.pairs.iter().map(|entry| entry.map(|(key, values)| (key, sum(&values))).map_err(failed)).collect()
    }

    /// Sets the counters of rule slots to zero.
    pub(super) fn reset_rules(&mut self, slots: &[u32]) -> Result<(), KernelError> {
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
}

fn per_cpu<V: Pod>(folder: &Path, name: &str) -> Result<PerCpuArray<MapData, V>, KernelError> {
    PerCpuArray::try_from(Map::PerCpuArray(open(folder, name)?))
        .map_err(|error| KernelError::with(format!("`{name}` is no array for each CPU"), error))
}

pub(super) fn sum(values: &PerCpuValues<Counter>) -> Counter {
    values.iter().fold(Counter::default(), |sum, one| Counter {
        packets: sum.packets.wrapping_add(one.packets),
        bytes: sum.bytes.wrapping_add(one.bytes),
        segments: sum.segments.wrapping_add(one.segments),
    })
}

fn failed(error: aya::maps::MapError) -> KernelError {
    KernelError::with("failed to read counters", error)
}
