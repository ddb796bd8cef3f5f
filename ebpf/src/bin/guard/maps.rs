//! The guard's maps and its read-only global. Names and sizes are the ABI of `ebpf-common`; userspace pins the maps.
#![allow(unsafe_code, reason = "symbols that the loader finds by name; map values are shared with other CPUs")]

use aya_ebpf::Global;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use ebpf_common::counter::Counter;
use ebpf_common::table::Address;
use ebpf_common::underlay::{self, BINS, Config, Endpoint, EndpointBuckets, HANDSHAKES, ROWS, reason};

#[unsafe(no_mangle)]
pub(crate) static GUARD_LINK_HEADER: Global<u32> = Global::new(underlay::ETHERNET);

#[map]
pub(crate) static GUARD_CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
pub(crate) static GUARD_ADDRESSES: HashMap<Address, u32> = HashMap::with_max_entries(underlay::ADDRESSES, 0);
#[map]
pub(crate) static GUARD_ENDPOINTS: HashMap<Endpoint, EndpointBuckets> =
    HashMap::with_max_entries(underlay::ENDPOINTS, 0);
#[map]
pub(crate) static GUARD_SOURCES: Array<u64> = Array::with_max_entries(ROWS * BINS, 0);
#[map]
pub(crate) static GUARD_TOTALS: Array<u64> = Array::with_max_entries(HANDSHAKES, 0);
#[map]
pub(crate) static GUARD_CHECKS: PerCpuArray<u64> = PerCpuArray::with_max_entries(HANDSHAKES, 0);
#[map]
pub(crate) static GUARD_COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(reason::COUNT, 0);
#[map]
pub(crate) static GUARD_EVENTS: RingBuf = RingBuf::with_byte_size(underlay::EVENT_BYTES, 0);
#[map]
pub(crate) static GUARD_EVENT_BUCKETS: Array<u64> = Array::with_max_entries(reason::COUNT, 0);
#[map]
pub(crate) static GUARD_UNREPORTED: PerCpuArray<u64> = PerCpuArray::with_max_entries(reason::COUNT, 0);

/// A hash in the making: what does not fit beside the rest on the stack.
#[map]
pub(crate) static GUARD_HASH: PerCpuArray<Hash> = PerCpuArray::with_max_entries(1, 0);

#[repr(C)]
pub(crate) struct Hash {
    pub(crate) state: [u32; 8],
    pub(crate) words: [u32; 16],
}

/// Plain additions: the map is per CPU, and the hooks run with bottom halves off.
#[inline(always)]
pub(crate) fn count(reason: u8, bytes: u32, segments: u32) {
    let Some(counter) = GUARD_COUNTERS.get_ptr_mut(u32::from(reason)) else { return };
    // SAFETY: the map's value, checked not to be null.
    unsafe {
        (*counter).packets += 1;
        (*counter).bytes += u64::from(bytes);
        (*counter).segments += u64::from(segments);
    }
}
