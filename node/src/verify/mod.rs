//! Whether the kernel's tables say what the slice says: the matrix is rebuilt from the tables' own words and held against
//! the slice, address by address and cell by cell. Pure.
//!
//! Nothing here asks [`crate::lower`] what it would have written: tables of another shape that mean the same are equal,
//! and tables that `lower` got wrong are not. What a word means is read from `ebpf_common` alone, as the programs do.

mod addresses;
mod cells;
pub mod finding;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ebpf_common::{EGRESS, INGRESS};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use policy::{NodeName, RuleId, RuleName, ServiceRange, Slice, SliceCidr};

use crate::lower::Tables;

/// What was compared, and where the tables in force are not what the slice says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verification {
    /// Prefixes of the slice whose addresses were looked up in the tables, with everything between them.
    pub prefixes: usize,
    /// Pairs of classes in a direction of which every service was compared.
    pub cells: usize,
    pub differences: Vec<Difference>,
    /// Differences beyond [`MOST_DIFFERENCES`], which are only counted.
    pub more: usize,
}

/// One wrong leaf is seen in every cell of its class; nobody reads further than this.
pub const MOST_DIFFERENCES: usize = 1_000;

impl Verification {
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty()
    }

    fn add(&mut self, difference: Difference) {
        if self.differences.len() < MOST_DIFFERENCES {
            self.differences.push(difference);
        } else {
            self.more += 1;
        }
    }
}

/// One place at which the tables differ from the slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The tables are of another revision. They may say the same all the same.
    Revision { intended: u64, found: u64 },
    /// A table has a shape that no policy gives; the addresses behind it were not compared.
    Malformed { table: &'static str, index: usize, what: String },
    /// What addresses are: their cidr, whether this node stands for them, whose gateway does.
    Prefix { addresses: Range, intended: Ownership, found: Ownership },
    /// What one end may open to the other.
    Cell { direction: Direction, source: End, destination: End, service: Services, intended: Said, found: Said },
    /// Whether an allowed flow is recorded, so that it is answered.
    Record { direction: Direction, source: End, destination: End, intended: bool, found: bool },
}

/// The hook that judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Egress,
    Ingress,
}

/// Addresses of one family, both ends included. Prints as a prefix where it is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    pub first: IpAddr,
    pub last: IpAddr,
}

/// What an address is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The deepest cidr; none: in no cidr.
    pub cidr: Option<String>,
    /// This node stands for it.
    pub local: bool,
    /// It lies behind a gateway that is another node.
    pub external: bool,
    /// The gateway that stands for it.
    pub gateway: Option<String>,
}

/// One end of a cell: addresses of its class, and the cidr that they lie in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The first of the class.
    pub addresses: Range,
    pub cidr: String,
}

/// Services with one and the same difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Services {
    Any,
    Range(ServiceRange),
}

/// What is said of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    pub verdict: Word,
    /// As counters and events name it.
    pub reason: &'static str,
    /// The deciding rule.
    pub rule: Option<String>,
    /// The rule's counter.
    pub slot: Option<u32>,
    /// The packet is reported.
    pub log: bool,
}

/// A verdict in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Allow,
    Deny,
}

/// Holds tables that were read back against the slice that they should say. `slots` says which rule counts where.
pub fn verify(slice: &Slice, tables: &Tables, slots: &BTreeMap<RuleId, u32>) -> Verification {
    let mut verification = Verification { prefixes: slice.prefixes.len(), cells: 0, differences: Vec::new(), more: 0 };
    if tables.header.revision != slice.revision.0 {
        let (intended, found) = (slice.revision.0, tables.header.revision);
        verification.add(Difference::Revision { intended, found });
    }
    let kinds = addresses::compare(slice, tables, &mut verification);
    cells::compare(slice, tables, slots, &kinds, &mut verification);
    verification
}

impl Direction {
    const BOTH: [Self; 2] = [Self::Egress, Self::Ingress];

    /// As in `ebpf_common`.
    fn number(self) -> u32 {
        match self {
            Self::Egress => EGRESS,
            Self::Ingress => INGRESS,
        }
    }
}

impl Range {
    fn as_prefix(&self) -> Option<IpNet> {
        match (self.first, self.last) {
            (IpAddr::V4(first), IpAddr::V4(last)) => {
                let length = (u32::from(first) ^ u32::from(last)).leading_zeros() as u8;
                let net = Ipv4Net::new(first, length).ok()?;
                (net.network() == first && net.broadcast() == last).then_some(net.into())
            }
            (IpAddr::V6(first), IpAddr::V6(last)) => {
                let length = (u128::from(first) ^ u128::from(last)).leading_zeros() as u8;
                let net = Ipv6Net::new(first, length).ok()?;
                (net.network() == first && net.broadcast() == last).then_some(net.into())
            }
            _ => None,
        }
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.first.is_ipv4() == address.is_ipv4() && (self.first..=self.last).contains(&address)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.as_prefix() {
            Some(net) => write!(f, "{net}"),
            None => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Range(range) => write!(f, "{range}"),
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        })
    }
}

impl fmt::Display for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cidr {
            Some(cidr) => write!(f, "`{cidr}`")?,
            None => f.write_str("in no cidr")?,
        }
        match (self.local, &self.gateway) {
            (true, _) => f.write_str(", this node's")?,
            (false, Some(gateway)) => write!(f, ", the gateway `{gateway}`'s")?,
            (false, None) => {}
        }
        if self.external { f.write_str(", external") } else { Ok(()) }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (`{}`)", self.addresses, self.cidr)
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.verdict {
            Word::Allow => "allow",
            Word::Deny => "deny",
        })?;
        match (&self.rule, self.slot) {
            (Some(rule), Some(slot)) => write!(f, " by `{rule}` counted in slot {slot}")?,
            (Some(rule), None) => write!(f, " by `{rule}`, which has no counter")?,
            (None, Some(slot)) => write!(f, " by the rule of slot {slot}, which is no rule's here")?,
            (None, None) => write!(f, " ({})", self.reason)?,
        }
        if self.log { f.write_str(", reported") } else { Ok(()) }
    }
}

/// One line.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Revision { intended, found } => write!(f, "revision {found} in the kernel, {intended} intended"),
            Self::Malformed { table, index, what } => write!(f, "entry {index} of {table} {what}"),
            Self::Prefix { addresses, intended, found } => {
                write!(f, "{addresses}: {found} in the kernel, {intended} intended")
            }
            Self::Cell { direction, source, destination, service, intended, found } => {
                write!(f, "{direction} {source} -> {destination} {service}: {found} in the kernel, {intended} intended")
            }
            Self::Record { direction, source, destination, found, .. } => write!(
                f,
                "{direction} {source} -> {destination}: {} in the kernel, the reverse intended",
                if *found { "flows are recorded" } else { "flows are not recorded, so that answers are dropped" }
            ),
        }
    }
}

fn name_of<T: fmt::Display>(name: Option<&T>, id: impl fmt::Display) -> String {
    name.map_or_else(|| format!("#{id}"), T::to_string)
}

/// Names as people know them; an id where the slice has none.
struct Names<'a>(&'a Slice);

impl Names<'_> {
    fn cidr(&self, id: policy::CidrId) -> String {
        name_of::<SliceCidr>(self.0.cidrs.get(&id), id)
    }

    fn peer(&self, id: policy::NodeId) -> String {
        name_of::<NodeName>(self.0.peers.get(&id).map(|peer| &peer.name), id)
    }

    fn rule(&self, id: RuleId) -> String {
        name_of::<RuleName>(self.0.rules.get(&id).map(|rule| &rule.name), id)
    }
}
