//! Whose addresses the leaves say they are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ebpf_common::table::{EXTERNAL, LOCAL};
use policy::{Change, CidrId, Network, NodeId, NodeState, Slice};
use proptest::prelude::*;

use super::{allow, apply, by_node, join, lowered, network_and_flows, node, slice_of, small};

proptest! {
    #[test]
    fn the_addresses_of_one_gateway_and_no_others_have_its_number((network, flows) in network_and_flows()) {
        for (slice, tables, flows) in by_node(&network, &flows) {
            let nets = slice.prefixes.keys().chain(slice.peers.values().flat_map(|peer| peer.allowed_ips.iter()));
            let ends = nets.flat_map(|net| [net.network(), net.broadcast()]);
            let mut numbers: BTreeMap<u32, NodeId> = BTreeMap::new();
            for address in ends.chain(flows.iter().flat_map(|flow| [flow.source, flow.destination])) {
                let holder = tables.leaf(address).expect("whole").holder();
                let gateway = slice.lookup(address).and_then(|_| gateway_of(&network, &slice, address));
                prop_assert_eq!(holder != 0, gateway.is_some(), "{} is of {:?}", address, gateway);
                if let Some(gateway) = gateway {
                    prop_assert_eq!(*numbers.entry(holder).or_insert(gateway), gateway, "{}", address);
                }
            }
            let gateways: BTreeSet<NodeId> = numbers.values().copied().collect();
            prop_assert_eq!(gateways.len(), numbers.len(), "one gateway has two numbers");
        }
    }
}

/// The peer that is a gateway and stands for an address, found by scanning the network: docs/POLICY.md, section 4.
fn gateway_of(network: &Network, slice: &Slice, address: IpAddr) -> Option<NodeId> {
    let active = || network.nodes().values().filter(|node| node.state == NodeState::Active);
    let serves = |cidr: &CidrId| active().find(|node| node.gateway_for.contains(cidr)).map(|node| node.id);
    let inside = network.cidrs().values().flat_map(|cidr| cidr.prefixes.iter().map(|net| (net, cidr.id)));
    let served = inside.filter(|(net, cidr)| net.contains(&address) && serves(cidr).is_some());
    let behind = served.max_by_key(|(net, _)| net.prefix_len()).and_then(|(_, cidr)| serves(&cidr));
    let owner = active().find(|node| node.addresses.contains(address)).map(|node| node.id);
    let is_gateway =
        |id: &NodeId| network.cidrs().keys().any(|cidr| serves(cidr) == Some(*id)) && slice.peers.contains_key(id);
    owner.or(behind).filter(is_gateway)
}

/// `small` with networks behind gateways: 192.168.0.0/16 behind `g1`, in it 192.168.8.0/24 behind `g2`, in that
/// 192.168.8.64/26 behind `w0` and 192.168.8.128/26 behind `g3`, which is no peer of `w0`.
fn nested() -> Network {
    let mut network = small();
    for (key, (cidr, net, gateway, home)) in (20..).zip([
        ("site", "192.168.0.0/16", "g1", "db"),
        ("lab", "192.168.8.0/24", "g2", "db"),
        ("bench", "192.168.8.64/26", "w0", "web"),
        ("vault", "192.168.8.128/26", "g3", "db"),
    ]) {
        let prefixes = policy::Prefixes::from_nets([net.parse().expect("a prefix")]).expect("one");
        let name = cidr.parse().expect("a name");
        apply(&mut network, Change::AddCidr { name, prefixes, isolated: false, external: true });
        join(&mut network, gateway, home, Some(cidr), key);
    }
    apply(&mut network, allow("site", "cidr:web", "node:g1", "tcp/443"));
    apply(&mut network, allow("lab", "cidr:web", "node:g2", "tcp/443"));
    network
}

#[test]
fn nested_prefixes_are_held_by_the_gateway_of_the_deepest() {
    let network = nested();
    let id = |name: &str| network.node_named(&name.parse().expect("a name")).expect("it is there").id;
    let slice = slice_of(&network, id("w0"));
    let tables = lowered(&slice);
    let leaf = |address: &str| tables.leaf(address.parse().expect("an address")).expect("whole");
    assert!(slice.peers.contains_key(&id("g1")) && slice.peers.contains_key(&id("g2")));
    assert!(!slice.peers.contains_key(&id("g3")), "nothing is allowed with it");
    let (g1, g2) = (leaf("10.42.2.1").holder(), leaf("10.42.2.2").holder());
    assert!(g1 != 0 && g2 != 0 && g1 != g2, "{g1} {g2}");
    for (address, holder) in [
        ("192.168.0.1", g1),
        ("192.168.255.1", g1),
        ("192.168.8.1", g2),
        ("192.168.8.255", g2),
        ("192.168.8.65", 0),
        ("192.168.8.129", 0),
        ("fd42:0:0:2::1", g1),
        ("fd42:0:0:2::2", g2),
        // `g3` is no peer, `n0` no gateway, and the last are no node's.
        ("10.42.2.3", 0),
        ("10.42.1.1", 0),
        ("10.42.2.4", 0),
        ("8.8.8.8", 0),
    ] {
        assert_eq!(leaf(address).holder(), holder, "{address}");
    }
    assert_eq!(leaf("192.168.8.65").flags, LOCAL, "this node's own");
    // The same addresses at a gateway: what it serves is local, what is served behind it by another is not.
    let tables = lowered(&slice_of(&network, id("g2")));
    let leaf = |address: &str| tables.leaf(address.parse().expect("an address")).expect("whole");
    assert_eq!((leaf("10.42.2.2").flags, leaf("192.168.8.1").flags), (LOCAL, LOCAL));
    assert_eq!((leaf("10.42.2.1").flags, leaf("192.168.0.1").flags), (0, EXTERNAL), "nothing is allowed with `g1`");
    assert_ne!(leaf("192.168.8.65").holder(), 0);
    assert_eq!(leaf("192.168.8.65").holder(), leaf("10.42.1.2").holder(), "`w0` is its gateway");
}

#[test]
fn only_gateways_cost_prefixes_of_their_own() {
    let mut network = small();
    apply(&mut network, allow("r1", "cidr:web", "cidr:db", "tcp/443"));
    let before = lowered(&slice_of(&network, node(&network)));
    for number in 0..40 {
        join(&mut network, &format!("d{number}"), "db", None, number + 20);
    }
    let slice = slice_of(&network, node(&network));
    assert_eq!(slice.peers.len(), 40);
    let after = lowered(&slice);
    assert_eq!((after.blocks.len(), after.leaves), (before.blocks.len(), before.leaves));
}
