//! Packets that were denied and flows that live, as `nodectl drops` and `nodectl flows` show them.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Direction;

/// One packet that the kernel reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Event {
    /// RFC 3339, UTC.
    pub time: String,
    pub direction: Direction,
    /// The WireGuard interface; of what the guard dropped, the one by which it came.
    pub interface: String,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// TCP and UDP.
    pub source_port: Option<u16>,
    pub destination_port: Option<u16>,
    /// Such as "tcp/443", "icmp/8", "proto/47".
    pub service: String,
    /// Absent: in no cidr, or dropped before anybody looked.
    pub source_cidr: Option<String>,
    pub destination_cidr: Option<String>,
    pub reason: String,
    pub rule: Option<String>,
    /// Of the tables that judged it; absent: the guard did, which knows no policy.
    pub revision: Option<u64>,
    /// Bytes from the IP header on.
    pub length: u32,
}

/// Events of one reason that nobody will ever see: the kernel counts the packets and limits how many it reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Suppressed {
    pub reason: String,
    /// Since the daemon started; in a stream also since the last such record.
    pub events: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_last: Option<u64>,
}

/// The denied packets that the daemon remembers, the oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Drops {
    pub drops: Vec<Event>,
    /// Older ones that were reported and are forgotten, whatever the filter.
    pub forgotten: u64,
    pub suppressed: Vec<Suppressed>,
}

/// What a follower gets, one after the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum DropRecord {
    Drop(Event),
    Suppressed(Suppressed),
    /// Events that were older than what the daemon remembers when the stream began.
    Forgotten {
        events: u64,
    },
    /// Records that this follower was too slow for.
    Missed {
        records: u64,
    },
}

/// Which denied packets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DropFilter {
    #[serde(default)]
    pub reason: Option<String>,
    #[serde(default)]
    pub source: Option<IpNet>,
    #[serde(default)]
    pub destination: Option<IpNet>,
}

impl DropFilter {
    pub fn admits(&self, event: &Event) -> bool {
        self.admits_reason(&event.reason)
            && self.source.is_none_or(|net| net.contains(&event.source))
            && self.destination.is_none_or(|net| net.contains(&event.destination))
    }

    /// Of what was suppressed only the reason is known.
    pub fn admits_reason(&self, reason: &str) -> bool {
        self.reason.as_deref().is_none_or(|wanted| wanted == reason)
    }
}

/// Records of flows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Flows {
    /// In the kernel.
    pub total: usize,
    /// That the filter admits.
    pub matching: usize,
    /// The first of those, by source, destination, protocol and ports.
    pub flows: Vec<LiveFlow>,
}

/// One record: a flow as its opener sends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LiveFlow {
    /// Egress: this node opened it. Absent where the node has no policy to say which addresses are its own.
    pub direction: Option<Direction>,
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// TCP and UDP; of an ICMP echo its identifier.
    pub source_port: Option<u16>,
    /// TCP and UDP.
    pub destination_port: Option<u16>,
    /// Such as "tcp/443", "icmp", "proto/47".
    pub service: String,
    pub source_cidr: Option<String>,
    pub destination_cidr: Option<String>,
    pub state: FlowState,
    /// Why the opener may send, when last judged.
    pub reason: String,
    pub rule: Option<String>,
    /// Seconds since its first and its last packet.
    pub age: u64,
    pub idle: u64,
    /// Seconds until it is forgotten, if it stays idle.
    pub expires_in: u64,
    /// From the opener.
    pub packets: u64,
    pub bytes: u64,
    /// To the opener.
    pub reply_packets: u64,
    pub reply_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowState {
    /// No reply was seen.
    Opening,
    Established,
    /// TCP: a FIN or RST was seen.
    Closing,
    /// The policy denies what it was opened for; nothing of it passes.
    Revoked,
}

/// Which flows, and how many of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FlowFilter {
    /// With an end in this prefix.
    #[serde(default)]
    pub address: Option<IpNet>,
    pub limit: usize,
}

impl std::fmt::Display for FlowState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Revoked => "revoked",
        })
    }
}
