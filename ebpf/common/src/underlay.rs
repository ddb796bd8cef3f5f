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

use crate::table::Address;

/// Version of the maps below; part of their pin path, beside that of the policy's.
pub const VERSION: u32 = 1;

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

    /// What all interfaces of a node have in common.
    pub const SHARED: [&str; 6] = [CONFIG, ADDRESSES, ENDPOINTS, SOURCES, TOTALS, CHECKS];
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

/// What became of a datagram to the port.
pub mod reason {
    macro_rules! reasons {
        ($($(#[$doc:meta])* $constant:ident = $number:literal, $name:literal, $passes:literal;)*) => {
            $($(#[$doc])* pub const $constant: u8 = $number;)*

            /// Every reason with its printed name and whether the datagram passes.
            pub const ALL: &[(u8, &str, bool)] = &[$(($number, $name, $passes),)*];
        };
    }

    reasons! {
        /// A handshake initiation that everything said yes to.
        INITIATION = 0, "initiation", true;
        /// A response, likewise.
        RESPONSE = 1, "response", true;
        COOKIE_REPLY = 2, "cookie-reply", true;
        DATA = 3, "data", true;
        /// No WireGuard message begins like this.
        WRONG_TYPE = 4, "wrong-type", false;
        /// No WireGuard message of this type has this length, or the UDP header's length is wrong.
        WRONG_LENGTH = 5, "wrong-length", false;
        /// A handshake in fragments, which no WireGuard sends, or a fragment too short to tell.
        FRAGMENTED = 6, "fragmented", false;
        /// A handshake whose sender does not know this node's public key.
        WRONG_MAC = 7, "wrong-mac", false;
        /// More handshakes than one prefix gets.
        LIMITED_SOURCE = 8, "limited-source", false;
        /// More handshakes than all strangers get together.
        LIMITED_TOTAL = 9, "limited-total", false;
        /// More handshakes than one known endpoint gets, and than there is time to check beyond that.
        LIMITED_ENDPOINT = 10, "limited-endpoint", false;
        /// More MACs to check than this CPU has time for.
        LIMITED_CHECKS = 11, "limited-checks", false;
        /// Several handshakes back to back from one socket, which the kernel had joined.
        JOINED = 12, "joined", false;
    }

    /// Number of reasons.
    pub const COUNT: u32 = ALL.len() as u32;

    /// Whether a datagram with this reason passes.
    #[inline(always)]
    pub const fn passes(reason: u8) -> bool {
        matches!(reason, INITIATION | RESPONSE | COOKIE_REPLY | DATA)
    }

    /// The printed name of a reason.
    pub fn name(reason: u8) -> &'static str {
        ALL.get(usize::from(reason)).map_or("unknown", |(_, name, _)| name)
    }

    const _: () = {
        let mut i = 0;
        while i < ALL.len() {
            assert!(ALL[i].0 as usize == i);
            assert!(ALL[i].2 == passes(ALL[i].0));
            i += 1;
        }
    };
}

/// Where the bytes come from, link header included.
pub trait Frame {
    /// `N` bytes at an offset; `None` where the frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// Bytes in all.
    fn length(&self) -> u32;

    /// What follows an IPv6 header, which the programs make a function of its own.
    #[inline(always)]
    fn walk_ipv6(&self, start: u32, protocol: u8) -> Transport {
        walk_ipv6(self, start, protocol)
    }
}

impl Frame for [u8] {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(offset as usize..)?.first_chunk().copied()
    }

    fn length(&self) -> u32 {
        self.len() as u32
    }
}

/// A UDP datagram to the port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Datagram {
    pub source: Address,
    pub destination: Address,
    /// Where the message begins in the frame.
    pub message: u32,
    /// Bytes of the message by the UDP header's word; 0 where that makes no sense.
    pub length: u32,
    /// Host order.
    pub source_port: u16,
    /// 1: only the first fragment of one.
    pub fragment: u8,
}

const UDP: u8 = 17;
const UDP_HEADER: u32 = 8;
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const VLAN_OUTER: u16 = 0x88a8;
const VLAN_TAG: u32 = 4;

impl Datagram {
    /// Reads a frame with `link_header` bytes of link header into `self`; whether it is UDP to `port`. Later fragments say
    /// nothing about ports: they are not.
    #[inline(always)]
    pub fn find(&mut self, frame: &(impl Frame + ?Sized), link_header: u32, port: u16) -> bool {
        let Some((start, ethertype)) = network(frame, link_header) else { return false };
        let Some(header) = frame.load::<{ IPV4_HEADER as usize }>(start) else { return false };
        match (header[0] >> 4, ethertype) {
            (4, IPV4 | 0) => self.find_ipv4(frame, start, &header, port),
            (6, IPV6 | 0) => self.find_ipv6(frame, start, &header, port),
            _ => false,
        }
    }

    #[inline(always)]
    fn find_ipv4(&mut self, frame: &(impl Frame + ?Sized), start: u32, header: &[u8; 20], port: u16) -> bool {
        const MORE: u16 = 0x2000;
        const OFFSET: u16 = 0x1fff;
        let fragment = be16(header, 6);
        if header[9] != UDP || fragment & OFFSET != 0 {
            return false;
        }
        let length = u32::from(header[0] & 0xf) * 4;
        if length < IPV4_HEADER {
            return false;
        }
        self.source = Address::from_v4([header[12], header[13], header[14], header[15]]);
        self.destination = Address::from_v4([header[16], header[17], header[18], header[19]]);
        self.fragment = u8::from(fragment & MORE != 0);
        self.find_udp(frame, start + length, start + u32::from(be16(header, 2)), port)
    }

    #[inline(always)]
    fn find_ipv6(&mut self, frame: &(impl Frame + ?Sized), start: u32, header: &[u8; 20], port: u16) -> bool {
        // Most packets end here: only their protocol is looked at.
        let direct = header[6] == UDP;
        if !direct && !is_extension(header[6]) {
            return false;
        }
        let Some(rest) = frame.load::<20>(start + 20) else { return false };
        let transport = if direct {
            Transport::new(start + IPV6_HEADER, false)
        } else {
            frame.walk_ipv6(start + IPV6_HEADER, header[6])
        };
        if !transport.is_udp() {
            return false;
        }
        let (source, destination) = ipv6_addresses(header, &rest);
        self.source = source;
        self.destination = destination;
        self.fragment = u8::from(transport.is_fragment());
        self.find_udp(frame, transport.offset(), start + IPV6_HEADER + u32::from(be16(header, 4)), port)
    }

    /// `end`: of the packet, by the IP header's word.
    #[inline(always)]
    fn find_udp(&mut self, frame: &(impl Frame + ?Sized), at: u32, end: u32, port: u16) -> bool {
        let Some(header) = frame.load::<{ UDP_HEADER as usize }>(at) else { return false };
        if be16(&header, 2) != port {
            return false;
        }
        self.source_port = be16(&header, 0);
        self.message = at + UDP_HEADER;
        let length = u32::from(be16(&header, 4));
        // Of a fragmented datagram the rest is elsewhere.
        let inside = self.fragment != 0 || (at + length <= end && end <= frame.length());
        self.length = if length >= UDP_HEADER && inside { length - UDP_HEADER } else { 0 };
        true
    }
}

/// Where the IP header begins, and the EtherType ahead of it; 0: the link has none.
#[inline(always)]
fn network(frame: &(impl Frame + ?Sized), link_header: u32) -> Option<(u32, u16)> {
    if link_header == 0 {
        return Some((0, 0));
    }
    let mut at = ETHERNET;
    let mut ethertype = u16::from_be_bytes(frame.load(at - 2)?);
    // Tags that the device has not taken off.
    for _ in 0..2 {
        if ethertype != VLAN && ethertype != VLAN_OUTER {
            break;
        }
        at += VLAN_TAG;
        ethertype = u16::from_be_bytes(frame.load(at - 2)?);
    }
    Some((at, ethertype))
}

/// Where the UDP header behind IPv6 headers is, in one word, as a function of a program returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport(pub u32);

impl Transport {
    /// There is none.
    pub const NONE: Self = Self(0);
    const UDP: u32 = 1 << 31;
    const FRAGMENT: u32 = 1 << 30;

    #[inline(always)]
    fn new(offset: u32, fragment: bool) -> Self {
        Self(offset & 0xffff | Self::UDP | if fragment { Self::FRAGMENT } else { 0 })
    }

    #[inline(always)]
    fn is_udp(self) -> bool {
        self.0 & Self::UDP != 0
    }

    #[inline(always)]
    fn is_fragment(self) -> bool {
        self.0 & Self::FRAGMENT != 0
    }

    #[inline(always)]
    fn offset(self) -> u32 {
        self.0 & 0xffff
    }
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS | MOBILITY)
}

/// Walks the extension headers from `at` on.
#[inline(always)]
pub fn walk_ipv6(frame: &(impl Frame + ?Sized), at: u32, protocol: u8) -> Transport {
    let (mut at, mut protocol, mut fragment) = (at, protocol, false);
    for _ in 0..=EXTENSION_HEADERS {
        if protocol == UDP {
            return Transport::new(at, fragment);
        }
        if !is_extension(protocol) || at > 0xffff {
            break;
        }
        let Some(header) = frame.load::<4>(at) else { break };
        if protocol == FRAGMENT {
            let place = be16(&header, 2);
            if place & 0xfff8 != 0 {
                break;
            }
            fragment |= place & 1 != 0;
            at += 8;
        } else {
            at += (u32::from(header[1]) + 1) * 8;
        }
        protocol = header[0];
    }
    Transport::NONE
}

#[inline(always)]
fn ipv6_addresses(header: &[u8; 20], rest: &[u8; 20]) -> (Address, Address) {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = [
        header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15], header[16],
        header[17], header[18], header[19],
    ];
    let source = [a, b, c, d, e, f, g, h, i, j, k, l, rest[0], rest[1], rest[2], rest[3]];
    let [a, b, c, d, e, f, g, h] = [rest[4], rest[5], rest[6], rest[7], rest[8], rest[9], rest[10], rest[11]];
    let [i, j, k, l, m, n, o, p] = [rest[12], rest[13], rest[14], rest[15], rest[16], rest[17], rest[18], rest[19]];
    (Address::from_bytes(source), Address::from_bytes([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]))
}

#[inline(always)]
fn be16<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// A WireGuard message by its first word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    Initiation,
    Response,
    CookieReply,
    Data,
}

pub const INITIATION_LENGTH: u32 = 148;
pub const RESPONSE_LENGTH: u32 = 92;
pub const COOKIE_REPLY_LENGTH: u32 = 64;
/// Header and tag around nothing. Data is padded to multiples of 16, but not beyond the sender's MTU: with that of 1420 a
/// full packet is 1452 bytes.
pub const DATA_LENGTH_MIN: u32 = 32;
/// At the end of both handshake messages: `mac1` and `mac2`.
pub const MAC_LENGTH: u32 = 16;

impl Message {
    /// A type as 4 bytes: the number and three zeros.
    #[inline(always)]
    pub fn of(first: [u8; 4]) -> Option<Self> {
        match u32::from_le_bytes(first) {
            1 => Some(Self::Initiation),
            2 => Some(Self::Response),
            3 => Some(Self::CookieReply),
            4 => Some(Self::Data),
            _ => None,
        }
    }

    #[inline(always)]
    pub fn has_length(self, length: u32) -> bool {
        match self {
            Self::Initiation => length == INITIATION_LENGTH,
            Self::Response => length == RESPONSE_LENGTH,
            Self::CookieReply => length == COOKIE_REPLY_LENGTH,
            Self::Data => length >= DATA_LENGTH_MIN,
        }
    }

    /// Of a handshake: the index of its buckets. `None`: never limited.
    #[inline(always)]
    pub fn bucket(self) -> Option<u32> {
        match self {
            Self::Initiation => Some(0),
            Self::Response => Some(1),
            Self::CookieReply | Self::Data => None,
        }
    }

    /// Its reason when it passes.
    #[inline(always)]
    pub fn passed(self) -> u8 {
        match self {
            Self::Initiation => reason::INITIATION,
            Self::Response => reason::RESPONSE,
            Self::CookieReply => reason::COOKIE_REPLY,
            Self::Data => reason::DATA,
        }
    }
}

/// What kind of message begins with these bytes and has this length, or why it is dropped.
#[inline(always)]
pub fn classify(first: Option<[u8; 4]>, length: u32, fragment: bool) -> Result<Message, u8> {
    let Some(first) = first.filter(|_| length >= 4) else {
        return Err(if fragment { reason::FRAGMENTED } else { reason::WRONG_LENGTH });
    };
    let Some(message) = Message::of(first) else { return Err(reason::WRONG_TYPE) };
    if fragment {
        return if message == Message::Data { Ok(message) } else { Err(reason::FRAGMENTED) };
    }
    if message.has_length(length) { Ok(message) } else { Err(reason::WRONG_LENGTH) }
}

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

/// The state from which `mac1` of messages to the holder of a public key is computed.
pub fn mac1_state(public_key: &[u8; 32]) -> [u32; 8] {
    const LABEL: &[u8; 8] = b"mac1----";
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(LABEL);
    bytes[8..].copy_from_slice(public_key);
    crate::blake2s::keyed(&crate::blake2s::hash(&bytes))
}

/// `mac1` over what a handshake message has ahead of it, for those that make such messages.
pub fn mac1(state: &[u32; 8], message: &[u8]) -> [u8; MAC_LENGTH as usize] {
    const KEY_BLOCK: u32 = 64;
    let mut state = *state;
    let blocks = message.chunks(64);
    let count = blocks.len();
    let mut taken = KEY_BLOCK;
    for (i, bytes) in blocks.enumerate() {
        taken += bytes.len() as u32;
        crate::blake2s::compress(&mut state, &crate::blake2s::block(bytes), taken, i + 1 == count);
    }
    let mut mac = [0; MAC_LENGTH as usize];
    for (bytes, word) in mac.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    mac
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
