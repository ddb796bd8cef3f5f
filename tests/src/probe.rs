//! Traffic that tells whether a flow passes.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::namespace::Namespace;

/// How long to wait for an answer that must come: emulated processors are slow.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for an answer that must not come; that the packet was dropped is seen by its counter.
pub const SILENCE: Duration = Duration::from_millis(600);

/// One attempt at a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Connects and has a few bytes echoed.
    Tcp(u16),
    /// Has a datagram echoed; sends it again every 100 ms, as WireGuard's first handshake may lose it.
    Udp(u16),
    /// An echo request.
    Ping,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    Answered,
    /// Nothing came back, or the kernel refused to send.
    Silent,
}

/// Echoes on TCP and UDP, both families, in one namespace, until dropped.
#[derive(Debug)]
pub struct EchoServer {
    stop: Arc<AtomicBool>,
}

impl EchoServer {
    pub fn start(host: &Namespace, ports: &[u16]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for &port in ports {
            let (tcp, udp) = host.enter(|| {
                let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
                Ok((TcpListener::bind(any)?, UdpSocket::bind(any)?))
            })?;
            serve_tcp(tcp, stop.clone())?;
            serve_udp(udp, stop.clone())?;
        }
        Ok(Self { stop })
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// How often servers look whether they should stop.
const TICK: Duration = Duration::from_millis(50);

fn serve_udp(socket: UdpSocket, stop: Arc<AtomicBool>) -> Result<()> {
    socket.set_read_timeout(Some(TICK))?;
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while !stop.load(Ordering::Relaxed) {
            if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], peer);
            }
        }
    });
    Ok(())
}

fn serve_tcp(listener: TcpListener, stop: Arc<AtomicBool>) -> Result<()> {
    listener.set_nonblocking(true)?;
    thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => {
                    let stop = stop.clone();
                    thread::spawn(move || echo(stream, &stop));
                }
                Err(_) => thread::park_timeout(Duration::from_millis(5)),
            }
        }
    });
    Ok(())
}

fn echo(mut stream: TcpStream, stop: &AtomicBool) {
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_nodelay(true);
    let _ = stream.set_read_timeout(Some(TICK));
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

/// Tries a flow from `host` to `destination`.
pub fn attempt(host: &Namespace, destination: IpAddr, traffic: Traffic, patience: Duration) -> Result<Seen> {
    match traffic {
        Traffic::Tcp(port) => attempt_tcp(host, SocketAddr::new(destination, port), patience),
        Traffic::Udp(port) => attempt_udp(host, SocketAddr::new(destination, port), patience),
        Traffic::Ping => attempt_ping(host, destination, patience),
    }
}

fn attempt_tcp(host: &Namespace, destination: SocketAddr, patience: Duration) -> Result<Seen> {
    host.enter(|| {
        let Ok(mut stream) = TcpStream::connect_timeout(&destination, patience) else { return Ok(Seen::Silent) };
        stream.set_read_timeout(Some(patience))?;
        let mut answer = [0; 4];
        let echoed = stream.write_all(b"ping").and_then(|()| stream.read_exact(&mut answer));
        Ok(if echoed.is_ok() && &answer == b"ping" { Seen::Answered } else { Seen::Silent })
    })
}

fn attempt_udp(host: &Namespace, destination: SocketAddr, patience: Duration) -> Result<Seen> {
    let socket = udp_socket(host, destination.ip())?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let deadline = Instant::now() + patience;
    let mut answer = [0; 4];
    while Instant::now() < deadline {
        // A refusal to send (EPERM from an egress hook) is silence too.
        let _ = socket.send_to(b"ping", destination);
        if let Ok((4, from)) = socket.recv_from(&mut answer)
            && from == destination
        {
            return Ok(Seen::Answered);
        }
    }
    Ok(Seen::Silent)
}

/// An unconnected socket of the family of `destination` in a namespace.
pub fn udp_socket(host: &Namespace, destination: IpAddr) -> Result<UdpSocket> {
    host.enter(|| {
        let any: IpAddr = match destination {
            IpAddr::V4(_) => [0, 0, 0, 0].into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        UdpSocket::bind(SocketAddr::new(any, 0)).context("failed to bind a UDP socket")
    })
}

fn attempt_ping(host: &Namespace, destination: IpAddr, patience: Duration) -> Result<Seen> {
    let mut command = Command::new("ping");
    let wait = patience.as_secs_f64().to_string();
    command.args(["-n", "-q", "-c", "1", "-W", &wait, &destination.to_string()]);
    let output = host.output(&mut command).context("`ping` is in the package iputils-ping")?;
    Ok(if output.status.success() { Seen::Answered } else { Seen::Silent })
}

/// Sends a datagram every millisecond and waits for the first echo. `None`: none within `limit`.
pub fn first_echo(host: &Namespace, destination: SocketAddr, limit: Duration) -> Result<Option<Instant>> {
    let socket = udp_socket(host, destination.ip())?;
    socket.set_read_timeout(Some(Duration::from_millis(1)))?;
    let deadline = Instant::now() + limit;
    let mut answer = [0; 4];
    while Instant::now() < deadline {
        let _ = socket.send_to(b"ping", destination);
        if socket.recv_from(&mut answer).is_ok() {
            return Ok(Some(Instant::now()));
        }
    }
    Ok(None)
}

/// A flow without an echo for this long was cut. It is longer than an emulated processor is busy with something else.
pub const BEAT_LIMIT: Duration = Duration::from_secs(1);

/// A TCP connection that has a byte echoed every millisecond.
#[derive(Debug)]
pub struct RunningFlow {
    stream: TcpStream,
}

impl RunningFlow {
    pub fn open(host: &Namespace, destination: SocketAddr) -> Result<Self> {
        let stream = host.enter(|| Ok(TcpStream::connect_timeout(&destination, PATIENCE)?))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(BEAT_LIMIT))?;
        Ok(Self { stream })
    }

    /// The same flow, believed dead only after `limit`.
    pub fn patient(self, limit: Duration) -> Result<Self> {
        self.stream.set_read_timeout(Some(limit))?;
        Ok(self)
    }

    /// Whether one more byte makes the round trip.
    pub fn beats(&mut self) -> bool {
        let mut byte = [0];
        self.stream.write_all(&[1]).and_then(|()| self.stream.read_exact(&mut byte)).is_ok()
    }

    /// Keeps on until an echo stays out for [`BEAT_LIMIT`], `limit` at most; returns when the last one arrived. `None`: it was
    /// still running at the limit.
    pub fn last_beat(&mut self, limit: Duration) -> Option<Instant> {
        let start = Instant::now();
        let mut last = start;
        while start.elapsed() < limit {
            if !self.beats() {
                return Some(last);
            }
            last = Instant::now();
        }
        None
    }
}
