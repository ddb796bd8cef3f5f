//! A flood of forged handshake initiations from spoofed sources, as fast as one sender can send.
#![allow(unsafe_code, reason = "sendmmsg(2) on a packet socket is called as it is")]

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use nix::net::if_::if_nametoindex;

use crate::forge;
use crate::namespace::Namespace;

/// A flood ends by itself after this time, whatever becomes of the test.
const LIMIT: Duration = Duration::from_secs(120);
/// Frames in one system call.
const BATCH: usize = 64;

/// Whom a flood is for.
#[derive(Clone, Debug)]
pub struct Target {
    /// The interface of the sending namespace, whose other end is the target's.
    pub interface: String,
    pub mac: [u8; 6],
    pub address: Ipv4Addr,
    pub port: u16,
}

impl Target {
    /// The host behind an interface of the sender's, by its own `eth0`.
    pub fn of(host: &Namespace, interface: String, address: Ipv4Addr, port: u16) -> Result<Self> {
        let text = host.enter(|| Ok(std::fs::read_to_string("/sys/class/net/eth0/address")?))?;
        let bytes = hex::decode(text.trim().replace(':', ""))?;
        let mac = bytes.try_into().ok().context("`eth0` has no MAC of 6 bytes")?;
        Ok(Self { interface, mac, address, port })
    }
}

/// What was sent while something else was done.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub frames: u64,
    pub time: Duration,
}

impl Sent {
    pub fn per_second(&self) -> f64 {
        self.frames as f64 / self.time.as_secs_f64()
    }
}

/// Floods for as long as `work` takes.
pub fn during<T>(sender: &Namespace, target: &Target, work: impl FnOnce() -> Result<T>) -> Result<(T, Sent)> {
    let (stop, frames) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let flood = scope.spawn(|| sender.enter(|| send(target, &stop, &frames)));
        // A flood that fails to start is reported by the join below.
        while frames.load(Ordering::Relaxed) == 0 && !flood.is_finished() {
            thread::yield_now();
        }
        let begin = Instant::now();
        let before = frames.load(Ordering::Relaxed);
        let done = work();
        let sent = Sent { frames: frames.load(Ordering::Relaxed) - before, time: begin.elapsed() };
        stop.store(true, Ordering::Relaxed);
        flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((done?, sent))
    })
}

/// Everything of a frame that changes from one to the next.
const SOURCE: usize = 14 + 12;
const IP_CHECKSUM: usize = 14 + 10;
const SOURCE_PORT: usize = 14 + 20;
const UDP_CHECKSUM: usize = 14 + 20 + 6;
const SENDER_INDEX: usize = 14 + 20 + 8 + 4;

fn template(target: &Target) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], target.mac)
        .ipv4([0, 0, 0, 0], target.address.octets(), 64)
        .udp(0, target.port)
        .write(&mut frame, &forge::initiation(1))?;
    // None, as IPv4 allows.
    frame[UDP_CHECKSUM..UDP_CHECKSUM + 2].fill(0);
    Ok(frame)
}

fn send(target: &Target, stop: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    let socket = packet_socket(&target.interface).context("failed to open a packet socket")?;
    let template = template(target)?;
    let zero = u16::from_be_bytes([template[IP_CHECKSUM], template[IP_CHECKSUM + 1]]);
    let mut frames = vec![template; BATCH];
    let mut vectors: Vec<libc::iovec> = frames
        .iter_mut()
        .map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = vectors
        .iter_mut()
        .map(|vector| {
            // SAFETY: all zero is a valid header: no address, no control data.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (vector, 1);
            message
        })
        .collect();
    let begin = Instant::now();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while !stop.load(Ordering::Relaxed) && begin.elapsed() < LIMIT {
        for vector in &vectors {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // SAFETY: the vector is of a frame that lives here and that the kernel does not read meanwhile.
            let frame = unsafe { std::slice::from_raw_parts_mut(vector.iov_base.cast::<u8>(), vector.iov_len) };
            vary(frame, zero, state);
        }
        // SAFETY: headers, vectors and frames are alive and as many as is said.
        let result = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as u32, 0) };
        match result {
            1.. => drop(sent.fetch_add(result as u64, Ordering::Relaxed)),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENOBUFS) => thread::yield_now(),
                error => return Err(error).context("failed to send"),
            },
        }
    }
    Ok(())
}

/// Another source address and port, and another session. The first byte stays clear of addresses that routers drop.
fn vary(frame: &mut [u8], zero: u16, random: u64) {
    let random = random.to_ne_bytes();
    let source = [20 + random[0] % 80, random[1], random[2], random[3]];
    frame[SOURCE..SOURCE + 4].copy_from_slice(&source);
    // The checksum of the same header with source 0.0.0.0, less what the source adds.
    let mut sum = u32::from(!zero);
    sum +=
        u32::from(u16::from_be_bytes([source[0], source[1]])) + u32::from(u16::from_be_bytes([source[2], source[3]]));
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    frame[IP_CHECKSUM..IP_CHECKSUM + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    frame[SOURCE_PORT..SOURCE_PORT + 2].copy_from_slice(&random[4..6]);
    frame[SENDER_INDEX..SENDER_INDEX + 4].copy_from_slice(&random[2..6]);
}

fn packet_socket(interface: &str) -> Result<OwnedFd> {
    const PACKET_QDISC_BYPASS: libc::c_int = 20;
    let index = if_nametoindex(interface)?;
    // SAFETY: the call returns a new descriptor, or -1. Protocol 0: it receives nothing.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: the descriptor is new, and this is its only owner.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all zero is a valid address of this kind.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (address.sll_family, address.sll_ifindex) = (libc::AF_PACKET as u16, index.cast_signed());
    let one: libc::c_int = 1;
    // SAFETY: both values are as long as is said and live as long as the calls.
    let failed = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32) < 0
            || libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_QDISC_BYPASS,
                (&raw const one).cast(),
                size_of::<libc::c_int>() as u32,
            ) < 0
    };
    if failed { Err(io::Error::last_os_error().into()) } else { Ok(socket) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_whole_packets_from_somebody_else_each_time() {
        let target =
            Target { interface: "lo".to_owned(), mac: [2; 6], address: Ipv4Addr::new(192, 0, 2, 1), port: 51820 };
        let mut frame = template(&target).unwrap();
        let zero = u16::from_be_bytes([frame[IP_CHECKSUM], frame[IP_CHECKSUM + 1]]);
        let mut sources = std::collections::BTreeSet::new();
        for random in [1u64, 0xffff_ffff_ffff_ffff, 0x1234_5678_9abc_def0, 0x0101_0000_ff00_ffff] {
            vary(&mut frame, zero, random);
            let (header, _) = etherparse::Ipv4Header::from_slice(&frame[14..]).unwrap();
            assert_eq!(header.calc_header_checksum(), header.header_checksum, "{random:x}");
            sources.insert(header.source);
        }
        assert_eq!(sources.len(), 4);
    }
}
