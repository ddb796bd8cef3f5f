//! The two copies of the tables: the idle one is written, one word puts it in force, the other follows.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use aya::Pod;
use aya::maps::{Array, MapData};
use ebpf_common::table::{Block, CELL_INDEX, CHILD, Control, Decision, Header, Leaf, NO_BLOCK, Page, Ports, UNIFORM};
use ebpf_common::{limit, map};
use policy::{Generation, Revision};

use super::{map::open, sys};
use crate::kernel::KernelError;
use crate::lower::{TableError, Tables};

/// The pinned tables, with what this process knows of their contents.
pub(super) struct Copies {
    control: Array<MapData, Control>,
    header: Array<MapData, Header>,
    blocks: MapData,
    leaves: MapData,
    matrix: MapData,
    pages: MapData,
    ports: MapData,
    decisions: MapData,
    /// What each copy holds; `None`: unknown, to be written whole.
    shadows: [Option<Arc<Tables>>; 2],
    /// A switch whose grace period has not been waited for.
    unsettled: bool,
}

impl Copies {
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            control: array(folder, map::CONTROL)?,
            header: array(folder, map::HEADER)?,
            blocks: open(folder, map::BLOCKS)?,
            leaves: open(folder, map::LEAVES)?,
            matrix: open(folder, map::MATRIX)?,
            pages: open(folder, map::PAGES)?,
            ports: open(folder, map::PORTS)?,
            decisions: open(folder, map::DECISIONS)?,
            shadows: [None, None],
            // Whoever had the maps before may have been killed right after a switch.
            unsettled: true,
        })
    }

    /// The word that the programs read.
    pub(super) fn control(&self) -> Result<Control, KernelError> {
        self.control.get(&0, 0).map_err(|error| KernelError::with("failed to read the control word", error))
    }

    /// Generation and revision in force; zero where no policy ever was.
    pub(super) fn in_force(&self) -> Result<(Generation, Revision), KernelError> {
        let control = self.control()?;
        if control.generation == 0 {
            return Ok((Generation(0), Revision(0)));
        }
        Ok((Generation(control.generation.into()), Revision(self.read_header(control.active)?.revision)))
    }

    /// The tables in force, if this process wrote them.
    pub(super) fn known(&self) -> Result<Option<&Tables>, KernelError> {
        let active = self.control()?.active & 1;
        Ok(self.shadows[active as usize].as_deref())
    }

    /// Drops everything from now on, as before the first policy.
    pub(super) fn close(&mut self) -> Result<(), KernelError> {
        self.shadows = [None, None];
        self.put_in_force(Control::default())
    }

    /// Puts tables in force.
    pub(super) fn switch(&mut self, tables: &Tables) -> Result<Generation, KernelError> {
        tables.check().map_err(|error: TableError| {
            KernelError::with("the tables contradict themselves: a bug, nothing was changed", error)
        })?;
        self.settle()?;
        let Control { active, generation } = self.control()?;
        if self.shadows[(active & 1) as usize].as_deref() == Some(tables) {
            // Asked for again: what the kernel has is not what was written.
            self.shadows = [None, None];
        }
        let next = Control { active: 1 - (active & 1), generation: generation.checked_add(1).unwrap_or(1) };
        let tables = Arc::new(tables.clone());
        self.fill(next.active, &tables, next.generation)?;
        self.put_in_force(next)?;
        self.unsettled = true;
        Ok(Generation(next.generation.into()))
    }

    /// Waits until no packet is judged by the copy that is no longer in force, and brings it up to date.
    pub(super) fn settle(&mut self) -> Result<(), KernelError> {
        if !self.unsettled {
            return Ok(());
        }
        sys::wait_for_readers().map_err(|error| KernelError::with("failed to wait for an RCU grace period", error))?;
        self.unsettled = false;
        let Control { active, generation } = self.control()?;
        if let Some(tables) = self.shadows[(active & 1) as usize].clone() {
            self.fill(1 - (active & 1), &tables, generation)?;
        }
        Ok(())
    }

    /// Makes one copy, which is not in force, hold these tables.
    fn fill(&mut self, copy: u32, tables: &Arc<Tables>, generation: u32) -> Result<(), KernelError> {
        // Unknown until it is whole, so that a failure in between is repaired by the next attempt.
        let old = self.shadows[copy as usize].take();
        let old = old.as_deref();
        write(&self.blocks, map::BLOCKS, copy * limit::BLOCKS, old.map(|old| &*old.blocks), &tables.blocks)?;
        write(&self.leaves, map::LEAVES, copy * limit::LEAVES, old.map(|old| &*old.leaves), &tables.leaves)?;
        write(&self.matrix, map::MATRIX, copy * limit::CELLS, old.map(|old| &*old.matrix), &tables.matrix)?;
        write(&self.pages, map::PAGES, copy * limit::PAGES, old.map(|old| &*old.pages), &tables.pages)?;
        write(&self.ports, map::PORTS, copy * limit::PORTS, old.map(|old| &*old.ports), &tables.ports)?;
        write(
            &self.decisions,
            map::DECISIONS,
            copy * limit::DECISIONS,
            old.map(|old| &*old.decisions),
            &tables.decisions,
        )?;
        let header = Header { generation, ..tables.header };
        self.header
            .set(copy, header, 0)
            .map_err(|error| KernelError::with("failed to write `HEADER`; the running policy is as it was", error))?;
        self.shadows[copy as usize] = Some(Arc::clone(tables));
        Ok(())
    }

    fn put_in_force(&mut self, control: Control) -> Result<(), KernelError> {
        self.control
            .set(0, control, 0)
            .map_err(|error| KernelError::with("failed to write `CONTROL`; the running policy is as it was", error))
    }

    fn read_header(&self, copy: u32) -> Result<Header, KernelError> {
        self.header.get(&(copy & 1), 0).map_err(|error| KernelError::with("failed to read the header", error))
    }

    /// What the programs use now, as far as anything refers to it. Tables that contradict themselves are an error.
    pub(super) fn read(&self) -> Result<Tables, KernelError> {
        let tables = self.read_as_it_is()?;
        tables.check().map_err(|error: TableError| {
            KernelError::with("the kernel's tables contradict themselves: restart `noded`", error)
        })?;
        Ok(tables)
    }

    /// Likewise, whatever it says. What refers beyond the end of a table is still there, and what it refers to is not.
    pub(super) fn read_as_it_is(&self) -> Result<Tables, KernelError> {
        let copy = self.control()?.active & 1;
        let header = self.read_header(copy)?;
        let blocks = self.read_blocks(copy, &header)?;
        let targets = || blocks.iter().flat_map(|block| block.entries.iter().chain(std::iter::once(&block.otherwise)));
        let leaf = targets().filter(|entry| **entry & CHILD == 0).max().map_or(0, |leaf| *leaf);
        let leaves: Vec<Leaf> = read(&self.leaves, map::LEAVES, copy * limit::LEAVES, leaf + 1, limit::LEAVES)?;
        let cells = header.own.saturating_mul(header.classes).saturating_mul(2);
        let matrix: Vec<u32> = read(&self.matrix, map::MATRIX, copy * limit::CELLS, cells, limit::CELLS)?;
        let of_cells = |uniform: bool| {
            let words = matrix.iter().filter(move |word| (**word & UNIFORM != 0) == uniform);
            words.map(|word| (word & CELL_INDEX) + 1).max().unwrap_or(0)
        };
        let pages: Vec<Page> = read(&self.pages, map::PAGES, copy * limit::PAGES, of_cells(false), limit::PAGES)?;
        let runs = pages
            .iter()
            .flat_map(|page| page.tcp.iter().chain(&page.udp).chain([&page.icmp, &page.icmpv6, &page.protocol]));
        let runs = runs.max().map_or(0, |run| u32::from(*run) + 1);
        let ports: Vec<Ports> = read(&self.ports, map::PORTS, copy * limit::PORTS, runs, limit::PORTS)?;
        let decisions = ports.iter().flat_map(|ports| &ports.decisions).max().map_or(1, |one| u32::from(*one) + 1);
        let decisions = decisions.max(of_cells(true));
        let decisions: Vec<Decision> =
            read(&self.decisions, map::DECISIONS, copy * limit::DECISIONS, decisions, limit::DECISIONS)?;
        Ok(Tables {
            revision: Revision(header.revision),
            header,
            blocks,
            leaves,
            matrix,
            pages,
            ports,
            decisions,
            rule_slots: BTreeMap::new(),
        })
    }

    /// Blocks point forward, so those read so far say how many more there are.
    fn read_blocks(&self, copy: u32, header: &Header) -> Result<Vec<Block>, KernelError> {
        let roots = header.roots_v4.iter().chain(&header.roots_v6).map(|root| root.block);
        let mut wanted =
            roots.filter(|block| *block != NO_BLOCK).map(|block| block.saturating_add(1)).max().unwrap_or(0);
        let mut blocks: Vec<Block> = Vec::new();
        while blocks.len() < wanted.min(limit::BLOCKS) as usize {
            let first = blocks.len() as u32;
            let left = limit::BLOCKS - first;
            let more: Vec<Block> = read(&self.blocks, map::BLOCKS, copy * limit::BLOCKS + first, wanted - first, left)?;
            let children = more.iter().flat_map(|block| &block.entries).filter(|entry| **entry & CHILD != 0);
            wanted = children.map(|entry| (entry & !CHILD) + 1).max().unwrap_or(0).max(wanted);
            blocks.extend(more);
        }
        Ok(blocks)
    }
}

fn array<V: Pod>(folder: &Path, name: &str) -> Result<Array<MapData, V>, KernelError> {
    Array::try_from(aya::maps::Map::Array(open(folder, name)?))
        .map_err(|error| KernelError::with(format!("`{name}` is no array"), error))
}

/// Runs of changed entries closer than this are written as one.
const JOIN: usize = 8;

/// Writes what differs from what is there.
fn write<T: Pod + PartialEq>(
    map: &MapData,
    name: &str,
    first: u32,
    old: Option<&[T]>,
    new: &[T],
) -> Result<(), KernelError> {
    let failed = |error| KernelError::with(format!("failed to write `{name}`; the running policy is as it was"), error);
    let old = old.unwrap_or_default();
    let differs = |index: &usize| old.get(*index) != Some(&new[*index]);
    let mut changed = (0..new.len()).filter(differs).peekable();
    while let Some(start) = changed.next() {
        let mut end = start + 1;
        while let Some(next) = changed.next_if(|next| *next < end + JOIN) {
            end = next + 1;
        }
        sys::write_array(map.fd().as_fd(), first + start as u32, &new[start..end]).map_err(failed)?;
    }
    Ok(())
}

/// As many as are asked for, or as there are.
fn read<T: Pod>(map: &MapData, name: &str, first: u32, count: u32, limit: u32) -> Result<Vec<T>, KernelError> {
    sys::read_array(map.fd().as_fd(), first, count.min(limit) as usize)
        .map_err(|error| KernelError::with(format!("failed to read `{name}`"), error))
}

#[cfg(test)]
mod tests;
