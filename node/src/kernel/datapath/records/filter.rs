//! What is certainly in no record of a flow (`ebpf_common::flow::FlowFilter`), from userspace: filled anew now and then, so
//! that what is gone costs nothing any more.
//!
//! The half that the programs do not look at is cleared and filled from the records, then they look there. No record is
//! ever without its bit in the half that holds: whoever makes one sets its bit in both halves first; who did so before the
//! half was cleared has made the record when the grace period after that ends, and the records are read then.

use std::mem::offset_of;
use std::os::fd::AsFd;
use std::path::Path;

use ebpf_common::flow::{FILTER_UNKNOWN, FILTER_WORDS, Flow, FlowFilter, FlowKey};
use ebpf_common::map;

use crate::kernel::KernelError;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::open;
use crate::kernel::datapath::tables::mapping::Mapping;

/// The pinned filter.
pub(crate) struct Filter {
    mapping: Mapping,
}

/// A half that is cleared, and that the programs set bits in again.
pub(crate) struct Cleared {
    half: usize,
}

impl Filter {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let map = open(folder, map::FLOW_FILTER)?;
        let mapping = Mapping::of(map.fd().as_fd(), size_of::<FlowFilter>(), true)
            .map_err(|error| KernelError::with("failed to map `FLOW_FILTER` into memory", error))?;
        Ok(Self { mapping })
    }

    /// Puts the filter of maps that were just made in force, which nobody has used: no bit is set, and none is missing.
    pub(crate) fn begin(&mut self) {
        self.mapping.publish(offset_of!(FlowFilter, state), 1);
    }

    /// Says that there may be a record, before there is one.
    pub(crate) fn note(&mut self, key: &FlowKey) {
        for half in 0..2 {
            self.set(half, key);
        }
    }

    /// Whether no bit is missing of records that are there.
    pub(crate) fn covers(&self, records: &[(FlowKey, Flow)]) -> bool {
        let Some(half) = self.in_force() else { return true };
        let words: Vec<u64> = self.mapping.read(word_at(half, 0), FILTER_WORDS);
        records.iter().all(|(key, _)| words[(key.filter_bit() / 64) as usize] >> (key.filter_bit() % 64) & 1 != 0)
    }

    /// Has the programs ask the records.
    pub(crate) fn distrust(&mut self) {
        self.mapping.publish(offset_of!(FlowFilter, state), FILTER_UNKNOWN);
    }

    /// Whether the programs look at it.
    pub(crate) fn in_force(&self) -> Option<usize> {
        match self.mapping.read::<u64>(offset_of!(FlowFilter, state), 1)[0] {
            state @ 1..=2 => Some(state as usize - 1),
            _ => None,
        }
    }

    /// Makes ready to fill the other half: with records that are read after this.
    pub(crate) fn clear(&mut self) -> Result<Cleared, KernelError> {
        let half = self.in_force().map_or(0, |half| 1 - half);
        // Programs that began before the last change may still look there.
        wait()?;
        self.mapping.write(word_at(half, 0), &[0u64; FILTER_WORDS]);
        // And programs whose bit was cleared with the rest may still have to make the record.
        wait()?;
        Ok(Cleared { half })
    }

    /// Puts a half in force.
    pub(crate) fn fill(&mut self, Cleared { half }: Cleared, records: &[(FlowKey, Flow)]) {
        for (key, _) in records {
            self.set(half, key);
        }
        self.mapping.publish(offset_of!(FlowFilter, state), half as u64 + 1);
    }

    fn set(&mut self, half: usize, key: &FlowKey) {
        let bit = key.filter_bit();
        self.mapping.set(word_at(half, (bit / 64) as usize), 1 << (bit % 64));
    }
}

fn word_at(half: usize, word: usize) -> usize {
    offset_of!(FlowFilter, bits) + (half * FILTER_WORDS + word) * size_of::<u64>()
}

fn wait() -> Result<(), KernelError> {
    sys::wait_for_readers().map_err(|error| KernelError::with("failed to wait for an RCU grace period", error))
}
