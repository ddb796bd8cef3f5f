//! Between the wire and `policy`'s types. To the wire nothing can fail; from the wire everything is checked, and an error
//! names the field and the value.
//!
//! Every conversion takes its input apart field by field, so that a new field breaks the build until somebody has
//! decided what it means.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use policy::{Action, Addresses, DefaultPolicy, NodeState, Prefixes, PublicKey};

use crate::v1;

mod change;
mod follow;
mod object;
mod slice;

pub use follow::{FollowError, Followed, endpoints_from_wire, endpoints_to_wire};
pub use slice::{digest_from_wire, digest_to_wire};

/// A message that says nothing that policy has a word for.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error("`{field}` is missing; the other side may be of another version: bring both to the same")]
    Missing { field: &'static str },
    #[error("`{field}` is {value}, which this version does not know; upgrade Rampart here")]
    Unknown { field: &'static str, value: i32 },
    #[error("`{field}` is `{value}`: {reason}")]
    Invalid { field: &'static str, value: String, reason: String },
    /// The objects are well formed one by one and make no network together.
    #[error(transparent)]
    Network(#[from] policy::ChangeError),
}

impl ConvertError {
    fn invalid(field: &'static str, value: impl Display, reason: impl Display) -> Self {
        Self::Invalid { field, value: value.to_string(), reason: reason.to_string() }
    }
}

/// A text that has a parser.
fn parse<T>(field: &'static str, text: &str) -> Result<T, ConvertError>
where
    T: FromStr,
    T::Err: Display,
{
    text.parse().map_err(|error| ConvertError::invalid(field, text, error))
}

/// As [`parse`], for each of a list.
fn parse_all<T, C>(field: &'static str, texts: Vec<String>) -> Result<C, ConvertError>
where
    T: FromStr,
    T::Err: Display,
    C: FromIterator<T>,
{
    texts.iter().map(|text| parse(field, text)).collect()
}

fn print_all<'a, T: Display + 'a>(items: impl IntoIterator<Item = &'a T>) -> Vec<String> {
    items.into_iter().map(T::to_string).collect()
}

fn required<T>(field: &'static str, value: Option<T>) -> Result<T, ConvertError> {
    value.ok_or(ConvertError::Missing { field })
}

/// An id, which is never 0.
fn id<T>(field: &'static str, value: u32, make: impl FnOnce(u32) -> T) -> Result<T, ConvertError> {
    if value == 0 { Err(ConvertError::Missing { field }) } else { Ok(make(value)) }
}

/// Ids, none of them 0 or given twice.
fn ids<T: Ord>(
    field: &'static str,
    values: Vec<u32>,
    make: impl Fn(u32) -> T,
) -> Result<std::collections::BTreeSet<T>, ConvertError> {
    let mut ids = std::collections::BTreeSet::new();
    for value in values {
        if !ids.insert(id(field, value, &make)?) {
            return Err(ConvertError::invalid(field, value, "it is given twice"));
        }
    }
    Ok(ids)
}

/// A number that must fit into fewer bits.
fn narrow<T: TryFrom<u32>>(field: &'static str, value: u32) -> Result<T, ConvertError> {
    T::try_from(value)
        .map_err(|_| ConvertError::invalid(field, value, format!("it is more than {} bits", size_of::<T>() * 8)))
}

/// 0 is the wire's word for none.
fn nonzero(value: u64) -> Option<u64> {
    (value != 0).then_some(value)
}

fn ipv4(field: &'static str, bytes: &[u8]) -> Result<Ipv4Addr, ConvertError> {
    let octets: [u8; 4] = bytes.try_into().map_err(|_| length_error(field, bytes, "4"))?;
    Ok(octets.into())
}

fn ipv6(field: &'static str, bytes: &[u8]) -> Result<Ipv6Addr, ConvertError> {
    let octets: [u8; 16] = bytes.try_into().map_err(|_| length_error(field, bytes, "16"))?;
    Ok(octets.into())
}

/// An address of either family.
pub fn address_from_wire(field: &'static str, bytes: &[u8]) -> Result<IpAddr, ConvertError> {
    match bytes.len() {
        4 => ipv4(field, bytes).map(IpAddr::V4),
        16 => ipv6(field, bytes).map(IpAddr::V6),
        _ => Err(length_error(field, bytes, "4 or 16")),
    }
}

/// 4 or 16 bytes in network order.
pub fn address_to_wire(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn length_error(field: &'static str, bytes: &[u8], want: &str) -> ConvertError {
    ConvertError::invalid(field, beginning(bytes), format!("it has {} bytes, not {want}", bytes.len()))
}

/// Of bytes that are refused, as much as anybody reads.
fn beginning(bytes: &[u8]) -> String {
    hex::encode(&bytes[..bytes.len().min(32)])
}

fn public_key(field: &'static str, bytes: &[u8]) -> Result<PublicKey, ConvertError> {
    PublicKey::try_from(bytes).map_err(|error| length_or_zero(field, bytes, &error))
}

fn length_or_zero(field: &'static str, bytes: &[u8], error: &dyn Display) -> ConvertError {
    ConvertError::invalid(field, beginning(bytes), error)
}

impl From<&IpNet> for v1::Prefix {
    fn from(prefix: &IpNet) -> Self {
        Self { address: address_to_wire(prefix.addr()).into(), length: u32::from(prefix.prefix_len()) }
    }
}

impl TryFrom<v1::Prefix> for IpNet {
    type Error = ConvertError;

    fn try_from(prefix: v1::Prefix) -> Result<Self, Self::Error> {
        let v1::Prefix { address, length } = prefix;
        let address = address_from_wire("prefix.address", &address)?;
        let net = IpNet::new(address, narrow("prefix.length", length)?)
            .map_err(|error| ConvertError::invalid("prefix.length", format!("{address}/{length}"), error))?;
        if net.trunc() != net {
            return Err(ConvertError::invalid("prefix", net, format!("host bits are set; write `{}`", net.trunc())));
        }
        Ok(net)
    }
}

fn prefixes_to_nets<C: FromIterator<IpNet>>(prefixes: Vec<v1::Prefix>) -> Result<C, ConvertError> {
    prefixes.into_iter().map(IpNet::try_from).collect()
}

impl From<&Prefixes> for v1::Prefixes {
    fn from(prefixes: &Prefixes) -> Self {
        Self {
            v4: prefixes.v4().map(|v4| v1::Prefix::from(&IpNet::V4(v4))),
            v6: prefixes.v6().map(|v6| v1::Prefix::from(&IpNet::V6(v6))),
        }
    }
}

impl TryFrom<v1::Prefixes> for Prefixes {
    type Error = ConvertError;

    fn try_from(prefixes: v1::Prefixes) -> Result<Self, Self::Error> {
        let v1::Prefixes { v4, v6 } = prefixes;
        let v4 = match v4.map(IpNet::try_from).transpose()? {
            None => None,
            Some(IpNet::V4(v4)) => Some(v4),
            Some(other) => return Err(ConvertError::invalid("prefixes.v4", other, "it is not IPv4")),
        };
        let v6 = match v6.map(IpNet::try_from).transpose()? {
            None => None,
            Some(IpNet::V6(v6)) => Some(v6),
            Some(other) => return Err(ConvertError::invalid("prefixes.v6", other, "it is not IPv6")),
        };
        Self::new(v4, v6).map_err(|error| {
            let printed: Vec<_> =
                [v4.map(IpNet::V4), v6.map(IpNet::V6)].iter().flatten().map(IpNet::to_string).collect();
            ConvertError::invalid("prefixes", printed.join(" "), error)
        })
    }
}

impl From<&Addresses> for v1::Addresses {
    fn from(addresses: &Addresses) -> Self {
        Self {
            v4: addresses.v4().map(|v4| v4.octets().to_vec()).unwrap_or_default(),
            v6: addresses.v6().map(|v6| v6.octets().to_vec()).unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::Addresses> for Addresses {
    type Error = ConvertError;

    fn try_from(addresses: v1::Addresses) -> Result<Self, Self::Error> {
        let v1::Addresses { v4, v6 } = addresses;
        let v4 = (!v4.is_empty()).then(|| ipv4("addresses.v4", &v4)).transpose()?;
        let v6 = (!v6.is_empty()).then(|| ipv6("addresses.v6", &v6)).transpose()?;
        Self::new(v4, v6).map_err(|error| {
            let printed: Vec<_> =
                [v4.map(IpAddr::V4), v6.map(IpAddr::V6)].iter().flatten().map(IpAddr::to_string).collect();
            ConvertError::invalid("addresses", printed.join(" "), error)
        })
    }
}

impl From<DefaultPolicy> for v1::Default {
    fn from(default: DefaultPolicy) -> Self {
        match default {
            DefaultPolicy::Lineage => Self::Lineage,
            DefaultPolicy::Deny => Self::Deny,
        }
    }
}

fn default_policy(field: &'static str, value: i32) -> Result<DefaultPolicy, ConvertError> {
    match v1::Default::try_from(value) {
        Ok(v1::Default::Lineage) => Ok(DefaultPolicy::Lineage),
        Ok(v1::Default::Deny) => Ok(DefaultPolicy::Deny),
        Ok(v1::Default::Unspecified) => Err(ConvertError::Missing { field }),
        Err(_) => Err(ConvertError::Unknown { field, value }),
    }
}

impl From<Action> for v1::Action {
    fn from(action: Action) -> Self {
        match action {
            Action::Allow => Self::Allow,
            Action::Deny => Self::Deny,
        }
    }
}

fn action(field: &'static str, value: i32) -> Result<Action, ConvertError> {
    match v1::Action::try_from(value) {
        Ok(v1::Action::Allow) => Ok(Action::Allow),
        Ok(v1::Action::Deny) => Ok(Action::Deny),
        Ok(v1::Action::Unspecified) => Err(ConvertError::Missing { field }),
        Err(_) => Err(ConvertError::Unknown { field, value }),
    }
}

impl From<NodeState> for v1::NodeState {
    fn from(state: NodeState) -> Self {
        match state {
            NodeState::Invited => Self::Invited,
            NodeState::Active => Self::Active,
            NodeState::Disabled => Self::Disabled,
            NodeState::Expired => Self::Expired,
        }
    }
}

fn node_state(field: &'static str, value: i32) -> Result<NodeState, ConvertError> {
    match v1::NodeState::try_from(value) {
        Ok(v1::NodeState::Invited) => Ok(NodeState::Invited),
        Ok(v1::NodeState::Active) => Ok(NodeState::Active),
        Ok(v1::NodeState::Disabled) => Ok(NodeState::Disabled),
        Ok(v1::NodeState::Expired) => Ok(NodeState::Expired),
        Ok(v1::NodeState::Unspecified) => Err(ConvertError::Missing { field }),
        Err(_) => Err(ConvertError::Unknown { field, value }),
    }
}
