//! The guard's verdict, one for both hooks.
#![allow(unsafe_code, reason = "map values are shared with other CPUs")]

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use ebpf_common::blake2s;
use ebpf_common::underlay::{
    self, Config, Datagram, Endpoint, INITIATION_LENGTH, MAC_LENGTH, Message, RESPONSE_LENGTH, Rate, bins, classify,
    reason,
};

use crate::frame::Hook;
use crate::maps::{
    GUARD_ADDRESSES, GUARD_CHECKS, GUARD_CONFIG, GUARD_ENDPOINTS, GUARD_LINK_HEADER, GUARD_SOURCES, GUARD_TOTALS, count,
};

/// Whether the frame passes. Nothing is counted of what is no datagram to the port and to this machine.
#[inline(always)]
pub(crate) fn pass<F: Hook>(frame: &F) -> bool {
    let Some(config) = GUARD_CONFIG.get(0) else { return true };
    if config.enabled == 0 {
        return true;
    }
    let mut datagram = Datagram::default();
    if !datagram.find(frame, GUARD_LINK_HEADER.load(), config.port) {
        return true;
    }
    if GUARD_ADDRESSES.get_ptr(datagram.destination).is_none() {
        return true;
    }
    let reason = judge(frame, &datagram, config);
    count(reason, datagram.length, frame.segments());
    reason::passes(reason)
}

#[inline(always)]
fn judge<F: Hook>(frame: &F, datagram: &Datagram, config: &Config) -> u8 {
    let joined = frame.joined();
    if joined == 0 || joined >= datagram.length {
        return judge_message(frame, datagram, config, datagram.message, datagram.length);
    }
    judge_joined(frame, datagram, config, joined)
}

/// Datagrams of one socket that came together: all of one length but for the last, which may be shorter.
///
/// A handshake message may be the last among data, or the first ahead of a shorter one. Of a peer's own data nothing is
/// ever lost here, so what follows it passes unseen: whoever forges both, in a row and from a peer's endpoint, gets past.
#[inline(always)]
fn judge_joined<F: Hook>(frame: &F, datagram: &Datagram, config: &Config, joined: u32) -> u8 {
    let first = match classify(frame.load(datagram.message), joined, false) {
        Ok(first) => first,
        Err(reason) => return reason,
    };
    let rest = datagram.length - joined;
    match first.bucket() {
        None if is_known(datagram) => first.passed(),
        None => {
            let last = match rest % joined {
                0 => joined,
                last => last,
            };
            match judge_message(frame, datagram, config, datagram.message + datagram.length - last, last) {
                reason if reason::passes(reason) => first.passed(),
                reason => reason,
            }
        }
        Some(_) if rest >= joined => reason::JOINED,
        Some(_) => judge_message(frame, datagram, config, datagram.message, joined),
    }
}

#[inline(always)]
fn is_known(datagram: &Datagram) -> bool {
    GUARD_ENDPOINTS.get_ptr(endpoint(datagram)).is_some()
}

#[inline(always)]
fn endpoint(datagram: &Datagram) -> Endpoint {
    Endpoint { address: datagram.source, port: datagram.source_port, _pad: [0; 6] }
}

#[inline(always)]
fn judge_message<F: Hook>(frame: &F, datagram: &Datagram, config: &Config, at: u32, length: u32) -> u8 {
    let message = match classify(frame.load(at), length, datagram.fragment != 0) {
        Ok(message) => message,
        Err(reason) => return reason,
    };
    match message.bucket() {
        None => message.passed(),
        Some(bucket) => judge_handshake(frame, datagram, config, at, bucket) as u8,
    }
}

/// The dear part comes after buckets that bound how often it is done, and ahead of those that a stranger's forgeries could
/// empty for others.
#[inline(never)]
fn judge_handshake<F: Hook>(frame: &F, datagram: &Datagram, config: &Config, at: u32, bucket: u32) -> u32 {
    // SAFETY: the helper takes nothing and always succeeds.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let bucket = bucket & (underlay::HANDSHAKES - 1);
    let message = if bucket == 0 { Message::Initiation } else { Message::Response };
    if let Some(buckets) = GUARD_ENDPOINTS.get_ptr_mut(endpoint(datagram)) {
        // SAFETY: the map's value, checked not to be null; the index is within it.
        let full = unsafe { &raw mut (*buckets).full[bucket as usize] };
        if !take(full, &config.endpoint, now) {
            return reason::LIMITED_ENDPOINT.into();
        }
        return if has_mac(frame, config, at, bucket) { message.passed() } else { reason::WRONG_MAC }.into();
    }
    let (first, second) = bins(datagram.source, config.seed);
    // Both are asked, so that both empty at the same pace.
    let first = GUARD_SOURCES.get_ptr_mut(first).is_some_and(|full| take(full, &config.source, now));
    let second = GUARD_SOURCES.get_ptr_mut(second).is_some_and(|full| take(full, &config.source, now));
    if !first && !second {
        return reason::LIMITED_SOURCE.into();
    }
    if !GUARD_CHECKS.get_ptr_mut(bucket).is_some_and(|full| take(full, &config.checks, now)) {
        return reason::LIMITED_CHECKS.into();
    }
    if !has_mac(frame, config, at, bucket) {
        return reason::WRONG_MAC.into();
    }
    if !GUARD_TOTALS.get_ptr_mut(bucket).is_some_and(|full| take(full, &config.total, now)) {
        return reason::LIMITED_TOTAL.into();
    }
    message.passed().into()
}

/// Whether there was a token. Two CPUs may take the same one.
#[inline(always)]
fn take(full: *mut u64, rate: &Rate, now: u64) -> bool {
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
    let mut state = config.mac1;
    let mut words = [0; 16];
    let at = if bucket == 0 {
        if !frame.fill(at, &mut words, BLOCK) {
            return false;
        }
        compress(&mut state, &words, 2 * BLOCK, 0);
        if !frame.fill(at + BLOCK, &mut words, INITIATION - BLOCK) {
            return false;
        }
        compress(&mut state, &words, BLOCK + INITIATION, 1);
        at + INITIATION
    } else {
        if !frame.fill(at, &mut words, RESPONSE) {
            return false;
        }
        compress(&mut state, &words, BLOCK + RESPONSE, 1);
        at + RESPONSE
    };
    if !frame.fill(at, &mut words, MAC_LENGTH) {
        return false;
    }
    // No secret is compared: whoever can guess the MAC knows the key, and is only let on to WireGuard.
    let differ = state[0] ^ u32::from_le(words[0])
        | state[1] ^ u32::from_le(words[1])
        | state[2] ^ u32::from_le(words[2])
        | state[3] ^ u32::from_le(words[3]);
    differ == 0
}

/// A function of its own: its 1,600 additions and shifts are verified once a call, and stand in the object once.
#[inline(never)]
fn compress(state: &mut [u32; 8], words: &[u32; 16], count: u32, last: u32) -> u32 {
    let mut block = *words;
    if cfg!(target_endian = "big") {
        for word in &mut block {
            *word = u32::from_le(*word);
        }
    }
    blake2s::compress(state, &block, count, last != 0);
    0
}
