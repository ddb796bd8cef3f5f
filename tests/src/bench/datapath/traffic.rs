//! Traffic between two hosts for some time, and how much of it arrived.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;
use crate::probe::udp_socket;

/// Where the servers are.
pub(in crate::bench) const PORT: u16 = 5_201;
/// How long a connection may take to come, or an answer, or any traffic at all.
const PATIENCE: Duration = Duration::from_secs(10);
/// Warm-up before the clock starts: TCP windows open, idle processors wake up.
const WARM_UP: Duration = Duration::from_millis(100);

/// One way to load a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum Load {
    Tcp {
        streams: usize,
    },
    /// Datagrams of 64 bytes, as many as the sender can make.
    SmallUdp,
    /// One byte there and one back, over TCP, one after the other.
    RoundTrips,
}

impl Load {
    pub(in crate::bench) const ALL: [Self; 4] =
        [Self::Tcp { streams: 1 }, Self::Tcp { streams: 8 }, Self::SmallUdp, Self::RoundTrips];

    pub(in crate::bench) fn name(self) -> &'static str {
        match self {
            Self::Tcp { streams: 1 } => "TCP, one stream",
            Self::Tcp { .. } => "TCP, eight streams",
            Self::SmallUdp => "UDP of 64 bytes",
            Self::RoundTrips => "1-byte request and response",
        }
    }

    pub(in crate::bench) fn unit(self) -> &'static str {
        match self {
            Self::Tcp { .. } => "Mbit/s",
            Self::SmallUdp => "packets/s",
            Self::RoundTrips => "round trips/s",
        }
    }
}

/// A host that sends and one that receives.
#[derive(Clone, Copy, Debug)]
pub(in crate::bench) struct Way<'a> {
    pub(in crate::bench) client: &'a Namespace,
    pub(in crate::bench) server: &'a Namespace,
    /// Of the server, inside the tunnel.
    pub(in crate::bench) address: IpAddr,
}

impl Way<'_> {
    /// How much arrives in a second, in the load's unit.
    pub(in crate::bench) fn carry(&self, load: Load, time: Duration) -> Result<f64> {
        match load {
            Load::Tcp { streams } => Ok(self.tcp(streams, time)? * 8.0 / 1e6),
            Load::SmallUdp => self.udp(time),
            Load::RoundTrips => self.round_trips(time),
        }
    }

    fn listen(&self) -> Result<TcpListener> {
        self.server.enter(|| TcpListener::bind(SocketAddr::new(self.address, PORT)).context("failed to listen"))
    }

    /// From a new socket of the client's to one of the server's.
    fn connect(&self, listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
        let ends = self.client.enter(|| Ok(TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?))?;
        let (served, _) = listener.accept()?;
        for end in [&ends, &served] {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
        }
        Ok((ends, served))
    }

    /// Bytes a second.
    fn tcp(&self, streams: usize, time: Duration) -> Result<f64> {
        let listener = self.listen()?;
        let pairs = (0..streams).map(|_| self.connect(&listener)).collect::<Result<Vec<_>>>()?;
        let (received, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            for (mut sender, mut receiver) in pairs {
                let (received, stop) = (&received, &stop);
                scope.spawn(move || {
                    let buffer = vec![0; 64 << 10];
                    while !stop.load(Ordering::Relaxed) && sender.write_all(&buffer).is_ok() {}
                    let _closed = sender.shutdown(std::net::Shutdown::Both);
                });
                scope.spawn(move || {
                    let mut buffer = vec![0; 128 << 10];
                    while let Ok(length @ 1..) = receiver.read(&mut buffer) {
                        received.fetch_add(length as u64, Ordering::Relaxed);
                    }
                });
            }
            let rate = rate(&received, time);
            stop.store(true, Ordering::Relaxed);
            rate
        })
    }

    /// Datagrams a second that arrive.
    fn udp(&self, time: Duration) -> Result<f64> {
        let server = self.server.enter(|| Ok(UdpSocket::bind(SocketAddr::new(self.address, PORT))?))?;
        server.set_read_timeout(Some(Duration::from_millis(50)))?;
        let client = udp_socket(self.client, self.address)?;
        client.connect(server.local_addr()?)?;
        let (received, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // A full queue is the point.
                    let _sent = client.send(&[0; 64]);
                }
            });
            scope.spawn(|| {
                let mut buffer = [0; 128];
                while !stop.load(Ordering::Relaxed) {
                    if server.recv(&mut buffer).is_ok() {
                        received.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            let rate = rate(&received, time);
            stop.store(true, Ordering::Relaxed);
            rate
        })
    }

    fn round_trips(&self, time: Duration) -> Result<f64> {
        let (mut client, mut server) = self.connect(&self.listen()?)?;
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut byte = [0];
                while server.read_exact(&mut byte).and_then(|()| server.write_all(&byte)).is_ok() {}
            });
            let mut turn = || client.write_all(&[1]).and_then(|()| client.read_exact(&mut [0]));
            let warm = Instant::now();
            while warm.elapsed() < WARM_UP {
                turn()?;
            }
            let start = Instant::now();
            let mut turns = 0;
            while start.elapsed() < time {
                turn()?;
                turns += 1;
            }
            let rate = f64::from(turns) / start.elapsed().as_secs_f64();
            let _closed = client.shutdown(std::net::Shutdown::Both);
            Ok(rate)
        })
    }
}

/// How fast a counter moves.
fn rate(counter: &AtomicU64, time: Duration) -> Result<f64> {
    moved(counter, WARM_UP)?;
    let start = Instant::now();
    let moved = moved(counter, time)?;
    Ok(moved as f64 / start.elapsed().as_secs_f64())
}

/// How far a counter moves in some time, or in as much more as it takes to move at all: a flood can keep the other end from
/// its processor for a while.
fn moved(counter: &AtomicU64, time: Duration) -> Result<u64> {
    let (start, before) = (Instant::now(), counter.load(Ordering::Relaxed));
    loop {
        // Traffic runs meanwhile: the measurement is a length of time, so the clock is what is waited for.
        thread::park_timeout(time.saturating_sub(start.elapsed()).max(Duration::from_millis(1)));
        let moved = counter.load(Ordering::Relaxed) - before;
        if start.elapsed() >= time && moved > 0 {
            return Ok(moved);
        }
        ensure!(start.elapsed() < time + PATIENCE, "nothing arrived in {} s", (time + PATIENCE).as_secs());
    }
}
