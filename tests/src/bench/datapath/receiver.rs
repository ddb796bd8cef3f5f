//! A host that packets arrive at, with one filter or none in front of sockets that throw everything away.
#![allow(unsafe_code, reason = "setsockopt(2) is called as it is")]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebpf_common::INGRESS;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use node::kernel::Datapath;
use node::kernel::datapath::EbpfDatapath;
use node::lower::{RuleSlots, lower};

use crate::bench::scale::{Scale, ports};
use crate::conformance::{INTERFACE, foreign};
use crate::mesh::Family;

/// What stands in front of the sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    None,
    /// A program that lets everything pass.
    Empty,
    Rampart,
    NftLinear {
        conntrack: bool,
    },
    NftSet {
        conntrack: bool,
    },
    Iptables,
}

impl Filter {
    pub(super) const ALL: [Self; 8] = [
        Self::None,
        Self::Empty,
        Self::Rampart,
        Self::NftLinear { conntrack: false },
        Self::NftSet { conntrack: false },
        Self::NftLinear { conntrack: true },
        Self::NftSet { conntrack: true },
        Self::Iptables,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "no policy",
            Self::Empty => "a program that does nothing",
            Self::Rampart => "Rampart",
            Self::NftLinear { conntrack: false } => "nftables, linear rules",
            Self::NftSet { conntrack: false } => "nftables, a concatenated set",
            Self::NftLinear { conntrack: true } => "nftables, conntrack before linear rules",
            Self::NftSet { conntrack: true } => "nftables, conntrack before a concatenated set",
            Self::Iptables => "iptables, linear rules",
        }
    }
}

/// What filters for as long as it is there, where that is not the namespace's own.
enum Held {
    Nothing,
    Link { _fd: OwnedFd },
    Datapath { _datapath: Box<EbpfDatapath> },
}

/// The host. Its namespace lives as long as what is held of it.
pub(super) struct Receiver {
    /// Packets written here arrive.
    tun: File,
    sockets: Vec<UdpSocket>,
    /// The kernel's table of the namespace's sockets.
    table: File,
    _held: Held,
    next: usize,
}

impl Receiver {
    /// The policy is that of the subject of `scale`.
    pub(super) fn new(filter: Filter, scale: &Scale, family: Family, bpffs: &Path) -> Result<Self> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                Self::build(filter, scale, family, bpffs)
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
        .with_context(|| format!("in front of the sockets: {}", filter.name()))
    }

    fn build(filter: Filter, scale: &Scale, family: Family, bpffs: &Path) -> Result<Self> {
        let tun = foreign::tun(INTERFACE)?;
        let address = scale.address(family).to_string();
        let (version, network) = match family {
            Family::V4 => ("-4", "10.0.0.0/8"),
            Family::V6 => ("-6", "fd42::/32"),
        };
        let nodad: &[&str] = if family == Family::V6 { &["nodad"] } else { &[] };
        run("ip", &[&[version, "address", "add", &address, "dev", INTERFACE], nodad].concat(), "")?;
        run("ip", &[version, "route", "add", network, "dev", INTERFACE], "")?;
        let mut held = Held::Nothing;
        match filter {
            Filter::None => {}
            Filter::Empty => held = Held::Link { _fd: foreign::attach_ahead(if_nametoindex(INTERFACE)?, INGRESS)? },
            Filter::Rampart => {
                let tables = lower(&scale.slice(1)?, &mut RuleSlots::new())?;
                let mut rampart = EbpfDatapath::new(INTERFACE, bpffs);
                rampart.attach()?;
                rampart.switch(&tables)?;
                rampart.settle()?;
                held = Held::Datapath { _datapath: Box::new(rampart) };
            }
            Filter::NftLinear { conntrack } => run("nft", &["-f", "-"], &nft_linear(scale, family, conntrack))?,
            Filter::NftSet { conntrack } => run("nft", &["-f", "-"], &nft_set(scale, family, conntrack))?,
            Filter::Iptables => run(iptables(family), &[], &iptables_linear(scale, family))?,
        }
        let bind = |port| -> Result<UdpSocket> {
            let socket = UdpSocket::bind(SocketAddr::new(scale.address(family), port))?;
            throw_away(&socket)?;
            Ok(socket)
        };
        let sockets = ports().map(bind).collect::<Result<_>>()?;
        let table = match family {
            Family::V4 => "/proc/thread-self/net/udp",
            Family::V6 => "/proc/thread-self/net/udp6",
        };
        Ok(Self { tun, sockets, table: File::open(table)?, _held: held, next: 0 })
    }

    /// Lets every flow be answered once, so that a filter which knows flows knows these.
    pub(super) fn establish(&mut self, packets: &[Vec<u8>], openers: &[SocketAddr]) -> Result<()> {
        for (packet, opener) in packets.iter().zip(openers) {
            self.tun.write_all(packet)?;
            let at = packet.len() - PAYLOAD - 6;
            let port = u16::from_be_bytes([packet[at], packet[at + 1]]);
            let socket = self.sockets.iter().find(|socket| socket.local_addr().is_ok_and(|own| own.port() == port));
            let socket = socket.with_context(|| format!("nothing is bound to port {port}"))?;
            // What leaves is not read; a full queue does no harm.
            let _sent = socket.send_to(&[0; PAYLOAD], opener);
        }
        Ok(())
    }

    /// Writes packets one after the other for some time; nanoseconds that each took until it was thrown away.
    pub(super) fn receive(&mut self, packets: &[Vec<u8>], time: Duration) -> Result<f64> {
        /// Packets between two looks at the clock.
        const BATCH: usize = 16;
        let start = Instant::now();
        let mut sent = 0;
        while start.elapsed() < time {
            for _ in 0..BATCH {
                self.next = (self.next + 1) % packets.len();
                self.tun.write_all(&packets[self.next])?;
            }
            sent += BATCH;
        }
        Ok(start.elapsed().as_nanos() as f64 / sent as f64)
    }

    /// Packets that reached a socket since the beginning.
    pub(super) fn received(&mut self) -> Result<u64> {
        let mut text = String::new();
        self.table.rewind()?;
        self.table.read_to_string(&mut text)?;
        let drops = text.lines().skip(1).filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok());
        Ok(drops.sum())
    }
}

/// Bytes after the UDP header of every packet.
pub(super) const PAYLOAD: usize = 8;

/// A classic filter that takes nothing: the packet has gone all the way, and costs no more.
fn throw_away(socket: &UdpSocket) -> io::Result<()> {
    let mut nothing = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut nothing };
    // SAFETY: the kernel copies the one instruction during the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn keyword(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn nft(before: &str, conntrack: bool, rules: &str) -> String {
    let known = if conntrack { "ct state established,related accept\n" } else { "" };
    format!(
        "table inet filter {{\n{before}\nchain input {{\ntype filter hook input priority 0; policy drop;\n{known}{rules}\n}}\n}}\n"
    )
}

fn nft_linear(scale: &Scale, family: Family, conntrack: bool) -> String {
    let mut rules = String::new();
    for partner in &scale.partners {
        let (net, port) = (partner.net(family), partner.port);
        let _infallible = writeln!(rules, "{} saddr {net} udp dport {port} accept", keyword(family));
    }
    nft("", conntrack, &rules)
}

fn nft_set(scale: &Scale, family: Family, conntrack: bool) -> String {
    let kind = match family {
        Family::V4 => "ipv4_addr",
        Family::V6 => "ipv6_addr",
    };
    let elements: Vec<String> =
        scale.partners.iter().map(|partner| format!("{} . {}", partner.net(family), partner.port)).collect();
    let set = format!(
        "set allowed {{\ntype {kind} . inet_service; flags interval;\nelements = {{ {} }}\n}}",
        elements.join(", ")
    );
    nft(&set, conntrack, &format!("{} saddr . udp dport @allowed accept", keyword(family)))
}

/// The one that is not nftables underneath, where it is there.
fn iptables(family: Family) -> &'static str {
    let [legacy, any] = match family {
        Family::V4 => ["iptables-legacy-restore", "iptables-restore"],
        Family::V6 => ["ip6tables-legacy-restore", "ip6tables-restore"],
    };
    let is_there = |folder: &str| fs::exists(Path::new(folder).join(legacy)).unwrap_or(false);
    if ["/usr/sbin", "/sbin"].into_iter().any(is_there) { legacy } else { any }
}

fn iptables_linear(scale: &Scale, family: Family) -> String {
    let mut rules = "*filter\n:INPUT DROP [0:0]\n".to_owned();
    for partner in &scale.partners {
        let (net, port) = (partner.net(family), partner.port);
        let _infallible = writeln!(rules, "-A INPUT -s {net} -p udp --dport {port} -j ACCEPT");
    }
    rules + "COMMIT\n"
}

/// Runs a program of this namespace to its end, which must be good.
fn run(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to start `{program}`; `cargo xtask setup` brings it"))?;
    child.stdin.take().context("no standard input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "`{program} {}` ended with {}: {}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).chars().take(500).collect::<String>()
    );
    Ok(())
}
