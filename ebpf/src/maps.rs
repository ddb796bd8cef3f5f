//! The maps, the read-only globals and the counters. Names and sizes are the ABI of `ebpf-common`; userspace pins them.
#![allow(unsafe_code, reason = "symbols that the loader finds by name; map values are shared with other CPUs")]

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, PerCpuHashMap, RingBuf};
use ebpf_common::counter::{Counter, LOSS_PAIR, LOSSES as LOSS_COUNT, PairKey};
use ebpf_common::event::Bucket;
use ebpf_common::flow::{Flow, FlowKey, Remote, TOTALS};
use ebpf_common::fragment::{Fragment, FragmentKey};
use ebpf_common::table::{Control, TableCopy};
use ebpf_common::{COPIES, DIRECTIONS, limit, reason};

use crate::case::{Case, direction};

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
#[map]
pub static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(limit::FLOWS, 0);
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
pub static PAIR_COUNTERS: PerCpuHashMap<PairKey, Counter> = PerCpuHashMap::with_max_entries(limit::PAIRS, 0);
#[map]
pub static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(LOSS_COUNT, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(limit::EVENT_BYTES, 0);
#[map]
pub static EVENT_BUCKETS: Array<Bucket> = Array::with_max_entries(reason::COUNT, 0);

/// Counts a packet once for its direction and reason, its rule if one decided, and its pair of cidrs.
#[inline(always)]
pub fn count(case: &Case) {
    add(REASON_COUNTERS.get_ptr_mut(direction() * reason::COUNT + u32::from(case.reason)), case);
    if case.rule < limit::RULES {
        add(RULE_COUNTERS.get_ptr_mut(case.rule), case);
    }
    let key = PairKey {
        source: case.source_cidr,
        destination: case.destination_cidr,
        direction: direction() as u8,
        reason: case.reason,
        _pad: [0; 2],
    };
    if add(PAIR_COUNTERS.get_ptr_mut(key), case) {
        return;
    }
    let first = Counter { packets: 1, bytes: case.length.into(), segments: case.segments.into() };
    // Another CPU may have been first: then the entry is there, and ours of it is still zero.
    if PAIR_COUNTERS.insert(key, first, BPF_NOEXIST.into()).is_err() && !add(PAIR_COUNTERS.get_ptr_mut(key), case) {
        lose(LOSS_PAIR);
    }
}

/// Plain additions: the maps are per CPU, and the hooks run with bottom halves off.
#[inline(always)]
fn add(counter: Option<*mut Counter>, case: &Case) -> bool {
    let Some(counter) = counter else { return false };
    // SAFETY: the map's value, checked not to be null.
    unsafe {
        (*counter).packets += 1;
        (*counter).bytes += u64::from(case.length);
        (*counter).segments += u64::from(case.segments);
    }
    true
}

/// Counts something that there was no room for.
#[inline(always)]
pub(crate) fn lose(what: u32) {
    if let Some(count) = LOSSES.get_ptr_mut(what) {
        // SAFETY: the map's value, checked not to be null; per CPU as above.
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
