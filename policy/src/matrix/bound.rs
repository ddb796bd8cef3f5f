//! Whether every node has room for its slice, asked before a policy is committed.
//!
//! Making every slice would take too long. So first comes a bound that needs no cells: a cell depends on the other class
//! only by which of the selectors that some rule of the node's wants select it, and these part the classes into few parts.
//! Cidrs and nodes form trees, so `n` of them make at most `n + 1` parts. Any other selector splits no more parts than
//! there are, and no more than it has classes. Only where that is too much the slice itself is made and measured.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::blocks::Blocks;
use super::classes::Class;
use super::compile::Used;
use super::table::{Rank, RuleTable};
use super::{Matrix, Place};
use crate::limit::LimitError;
use crate::network::Network;
use crate::object::id::{CidrId, ClassId, NodeName, Revision};
use crate::object::selector::Selector;
use crate::slice::Size;

/// A policy of which one node could not hold its part.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("policy asks too much of node `{node}`")]
pub struct NodeLimitError {
    pub node: NodeName,
    #[source]
    pub limit: LimitError,
}

impl Matrix {
    /// Refuses a policy of which some active node could not hold its part. `network` is what the matrix was compiled from.
    pub fn check_slices(&self, network: &Network) -> Result<(), NodeLimitError> {
        let above = above(network, &self.rules);
        let blocks = Blocks::of(self, network);
        for (own, id) in self.stands.distinct() {
            if self.bound(&above, &blocks, own).check().is_ok() {
                continue;
            }
            let Some(slice) = self.slice(network, Revision::default(), id, None) else { continue };
            slice.size().check().map_err(|limit| NodeLimitError { node: slice.local.name.clone(), limit })?;
        }
        Ok(())
    }

    /// At least the size of the slice of a node that stands for these classes.
    fn bound(&self, above: &[Vec<Used>], blocks: &Blocks, own: &BTreeSet<Place>) -> Size {
        let places = self.places().len();
        let mut selectors: BTreeSet<Used> = BTreeSet::new();
        let mut incident: BTreeSet<Rank> = BTreeSet::new();
        let (mut pages, mut ports) = (0, 0);
        let classes: BTreeSet<ClassId> = own.iter().map(|&(class, _)| class).collect();
        for class in classes.into_iter().filter_map(|class| self.classes.get(class)) {
            selectors.extend(&class.selected);
            for line in self.lines(class) {
                selectors.extend(line.iter().flat_map(|&(_, others)| others));
                let (line_pages, line_ports) = self.parts(above, class, &line).room();
                pages += line_pages;
                ports += line_ports;
                incident.extend(line.iter().map(|&(rank, _)| rank));
            }
        }
        Size {
            room: blocks.bound(own, &selectors),
            leaves: Size::leaves(places, blocks.held),
            cells: Size::cells(own.len(), places),
            rules: incident.len(),
            // Those of rules, that of the lineage default, and that of no rule.
            decisions: Size::decisions(incident.len() + 2),
            pages,
            ports,
        }
    }

    /// The rules that one class is an end of, as the source and as the destination, each with the selectors of which the
    /// other end needs one.
    fn lines(&self, own: &Class) -> [Vec<(Rank, &[Used])>; 2] {
        let ranks = |by_selector: &[Vec<Rank>]| -> BTreeSet<Rank> {
            own.selected.iter().flat_map(|&used| &by_selector[used as usize]).copied().collect()
        };
        let (from, to) = (ranks(&self.rules.from), ranks(&self.rules.to));
        let (mut row, mut column) = (Vec::new(), Vec::new());
        for rank in from {
            let rule = &self.rules.rules[rank as usize];
            row.push((rank, &rule.to[..]));
            if rule.both {
                column.push((rank, &rule.to[..]));
            }
        }
        for rank in to {
            let rule = &self.rules.rules[rank as usize];
            column.push((rank, &rule.from[..]));
            if rule.both {
                row.push((rank, &rule.from[..]));
            }
        }
        [row, column]
    }

    fn parts<'a>(&'a self, above: &[Vec<Used>], own: &Class, line: &'a [(Rank, &'a [Used])]) -> Parts<'a> {
        let wanted: BTreeSet<Used> = line.iter().flat_map(|&(_, others)| others).copied().collect();
        let mut inside: BTreeMap<Used, usize> = BTreeMap::new();
        let (mut tree, mut splits) = (0, Vec::new());
        for &used in &wanted {
            match self.rules.selectors[used as usize] {
                // Splits nothing.
                Selector::Any => {}
                Selector::Cidr(_) | Selector::Node(_) => {
                    tree += 1;
                    for outer in above[used as usize].iter().filter(|outer| wanted.contains(outer)) {
                        *inside.entry(*outer).or_default() += 1;
                    }
                }
                Selector::Group(_) | Selector::Prefix(_) => splits.push(self.classes.selected_by(used).len()),
            }
        }
        let mut parts = Parts { matrix: self, line, inside, splits: Splits::of(splits, own.lineage.is_some()), all: 0 };
        parts.all = parts.splits.apply(tree + 1).min(self.classes.len());
        parts
    }
}

/// The parts that the selectors of one line make of all classes.
struct Parts<'a> {
    matrix: &'a Matrix,
    line: &'a [(Rank, &'a [Used])],
    /// Of a cidr: how many cidrs and nodes of the line are inside.
    inside: BTreeMap<Used, usize>,
    splits: Splits,
    all: usize,
}

impl Parts<'_> {
    /// Pages and runs of ports that suffice for the line.
    fn room(&self) -> (usize, usize) {
        let RuleTable { rules, .. } = &self.matrix.rules;
        let ranged = self.line.iter().map(|&(rank, others)| (rules[rank as usize].ranges(), others));
        let (mut pages, mut ports) = (0_usize, 0_usize);
        for (ranges, others) in ranged.filter(|&(ranges, _)| ranges > 0) {
            let parts = others.iter().map(|&used| self.within(used)).sum::<usize>().min(self.all);
            pages += parts;
            // Of each range the block of its first port, that of its last, and the ones between, which are alike.
            ports += 3 * ranges * parts;
        }
        let pages = pages.min(self.all);
        (pages, pages + ports)
    }

    /// Parts in one of the selectors.
    fn within(&self, used: Used) -> usize {
        let classes = self.matrix.classes.selected_by(used).len();
        match self.matrix.rules.selectors[used as usize] {
            Selector::Any => self.all,
            Selector::Cidr(_) => {
                let inside = self.inside.get(&used).copied().unwrap_or_default();
                self.splits.apply(inside + 1).min(classes)
            }
            Selector::Node(_) | Selector::Group(_) | Selector::Prefix(_) => classes,
        }
    }
}

/// Selectors that form no tree with the others.
struct Splits {
    /// How many classes each has, the largest first.
    sizes: Vec<usize>,
    /// Of `sizes` from here on.
    sums: Vec<usize>,
    /// The lineage default may tell apart what no selector does.
    default: bool,
}

impl Splits {
    fn of(mut sizes: Vec<usize>, default: bool) -> Self {
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        let mut sums: Vec<usize> = sizes
            .iter()
            .rev()
            .scan(0, |sum, size| {
                *sum += size;
                Some(*sum)
            })
            .collect();
        sums.reverse();
        Self { sizes, sums, default }
    }

    /// At most how many parts they make of `parts`.
    fn apply(&self, parts: usize) -> usize {
        let mut parts = if self.default { 2 * parts } else { parts };
        for (size, sum) in self.sizes.iter().zip(&self.sums) {
            if parts >= *size {
                return parts + sum;
            }
            parts *= 2;
        }
        parts
    }
}

/// By selector that is a cidr or a node: the selectors that are cidrs around it.
fn above(network: &Network, rules: &RuleTable) -> Vec<Vec<Used>> {
    let used = |(index, selector): (usize, &Selector)| match selector {
        Selector::Cidr(id) => Some((*id, super::compile::index(index))),
        _ => None,
    };
    let used: BTreeMap<CidrId, Used> = rules.selectors.iter().enumerate().filter_map(used).collect();
    let above = |selector: &Selector| {
        let (cidr, own) = match selector {
            Selector::Cidr(id) => (Some(*id), 1),
            Selector::Node(id) => (network.cidr_of_node(*id).map(|cidr| cidr.id), 0),
            Selector::Any | Selector::Group(_) | Selector::Prefix(_) => (None, 0),
        };
        let lineage = cidr.map(|cidr| network.lineage_of(cidr)).unwrap_or_default();
        lineage.iter().skip(own).filter_map(|cidr| used.get(cidr).copied()).collect()
    };
    rules.selectors.iter().map(above).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arbitrary;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Breaks if a policy could pass the bound, be committed, and then be refused by a node.
        #[test]
        fn the_bound_is_never_below_the_slice(network in arbitrary::network()) {
            let matrix = Matrix::compile(&network).unwrap();
            let above = above(&network, &matrix.rules);
            let blocks = Blocks::of(&matrix, &network);
            for node in network.nodes().keys() {
                let Some(slice) = matrix.slice(&network, Revision(1), *node, None) else { continue };
                let size = slice.size();
                let bound = matrix.bound(&above, &blocks, &matrix.stands.classes_of(*node));
                for (exact, bound) in [
                    (size.room.blocks, bound.room.blocks),
                    (size.room.paths, bound.room.paths),
                    (size.leaves, bound.leaves),
                    (size.cells, bound.cells),
                    (size.rules, bound.rules),
                    (size.decisions, bound.decisions),
                    (size.pages, bound.pages),
                    (size.ports, bound.ports),
                ] {
                    prop_assert!(exact <= bound, "{:?} {:?}", size, bound);
                }
            }
            prop_assert_eq!(matrix.check_slices(&network), Ok(()));
        }
    }
}
