//! The two copies of the tables: the idle one is written, one word puts it in force, the other follows.

use std::mem::offset_of;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use aya::Pod;
use aya::maps::{Array, MapData};
use ebpf_common::table::{
    BLOCK, Block, CELL_INDEX, Control, Decision, Header, INDEX, Leaf, PATH, Page, Path as TablePath, Ports, TableCopy,
    UNIFORM, block_of,
};
use ebpf_common::{COPIES, limit, map};
use policy::{Generation, Revision};

use crate::kernel::KernelError;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::open;
use crate::kernel::datapath::tables::mapping::Mapping;
use crate::lower::{Rows, TableError, Tables};

/// The pinned tables, with what this process knows of their contents.
pub(crate) struct Copies {
    control: Array<MapData, Control>,
    tables: Mapping,
    /// What each copy holds; `None`: unknown, to be written whole.
    shadows: [Option<Arc<Tables>>; 2],
    /// What the control word says by this process; `None`: it wrote none.
    written: Option<Control>,
    /// A switch whose grace period has not been waited for.
    unsettled: bool,
}

impl Copies {
    /// `writable`: for whoever switches. Others cannot write by mistake.
    pub(crate) fn open(folder: &Path, writable: bool) -> Result<Self, KernelError> {
        let control = Array::try_from(aya::maps::Map::Array(open(folder, map::CONTROL)?))
            .map_err(|error| KernelError::with(format!("`{}` is no array", map::CONTROL), error))?;
        let tables = open(folder, map::TABLES)?;
        let tables = Mapping::of(tables.fd().as_fd(), COPIES as usize * size_of::<TableCopy>(), writable)
            .map_err(|error| KernelError::with(format!("failed to map `{}` into memory", map::TABLES), error))?;
        // Whoever had the maps before may have been killed right after a switch.
        Ok(Self { control, tables, shadows: [None, None], written: None, unsettled: true })
    }

    /// The word that the programs read.
    pub(crate) fn control(&self) -> Result<Control, KernelError> {
        self.control.get(&0, 0).map_err(|error| KernelError::with("failed to read the control word", error))
    }

    /// Generation and revision in force; zero where no policy ever was.
    pub(crate) fn in_force(&self) -> Result<(Generation, Revision), KernelError> {
        let control = self.control()?;
        if control.generation == 0 {
            return Ok((Generation(0), Revision(0)));
        }
        Ok((Generation(control.generation.into()), Revision(self.read_header(control.active).revision)))
    }

    /// The tables in force, if this process wrote them.
    pub(crate) fn known(&self) -> Result<Option<&Tables>, KernelError> {
        let active = self.control()?.active & 1;
        Ok(self.shadows[active as usize].as_deref())
    }

    /// Drops everything from now on, as before the first policy.
    pub(crate) fn close(&mut self) -> Result<(), KernelError> {
        self.shadows = [None, None];
        self.put_in_force(Control::default())
    }

    /// Puts tables in force.
    pub(crate) fn switch(&mut self, tables: &Tables) -> Result<Generation, KernelError> {
        let control = self.control()?;
        if self.written.is_some_and(|written| written != control) {
            // Another process has switched, and may have written anything; packets may be in the copy that went by that.
            self.distrust();
            self.unsettled = true;
        }
        let Control { active, generation } = control;
        // Whatever this process wrote was checked before.
        let checked = match &self.shadows[(active & 1) as usize] {
            Some(known) => tables.check_after(known),
            None => tables.check(),
        };
        checked.map_err(|error: TableError| {
            KernelError::with("the tables contradict themselves: a bug, nothing was changed", error)
        })?;
        self.settle()?;
        if self.shadows[(active & 1) as usize].as_deref() == Some(tables) {
            // Asked for again: what the kernel has is not what was written.
            self.shadows = [None, None];
        }
        let next = Control { active: 1 - (active & 1), generation: generation.checked_add(1).unwrap_or(1) };
        let tables = Arc::new(tables.clone());
        self.fill(next.active, &tables, next.generation);
        self.put_in_force(next)?;
        self.unsettled = true;
        Ok(Generation(next.generation.into()))
    }

    /// Whatever is in the copies is written anew.
    pub(crate) fn distrust(&mut self) {
        self.shadows = [None, None];
    }

    /// Waits until no packet is judged by the copy that is no longer in force, and brings it up to date.
    pub(crate) fn settle(&mut self) -> Result<(), KernelError> {
        if !self.unsettled {
            return Ok(());
        }
        sys::wait_for_readers().map_err(|error| KernelError::with("failed to wait for an RCU grace period", error))?;
        self.unsettled = false;
        let Control { active, generation } = self.control()?;
        if let Some(tables) = self.shadows[(active & 1) as usize].clone() {
            self.fill(1 - (active & 1), &tables, generation);
        }
        Ok(())
    }

    /// Makes one copy, which is not in force, hold these tables.
    fn fill(&mut self, copy: u32, tables: &Arc<Tables>, generation: u32) {
        // Unknown until it is whole: whoever comes after a panic in between writes all of it.
        let old = self.shadows[copy as usize].take();
        let old = old.as_deref();
        self.write(copy, offset_of!(TableCopy, blocks), old.map(|old| &old.blocks), &tables.blocks);
        self.write(copy, offset_of!(TableCopy, paths), old.map(|old| &old.paths), &tables.paths);
        self.write(copy, offset_of!(TableCopy, leaves), old.map(|old| &old.leaves), &tables.leaves);
        self.write(copy, offset_of!(TableCopy, matrix), old.map(|old| &old.matrix), &tables.matrix);
        self.write(copy, offset_of!(TableCopy, pages), old.map(|old| &old.pages), &tables.pages);
        self.write(copy, offset_of!(TableCopy, ports), old.map(|old| &old.ports), &tables.ports);
        self.write(copy, offset_of!(TableCopy, decisions), old.map(|old| &old.decisions), &tables.decisions);
        let header = Header { generation, ..tables.header };
        self.tables.write(place(copy, offset_of!(TableCopy, header)), &[header]);
        self.shadows[copy as usize] = Some(Arc::clone(tables));
    }

    /// Writes what differs from what is there. Pieces that both share are not looked at.
    fn write<T: Pod + PartialEq>(&mut self, copy: u32, table: usize, old: Option<&Rows<T>>, new: &Rows<T>) {
        let differs = |(index, value): &(usize, &T)| old.and_then(|old| old.get(*index)) != Some(*value);
        for (index, value) in new.unshared(old).filter(differs) {
            self.tables.write(place(copy, table) + index * size_of::<T>(), std::slice::from_ref(value));
        }
    }

    fn put_in_force(&mut self, control: Control) -> Result<(), KernelError> {
        // Who reads the new word reads what was written before it.
        fence(Ordering::Release);
        self.control
            .set(0, control, 0)
            .map_err(|error| KernelError::with("failed to write `CONTROL`; the running policy is as it was", error))?;
        self.written = Some(control);
        Ok(())
    }

    fn read_header(&self, copy: u32) -> Header {
        self.tables.read(place(copy & 1, offset_of!(TableCopy, header)), 1)[0]
    }

    /// What the programs use now, as far as anything refers to it. Tables that contradict themselves are an error.
    pub(crate) fn read(&self) -> Result<Tables, KernelError> {
        let tables = self.read_as_it_is()?;
        tables.check().map_err(|error: TableError| {
            KernelError::with("the kernel's tables contradict themselves: restart `noded`", error)
        })?;
        Ok(tables)
    }

    /// Likewise, whatever it says. What refers beyond the end of a table is still there, and what it refers to is not.
    pub(crate) fn read_as_it_is(&self) -> Result<Tables, KernelError> {
        let copy = self.control()?.active & 1;
        let header = self.read_header(copy);
        let (blocks, paths) = self.read_tree(copy, &header);
        let leaf = entries(&header, &blocks, &paths).filter(|entry| entry & (BLOCK | PATH) == 0).max().unwrap_or(0);
        let leaves: Vec<Leaf> =
            self.read_table(copy, offset_of!(TableCopy, leaves), 0, leaf.saturating_add(1).min(limit::LEAVES));
        let cells = header.own.saturating_mul(header.classes).saturating_mul(2).min(limit::CELLS);
        let matrix: Vec<u32> = self.read_table(copy, offset_of!(TableCopy, matrix), 0, cells);
        let of_cells = |uniform: bool| {
            let words = matrix.iter().filter(move |word| (**word & UNIFORM != 0) == uniform);
            words.map(|word| (word & CELL_INDEX) + 1).max().unwrap_or(0)
        };
        let pages = of_cells(false).min(limit::PAGES);
        let pages: Vec<Page> = self.read_table(copy, offset_of!(TableCopy, pages), 0, pages);
        let runs = pages
            .iter()
            .flat_map(|page| page.tcp.iter().chain(&page.udp).chain([&page.icmp, &page.icmpv6, &page.protocol]));
        let runs = runs.max().map_or(0, |run| u32::from(*run) + 1);
        let ports: Vec<Ports> = self.read_table(copy, offset_of!(TableCopy, ports), 0, runs.min(limit::PORTS));
        let ranges = pages.iter().filter(|page| page.few.known != 0).flat_map(|page| &page.few.decisions);
        let decisions = ports.iter().flat_map(|ports| &ports.decisions).chain(ranges).max();
        let decisions = decisions.map_or(1, |one| u32::from(*one) + 1);
        let decisions = decisions.max(of_cells(true)).min(limit::DECISIONS);
        let decisions: Vec<Decision> = self.read_table(copy, offset_of!(TableCopy, decisions), 0, decisions);
        Ok(Tables {
            revision: Revision(header.revision),
            header,
            blocks: blocks.into(),
            paths: paths.into(),
            leaves: leaves.into(),
            matrix: matrix.into(),
            pages: pages.into(),
            ports: ports.into(),
            decisions: decisions.into(),
            rule_slots: policy::Map::new(),
        })
    }

    /// What was read so far says how much more there is.
    fn read_tree(&self, copy: u32, header: &Header) -> (Vec<Block>, Vec<TablePath>) {
        let (mut blocks, mut paths): (Vec<Block>, Vec<TablePath>) = (Vec::new(), Vec::new());
        loop {
            let (mut all_blocks, mut all_paths) = (0, 0);
            for entry in entries(header, &blocks, &paths) {
                if entry & BLOCK != 0 {
                    all_blocks = (block_of(entry).0 + 1).clamp(all_blocks, limit::BLOCKS);
                } else if entry & PATH != 0 {
                    all_paths = ((entry & INDEX) + 1).clamp(all_paths, limit::PATHS);
                }
            }
            let (had_blocks, had_paths) = (blocks.len() as u32, paths.len() as u32);
            if all_blocks <= had_blocks && all_paths <= had_paths {
                return (blocks, paths);
            }
            blocks.extend(self.read_table::<Block>(copy, offset_of!(TableCopy, blocks), had_blocks, all_blocks));
            paths.extend(self.read_table::<TablePath>(copy, offset_of!(TableCopy, paths), had_paths, all_paths));
        }
    }

    /// The entries from `first` on, `end` not included.
    fn read_table<T: Pod>(&self, copy: u32, table: usize, first: u32, end: u32) -> Vec<T> {
        let count = end.saturating_sub(first) as usize;
        self.tables.read(place(copy, table) + first as usize * size_of::<T>(), count)
    }
}

/// Where a table of a copy begins.
fn place(copy: u32, table: usize) -> usize {
    copy as usize * size_of::<TableCopy>() + table
}

/// All entries of a tree, of whatever kind.
fn entries<'a>(header: &Header, blocks: &'a [Block], paths: &'a [TablePath]) -> impl Iterator<Item = u32> + use<'a> {
    let of_blocks = blocks.iter().flat_map(|block| block.entries);
    let of_paths = paths.iter().flat_map(|path| [path.inside, path.outside]);
    [header.root_v4, header.root_v6].into_iter().chain(of_blocks).chain(of_paths)
}

#[cfg(test)]
mod tests;
