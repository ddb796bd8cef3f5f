//! Reads that change nothing of what is enforced.

use std::collections::BTreeSet;

use ebpf_common::flow::{Flow as Record, FlowKey};
use ebpf_common::limit;
use policy::Flow;

use super::events::Events;
use super::packet::Packet;
use super::probe::Probe;
use super::{EbpfDatapath, Running};
use crate::kernel::KernelError;
use crate::kernel::inspect::{Counters, Inspect, Probed};
use crate::lower::Tables;

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

    fn reset_rules(&mut self, slots: &[u32]) -> Result<(), KernelError> {
        self.running()?.counters.reset_rules(slots)
    }
}
