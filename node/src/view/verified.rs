//! What holding the kernel's tables against the policy has found.

use serde::{Deserialize, Serialize};

use super::Direction;

/// The kernel's tables, rebuilt and held against the policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verified {
    pub equal: bool,
    pub revision: u64,
    pub generation: u64,
    /// That were looked up, with everything between them.
    pub prefixes: usize,
    /// Pairs of classes, in a direction, of which every service was compared.
    pub cells: usize,
    pub differences: Vec<Differing>,
    /// Differences that are only counted.
    pub more: usize,
}

/// One place at which the kernel's tables are not the policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Differing {
    /// For people.
    pub text: String,
    /// The same in its parts.
    pub detail: Detail,
}

/// A difference in its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Detail {
    /// The tables are of another revision.
    Revision { intended: u64, found: u64 },
    /// A table has a shape that no policy gives.
    Malformed { table: String, index: usize, what: String },
    /// What addresses are.
    Prefix { addresses: String, intended: Ownership, found: Ownership },
    /// What one end may open to the other.
    Cell { direction: Direction, source: ClassEnd, destination: ClassEnd, service: String, intended: Said, found: Said },
    /// Whether an allowed flow is recorded, so that it is answered.
    Record { direction: Direction, source: ClassEnd, destination: ClassEnd, intended: bool, found: bool },
}

/// Whose an address is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Ownership {
    /// The deepest cidr; absent: in no cidr.
    pub cidr: Option<String>,
    /// This node stands for it.
    pub local: bool,
    /// It lies behind a gateway that is another node.
    pub external: bool,
    /// The gateway that stands for it.
    pub gateway: Option<String>,
}

/// One end of a cell: a prefix, or "first-last", of its class, and the cidr that they lie in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ClassEnd {
    pub addresses: String,
    pub cidr: String,
}

/// What is said of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Said {
    /// "allow" or "deny".
    pub verdict: String,
    /// As counters and events name it.
    pub reason: String,
    /// The deciding rule.
    pub rule: Option<String>,
    /// The rule's counter.
    pub slot: Option<u32>,
    /// The packet is reported.
    pub log: bool,
}
