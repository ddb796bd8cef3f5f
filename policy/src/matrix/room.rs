//! Room in the table of a node that finds out what an address is: a tree of blocks, each of which reads one byte of the
//! address, and of paths, along which nothing branches.

use std::ops::{Add, Mul};

use ipnet::IpNet;

use crate::limit::{self, Bounded, LimitError};

/// What an address table is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    pub blocks: usize,
    pub paths: usize,
}

/// What every table may have besides: in each family a tree for the network's own root and one for the rest, either of
/// which may repeat a block of the other, and the path that tells them apart.
const TREES: Room = Room { blocks: 4, paths: 8 };

/// What one more prefix costs at most: the block in which it parts from the others and a path ahead of it, and a path to
/// its own end.
pub(crate) const ROOM_EACH: Room = Room { blocks: 1, paths: 2 };
/// What a node's own addresses cost, of which there is at most one of each family.
pub(crate) const OWN_ROOM: Room = Room { blocks: 2, paths: 4 };

/// An upper bound of what the table of a node has for these prefixes, or for any selection of them.
///
/// In one tree there is a block wherever prefixes part: where they are sorted, between two neighbours. A path leads to a
/// block, or to the end of a prefix that no other one shares its last block with.
pub fn stride_room(prefixes: impl IntoIterator<Item = IpNet>) -> Room {
    let mut ends: Vec<(Block, IpNet)> = prefixes.into_iter().map(|net| (Block::of(net), net)).collect();
    ends.sort_unstable();
    ends.dedup();
    let mut partings: Vec<Block> = ends.windows(2).map(|pair| pair[0].0.parting(pair[1].0)).collect();
    partings.sort_unstable();
    partings.dedup();
    ends.dedup_by_key(|(block, _)| *block);
    Room { blocks: partings.len(), paths: ends.len() + partings.len() } + TREES
}

impl Room {
    /// Refuses more than a node's table has.
    pub(crate) fn check(self) -> Result<(), LimitError> {
        Bounded::SliceBlocks.check(self.blocks, limit::MAX_SLICE_BLOCKS)?;
        Bounded::SlicePaths.check(self.paths, limit::MAX_SLICE_PATHS)
    }
}

impl Add for Room {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { blocks: self.blocks + other.blocks, paths: self.paths + other.paths }
    }
}

impl Mul<usize> for Room {
    type Output = Self;

    fn mul(self, times: usize) -> Self {
        Self { blocks: self.blocks * times, paths: self.paths * times }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prefixes: &[&str], blocks: usize, paths: usize) {
        let prefixes = prefixes.iter().map(|text| text.parse::<IpNet>().unwrap());
        assert_eq!(stride_room(prefixes), Room { blocks, paths } + TREES);
    }

    #[test]
    fn blocks_are_where_prefixes_part() {
        check(&[], 0, 0);
        check(&["10.0.0.0/8"], 0, 1);
        check(&["::/0"], 0, 1);
        check(&["10.0.0.1/32", "10.0.0.1/32"], 0, 1);
        // Both end in the last byte of one /24, and at two addresses of two.
        check(&["10.0.0.1/32", "10.0.0.2/32"], 1, 2);
        check(&["10.0.0.1/32", "10.0.1.1/32"], 1, 3);
        check(&["10.0.0.0/16", "10.0.0.1/32", "10.0.1.1/32"], 2, 5);
        check(&["10.0.0.0/17", "10.0.128.0/17", "10.0.0.0/24"], 1, 2);
        // However far apart, one more.
        check(&["fd42::1/128", "fd42:0:0:1::1/128"], 1, 3);
        check(&["fd42::1/128", "10.0.0.1/32"], 1, 3);
    }

    #[test]
    fn a_selection_has_no_more() {
        let texts =
            ["10.0.0.0/8", "10.1.0.0/20", "10.1.16.1/32", "10.2.0.0/15", "fd42::/48", "fd42:0:0:1::/64", "::/0"];
        let all: Vec<IpNet> = texts.iter().map(|text| text.parse().unwrap()).collect();
        let room = stride_room(all.iter().copied());
        for chosen in 0..1_u32 << all.len() {
            let some = all.iter().enumerate().filter(|(index, _)| chosen >> index & 1 == 1).map(|(_, net)| *net);
            let some = stride_room(some);
            assert!(some.blocks <= room.blocks && some.paths <= room.paths, "{chosen:b}");
        }
    }
}
