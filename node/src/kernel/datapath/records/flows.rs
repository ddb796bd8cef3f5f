//! Records of flows, from userspace: listed, collected when idle, forgotten when an address changes hands.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData, MapError};
use ebpf_common::flow::{Flow, FlowKey, idle_timeout_ns};
use ebpf_common::fragment::{Fragment, FragmentKey};
use ebpf_common::map;
use ipnet::IpNet;

use crate::kernel::KernelError;
use crate::kernel::datapath::records::filter::{Cleared, Filter};
use crate::kernel::datapath::records::fragments::Fragments;
use crate::kernel::datapath::records::quota::Quota;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::open;

/// Insert, never replace.
const BPF_NOEXIST: u64 = 1;

/// The pinned records.
pub(crate) struct Flows {
    map: MapData,
    records: HashMap<MapData, FlowKey, Flow>,
    filter: Filter,
    /// Whether the filter may have bits of records that are gone.
    stale: bool,
    quota: Quota,
    fragments: Fragments,
}

impl Flows {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let records = HashMap::try_from(Map::HashMap(open(folder, map::FLOWS)?))
            .map_err(|error| KernelError::with("`FLOWS` is no hash map", error))?;
        Ok(Self {
            map: open(folder, map::FLOWS)?,
            records,
            filter: Filter::open(folder)?,
            stale: true,
            quota: Quota::open(folder)?,
            fragments: Fragments::open(folder)?,
        })
    }

    /// Of maps that were just made.
    pub(crate) fn begin(&mut self) {
        self.filter.begin();
    }

    pub(crate) fn list(&self) -> Result<Vec<(FlowKey, Flow)>, KernelError> {
        sys::read_hash(self.map.fd().as_fd())
            .map_err(|error| KernelError::with("failed to read the records of flows", error))
    }

    /// The records of datagrams in fragments.
    pub(crate) fn list_fragments(&self) -> Result<Vec<(FragmentKey, Fragment)>, KernelError> {
        self.fragments.list()
    }

    /// Deletes records that are idle at `now` (nanoseconds, monotonic clock), and settles whose the others are and what is
    /// in none.
    pub(crate) fn collect(&mut self, now: u64) -> Result<usize, KernelError> {
        let removed = self.remove(|key, flow| is_idle(key, flow, now))?;
        let cleared = self.clear_filter()?;
        let opened = self.quota.read()?;
        let records = self.list()?;
        if let Some(cleared) = cleared {
            self.filter.fill(cleared, &records);
            self.stale = false;
        } else if !self.filter.covers(&records) {
            // Answers were dropped that belong to recorded flows.
            tracing::warn!(
                "`FLOW_FILTER` is not what the programs wrote: somebody else writes to it; no more believed"
            );
            self.filter.distrust();
        }
        self.quota.settle(&opened, &records)?;
        self.fragments.collect(now)?;
        Ok(removed)
    }

    /// Makes ready to fill the filter anew if bits in it are nobody's, or it is not in force.
    fn clear_filter(&mut self) -> Result<Option<Cleared>, KernelError> {
        if !self.stale && self.filter.in_force().is_some() {
            return Ok(None);
        }
        self.filter.clear().map(Some)
    }

    /// Deletes records with an end in one of these prefixes.
    pub(crate) fn forget(&mut self, addresses: &[IpNet]) -> Result<usize, KernelError> {
        let inside = |address| {
            let address = IpAddr::from(address);
            addresses.iter().any(|net| net.contains(&address))
        };
        self.remove(|key, _| inside(key.source) || inside(key.destination))
    }

    pub(crate) fn clear(&mut self) -> Result<usize, KernelError> {
        let removed = self.remove(|_, _| true)?;
        self.quota.clear()?;
        self.fragments.clear()?;
        if self.filter.in_force().is_none() {
            let cleared = self.filter.clear()?;
            self.filter.fill(cleared, &self.list()?);
            self.stale = false;
        }
        Ok(removed)
    }

    /// Takes records over that were kept elsewhere, unless there is one of the flow. In no generation yet: whichever packet
    /// comes first has them judged. Once programs run, nobody is charged for them.
    pub(crate) fn adopt(&mut self, records: Vec<(FlowKey, Flow)>, before_programs: bool) -> Result<(), KernelError> {
        let mut adopted = Vec::new();
        for (key, flow) in records {
            self.filter.note(&key);
            match self.records.insert(key, Flow { generation: 0, ..flow }, BPF_NOEXIST) {
                Ok(()) => adopted.push((key, flow)),
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(error) => return Err(KernelError::with("failed to take over a record of a flow", error)),
            }
        }
        if before_programs { self.quota.add(&adopted) } else { Ok(()) }
    }

    fn remove(&mut self, wanted: impl Fn(&FlowKey, &Flow) -> bool) -> Result<usize, KernelError> {
        let mut removed = 0;
        for (key, _) in self.list()?.into_iter().filter(|(key, flow)| wanted(key, flow)) {
            // A packet may have come since the list was read.
            let still = match self.records.get(&key, 0) {
                Ok(flow) => wanted(&key, &flow),
                Err(MapError::KeyNotFound) => false,
                Err(error) => return Err(KernelError::with("failed to read a record of a flow", error)),
            };
            if still && self.records.remove(&key).is_ok() {
                self.stale = true;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

fn is_idle(key: &FlowKey, flow: &Flow, now: u64) -> bool {
    // The programs' clock may be a little ahead of `now`.
    now.saturating_sub(flow.seen) > idle_timeout_ns(key.protocol, flow.state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebpf_common::flow::{STATE_ESTABLISHED, STATE_OPENING, timeout};

    #[test]
    fn a_record_is_idle_after_its_time_out_and_never_before_it_was_seen() {
        let second = 1_000_000_000;
        let udp = FlowKey { protocol: 17, ..FlowKey::default() };
        let flow = |state| Flow { seen: 100 * second, state, ..Flow::default() };
        for (state, seconds) in [(STATE_OPENING, timeout::UDP_OPENING), (STATE_ESTABLISHED, timeout::UDP_ESTABLISHED)] {
            assert!(!is_idle(&udp, &flow(state), (100 + seconds) * second));
            assert!(is_idle(&udp, &flow(state), (100 + seconds) * second + 1));
        }
        assert!(!is_idle(&udp, &flow(STATE_OPENING), 99 * second));
    }
}
