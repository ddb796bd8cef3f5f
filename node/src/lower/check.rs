//! Whether tables are whole: what a copy must pass before it is put in force, and what one that was read back is held
//! against.

use ebpf_common::limit;
use ebpf_common::reason;
use ebpf_common::table::{
    ALLOW, BLOCK, CELL_INDEX, DENY, EXTERNAL, Few, HOLDER_SHIFT, INDEX, LOCAL, LOG, Leaf, NO_RULE_SLOT, PATH, Path,
    RECORD, UNIFORM, block_entry, block_of,
};

use super::Tables;

/// The first contradiction found in tables.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {index} of {table} {what}")]
pub struct TableError {
    /// Its name in capitals.
    pub table: &'static str,
    pub index: usize,
    pub what: String,
}

impl Tables {
    /// Whether every index lies inside its table, every walk ends, and everything fits the kernel's maps.
    pub fn check(&self) -> Result<(), TableError> {
        self.check_sizes()?;
        self.check_strides()?;
        self.check_matrix(None)
    }

    /// Likewise, where `known` has passed: what both share is as sound here if all that it refers to is still there.
    pub fn check_after(&self, known: &Tables) -> Result<(), TableError> {
        self.check_sizes()?;
        let roots = |tables: &Tables| (tables.header.root_v4, tables.header.root_v6, tables.header.classes);
        let same = self.blocks.is_same(&known.blocks)
            && self.paths.is_same(&known.paths)
            && self.leaves.is_same(&known.leaves);
        if !same || roots(self) != roots(known) {
            self.check_strides()?;
        }
        let lengths = |tables: &Tables| [tables.pages.len(), tables.ports.len(), tables.decisions.len()];
        let all_there = lengths(self).iter().zip(lengths(known)).all(|(new, known)| *new >= known);
        self.check_matrix(all_there.then_some(known))
    }

    fn check_sizes(&self) -> Result<(), TableError> {
        let sizes = [
            ("BLOCKS", self.blocks.len(), 0, limit::BLOCKS),
            ("PATHS", self.paths.len(), 0, limit::PATHS),
            ("LEAVES", self.leaves.len(), 1, limit::LEAVES),
            ("MATRIX", self.matrix.len(), 0, limit::CELLS),
            ("PAGES", self.pages.len(), 0, limit::PAGES),
            ("PORTS", self.ports.len(), 0, limit::PORTS),
            ("DECISIONS", self.decisions.len(), 1, limit::DECISIONS),
        ];
        for (table, length, least, limit) in sizes {
            if length < least || length > limit as usize {
                return Err(error(table, length, format!("is the end: {least} to {limit} entries are possible")));
            }
        }
        let header = &self.header;
        if header.revision != self.revision.0 {
            return Err(error("HEADER", 0, format!("has revision {}, not {}", header.revision, self.revision)));
        }
        if header.own >= header.classes.max(1) || header.classes == 0 {
            return Err(error("HEADER", 0, format!("has {} own of {} classes", header.own, header.classes)));
        }
        if self.matrix.len() as u64 != 2 * u64::from(header.own) * u64::from(header.classes) {
            return Err(error("MATRIX", self.matrix.len(), "is the end: not two directions of own times all classes"));
        }
        Ok(())
    }

    fn check_strides(&self) -> Result<(), TableError> {
        let mut seen = Seen { blocks: vec![false; self.blocks.len()], paths: vec![false; self.paths.len()] };
        for (root, steps) in [(self.header.root_v4, limit::STEPS_V4), (self.header.root_v6, limit::STEPS_V6)] {
            self.check_entry(&mut seen, ("HEADER", 0), root, 0, steps)?;
        }
        if self.leaves.first() != Some(&Leaf::default()) {
            return Err(error("LEAVES", 0, "is not the unknown one"));
        }
        for (index, leaf) in self.leaves.iter().enumerate() {
            if leaf.class >= self.header.classes {
                return Err(error("LEAVES", index, "has a class that is not there"));
            }
            let others = leaf.flags & !EXTERNAL;
            let held = others == leaf.holder() << HOLDER_SHIFT && (leaf.class != 0 || leaf.flags == 0);
            if leaf.flags != LOCAL && !held {
                return Err(error("LEAVES", index, format!("has the flags {:#x}, which mean nothing", leaf.flags)));
            }
        }
        Ok(())
    }

    /// What `of` refers to, with `steps` left, where blocks must look at byte `position` or further right: so a walk
    /// ends. Whatever has a place in the tree has one.
    fn check_entry(
        &self,
        seen: &mut Seen,
        of: (&'static str, usize),
        entry: u32,
        position: u32,
        steps: u32,
    ) -> Result<(), TableError> {
        let refuse = |what: &str| Err(error(of.0, of.1, format!("refers to {what}")));
        if steps == 0 {
            return refuse("what is more steps away than a walk has");
        }
        let place = |seen: &mut [bool], index| seen.get_mut(index).is_some_and(|seen| !std::mem::replace(seen, true));
        if entry & BLOCK != 0 {
            let (index, at) = block_of(entry);
            let known = entry == block_entry(index, at);
            let index = index as usize;
            if !known || !place(&mut seen.blocks, index) {
                return refuse(&format!("block {index}, which is not there or has another place ({entry:#x})"));
            }
            if at < position {
                return refuse(&format!("block {index} at byte {at}, which is none below it"));
            }
            for next in self.blocks[index].entries {
                // Most are leaves.
                if next & (BLOCK | PATH) != 0 || next as usize >= self.leaves.len() {
                    self.check_entry(seen, ("BLOCKS", index), next, at + 1, steps - 1)?;
                }
            }
        } else if entry & PATH != 0 {
            let index = (entry & INDEX) as usize;
            if entry & !(PATH | INDEX) != 0 || !place(&mut seen.paths, index) {
                return refuse(&format!("path {index}, which is not there or has another place ({entry:#x})"));
            }
            let Path { mask, prefix, inside, outside } = self.paths[index];
            if [0, 1].iter().any(|word| prefix.0[*word] & !mask.0[*word] != 0) {
                return Err(error("PATHS", index, "has bits outside its mask, so that nothing follows it"));
            }
            self.check_entry(seen, ("PATHS", index), inside, position, steps - 1)?;
            self.check_entry(seen, ("PATHS", index), outside, position, steps - 1)?;
        } else if entry as usize >= self.leaves.len() {
            return refuse(&format!("leaf {entry}, which is not there"));
        }
        Ok(())
    }

    fn check_matrix(&self, known: Option<&Tables>) -> Result<(), TableError> {
        for (index, word) in self.matrix.unshared(known.map(|known| &known.matrix)) {
            let target = (word & CELL_INDEX) as usize;
            let length = if word & UNIFORM != 0 { self.decisions.len() } else { self.pages.len() };
            if target >= length || word & !(UNIFORM | RECORD | CELL_INDEX) != 0 {
                return Err(error("MATRIX", index, format!("is {word:#x}, which refers to nothing")));
            }
        }
        for (index, page) in self.pages.unshared(known.map(|known| &known.pages)) {
            let Few { starts, known: are_known, decisions } = page.few;
            if are_known > 1 || !starts.is_sorted() {
                return Err(error("PAGES", index, format!("has ranges that are out of order: {:?}", page.few)));
            }
            if let Some(decision) = decisions.iter().find(|one| usize::from(**one) >= self.decisions.len()) {
                return Err(error("PAGES", index, format!("refers to decision {decision}, which is not there")));
            }
            let single = [page.icmp, page.icmpv6, page.protocol];
            let mut runs = page.tcp.iter().chain(&page.udp).chain(&single);
            if let Some(run) = runs.find(|run| usize::from(**run) >= self.ports.len()) {
                return Err(error("PAGES", index, format!("refers to run {run}, which is not there")));
            }
        }
        for (index, ports) in self.ports.unshared(known.map(|known| &known.ports)) {
            if let Some(decision) = ports.decisions.iter().find(|one| usize::from(**one) >= self.decisions.len()) {
                return Err(error("PORTS", index, format!("refers to decision {decision}, which is not there")));
            }
        }
        for (index, decision) in self.decisions.unshared(known.map(|known| &known.decisions)) {
            let known = matches!(
                (decision.verdict, decision.reason),
                (ALLOW | DENY, reason::RULE) | (ALLOW, reason::LINEAGE) | (DENY, reason::NO_RULE)
            );
            // A rule counts, whatever else decides does not.
            let counted = (decision.reason == reason::RULE) == (decision.rule < limit::RULES)
                && (decision.rule < limit::RULES || decision.rule == NO_RULE_SLOT);
            if !known || !counted || decision.flags & !LOG != 0 {
                return Err(error("DECISIONS", index, format!("is {decision:?}, which means nothing")));
            }
        }
        Ok(())
    }
}

/// What a walk through the whole tree has seen.
struct Seen {
    blocks: Vec<bool>,
    paths: Vec<bool>,
}

fn error(table: &'static str, index: usize, what: impl Into<String>) -> TableError {
    TableError { table, index, what: what.into() }
}
