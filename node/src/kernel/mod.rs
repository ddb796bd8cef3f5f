//! What the agent asks of the kernel. Everything above this module sees these traits and plain data; which WireGuard
//! carries the packets, and whether TCX or clsact holds the programs, is nobody else's business.
//!
//! The calls block; the agent makes them from a thread of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use policy::{Generation, PublicKey, Revision};

use crate::key::PrivateKey;
use crate::lower::Tables;

pub mod datapath;
pub mod fake;
pub mod guard;
pub mod inspect;
pub mod link;
pub mod program;
pub mod wireguard;

pub use guard::Guard;
pub use inspect::Inspect;
pub use program::{Attachment, Program};

/// Which WireGuard carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The kernel's own.
    Kernel,
    /// gotatun, in a process of its own (`noded wireguard`), over a TUN device.
    Userspace,
}

/// A WireGuard device as read back from whatever carries it. The private key is never read back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// `None`: no key set yet.
    pub public_key: Option<PublicKey>,
    pub listen_port: u16,
    pub peers: BTreeMap<PublicKey, DevicePeer>,
}

/// One peer as read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePeer {
    pub endpoint: Option<SocketAddr>,
    pub allowed_ips: BTreeSet<IpNet>,
    pub persistent_keepalive: Option<Duration>,
    pub last_handshake: Option<SystemTime>,
    /// Bytes, encrypted payload as WireGuard counts it.
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// One peer as it should be. `endpoint: None` leaves a learned endpoint alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    pub public_key: PublicKey,
    pub endpoint: Option<SocketAddr>,
    pub allowed_ips: BTreeSet<IpNet>,
    pub persistent_keepalive: Option<Duration>,
}

/// The WireGuard half of the interface. `interface` is given at construction.
pub trait WireGuard: Send {
    fn backend(&self) -> Backend;
    /// Creates the interface (kernel: link of kind `wireguard`; userspace: persistent TUN), down and without an address.
    /// Refuses a foreign link of that name. Does nothing when it is there and ours.
    fn create(&mut self) -> Result<(), KernelError>;
    /// Makes sure that something serves the device (userspace: the process runs), after the datapath is attached.
    fn serve(&mut self) -> Result<(), KernelError>;
    /// `None`: there is no such device, or (userspace) no process serves it.
    fn observe(&mut self) -> Result<Option<Device>, KernelError>;
    fn set_device(&mut self, key: &PrivateKey, listen_port: u16) -> Result<(), KernelError>;
    /// Adds or changes one peer without disturbing the sessions of others, or its own where it can be helped.
    fn set_peer(&mut self, peer: &PeerConfig) -> Result<(), KernelError>;
    fn remove_peer(&mut self, peer: &PublicKey) -> Result<(), KernelError>;
    /// Stops the process, deletes the link. For `noded leave` only.
    fn destroy(&mut self) -> Result<(), KernelError>;
}

/// The interface as read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkState {
    pub index: u32,
    pub kind: LinkKind,
    pub up: bool,
    pub mtu: u32,
    /// Link-local addresses that the kernel made are left out.
    pub addresses: BTreeSet<IpNet>,
    /// Routes of the main table through this link that have our protocol number ([`link::ROUTE_PROTOCOL`]).
    pub routes: BTreeSet<IpNet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    WireGuard,
    Tun,
    Foreign,
}

/// Addresses, MTU, routes and up/down, by rtnetlink.
pub trait Link: Send {
    fn observe(&mut self) -> Result<Option<LinkState>, KernelError>;
    fn set_mtu(&mut self, mtu: u32) -> Result<(), KernelError>;
    fn set_up(&mut self, up: bool) -> Result<(), KernelError>;
    fn add_address(&mut self, address: IpNet) -> Result<(), KernelError>;
    fn remove_address(&mut self, address: IpNet) -> Result<(), KernelError>;
    fn add_route(&mut self, prefix: IpNet) -> Result<(), KernelError>;
    fn remove_route(&mut self, prefix: IpNet) -> Result<(), KernelError>;
    /// Prefixes to which packets get no further where no other route takes them: they do not leave in clear while the
    /// link is down or gone. They do not go with it.
    fn barriers(&mut self) -> Result<BTreeSet<IpNet>, KernelError>;
    fn add_barrier(&mut self, prefix: IpNet) -> Result<(), KernelError>;
    fn remove_barrier(&mut self, prefix: IpNet) -> Result<(), KernelError>;
}

/// How the programs hang on the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMethod {
    Tcx,
    Clsact,
}

/// The drop at XDP, ahead of the programs that decide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EarlyDrop {
    /// Not asked for.
    #[default]
    Off,
    On,
    /// Asked for and refused; the policy is enforced without it.
    Failed(String),
}

/// The datapath as read back from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatapathState {
    pub attachment: AttachMethod,
    /// Whether our program is attached, and first, for egress and ingress.
    pub egress: bool,
    pub ingress: bool,
    /// Others that run ahead of our program where it is attached and not first.
    pub ahead: Vec<Program>,
    /// 0: no policy was ever loaded.
    pub generation: Generation,
    pub revision: Revision,
    /// Of the agent that asks.
    pub early_drop: EarlyDrop,
}

/// The eBPF half of the interface.
pub trait Datapath: Send {
    /// Attaches deny-all or takes over what is pinned, without a gap. The link must exist; does nothing that is done.
    fn attach(&mut self) -> Result<(), KernelError>;
    fn observe(&mut self) -> Result<DatapathState, KernelError>;
    /// Puts the tables in force: idle copy filled, one switch, then the other copy follows. On failure the running copy
    /// is untouched.
    fn switch(&mut self, tables: &Tables) -> Result<Generation, KernelError>;
    /// Ends the last switch: waits until no packet is judged by the copy that went, and brings that up to date. The next
    /// switch does it otherwise; off the path of a change it costs nobody anything.
    fn settle(&mut self) -> Result<(), KernelError> {
        Ok(())
    }
    /// Believes nothing of what the tables hold: they were found to be other than they should be. The next switch writes all.
    fn distrust(&mut self) {}
    /// Forgets flows with an end in one of these addresses (their holder changed).
    fn forget_flows(&mut self, addresses: &[IpNet]) -> Result<usize, KernelError>;
    /// Deletes idle records; returns how many.
    fn collect_flows(&mut self) -> Result<usize, KernelError>;
    /// Detaches and unpins everything. For `noded leave` only.
    fn detach(&mut self) -> Result<(), KernelError>;
}

/// A step that the kernel refused. The text says what was tried, on what, and the remedy where there is one.
#[derive(Debug)]
pub struct KernelError {
    pub what: String,
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl KernelError {
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    pub fn with(what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { what: what.into(), source: Some(source.into()) }
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for KernelError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
