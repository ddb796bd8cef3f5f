//! Room in the table of a node that finds out what an address is: a tree of blocks, each of which reads one byte of the
//! address, and of paths, along which nothing branches.

use std::ops::{Add, Bound, Mul};

use ipnet::IpNet;

use crate::Map;
use crate::count::{less, more};
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

/// What [`stride_room`] counts, followed from prefix to prefix. A prefix may be there more than once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Strides {
    ends: Map<(Block, IpNet), usize>,
    /// How many distinct prefixes end in a block.
    blocks: Map<Block, usize>,
    /// How many neighbours part in a block.
    partings: Map<Block, usize>,
}

impl Strides {
    pub(crate) fn add(&mut self, prefix: IpNet) {
        let end = (Block::of(prefix), prefix);
        if more(&mut self.ends, &end) {
            more(&mut self.blocks, &end.0);
            let (before, after) = self.neighbours(end);
            if let Some(before) = before {
                more(&mut self.partings, &before.parting(end.0));
            }
            if let Some(after) = after {
                more(&mut self.partings, &end.0.parting(after));
            }
            if let Some((before, after)) = before.zip(after) {
                less(&mut self.partings, &before.parting(after));
            }
        }
    }

    pub(crate) fn remove(&mut self, prefix: IpNet) {
        let end = (Block::of(prefix), prefix);
        if less(&mut self.ends, &end) {
            less(&mut self.blocks, &end.0);
            let (before, after) = self.neighbours(end);
            if let Some(before) = before {
                less(&mut self.partings, &before.parting(end.0));
            }
            if let Some(after) = after {
                less(&mut self.partings, &end.0.parting(after));
            }
            if let Some((before, after)) = before.zip(after) {
                more(&mut self.partings, &before.parting(after));
            }
        }
    }

    /// The blocks of the ends right before and right after one.
    fn neighbours(&self, end: (Block, IpNet)) -> (Option<Block>, Option<Block>) {
        let before = self.ends.range(..end).next_back().map(|((block, _), _)| *block);
        let after = self.ends.range((Bound::Excluded(end), Bound::Unbounded)).next().map(|((block, _), _)| *block);
        (before, after)
    }

    pub(crate) fn room(&self) -> Room {
        Room { blocks: self.partings.len(), paths: self.blocks.len() + self.partings.len() } + TREES
    }
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
    use proptest::prelude::*;

    use super::*;
    use crate::arbitrary;

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

    proptest! {
        /// Breaks if what is followed drifts from what is counted.
        #[test]
        fn followed_strides_take_the_room_of_their_prefixes(
            steps in prop::collection::vec((any::<bool>(), arbitrary::prefix()), 1..120),
        ) {
            let (mut strides, mut prefixes) = (Strides::default(), Vec::new());
            for (comes, prefix) in steps {
                let at = prefixes.iter().position(|there| *there == prefix);
                match at {
                    Some(at) if !comes => {
                        prefixes.remove(at);
                        strides.remove(prefix);
                    }
                    _ => {
                        prefixes.push(prefix);
                        strides.add(prefix);
                    }
                }
                prop_assert_eq!(strides.room(), stride_room(prefixes.iter().copied()));
            }
            prefixes.into_iter().for_each(|prefix| strides.remove(prefix));
            prop_assert_eq!(strides, Strides::default());
        }
    }
}
