//! The maps, the read-only globals and the counters. Names and sizes are the ABI of `ebpf-common`; userspace pins them.
#![allow(unsafe_code, reason = "symbols that the loader finds by name; map values are shared with other CPUs")]

use aya_ebpf::Global;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use ebpf_common::counter::{Counter, LOSSES as LOSS_COUNT, PairKey};
use ebpf_common::event::Bucket;
use ebpf_common::flow::{Flow, FlowKey};
use ebpf_common::table::{Block, Control, Decision, Header, Leaf, Page, Ports};
use ebpf_common::{COPIES, DIRECTIONS, limit, reason};

#[unsafe(no_mangle)]
pub(crate) static LINK_HEADER: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static DIRECTION: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static TRACE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub(crate) static ALLOW: Global<i32> = Global::new(-1);

#[map]
pub(crate) static CONTROL: Array<Control> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static HEADER: Array<Header> = Array::with_max_entries(COPIES, 0);
#[map]
pub(crate) static BLOCKS: Array<Block> = Array::with_max_entries(COPIES * limit::BLOCKS, 0);
#[map]
pub(crate) static LEAVES: Array<Leaf> = Array::with_max_entries(COPIES * limit::LEAVES, 0);
#[map]
pub(crate) static MATRIX: Array<u32> = Array::with_max_entries(COPIES * limit::CELLS, 0);
#[map]
pub(crate) static PAGES: Array<Page> = Array::with_max_entries(COPIES * limit::PAGES, 0);
#[map]
pub(crate) static PORTS: Array<Ports> = Array::with_max_entries(COPIES * limit::PORTS, 0);
#[map]
pub(crate) static DECISIONS: Array<Decision> = Array::with_max_entries(COPIES * limit::DECISIONS, 0);
#[map]
pub(crate) static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(limit::FLOWS, 0);
#[map]
pub(crate) static REASON_COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(DIRECTIONS * reason::COUNT, 0);
#[map]
pub(crate) static RULE_COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(limit::RULES, 0);
#[map]
pub(crate) static PAIR_COUNTERS: PerCpuHashMap<PairKey, Counter> = PerCpuHashMap::with_max_entries(limit::PAIRS, 0);
#[map]
pub(crate) static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(LOSS_COUNT, 0);
#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(limit::EVENT_BYTES, 0);
#[map]
pub(crate) static EVENT_BUCKETS: Array<Bucket> = Array::with_max_entries(reason::COUNT, 0);
