//! Who holds an address: as in WireGuard, whoever has the longest prefix that contains it.

use std::collections::BTreeSet;

use ipnet::IpNet;
use policy::{PublicKey, Slice};

/// Prefixes, and the peer's key or the node's own. Followed from change to change, never made anew for one.
pub type Holders = policy::Map<IpNet, PublicKey>;

/// The holders that a slice names; `own` is this node's key.
pub fn holders(slice: &Slice, own: PublicKey) -> Holders {
    let peers = slice.peers.values().flat_map(|peer| peer.allowed_ips.iter().map(|prefix| (*prefix, peer.public_key)));
    let local = slice.local.addresses.iter().map(|address| (IpNet::from(address), own));
    peers.chain(local).chain(slice.local.gateway_for.iter().map(|prefix| (*prefix, own))).collect()
}

/// The prefixes whose addresses `new` gives to another holder than `old`, without what lies in them and stays.
pub fn changed(old: &Holders, new: &Holders) -> Vec<IpNet> {
    let (mut changed, mut same) = (Vec::new(), Vec::new());
    sweep(old, new, |outer, held| {
        if held.has_changed() {
            changed.push(held.prefix);
        } else if outer.iter().any(Held::has_changed) {
            same.push(held.prefix);
        }
    });
    changed.into_iter().flat_map(|prefix| without(prefix, &same)).collect()
}

/// What to remember once `new` holds: an address without a holder keeps its last one, so that its records die when
/// another takes it over.
pub fn remembered(old: &Holders, new: Holders) -> Holders {
    let mut orphans = Holders::new();
    sweep(old, &new, |_, held| {
        if let (Some(key), None) = (held.old, held.new) {
            orphans.insert(held.prefix, key);
        }
    });
    orphans.extend(new);
    orphans
}

/// The prefixes in which a part is held otherwise by `old` than by `new`: whoever has the prefix would hold the part while
/// that is on its way.
pub fn around_changes(old: &Holders, new: &Holders) -> BTreeSet<IpNet> {
    let mut around = BTreeSet::new();
    sweep(old, new, |outer, held| {
        if held.old != held.new {
            around.extend(outer.iter().map(|outer| outer.prefix));
        }
    });
    around
}

/// The prefixes in which another than their own holder has a part.
pub fn around_others(holders: &Holders) -> BTreeSet<IpNet> {
    let mut around = BTreeSet::new();
    sweep(holders, holders, |outer, held| {
        around.extend(outer.iter().filter(|outer| outer.new != held.new).map(|outer| outer.prefix));
    });
    around
}

/// A prefix of either of two maps, and its holders in both by longest match.
struct Held {
    prefix: IpNet,
    old: Option<PublicKey>,
    new: Option<PublicKey>,
}

impl Held {
    /// From one holder to another.
    fn has_changed(&self) -> bool {
        self.old.is_some() && self.new.is_some() && self.old != self.new
    }
}

/// Visits the prefixes of both maps, each after those that it lies in, which are given from the outermost on.
fn sweep(old: &Holders, new: &Holders, mut visit: impl FnMut(&[Held], &Held)) {
    let mut outer: Vec<Held> = Vec::new();
    // In their order a prefix comes right before all that lies in it.
    for prefix in old.keys().chain(new.keys()).copied().collect::<BTreeSet<_>>() {
        while outer.pop_if(|outer| !outer.prefix.contains(&prefix)).is_some() {}
        let above = outer.last();
        let held = Held {
            prefix,
            old: old.get(&prefix).copied().or(above.and_then(|above| above.old)),
            new: new.get(&prefix).copied().or(above.and_then(|above| above.new)),
        };
        visit(&outer, &held);
        outer.push(held);
    }
}

/// A prefix less others: as it is, or by halves.
fn without(prefix: IpNet, others: &[IpNet]) -> Vec<IpNet> {
    let inside: Vec<_> = others.iter().filter(|other| prefix.contains(*other)).copied().collect();
    if inside.is_empty() {
        return vec![prefix];
    }
    let halves = prefix.subnets(prefix.prefix_len() + 1).into_iter().flatten();
    halves.filter(|half| !inside.contains(half)).flat_map(|half| without(half, &inside)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Holders {
        let entry = |word: &str| {
            let (prefix, byte) = word.split_once('=').unwrap();
            let key = PublicKey::try_from([byte.parse().unwrap(); 32].as_slice()).unwrap();
            (prefix.parse::<IpNet>().unwrap(), key)
        };
        list.split_whitespace().map(entry).collect()
    }

    fn nets(text: &str) -> Vec<IpNet> {
        text.split_whitespace().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn flows_are_forgotten_where_the_longest_match_changed_and_nowhere_else() {
        for (old, new, expected) in [
            (
                "10.42.2.2/32=1 10.42.2.3/32=1 10.42.2.4/32=2",
                "10.42.2.2/32=1 10.42.2.3/32=2 10.42.2.5/32=2",
                "10.42.2.3/32",
            ),
            // To the gateway around it, and from it.
            ("10.50.0.0/16=1 10.50.1.0/24=2", "10.50.0.0/16=1", "10.50.1.0/24"),
            ("10.50.0.0/16=1", "10.50.0.0/16=1 10.50.1.0/24=2", "10.50.1.0/24"),
            // The part that another has stays.
            ("10.50.0.0/22=1 10.50.1.0/24=2", "10.50.0.0/22=3 10.50.1.0/24=2", "10.50.0.0/24 10.50.2.0/23"),
            (
                "10.50.0.0/23=1 10.50.1.0/24=2 10.50.1.1/32=3",
                "10.50.0.0/23=3 10.50.1.0/24=2 10.50.1.1/32=2",
                "10.50.0.0/24 10.50.1.1/32",
            ),
            // Two names of the same holding.
            ("10.50.0.0/16=1 10.50.1.0/24=1", "10.50.0.0/16=1", ""),
            ("fd50::/48=1", "fd50::/48=1 fd50:0:0:1::/64=2", "fd50:0:0:1::/64"),
            ("10.50.0.0/16=1", "", ""),
            ("", "10.50.0.0/16=1", ""),
        ] {
            assert_eq!(changed(&parse(old), &parse(new)), nets(expected), "{old} -> {new}");
        }
    }

    #[test]
    fn only_an_address_without_a_holder_keeps_its_last_one() {
        for (old, new, expected) in [
            ("10.42.2.2/32=1", "", "10.42.2.2/32=1"),
            ("10.50.0.0/16=1 10.50.1.0/24=2", "10.50.0.0/16=1", "10.50.0.0/16=1"),
            ("10.50.0.0/16=1", "10.50.1.0/24=2", "10.50.0.0/16=1 10.50.1.0/24=2"),
            ("10.42.2.2/32=1", "10.42.2.2/32=2", "10.42.2.2/32=2"),
        ] {
            assert_eq!(remembered(&parse(old), parse(new)), parse(expected), "{old} -> {new}");
        }
    }

    /// A gateway within a gateway's network that goes, comes back, and goes: its flows die each time.
    #[test]
    fn a_gateway_within_anothers_network_takes_no_flows_along() {
        let (outer, both) = (parse("10.50.0.0/16=1"), parse("10.50.0.0/16=1 10.50.1.0/24=2"));
        let mut memory = both.clone();
        for new in [&outer, &both, &outer] {
            assert_eq!(changed(&memory, new), nets("10.50.1.0/24"));
            memory = remembered(&memory, new.clone());
        }
    }

    #[test]
    fn prefixes_around_what_moves_and_around_others_are_known() {
        let (outer, both) =
            (parse("10.50.0.0/16=1 10.60.0.0/16=2"), parse("10.50.0.0/16=1 10.50.1.0/24=2 10.60.0.0/16=2"));
        let around: BTreeSet<_> = nets("10.50.0.0/16").into_iter().collect();
        assert_eq!(around_changes(&outer, &both), around);
        assert_eq!(around_changes(&both, &outer), around);
        assert_eq!(around_changes(&both, &both), BTreeSet::new());
        assert_eq!(around_others(&both), around);
        assert_eq!(around_others(&outer), BTreeSet::new());
    }
}
