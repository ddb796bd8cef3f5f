//! The guard's program, loaded and fed with frames.

use std::net::{IpAddr, SocketAddr};

use ebpf_common::underlay::reason;
use etherparse::PacketBuilder;
use node::kernel::guard::GuardProbe;
use node::kernel::guard::{Interfaces, Limit, Limits, Mode, Wanted};
use policy::PublicKey;

use super::Lab;
use crate::forge;

/// The guarded port.
pub const PORT: u16 = 51820;
/// This node's addresses, and its public key.
pub const OWN: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
pub const KEY: [u8; 32] = [7; 32];

/// Rates at which no bucket gets a new token within a test: what a burst lets pass is all.
pub const ONCE: u32 = 1;
const PLENTY: Limit = Limit { per_second: 1_000_000, burst: 1_000_000 };

/// Limits that nothing in a test runs into.
pub fn plenty() -> Limits {
    Limits { source: PLENTY, total: PLENTY, endpoint: PLENTY, checks: PLENTY }
}

/// What a node with these limits and known endpoints wants.
pub fn wanted(limits: Limits, endpoints: &[&str]) -> Wanted {
    Wanted {
        interfaces: Interfaces::Auto,
        mode: Mode::Tc,
        limits,
        port: PORT,
        public_key: PublicKey::try_from(KEY).expect("a key"),
        endpoints: endpoints.iter().map(|endpoint| endpoint.parse().expect("an endpoint")).collect(),
    }
}

/// The program, with maps that only the test uses.
#[derive(Debug)]
pub struct Guarded {
    pub probe: GuardProbe,
    ethernet: bool,
}

/// The hooks and kinds of link that the program is loaded for.
pub const KINDS: [(Mode, bool); 3] = [(Mode::Tc, true), (Mode::Tc, false), (Mode::Xdp, true)];

impl Guarded {
    pub fn new(lab: &Lab, mode: Mode, ethernet: bool, wanted: &Wanted) -> Self {
        let folder = lab.bpffs.join(format!("guard-{mode:?}-{ethernet}"));
        let mut probe = GuardProbe::load(mode, ethernet, &folder)
            .unwrap_or_else(|error| panic!("{error}: {:?}", std::error::Error::source(&error)));
        let own = OWN.map(|address| address.parse::<IpAddr>().expect("an address"));
        probe.configure(wanted, &own).expect("configured");
        Self { probe, ethernet }
    }

    /// A frame on this kind of link.
    pub fn frame(&self, ip: &[u8]) -> Vec<u8> {
        if !self.ethernet {
            return ip.to_vec();
        }
        let ethertype: [u8; 2] = if ip[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
        [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..], &ethertype, ip].concat()
    }

    pub fn judge(&mut self, frame: &[u8]) -> Option<u8> {
        self.probe.judge(frame).unwrap_or_else(|error| panic!("{error}: {:?}", std::error::Error::source(&error)))
    }

    /// Panics unless the packet has this fate.
    pub fn expect(&mut self, ip: &[u8], expected: Option<u8>, what: &str) {
        let frame = self.frame(ip);
        let seen = self.judge(&frame);
        assert_eq!(seen.map(reason::name), expected.map(reason::name), "{what}, ethernet: {}", self.ethernet);
    }

    /// A valid initiation from here has this fate.
    pub fn expect_initiation(&mut self, from: &str, expected: u8) {
        let message = forge::with_mac(forge::initiation(1), &KEY);
        self.expect(&to_port(from, &message), Some(expected), from);
    }
}

/// A UDP packet to the guarded port of this node, by the family of its source.
pub fn to_port(from: &str, message: &[u8]) -> Vec<u8> {
    udp(from, PORT, message)
}

pub fn udp(from: &str, port: u16, message: &[u8]) -> Vec<u8> {
    let from: SocketAddr = from.parse().expect("an address and port");
    let own = OWN.map(|address| address.parse::<IpAddr>().expect("an address"));
    let builder = match (from.ip(), own) {
        (IpAddr::V4(source), [IpAddr::V4(own), _]) => PacketBuilder::ipv4(source.octets(), own.octets(), 64),
        (IpAddr::V6(source), [_, IpAddr::V6(own)]) => PacketBuilder::ipv6(source.octets(), own.octets(), 64),
        _ => unreachable!("own addresses are one of each family"),
    };
    let mut bytes = Vec::new();
    builder.udp(from.port(), port).write(&mut bytes, message).expect("a packet");
    bytes
}
