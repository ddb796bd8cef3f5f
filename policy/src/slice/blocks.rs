//! Room in the table of a node that finds out what an address is: a tree of blocks, each of which reads one byte of the
//! address. Bytes that tell no prefixes apart are skipped.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{Peer, Slice};
use crate::prefix::longest_match;

/// Trees that the table of a node may have, at most: 2 for IPv4, 8 for IPv6.
const TREES: usize = 10;

/// What one more prefix costs at most: the block in which it ends, and one where it parts from the others.
pub(crate) const BLOCKS_EACH: usize = 2;
/// What a node's own addresses cost, of which there is at most one of each family.
pub(crate) const OWN_BLOCKS: usize = 2 * BLOCKS_EACH;

/// An upper bound of the blocks that the table of a node has for these prefixes, or for any selection of them.
///
/// In one tree there is a block wherever a prefix ends, and wherever prefixes part: where these blocks are sorted, between
/// two neighbours. A table may be several trees instead, each of which may repeat one block of another, or consist of a
/// block that is none of these.
pub fn stride_blocks(prefixes: impl IntoIterator<Item = IpNet>) -> usize {
    let mut blocks: Vec<Block> = prefixes.into_iter().map(Block::of).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let partings: Vec<Block> = blocks.windows(2).map(|pair| pair[0].parting(pair[1])).collect();
    blocks.extend(partings);
    blocks.sort_unstable();
    blocks.dedup();
    blocks.len() + TREES
}

/// The bytes that lead to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Block {
    /// Those bytes, then zeros.
    path: u128,
    bytes: u32,
}

impl Block {
    /// The one in which a prefix ends. An IPv4 address is written as the IPv6 address that is mapped to it.
    fn of(prefix: IpNet) -> Self {
        let (address, bits) = match prefix {
            IpNet::V4(net) => (net.network().to_ipv6_mapped(), 96 + net.prefix_len()),
            IpNet::V6(net) => (net.network(), net.prefix_len()),
        };
        Self::at(address.into(), u32::from(bits.saturating_sub(1)) / 8)
    }

    fn at(address: u128, bytes: u32) -> Self {
        let mask = u128::MAX.checked_shl(128 - 8 * bytes).unwrap_or(0);
        Self { path: address & mask, bytes }
    }

    /// The last one on the ways to both.
    fn parting(self, other: Self) -> Self {
        let shared = (self.path ^ other.path).leading_zeros() / 8;
        Self::at(self.path, shared.min(self.bytes).min(other.bytes))
    }
}

impl Slice {
    /// The peers that stand for more than themselves.
    fn gateways(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values().filter(|peer| !peer.allowed_ips.is_disjoint(&self.local.external_routes))
    }

    /// An upper bound of the blocks that the table of the node has, which is made of all prefixes at which class, cidr or
    /// holder may change. The same for every node that stands for the same classes.
    pub fn blocks(&self) -> usize {
        let local = &self.local;
        let routes = local.external_routes.iter().chain(&local.gateway_for);
        let gateways = self.gateways().flat_map(|peer| &peer.allowed_ips);
        stride_blocks(self.prefixes.keys().chain(routes).chain(gateways).copied()) + OWN_BLOCKS
    }

    /// How many kinds of addresses the table tells apart because a gateway holds them.
    pub fn held_leaves(&self) -> usize {
        let local = &self.local;
        let mut holders: BTreeMap<IpNet, Option<usize>> =
            local.external_routes.iter().chain(&local.gateway_for).map(|&net| (net, None)).collect();
        for (number, peer) in self.gateways().enumerate() {
            holders.extend(peer.allowed_ips.iter().map(|&net| (net, Some(number))));
        }
        if holders.is_empty() {
            return 0;
        }
        let held = self.prefixes.keys().chain(holders.keys()).filter_map(|&net| {
            let gateway = (*longest_match(&holders, net)?.1)?;
            let (_, place) = longest_match(&self.prefixes, net)?;
            Some((place, gateway))
        });
        held.collect::<BTreeSet<_>>().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prefixes: &[&str], expected: usize) {
        let prefixes = prefixes.iter().map(|text| text.parse::<IpNet>().unwrap());
        assert_eq!(stride_blocks(prefixes), expected + TREES);
    }

    #[test]
    fn blocks_are_where_prefixes_end_or_part() {
        check(&[], 0);
        check(&["10.0.0.0/8"], 1);
        check(&["::/0"], 1);
        // Both end in the last byte of one /24, and at two addresses of two.
        check(&["10.0.0.1/32", "10.0.0.2/32"], 1);
        check(&["10.0.0.1/32", "10.0.1.1/32"], 3);
        check(&["10.0.0.0/16", "10.0.0.1/32", "10.0.1.1/32"], 4);
        check(&["10.0.0.0/17", "10.0.128.0/17", "10.0.0.0/24"], 1);
        // However far apart, one more.
        check(&["fd42::1/128", "fd42:0:0:1::1/128"], 3);
        check(&["fd42::1/128", "10.0.0.1/32"], 3);
    }

    #[test]
    fn a_selection_has_no_more() {
        let texts =
            ["10.0.0.0/8", "10.1.0.0/20", "10.1.16.1/32", "10.2.0.0/15", "fd42::/48", "fd42:0:0:1::/64", "::/0"];
        let all: Vec<IpNet> = texts.iter().map(|text| text.parse().unwrap()).collect();
        for chosen in 0..1_u32 << all.len() {
            let some = all.iter().enumerate().filter(|(index, _)| chosen >> index & 1 == 1).map(|(_, net)| *net);
            assert!(stride_blocks(some) <= stride_blocks(all.iter().copied()), "{chosen:b}");
        }
    }
}
