//! Whether tables are whole: what a copy must pass before it is put in force, and what one that was read back is held
//! against.

use ebpf_common::limit;
use ebpf_common::reason;
use ebpf_common::table::{
    ALLOW, CELL_INDEX, CHILD, DENY, EXTERNAL, HOLDER_SHIFT, LOCAL, LOG, Leaf, NO_BLOCK, NO_RULE_SLOT, PLAIN, RECORD,
    UNIFORM,
};

use super::Tables;

/// The first contradiction found in tables.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {index} of {table} {what}")]
pub struct TableError {
    /// Name of the table as its map has it.
    pub table: &'static str,
    pub index: usize,
    pub what: String,
}

impl Tables {
    /// Whether every index lies inside its table, every walk ends, and everything fits the kernel's maps.
    pub fn check(&self) -> Result<(), TableError> {
        self.check_sizes()?;
        self.check_strides()?;
        self.check_matrix()
    }

    fn check_sizes(&self) -> Result<(), TableError> {
        let sizes = [
            ("BLOCKS", self.blocks.len(), 0, limit::BLOCKS),
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
        for (index, root) in self.header.roots_v4.iter().chain(&self.header.roots_v6).enumerate() {
            if root.block != NO_BLOCK && root.block as usize >= self.blocks.len() {
                return Err(error(
                    "HEADER",
                    0,
                    format!("has root {index} at block {}, which is not there", root.block),
                ));
            }
        }
        let leaves = self.leaves.len();
        for (index, block) in self.blocks.iter().enumerate() {
            let position = block.position & !PLAIN;
            if position > 15 {
                return Err(error("BLOCKS", index, format!("looks at byte {position} of 16")));
            }
            if block.otherwise as usize >= leaves {
                return Err(error("BLOCKS", index, format!("refers to leaf {}, which is not there", block.otherwise)));
            }
            for entry in block.entries {
                let target = (entry & !CHILD) as usize;
                if entry & CHILD == 0 && target >= leaves {
                    return Err(error("BLOCKS", index, format!("refers to leaf {target}, which is not there")));
                }
                // Every step looks further right, so that a walk ends after 16.
                let further = |child: &ebpf_common::table::Block| child.position & !PLAIN > position;
                if entry & CHILD != 0 && !self.blocks.get(target).is_some_and(further) {
                    return Err(error("BLOCKS", index, format!("refers to block {target}, which is none below it")));
                }
            }
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

    fn check_matrix(&self) -> Result<(), TableError> {
        for (index, word) in self.matrix.iter().enumerate() {
            let target = (word & CELL_INDEX) as usize;
            let length = if word & UNIFORM != 0 { self.decisions.len() } else { self.pages.len() };
            if target >= length || word & !(UNIFORM | RECORD | CELL_INDEX) != 0 {
                return Err(error("MATRIX", index, format!("is {word:#x}, which refers to nothing")));
            }
        }
        for (index, page) in self.pages.iter().enumerate() {
            let single = [page.icmp, page.icmpv6, page.protocol];
            let mut runs = page.tcp.iter().chain(&page.udp).chain(&single);
            if let Some(run) = runs.find(|run| usize::from(**run) >= self.ports.len()) {
                return Err(error("PAGES", index, format!("refers to run {run}, which is not there")));
            }
        }
        for (index, ports) in self.ports.iter().enumerate() {
            if let Some(decision) = ports.decisions.iter().find(|one| usize::from(**one) >= self.decisions.len()) {
                return Err(error("PORTS", index, format!("refers to decision {decision}, which is not there")));
            }
        }
        for (index, decision) in self.decisions.iter().enumerate() {
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

fn error(table: &'static str, index: usize, what: impl Into<String>) -> TableError {
    TableError { table, index, what: what.into() }
}
