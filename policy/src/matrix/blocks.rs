//! How many blocks, paths and leaves the address table of a node may have, before its slice is made.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::compile::Used;
use super::{Matrix, Place};
use crate::network::Network;
use crate::object::id::CidrId;
use crate::object::selector::Selector;
use crate::slice::{OWN_ROOM, ROOM_EACH, Room, stride_room};

/// What every bound is made of.
#[derive(Debug)]
pub(super) struct Blocks {
    /// With all prefixes.
    all: Room,
    /// With those that every slice may have: of cidrs, and the addresses of gateways.
    common: Room,
    /// How many more prefixes each selector speaks of.
    by_selector: Vec<usize>,
    /// How many prefixes lie directly in each cidr.
    by_cidr: BTreeMap<CidrId, usize>,
    /// Leaves that are of their own because a gateway holds the addresses.
    pub(super) held: usize,
}

impl Blocks {
    pub(super) fn of(matrix: &Matrix, network: &Network) -> Self {
        let ids = matrix.stands.gateways();
        let gateways =
            ids.iter().filter_map(|id| network.nodes().get(id)).flat_map(|node| node.addresses.iter()).map(IpNet::from);
        let cidrs = network.cidrs().values().flat_map(|cidr| cidr.prefixes.iter());
        let common: Vec<IpNet> = cidrs.chain(gateways).collect();
        let prefixes = &matrix.classes.prefixes;
        let mut by_cidr: BTreeMap<CidrId, usize> = BTreeMap::new();
        for (_, cidr) in prefixes.values() {
            *by_cidr.entry(*cidr).or_default() += 1;
        }
        let selectors = matrix.rules.selectors.iter();
        Self {
            all: stride_room(common.iter().chain(prefixes.keys()).copied()),
            common: stride_room(common),
            by_selector: selectors.map(|selector| prefixes_of(network, selector)).collect(),
            by_cidr,
            held: ids.iter().map(|id| matrix.stands.classes_of(*id).len()).sum(),
        }
    }

    /// For a node that stands for these places. `selectors`: those that select one of them, and those that the other end
    /// needs for a rule that has them on one side.
    ///
    /// A slice leaves out each prefix that the node cannot tell from what is around it. It can where a selector of the
    /// prefix matters to it, or where what is around it is its own.
    pub(super) fn bound(&self, own: &BTreeSet<Place>, selectors: &BTreeSet<Used>) -> Room {
        let cidrs: BTreeSet<CidrId> = own.iter().map(|&(_, cidr)| cidr).collect();
        let inside = cidrs.iter().filter_map(|cidr| self.by_cidr.get(cidr)).sum::<usize>();
        let selected = selectors.iter().map(|&used| self.by_selector[used as usize]).sum::<usize>();
        self.all.min(self.common + ROOM_EACH * (inside + selected)) + OWN_ROOM
    }
}

/// How many prefixes a selector speaks of that are no cidr's.
fn prefixes_of(network: &Network, selector: &Selector) -> usize {
    let addresses = |id| network.nodes().get(id).map_or(0, |node| node.addresses.iter().count());
    match selector {
        Selector::Any | Selector::Cidr(_) => 0,
        Selector::Node(id) => addresses(id),
        Selector::Group(id) => network.groups().get(id).into_iter().flat_map(|group| &group.nodes).map(addresses).sum(),
        Selector::Prefix(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        Action, Bounded, Change, DefaultPolicy, Matrix, Network, Prefixes, PublicKey, RuleSpec, SelectorSpec, limit,
    };

    /// The node `hub`, and rules of 256 clients each, which lie in prefixes of 24 bits: `each` side by side.
    fn scattered(rules: usize, each: usize) -> Network {
        let prefixes = |text: &str| Prefixes::from_nets([text.parse().unwrap()]).unwrap();
        let mut network = Network::new("corp".parse().unwrap(), prefixes("10.0.0.0/8"), DefaultPolicy::Deny).unwrap();
        let mut apply = |change: Change| drop(network.apply(&change).unwrap());
        for (name, net) in [("hub", "10.1.0.0/16"), ("clients", "10.128.0.0/9")] {
            let (name, prefixes) = (name.parse().unwrap(), prefixes(net));
            apply(Change::AddCidr { name, prefixes, isolated: false, external: false });
        }
        let (name, cidr) = ("hub".parse().unwrap(), "hub".parse().unwrap());
        apply(Change::AddNode { name, cidr, addresses: None, groups: Vec::new(), gateway_for: Vec::new() });
        let public_key = PublicKey::try_from([1; 32]).unwrap();
        apply(Change::ActivateNode { name: "hub".parse().unwrap(), public_key });
        for rule in 0..rules {
            let from = (0..256).map(|client| {
                let (net, host) = ((rule * 256 + client) / each, client % each);
                SelectorSpec::Prefix(format!("10.{}.{}.{host}/32", 128 + net / 256, net % 256).parse().unwrap())
            });
            apply(Change::AddRule(RuleSpec {
                name: format!("r{rule}").parse().unwrap(),
                action: Action::Allow,
                from: from.collect(),
                to: vec!["node:hub".parse().unwrap()],
                services: vec!["tcp/443".parse().unwrap()],
                priority: 0,
                both: false,
                log: false,
                comment: String::new(),
            }));
        }
        network
    }

    /// Breaks if a node could be sent prefixes that its address table has no room for.
    #[test]
    fn a_policy_that_scatters_prefixes_is_refused() {
        let check = |rules, each| {
            let network = scattered(rules, each);
            Matrix::compile(&network).unwrap().check_slices(&network)
        };
        // A block for each pair of neighbours.
        let rules = limit::MAX_SLICE_BLOCKS / 128;
        assert_eq!(check(rules - 1, 2), Ok(()));
        let refused = check(rules, 2).unwrap_err();
        assert_eq!((refused.node.to_string().as_str(), refused.limit.what), ("hub", Bounded::SliceBlocks));
        assert!(refused.limit.to_string().contains("side by side"), "{}", refused.limit);
        // A path for each that is alone; in nets of 256 they part in one block.
        let rules = limit::MAX_SLICE_PATHS / 256;
        assert_eq!(check(rules - 2, 1), Ok(()));
        let refused = check(rules, 1).unwrap_err();
        assert_eq!((refused.node.to_string().as_str(), refused.limit.what), ("hub", Bounded::SlicePaths));
        assert!(refused.limit.to_string().contains("side by side"), "{}", refused.limit);
    }
}
