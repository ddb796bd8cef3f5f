//! How much room a slice takes in the tables of a node.

use std::collections::{BTreeMap, BTreeSet};

use super::Slice;
use crate::limit::{self, Bounded, LimitError};
use crate::matrix::{Cell, CellEntry, Room};
use crate::object::id::ClassId;
use crate::object::service::protocol;
use crate::object::verdict::Verdict;

/// Each in the unit of the limit that it is held against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) room: Room,
    pub(crate) leaves: usize,
    pub(crate) cells: usize,
    pub(crate) rules: usize,
    pub(crate) decisions: usize,
    pub(crate) pages: usize,
    pub(crate) ports: usize,
}

impl Slice {
    pub(crate) fn size(&self) -> Size {
        Size::of(self, &self.classes(), self.own_classes().len())
    }
}

impl Size {
    /// `classes`: all classes of the slice; `own`: how many of them the node stands for.
    pub(crate) fn of(slice: &Slice, classes: &BTreeSet<ClassId>, own: usize) -> Self {
        let leaves: BTreeSet<_> = slice.prefixes.values().collect();
        let distinct: BTreeSet<&Cell> = slice.cells.values().collect();
        let verdicts: BTreeSet<_> = distinct.iter().flat_map(|cell| cell.verdicts()).collect();
        Self {
            room: slice.room(),
            leaves: Self::leaves(leaves.len(), slice.held_leaves()),
            cells: Self::cells(own, classes.len()),
            rules: slice.rules.len(),
            decisions: Self::decisions(verdicts.len()),
            pages: distinct.iter().filter(|cell| !cell.entries.is_empty()).count(),
            ports: port_runs(&distinct),
        }
    }

    /// Each pair of class and cidr may be local or not, and so may be what is in no cidr. `held`: those that gateways hold.
    pub(crate) fn leaves(places: usize, held: usize) -> usize {
        2 * (places + 1) + held
    }

    /// The class of no cidr is always there.
    pub(crate) fn cells(own: usize, classes: usize) -> usize {
        2 * own * (classes + 1)
    }

    /// The verdict of an absent cell is always there.
    pub(crate) fn decisions(verdicts: usize) -> usize {
        verdicts + 1
    }

    /// Refuses what a node has no room for.
    pub(crate) fn check(&self) -> Result<(), LimitError> {
        let Self { room, leaves, cells, rules, decisions, pages, ports } = *self;
        Bounded::SliceBlocks.check(room.blocks, limit::MAX_SLICE_BLOCKS)?;
        Bounded::SlicePaths.check(room.paths, limit::MAX_SLICE_PATHS)?;
        Bounded::SliceLeaves.check(leaves, limit::MAX_SLICE_LEAVES)?;
        Bounded::SliceCells.check(cells, limit::MAX_SLICE_CELLS)?;
        Bounded::SliceRules.check(rules, limit::MAX_SLICE_RULES)?;
        Bounded::SliceDecisions.check(decisions, limit::MAX_SLICE_DECISIONS)?;
        Bounded::SlicePages.check(pages, limit::MAX_SLICE_PAGES)?;
        Bounded::SlicePorts.check(ports, limit::MAX_SLICE_PORTS)
    }
}

/// Verdicts of 256 ports: of the parts that are not as the rest, and of the rest.
pub(crate) type Run = (Parts, Option<Verdict>);
/// The first and last of each part, with its verdict.
type Parts = Vec<(u8, u8, Verdict)>;

/// How many distinct runs of 256 verdicts the cells have, counted without making them.
fn port_runs(cells: &BTreeSet<&Cell>) -> usize {
    cells.iter().flat_map(|cell| runs(cell)).collect::<BTreeSet<Run>>().len()
}

/// The distinct runs of a cell; one that says only one thing has none.
pub(super) fn runs(cell: &Cell) -> BTreeSet<Run> {
    if cell.entries.is_empty() {
        return BTreeSet::new();
    }
    let mut blocks: BTreeMap<(Option<u8>, u8), Parts> = BTreeMap::new();
    for CellEntry { range, verdict } in &cell.entries {
        match range.protocol {
            protocol::TCP | protocol::UDP | protocol::ICMP | protocol::ICMPV6 => {
                let ([first, low], [last, high]) = (range.low.to_be_bytes(), range.high.to_be_bytes());
                for block in first..=last {
                    let low = if block == first { low } else { 0 };
                    let high = if block == last { high } else { u8::MAX };
                    blocks.entry((Some(range.protocol), block)).or_default().push((low, high, *verdict));
                }
            }
            other => blocks.entry((None, 0)).or_default().push((other, other, *verdict)),
        }
    }
    let parted = blocks.into_values().map(|block| {
        let whole = matches!(block.as_slice(), [(0, u8::MAX, _)]);
        (block, (!whole).then_some(cell.otherwise))
    });
    std::iter::once((Vec::new(), Some(cell.otherwise))).chain(parted).collect()
}
