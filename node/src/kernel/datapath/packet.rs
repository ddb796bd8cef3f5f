//! Packets for the programs to judge: what a flow's opener would send, and what deviates from it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP};
use policy::Flow;

/// In the flags of a TCP header.
pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// One packet from its IP header on. Both addresses are of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    /// ICMP echo: the identifier.
    pub source_port: u16,
    /// ICMP: the type.
    pub destination_port: u16,
    /// TCP: the flags.
    pub flags: u8,
    /// Bytes after the transport header.
    pub payload: Vec<u8>,
}

/// Source port of probes, or identifier of their echo requests.
const PROBE_PORT: u16 = 49_999;

impl Packet {
    /// The first packet of a flow.
    pub fn opening(flow: &Flow) -> Self {
        Self {
            source: flow.source,
            destination: flow.destination,
            protocol: flow.protocol,
            source_port: PROBE_PORT,
            destination_port: flow.port,
            flags: SYN,
            payload: vec![0; 8],
        }
    }

    /// The packet with which the other end answers.
    pub fn reply(&self) -> Self {
        let echo = |request, reply| if self.destination_port == request { reply } else { self.destination_port };
        let (source_port, destination_port) = match self.protocol {
            ICMP => (self.source_port, echo(8, 0)),
            ICMPV6 => (self.source_port, echo(128, 129)),
            _ => (self.destination_port, self.source_port),
        };
        Self {
            source: self.destination,
            destination: self.source,
            source_port,
            destination_port,
            flags: SYN | ACK,
            ..self.clone()
        }
    }

    pub fn with_flags(self, flags: u8) -> Self {
        Self { flags, ..self }
    }

    pub fn with_source_port(self, source_port: u16) -> Self {
        Self { source_port, ..self }
    }

    /// The bytes on the wire, checksums included.
    pub fn to_bytes(&self) -> Vec<u8> {
        ip(self.source, self.destination, self.protocol, &self.transport())
    }

    /// The transport header and what follows.
    pub fn transport(&self) -> Vec<u8> {
        let (source, destination) = (self.source_port.to_be_bytes(), self.destination_port.to_be_bytes());
        let mut bytes = Vec::new();
        let checksum_at = match self.protocol {
            TCP => {
                bytes.extend([source, destination].concat());
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
                Some(16)
            }
            UDP => {
                let length = (8 + self.payload.len() as u16).to_be_bytes();
                bytes.extend([source, destination, length, [0, 0]].concat());
                Some(6)
            }
            ICMP | ICMPV6 => {
                bytes.extend([self.destination_port as u8, 0, 0, 0]);
                bytes.extend([source, [0, 1]].concat());
                Some(2)
            }
            _ => None,
        };
        bytes.extend(&self.payload);
        if let Some(at) = checksum_at {
            let sum = self.checksum(&bytes).to_be_bytes();
            bytes[at..at + 2].copy_from_slice(&sum);
        }
        bytes
    }

    fn checksum(&self, transport: &[u8]) -> u16 {
        let mut bytes = Vec::new();
        // ICMP over IPv4 alone has no pseudo header.
        if self.protocol != ICMP {
            bytes.extend(octets(self.source));
            bytes.extend(octets(self.destination));
            bytes.extend((transport.len() as u32).to_be_bytes());
            bytes.extend([0, 0, 0, self.protocol]);
        }
        bytes.extend(transport);
        checksum(&bytes)
    }
}

/// An IP packet without options or extension headers. Addresses of different families make an IPv6 packet with the
/// IPv4 one mapped.
pub fn ip(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => ipv4(source, destination, protocol, payload),
        (source, destination) => ipv6(in_v6(source), in_v6(destination), protocol, payload),
    }
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len() as u16).to_be_bytes();
    let mut bytes = vec![0x45, 0, length[0], length[1], 0, 7, 0x40, 0, 64, protocol, 0, 0];
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    let sum = checksum(&bytes).to_be_bytes();
    bytes[10..12].copy_from_slice(&sum);
    bytes.extend(payload);
    bytes
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u16).to_be_bytes();
    let mut bytes = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    bytes.extend(payload);
    bytes
}

/// RFC 1071.
pub fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn in_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_checksums_are_right() {
        for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            for protocol in [ICMP, TCP, UDP, ICMPV6, 47] {
                let (source, destination): (IpAddr, IpAddr) =
                    (source.parse().expect("an address"), destination.parse().expect("an address"));
                let packet = Packet::opening(&Flow { source, destination, protocol, port: 8 });
                let bytes = packet.to_bytes();
                let length = if source.is_ipv4() {
                    assert_eq!(checksum(&bytes[..20]), 0);
                    usize::from(u16::from_be_bytes([bytes[2], bytes[3]]))
                } else {
                    40 + usize::from(u16::from_be_bytes([bytes[4], bytes[5]]))
                };
                assert_eq!(length, bytes.len());
                let transport = packet.transport();
                // A checksum over itself is zero.
                assert!(protocol == 47 || packet.checksum(&transport) == 0, "protocol {protocol} of {source}");
            }
        }
    }
}
