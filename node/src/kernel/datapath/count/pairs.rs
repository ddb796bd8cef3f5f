//! Counters of pairs of cidrs: each CPU has a table of slots of its own, which are added up by what they are for.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::MapData;
use aya::util::nr_cpus;
use ebpf_common::counter::{Counter, PairKey, PairSlot};
use ebpf_common::map;

use crate::kernel::KernelError;
use crate::kernel::datapath::count::counters::plus;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::open;

/// The pinned table.
pub(crate) struct Pairs {
    table: MapData,
    /// Bytes of one bucket, of every CPU.
    bucket: usize,
}

impl Pairs {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let table = open(folder, map::PAIR_TABLE)?;
        let info = table.info().map_err(|error| KernelError::with("failed to ask for `PAIR_TABLE`", error))?;
        let cpus =
            nr_cpus().map_err(|(path, error)| KernelError::with(format!("failed to count CPUs in `{path}`"), error))?;
        let one = info.value_size() as usize;
        if one == 0 || !one.is_multiple_of(size_of::<PairSlot>()) {
            return Err(KernelError::new(format!(
                "`PAIR_TABLE` has buckets of {one} bytes, which hold no whole slots"
            )));
        }
        Ok(Self { table, bucket: one * cpus })
    }

    /// Adds what is counted.
    pub(crate) fn add_to(&self, pairs: &mut BTreeMap<PairKey, Counter>) -> Result<(), KernelError> {
        let visit = |_: &[u8], bucket: &[u8]| {
            for slot in bucket.chunks_exact(size_of::<PairSlot>()).filter_map(sys::from_bytes::<PairSlot>) {
                if let Some(key) = PairKey::from_words(slot.key) {
                    let pair = pairs.entry(key).or_default();
                    *pair = plus(*pair, slot.counter);
                }
            }
        };
        sys::visit_raw(self.table.fd().as_fd(), size_of::<u32>(), self.bucket, visit)
            .map_err(|error| KernelError::with("failed to read the counters of pairs", error))
    }
}
