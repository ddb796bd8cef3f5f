//! Lowering: a node's slice of the matrix to the entries of the kernel's tables. Pure.
//!
//! What the tables mean is written in `ebpf_common`. What is made here is whole: every index lies inside its table, the
//! stride table is a tree, and a copy of the tables that was filled with them gives the answer of
//! [`policy::Slice::verdict`] for every flow with an end at the node. [`Tables::check`] says so of any tables, also of
//! those read back from the kernel.

mod check;
mod classes;
mod holed;
mod interned;
mod matrix;
mod own;
mod rows;
mod show;
mod slots;
mod stride;
mod tree;
mod walk;

#[cfg(test)]
mod tests;

use ebpf_common::limit;
use ebpf_common::table::{Block, Decision, Header, Leaf, Page, Path, Ports};
use policy::{Map, Revision, RuleId, Slice, Touched};

use self::classes::Classes;
use self::matrix::{Cells, Terms};
use self::own::Entries;
use self::stride::Strides;
use self::tree::MANY;

pub use check::TableError;
pub use rows::Rows;
pub use show::TableCell;
pub use slots::RuleSlots;
pub use walk::Outcome;

/// One copy of the kernel's tables, and whose counter is whose. Copies share what they have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    /// The revision that the slice was compiled from; also in `header`.
    pub revision: Revision,
    /// `generation` is 0 here: the switch that puts the tables in force sets it.
    pub header: Header,
    pub blocks: Rows<Block>,
    pub paths: Rows<Path>,
    pub leaves: Rows<Leaf>,
    /// See [`ebpf_common::table::cell_index`].
    pub matrix: Rows<u32>,
    pub pages: Rows<Page>,
    pub ports: Rows<Ports>,
    pub decisions: Rows<Decision>,
    /// Counter slot of each rule of the slice. Not in the kernel: empty in tables that were read back.
    pub rule_slots: Map<RuleId, u32>,
}

/// Why a slice does not become tables. The running tables stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// A limit of the kernel's maps (`ebpf_common::limit`).
    #[error("the slice needs {wanted} {what} and the kernel's tables hold {limit}: {remedy}")]
    TooMany { what: &'static str, wanted: usize, limit: usize, remedy: &'static str },
    /// A cell names a rule that the slice does not carry.
    #[error("a cell of the slice is decided by rule `{0}`, which the slice does not contain: fetch the slice anew")]
    UnknownRule(RuleId),
}

/// Lowers a slice. `slots` remembers which rule has which counter; on failure it is as it was.
pub fn lower(slice: &Slice, slots: &mut RuleSlots) -> Result<Tables, LowerError> {
    Lowering::default().lower(slice, slots)
}

/// Lowers one slice after the other, each at the cost of what it changes where it was made from the one before.
#[derive(Debug, Default)]
pub struct Lowering(Option<Last>);

/// The slice that was lowered last, and what it became.
#[derive(Debug)]
struct Last {
    slice: Slice,
    entries: Entries,
    classes: Classes,
    strides: Strides,
    cells: Cells,
    tables: Tables,
    /// Not made anew.
    #[cfg(test)]
    is_followed: bool,
}

impl Lowering {
    /// As [`lower`] does. The tables may be others than a slice that comes first gets, but say the same.
    pub fn lower(&mut self, slice: &Slice, slots: &mut RuleSlots) -> Result<Tables, LowerError> {
        // What goes wrong with the former tables is for the whole slice to be asked about.
        let followed = self.0.take().and_then(|last| last.follow(slice, slots));
        let (last, assigned) = match followed {
            Some(followed) => followed,
            None => Last::new(slice, slots)?,
        };
        *slots = assigned;
        let tables = last.tables.clone();
        self.0 = Some(last);
        Ok(tables)
    }
}

#[cfg(test)]
impl Lowering {
    /// Whether the last slice was lowered at the cost of what it changes.
    fn is_followed(&self) -> bool {
        self.0.as_ref().is_some_and(|last| last.is_followed)
    }
}

impl Last {
    fn new(slice: &Slice, slots: &RuleSlots) -> Result<(Self, RuleSlots), LowerError> {
        let assigned = slots.assigned(slice.rules.keys().copied())?;
        let entries = Entries::new(slice);
        let classes = Classes::new(&entries);
        let cells = Cells::lower(&Terms { slice, classes: &classes, slots: &assigned })?;
        let strides = Strides::lower(&slice.local.roots, &classes, &entries)?;
        let tables = tables(slice, &classes, &strides, &cells, &assigned);
        let last = Self {
            slice: slice.clone(),
            entries,
            classes,
            strides,
            cells,
            tables,
            #[cfg(test)]
            is_followed: false,
        };
        Ok((last, assigned))
    }

    /// `None`: the tables are to be made anew.
    fn follow(mut self, slice: &Slice, slots: &RuleSlots) -> Option<(Self, RuleSlots)> {
        let touched = Touched::between(&self.slice, slice);
        let is_other = touched.local || touched.gateways || touched.prefixes.len() > MANY;
        if is_other || !self.tables.rule_slots.ptr_eq(slots.active()) {
            return None;
        }
        let (come, gone): (Vec<RuleId>, Vec<RuleId>) =
            touched.rules.iter().partition(|rule| slice.rules.contains_key(*rule));
        let assigned = slots.changed(&gone, come.into_iter()).ok()?;
        let changed = self.entries.follow(&self.slice, slice, &touched.prefixes)?;
        let renumbered = self.classes.follow(&changed)?;
        self.strides.follow(&self.classes, &changed)?;
        let terms = Terms { slice, classes: &self.classes, slots: &assigned };
        self.cells.follow(&terms, &self.slice, &self.tables.rule_slots, &touched, &renumbered).ok()?;
        self.tables = tables(slice, &self.classes, &self.strides, &self.cells, &assigned);
        self.slice = slice.clone();
        #[cfg(test)]
        {
            self.is_followed = true;
        }
        Some((self, assigned))
    }
}

fn tables(slice: &Slice, classes: &Classes, strides: &Strides, cells: &Cells, slots: &RuleSlots) -> Tables {
    let (root_v4, root_v6) = strides.roots();
    Tables {
        revision: slice.revision,
        header: Header {
            revision: slice.revision.0,
            generation: 0,
            own: classes.owns(),
            classes: classes.row(),
            root_v4,
            root_v6,
            _pad: [0; 9],
        },
        blocks: strides.blocks().clone(),
        paths: strides.paths().clone(),
        leaves: strides.leaves().clone(),
        matrix: cells.matrix.clone(),
        pages: cells.pages(),
        ports: cells.ports(),
        decisions: cells.decisions(),
        rule_slots: slots.active().clone(),
    }
}

const FEWER_PREFIXES: &str = "merge cidrs, or give out addresses more densely";
const FEWER_RULES: &str = "merge rules that concern this node";
const FEWER_SERVICES: &str = "use fewer distinct combinations of services in rules that concern this node";

/// Refuses what the kernel's map has no room for.
fn within(what: &'static str, wanted: usize, limit: u32, remedy: &'static str) -> Result<(), LowerError> {
    let limit = limit as usize;
    if wanted > limit { Err(LowerError::TooMany { what, wanted, limit, remedy }) } else { Ok(()) }
}

const _: () = assert!(limit::PAGES <= 1 << 16 && limit::PORTS <= 1 << 16 && limit::DECISIONS <= 1 << 16);
