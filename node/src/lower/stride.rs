//! Prefixes to the stride table.

use ebpf_common::limit;
use ebpf_common::table::{Block, EXTERNAL, HOLDER_SHIFT, LOCAL, Leaf, Path};
use ipnet::IpNet;
use policy::Prefixes;

use super::classes::Classes;
use super::interned::Interned;
use super::own::{ChangedEntry, Entries, Entry, Holder};
use super::rows::Rows;
use super::tree::{Nodes, Prefix, Tree};
use super::{FEWER_PREFIXES, LowerError, within};

/// What the addresses of every prefix became, so that the next slice costs what it changes.
#[derive(Debug)]
pub(super) struct Strides {
    v4: Family,
    v6: Family,
    nodes: Nodes,
    leaves: Interned<Leaf>,
}

impl Strides {
    pub(super) fn lower(roots: &Prefixes, classes: &Classes, entries: &Entries) -> Result<Self, LowerError> {
        let mut leaves = Interned::new(Leaf::default());
        let unknown = leaves.intern(Leaf::default());
        leaves.hold(unknown);
        let mut strides = Self {
            v4: Family::new(roots.v4().map(IpNet::V4), Prefix::ANY_V4, limit::STEPS_V4),
            v6: Family::new(roots.v6().map(IpNet::V6), Prefix::ANY_V6, limit::STEPS_V6),
            nodes: Nodes::default(),
            leaves,
        };
        for (net, entry) in entries.iter() {
            let leaf = strides.hold(leaf(entry, classes));
            strides.family(net).set(Prefix::new(net), Some(leaf));
        }
        within("distinct kinds of addresses", strides.leaves.list.len(), limit::LEAVES, FEWER_PREFIXES)?;
        strides.v4.plant(&mut strides.nodes);
        strides.v6.plant(&mut strides.nodes);
        // An entry has no room for an index beyond these limits; what was written of one is not used.
        within("blocks of the address table", strides.blocks().len(), limit::BLOCKS, FEWER_PREFIXES)?;
        within("paths of the address table", strides.paths().len(), limit::PATHS, FEWER_PREFIXES)?;
        Ok(strides)
    }

    /// Brings the table up to date with entries that are others. `None`: more than their surroundings would be another, or
    /// the table has no room for it as it is, so that it is to be made anew.
    pub(super) fn follow(&mut self, classes: &Classes, changed: &[ChangedEntry]) -> Option<()> {
        let mut former = Vec::new();
        for ChangedEntry { net, after, .. } in changed {
            let leaf = after.as_ref().map(|entry| self.hold(leaf(entry, classes)));
            former.extend(self.family(*net).set(Prefix::new(*net), leaf));
        }
        for ChangedEntry { net, .. } in changed {
            let (family, nodes) = self.family_and_nodes(*net);
            family.paint(nodes, Prefix::new(*net))?;
        }
        for leaf in former {
            self.leaves.let_go(leaf);
        }
        (self.leaves.list.len() <= limit::LEAVES as usize).then_some(())
    }

    /// Where the walk of an address begins, by family.
    pub(super) fn roots(&self) -> (u32, u32) {
        (self.v4.root(), self.v6.root())
    }

    pub(super) fn blocks(&self) -> &Rows<Block> {
        &self.nodes.blocks.list
    }

    pub(super) fn paths(&self) -> &Rows<Path> {
        &self.nodes.paths.list
    }

    pub(super) fn leaves(&self) -> &Rows<Leaf> {
        &self.leaves.list
    }

    /// How many blocks, paths and leaves there are.
    #[cfg(test)]
    pub(super) fn used(&self) -> [usize; 3] {
        [self.nodes.blocks.used(), self.nodes.paths.used(), self.leaves.used()]
    }

    fn hold(&mut self, leaf: Leaf) -> u32 {
        let index = self.leaves.intern(leaf);
        self.leaves.hold(index);
        index
    }

    fn family(&mut self, net: IpNet) -> &mut Family {
        self.family_and_nodes(net).0
    }

    fn family_and_nodes(&mut self, net: IpNet) -> (&mut Family, &mut Nodes) {
        let family = if matches!(net, IpNet::V4(_)) { &mut self.v4 } else { &mut self.v6 };
        (family, &mut self.nodes)
    }
}

fn leaf(entry: &Entry, classes: &Classes) -> Leaf {
    let (class, cidr) = entry.place.map_or((0, 0), |(class, cidr)| (classes.get(class).unwrap_or(0), cidr.0));
    let flags = match entry.holder {
        Holder::Local => LOCAL,
        Holder::Gateway(number) if class != 0 => number << HOLDER_SHIFT,
        Holder::Gateway(_) | Holder::Other => 0,
    };
    let flags = if entry.is_external && flags != LOCAL { flags | EXTERNAL } else { flags };
    Leaf { class, cidr, flags }
}

/// The addresses of one family: what lies in the network's own root is found first.
#[derive(Debug)]
struct Family {
    network: Option<Prefix>,
    inside: Tree,
    outside: Tree,
    /// The path that tells the two apart; `None`: nothing lies inside.
    fork: Option<u32>,
}

impl Family {
    fn new(network: Option<IpNet>, all: Prefix, steps: u32) -> Self {
        let network = network.map(Prefix::new);
        let steps = steps - u32::from(network.is_some());
        let inside = Tree::new(network.unwrap_or(all), steps);
        Self { network, inside, outside: Tree::new(all, steps), fork: None }
    }

    fn tree(&mut self, at: Prefix) -> &mut Tree {
        let is_inside = self.network.is_some_and(|network| network.contains(&at));
        if is_inside { &mut self.inside } else { &mut self.outside }
    }

    /// What a prefix says from now on, in words only; its former leaf.
    fn set(&mut self, at: Prefix, leaf: Option<u32>) -> Option<u32> {
        self.tree(at).set(at, leaf)
    }

    /// Makes the trees of what all prefixes say.
    fn plant(&mut self, nodes: &mut Nodes) {
        self.outside.plant(nodes);
        if !self.inside.is_empty() {
            self.inside.plant(nodes);
        }
        self.tell_apart(nodes);
    }

    /// Brings one tree up to date with what a prefix says.
    fn paint(&mut self, nodes: &mut Nodes, at: Prefix) -> Option<()> {
        self.tree(at).paint(nodes, at)?;
        self.tell_apart(nodes);
        nodes.fit().then_some(())
    }

    /// Makes a fork where there is something on both its ways.
    fn tell_apart(&mut self, nodes: &mut Nodes) {
        let Self { network, inside, outside, fork } = self;
        match (network.filter(|_| !inside.is_empty()), *fork) {
            (Some(_), Some(fork)) => nodes.lead_on(fork, inside.entry, outside.entry),
            (Some(network), None) => {
                *fork = Some(nodes.put_path(&network, network.bits, inside.entry, outside.entry));
            }
            (None, Some(path)) => {
                nodes.take_path(path);
                *fork = None;
            }
            (None, None) => {}
        }
    }

    fn root(&self) -> u32 {
        self.fork.unwrap_or(self.outside.entry)
    }
}
