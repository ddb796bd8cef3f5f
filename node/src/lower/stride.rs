//! Prefixes to the stride table.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::limit;
use ebpf_common::table::{
    Address, Block, EXTERNAL, HOLDER_SHIFT, INDEX, LOCAL, Leaf, PATH, Path, UNKNOWN, block_entry,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use policy::{CidrId, Slice};

use super::own::{Entry, Holder};
use super::{Classes, FEWER_PREFIXES, LowerError, within};

#[derive(Debug)]
pub(super) struct Strides {
    pub(super) root_v4: u32,
    pub(super) root_v6: u32,
    pub(super) blocks: Vec<Block>,
    pub(super) paths: Vec<Path>,
    pub(super) leaves: Vec<Leaf>,
}

pub(super) fn lower(slice: &Slice, classes: &Classes, entries: &BTreeMap<IpNet, Entry>) -> Result<Strides, LowerError> {
    let mut leaves = Leaves::default();
    let external = external(slice);
    let mut prefixes: Vec<Prefix> = entries
        .iter()
        .map(|(net, entry)| {
            let (class, cidr) = entry.place.map_or((0, 0), |(class, cidr)| (classes.get(class).unwrap_or(0), cidr.0));
            let flags = match entry.holder {
                Holder::Local => LOCAL,
                Holder::Gateway(number) if class != 0 => number << HOLDER_SHIFT,
                Holder::Gateway(_) | Holder::Other => 0,
            };
            let external = flags != LOCAL && entry.place.is_some_and(|(_, cidr)| external.contains(&cidr));
            let flags = if external { flags | EXTERNAL } else { flags };
            Prefix::new(*net, leaves.intern(Leaf { class, cidr, flags }))
        })
        .collect();
    // A prefix comes before those inside it.
    prefixes.sort_by_key(|prefix| (prefix.bytes, prefix.bits));
    within("distinct kinds of addresses", leaves.list.len(), limit::LEAVES, FEWER_PREFIXES)?;

    let roots = &slice.local.roots;
    let (v4, v6): (Vec<Prefix>, Vec<Prefix>) = prefixes.into_iter().partition(Prefix::is_v4);
    let mut tree = Tree { blocks: Vec::new(), paths: Vec::new() };
    let root_v4 = tree.plant(&v4, roots.v4().map(IpNet::V4), MAPPED_BITS);
    let root_v6 = tree.plant(&v6, roots.v6().map(IpNet::V6), 0);
    // An entry has no room for an index beyond these limits; what was written of one is not used.
    within("blocks of the address table", tree.blocks.len(), limit::BLOCKS, FEWER_PREFIXES)?;
    within("paths of the address table", tree.paths.len(), limit::PATHS, FEWER_PREFIXES)?;
    Ok(Strides { root_v4, root_v6, blocks: tree.blocks, paths: tree.paths, leaves: leaves.list })
}

/// The cidrs of which nothing lies in the network's roots.
fn external(slice: &Slice) -> BTreeSet<CidrId> {
    let inside = |net: &IpNet| slice.local.roots.contains(net.network());
    let inside: BTreeSet<CidrId> =
        slice.prefixes.iter().filter(|(net, _)| inside(net)).map(|(_, (_, cidr))| *cidr).collect();
    slice.prefixes.values().map(|(_, cidr)| *cidr).filter(|cidr| !inside.contains(cidr)).collect()
}

/// Both trees while they grow.
struct Tree {
    blocks: Vec<Block>,
    paths: Vec<Path>,
}

impl Tree {
    /// The entry with which the walk of a family begins, whose addresses share their first `known` bits. What lies in the
    /// network's own root is found first.
    fn plant(&mut self, prefixes: &[Prefix], network: Option<IpNet>, known: u8) -> u32 {
        let Some(network) = network.map(|net| Prefix::new(net, UNKNOWN)) else {
            return self.build(prefixes, UNKNOWN, known);
        };
        let (inside, outside): (Vec<Prefix>, Vec<Prefix>) =
            prefixes.iter().partition(|prefix| network.contains(prefix));
        let outside = self.build(&outside, UNKNOWN, known);
        if inside.is_empty() {
            return outside;
        }
        let inside = self.build(&inside, UNKNOWN, network.bits);
        self.path(&network, network.bits, inside, outside)
    }

    /// The entry for addresses that share their first `known` bits and are in leaf `inherited` where no prefix says
    /// otherwise. The prefixes are sorted and all of those bits.
    fn build(&mut self, prefixes: &[Prefix], inherited: u32, known: u8) -> u32 {
        let Some((first, rest)) = prefixes.split_first() else { return inherited };
        if first.bits <= known {
            return self.build(rest, first.leaf, known);
        }
        let ends_before_others = match branching(rest) {
            Some(position) => rest.iter().all(|other| first.contains(other)) && first.last_byte() < position,
            None => true,
        };
        if ends_before_others {
            let inside = self.build(rest, first.leaf, first.bits);
            return self.path(first, first.bits, inside, inherited);
        }
        let position = branching(prefixes).unwrap_or_default().max(known / 8);
        let block = self.block(prefixes, inherited, position);
        if position == known / 8 { block } else { self.path(first, position * 8, block, inherited) }
    }

    /// A block that reads byte `position`, up to which all prefixes are the same.
    fn block(&mut self, prefixes: &[Prefix], inherited: u32, position: u8) -> u32 {
        let mut entries = [inherited; 256];
        let end = (position + 1) * 8;
        let byte = |prefix: &Prefix| usize::from(prefix.bytes[usize::from(position)]);
        for prefix in prefixes.iter().filter(|prefix| prefix.bits <= end) {
            let first = byte(prefix);
            entries[first..first + (1 << (end - prefix.bits))].fill(prefix.leaf);
        }
        // Its place first, so that blocks only point forward.
        let index = self.blocks.len();
        self.blocks.push(Block { entries });
        let deeper: Vec<Prefix> = prefixes.iter().filter(|prefix| prefix.bits > end).copied().collect();
        for group in deeper.chunk_by(|a, b| byte(a) == byte(b)) {
            let entry = &mut entries[byte(&group[0])];
            *entry = self.build(group, *entry, end);
        }
        self.blocks[index].entries = entries;
        block_entry(index as u32 % limit::BLOCKS, position.into())
    }

    /// A path along the first `bits` of a prefix.
    fn path(&mut self, along: &Prefix, bits: u8, inside: u32, outside: u32) -> u32 {
        let mask = mask(bits);
        let prefix = u128::from_be_bytes(along.bytes) & mask;
        let [mask, prefix] = [mask, prefix].map(|word| Address::from_bytes(word.to_be_bytes()));
        self.paths.push(Path { mask, prefix, inside, outside });
        PATH | (self.paths.len() - 1) as u32 & INDEX
    }
}

/// The first byte in which two of the prefixes differ or one ends.
fn branching(prefixes: &[Prefix]) -> Option<u8> {
    let (first, last) = (prefixes.first()?, prefixes.last()?);
    // Sorted: what the first and the last share, all share.
    let differ = u128::from_be_bytes(first.bytes) ^ u128::from_be_bytes(last.bytes);
    let ends = prefixes.iter().map(Prefix::last_byte).min()?;
    Some(((differ.leading_zeros() / 8) as u8).min(ends))
}

/// A prefix of 16-byte addresses, IPv4 mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    bytes: [u8; 16],
    bits: u8,
    leaf: u32,
}

impl Prefix {
    fn new(net: IpNet, leaf: u32) -> Self {
        let net: Ipv6Net = match net {
            IpNet::V4(v4) => mapped(v4),
            IpNet::V6(v6) => v6,
        };
        Self { bytes: net.network().octets(), bits: net.prefix_len(), leaf }
    }

    fn is_v4(&self) -> bool {
        self.bits >= MAPPED_BITS && Address::from_bytes(self.bytes).is_v4()
    }

    /// A prefix of 24 bits ends in byte 2, one of 25 in byte 3.
    fn last_byte(&self) -> u8 {
        self.bits.saturating_sub(1) / 8
    }

    fn contains(&self, other: &Prefix) -> bool {
        self.bits <= other.bits && u128::from_be_bytes(other.bytes) & mask(self.bits) == u128::from_be_bytes(self.bytes)
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

/// Distinct leaves in the order in which they were first wanted; the unknown one is 0.
#[derive(Debug)]
struct Leaves {
    list: Vec<Leaf>,
    index: BTreeMap<Leaf, u32>,
}

impl Default for Leaves {
    fn default() -> Self {
        Self { list: vec![Leaf::default()], index: BTreeMap::from([(Leaf::default(), UNKNOWN)]) }
    }
}

impl Leaves {
    fn intern(&mut self, leaf: Leaf) -> u32 {
        *self.index.entry(leaf).or_insert_with(|| {
            self.list.push(leaf);
            self.list.len() as u32 - 1
        })
    }
}
