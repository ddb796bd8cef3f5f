//! Records of flows, from userspace: listed, collected when idle, forgotten when an address changes hands.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData, MapError};
use ebpf_common::flow::{Flow, FlowKey, idle_timeout_ns};
use ebpf_common::fragment::{Fragment, FragmentKey};
use ebpf_common::map;
use ipnet::IpNet;

use super::fragments::Fragments;
use super::shares::Shares;
use super::{map::open, sys};
use crate::kernel::KernelError;

/// Insert, never replace.
const BPF_NOEXIST: u64 = 1;

/// The pinned records.
pub(super) struct Flows {
    map: MapData,
    records: HashMap<MapData, FlowKey, Flow>,
    shares: Shares,
    fragments: Fragments,
}

impl Flows {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        let records = HashMap::try_from(Map::HashMap(open(folder, map::FLOWS)?))
            .map_err(|error| KernelError::with("`FLOWS` is no hash map", error))?;
        Ok(Self {
            map: open(folder, map::FLOWS)?,
            records,
            shares: Shares::open(folder)?,
            fragments: Fragments::open(folder)?,
        })
    }

    pub(super) fn list(&self) -> Result<Vec<(FlowKey, Flow)>, KernelError> {
        sys::read_hash(self.map.fd().as_fd())
            .map_err(|error| KernelError::with("failed to read the records of flows", error))
    }

    /// The records of datagrams in fragments.
    pub(super) fn list_fragments(&self) -> Result<Vec<(FragmentKey, Fragment)>, KernelError> {
        self.fragments.list()
    }

    /// Deletes records that are idle at `now` (nanoseconds, monotonic clock), and settles whose the others are.
    pub(super) fn collect(&mut self, now: u64) -> Result<usize, KernelError> {
        let opened = self.shares.read()?;
        let removed = self.remove(|key, flow| is_idle(key, flow, now))?;
        self.shares.settle(&opened, &self.list()?)?;
        self.fragments.collect(now)?;
        Ok(removed)
    }

    /// Deletes records with an end in one of these prefixes.
    pub(super) fn forget(&mut self, addresses: &[IpNet]) -> Result<usize, KernelError> {
        let inside = |address| {
            let address = IpAddr::from(address);
            addresses.iter().any(|net| net.contains(&address))
        };
        self.remove(|key, _| inside(key.source) || inside(key.destination))
    }

    pub(super) fn clear(&mut self) -> Result<usize, KernelError> {
        let removed = self.remove(|_, _| true)?;
        self.shares.clear()?;
        self.fragments.clear()?;
        Ok(removed)
    }

    /// Takes records over that were kept elsewhere, unless there is one of the flow. In no generation yet: whichever packet
    /// comes first has them judged. Once programs run, nobody is charged for them.
    pub(super) fn adopt(&mut self, records: Vec<(FlowKey, Flow)>, before_programs: bool) -> Result<(), KernelError> {
        let mut adopted = Vec::new();
        for (key, flow) in records {
            match self.records.insert(key, Flow { generation: 0, ..flow }, BPF_NOEXIST) {
                Ok(()) => adopted.push((key, flow)),
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(error) => return Err(KernelError::with("failed to take over a record of a flow", error)),
            }
        }
        if before_programs { self.shares.add(&adopted) } else { Ok(()) }
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
