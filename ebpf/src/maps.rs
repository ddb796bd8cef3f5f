//! The maps, the read-only globals and the counters. Names and sizes are the ABI of `ebpf-common`; userspace pins them.
#![allow(unsafe_code, reason = "symbols that the loader finds by name; map values are shared with other CPUs")]

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use ebpf_common::counter::{
    Counter, LOSS_PAIR, LOSSES as LOSS_COUNT, PAIR_TRIES, PAIR_WAYS, PairBucket, PairKey, PairSlot, pair_bucket,
    pair_hash,
};
use ebpf_common::event::{Bucket, Clock};
use ebpf_common::flow::{Flow, FlowFilter, Remote, TOTALS};
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

/// Counts a packet once for its direction and reason, its rule if one decided, and its pair of cidrs.
#[inline(always)]
pub fn count(case: &Case) {
    let (length, segments) = (case.length, case.segments);
    if let Some(counter) = REASON_COUNTERS.get_ptr_mut(direction() * reason::COUNT + u32::from(case.reason)) {
        add(counter, length, segments);
    }
    if case.rule < limit::RULES
        && let Some(counter) = RULE_COUNTERS.get_ptr_mut(case.rule)
    {
        add(counter, length, segments);
    }
    let key = PairKey {
        source: case.source_cidr,
        destination: case.destination_cidr,
        direction: direction() as u8,
        reason: case.reason,
        _pad: [0; 2],
    };
    let key = key.to_words();
    // Nearly every pair is where it is looked for first.
    if let Some(bucket) = PAIR_TABLE.get_ptr_mut(pair_bucket(pair_hash(key), 0, limit::PAIR_BUCKETS)) {
        // SAFETY: the map's value, checked not to be null.
        let slot = unsafe { &raw mut (*bucket).slots[0] };
        if holds(slot, key) {
            // SAFETY: as above.
            return add(unsafe { &raw mut (*slot).counter }, length, segments);
        }
    }
    count_pair(key[0], key[1], length, segments);
}

/// Counts a packet for a pair wherever there is a place for it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_pair(first: u64, second: u64, length: u32, segments: u32) -> u32 {
    let key = [first, second];
    let hash = pair_hash(key);
    for number in 0..PAIR_TRIES {
        let Some(bucket) = PAIR_TABLE.get_ptr_mut(pair_bucket(hash, number, limit::PAIR_BUCKETS)) else { break };
        for way in 0..PAIR_WAYS {
            // SAFETY: the map's value, checked not to be null.
            let (slot, counter) = unsafe {
                let slot = &raw mut (*bucket).slots[way];
                (slot, &raw mut (*slot).counter)
            };
            if holds(slot, key) {
                add(counter, length, segments);
                return 0;
            }
            if holds(slot, [0; 2]) {
                add(counter, length, segments);
                // SAFETY: as above; no other CPU writes to this one's table.
                unsafe { (&raw mut (*slot).key).write_volatile(key) };
                return 0;
            }
        }
    }
    lose(LOSS_PAIR);
    0
}

#[inline(always)]
fn holds(slot: *mut PairSlot, key: [u64; 2]) -> bool {
    // SAFETY: the map's value, checked by the caller not to be null.
    let [first, second] = unsafe { (*slot).key };
    first == key[0] && second == key[1]
}

/// Plain additions: the maps are per CPU, and the hooks run with bottom halves off.
#[inline(always)]
fn add(counter: *mut Counter, length: u32, segments: u32) {
    // SAFETY: the map's value, checked by the caller not to be null.
    unsafe {
        (*counter).packets += 1;
        (*counter).bytes += u64::from(length);
        (*counter).segments += u64::from(segments);
    }
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
