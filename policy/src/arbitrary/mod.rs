//! Random networks, changes and flows for property tests, here and in other crates (feature `arbitrary`).
//!
//! Names, addresses and ports come from small pools, so that prefixes nest, rules overlap and flows hit boundaries. A
//! network is what is left of a random list of changes once the refused ones are dropped: always valid, and it shrinks by
//! dropping changes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;

use crate::{
    Change, DefaultPolicy, Flow, Network, NetworkName, NetworkParts, Node, NodeId, NodeState, Prefixes, Selector,
    ServiceRange, ServiceRef, protocol,
};

mod change;
mod fit;
pub mod law;
mod seal;

pub use change::{change, prefix, rule, selector, service};
pub use seal::sealed;

/// Any valid network: of either default, of one family or both, with roots from /0 to small.
pub fn network() -> impl Strategy<Value = Network> {
    (empty(), changes()).prop_map(|(network, changes)| grown(network, changes))
}

/// The objects of a valid network.
pub fn parts() -> impl Strategy<Value = NetworkParts> {
    network().prop_map(|network| network.to_parts())
}

/// A network and changes to make to it one after the other, some of which it refuses.
pub fn history(length: usize) -> impl Strategy<Value = (Network, Vec<Change>)> {
    (network(), prop::collection::vec(change(), 1..=length)).prop_map(|(network, changes)| {
        let mut after = network.clone();
        let fitted = changes.into_iter().map(|change| {
            let change = fit::fit(&after, change);
            let _refused = after.apply(&change);
            change
        });
        let fitted = fitted.collect();
        (network, fitted)
    })
}

/// A network without objects.
pub fn empty() -> impl Strategy<Value = Network> {
    let roots: [&[&str]; 7] = [
        &["10.42.0.0/16", "fd42::/48"],
        &["10.42.0.0/16", "fd42::/48"],
        &["10.0.0.0/8", "fd00::/8"],
        &["0.0.0.0/0", "::/0"],
        &["0.0.0.0/1", "fd42:0:0:1::/64"],
        &["10.42.0.0/16"],
        &["fd42::/48"],
    ];
    let default = prop_oneof![Just(DefaultPolicy::Lineage), Just(DefaultPolicy::Deny)];
    (select(roots.to_vec()), default).prop_map(|(roots, default)| {
        let roots = roots.iter().map(|root| root.parse::<IpNet>().expect("a literal"));
        let roots = Prefixes::from_nets(roots).expect("one of each family");
        let name: NetworkName = "corp".parse().expect("a literal");
        Network::new(name, roots, default).expect("no objects")
    })
}

/// The network with the changes that it takes, fitted to what it has.
fn grown(mut network: Network, changes: Vec<Change>) -> Network {
    for change in changes {
        let change = fit::fit(&network, change);
        let _refused = network.apply(&change);
    }
    network
}

/// Changes that fill an empty network, kind by kind.
fn changes() -> impl Strategy<Value = Vec<Change>> {
    use change::*;
    let some = |kind: BoxedStrategy<Change>, most: usize| prop::collection::vec(kind, 0..=most);
    let kinds = (
        some(add_cidr().boxed(), 20),
        some(add_node().boxed(), 8),
        some(activate_node().boxed(), 12),
        some(add_group().boxed(), 4),
        some(add_service().boxed(), 3),
        some(add_rule().boxed(), 16),
    );
    kinds.prop_map(|(a, b, c, d, e, f)| [a, b, c, d, e, f].concat())
}

/// Flows between the addresses that matter to a network (the ends of its prefixes and what lies next to them), of the
/// services that matter (the ends of their ranges and what lies next to them).
pub fn flow(network: &Network) -> BoxedStrategy<Flow> {
    let addresses = addresses(network);
    flow_between(network, addresses.clone(), addresses)
}

/// Flows with an end at an address that an active node stands for; none if there is no such node.
pub fn flow_at(network: &Network) -> Option<BoxedStrategy<(NodeId, Flow)>> {
    let active = network.nodes().values().filter(|node| node.state == NodeState::Active);
    let nodes: Vec<(NodeId, Vec<IpAddr>)> = active.map(|node| (node.id, stood_for(network, node))).collect();
    let all = addresses(network);
    if nodes.is_empty() {
        return None;
    }
    let network = network.clone();
    let flow = select(nodes).prop_flat_map(move |(node, own)| {
        let out = flow_between(&network, own.clone(), all.clone());
        let back = flow_between(&network, all.clone(), own);
        (Just(node), prop_oneof![out, back])
    });
    Some(flow.boxed())
}

fn flow_between(network: &Network, sources: Vec<IpAddr>, destinations: Vec<IpAddr>) -> BoxedStrategy<Flow> {
    let all = destinations.clone();
    let destination = move |source: IpAddr| {
        // Mostly of the source's family, as packets are.
        let alike: Vec<IpAddr> = all.iter().copied().filter(|address| address.is_ipv4() == source.is_ipv4()).collect();
        match alike.is_empty() {
            true => select(all.clone()),
            false => select(alike),
        }
    };
    let ends = select(sources).prop_flat_map(move |source| (Just(source), destination(source)));
    (ends, point(network))
        .prop_map(|((source, destination), (protocol, port))| Flow { source, destination, protocol, port })
        .boxed()
}

fn point(network: &Network) -> impl Strategy<Value = (u8, u16)> + use<> {
    select(points(network))
}

/// Protocols with a port or type: at least one of every run of services that the network's rules can tell apart.
pub fn points(network: &Network) -> Vec<(u8, u16)> {
    let mut points: BTreeSet<(u8, u16)> = BTreeSet::new();
    for ServiceRange { protocol, low, high } in ranges(network) {
        let near = [low.saturating_sub(1), low, high, high.saturating_add(1), low.midpoint(high)];
        points.extend(near.map(|port| (protocol, port)));
        // Another protocol at the same port.
        points.extend([(protocol::UDP, low), (protocol::TCP, high)]);
    }
    for protocol in [0, protocol::ICMP, protocol::TCP, protocol::UDP, 47, 50, protocol::ICMPV6, 132, 255] {
        points.extend([0, 8, 128, 255, 256, 443, u16::MAX].map(|port| (protocol, port)));
    }
    let sound = |(protocol, port): (u8, u16)| match protocol {
        protocol::TCP | protocol::UDP => (protocol, port),
        protocol::ICMP | protocol::ICMPV6 => (protocol, port.min(255)),
        _ => (protocol, 0),
    };
    let points: BTreeSet<(u8, u16)> = points.into_iter().map(sound).collect();
    Vec::from_iter(points)
}

fn ranges(network: &Network) -> Vec<ServiceRange> {
    let services = network.rules().values().flat_map(|rule| &rule.services);
    let literal = services.filter_map(|service| match service {
        ServiceRef::Literal(service) => Some(service),
        ServiceRef::Named(_) => None,
    });
    let named = network.services().values().flat_map(|named| &named.services);
    literal.chain(named).filter(|service| !service.is_any()).flat_map(|service| service.ranges()).collect()
}

/// Addresses at and next to the ends of every prefix that the network speaks of: at least one of every set of addresses
/// that its rules can tell apart. Those in some cidr come more often, since the others have one fate.
pub fn addresses(network: &Network) -> Vec<IpAddr> {
    let cidrs = network.cidrs().values().flat_map(|cidr| cidr.prefixes.iter());
    let nodes = network.nodes().values().flat_map(|node| node.addresses.iter()).map(IpNet::from);
    let selectors = network.rules().values().flat_map(|rule| rule.from.iter().chain(&rule.to));
    let literals = selectors.filter_map(|selector| match selector {
        Selector::Prefix(prefix) => Some(*prefix),
        Selector::Any | Selector::Cidr(_) | Selector::Node(_) | Selector::Group(_) => None,
    });
    let mut addresses: BTreeSet<IpAddr> = cidrs.chain(nodes).chain(literals).flat_map(around).collect();
    addresses.extend(
        ["10.42.3.9", "192.0.2.1", "fd42::9", "2001:db8:ffff::1"]
            .map(|text| text.parse::<IpAddr>().expect("a literal")),
    );
    let inside = addresses.iter().copied().filter(|address| network.cidr_of(*address).is_some());
    let twice: Vec<IpAddr> = inside.collect();
    [Vec::from_iter(addresses), twice.clone(), twice].concat()
}

/// Addresses that a node may stand for: whether it does behind a shared gateway is for the slice to say.
pub fn stood_for(network: &Network, node: &Node) -> Vec<IpAddr> {
    let behind = node.gateway_for.iter().filter_map(|id| network.cidrs().get(id)).flat_map(|cidr| cidr.prefixes.iter());
    let inside = |prefix: IpNet| around(prefix).into_iter().filter(move |address| prefix.contains(address));
    node.addresses.iter().chain(behind.flat_map(inside)).collect()
}

/// The ends of a prefix and what lies next to them.
fn around(prefix: IpNet) -> Vec<IpAddr> {
    fn near(first: u128, last: u128, highest: u128) -> [u128; 4] {
        [first.saturating_sub(1), first, last, last.saturating_add(1).min(highest)]
    }
    match prefix {
        IpNet::V4(net) => {
            let ends = near(u32::from(net.network()).into(), u32::from(net.broadcast()).into(), u32::MAX.into());
            ends.into_iter().filter_map(|end| u32::try_from(end).ok()).map(|end| IpAddr::V4(end.into())).collect()
        }
        IpNet::V6(net) => {
            let ends = near(net.network().into(), net.broadcast().into(), u128::MAX);
            ends.into_iter().map(|end| IpAddr::V6(end.into())).collect()
        }
    }
}
