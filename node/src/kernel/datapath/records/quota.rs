//! How many records each remote node has, so that none takes the room of the others (`ebpf_common::limit`). The programs
//! count what they open; here it is settled, now and then, how much of that is gone. Each number has one writer, and a
//! count that went wrong because two things happened at once is right again after the next settlement.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use ebpf_common::flow::{Flow, FlowKey, Remote, TOTAL_GONE, TOTAL_OPENED};
use ebpf_common::map;

use crate::kernel::KernelError;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::open;

/// The pinned counts.
pub(crate) struct Quota {
    opened: HashMap<MapData, Remote, u64>,
    opened_map: MapData,
    gone: HashMap<MapData, Remote, u64>,
    totals: Array<MapData, u64>,
}

/// What had been opened at some moment.
#[derive(Debug)]
pub(crate) struct Opened {
    total: u64,
    remotes: Vec<(Remote, u64)>,
}

impl Quota {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let hash = |name: &str| {
            HashMap::try_from(Map::HashMap(open(folder, name)?))
                .map_err(|error| KernelError::with(format!("`{name}` is no hash map"), error))
        };
        let totals = Array::try_from(Map::Array(open(folder, map::FLOW_TOTALS)?));
        Ok(Self {
            opened: hash(map::FLOWS_OPENED)?,
            opened_map: open(folder, map::FLOWS_OPENED)?,
            gone: hash(map::FLOWS_GONE)?,
            totals: totals.map_err(|error| KernelError::with("`FLOW_TOTALS` is no array", error))?,
        })
    }

    /// To be read before the records are, which are then the later ones: more may be counted as there than are, never fewer.
    pub(crate) fn read(&self) -> Result<Opened, KernelError> {
        let total = self.totals.get(&TOTAL_OPENED, 0).map_err(failed)?;
        let remotes = sys::read_hash(self.opened_map.fd().as_fd())
            .map_err(|error| KernelError::with("failed to read whose records were opened", error))?;
        Ok(Opened { total, remotes })
    }

    /// Says what of `opened` is gone, given the records that there are.
    pub(crate) fn settle(&mut self, opened: &Opened, records: &[(FlowKey, Flow)]) -> Result<(), KernelError> {
        let live = count(records);
        self.set_total(opened.total.saturating_sub(records.len() as u64))?;
        for (remote, opened) in &opened.remotes {
            match live.get(remote) {
                Some(live) => self.gone.insert(remote, opened.saturating_sub(*live), 0).map_err(failed)?,
                // Its place is for others.
                None => {
                    for map in [&mut self.opened, &mut self.gone] {
                        let _not_there = map.remove(remote);
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts records that no program made. Only while none runs: there would be two writers.
    pub(crate) fn add(&mut self, records: &[(FlowKey, Flow)]) -> Result<(), KernelError> {
        for (remote, count) in count(records) {
            let opened = match self.opened.get(&remote, 0) {
                Ok(opened) => opened,
                Err(MapError::KeyNotFound) => 0,
                Err(error) => return Err(failed(error)),
            };
            self.opened.insert(remote, opened + count, 0).map_err(failed)?;
        }
        let total = self.totals.get(&TOTAL_OPENED, 0).map_err(failed)?;
        self.totals.set(TOTAL_OPENED, total + records.len() as u64, 0).map_err(failed)
    }

    /// When there are no records at all.
    pub(crate) fn clear(&mut self) -> Result<(), KernelError> {
        let total = self.totals.get(&TOTAL_OPENED, 0).map_err(failed)?;
        self.set_total(total)
    }

    fn set_total(&mut self, gone: u64) -> Result<(), KernelError> {
        self.totals.set(TOTAL_GONE, gone, 0).map_err(failed)
    }
}

fn count(records: &[(FlowKey, Flow)]) -> BTreeMap<Remote, u64> {
    let mut live = BTreeMap::new();
    for (key, flow) in records {
        *live.entry(Remote::of(key, flow)).or_default() += 1;
    }
    live
}

fn failed(error: aya::maps::MapError) -> KernelError {
    KernelError::with("failed to settle how many records each node has", error)
}

#[cfg(test)]
mod tests {
    use ebpf_common::table::Address;
    use ebpf_common::{EGRESS, INGRESS};

    use super::*;

    #[test]
    fn records_belong_to_the_other_end_or_to_the_cidr_behind_a_gateway() {
        let (own, peer) = (Address::from_v4([10, 42, 1, 1]), Address::from_v4([10, 42, 2, 1]));
        let record = |direction: u32, behind| {
            let (source, destination) = if direction == EGRESS { (own, peer) } else { (peer, own) };
            let flow = Flow { direction: direction as u8, behind, ..Flow::default() };
            (FlowKey { source, destination, ..FlowKey::default() }, flow)
        };
        let live = count(&[record(EGRESS, 0), record(INGRESS, 0), record(EGRESS, 7)]);
        assert_eq!(live, BTreeMap::from([(Remote::new(peer, 0), 2), (Remote::new(own, 7), 1)]));
        assert_eq!(Remote::new(own, 7), Remote::new(peer, 7), "whichever address it is");
    }
}
