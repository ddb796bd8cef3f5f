//! Services: protocols with their ports or ICMP types.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::limit;
use crate::object::id::{NameError, ServiceId, ServiceName};
use crate::object::selector::Hint;

/// Protocol numbers that have names here.
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
}

const NAMES: [(&str, u8); 4] =
    [("tcp", protocol::TCP), ("udp", protocol::UDP), ("icmp", protocol::ICMP), ("icmpv6", protocol::ICMPV6)];

/// Either everything, or one protocol with some of its ports or types.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service(Kind);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Any,
    /// Ranges are sorted, disjoint and not adjacent; at least one.
    Protocol {
        protocol: u8,
        ranges: Vec<(u16, u16)>,
    },
}

/// A run of ports or types of one protocol, both ends included. Protocols without either: 0-65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceRange {
    pub protocol: u8,
    pub low: u16,
    pub high: u16,
}

/// A named set of services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedService {
    pub id: ServiceId,
    pub name: ServiceName,
    pub services: Vec<Service>,
}

/// A service of a rule, by id: "tcp/80" or "service:12".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceRef {
    Literal(Service),
    Named(ServiceId),
}

/// A service of a rule as its author writes it: "tcp/80" or "service:web".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceSpec {
    Literal(Service),
    Named(ServiceName),
}

/// Text that is no service.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ServiceError {
    #[error(
        "`{0}` is not a service; write `any`, `tcp/443`, `udp/1000-2000`, `tcp/80,443`, `icmp/8`, `icmpv6` or `proto/47`{1}"
    )]
    Syntax(String, Hint),
    #[error("`{number}` in `{text}` is above {highest}; {what} is 0 to {highest}")]
    TooHigh { text: String, number: String, what: &'static str, highest: u16 },
    #[error("`{low}-{high}` in `{text}` is reversed; write `{high}-{low}`")]
    Reversed { text: String, low: u16, high: u16 },
    #[error("`{text}` names more than {} ranges; use several services", limit::MAX_RANGES)]
    TooMany { text: String },
    #[error("`{0}` is not the service of one flow; write one port or type, like `tcp/8080`, `icmp/8` or `proto/47`")]
    NotOne(String),
    #[error("`{0}` names no service by id; write `service:` and a number")]
    Reference(String),
    #[error(transparent)]
    Name(#[from] NameError),
}

impl Service {
    /// Every protocol.
    pub const ANY: Self = Self(Kind::Any);

    pub fn is_any(&self) -> bool {
        self.0 == Kind::Any
    }

    /// Sorted and disjoint; all 256 protocols for `any`.
    pub fn ranges(&self) -> Vec<ServiceRange> {
        match &self.0 {
            Kind::Any => {
                (0..=u8::MAX).map(|protocol| ServiceRange { protocol, low: 0, high: highest(protocol) }).collect()
            }
            &Kind::Protocol { protocol, ref ranges } => {
                ranges.iter().map(|&(low, high)| ServiceRange { protocol, low, high }).collect()
            }
        }
    }

    pub fn matches(&self, protocol: u8, port: u16) -> bool {
        match &self.0 {
            Kind::Any => true,
            Kind::Protocol { protocol: own, ranges } => {
                *own == protocol && ranges.iter().any(|&(low, high)| (low..=high).contains(&port))
            }
        }
    }
}

impl FromStr for Service {
    type Err = ServiceError;

    fn from_str(text: &str) -> Result<Self, ServiceError> {
        if text == "any" {
            return Ok(Self::ANY);
        }
        let syntax = |hint| ServiceError::Syntax(text.to_owned(), hint);
        let (name, rest) = match text.split_once('/') {
            Some((name, rest)) => (name, Some(rest)),
            None => (text, None),
        };
        if name == "proto" {
            let number = rest.ok_or_else(|| syntax(Hint::default()))?;
            let protocol = parse_number(text, number, "a protocol", u16::from(u8::MAX))?;
            let protocol = u8::try_from(protocol).map_err(|_| syntax(Hint::default()))?;
            return Ok(Self(Kind::Protocol { protocol, ranges: vec![(0, highest(protocol))] }));
        }
        let Some(&(_, protocol)) = NAMES.iter().find(|(known, _)| *known == name) else {
            return Err(syntax(Hint::nearest(name, NAMES.iter().map(|(name, _)| *name).chain(["any", "proto"]))));
        };
        let ranges = match rest {
            Some(list) => parse_ranges(text, list, protocol)?,
            None => vec![(0, highest(protocol))],
        };
        Ok(Self(Kind::Protocol { protocol, ranges }))
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (protocol, ranges) = match &self.0 {
            Kind::Any => return f.pad("any"),
            Kind::Protocol { protocol, ranges } => (*protocol, ranges),
        };
        let mut text = protocol_name(protocol);
        if ranges != &[(0, highest(protocol))] {
            let ranges: Vec<String> = ranges.iter().map(|&(low, high)| range_text(low, high)).collect();
            text = format!("{text}/{}", ranges.join(","));
        }
        f.pad(&text)
    }
}

impl fmt::Display for ServiceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, low, high } = *self;
        let name = protocol_name(protocol);
        match (low, high) == (0, highest(protocol)) {
            true => f.pad(&name),
            false => f.pad(&format!("{name}/{}", range_text(low, high))),
        }
    }
}

impl FromStr for ServiceSpec {
    type Err = ServiceError;

    fn from_str(text: &str) -> Result<Self, ServiceError> {
        match text.strip_prefix("service:") {
            Some(name) => Ok(Self::Named(name.parse()?)),
            None => Ok(Self::Literal(text.parse()?)),
        }
    }
}

impl fmt::Display for ServiceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Literal(service) => service.fmt(f),
            Self::Named(name) => write!(f, "service:{name}"),
        }
    }
}

impl FromStr for ServiceRef {
    type Err = ServiceError;

    fn from_str(text: &str) -> Result<Self, ServiceError> {
        let Some(id) = text.strip_prefix("service:") else {
            return Ok(Self::Literal(text.parse()?));
        };
        let id = id.parse().ok().filter(|&id| id != 0 && is_number(text.trim_start_matches("service:")));
        id.map(|id| Self::Named(ServiceId(id))).ok_or_else(|| ServiceError::Reference(text.to_owned()))
    }
}

impl fmt::Display for ServiceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Literal(service) => service.fmt(f),
            Self::Named(id) => write!(f, "service:{id}"),
        }
    }
}

/// The highest port or type of a protocol; 65535 for protocols without either.
fn highest(protocol: u8) -> u16 {
    match protocol {
        protocol::ICMP | protocol::ICMPV6 => 255,
        _ => u16::MAX,
    }
}

/// The service of one flow: protocol, and port or type.
pub(crate) fn parse_point(text: &str) -> Result<(u8, u16), ServiceError> {
    let point = match text {
        "icmp" => return Ok((protocol::ICMP, 8)),
        "icmpv6" => return Ok((protocol::ICMPV6, 128)),
        _ => text.parse::<Service>()?,
    };
    match point.0 {
        Kind::Protocol { protocol, ranges } => match (ranges.as_slice(), NAMES.iter().any(|&(_, p)| p == protocol)) {
            (&[(low, high)], true) if low == high => Ok((protocol, low)),
            (_, false) => Ok((protocol, 0)),
            (_, true) => Err(ServiceError::NotOne(text.to_owned())),
        },
        Kind::Any => Err(ServiceError::NotOne(text.to_owned())),
    }
}

/// The inverse of [`parse_point`].
pub(crate) fn point_name(protocol: u8, port: u16) -> String {
    let name = protocol_name(protocol);
    match NAMES.iter().any(|&(_, p)| p == protocol) {
        true => format!("{name}/{port}"),
        false => name,
    }
}

fn protocol_name(protocol: u8) -> String {
    match NAMES.iter().find(|&&(_, number)| number == protocol) {
        Some((name, _)) => (*name).to_owned(),
        None => format!("proto/{protocol}"),
    }
}

fn range_text(low: u16, high: u16) -> String {
    match low == high {
        true => low.to_string(),
        false => format!("{low}-{high}"),
    }
}

fn parse_ranges(text: &str, list: &str, protocol: u8) -> Result<Vec<(u16, u16)>, ServiceError> {
    let (what, top) = match highest(protocol) {
        255 => ("a type", 255),
        top => ("a port", top),
    };
    let mut ranges = Vec::new();
    for item in list.split(',') {
        let (low, high) = item.split_once('-').unwrap_or((item, item));
        let (low, high) = (parse_number(text, low, what, top)?, parse_number(text, high, what, top)?);
        if low > high {
            return Err(ServiceError::Reversed { text: text.to_owned(), low, high });
        }
        ranges.push((low, high));
    }
    if ranges.len() > limit::MAX_RANGES {
        return Err(ServiceError::TooMany { text: text.to_owned() });
    }
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (low, high) in ranges {
        match merged.last_mut() {
            Some(last) if u32::from(low) <= u32::from(last.1) + 1 => last.1 = last.1.max(high),
            _ => merged.push((low, high)),
        }
    }
    Ok(merged)
}

fn parse_number(text: &str, number: &str, what: &'static str, highest: u16) -> Result<u16, ServiceError> {
    if !is_number(number) {
        return Err(ServiceError::Syntax(text.to_owned(), Hint::default()));
    }
    let parsed = number.parse::<u16>().ok().filter(|&parsed| parsed <= highest);
    parsed.ok_or_else(|| ServiceError::TooHigh { text: text.to_owned(), number: number.to_owned(), what, highest })
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_print_in_one_form() {
        let check = |text: &str, expected: &str| {
            let service: Service = text.parse().unwrap();
            assert_eq!(service.to_string(), expected);
            assert_eq!(expected.parse(), Ok(service));
        };
        for text in
            ["any", "tcp", "udp", "tcp/443", "udp/1000-2000", "tcp/80,443", "icmp", "icmp/8", "icmpv6/128", "proto/47"]
        {
            check(text, text);
        }
        check("tcp/443,80", "tcp/80,443");
        check("tcp/80,81-90,85-100", "tcp/80-100");
        check("tcp/0-65535", "tcp");
        check("icmp/0-255", "icmp");
        check("proto/6", "tcp");
        check("proto/17", "udp");
        check("proto/1", "icmp");
        check("proto/58", "icmpv6");
        check("proto/0", "proto/0");
    }

    #[test]
    fn a_refused_service_says_the_value_the_reason_and_the_remedy() {
        let check = |text: &str, expected: &str| {
            let error = text.parse::<Service>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        };
        check("tcp/65536", "`65536` in `tcp/65536` is above 65535");
        check("tcp/99999999999", "above 65535");
        check("icmp/256", "above 255; a type is 0 to 255");
        check("proto/256", "above 255; a protocol is 0 to 255");
        check("udp/2000-1000", "reversed; write `1000-2000`");
        check("tpc/80", "did you mean `tcp`?");
        for text in [
            "",
            "tcp/",
            "tcp/80,",
            "tcp/-80",
            "tcp/+80",
            "tcp/80-",
            "tcp/a",
            "proto",
            "proto/",
            "any/80",
            "TCP",
            "proto/47/1",
        ] {
            check(text, "is not a service; write");
        }
    }

    #[test]
    fn one_flow_has_one_service() {
        let check = |text: &str, expected: Option<(u8, u16)>| assert_eq!(parse_point(text).ok(), expected, "{text}");
        check("tcp/8080", Some((6, 8080)));
        check("udp/0", Some((17, 0)));
        check("icmp", Some((1, 8)));
        check("icmp/0", Some((1, 0)));
        check("icmpv6", Some((58, 128)));
        check("proto/47", Some((47, 0)));
        for text in ["any", "tcp", "tcp/80,443", "tcp/1-2", "proto/6", "proto/1", "service:web"] {
            check(text, None);
        }
        assert_eq!(point_name(6, 80), "tcp/80");
        assert_eq!(point_name(47, 0), "proto/47");
    }

    #[test]
    fn references_are_ids_and_specs_are_names() {
        assert_eq!("service:12".parse(), Ok(ServiceRef::Named(ServiceId(12))));
        assert_eq!("service:12".parse::<ServiceRef>().unwrap().to_string(), "service:12");
        for bad in ["service:", "service:0", "service:web", "service:+1", "service:99999999999"] {
            assert!(bad.parse::<ServiceRef>().is_err(), "{bad}");
        }
        assert_eq!("service:web".parse::<ServiceSpec>().unwrap().to_string(), "service:web");
    }
}
