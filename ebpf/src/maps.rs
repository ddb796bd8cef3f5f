//! The maps and the read-only globals. Names and sizes are the ABI of `ebpf-common`; userspace pins them.
#![allow(unsafe_code, reason = "symbols that the loader finds by name; map values are shared with other CPUs")]

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use ebpf_common::counter::{Counter, LOSSES as LOSS_COUNT, PairBucket};
use ebpf_common::event::{Bucket, Clock};
use ebpf_common::flow::{Flow, FlowFilter, Remote, TOTALS};
use ebpf_common::fragment::{Fragment, FragmentKey};
use ebpf_common::table::{Control, TableCopy};
use ebpf_common::{COPIES, DIRECTIONS, EGRESS, INGRESS, limit, reason};

#[unsafe(no_mangle)]
pub static LINK_HEADER: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static DIRECTION: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static TRACE: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static EVERY: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
pub static ALLOW: Global<i32> = Global::new(-1);

#[map]
pub static CONTROL: Array<Control> = Array::with_max_entries(1, 0);
#[map]
pub static TABLES: Array<TableCopy> = Array::with_max_entries(COPIES, BPF_F_MMAPABLE);
/// By `FlowKey::to_words`.
#[map]
pub static FLOWS: HashMap<[u64; 5], Flow> = HashMap::with_max_entries(limit::FLOWS, 0);
#[map]
pub static FLOW_FILTER: Array<FlowFilter> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
pub static FLOWS_OPENED: HashMap<Remote, u64> = HashMap::with_max_entries(limit::REMOTES, 0);
#[map]
pub static FLOWS_GONE: HashMap<Remote, u64> = HashMap::with_max_entries(limit::REMOTES, 0);
#[map]
pub static FLOW_TOTALS: Array<u64> = Array::with_max_entries(TOTALS, 0);
#[map]
pub static FRAGMENTS: HashMap<FragmentKey, Fragment> = HashMap::with_max_entries(limit::FRAGMENTS, 0);
#[map]
pub static REASON_COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(DIRECTIONS * reason::COUNT, 0);
#[map]
pub static RULE_COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(limit::RULES, 0);
#[map]
pub static PAIR_TABLE: PerCpuArray<PairBucket> = PerCpuArray::with_max_entries(limit::PAIR_BUCKETS, 0);
#[map]
pub static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(LOSS_COUNT, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(limit::EVENT_BYTES, 0);
#[map]
pub static EVENT_BUCKETS: Array<Bucket> = Array::with_max_entries(reason::COUNT, 0);
#[map]
pub static CLOCK: PerCpuArray<Clock> = PerCpuArray::with_max_entries(1, 0);

/// Counts something that there was no room for.
#[inline(always)]
pub(crate) fn lose(what: u32) {
    if let Some(count) = LOSSES.get_ptr_mut(what) {
        // SAFETY: the map's value, checked not to be null; per CPU, and the hooks run with bottom halves off.
        unsafe { *count += 1 };
    }
}

/// The active copy of the tables and its generation, which belong together: read at once.
#[inline(always)]
pub fn control() -> (u32, u32) {
    let Some(control) = CONTROL.get_ptr(0) else { return (0, 0) };
    // SAFETY: the map's value, checked not to be null; 8 bytes and aligned, as every value of an array map is.
    let word = unsafe { control.cast::<u64>().read_volatile() }.to_ne_bytes();
    let [a, b, c, d, e, f, g, h] = word;
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

/// `EGRESS` or `INGRESS`, whatever userspace wrote.
#[inline(always)]
pub fn direction() -> u32 {
    if DIRECTION.load() == EGRESS { EGRESS } else { INGRESS }
}
