//! What `nodectl` shows: the daemon fills these types, and they travel, print as JSON and YAML, and make tables. The modules
//! fill them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ebpf_common::EGRESS;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

#[cfg(test)]
pub(crate) mod example;
pub mod explanation;
pub mod flows;
pub mod policy;
pub mod status;
#[cfg(test)]
mod tests;
mod traffic;
mod unanswered;
pub mod verified;

pub use traffic::{DropFilter, DropRecord, Drops, Event, FlowFilter, FlowState, Flows, LiveFlow, Suppressed};
pub use unanswered::Unanswered;
pub use verified::Verified;

/// The node as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    pub network: String,
    pub node: String,
    pub interface: String,
    pub version: String,
    pub addresses: Vec<IpAddr>,
    /// "kernel" or "userspace".
    pub wireguard: String,
    pub listen_port: u16,
    pub public_key: String,
    pub link_up: bool,
    /// "tcx" or "clsact"; absent where nothing is attached.
    pub attachment: Option<String>,
    /// "on", "off", or why it is not there although it was asked for.
    pub early_drop: String,
    /// On the interface, by hook and in the order in which they run.
    pub programs: Vec<Program>,
    /// Of the tables in force; 0: no policy was ever loaded, and everything is denied.
    pub revision: u64,
    pub generation: u64,
    /// Newest revision that the controller sent.
    pub received_revision: u64,
    pub controller: Controller,
    pub peers: usize,
    pub flow_records: usize,
    pub guard: Guard,
    /// Since the daemon started.
    pub drift_repairs: u64,
    /// Seconds since the epoch.
    pub certificate_expires_at: u64,
    /// What the policy requires that this version does not understand: what that concerns is denied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lacks: Vec<String>,
    /// What could not be enforced, and why.
    pub error: Option<String>,
}

/// The guard on the underlay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Guard {
    /// Whether there is to be one.
    pub enabled: bool,
    /// Why it is nowhere, or not up to date.
    pub error: Option<String>,
    #[serde(rename = "places")]
    pub attachments: Vec<GuardAttachment>,
}

/// The guard on one interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuardAttachment {
    pub interface: String,
    /// "xdp", "tc (tcx)" or "tc (clsact)"; absent where it is not attached.
    pub hook: Option<String>,
    /// Other programs that run before it there.
    pub ahead: usize,
    /// Why it is not there, or not as it was asked for.
    pub note: Option<String>,
    /// Datagrams to WireGuard's port that passed, and those that did not, by reason.
    pub passed: u64,
    pub dropped: BTreeMap<String, u64>,
}

/// A program on the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Program {
    /// "tc egress", "tc ingress" or "xdp".
    pub hook: String,
    /// From 1.
    pub position: usize,
    /// Absent: a filter that is no BPF program.
    pub id: Option<u32>,
    /// Absent: `noded` lacks CAP_SYS_ADMIN, or the program has none.
    pub name: Option<String>,
    /// Whether it is Rampart's.
    pub ours: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Controller {
    pub connected: bool,
    pub endpoints: Vec<String>,
    /// Seconds since the epoch at which the present state began; 0: not tried yet.
    pub since: u64,
    /// Why there is no connection.
    pub error: Option<String>,
}

/// One peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Peer {
    /// Absent: the kernel has a peer that the policy does not know.
    pub name: Option<String>,
    pub public_key: String,
    pub endpoint: Option<SocketAddr>,
    pub allowed_ips: Vec<IpNet>,
    /// Seconds since the epoch.
    pub latest_handshake: Option<u64>,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub state: PeerState,
}

/// Policy and kernel, compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerState {
    Ok,
    /// The kernel lacks it.
    Missing,
    /// The policy does not know it.
    Unknown,
    /// Its allowed-ips are not the policy's.
    Differs,
}

/// The kernel's tables, read back, in the policy's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Policy {
    pub status: Status,
    /// Empty: the kernel's tables are what the slice lowers to.
    pub differences: Vec<String>,
    pub entries: Vec<Entry>,
}

/// What one pair of cidrs gets for some services, as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    pub direction: Direction,
    pub source: End,
    pub destination: End,
    /// "any other" where it is what the others of the pair leave over.
    pub services: Vec<String>,
    /// "allow" or "deny".
    pub verdict: String,
    /// A rule's name, or a reason.
    pub decided_by: String,
    /// Packets and bytes between the two cidrs for this reason; absent where another entry of the pair shows them.
    pub packets: Option<u64>,
    pub bytes: Option<u64>,
}

/// One end: a cidr, or those of its addresses that the policy tells apart from the rest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct End {
    pub cidr: String,
    /// Empty: all of the cidr.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub only: Vec<IpNet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    Egress,
    Ingress,
}

/// A question: what happens to the first packet of this flow?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Question {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub port: u16,
}

/// The answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Explanation {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub service: String,
    /// Cidrs as the slice has them.
    pub source_cidr: Option<String>,
    pub destination_cidr: Option<String>,
    /// The probe program on the live tables, in each direction that this node is an end of.
    pub kernel: Vec<KernelAnswer>,
    /// The slice as the controller compiled it.
    pub compiled: Option<Answer>,
    /// The controller's interpreter.
    pub interpreted: Interpreted,
    pub revision: u64,
    /// Whether everyone who answered for this revision says the same.
    pub agree: bool,
    pub allowed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct KernelAnswer {
    pub direction: Direction,
    #[serde(flatten)]
    pub answer: Answer,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Answer {
    pub allowed: bool,
    pub reason: String,
    pub rule: Option<String>,
}

/// What the controller's interpreter says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Interpreted {
    pub answer: Option<Answer>,
    /// That it answers for: the network's newest. This node's is the newest that concerns it.
    pub revision: Option<u64>,
    /// Why there is no answer.
    pub unavailable: Option<String>,
}

impl Direction {
    /// Of the datapath's number.
    pub fn of(direction: u32) -> Self {
        if direction == EGRESS { Self::Egress } else { Self::Ingress }
    }
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        })
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.only.as_slice() {
            [] => f.pad(&self.cidr),
            [first, second] => f.pad(&format!("{} ({first} {second})", self.cidr)),
            [first] => f.pad(&format!("{} ({first})", self.cidr)),
            [first, rest @ ..] => f.pad(&format!("{} ({first} and {} more)", self.cidr, rest.len())),
        }
    }
}
