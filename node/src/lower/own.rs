//! Who stands for which addresses, and what every prefix of the slice is.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use policy::{CidrId, ClassId, Slice};

/// What the addresses of a prefix are, unless a longer prefix says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// `None`: in no cidr.
    pub(super) place: Option<(ClassId, CidrId)>,
    /// In a cidr of which nothing lies in the network's roots.
    pub(super) is_external: bool,
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
#[derive(Debug)]
pub(super) struct Entries {
    map: BTreeMap<IpNet, Entry>,
    holders: BTreeMap<IpNet, Holder>,
    holder_lengths: Lengths,
    place_lengths: Lengths,
    /// How many prefixes each cidr has.
    cidrs: BTreeMap<CidrId, Spread>,
}

/// What a prefix was, and what it is.
#[derive(Debug)]
pub(super) struct ChangedEntry {
    pub(super) net: IpNet,
    pub(super) before: Option<Entry>,
    pub(super) after: Option<Entry>,
}

/// Where prefixes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Spread {
    in_roots: usize,
    outside: usize,
}

impl Entries {
    pub(super) fn new(slice: &Slice) -> Self {
        let mut entries = Self {
            map: BTreeMap::new(),
            holders: holders(slice),
            holder_lengths: Lengths::default(),
            place_lengths: Lengths::default(),
            cidrs: BTreeMap::new(),
        };
        for net in entries.holders.keys() {
            entries.holder_lengths.add(*net);
        }
        for (net, (_, cidr)) in &slice.prefixes {
            entries.place_lengths.add(*net);
            *entries.spread(slice, *net, *cidr) += 1;
        }
        let nets: BTreeSet<IpNet> = slice.prefixes.keys().chain(entries.holders.keys()).copied().collect();
        entries.map = nets.into_iter().map(|net| (net, entries.entry(slice, net))).collect();
        entries
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (IpNet, &Entry)> {
        self.map.iter().map(|(net, entry)| (*net, entry))
    }

    /// Brings them up to date with a slice in which nobody else holds anything, and in which `nets` are all the prefixes
    /// that differ. `None`: more would be another than these.
    pub(super) fn follow(&mut self, old: &Slice, new: &Slice, nets: &BTreeSet<IpNet>) -> Option<Vec<ChangedEntry>> {
        let cidr = |slice: &Slice, net| slice.prefixes.get(net).map(|(_, cidr)| *cidr);
        let cidrs: BTreeSet<CidrId> = nets.iter().flat_map(|net| [cidr(old, net), cidr(new, net)]).flatten().collect();
        let is_external = |entries: &Self| -> Vec<Option<bool>> {
            cidrs.iter().map(|cidr| entries.cidrs.get(cidr).map(|spread| spread.in_roots == 0)).collect()
        };
        let before = is_external(self);
        for net in nets {
            if let Some(cidr) = cidr(old, net) {
                self.place_lengths.remove(*net);
                *self.spread(old, *net, cidr) -= 1;
            }
            if let Some(cidr) = cidr(new, net) {
                self.place_lengths.add(*net);
                *self.spread(new, *net, cidr) += 1;
            }
        }
        for cidr in &cidrs {
            if self.cidrs.get(cidr) == Some(&Spread::default()) {
                self.cidrs.remove(cidr);
            }
        }
        let flips = |(before, after): (Option<bool>, Option<bool>)| before.zip(after).is_some_and(|(a, b)| a != b);
        if before.into_iter().zip(is_external(self)).any(flips) {
            return None;
        }
        // Where a holder's prefix is in no longer one its place is that of the prefix around it.
        let held = |net: &IpNet| self.holders.range(*net..=IpNet::from(net.broadcast())).map(|(net, _)| *net);
        let about: BTreeSet<IpNet> = nets.iter().flat_map(|net| held(net).chain([*net])).collect();
        let mut changed = Vec::new();
        for net in about {
            let is_there = new.prefixes.contains_key(&net) || self.holders.contains_key(&net);
            let after = is_there.then(|| self.entry(new, net));
            let before = match after {
                Some(entry) => self.map.insert(net, entry),
                None => self.map.remove(&net),
            };
            if before != after {
                changed.push(ChangedEntry { net, before, after });
            }
        }
        Some(changed)
    }

    fn entry(&self, slice: &Slice, net: IpNet) -> Entry {
        let place = self.place_lengths.longest(net, |net| slice.prefixes.get(&net).copied());
        let holder = self.holder_lengths.longest(net, |net| self.holders.get(&net).copied());
        Entry {
            place,
            is_external: place
                .is_some_and(|(_, cidr)| self.cidrs.get(&cidr).is_some_and(|spread| spread.in_roots == 0)),
            holder: holder.unwrap_or(Holder::Other),
        }
    }

    fn spread(&mut self, slice: &Slice, net: IpNet, cidr: CidrId) -> &mut usize {
        let spread = self.cidrs.entry(cidr).or_default();
        if slice.local.roots.contains(net.network()) { &mut spread.in_roots } else { &mut spread.outside }
    }
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

/// How many prefixes there are of each length: the longest match asks only for the lengths that occur.
#[derive(Debug)]
struct Lengths {
    v4: [usize; 33],
    v6: [usize; 129],
}

impl Default for Lengths {
    fn default() -> Self {
        Self { v4: [0; 33], v6: [0; 129] }
    }
}

impl Lengths {
    fn add(&mut self, net: IpNet) {
        *self.of(net) += 1;
    }

    fn remove(&mut self, net: IpNet) {
        *self.of(net) -= 1;
    }

    fn of(&mut self, net: IpNet) -> &mut usize {
        let length = usize::from(net.prefix_len());
        if matches!(net, IpNet::V4(_)) { &mut self.v4[length] } else { &mut self.v6[length] }
    }

    /// The value of the longest prefix that contains all of `net`.
    fn longest<T>(&self, net: IpNet, get: impl Fn(IpNet) -> Option<T>) -> Option<T> {
        let lengths: &[usize] = if matches!(net, IpNet::V4(_)) { &self.v4 } else { &self.v6 };
        (0..=net.prefix_len())
            .rev()
            .filter(|length| lengths[usize::from(*length)] > 0)
            .find_map(|length| get(IpNet::new(net.network(), length).ok()?.trunc()))
    }
}
