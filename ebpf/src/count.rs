//! Counting a packet: by reason, by rule, and by pair of cidrs.
#![allow(unsafe_code, reason = "map values are shared with userspace")]

use ebpf_common::counter::{Counter, LOSS_PAIR, PAIR_TRIES, PAIR_WAYS, PairKey, PairSlot, pair_bucket, pair_hash};
use ebpf_common::{limit, reason};

use crate::context::PacketContext;
use crate::maps::{PAIR_TABLE, REASON_COUNTERS, RULE_COUNTERS, direction, lose};

/// Counts a packet once for its direction and reason, its rule if one decided, and its pair of cidrs.
#[inline(always)]
pub fn count(context: &PacketContext) {
    let (length, segments) = (context.length, context.segments);
    if let Some(counter) = REASON_COUNTERS.get_ptr_mut(direction() * reason::COUNT + u32::from(context.reason)) {
        add(counter, length, segments);
    }
    if context.rule < limit::RULES
        && let Some(counter) = RULE_COUNTERS.get_ptr_mut(context.rule)
    {
        add(counter, length, segments);
    }
    let key = PairKey {
        source: context.source_cidr,
        destination: context.destination_cidr,
        direction: direction() as u8,
        reason: context.reason,
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
