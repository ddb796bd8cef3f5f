//! Reports denied packets, and packets of rules with `log`, to userspace, so many a second for each reason. Packets that
//! interfaces emit by themselves (`scope`) are only counted.
#![allow(unsafe_code, reason = "map values are shared with other CPUs; the ring buffer lends uninitialised memory")]

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use ebpf_common::counter::{LOSS_EVENT_FULL, LOSS_EVENT_LIMITED};
use ebpf_common::event::{Bucket, Event};
use ebpf_common::limit::EVENTS_PER_SECOND;
use ebpf_common::reason;

use crate::atomic;
use crate::clock::{now, tick};
use crate::context::PacketContext;
use crate::hook::Hook;
use crate::maps::direction;
use crate::maps::{EVENT_BUCKETS, EVENTS, EVERY, TABLES, TRACE, lose};

const NANOSECONDS_PER_TOKEN: u64 = 1_000_000_000 / EVENTS_PER_SECOND;

#[inline(always)]
pub(crate) fn report(hook: &impl Hook, context: &PacketContext) {
    if TRACE.load() != 0 {
        hook.trace(context);
    }
    if EVERY.load() != 0 {
        emit_any(context);
    } else if context.log || !(reason::passes(context.reason) || context.reason == reason::SCOPE) {
        let Some(bucket) = EVENT_BUCKETS.get_ptr_mut(u32::from(context.reason)) else { return };
        // No token has come since the last look: nothing is written that other CPUs look at but the count.
        // SAFETY: the map's value, checked not to be null.
        if unsafe { (*bucket).empty } == tick() {
            suppress(bucket, LOSS_EVENT_LIMITED);
        } else {
            emit(context);
        }
    }
}

#[inline(never)]
fn emit(context: &PacketContext) -> u32 {
    let Some(bucket) = EVENT_BUCKETS.get_ptr_mut(u32::from(context.reason)) else { return 0 };
    let tick = tick();
    if !take_token(bucket, now()) {
        // SAFETY: the map's value, checked not to be null.
        unsafe { (*bucket).empty = tick };
        return suppress(bucket, LOSS_EVENT_LIMITED);
    }
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        return suppress(bucket, LOSS_EVENT_FULL);
    };
    // SAFETY: the map's value, checked not to be null, aligned to 8 bytes.
    let suppressed = unsafe { atomic::take(&raw mut (*bucket).suppressed) };
    // SAFETY: the helper takes nothing and always succeeds.
    let time = unsafe { bpf_ktime_get_ns() };
    entry.write(event(context, time, suppressed));
    entry.submit(0);
    0
}

/// Reports a packet for which no bucket has a token, to a reader that looks without being woken.
#[inline(never)]
fn emit_any(context: &PacketContext) -> u32 {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        lose(LOSS_EVENT_FULL);
        return 0;
    };
    entry.write(event(context, 0, 0));
    entry.submit(BPF_RB_NO_WAKEUP.into());
    0
}

#[inline(always)]
fn event(context: &PacketContext, time: u64, suppressed: u64) -> Event {
    Event {
        time,
        revision: TABLES.get(context.copy).map_or(0, |tables| tables.header.revision),
        source: context.packet.source,
        destination: context.packet.destination,
        source_cidr: context.source_cidr,
        destination_cidr: context.destination_cidr,
        rule: context.rule,
        length: context.length,
        source_port: context.packet.source_port,
        destination_port: context.packet.destination_port,
        protocol: context.packet.protocol,
        direction: direction() as u8,
        reason: context.reason,
        _pad: 0,
        suppressed,
    }
}

#[inline(always)]
fn suppress(bucket: *mut Bucket, why: u32) -> u32 {
    // SAFETY: the map's value, checked by the caller not to be null, aligned to 8 bytes.
    unsafe { atomic::add(&raw mut (*bucket).suppressed, 1) };
    lose(why);
    0
}

/// Two CPUs may take the same token; none is lost.
#[inline(always)]
fn take_token(bucket: *mut Bucket, now: u64) -> bool {
    // SAFETY: the map's value, checked by the caller not to be null.
    let Bucket { time, tokens, .. } = unsafe { *bucket };
    let fresh = now.saturating_sub(time) / NANOSECONDS_PER_TOKEN;
    let (time, tokens) = if fresh >= EVENTS_PER_SECOND {
        (now, EVENTS_PER_SECOND)
    } else {
        (time + fresh * NANOSECONDS_PER_TOKEN, (tokens + fresh).min(EVENTS_PER_SECOND))
    };
    // SAFETY: as above.
    unsafe {
        (*bucket).time = time;
        (*bucket).tokens = tokens.saturating_sub(1);
    }
    tokens > 0
}

/// Says through aya-log what was found. Called only where `TRACE` is set when the program is loaded, so that the verifier
/// removes it elsewhere.
#[inline(never)]
pub(crate) fn trace(program: &impl EbpfContext, context: &PacketContext) -> u32 {
    aya_log_ebpf::info!(
        program,
        "direction={} reason={} rule={} protocol={} source={:i} {} destination={:i} {} cidrs={} {} length={}",
        direction(),
        context.reason,
        context.rule,
        context.packet.protocol,
        context.packet.source.to_bytes(),
        context.packet.source_port,
        context.packet.destination.to_bytes(),
        context.packet.destination_port,
        context.source_cidr,
        context.destination_cidr,
        context.length
    );
    0
}
