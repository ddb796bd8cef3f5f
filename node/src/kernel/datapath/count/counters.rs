//! Counters, added up over CPUs.

use std::collections::BTreeMap;
use std::path::Path;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues};
use aya::util::nr_cpus;
use ebpf_common::counter::{Counter, LOSSES, PairKey};
use ebpf_common::{DIRECTIONS, map, reason};

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin;
use crate::kernel::datapath::count::inherited::{Inherited, Key, PredecessorCounts, Value};
use crate::kernel::datapath::count::pairs::Pairs;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::open;
use crate::kernel::datapath::upgrade::description::Description;
use crate::kernel::inspect::Counters;

/// The pinned counters.
pub(crate) struct CounterMaps {
    reasons: PerCpuArray<MapData, Counter>,
    rules: PerCpuArray<MapData, Counter>,
    pairs: Pairs,
    losses: PerCpuArray<MapData, u64>,
    /// Of predecessors.
    inherited: Inherited,
}

impl CounterMaps {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            reasons: per_cpu(folder, map::REASON_COUNTERS)?,
            rules: per_cpu(folder, map::RULE_COUNTERS)?,
            pairs: Pairs::open(folder)?,
            losses: per_cpu(folder, map::LOSSES)?,
            inherited: read_inherited(folder)?,
        })
    }

    /// Adds what predecessors counted, once for each. The new sum takes the old one's place at once.
    pub(crate) fn inherit(
        &mut self,
        folder: &Path,
        predecessor: &PredecessorCounts,
        described: &Description,
    ) -> Result<(), KernelError> {
        if self.inherited.has(predecessor.version) {
            return Ok(());
        }
        let mut inherited = self.inherited.clone();
        inherited
            .add(predecessor, described)
            .map_err(|error| KernelError::with("the predecessor's counters make no sense", error))?;
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            KernelError::with("failed to make the map of what predecessors counted", error)
        };
        let entries = inherited.entries().count() as u32;
        let fd = sys::create_hash(size_of::<Key>() as u32, size_of::<Value>() as u32, entries)
            .map_err(|error| failed(error.into()))?;
        let data = MapData::from_fd(fd).map_err(|error| failed(error.into()))?;
        let sums = HashMap::try_from(Map::HashMap(data));
        let mut sums: HashMap<MapData, Key, Value> = sums.map_err(|error| failed(error.into()))?;
        for (key, value) in inherited.entries() {
            sums.insert(key, value, 0).map_err(|error| failed(error.into()))?;
        }
        pin::replace(&folder.join(map::INHERITED), |path| sums.pin(path))?;
        self.inherited = inherited;
        Ok(())
    }

    pub(crate) fn read(&self, slots: impl IntoIterator<Item = u32>) -> Result<Counters, KernelError> {
        let loss = |index| {
            let own: u64 = self.losses.get(&index, 0).map_err(failed)?.iter().sum();
            Ok(own.wrapping_add(self.inherited.loss(index)))
        };
        let of_rule = |slot| Ok((slot, self.rule(slot)?));
        Ok(Counters {
            reasons: self.reasons()?,
            rules: slots.into_iter().map(of_rule).collect::<Result<_, KernelError>>()?,
            pairs: self.pairs()?,
            losses: (0..LOSSES).map(loss).collect::<Result<_, KernelError>>()?,
        })
    }

    pub(crate) fn reasons(&self) -> Result<BTreeMap<(u32, u8), Counter>, KernelError> {
        let every =
            (0..DIRECTIONS).flat_map(|direction| reason::ALL.iter().map(move |(reason, ..)| (direction, *reason)));
        every
            .map(|(direction, reason)| {
                let index = direction * reason::COUNT + u32::from(reason);
                let own = sum(&self.reasons.get(&index, 0).map_err(failed)?);
                Ok(((direction, reason), plus(own, self.inherited.reason(direction, reason))))
            })
            .collect()
    }

    pub(crate) fn rule(&self, slot: u32) -> Result<Counter, KernelError> {
        Ok(plus(sum(&self.rules.get(&slot, 0).map_err(failed)?), self.inherited.rule(slot)))
    }

    fn pairs(&self) -> Result<BTreeMap<PairKey, Counter>, KernelError> {
        let mut pairs: BTreeMap<PairKey, Counter> = self.inherited.pairs().collect();
        self.pairs.add_to(&mut pairs)?;
        Ok(pairs)
    }

    /// Sets the counters of rule slots to zero.
    pub(crate) fn reset_rules(&mut self, folder: &Path, slots: &[u32]) -> Result<(), KernelError> {
        self.reset_inherited(folder, slots)?;
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

    fn reset_inherited(&mut self, folder: &Path, slots: &[u32]) -> Result<(), KernelError> {
        let gone = self.inherited.reset_rules(slots);
        if gone.is_empty() {
            return Ok(());
        }
        let mut sums = open_inherited(folder)?;
        for key in gone {
            match sums.remove(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(KernelError::with("failed to reset what a predecessor counted", error)),
            }
        }
        Ok(())
    }
}

/// What predecessors counted.
pub(crate) fn read_inherited(folder: &Path) -> Result<Inherited, KernelError> {
    let path = folder.join(map::INHERITED);
    if !path.exists() {
        return Ok(Inherited::default());
    }
    let sums = open_inherited(folder)?;
    let entries: Result<_, _> = sums.iter().collect();
    entries.map(Inherited::new).map_err(failed)
}

fn open_inherited(folder: &Path) -> Result<HashMap<MapData, Key, Value>, KernelError> {
    HashMap::try_from(Map::HashMap(open(folder, map::INHERITED)?))
        .map_err(|error| KernelError::with("`CARRIED` is no hash map of counts", error))
}

fn per_cpu<V: Pod>(folder: &Path, name: &str) -> Result<PerCpuArray<MapData, V>, KernelError> {
    PerCpuArray::try_from(Map::PerCpuArray(open(folder, name)?))
        .map_err(|error| KernelError::with(format!("`{name}` is no array for each CPU"), error))
}

pub(crate) fn sum(values: &PerCpuValues<Counter>) -> Counter {
    values.iter().fold(Counter::default(), |sum, one| plus(sum, *one))
}

pub(crate) fn plus(a: Counter, b: Counter) -> Counter {
    Counter {
        packets: a.packets.wrapping_add(b.packets),
        bytes: a.bytes.wrapping_add(b.bytes),
        segments: a.segments.wrapping_add(b.segments),
    }
}

fn failed(error: aya::maps::MapError) -> KernelError {
    KernelError::with("failed to read counters", error)
}
