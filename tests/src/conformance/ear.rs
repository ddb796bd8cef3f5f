//! Sockets on the lab's interface that tell of each packet at once whether it passed.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::socket::{setsockopt, sockopt};
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

/// Datagrams of one flow to a port of this host. The kernel judges and delivers what is written to a TUN interface before
/// the write returns, so nothing is waited for.
#[derive(Debug)]
pub struct Ear {
    tun: File,
    socket: UdpSocket,
    packet: Vec<u8>,
}

impl Ear {
    /// For a thread of the lab's namespace.
    pub fn new(tun: &File, source: &str, destination: &str, port: u16) -> Self {
        Self::of(tun, &Packet::opening(&flow(source, destination, &format!("udp/{port}"))))
    }

    /// Likewise, for copies of this datagram.
    pub fn of(tun: &File, packet: &Packet) -> Self {
        let tun = tun.try_clone().expect("a descriptor");
        Self { tun, socket: socket((packet.destination, packet.destination_port).into()), packet: packet.to_bytes() }
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

    /// Whether a datagram from the ear's port passes.
    pub fn says(&self, to: SocketAddr) -> bool {
        says(&self.socket, to)
    }
}

/// Datagrams from this host.
#[derive(Debug)]
pub struct Mouth {
    socket: UdpSocket,
    to: SocketAddr,
}

impl Mouth {
    /// For a thread of the lab's namespace.
    pub fn new(source: &str, destination: &str, port: u16) -> Self {
        let flow = flow(source, destination, &format!("udp/{port}"));
        Self { socket: socket((flow.source, 0).into()), to: (flow.destination, port).into() }
    }

    /// The other end's.
    pub fn port(&self) -> u16 {
        self.to.port()
    }

    /// Whether one more packet passes.
    pub fn says(&self) -> bool {
        says(&self.socket, self.to)
    }
}

/// A socket that does not wait, and is told of packets that were dropped before they left.
fn socket(own: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(own).expect("a socket");
    socket.set_nonblocking(true).expect("a socket that does not wait");
    if own.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)
    }
    .expect("a socket that hears of errors");
    socket
}

fn says(socket: &UdpSocket, to: SocketAddr) -> bool {
    match socket.send_to(&[0; 8], to) {
        Ok(_) => true,
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => false,
        Err(error) => panic!("the socket {}: {error}", socket.as_raw_fd()),
    }
}
