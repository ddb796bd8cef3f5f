//! The guard's verdict, one for both hooks.
#![allow(unsafe_code, reason = "map values are shared with other CPUs")]

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use ebpf_common::blake2s;
use ebpf_common::underlay::{
    self, Config, Datagram, Endpoint, INITIATION_LENGTH, MAC_LENGTH, Message, RESPONSE_LENGTH, Rate, bins, classify,
    reason,
};

use crate::event::{self, Arrival};
use crate::frame::Hook;
use crate::maps::{
    GUARD_ADDRESSES, GUARD_CHECKS, GUARD_CONFIG, GUARD_ENDPOINTS, GUARD_HASH, GUARD_LINK_HEADER, GUARD_SOURCES,
    GUARD_TOTALS, Hash, count,
};

/// Whether the frame passes. Nothing is counted of what is no datagram to the port and to this machine.
#[inline(always)]
pub(crate) fn pass<F: Hook>(frame: &F) -> bool {
    let Some(config) = GUARD_CONFIG.get(0) else { return true };
    if config.enabled == 0 {
        return true;
    }
    let mut datagram = Datagram::default();
    if !find(frame, &mut datagram, config.port) || GUARD_ADDRESSES.get_ptr(datagram.destination).is_none() {
        return true;
    }
    let reason = judge(frame, &datagram, config);
    count(reason, datagram.length, frame.segments());
    let passes = reason::passes(reason);
    if !passes {
        let length = frame.length().saturating_sub(GUARD_LINK_HEADER.load());
        let arrival = Arrival { interface: frame.interface(), length, port: config.port };
        event::report(&datagram, &arrival, reason);
    }
    passes
}

/// A function of its own: what it needs of the stack is free again when a MAC is computed.
#[inline(never)]
fn find<F: Hook>(frame: &F, datagram: &mut Datagram, port: u16) -> bool {
    datagram.find(frame, GUARD_LINK_HEADER.load(), port)
}

#[inline(always)]
fn judge<F: Hook>(frame: &F, datagram: &Datagram, config: &Config) -> u8 {
    let part = match part(frame, datagram) {
        Ok(part) => part,
        Err(reason) => return reason,
    };
    let message = match classify(frame.load(part.at), part.length, datagram.fragment != 0) {
        Ok(message) => message,
        Err(reason) => return reason,
    };
    let reason = match message.bucket() {
        None => message.passed(),
        Some(bucket) => judge_handshake(frame, datagram, config, part.at, bucket) as u8,
    };
    if part.behind_data && reason::passes(reason) { reason::DATA } else { reason }
}

/// The message that decides about a frame.
struct Part {
    at: u32,
    length: u32,
    behind_data: bool,
}

/// Of one datagram that is its message. Of several of one socket that the kernel has joined, which are of one length but for
/// the last, the only one that can be a handshake: the last behind data, or the first ahead of a shorter one.
///
/// Of a peer's own data nothing is ever lost here, so what follows it passes unseen: whoever forges both, in a row and from
/// a peer's endpoint, gets past.
#[inline(always)]
fn part<F: Hook>(frame: &F, datagram: &Datagram) -> Result<Part, u8> {
    let &Datagram { message: at, length, .. } = datagram;
    let joined = frame.joined();
    if joined == 0 || joined >= length {
        return Ok(Part { at, length, behind_data: false });
    }
    let first = classify(frame.load(at), joined, false)?;
    if first.bucket().is_some() {
        return if length - joined >= joined {
            Err(reason::JOINED)
        } else {
            Ok(Part { at, length: joined, behind_data: false })
        };
    }
    if is_known(datagram) {
        return Err(first.passed());
    }
    let last = match length % joined {
        0 => joined,
        last => last,
    };
    Ok(Part { at: at + length - last, length: last, behind_data: true })
}

#[inline(always)]
fn is_known(datagram: &Datagram) -> bool {
    GUARD_ENDPOINTS.get_ptr(endpoint(datagram)).is_some()
}

#[inline(always)]
fn endpoint(datagram: &Datagram) -> Endpoint {
    Endpoint { address: datagram.source, port: datagram.source_port, _pad: [0; 6] }
}

/// The dear part comes after buckets that bound how often it is done, and ahead of those that a stranger's forgeries could
/// empty for others.
#[inline(never)]
fn judge_handshake<F: Hook>(frame: &F, datagram: &Datagram, config: &Config, at: u32, bucket: u32) -> u32 {
    // SAFETY: the helper takes nothing and always succeeds.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let bucket = bucket & (underlay::HANDSHAKES - 1);
    let message = if bucket == 0 { Message::Initiation } else { Message::Response };
    let mut limited = reason::LIMITED_SOURCE;
    let is_free = if let Some(buckets) = GUARD_ENDPOINTS.get_ptr_mut(endpoint(datagram)) {
        // SAFETY: the map's value, checked not to be null; the index is within it.
        let full = unsafe { &raw mut (*buckets).full[bucket as usize] };
        limited = reason::LIMITED_ENDPOINT;
        take(full, &config.endpoint, now)
    } else {
        let (first, second) = bins(datagram.source, config.seed);
        // Both are asked, so that both empty at the same pace.
        let first = GUARD_SOURCES.get_ptr_mut(first).is_some_and(|full| take(full, &config.source, now));
        let second = GUARD_SOURCES.get_ptr_mut(second).is_some_and(|full| take(full, &config.source, now));
        if !first && !second {
            return limited.into();
        }
        limited = reason::LIMITED_CHECKS;
        false
    };
    // A known endpoint pays with its own tokens, and is a stranger when it has none left: somebody forges it, and it is let
    // in as far as there is time to tell it from the forgeries.
    if !is_free && !GUARD_CHECKS.get_ptr_mut(bucket).is_some_and(|full| take(full, &config.checks, now)) {
        return limited.into();
    }
    if !has_mac(frame, config, at, bucket) {
        return reason::WRONG_MAC.into();
    }
    if !is_free && !GUARD_TOTALS.get_ptr_mut(bucket).is_some_and(|full| take(full, &config.total, now)) {
        return reason::LIMITED_TOTAL.into();
    }
    message.passed().into()
}

/// Whether there was a token. Two CPUs may take the same one.
#[inline(always)]
pub(crate) fn take(full: *mut u64, rate: &Rate, now: u64) -> bool {
    // SAFETY: a map's value, checked by the callers not to be null, aligned to 8 bytes.
    let Some(taken) = rate.take(unsafe { full.read_volatile() }, now) else { return false };
    // SAFETY: as above.
    unsafe { full.write_volatile(taken) };
    true
}

/// Whether the sender knows this node's public key. Where `noded` has not said it yet, everybody is believed.
#[inline(always)]
fn has_mac<F: Hook>(frame: &F, config: &Config, at: u32, bucket: u32) -> bool {
    const BLOCK: u32 = 64;
    const INITIATION: u32 = INITIATION_LENGTH - 2 * MAC_LENGTH;
    const RESPONSE: u32 = RESPONSE_LENGTH - 2 * MAC_LENGTH;
    if config.keyed == 0 {
        return true;
    }
    let Some(hash) = GUARD_HASH.get_ptr_mut(0) else { return true };
    // SAFETY: the map's value, checked not to be null; per CPU, and the hooks run with bottom halves off.
    let Hash { state, words } = unsafe { &mut *hash };
    *state = config.mac1;
    let at = if bucket == 0 {
        if !frame.fill::<BLOCK>(at, words) {
            return false;
        }
        compress(2 * BLOCK, 0);
        if !frame.fill::<{ INITIATION - BLOCK }>(at + BLOCK, words) {
            return false;
        }
        compress(BLOCK + INITIATION, 1);
        at + INITIATION
    } else {
        if !frame.fill::<RESPONSE>(at, words) {
            return false;
        }
        compress(BLOCK + RESPONSE, 1);
        at + RESPONSE
    };
    if !frame.fill::<MAC_LENGTH>(at, words) {
        return false;
    }
    // No secret is compared: whoever can guess the MAC knows the key, and is only let on to WireGuard.
    state[0] ^ words[0] | state[1] ^ words[1] | state[2] ^ words[2] | state[3] ^ words[3] == 0
}

/// Takes the words of [`GUARD_HASH`] into its state. Of global linkage: its 2,000 additions and shifts are verified once,
/// and not along each path that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn compress(count: u32, last: u32) -> u32 {
    let Some(hash) = GUARD_HASH.get_ptr_mut(0) else { return 0 };
    // SAFETY: as in the caller, which does not use its reference meanwhile.
    let Hash { state, words } = unsafe { &mut *hash };
    // Volatile, so that the words stay where they are: the stack, 512 bytes for all that call each other, has no room for
    // copies beside the 16 words that are worked on.
    // SAFETY: a reference is a valid place to read from.
    let word = |at: usize| unsafe { (&raw const words[at]).read_volatile() };
    blake2s::compress(state, word, count, last != 0);
    1
}
