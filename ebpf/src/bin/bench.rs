//! Programs that measure: they call what the node's programs are made of, in loops over samples that userspace wrote, and
//! stand beside what others do. Each returns how many of its samples passed, so that it is seen to do its work.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(unsafe_code, reason = "symbols with global linkage, which the verifier checks once and not once a call")]

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{__sk_buff, xdp_action};
use aya_ebpf::helpers::generated::bpf_skb_store_bytes;
use aya_ebpf::macros::{classifier, map, xdp};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie};
use aya_ebpf::programs::{TcContext, XdpContext};
use ebpf::context::PacketContext;
use ebpf::hook::{Hook, Skb, WHOLE};
use ebpf::maps::direction;
use ebpf::verdict;
use ebpf_common::bench::{Ends, LOOP, PACKET, Pair, SAMPLES, Service};

#[map]
static BENCH_ENDS: Array<Ends> = Array::with_max_entries(SAMPLES, 0);
#[map]
static BENCH_PACKETS: Array<[u8; PACKET]> = Array::with_max_entries(SAMPLES, 0);
/// Where the next run goes on.
#[map]
static CURSOR: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static IDENTITY_V4: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(32_768, 0);
#[map]
static IDENTITY_V6: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(32_768, 0);
#[map]
static POLICY: LpmTrie<Service, u32> = LpmTrie::with_max_entries(65_536, 0);
#[map]
static PAIRS: HashMap<Pair, u32> = HashMap::with_max_entries(65_536, 0);

/// Does nothing: what running a program costs.
#[classifier]
pub(crate) fn empty(_: TcContext) -> i32 {
    0
}

/// Does nothing ahead of everything else: what being there costs.
#[xdp]
pub(crate) fn empty_early(_: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Goes through the ends of flows, one function call each.
#[inline(always)]
fn each(visit: extern "C" fn(u32) -> u32) -> i32 {
    let first = start();
    let mut passed = 0;
    for step in 0..LOOP {
        passed += visit(first.wrapping_add(step) & (SAMPLES - 1));
    }
    passed as i32
}

/// Where this run starts; the next one starts where it ends.
#[inline(always)]
fn start() -> u32 {
    let Some(cursor) = CURSOR.get_ptr_mut(0) else { return 0 };
    // SAFETY: the map's value, checked not to be null; one run at a time.
    unsafe {
        let first = *cursor;
        *cursor = first.wrapping_add(LOOP);
        first
    }
}

/// What the loop alone costs: it reads what the others read.
#[classifier]
pub(crate) fn ends_only(_: TcContext) -> i32 {
    each(read_ends)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_ends(index: u32) -> u32 {
    let Some(ends) = BENCH_ENDS.get(index) else { return 0 };
    let words = ends.source.0[0] ^ ends.source.0[1] ^ ends.destination.0[0] ^ ends.destination.0[1];
    (words as u32 ^ u32::from(ends.destination_port)) & 1
}

/// Addresses to decision, as the node's programs find it.
#[classifier]
pub(crate) fn lookup(_: TcContext) -> i32 {
    each(look_up)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn look_up(index: u32) -> u32 {
    let Some(ends) = BENCH_ENDS.get(index) else { return 0 };
    let (copy, _) = ebpf::maps::control();
    if copy > 1 {
        return 0;
    }
    let service = u32::from(ends.protocol) << 16 | u32::from(ends.destination_port);
    let both = [ends.source, ends.destination];
    u32::from(verdict::is_allowed(copy, direction(), &both, ends.family, service))
}

/// One LPM lookup.
#[classifier]
pub(crate) fn lpm_v4(_: TcContext) -> i32 {
    each(find_v4)
}

#[classifier]
pub(crate) fn lpm_v6(_: TcContext) -> i32 {
    each(find_v6)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_v4(index: u32) -> u32 {
    BENCH_ENDS.get(index).map_or(0, |ends| identity::<false>(ends.source) & 1)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_v6(index: u32) -> u32 {
    BENCH_ENDS.get(index).map_or(0, |ends| identity::<true>(ends.source) & 1)
}

/// 0: none.
#[inline(always)]
fn identity<const V6: bool>(address: ebpf_common::table::Address) -> u32 {
    let found = if V6 {
        IDENTITY_V6.get(Key::new(128, address.to_bytes()))
    } else {
        let [.., a, b, c, d] = address.to_bytes();
        IDENTITY_V4.get(Key::new(32, [a, b, c, d]))
    };
    found.map_or(0, |identity| *identity)
}

/// Cilium's shape: the peer's identity by LPM, then the policy of that identity and the one of any, both by LPM.
#[classifier]
pub(crate) fn cilium_v4(_: TcContext) -> i32 {
    each(ask_cilium_v4)
}

#[classifier]
pub(crate) fn cilium_v6(_: TcContext) -> i32 {
    each(ask_cilium_v6)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ask_cilium_v4(index: u32) -> u32 {
    BENCH_ENDS.get(index).map_or(0, ask_cilium::<false>)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ask_cilium_v6(index: u32) -> u32 {
    BENCH_ENDS.get(index).map_or(0, ask_cilium::<true>)
}

#[inline(always)]
fn ask_cilium<const V6: bool>(ends: &Ends) -> u32 {
    let port = ends.destination_port.to_be_bytes();
    let mut service = Service { identity: identity::<V6>(ends.source), direction: 1, protocol: ends.protocol, port };
    let own = POLICY.get(Key::new(64, service));
    service.identity = 0;
    let any = POLICY.get(Key::new(64, service));
    u32::from(own.or(any).is_some_and(|verdict| *verdict != 0))
}

/// Two LPM lookups and a hash.
#[classifier]
pub(crate) fn pair_v4(_: TcContext) -> i32 {
    each(ask_pair_v4)
}

#[classifier]
pub(crate) fn pair_v6(_: TcContext) -> i32 {
    each(ask_pair_v6)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ask_pair_v4(index: u32) -> u32 {
    BENCH_ENDS.get(index).map_or(0, ask_pair::<false>)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn ask_pair_v6(index: u32) -> u32 {
    BENCH_ENDS.get(index).map_or(0, ask_pair::<true>)
}

#[inline(always)]
fn ask_pair<const V6: bool>(ends: &Ends) -> u32 {
    let pair = Pair {
        source: identity::<V6>(ends.source),
        destination: identity::<V6>(ends.destination),
        service: u32::from(ends.protocol) << 16 | u32::from(ends.destination_port),
    };
    // SAFETY: nobody writes while the bench runs.
    u32::from(unsafe { PAIRS.get(pair) }.is_some_and(|verdict| *verdict != 0))
}

/// Puts one packet after the other into the buffer that the kernel made for the run. What the loop alone costs.
#[classifier]
pub(crate) fn packets_only(context: TcContext) -> i32 {
    let first = start();
    let mut passed = 0;
    for step in 0..LOOP {
        passed += put(context.skb.skb, first.wrapping_add(step) & (SAMPLES - 1));
    }
    passed as i32
}

/// Likewise, and judges, counts and reports each as the node's programs do.
#[classifier]
pub(crate) fn whole(context: TcContext) -> i32 {
    let first = start();
    let mut passed = 0;
    for step in 0..LOOP {
        passed += put_and_pass(context.skb.skb, first.wrapping_add(step) & (SAMPLES - 1));
    }
    passed as i32
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn put(context: *mut __sk_buff, index: u32) -> u32 {
    u32::from(store(&TcContext::new(context), index))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn put_and_pass(context: *mut __sk_buff, index: u32) -> u32 {
    let context = TcContext::new(context);
    u32::from(store(&context, index) && ebpf::pass(&Skb(&context)))
}

/// Reads the headers, and no more.
#[classifier]
pub(crate) fn headers(context: TcContext) -> i32 {
    let first = start();
    let mut passed = 0;
    for step in 0..LOOP {
        passed += put_and_read(context.skb.skb, first.wrapping_add(step) & (SAMPLES - 1));
    }
    passed as i32
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn put_and_read(context: *mut __sk_buff, index: u32) -> u32 {
    let context = TcContext::new(context);
    let hook = Skb(&context);
    let mut packet_context = PacketContext::new(&hook);
    u32::from(store(&context, index) && hook.read(&mut packet_context.packet, packet_context.length) == WHOLE)
}

/// Counts, and no more: as many pairs as the samples have.
#[classifier]
pub(crate) fn counters(context: TcContext) -> i32 {
    let first = start();
    let mut passed = 0;
    for step in 0..LOOP {
        passed += put_and_count(context.skb.skb, first.wrapping_add(step) & (SAMPLES - 1));
    }
    passed as i32
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn put_and_count(context: *mut __sk_buff, index: u32) -> u32 {
    let context = TcContext::new(context);
    let mut packet_context = PacketContext::new(&Skb(&context));
    (packet_context.source_cidr, packet_context.destination_cidr, packet_context.rule) = (index & 1023, 1, index & 127);
    let stored = store(&context, index);
    ebpf::count::count(&packet_context);
    u32::from(stored)
}

/// The packets of one run are all as long as its buffer.
#[inline(always)]
fn store(context: &TcContext, index: u32) -> bool {
    let length = context.len();
    if length == 0 || length > PACKET as u32 {
        return false;
    }
    let Some(packet) = BENCH_PACKETS.get_ptr(index) else { return false };
    // SAFETY: the map's value, of which no more than its length is read.
    unsafe { bpf_skb_store_bytes(context.as_ptr().cast(), 0, packet.cast(), length, 0) == 0 }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
