//! Who stands for which addresses, and what every prefix of the slice is.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use policy::{CidrId, ClassId, Slice};

/// What the addresses of a prefix are, unless a longer prefix says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// `None`: in no cidr.
    pub(super) place: Option<(ClassId, CidrId)>,
    pub(super) holder: Holder,
}

/// Who stands for an address, as far as the tables say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// This node.
    Local,
    /// A peer that is a gateway, by its number from 1 on.
    Gateway(u32),
    /// Any other node, or none.
    Other,
}

impl Entry {
    pub(super) fn class(&self) -> Option<ClassId> {
        self.place.map(|(class, _)| class)
    }
}

/// Every prefix at which class, cidr or holder may change.
pub(super) fn entries(slice: &Slice) -> BTreeMap<IpNet, Entry> {
    let holders = Covering::new(holders(slice));
    let places = Covering::new(slice.prefixes.iter().map(|(net, place)| (*net, *place)).collect());
    let nets: BTreeSet<IpNet> = places.map.keys().chain(holders.map.keys()).copied().collect();
    nets.into_iter()
        .map(|net| {
            let holder = holders.of(net).copied().unwrap_or(Holder::Other);
            (net, Entry { place: places.of(net).copied(), holder })
        })
        .collect()
}

/// This node's own addresses and the prefixes that it is the active gateway of; of each peer that is a gateway likewise.
/// Prefixes of gateways that are no peers are cut out of those around them. The addresses of other peers are not here:
/// each would cost a prefix.
fn holders(slice: &Slice) -> BTreeMap<IpNet, Holder> {
    let local = &slice.local;
    let mut holders: BTreeMap<IpNet, Holder> = local.gateway_for.iter().map(|net| (*net, Holder::Local)).collect();
    holders.extend(local.external_routes.iter().map(|net| (*net, Holder::Other)));
    let gateways = slice.peers.values().filter(|peer| !peer.allowed_ips.is_disjoint(&local.external_routes));
    for (peer, number) in gateways.zip(1..) {
        holders.extend(peer.allowed_ips.iter().map(|net| (*net, Holder::Gateway(number))));
    }
    holders.extend(local.addresses.iter().map(|address| (IpNet::from(address), Holder::Local)));
    holders
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
