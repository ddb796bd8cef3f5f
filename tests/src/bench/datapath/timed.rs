//! The datapath of a lab, that notes when a policy came into force.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ebpf_common::flow::{Flow as Record, FlowKey};
use ipnet::IpNet;
use node::kernel::datapath::EbpfDatapath;
use node::kernel::inspect::{Counters, Probed};
use node::kernel::{Datapath, DatapathState, Inspect, KernelError, Program};
use node::lower::Tables;
use policy::{Flow, Generation};

/// When the last switch was done.
#[derive(Clone, Debug, Default)]
pub(super) struct Switched(Arc<Mutex<Option<Instant>>>);

impl Switched {
    /// Since it was asked the last time.
    pub(super) fn take(&self) -> Option<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Does what the datapath does.
#[derive(Debug)]
pub(super) struct Timed {
    pub(super) datapath: EbpfDatapath,
    pub(super) switched: Switched,
}

impl Datapath for Timed {
    fn attach(&mut self) -> Result<(), KernelError> {
        self.datapath.attach()
    }

    fn observe(&mut self) -> Result<DatapathState, KernelError> {
        self.datapath.observe()
    }

    fn switch(&mut self, tables: &Tables) -> Result<Generation, KernelError> {
        let generation = self.datapath.switch(tables)?;
        *self.switched.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Ok(generation)
    }

    fn settle(&mut self) -> Result<(), KernelError> {
        self.datapath.settle()
    }

    fn forget_flows(&mut self, addresses: &[IpNet]) -> Result<usize, KernelError> {
        self.datapath.forget_flows(addresses)
    }

    fn collect_flows(&mut self) -> Result<usize, KernelError> {
        self.datapath.collect_flows()
    }

    fn detach(&mut self) -> Result<(), KernelError> {
        self.datapath.detach()
    }
}

impl Inspect for Timed {
    fn counters(&mut self, slots: &[u32]) -> Result<Counters, KernelError> {
        self.datapath.counters(slots)
    }

    fn read_tables(&mut self) -> Result<Tables, KernelError> {
        self.datapath.read_tables()
    }

    fn probe(&mut self, flow: &Flow, direction: u32) -> Result<Probed, KernelError> {
        self.datapath.probe(flow, direction)
    }

    fn flow_records(&mut self) -> Result<usize, KernelError> {
        self.datapath.flow_records()
    }

    fn list_flows(&mut self) -> Result<Vec<(FlowKey, Record)>, KernelError> {
        self.datapath.list_flows()
    }

    fn programs(&mut self) -> Result<Vec<Program>, KernelError> {
        self.datapath.programs()
    }

    fn reset_rules(&mut self, slots: &[u32]) -> Result<(), KernelError> {
        self.datapath.reset_rules(slots)
    }
}
