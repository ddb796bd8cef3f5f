//! A tree of blocks and paths, in which the longest prefix of an address is found.
//!
//! [`Nodes::build`] makes a tree of prefixes, and [`Tree::paint`] brings it up to date where one prefix is another. A part
//! with few prefixes is built anew, so that it is as small as can be. A part with many keeps its blocks, which may be more
//! than a new one would have; where it would need others at the top, it is for the whole to be made anew.

use std::collections::BTreeMap;

use ebpf_common::limit;
use ebpf_common::table::{Address, BLOCK, Block, INDEX, PATH, Path, UNKNOWN, block_entry, block_of};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::holed::Holed;

/// A part of the tree that has no more prefixes is built anew.
pub(super) const FEW: usize = 16;
/// A prefix that has more others inside it is not painted, nor are more prefixes one by one.
pub(super) const MANY: usize = 1_024;

/// What the addresses of one prefix are, by prefixes inside it.
#[derive(Debug)]
pub(super) struct Tree {
    /// All that its addresses share.
    region: Prefix,
    /// Of a walk, the leaf included.
    steps: u32,
    /// With their leaves; one comes before those inside it.
    prefixes: BTreeMap<Prefix, u32>,
    pub(super) entry: u32,
}

impl Tree {
    pub(super) fn new(region: Prefix, steps: u32) -> Self {
        Self { region, steps, prefixes: BTreeMap::new(), entry: UNKNOWN }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.prefixes.is_empty()
    }

    /// What a prefix says, before the tree is planted or painted; its former leaf.
    pub(super) fn set(&mut self, at: Prefix, leaf: Option<u32>) -> Option<u32> {
        match leaf {
            Some(leaf) => self.prefixes.insert(at, leaf),
            None => self.prefixes.remove(&at),
        }
    }

    /// Makes the tree.
    pub(super) fn plant(&mut self, nodes: &mut Nodes) {
        let prefixes: Vec<(Prefix, u32)> = self.prefixes.iter().map(|(prefix, leaf)| (*prefix, *leaf)).collect();
        self.entry = nodes.build(&prefixes, UNKNOWN, self.region.bits);
    }

    /// Makes the tree say what one prefix says. `None`: it is to be planted anew.
    pub(super) fn paint(&mut self, nodes: &mut Nodes, at: Prefix) -> Option<()> {
        self.entry = self.painted(nodes, self.entry, self.region, at, self.steps)?;
        Some(())
    }

    /// The entry for the addresses of a region, in which or around which a prefix is another; with `steps` left.
    fn painted(&self, nodes: &mut Nodes, entry: u32, region: Prefix, at: Prefix, steps: u32) -> Option<u32> {
        let most = if at.contains(&region) { MANY } else { FEW };
        if let Some(prefixes) = self.inside(region, most) {
            return self.rebuilt(nodes, entry, region, &prefixes, steps);
        }
        let steps = steps.checked_sub(1)?;
        if entry & BLOCK != 0 {
            self.paint_block(nodes, entry, region, at, steps)?;
            Some(entry)
        } else if entry & PATH != 0 {
            let path = nodes.paths.get(entry & INDEX)?;
            let along = Prefix::along(&path);
            if !along.contains(&at) {
                return None;
            }
            let inside = self.painted(nodes, path.inside, along, at, steps)?;
            nodes.lead_on(entry, inside, path.outside);
            Some(entry)
        } else {
            None
        }
    }

    fn paint_block(&self, nodes: &mut Nodes, entry: u32, region: Prefix, at: Prefix, steps: u32) -> Option<()> {
        let (index, position) = block_of(entry);
        let position = position as u8;
        if position != region.bits / 8 || at.contains(&region) {
            return None;
        }
        let mut block = nodes.blocks.get(index)?;
        let end = (position + 1) * 8;
        let first = at.byte(position);
        if at.bits >= end {
            let next = &mut block.entries[first];
            *next = self.painted(nodes, *next, at.shortened(end), at, steps)?;
        } else {
            self.inside(at, MANY)?;
            for byte in first..first + (1 << (end - at.bits)) {
                let region = at.with_byte(position, byte as u8);
                let prefixes = self.inside(region, MANY)?;
                let next = &mut block.entries[byte];
                *next = self.rebuilt(nodes, *next, region, &prefixes, steps)?;
            }
        }
        nodes.blocks.set(index, block);
        Some(())
    }

    /// A new entry in the place of another; `prefixes` are all that are longer than the region, in it.
    fn rebuilt(
        &self,
        nodes: &mut Nodes,
        entry: u32,
        region: Prefix,
        prefixes: &[(Prefix, u32)],
        steps: u32,
    ) -> Option<u32> {
        nodes.clear(entry);
        let entry = nodes.build(prefixes, self.leaf_around(region), region.bits);
        (nodes.fit() && nodes.depth(entry)? <= steps).then_some(entry)
    }

    /// The prefixes that are longer than the region, in it; `None`: there are more than `most`.
    fn inside(&self, region: Prefix, most: usize) -> Option<Vec<(Prefix, u32)>> {
        let longer = self.prefixes.range(region..).skip_while(|(prefix, _)| **prefix == region);
        let inside = longer.take_while(|(prefix, _)| region.contains(prefix)).take(most + 1);
        let inside: Vec<(Prefix, u32)> = inside.map(|(prefix, leaf)| (*prefix, *leaf)).collect();
        (inside.len() <= most).then_some(inside)
    }

    /// What the longest prefix says that contains the region.
    fn leaf_around(&self, region: Prefix) -> u32 {
        let mut bound = region;
        // Prefixes are sorted, one before those inside it. A prefix that contains the region, and comes before one that does
        // not, is no longer than what that one and the region share.
        while let Some((before, leaf)) = self.prefixes.range(..=bound).next_back() {
            if before.contains(&region) {
                return *leaf;
            }
            bound = region.shortened(before.shared(&region));
        }
        UNKNOWN
    }
}

/// The blocks and paths of all trees.
#[derive(Debug)]
pub(super) struct Nodes {
    pub(super) blocks: Holed<Block>,
    pub(super) paths: Holed<Path>,
}

impl Default for Nodes {
    fn default() -> Self {
        let nowhere = Address::from_bytes([0; 16]);
        let path = Path { mask: nowhere, prefix: nowhere, inside: UNKNOWN, outside: UNKNOWN };
        Self { blocks: Holed::new(Block { entries: [UNKNOWN; 256] }), paths: Holed::new(path) }
    }
}

impl Nodes {
    /// The entry for addresses that share their first `known` bits and are in leaf `inherited` where no prefix says
    /// otherwise. The prefixes are sorted and all of those bits.
    fn build(&mut self, prefixes: &[(Prefix, u32)], inherited: u32, known: u8) -> u32 {
        let Some(((first, leaf), rest)) = prefixes.split_first() else { return inherited };
        if first.bits <= known {
            return self.build(rest, *leaf, known);
        }
        let ends_before_others = match branching(rest) {
            Some(position) => rest.iter().all(|(other, _)| first.contains(other)) && first.last_byte() < position,
            None => true,
        };
        if ends_before_others {
            let inside = self.build(rest, *leaf, first.bits);
            return self.put_path(first, first.bits, inside, inherited);
        }
        let position = branching(prefixes).unwrap_or_default().max(known / 8);
        let block = self.put_block(prefixes, inherited, position);
        if position == known / 8 { block } else { self.put_path(first, position * 8, block, inherited) }
    }

    /// A block that reads byte `position`, up to which all prefixes are the same.
    fn put_block(&mut self, prefixes: &[(Prefix, u32)], inherited: u32, position: u8) -> u32 {
        let mut entries = [inherited; 256];
        let end = (position + 1) * 8;
        for (prefix, leaf) in prefixes.iter().filter(|(prefix, _)| prefix.bits <= end) {
            let first = prefix.byte(position);
            entries[first..first + (1 << (end - prefix.bits))].fill(*leaf);
        }
        // Its place first: a block comes before those that it leads to.
        let index = self.blocks.put(Block { entries });
        let deeper: Vec<(Prefix, u32)> = prefixes.iter().filter(|(prefix, _)| prefix.bits > end).copied().collect();
        for group in deeper.chunk_by(|(a, _), (b, _)| a.byte(position) == b.byte(position)) {
            let entry = &mut entries[group[0].0.byte(position)];
            *entry = self.build(group, *entry, end);
        }
        self.blocks.set(index, Block { entries });
        block_entry(index % limit::BLOCKS, position.into())
    }

    /// A path along the first `bits` of a prefix.
    pub(super) fn put_path(&mut self, along: &Prefix, bits: u8, inside: u32, outside: u32) -> u32 {
        let [mask, prefix] = [mask(bits), along.shortened(bits).address].map(|word| word.to_be_bytes());
        let [mask, prefix] = [mask, prefix].map(Address::from_bytes);
        PATH | self.paths.put(Path { mask, prefix, inside, outside }) & INDEX
    }

    /// Lets a path lead elsewhere.
    pub(super) fn lead_on(&mut self, entry: u32, inside: u32, outside: u32) {
        if let Some(path) = self.paths.get(entry & INDEX) {
            self.paths.set(entry & INDEX, Path { inside, outside, ..path });
        }
    }

    /// Takes a path away, and leaves what it leads to.
    pub(super) fn take_path(&mut self, entry: u32) {
        self.paths.take(entry & INDEX);
    }

    /// Whether entries have room for every index.
    pub(super) fn fit(&self) -> bool {
        self.blocks.list.len() <= limit::BLOCKS as usize && self.paths.list.len() <= limit::PATHS as usize
    }

    /// Takes away what an entry leads to.
    fn clear(&mut self, entry: u32) {
        if entry & BLOCK != 0 {
            let (index, _) = block_of(entry);
            let Some(block) = self.blocks.get(index) else { return };
            self.blocks.take(index);
            block.entries.iter().filter(|next| **next & (BLOCK | PATH) != 0).for_each(|next| self.clear(*next));
        } else if entry & PATH != 0 {
            let Some(path) = self.paths.get(entry & INDEX) else { return };
            self.paths.take(entry & INDEX);
            self.clear(path.inside);
            self.clear(path.outside);
        }
    }

    /// How many steps the longest walk from an entry has.
    fn depth(&self, entry: u32) -> Option<u32> {
        let deepest = |entries: &[u32]| {
            let nodes = entries.iter().filter(|next| **next & (BLOCK | PATH) != 0);
            nodes.map(|next| self.depth(*next)).try_fold(1, |deepest, depth| Some(depth?.max(deepest)))
        };
        if entry & BLOCK != 0 {
            Some(1 + deepest(&self.blocks.get(block_of(entry).0)?.entries)?)
        } else if entry & PATH != 0 {
            let path = self.paths.get(entry & INDEX)?;
            Some(1 + deepest(&[path.inside, path.outside])?)
        } else {
            Some(1)
        }
    }
}

/// The first byte in which two of the prefixes differ or one ends.
fn branching(prefixes: &[(Prefix, u32)]) -> Option<u8> {
    let ((first, _), (last, _)) = (prefixes.first()?, prefixes.last()?);
    // Sorted: what the first and the last share, all share.
    let differ = first.address ^ last.address;
    let ends = prefixes.iter().map(|(prefix, _)| prefix.last_byte()).min()?;
    Some(((differ.leading_zeros() / 8) as u8).min(ends))
}

/// A prefix of 16-byte addresses, IPv4 mapped. One comes before those inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Prefix {
    address: u128,
    pub(super) bits: u8,
}

impl Prefix {
    /// Every IPv4 address.
    pub(super) const ANY_V4: Self = Self { address: 0xffff << 32, bits: MAPPED_BITS };
    /// Every IPv6 address, and the mapped ones, of which no prefix says anything.
    pub(super) const ANY_V6: Self = Self { address: 0, bits: 0 };

    pub(super) fn new(net: IpNet) -> Self {
        let net: Ipv6Net = match net {
            IpNet::V4(v4) => mapped(v4),
            IpNet::V6(v6) => v6,
        };
        Self { address: net.network().into(), bits: net.prefix_len() }
    }

    fn along(path: &Path) -> Self {
        let [mask, address] = [path.mask, path.prefix].map(|word| u128::from_be_bytes(word.to_bytes()));
        Self { address, bits: mask.leading_ones() as u8 }
    }

    fn byte(&self, position: u8) -> usize {
        usize::from(self.address.to_be_bytes()[usize::from(position)])
    }

    /// What is left of its first bytes, with another one after them.
    fn with_byte(&self, position: u8, byte: u8) -> Self {
        let bits = (position + 1) * 8;
        Self { address: self.shortened(position * 8).address | u128::from(byte) << (128 - u32::from(bits)), bits }
    }

    fn shortened(&self, bits: u8) -> Self {
        Self { address: self.address & mask(bits), bits }
    }

    /// How many bits at the beginning are in both.
    fn shared(&self, other: &Self) -> u8 {
        let same = (self.address ^ other.address).leading_zeros() as u8;
        same.min(self.bits).min(other.bits)
    }

    /// A prefix of 24 bits ends in byte 2, one of 25 in byte 3.
    fn last_byte(&self) -> u8 {
        self.bits.saturating_sub(1) / 8
    }

    pub(super) fn contains(&self, other: &Self) -> bool {
        self.bits <= other.bits && other.address & mask(self.bits) == self.address
    }
}

/// Bits ahead of an IPv4 address in a mapped one.
const MAPPED_BITS: u8 = 96;

fn mapped(v4: Ipv4Net) -> Ipv6Net {
    Ipv6Net::new_assert(v4.network().to_ipv6_mapped(), MAPPED_BITS + v4.prefix_len())
}

/// The first `bits` bits.
fn mask(bits: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0)
}
