//! What `cargo xtask bench` shares with its programs. Nothing that a node loads has any of it.

use crate::table::Address;

/// Samples that one run of a program goes through, so that what starting it costs is shared by many.
pub const LOOP: u32 = 64;
/// Samples in the arrays; a power of two, a multiple of [`LOOP`]. Each run goes on where the one before stopped.
pub const SAMPLES: u32 = 4_096;
/// Bytes kept of a packet.
pub const PACKET: usize = 128;

/// Names of the maps in the object.
pub mod map {
    /// `Array<Ends>`, `SAMPLES` entries.
    pub const ENDS: &str = "BENCH_ENDS";
    /// `Array<[u8; PACKET]>`, `SAMPLES` entries.
    pub const PACKETS: &str = "BENCH_PACKETS";
    /// `LpmTrie<[u8; 4], u32>`: prefixes to identities.
    pub const IDENTITY_V4: &str = "IDENTITY_V4";
    /// `LpmTrie<[u8; 16], u32>`.
    pub const IDENTITY_V6: &str = "IDENTITY_V6";
    /// `LpmTrie<Service, u32>`: (identity, direction, protocol, port) to verdicts.
    pub const POLICY: &str = "POLICY";
    /// `HashMap<Pair, u32>`.
    pub const PAIRS: &str = "PAIRS";
}

/// The ends of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    pub source: Address,
    pub destination: Address,
    pub destination_port: u16,
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    pub _pad: [u8; 4],
}

/// A service of an identity as a trie has it: after the identity come direction and protocol, then the port's bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    pub identity: u32,
    pub direction: u8,
    pub protocol: u8,
    /// Network order.
    pub port: [u8; 2],
}

/// A service between two identities.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    pub source: u32,
    pub destination: u32,
    /// Protocol << 16 | port.
    pub service: u32,
}

const _: () = assert!(SAMPLES.is_power_of_two() && SAMPLES.is_multiple_of(LOOP));
const _: () = assert!(size_of::<Ends>() == 40);
const _: () = assert!(size_of::<Service>() == 8);
const _: () = assert!(size_of::<Pair>() == 12);

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: repr(C), no hidden padding, no invalid bit pattern.
    unsafe impl aya::Pod for super::Ends {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Service {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Pair {}
}
