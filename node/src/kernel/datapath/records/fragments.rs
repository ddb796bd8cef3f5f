//! Records of datagrams in fragments, from userspace: those that count no more are deleted.

use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData, MapError};
use ebpf_common::fragment::{Fragment, FragmentKey, LIFETIME_NS};
use ebpf_common::map;

use crate::kernel::KernelError;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::open;

/// The pinned records.
pub(crate) struct Fragments {
    map: MapData,
    records: HashMap<MapData, FragmentKey, Fragment>,
}

impl Fragments {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let records = HashMap::try_from(Map::HashMap(open(folder, map::FRAGMENTS)?))
            .map_err(|error| KernelError::with("`FRAGMENTS` is no hash map", error))?;
        Ok(Self { map: open(folder, map::FRAGMENTS)?, records })
    }

    pub(crate) fn list(&self) -> Result<Vec<(FragmentKey, Fragment)>, KernelError> {
        sys::read_hash(self.map.fd().as_fd())
            .map_err(|error| KernelError::with("failed to read the records of fragments", error))
    }

    /// Deletes records that are too old at `now` (nanoseconds, monotonic clock).
    pub(crate) fn collect(&mut self, now: u64) -> Result<(), KernelError> {
        // The programs' clock may be a little ahead of `now`.
        self.remove(|fragment| now.saturating_sub(fragment.seen) > LIFETIME_NS)
    }

    pub(crate) fn clear(&mut self) -> Result<(), KernelError> {
        self.remove(|_| true)
    }

    /// A datagram that takes the place of one that is deleted loses its record: its other fragments are dropped, as if they
    /// had come before the first.
    fn remove(&mut self, wanted: impl Fn(&Fragment) -> bool) -> Result<(), KernelError> {
        for (key, _) in self.list()?.into_iter().filter(|(_, fragment)| wanted(fragment)) {
            let still = match self.records.get(&key, 0) {
                Ok(fragment) => wanted(&fragment),
                Err(MapError::KeyNotFound) => false,
                Err(error) => return Err(KernelError::with("failed to read a record of a fragment", error)),
            };
            if still {
                let _gone_already = self.records.remove(&key);
            }
        }
        Ok(())
    }
}
