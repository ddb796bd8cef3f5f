//! Prefixes and addresses of both families, and maps from prefixes in which the longest match is found.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use thiserror::Error;

use crate::Map;

/// Text or a pair of prefixes that is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PrefixError {
    #[error("`{0}` is not a prefix; write an address and a length, like `10.42.1.0/24` or `fd42:0:0:1::/64`")]
    Syntax(String),
    #[error("`{0}` has no prefix length; write `{1}` for this one address")]
    NoLength(String, IpNet),
    #[error("`{0}` has a prefix length beyond {1}, the bits of its address")]
    Length(String, u8),
    #[error("`{0}` has host bits set; write `{1}` for the network that it lies in")]
    HostBits(IpNet, IpNet),
    #[error("`{0}` is {1}, which no network can use; choose another prefix")]
    Reserved(IpNet, &'static str),
    #[error("`{0}` and `{1}` are of one family; give at most one IPv4 and one IPv6 prefix")]
    SameFamily(IpNet, IpNet),
    #[error("there is no prefix; give an IPv4 prefix, an IPv6 prefix or both")]
    None,
}

/// A pair of addresses that is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    #[error("`{0}` is {1}, which no node can have; choose another address")]
    Reserved(IpAddr, &'static str),
    #[error("`{0}` and `{1}` are of one family; give at most one IPv4 and one IPv6 address")]
    SameFamily(IpAddr, IpAddr),
    #[error("there is no address; give an IPv4 address, an IPv6 address or both")]
    None,
}

/// Parses a canonical prefix that a network can use.
pub fn parse_prefix(text: &str) -> Result<IpNet, PrefixError> {
    let syntax = || PrefixError::Syntax(text.to_owned());
    let Some((address, length)) = text.split_once('/') else {
        let address: IpAddr = text.parse().map_err(|_| syntax())?;
        return Err(PrefixError::NoLength(text.to_owned(), IpNet::from(address)));
    };
    let address: IpAddr = address.parse().map_err(|_| syntax())?;
    if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
        return Err(syntax());
    }
    let longest = IpNet::from(address).max_prefix_len();
    let length = length.parse::<u8>().ok().filter(|&length| length <= longest);
    let length = length.ok_or_else(|| PrefixError::Length(text.to_owned(), longest))?;
    check_prefix(IpNet::new(address, length).map_err(|_| syntax())?)
}

/// Refuses a prefix with host bits, or one that lies in a range that no network can use.
pub fn check_prefix(prefix: IpNet) -> Result<IpNet, PrefixError> {
    if prefix != prefix.trunc() {
        return Err(PrefixError::HostBits(prefix, prefix.trunc()));
    }
    match reserved(prefix) {
        Some(what) => Err(PrefixError::Reserved(prefix, what)),
        None => Ok(prefix),
    }
}

/// What no network can use.
fn reserved_ranges() -> impl Iterator<Item = (IpNet, &'static str)> {
    const V4: [(Ipv4Addr, u8, &str); 5] = [
        (Ipv4Addr::UNSPECIFIED, 32, "the unspecified address"),
        (Ipv4Addr::new(127, 0, 0, 0), 8, "loopback"),
        (Ipv4Addr::new(169, 254, 0, 0), 16, "link-local"),
        (Ipv4Addr::new(224, 0, 0, 0), 4, "multicast"),
        (Ipv4Addr::BROADCAST, 32, "broadcast"),
    ];
    const V6: [(Ipv6Addr, u8, &str); 5] = [
        (Ipv6Addr::UNSPECIFIED, 128, "the unspecified address"),
        (Ipv6Addr::LOCALHOST, 128, "loopback"),
        (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10, "link-local"),
        (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8, "multicast"),
        (Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96, "IPv4-mapped"),
    ];
    let v4 = V4.into_iter().map(|(address, length, what)| (IpNet::V4(Ipv4Net::new_assert(address, length)), what));
    let v6 = V6.into_iter().map(|(address, length, what)| (IpNet::V6(Ipv6Net::new_assert(address, length)), what));
    v4.chain(v6)
}

/// What the prefix lies in, if that is a range that no network can use.
fn reserved(prefix: IpNet) -> Option<&'static str> {
    reserved_ranges().find(|(range, _)| range.contains(&prefix)).map(|(_, what)| what)
}

/// At most one prefix of each family, at least one; canonical and usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefixes {
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
}

impl Prefixes {
    pub fn new(v4: Option<Ipv4Net>, v6: Option<Ipv6Net>) -> Result<Self, PrefixError> {
        let prefixes = Self { v4, v6 };
        if v4.is_none() && v6.is_none() {
            return Err(PrefixError::None);
        }
        prefixes.iter().try_for_each(|prefix| check_prefix(prefix).map(drop))?;
        Ok(prefixes)
    }

    pub fn from_nets(nets: impl IntoIterator<Item = IpNet>) -> Result<Self, PrefixError> {
        let (mut v4, mut v6) = (None::<Ipv4Net>, None::<Ipv6Net>);
        for net in nets {
            let before = match net {
                IpNet::V4(net) => v4.replace(net).map(IpNet::V4),
                IpNet::V6(net) => v6.replace(net).map(IpNet::V6),
            };
            if let Some(before) = before {
                return Err(PrefixError::SameFamily(before, net));
            }
        }
        Self::new(v4, v6)
    }

    pub fn v4(&self) -> Option<Ipv4Net> {
        self.v4
    }

    pub fn v6(&self) -> Option<Ipv6Net> {
        self.v6
    }

    /// IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.v4.map(IpNet::V4).into_iter().chain(self.v6.map(IpNet::V6))
    }

    /// A range that no network can use and that lies in one of the prefixes: the prefix, the range, and what it is.
    pub fn reserved_within(&self) -> Option<(IpNet, IpNet, &'static str)> {
        self.iter().find_map(|prefix| {
            let (range, what) = reserved_ranges().find(|(range, _)| prefix.contains(range))?;
            Some((prefix, range, what))
        })
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.iter().any(|prefix| prefix.contains(&address))
    }
}

impl fmt::Display for Prefixes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_spaced(f, self.iter())
    }
}

/// At most one address of each family, at least one; usable by a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addresses {
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

impl Addresses {
    pub fn new(v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> Result<Self, AddressError> {
        let addresses = Self { v4, v6 };
        if v4.is_none() && v6.is_none() {
            return Err(AddressError::None);
        }
        for address in addresses.iter() {
            if let Some(what) = reserved(IpNet::from(address)) {
                return Err(AddressError::Reserved(address, what));
            }
        }
        Ok(addresses)
    }

    pub fn from_addresses(addresses: impl IntoIterator<Item = IpAddr>) -> Result<Self, AddressError> {
        let (mut v4, mut v6) = (None::<Ipv4Addr>, None::<Ipv6Addr>);
        for address in addresses {
            let before = match address {
                IpAddr::V4(address) => v4.replace(address).map(IpAddr::V4),
                IpAddr::V6(address) => v6.replace(address).map(IpAddr::V6),
            };
            if let Some(before) = before {
                return Err(AddressError::SameFamily(before, address));
            }
        }
        Self::new(v4, v6)
    }

    pub fn v4(&self) -> Option<Ipv4Addr> {
        self.v4
    }

    pub fn v6(&self) -> Option<Ipv6Addr> {
        self.v6
    }

    /// IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.iter().any(|own| own == address)
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_spaced(f, self.iter())
    }
}

fn write_spaced<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: impl Iterator<Item = T>) -> fmt::Result {
    let items: Vec<String> = items.map(|item| item.to_string()).collect();
    f.pad(&items.join(" "))
}

/// The longest prefix of the map that contains `prefix` or is equal to it.
///
/// Canonical prefixes order by address, then by length, so the longest match is the greatest key that is not above the
/// prefix, unless that key lies beside it; then only what contains both can still match.
pub(crate) fn longest_match<V>(map: &impl Sorted<V>, prefix: IpNet) -> Option<(IpNet, &V)> {
    let mut bound = prefix;
    loop {
        let (candidate, value) = map.up_to(bound)?;
        if candidate.contains(&bound) {
            return Some((candidate, value));
        }
        bound = common_supernet(candidate, bound)?;
    }
}

/// A map in the order of its prefixes.
pub(crate) trait Sorted<V> {
    /// The greatest prefix that is not above `bound`.
    fn up_to(&self, bound: IpNet) -> Option<(IpNet, &V)>;
}

impl<V> Sorted<V> for BTreeMap<IpNet, V> {
    fn up_to(&self, bound: IpNet) -> Option<(IpNet, &V)> {
        self.range(..=bound).next_back().map(|(net, value)| (*net, value))
    }
}

impl<V> Sorted<V> for imbl::OrdMap<IpNet, V> {
    fn up_to(&self, bound: IpNet) -> Option<(IpNet, &V)> {
        self.get_prev(&bound).map(|(net, value)| (*net, value))
    }
}

/// The longest prefix of the map that contains `prefix` and is shorter.
pub(crate) fn longest_above<V>(map: &impl Sorted<V>, prefix: IpNet) -> Option<(IpNet, &V)> {
    longest_match(map, prefix.supernet()?)
}

/// The prefixes of the map inside `outer` (not `outer` itself) that no other of them contains.
pub(crate) fn outermost_below<V>(map: &Map<IpNet, V>, outer: IpNet) -> Vec<(IpNet, &V)> {
    let mut found: Vec<(IpNet, &V)> = Vec::new();
    let last = IpNet::from(outer.broadcast());
    for (&prefix, value) in map.range(outer..=last) {
        let nested = found.last().is_some_and(|(before, _)| before.contains(&prefix));
        if prefix != outer && !nested {
            found.push((prefix, value));
        }
    }
    found
}

/// The longest prefix that contains both; none if they are of two families.
fn common_supernet(a: IpNet, b: IpNet) -> Option<IpNet> {
    let same_bits = match (a, b) {
        (IpNet::V4(a), IpNet::V4(b)) => (u32::from(a.addr()) ^ u32::from(b.addr())).leading_zeros(),
        (IpNet::V6(a), IpNet::V6(b)) => (u128::from(a.addr()) ^ u128::from(b.addr())).leading_zeros(),
        (IpNet::V4(_), IpNet::V6(_)) | (IpNet::V6(_), IpNet::V4(_)) => return None,
    };
    let length = a.prefix_len().min(b.prefix_len()).min(u8::try_from(same_bits).unwrap_or(u8::MAX));
    IpNet::new(b.addr(), length).ok().map(|net| net.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_canonical_and_usable() {
        let check = |text: &str, expected: &str| match parse_prefix(text) {
            Ok(prefix) => assert_eq!(prefix.to_string(), expected, "{text}"),
            Err(error) => assert!(error.to_string().contains(expected), "{text}: {error}"),
        };
        check("10.42.1.0/24", "10.42.1.0/24");
        check("FD42:0:0:1::/64", "fd42:0:0:1::/64");
        check("0.0.0.0/0", "0.0.0.0/0");
        check("126.0.0.0/7", "126.0.0.0/7");
        check("192.0.0.0/2", "192.0.0.0/2");
        check("::/0", "::/0");
        check("10.42.1.5/24", "write `10.42.1.0/24`");
        check("fd42::1/64", "write `fd42::/64`");
        check("10.42.1.5", "write `10.42.1.5/32`");
        check("10.42.1.0/33", "beyond 32");
        check("fd42::/129", "beyond 128");
        check("10.42.1.0/999", "beyond 32");
        check("10.42.1.0/+8", "is not a prefix");
        check("10.42.1/24", "is not a prefix");
        check("hello", "is not a prefix");
        check("127.0.0.0/8", "loopback");
        check("127.1.0.0/16", "loopback");
        check("::1/128", "loopback");
        check("169.254.3.0/24", "link-local");
        check("fe80::/64", "link-local");
        check("224.0.0.0/4", "multicast");
        check("ff02::/16", "multicast");
        check("255.255.255.255/32", "broadcast");
        check("0.0.0.0/32", "unspecified");
        check("::ffff:10.0.0.0/104", "IPv4-mapped");
    }

    #[test]
    fn one_prefix_of_each_family() {
        let nets = |texts: &[&str]| Prefixes::from_nets(texts.iter().map(|text| text.parse().unwrap()));
        assert!(nets(&["10.0.0.0/8", "fd00::/8"]).is_ok());
        assert_eq!(nets(&[]), Err(PrefixError::None));
        assert!(matches!(nets(&["10.0.0.0/8", "11.0.0.0/8"]), Err(PrefixError::SameFamily(..))));
        assert!(matches!(nets(&["10.0.0.1/8"]), Err(PrefixError::HostBits(..))));
        assert_eq!(nets(&["fd00::/8", "10.0.0.0/8"]).unwrap().to_string(), "10.0.0.0/8 fd00::/8");
    }

    #[test]
    fn longest_match_finds_what_a_scan_finds() {
        let texts =
            ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.255/32", "10.3.0.0/16", "fd00::/8"];
        let map: Map<IpNet, ()> = texts.iter().map(|text| (text.parse::<IpNet>().unwrap(), ())).collect();
        let probes = [
            "10.1.2.255/32",
            "10.1.2.254/32",
            "10.1.3.0/24",
            "10.2.0.0/15",
            "10.255.0.0/16",
            "9.0.0.0/8",
            "fd::/16",
            "fd01::/64",
        ];
        for probe in probes.iter().chain(&texts).map(|text| text.parse::<IpNet>().unwrap()) {
            let scan = |strictly: bool| {
                let containing = map.keys().filter(|key| key.contains(&probe) && !(strictly && **key == probe));
                containing.max_by_key(|key| key.prefix_len()).copied()
            };
            assert_eq!(longest_match(&map, probe).map(|(net, ())| net), scan(false), "{probe}");
            assert_eq!(longest_above(&map, probe).map(|(net, ())| net), scan(true), "{probe}");
        }
        let below = outermost_below(&map, "10.0.0.0/8".parse().unwrap());
        let below: Vec<String> = below.iter().map(|(net, ())| net.to_string()).collect();
        assert_eq!(below, ["10.1.0.0/16", "10.3.0.0/16"]);
    }
}
