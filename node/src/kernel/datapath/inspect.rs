//! Reads that change nothing of what is enforced.

use std::collections::BTreeSet;
use std::path::Path;

use ebpf_common::flow::{Flow as Record, FlowKey};
use ebpf_common::limit;
use policy::{Flow, Generation};

use crate::kernel::datapath::EbpfDatapath;
use crate::kernel::datapath::Running;
use crate::kernel::datapath::attach::pin::Pins;
use crate::kernel::datapath::events::Events;
use crate::kernel::datapath::packet::Packet;
use crate::kernel::datapath::probe::Probe;
use crate::kernel::datapath::tables::copies::Copies;
use crate::kernel::inspect::{Counters, Inspect, Probed};
use crate::kernel::{KernelError, Program};
use crate::lower::Tables;

/// Reads the pinned tables beside whoever owns them, and changes nothing.
pub struct TableReader(Copies);

impl std::fmt::Debug for TableReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TableReader").finish_non_exhaustive()
    }
}

impl TableReader {
    /// Of an interface in the network namespace of the calling thread.
    pub fn open(interface: &str, pin_root: &Path) -> Result<Self, KernelError> {
        Copies::open(&Pins::new(pin_root, interface)?.maps, false).map(Self)
    }

    /// The tables in force, whatever they say, with their generation. `None`: they were switched meanwhile.
    pub fn read(&self) -> Result<Option<(Generation, Tables)>, KernelError> {
        let (before, _) = self.0.in_force()?;
        let tables = self.0.read_as_it_is()?;
        let (after, _) = self.0.in_force()?;
        Ok((before == after).then_some((after, tables)))
    }
}

impl EbpfDatapath {
    /// The records of flows.
    pub fn flows(&mut self) -> Result<Vec<(FlowKey, Record)>, KernelError> {
        self.running()?.flows.list()
    }

    /// The one reader of the events.
    pub fn events(&mut self) -> Result<Events, KernelError> {
        Events::open_in(&self.running()?.pins.maps)
    }

    /// A new probe on the live tables.
    pub fn new_probe(&mut self) -> Result<Probe, KernelError> {
        Probe::load(&self.running()?.pins.maps, false)
    }

    /// Likewise for many packets: see [`Probe::report`].
    pub fn new_reporting_probe(&mut self) -> Result<Probe, KernelError> {
        Probe::load(&self.running()?.pins.maps, true)
    }

    /// Where the tables in force are not `intended`.
    pub fn differences(&mut self, intended: &Tables) -> Result<Vec<String>, KernelError> {
        Ok(intended.differences(&self.running()?.copies.read()?))
    }
}

impl Running {
    /// Slots that the tables in force count in; every slot where they were never written by this process.
    fn slots(&self) -> Result<BTreeSet<u32>, KernelError> {
        Ok(match self.copies.known()? {
            Some(tables) => tables.rule_slots.values().copied().collect(),
            None => (0..limit::RULES).collect(),
        })
    }
}

impl Inspect for EbpfDatapath {
    fn counters(&mut self, slots: &[u32]) -> Result<Counters, KernelError> {
        self.running()?.counters.read(slots.iter().copied())
    }

    fn read_tables(&mut self) -> Result<Tables, KernelError> {
        self.running()?.copies.read()
    }

    fn probe(&mut self, flow: &Flow, direction: u32) -> Result<Probed, KernelError> {
        let running = self.running()?;
        let slots = running.slots()?;
        let mut probe = match self.probe.take() {
            Some(probe) => probe,
            None => self.new_probe()?,
        };
        probe.forget()?;
        let probed = probe.judge(direction, &Packet::opening(flow).to_bytes(), slots)?;
        self.probe = Some(probe);
        Ok(probed)
    }

    fn flow_records(&mut self) -> Result<usize, KernelError> {
        Ok(self.flows()?.len())
    }

    fn list_flows(&mut self) -> Result<Vec<(FlowKey, Record)>, KernelError> {
        self.flows()
    }

    fn programs(&mut self) -> Result<Vec<Program>, KernelError> {
        self.list_programs()
    }

    fn reset_rules(&mut self, slots: &[u32]) -> Result<(), KernelError> {
        let running = self.running()?;
        running.counters.reset_rules(&running.pins.maps, slots)
    }
}
