//! What else can be read of the datapath, for those who ask: counters, tables, a probe's answer.

use std::collections::BTreeMap;

use ebpf_common::counter::{Counter, PairKey};
use ebpf_common::flow::{Flow as Record, FlowKey};
use policy::Flow;

use super::{Datapath, KernelError, Program};
use crate::lower::Tables;

/// Reads that change nothing of what is enforced.
pub trait Inspect: Datapath {
    /// Of the rules, those that count in these slots.
    fn counters(&mut self, slots: &[u32]) -> Result<Counters, KernelError>;
    /// The copy of the tables in force.
    fn read_tables(&mut self) -> Result<Tables, KernelError>;
    /// What the live tables say of a flow's first packet in `ebpf_common::EGRESS` or `INGRESS`; counts and records
    /// nothing.
    fn probe(&mut self, flow: &Flow, direction: u32) -> Result<Probed, KernelError>;
    /// Records of flows at this moment.
    fn flow_records(&mut self) -> Result<usize, KernelError>;
    /// Those records, in no order.
    fn list_flows(&mut self) -> Result<Vec<(FlowKey, Record)>, KernelError>;
    /// Every program on the interface, by place and in the order in which they run.
    fn programs(&mut self) -> Result<Vec<Program>, KernelError>;
    /// Sets the counters of these rule slots to zero.
    fn reset_rules(&mut self, slots: &[u32]) -> Result<(), KernelError>;
}

/// Everything that was counted, all CPUs together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By direction (`ebpf_common::EGRESS`, `INGRESS`) and `ebpf_common::reason`; those at zero may be absent.
    pub reasons: BTreeMap<(u32, u8), Counter>,
    /// By rule slot; those at zero may be absent.
    pub rules: BTreeMap<u32, Counter>,
    pub pairs: BTreeMap<PairKey, Counter>,
    /// By `ebpf_common::counter::LOSS_*`.
    pub losses: Vec<u64>,
}

/// A probe's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probed {
    pub passes: bool,
    /// One of `ebpf_common::reason`.
    pub reason: u8,
    /// Counter slot of the deciding rule.
    pub rule: Option<u32>,
}
