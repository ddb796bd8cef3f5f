//! The guard on the underlay: what the agent asks of it. It looks after itself, apart from the plan for the WireGuard
//! interface: it protects a node from being kept busy, and a node without it enforces all the same.

mod ebpf;
mod load;
mod maps;
mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;

use ebpf_common::counter::Counter;
use policy::PublicKey;

pub use ebpf::EbpfGuard;
pub use probe::GuardProbe;

use super::KernelError;

/// The guard as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub interfaces: Interfaces,
    pub mode: Mode,
    pub limits: Limits,
    /// The UDP port of WireGuard.
    pub port: u16,
    /// This node's: what a handshake's sender must know.
    pub public_key: PublicKey,
    /// Where current peers are.
    pub endpoints: BTreeSet<SocketAddr>,
}

/// Where the guard stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Interfaces {
    /// Where the default routes lead.
    #[default]
    Auto,
    These(BTreeSet<String>),
}

/// Which hook is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    Tc,
    /// XDP in the driver, and TC ingress where the driver cannot.
    Xdp,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub per_second: u32,
    pub burst: u32,
}

/// How many handshake messages pass, of each type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From one source prefix (/32, /64) that is no known endpoint.
    pub source: Limit,
    /// From all those together.
    pub total: Limit,
    /// From one known endpoint.
    pub endpoint: Limit,
    /// How many strangers' messages each CPU computes the MAC of.
    pub checks: Limit,
}

/// How the guard hangs on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP in the driver.
    Xdp,
    /// TC ingress, by TCX.
    Tcx,
    /// TC ingress, by a filter of the clsact qdisc.
    Clsact,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Xdp => "xdp",
            Self::Tcx => "tc (tcx)",
            Self::Clsact => "tc (clsact)",
        })
    }
}

/// The guard on one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardAttachment {
    pub interface: String,
    /// `None`: it is not there.
    pub hook: Option<Hook>,
    /// Other programs that run before it there.
    pub ahead: usize,
    /// Why it is not there, or not as it was asked for.
    pub note: Option<String>,
}

/// What came of one look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    pub attachments: Vec<GuardAttachment>,
    /// Interfaces on which it was put back: this process had it there, and somebody took it away.
    pub repaired: usize,
    /// What does not work as it should on all of them.
    pub error: Option<String>,
}

/// The guard's programs and maps.
pub trait Guard: Send {
    /// Makes it as it should be, as far as it can be had; `None`: nowhere.
    fn keep(&mut self, wanted: Option<&Wanted>) -> Kept;
    /// By interface and reason.
    fn counters(&mut self) -> Result<BTreeMap<(String, u8), Counter>, KernelError>;
    /// Takes everything off. For `noded leave` only.
    fn detach(&mut self) -> Result<(), KernelError>;
}
