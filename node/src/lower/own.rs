//! Which addresses the node stands for, and what every prefix of the slice is.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use policy::{CidrId, ClassId, Slice};

/// What the addresses of a prefix are, unless a longer prefix says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// `None`: in no cidr.
    pub(super) place: Option<(ClassId, CidrId)>,
    /// The node stands for them.
    pub(super) local: bool,
}

impl Entry {
    pub(super) fn class(&self) -> Option<ClassId> {
        self.place.map(|(class, _)| class)
    }
}

/// Every prefix at which class, cidr or locality may change.
pub(super) fn entries(slice: &Slice) -> BTreeMap<IpNet, Entry> {
    let stands = Covering::new(stands_for(slice));
    let places = Covering::new(slice.prefixes.iter().map(|(net, place)| (*net, *place)).collect());
    let nets: BTreeSet<IpNet> = places.map.keys().chain(stands.map.keys()).copied().collect();
    nets.into_iter()
        .map(|net| {
            let entry = Entry { place: places.of(net).copied(), local: stands.of(net).copied().unwrap_or(false) };
            (net, entry)
        })
        .collect()
}

/// The node's own addresses and the prefixes that it is the active gateway of, without what other gateways inside
/// those serve.
fn stands_for(slice: &Slice) -> BTreeMap<IpNet, bool> {
    let gateway_for = &slice.local.gateway_for;
    let served_by_others =
        slice.local.external_routes.iter().filter(|net| gateway_for.iter().any(|own| own.contains(*net)));
    let mut stands: BTreeMap<IpNet, bool> = gateway_for.iter().map(|net| (*net, true)).collect();
    stands.extend(served_by_others.map(|net| (*net, false)));
    stands.extend(slice.local.addresses.iter().map(|address| (IpNet::from(address), true)));
    stands
}

/// Longest match by asking only for the lengths that occur.
struct Covering<T> {
    map: BTreeMap<IpNet, T>,
    lengths_v4: Vec<u8>,
    lengths_v6: Vec<u8>,
}

impl<T> Covering<T> {
    fn new(map: BTreeMap<IpNet, T>) -> Self {
        let lengths = |v4: bool| -> Vec<u8> {
            let lengths: BTreeSet<u8> =
                map.keys().filter(|net| matches!(net, IpNet::V4(_)) == v4).map(IpNet::prefix_len).collect();
            lengths.into_iter().rev().collect()
        };
        Self { lengths_v4: lengths(true), lengths_v6: lengths(false), map }
    }

    /// The value of the longest prefix that contains all of `net`.
    fn of(&self, net: IpNet) -> Option<&T> {
        let lengths = if matches!(net, IpNet::V4(_)) { &self.lengths_v4 } else { &self.lengths_v6 };
        lengths
            .iter()
            .filter(|length| **length <= net.prefix_len())
            .find_map(|length| self.map.get(&IpNet::new(net.network(), *length).ok()?.trunc()))
    }
}
