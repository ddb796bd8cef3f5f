//! A socket on the lab's interface that tells at once whether the packet just written to the interface passed.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::UdpSocket;

use node::kernel::datapath::packet::Packet;

use super::network::flow;
use super::{INTERFACE, Lab};

/// The host's own addresses in the labs of [`super::network::small`], as `web1`.
const ADDRESSES: [&str; 2] = ["10.42.1.1/16", "fd42:0:0:1::1/48"];

impl Lab {
    /// Gives the interface the addresses of `web1`, so that what passes ingress reaches a socket, and what is sent to the
    /// mesh reaches egress.
    pub fn give_addresses(&self) {
        for address in ADDRESSES {
            let nodad = address.contains(':').then_some("nodad");
            let words = ["address", "add", address, "dev", INTERFACE];
            self.run("ip", &words.into_iter().chain(nodad).collect::<Vec<_>>());
        }
    }
}

/// One flow of datagrams to a port of this host. The kernel judges and delivers what is written to a TUN interface before the
/// write returns, so nothing is waited for.
#[derive(Debug)]
pub struct Ear {
    tun: File,
    socket: UdpSocket,
    packet: Vec<u8>,
}

impl Ear {
    /// For a thread of the lab's namespace.
    pub fn new(lab: &Lab, source: &str, destination: &str, port: u16) -> Self {
        Self::of(lab.tun.try_clone().expect("a descriptor"), source, destination, port)
    }

    pub fn of(tun: File, source: &str, destination: &str, port: u16) -> Self {
        let flow = flow(source, destination, &format!("udp/{port}"));
        let socket = UdpSocket::bind((flow.destination, port)).expect("a socket");
        socket.set_nonblocking(true).expect("a socket that does not wait");
        Self { tun, socket, packet: Packet::opening(&flow).to_bytes() }
    }

    /// Bytes from the IP header on.
    pub fn packet_length(&self) -> u64 {
        self.packet.len() as u64
    }

    /// Whether one more packet passes.
    pub fn hears(&mut self) -> bool {
        self.tun.write_all(&self.packet).expect("written");
        match self.socket.recv(&mut [0; 64]) {
            Ok(_) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("the socket: {error}"),
        }
    }
}
