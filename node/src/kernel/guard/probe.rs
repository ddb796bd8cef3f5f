//! The guard's programs with maps of their own and no interface, fed by hand.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::Ebpf;
use aya::programs::{TestRun, TestRunOptions, TestRunResult};
use ebpf_common::underlay::{ETHERNET, Event, reason};

use super::load::{self, Program};
use super::maps::{Counters, Shared};
use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin::create_folder;
use crate::kernel::datapath::events::Events;
use crate::kernel::guard::{Mode, Wanted};

/// Where the kernel's test run takes the lengths of joined datagrams from: in `__sk_buff`.
const GSO_SEGMENTS: usize = 164;
const GSO_SIZE: usize = 176;
/// Bytes of `__sk_buff` up to there.
const CONTEXT: usize = 184;

/// A program that judges frames handed to it.
pub struct GuardProbe {
    ebpf: Ebpf,
    mode: Mode,
    shared: Shared,
    counters: Counters,
    before: BTreeMap<u8, u64>,
    folder: PathBuf,
}

impl std::fmt::Debug for GuardProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuardProbe").field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl GuardProbe {
    /// `folder` lies in a BPF file system and is not there yet.
    pub fn load(mode: Mode, ethernet: bool, folder: &Path) -> Result<Self, KernelError> {
        create_folder(folder)?;
        let program = match mode {
            Mode::Tc => Program::Tc,
            Mode::Xdp => Program::Xdp,
        };
        let ebpf = load::load(program, if ethernet { ETHERNET } else { 0 }, folder, folder)?;
        let (shared, counters) = (Shared::open(folder)?, Counters::open(folder)?);
        Ok(Self { ebpf, mode, shared, counters, before: BTreeMap::new(), folder: folder.to_owned() })
    }

    /// Of what is wanted, the place and the hook do not matter here.
    pub fn configure(&mut self, wanted: &Wanted, addresses: &[IpAddr]) -> Result<(), KernelError> {
        self.shared.write(wanted, &addresses.iter().copied().collect())
    }

    /// The reason that the program counts a frame under; `None`: it is none of its business, and passes.
    ///
    /// # Errors
    /// The kernel does not take the frame, or verdict and counters contradict each other.
    pub fn judge(&mut self, frame: &[u8]) -> Result<Option<u8>, KernelError> {
        self.judge_joined(frame, 0)
    }

    /// Likewise, of datagrams of `size` bytes that the kernel has joined; 0: it has not.
    pub fn judge_joined(&mut self, frame: &[u8], size: u32) -> Result<Option<u8>, KernelError> {
        let result = self.run(frame, size, 1)?;
        let passes = result.return_value == self.pass_value();
        let moved = self.moved()?;
        match moved[..] {
            [] if passes => Ok(None),
            [(reason, 1)] if passes == reason::passes(reason) => Ok(Some(reason)),
            _ => Err(KernelError::new(format!("returned {} and counted {moved:?}", result.return_value as i32))),
        }
    }

    /// How long one run takes, over `repeat` of them.
    pub fn time(&mut self, frame: &[u8], repeat: u32) -> Result<Duration, KernelError> {
        let result = self.run(frame, 0, repeat)?;
        self.moved()?;
        Ok(result.duration)
    }

    /// The one reader of what it reports.
    pub fn events(&self) -> Result<Events<Event>, KernelError> {
        Events::open_guard_in(&self.folder)
    }

    fn run(&mut self, frame: &[u8], size: u32, repeat: u32) -> Result<TestRunResult, KernelError> {
        let mut context = [0u8; CONTEXT];
        context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
        context[GSO_SEGMENTS..GSO_SEGMENTS + 4].copy_from_slice(&u32::from(size != 0).to_ne_bytes());
        let mut options = TestRunOptions { data_in: Some(frame), repeat, ..TestRunOptions::default() };
        let result = match self.mode {
            Mode::Tc => {
                options.ctx_in = Some(&context);
                load::classifier(&mut self.ebpf)?.test_run(options)
            }
            Mode::Xdp => load::xdp(&mut self.ebpf)?.test_run(options),
        };
        result.map_err(|error| KernelError::with(format!("failed to run the guard on {} bytes", frame.len()), error))
    }

    fn pass_value(&self) -> u32 {
        const XDP_PASS: u32 = 2;
        match self.mode {
            Mode::Tc => crate::kernel::datapath::program::NEXT as u32,
            Mode::Xdp => XDP_PASS,
        }
    }

    /// Counters that are not what they were.
    fn moved(&mut self) -> Result<Vec<(u8, u64)>, KernelError> {
        let mut moved = Vec::new();
        for (reason, counter) in self.counters.read()? {
            let before = self.before.insert(reason, counter.packets).unwrap_or(0);
            if counter.packets != before {
                moved.push((reason, counter.packets - before));
            }
        }
        Ok(moved)
    }
}

impl Drop for GuardProbe {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
