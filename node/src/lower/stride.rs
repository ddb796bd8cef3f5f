//! Prefixes to the stride table.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::limit;
use ebpf_common::table::{Address, Block, CHILD, EXTERNAL, HOLDER_SHIFT, LOCAL, Leaf, NO_BLOCK, PLAIN, Root, UNKNOWN};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use policy::{CidrId, Slice};

use super::own::{Entry, Holder};
use super::{Classes, FEWER_PREFIXES, LowerError, within};

#[derive(Debug)]
pub(super) struct Strides {
    pub(super) roots_v4: [Root; limit::ROOTS_V4],
    pub(super) roots_v6: [Root; limit::ROOTS_V6],
    pub(super) blocks: Vec<Block>,
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

    let mut blocks = Vec::new();
    let roots = &slice.local.roots;
    let (v4, v6): (Vec<Prefix>, Vec<Prefix>) = prefixes.into_iter().partition(Prefix::is_v4);
    let roots_v4 = plant(&mut blocks, &v4, roots.v4().map(IpNet::V4));
    let roots_v6 = plant(&mut blocks, &v6, roots.v6().map(IpNet::V6));
    within("blocks of the address table", blocks.len(), limit::BLOCKS, FEWER_PREFIXES)?;
    Ok(Strides { roots_v4, roots_v6, blocks, leaves: leaves.list })
}

/// The cidrs of which nothing lies in the network's roots.
fn external(slice: &Slice) -> BTreeSet<CidrId> {
    let inside = |net: &IpNet| slice.local.roots.contains(net.network());
    let inside: BTreeSet<CidrId> =
        slice.prefixes.iter().filter(|(net, _)| inside(net)).map(|(_, (_, cidr))| *cidr).collect();
    slice.prefixes.values().map(|(_, cidr)| *cidr).filter(|cidr| !inside.contains(cidr)).collect()
}

/// An entrance that is not used.
pub(super) const UNUSED: Root = Root { mask: Address([0; 2]), prefix: Address([0; 2]), block: NO_BLOCK, _pad: 0 };

/// The network's own root has an entrance of its own. So has each external tree where there are enough entrances, else
/// they share one.
fn plant<const N: usize>(blocks: &mut Vec<Block>, prefixes: &[Prefix], network: Option<IpNet>) -> [Root; N] {
    let network = network.map(|net| Prefix::new(net, UNKNOWN));
    let (inside, outside): (Vec<Prefix>, Vec<Prefix>) =
        prefixes.iter().partition(|prefix| network.is_some_and(|network| network.contains(prefix)));
    let mut roots = [UNUSED; N];
    let mut entrances = roots.iter_mut();
    if let (Some(network), false) = (network, inside.is_empty())
        && let Some(entrance) = entrances.next()
    {
        *entrance = root(blocks, &inside, network);
    }
    let trees = trees(&outside);
    if trees.len() <= entrances.len() {
        for (entrance, tree) in entrances.zip(trees) {
            *entrance = root(blocks, tree, tree[0]);
        }
    } else if let Some(entrance) = entrances.next() {
        *entrance = root(blocks, &outside, common(&outside));
    }
    roots
}

/// Cuts sorted prefixes into runs that one of them, the first, contains.
fn trees(prefixes: &[Prefix]) -> Vec<&[Prefix]> {
    let mut trees = Vec::new();
    let mut rest = prefixes;
    while let Some(top) = rest.first() {
        let (tree, others) = rest.split_at(rest.iter().take_while(|prefix| top.contains(prefix)).count());
        trees.push(tree);
        rest = others;
    }
    trees
}

/// The longest prefix that contains all of them; for IPv4 at least the mapped range.
fn common(prefixes: &[Prefix]) -> Prefix {
    let (Some(first), Some(last)) = (prefixes.first(), prefixes.last()) else {
        return Prefix { bytes: [0; 16], bits: 0, leaf: UNKNOWN };
    };
    // Sorted: what the first and the last share, all share.
    let differ = u128::from_be_bytes(first.bytes) ^ u128::from_be_bytes(last.bytes);
    let shortest = prefixes.iter().map(|prefix| prefix.bits).min().unwrap_or(0);
    let bits = (differ.leading_zeros() as u8).min(shortest);
    let bytes = (u128::from_be_bytes(first.bytes) & mask(bits)).to_be_bytes();
    Prefix { bytes, bits, leaf: UNKNOWN }
}

/// An entrance for the addresses of `within`, with the blocks behind it. All `prefixes` lie inside.
fn root(blocks: &mut Vec<Block>, prefixes: &[Prefix], within: Prefix) -> Root {
    // A root that is a whole address still needs a byte to index by.
    let depth = (within.bits / 8).min(15);
    let (whole, inside): (Vec<Prefix>, Vec<Prefix>) = prefixes.iter().partition(|prefix| prefix.bits <= depth * 8);
    // At most one: a prefix of exactly those bits.
    let inherited = whole.last().map_or(UNKNOWN, |prefix| prefix.leaf);
    let block = build(blocks, &inside, inherited, depth);
    Root {
        mask: Address::from_bytes(mask(within.bits).to_be_bytes()),
        prefix: Address::from_bytes(within.bytes),
        block,
        _pad: 0,
    }
}

/// The block, and those below it, for addresses that share the first `depth` bytes; none of the prefixes ends in those.
fn build(blocks: &mut Vec<Block>, prefixes: &[Prefix], inherited: u32, depth: u8) -> u32 {
    let position = branching(prefixes, depth);
    let mut block = Block {
        mask: Address::default(),
        path: Address::default(),
        otherwise: inherited,
        position: u32::from(position),
        entries: [inherited; 256],
    };
    if position == depth {
        block.position |= PLAIN;
    } else {
        // Only where there are prefixes is anything skipped.
        let skipped = mask(position * 8) & !mask(depth * 8);
        block.mask = Address::from_bytes(skipped.to_be_bytes());
        block.path = Address::from_bytes((u128::from_be_bytes(prefixes[0].bytes) & skipped).to_be_bytes());
    }
    let end = (position + 1) * 8;
    let byte = |prefix: &Prefix| usize::from(prefix.bytes[usize::from(position)]);
    for prefix in prefixes.iter().filter(|prefix| prefix.bits <= end) {
        let first = byte(prefix);
        block.entries[first..first + (1 << (end - prefix.bits))].fill(prefix.leaf);
    }
    // Its place first, so that blocks only point forward.
    let index = blocks.len();
    blocks.push(block);
    let deeper: Vec<Prefix> = prefixes.iter().filter(|prefix| prefix.bits > end).copied().collect();
    for group in deeper.chunk_by(|a, b| byte(a) == byte(b)) {
        let entry = byte(&group[0]);
        block.entries[entry] = CHILD | build(blocks, group, block.entries[entry], position + 1);
    }
    blocks[index] = block;
    index as u32
}

/// The first byte from `depth` on in which two of the prefixes differ or one ends.
fn branching(prefixes: &[Prefix], depth: u8) -> u8 {
    if prefixes.is_empty() {
        return depth;
    }
    let shared = common(prefixes).bits;
    // A prefix of 24 bits ends in byte 2, one of 25 in byte 3.
    let ends = prefixes.iter().map(|prefix| (prefix.bits - 1) / 8).min().unwrap_or(depth);
    (shared / 8).min(ends).clamp(depth, 15)
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
