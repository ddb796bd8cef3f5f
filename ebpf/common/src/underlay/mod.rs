//! The guard on the underlay: what it and `noded` share, and the part of it that looks at bytes alone. Compiled for the
//! kernel and for the host.
//!
//! The guard protects WireGuard's queue of handshakes, and decides nothing about the policy: what it does not understand
//! passes. Only UDP to the WireGuard port at one of this machine's own addresses is ever dropped.
//!
//! ```text
//! frame ─ UDP to the port, to us ─► type, length ─► data, cookie reply ─► pass
//!                                       └► initiation, response
//!            from a known endpoint:  its bucket ──────────────────────────► mac1 ─► pass
//!                                        └► (empty) ──┐
//!            from anywhere else:     its prefix's bucket ─► budget of checks ─► mac1 ─► bucket of all ─► pass
//! ```
//!
//! WireGuard's first MAC is keyed with the receiver's public key, so whoever floods without knowing it gets no further than
//! `mac1`, and takes nothing from any bucket that somebody who does know it needs.

mod event;
mod frame;
mod message;
pub mod reason;

use crate::table::Address;

pub use event::{EVENT_BYTES, EVENT_RATE, Event};
pub use frame::{Datagram, Frame, Transport, walk_ipv6};
pub use message::{
    COOKIE_REPLY_LENGTH, DATA_LENGTH_MIN, INITIATION_LENGTH, MAC_LENGTH, Message, RESPONSE_LENGTH, classify, mac1,
    mac1_state,
};

/// Version of the maps below; part of their pin path, beside that of the policy's.
pub const VERSION: u32 = 2;

/// Names of the maps in the object, which are also the names of their pins.
pub mod map {
    /// `Array<Config>`, 1 entry.
    pub const CONFIG: &str = "GUARD_CONFIG";
    /// `HashMap<Address, u32>`: this machine's own addresses.
    pub const ADDRESSES: &str = "GUARD_ADDRESSES";
    /// `HashMap<Endpoint, EndpointBuckets>`: where current peers are.
    pub const ENDPOINTS: &str = "GUARD_ENDPOINTS";
    /// `Array<u64>`, `ROWS * BINS` entries: buckets of source prefixes.
    pub const SOURCES: &str = "GUARD_SOURCES";
    /// `Array<u64>`, one bucket per handshake type, for all that are from no known endpoint.
    pub const TOTALS: &str = "GUARD_TOTALS";
    /// `PerCpuArray<u64>`, one bucket per handshake type: how often a CPU computes a MAC for strangers.
    pub const CHECKS: &str = "GUARD_CHECKS";
    /// `PerCpuArray<Counter>`, [`super::reason::COUNT`] entries; of one interface.
    pub const COUNTERS: &str = "GUARD_COUNTERS";

    /// Ring buffer of [`super::Event`].
    pub const EVENTS: &str = "GUARD_EVENTS";
    /// `Array<u64>`, [`super::reason::COUNT`] buckets: the rate limit of events.
    pub const EVENT_BUCKETS: &str = "GUARD_EVENT_BUCKETS";
    /// `PerCpuArray<u64>`, [`super::reason::COUNT`] entries: frames dropped since this CPU last reported one, and not reported.
    pub const UNREPORTED: &str = "GUARD_UNREPORTED";

    /// What all interfaces of a node have in common.
    pub const SHARED: [&str; 9] =
        [CONFIG, ADDRESSES, ENDPOINTS, SOURCES, TOTALS, CHECKS, EVENTS, EVENT_BUCKETS, UNREPORTED];
}

/// Names of the programs in the object.
pub mod program {
    /// A classifier.
    pub const TC: &str = "guard";
    pub const XDP: &str = "guard_xdp";
}

/// `u32`, a read-only global: bytes of link header ahead of the IP header, [`ETHERNET`] or 0.
pub const LINK_HEADER: &str = "GUARD_LINK_HEADER";
/// Length of an Ethernet header without tags.
pub const ETHERNET: u32 = 14;

/// Own addresses that are looked after, those of multicast and broadcast included.
pub const ADDRESSES: u32 = 4_096;
/// Known endpoints: as many as a node has peers at most, and what the controller says of them beside what WireGuard learned.
pub const ENDPOINTS: u32 = 32_768;
/// Buckets in one row for source prefixes. They are found by a hash with a secret seed; a prefix has one in each row, and is
/// refused only where both are empty, so that a few thousand floods at once leave a stranger's bucket full. No entry is ever
/// evicted, which is what makes an LRU both slow and steerable under forged sources.
pub const BINS: u32 = 65_536;
pub const ROWS: u32 = 2;
/// Extension headers that are walked, each of at least 8 bytes: all that a packet of 1,500 bytes has room for. An attacker
/// could hide behind more than a walk looks at, and the kernel would deliver it.
pub const EXTENSION_HEADERS: u32 = 182;

/// A token bucket kept as the time at which it would be full again, in ns: `now + slack` is an empty one. One word, so that
/// racing CPUs may let a few more through, and never leave nonsense.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Between two tokens, ns.
    pub period: u64,
    /// Time's worth of tokens that a full bucket has beyond the first, ns.
    pub slack: u64,
}

impl Rate {
    /// `per_second` and `burst` are at least 1.
    pub const fn new(per_second: u32, burst: u32) -> Self {
        let period = match 1_000_000_000 / per_second as u64 {
            0 => 1,
            period => period,
        };
        Self { period, slack: (burst as u64 - 1) * period }
    }

    /// The bucket after one more token was taken at `now`; `None`: there is none.
    #[inline(always)]
    pub fn take(&self, full: u64, now: u64) -> Option<u64> {
        let full = if full > now { full } else { now };
        if full - now > self.slack { None } else { Some(full + self.period) }
    }
}

/// What `noded` tells the programs, at any time. All zero: not enabled.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Handshakes from one source prefix that is no known endpoint.
    pub source: Rate,
    /// Likewise, from all of them, of each type.
    pub total: Rate,
    /// From one known endpoint, of each type.
    pub endpoint: Rate,
    /// MACs computed for strangers, on each CPU, of each type.
    pub checks: Rate,
    /// Secret, for the bins.
    pub seed: u64,
    /// BLAKE2s keyed with `HASH("mac1----" || public key)`, its key block taken in.
    pub mac1: [u32; 8],
    /// Host order.
    pub port: u16,
    /// 1: the guard works.
    pub enabled: u8,
    /// 1: `mac1` is of this node's key.
    pub keyed: u8,
    pub _pad: u32,
}

/// Where a peer is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    pub address: Address,
    /// Host order.
    pub port: u16,
    pub _pad: [u8; 6],
}

impl From<core::net::SocketAddr> for Endpoint {
    fn from(address: core::net::SocketAddr) -> Self {
        Self { address: address.ip().to_canonical().into(), port: address.port(), _pad: [0; 6] }
    }
}

/// The buckets of a known endpoint, by [`Message::bucket`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndpointBuckets {
    pub full: [u64; HANDSHAKES as usize],
}

/// Handshake types that have buckets of their own: initiations and responses. An attacker who empties the one leaves the
/// other.
pub const HANDSHAKES: u32 = 2;

/// The two buckets of a source's prefix: its /32 or /64.
#[inline(always)]
pub fn bins(source: Address, seed: u64) -> (u32, u32) {
    let prefix = if source.is_v4() { source.0[1] } else { source.0[0] };
    // Two rounds of multiply and fold: whoever does not know the seed cannot tell which prefixes meet.
    let mut hash = (prefix ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^= hash >> 32;
    hash = hash.wrapping_add(seed.rotate_left(32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(0xd6e8_feb8_6659_fd93);
    (hash as u32 & (BINS - 1), BINS + ((hash >> 40) as u32 & (BINS - 1)))
}

const _: () = assert!(size_of::<Config>() == 112);
const _: () = assert!(size_of::<Endpoint>() == 24);
const _: () = assert!(size_of::<EndpointBuckets>() == 16);
const _: () = assert!(BINS.is_power_of_two());

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: repr(C), no hidden padding, no invalid bit pattern.
    unsafe impl aya::Pod for super::Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Address {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Endpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::EndpointBuckets {}
}
