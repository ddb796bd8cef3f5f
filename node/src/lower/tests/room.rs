//! What a slice needs of the address table, by the policy's count.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use policy::{CidrId, ClassId, Slice};
use proptest::prelude::*;

use super::{by_node, join, lowered, network_and_flows, node, slice_of, small};

/// The policy never counts less than there is, and of blocks not much more.
fn check(slice: &Slice) -> Result<(), TestCaseError> {
    let tables = lowered(slice);
    let (real, bound) = (tables.blocks.len(), slice.room().blocks);
    // What trees may repeat, this node's addresses, and what joins trees that have nothing in common.
    prop_assert!(real <= bound && bound <= real + 20, "{} blocks, {} counted", real, bound);
    let (real, bound) = (tables.paths.len(), slice.room().paths);
    prop_assert!(real <= bound, "{} paths, {} counted", real, bound);
    let places: BTreeSet<_> = slice.prefixes.values().collect();
    let leaves = 2 * (places.len() + 1) + slice.held_leaves();
    prop_assert!(tables.leaves.len() <= leaves, "{} leaves, {} counted", tables.leaves.len(), leaves);
    Ok(())
}

/// A prefix that lies near many others.
fn net() -> impl Strategy<Value = IpNet> {
    let byte = || prop_oneof![Just(0_u8), Just(1), Just(128), any::<u8>()];
    let v4 = (prop::sample::select(vec![[10, 42], [10, 43], [192, 168], [172, 16]]), [byte(), byte()], 8..=32_u8);
    let v6 = (prop::sample::select(vec![0xfd42, 0xfd43, 0x2001, 0x2a00]), prop::array::uniform14(byte()), 12..=128_u8);
    prop_oneof![
        v4.prop_map(|([a, b], [c, d], bits)| {
            IpNet::V4(Ipv4Net::new(Ipv4Addr::new(a, b, c, d), bits).expect("a length").trunc())
        }),
        v6.prop_map(|(top, rest, bits): (u16, [u8; 14], u8)| {
            let mut bytes = [0; 16];
            bytes[..2].copy_from_slice(&top.to_be_bytes());
            bytes[2..].copy_from_slice(&rest);
            IpNet::V6(Ipv6Net::new(Ipv6Addr::from(bytes), bits).expect("a length").trunc())
        }),
    ]
}

/// A slice of a node with three peers and prefixes of all kinds, as no controller would make it.
fn wild() -> impl Strategy<Value = Slice> {
    let kind = (net(), 1..4_u32, 1..4_u32, 0..12_u32);
    prop::collection::vec(kind, 0..200).prop_map(|kinds| {
        let mut network = small();
        for (key, name) in (20..).zip(["p1", "p2", "p3"]) {
            join(&mut network, name, "web", None, key);
        }
        super::apply(&mut network, super::allow("r", "cidr:web", "cidr:web", "any"));
        let mut slice = slice_of(&network, node(&network));
        for (net, class, cidr, kind) in kinds {
            let id = *slice.peers.keys().nth(class as usize - 1).expect("three peers");
            let peer = slice.peers.get_mut(&id).expect("it is there");
            let allowed_ips = std::sync::Arc::make_mut(&mut peer.allowed_ips);
            let local = std::sync::Arc::make_mut(&mut slice.local);
            match kind {
                0 => {
                    allowed_ips.insert(net);
                    local.external_routes.insert(net);
                }
                1 => drop(allowed_ips.insert(net)),
                2 => drop(local.external_routes.insert(net)),
                3 => drop(local.gateway_for.insert(net)),
                _ => drop(slice.prefixes.insert(net, (ClassId(u64::from(class)), CidrId(cidr)))),
            }
        }
        slice
    })
}

proptest! {
    #[test]
    fn a_slice_has_room_where_the_policy_says_so((network, flows) in network_and_flows()) {
        for (slice, ..) in by_node(&network, &flows) {
            check(&slice)?;
        }
    }

    #[test]
    fn any_slice_has_room_where_the_policy_says_so(slice in wild()) {
        check(&slice)?;
    }
}
