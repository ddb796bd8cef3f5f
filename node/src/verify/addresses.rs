//! What every address is: by the words of the slice, and by a walk through every branch of the stride tables.
//!
//! Both become runs of addresses, sorted and disjoint, in one space of 128 bits in which IPv4 is mapped, as the tables have
//! it. Two sorted lists of runs are compared in one pass.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ebpf_common::table::{BLOCK, EXTERNAL, INDEX, LOCAL, Leaf, PATH, UNKNOWN, block_of};
use ipnet::IpNet;
use policy::{CidrId, ClassId, NodeId, Slice};

use super::{Difference, Names, Ownership, Range, Verification};
use crate::lower::Tables;

/// Addresses that are one thing, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run<T> {
    first: u128,
    last: u128,
    value: T,
}

/// Who stands for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    Local,
    Gateway(NodeId),
    Nobody,
}

/// A class as the tables number it, and as the slice does: what two addresses must share to have equal cells.
pub(super) type Kind = (u32, ClassId);

/// Where addresses of a kind are: the first run of each family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Where {
    pub(super) cidr: CidrId,
    v4: Option<Range>,
    v6: Option<Range>,
}

/// The kinds of addresses that both sides know.
#[derive(Debug, Default)]
pub(super) struct Kinds {
    /// Those that this node stands for.
    pub(super) own: BTreeMap<Kind, Where>,
    pub(super) all: BTreeMap<Kind, Where>,
}

/// Compares what addresses are, and says which kinds there are.
pub(super) fn compare(slice: &Slice, tables: &Tables, verification: &mut Verification) -> Kinds {
    let names = Names(slice);
    let places = longest(slice.prefixes.iter().map(|(net, place)| (*net, *place)));
    let holders = longest(holders(slice));
    let found = Rebuilt::of(tables, verification);
    let numbers = numbers(&holders, &places, &found, tables);
    let is_external = externals(slice);
    let mut kinds = Kinds::default();
    for (range, [place, holder, leaf, malformed]) in steps([
        &places.iter().map(Run::span).collect::<Vec<_>>(),
        &holders.iter().map(Run::span).collect::<Vec<_>>(),
        &found.leaves.iter().map(Run::span).collect::<Vec<_>>(),
        &found.malformed.iter().map(Run::span).collect::<Vec<_>>(),
    ]) {
        if malformed.is_some() {
            continue;
        }
        let place = place.map(|index| places[index].value);
        let holder = holder.map_or(Holder::Nobody, |index| holders[index].value);
        let leaf = leaf.map_or(UNKNOWN, |index| found.leaves[index].value);
        let leaf = tables.leaves.get(leaf as usize).copied().unwrap_or_default();
        let number = match holder {
            Holder::Gateway(node) if place.is_some() => numbers.get(&node).copied().unwrap_or(0),
            _ => 0,
        };
        let cidr = place.map_or(0, |(_, cidr): (ClassId, CidrId)| cidr.0);
        let local = holder == Holder::Local;
        let external = !local && place.is_some_and(|(_, cidr)| is_external.contains(&cidr));
        let equal = (leaf.class != 0) == place.is_some()
            && leaf.cidr == cidr
            && (leaf.flags & LOCAL != 0) == local
            && (leaf.flags & EXTERNAL != 0) == external
            && leaf.holder() == number;
        if !equal {
            let gateway = match holder {
                Holder::Gateway(node) if place.is_some() => Some(names.peer(node)),
                _ => None,
            };
            let intended = Ownership { cidr: place.map(|(_, cidr)| names.cidr(cidr)), local, external, gateway };
            let found = found_ownership(&names, leaf, &numbers);
            verification.add(Difference::Prefix { addresses: range, intended, found });
        }
        // What one side does not know, or does not stand for, has no cells to compare.
        if let (Some((class, cidr)), true) = (place, leaf.class != 0) {
            let kind = (leaf.class, class);
            kinds.all.entry(kind).or_insert(Where { cidr, v4: None, v6: None }).add(range);
            if local && leaf.flags & LOCAL != 0 {
                kinds.own.entry(kind).or_insert(Where { cidr, v4: None, v6: None }).add(range);
            }
        }
    }
    kinds
}

fn found_ownership(names: &Names<'_>, leaf: Leaf, numbers: &BTreeMap<NodeId, u32>) -> Ownership {
    let known = leaf.class != 0;
    let gateway = (leaf.holder() != 0).then(|| {
        let node = numbers.iter().find(|(_, number)| **number == leaf.holder());
        node.map_or_else(|| format!("#{}", leaf.holder()), |(node, _)| names.peer(*node))
    });
    Ownership {
        cidr: known.then(|| names.cidr(CidrId(leaf.cidr))),
        local: leaf.flags & LOCAL != 0,
        external: leaf.flags & EXTERNAL != 0,
        gateway,
    }
}

impl Where {
    fn add(&mut self, range: Range) {
        let family = if range.first.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
        family.get_or_insert(range);
    }

    /// A run of each that a packet can go between, where there is such a pair.
    pub(super) fn ends(&self, other: &Self) -> Option<(Range, Range)> {
        self.v4.zip(other.v4).or(self.v6.zip(other.v6))
    }
}

/// The external cidrs: those outside the roots. Records of their addresses are counted by cidr.
fn externals(slice: &Slice) -> BTreeSet<CidrId> {
    let roots: Vec<IpNet> = slice.local.roots.iter().collect();
    let outside = |net: &IpNet| !roots.iter().any(|root| root.contains(net));
    slice.prefixes.iter().filter(|(net, _)| outside(net)).map(|(_, (_, cidr))| *cidr).collect()
}

/// docs/POLICY.md, section 3.3 and 3.5: the longest prefix says who stands for an address. Only gateways are told apart,
/// with all that they stand for.
fn holders(slice: &Slice) -> BTreeMap<IpNet, Holder> {
    let local = &slice.local;
    let mut holders: BTreeMap<IpNet, Holder> = local.gateway_for.iter().map(|net| (*net, Holder::Local)).collect();
    holders.extend(local.external_routes.iter().map(|net| (*net, Holder::Nobody)));
    for (id, peer) in &slice.peers {
        if peer.allowed_ips.iter().any(|net| local.external_routes.contains(net)) {
            holders.extend(peer.allowed_ips.iter().map(|net| (*net, Holder::Gateway(*id))));
        }
    }
    holders.extend(local.addresses.iter().map(|address| (IpNet::from(address), Holder::Local)));
    holders
}

/// The number that the tables give each gateway: the numbers themselves mean nothing, so that of most of its runs. A number
/// belongs to one gateway.
fn numbers(
    holders: &[Run<Holder>],
    places: &[Run<(ClassId, CidrId)>],
    found: &Rebuilt,
    tables: &Tables,
) -> BTreeMap<NodeId, u32> {
    let mut seen: BTreeMap<(NodeId, u32), usize> = BTreeMap::new();
    for (_, [place, holder, leaf]) in steps([
        &places.iter().map(Run::span).collect::<Vec<_>>(),
        &holders.iter().map(Run::span).collect::<Vec<_>>(),
        &found.leaves.iter().map(Run::span).collect::<Vec<_>>(),
    ]) {
        let (Some(_), Some(holder), Some(leaf)) = (place, holder, leaf) else { continue };
        let Some(leaf) = tables.leaves.get(found.leaves[leaf].value as usize) else { continue };
        if let Holder::Gateway(node) = holders[holder].value {
            *seen.entry((node, leaf.holder())).or_default() += 1;
        }
    }
    let mut claims: Vec<((NodeId, u32), usize)> = seen.into_iter().filter(|((_, number), _)| *number != 0).collect();
    claims.sort_by_key(|(claim, count)| (std::cmp::Reverse(*count), *claim));
    let mut numbers = BTreeMap::new();
    for ((node, number), _) in claims {
        if !numbers.contains_key(&node) && !numbers.values().any(|taken| *taken == number) {
            numbers.insert(node, number);
        }
    }
    // A gateway whose number is another's, or 0, has none: every run of it differs.
    for run in holders {
        if let Holder::Gateway(node) = run.value {
            numbers.entry(node).or_insert(u32::MAX);
        }
    }
    numbers
}

/// IPv4 addresses among all.
const V4: Run<()> = Run { first: 0xffff << 32, last: 0xffff << 32 | 0xffff_ffff, value: () };

impl<T> Run<T> {
    fn span(&self) -> Run<()> {
        Run { first: self.first, last: self.last, value: () }
    }
}

/// Nested prefixes to disjoint runs in which the longest prefix counts.
fn longest<T: Copy>(nets: impl IntoIterator<Item = (IpNet, T)>) -> Vec<Run<T>> {
    let (mut v4, mut v6): (Vec<Run<T>>, Vec<Run<T>>) = (Vec::new(), Vec::new());
    for (net, value) in nets {
        match net {
            IpNet::V4(net) => {
                let mapped = |address: std::net::Ipv4Addr| u128::from(address.to_ipv6_mapped());
                v4.push(Run { first: mapped(net.network()), last: mapped(net.broadcast()), value });
            }
            IpNet::V6(net) => v6.push(Run { first: net.network().into(), last: net.broadcast().into(), value }),
        }
    }
    let mut runs = without(flatten(v6), V4);
    runs.extend(flatten(v4));
    runs.sort_by_key(|run| run.first);
    runs
}

/// Runs that nest or are apart; the innermost counts.
fn flatten<T: Copy>(mut nested: Vec<Run<T>>) -> Vec<Run<T>> {
    nested.sort_by_key(|run| (run.first, std::cmp::Reverse(run.last)));
    let mut flat: Vec<Run<T>> = Vec::new();
    // The runs around the place up to which all is said, and that place; `None`: beyond the last address.
    let mut around: Vec<Run<T>> = Vec::new();
    let mut at: Option<u128> = Some(0);
    let close = |around: &mut Vec<Run<T>>, at: &mut Option<u128>, flat: &mut Vec<Run<T>>| {
        let Some(run) = around.pop() else { return };
        if let Some(first) = at.filter(|first| *first <= run.last) {
            flat.push(Run { first, last: run.last, value: run.value });
            *at = run.last.checked_add(1);
        }
    };
    for run in nested {
        while around.last().is_some_and(|outer| outer.last < run.first) {
            close(&mut around, &mut at, &mut flat);
        }
        if let (Some(outer), Some(first)) = (around.last(), at)
            && first < run.first
        {
            flat.push(Run { first, last: run.first - 1, value: outer.value });
        }
        at = Some(run.first);
        around.push(run);
    }
    while !around.is_empty() {
        close(&mut around, &mut at, &mut flat);
    }
    flat
}

/// Disjoint runs less the addresses of one more.
fn without<T: Copy>(runs: Vec<Run<T>>, gone: Run<()>) -> Vec<Run<T>> {
    let mut left = Vec::with_capacity(runs.len() + 1);
    for run in runs {
        if run.last < gone.first || run.first > gone.last {
            left.push(run);
            continue;
        }
        if run.first < gone.first {
            left.push(Run { last: gone.first - 1, ..run });
        }
        if run.last > gone.last {
            left.push(Run { first: gone.last + 1, ..run });
        }
    }
    left
}

/// The whole space in steps within which no list changes, with the index of the run of each list that is there.
fn steps<const N: usize>(lists: [&[Run<()>]; N]) -> Vec<(Range, [Option<usize>; N])> {
    let mut starts: Vec<u128> = vec![0, V4.first, V4.last + 1];
    for run in lists.iter().flat_map(|list| list.iter()) {
        starts.push(run.first);
        starts.extend(run.last.checked_add(1));
    }
    starts.sort_unstable();
    starts.dedup();
    let mut next = [0; N];
    let mut steps = Vec::with_capacity(starts.len());
    for (index, &first) in starts.iter().enumerate() {
        let last = starts.get(index + 1).map_or(u128::MAX, |start| start - 1);
        let mut at = [None; N];
        for (list, (next, at)) in lists.iter().zip(next.iter_mut().zip(&mut at)) {
            while list.get(*next).is_some_and(|run| run.last < first) {
                *next += 1;
            }
            *at = list.get(*next).filter(|run| run.first <= first).map(|_| *next);
        }
        steps.push((Range { first: address(first), last: address(last) }, at));
    }
    steps
}

fn address(number: u128) -> IpAddr {
    Ipv6Addr::from(number).to_canonical()
}

/// What the stride tables say of every address.
#[derive(Debug)]
struct Rebuilt {
    /// By index of the leaf; where there is no run it is the unknown one.
    leaves: Vec<Run<u32>>,
    /// Of which it cannot be said.
    malformed: Vec<Run<()>>,
}

/// While the tree is walked.
struct Walk<'a> {
    tables: &'a Tables,
    seen_blocks: Vec<bool>,
    seen_paths: Vec<bool>,
    leaves: Vec<Run<u32>>,
    malformed: Vec<Run<()>>,
    differences: Vec<Difference>,
}

impl Rebuilt {
    fn of(tables: &Tables, verification: &mut Verification) -> Self {
        let mut walk = Walk {
            tables,
            seen_blocks: vec![false; tables.blocks.len()],
            seen_paths: vec![false; tables.paths.len()],
            leaves: Vec::new(),
            malformed: Vec::new(),
            differences: Vec::new(),
        };
        let after = Run { first: V4.last + 1, last: u128::MAX, value: () };
        let before = Run { first: 0, last: V4.first - 1, value: () };
        walk.entry(tables.header.root_v4, vec![V4]);
        walk.entry(tables.header.root_v6, vec![before, after]);
        let Walk { mut leaves, mut malformed, differences, .. } = walk;
        leaves.sort_by_key(|run| run.first);
        malformed.sort_by_key(|run| run.first);
        differences.into_iter().for_each(|difference| verification.add(difference));
        Self { leaves, malformed }
    }
}

impl Walk<'_> {
    /// The addresses of some runs, from an entry on.
    fn entry(&mut self, entry: u32, runs: Vec<Run<()>>) {
        if runs.is_empty() {
            return;
        }
        if entry & BLOCK != 0 {
            let (index, position) = block_of(entry);
            self.block(index, position, &runs);
        } else if entry & PATH != 0 {
            self.path(entry & INDEX, &runs);
        } else {
            runs.into_iter().for_each(|run| self.leaf(run, entry));
        }
    }

    fn path(&mut self, index: u32, runs: &[Run<()>]) {
        let Some(path) = self.tables.paths.get(index as usize) else {
            return self.refuse("PATHS", index, runs, "is not there, and is referred to");
        };
        // Each has one place in one tree; else a walk could be as long as somebody likes.
        if std::mem::replace(&mut self.seen_paths[index as usize], true) {
            return self.refuse("PATHS", index, runs, "is referred to twice");
        }
        let (mask, prefix) = (u128::from_be_bytes(path.mask.to_bytes()), u128::from_be_bytes(path.prefix.to_bytes()));
        if mask != high_bits(mask.leading_ones()) {
            return self.refuse("PATHS", index, runs, "has a mask that is no prefix's");
        }
        if prefix & !mask != 0 {
            return self.entry(path.outside, runs.to_vec());
        }
        let along = Run { first: prefix, last: prefix | !mask, value: () };
        self.entry(path.inside, runs.iter().filter_map(|run| intersect(*run, along)).collect());
        self.entry(path.outside, without(runs.to_vec(), along));
    }

    fn block(&mut self, index: u32, position: u32, runs: &[Run<()>]) {
        let Some(block) = self.tables.blocks.get(index as usize) else {
            return self.refuse("BLOCKS", index, runs, "is not there, and is referred to");
        };
        if std::mem::replace(&mut self.seen_blocks[index as usize], true) {
            return self.refuse("BLOCKS", index, runs, "is referred to twice");
        }
        let above = high_bits(8 * position);
        let base = runs[0].first & above;
        // What is ahead of the byte must be settled: the entry does not ask for it.
        if runs.iter().any(|run| run.first & above != base || run.last & above != base) {
            return self.refuse("BLOCKS", index, runs, "reads a byte ahead of which addresses still differ");
        }
        let shift = 8 * (15 - position);
        for (byte, entry) in (0u128..).zip(block.entries) {
            let first = base | byte << shift;
            let part = Run { first, last: first | ((1 << shift) - 1), value: () };
            self.entry(entry, runs.iter().filter_map(|run| intersect(*run, part)).collect());
        }
    }

    fn leaf(&mut self, run: Run<()>, leaf: u32) {
        if leaf == UNKNOWN {
            return;
        }
        if leaf as usize >= self.tables.leaves.len() {
            self.malformed.push(run);
            self.differences.push(malformed("LEAVES", leaf as usize, "is not there, and is referred to"));
            return;
        }
        match self.leaves.last_mut() {
            Some(last) if last.value == leaf && last.last.checked_add(1) == Some(run.first) => last.last = run.last,
            _ => self.leaves.push(Run { first: run.first, last: run.last, value: leaf }),
        }
    }

    fn refuse(&mut self, table: &'static str, index: u32, runs: &[Run<()>], what: &str) {
        self.malformed.extend(runs);
        self.differences.push(malformed(table, index as usize, what));
    }
}

fn malformed(table: &'static str, index: usize, what: &str) -> Difference {
    Difference::Malformed { table, index, what: what.to_owned() }
}

fn intersect(a: Run<()>, b: Run<()>) -> Option<Run<()>> {
    let (first, last) = (a.first.max(b.first), a.last.min(b.last));
    (first <= last).then_some(Run { first, last, value: () })
}

/// The first `bits` of 128.
fn high_bits(bits: u32) -> u128 {
    u128::MAX.checked_shl(128 - bits).unwrap_or(0)
}
