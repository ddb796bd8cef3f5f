//! The embedded object, and instances of its programs.

use std::path::Path;

use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use ebpf_common::{EARLY_PROGRAM, PROGRAM, global, map};

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin;

/// The programs of `cargo xtask bench`.
pub static BENCH_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench"));

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rampart"));

/// `TCX_NEXT`, and `TC_ACT_UNSPEC` under clsact: whatever runs after us decides on.
pub(crate) const NEXT: i32 = -1;

/// What tells one instance from another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instance<'a> {
    /// `EGRESS` or `INGRESS`.
    pub(crate) direction: u32,
    /// Report every packet through aya-log.
    pub(crate) trace: bool,
    /// Folder of the pinned tables.
    pub(crate) tables: &'a Path,
    /// Folder of the pinned counters, records and events.
    pub(crate) state: &'a Path,
    /// A probe: records and events for a handful of packets.
    pub(crate) small: bool,
    /// Report every packet as an event.
    pub(crate) every: bool,
}

/// Records that a probe has room for.
const PROBE_FLOWS: u32 = 64;
/// Datagrams in fragments that a probe has room for.
const PROBE_FRAGMENTS: u32 = 1_024;
/// Likewise for one that reports every packet, of which there are many between two looks at its records.
const REPORTED_FLOWS: u32 = 4_096;
/// Bytes of a probe's ring buffer: a page.
const PROBE_EVENT_BYTES: u32 = 4_096;

impl Instance<'_> {
    /// Loads the classifier; maps that are pinned are used, others made and pinned.
    pub(crate) fn load(&self) -> Result<Ebpf, KernelError> {
        let mut ebpf = self.open()?;
        classifier(&mut ebpf)?.load().map_err(|error| self.refused(error))?;
        Ok(ebpf)
    }

    /// Loads the early drop, likewise.
    pub(crate) fn load_early_drop(&self) -> Result<Ebpf, KernelError> {
        let mut ebpf = self.open()?;
        early_drop(&mut ebpf)?.load().map_err(|error| self.refused(error))?;
        Ok(ebpf)
    }

    fn refused(&self, error: ProgramError) -> KernelError {
        let name = pin::name(self.direction);
        KernelError::with(format!("the kernel's verifier refused the {name} program: this build is broken"), error)
    }

    /// Makes or opens the maps.
    fn open(&self) -> Result<Ebpf, KernelError> {
        let name = pin::name(self.direction);
        let (direction, trace, link_header) = (self.direction, u32::from(self.trace), 0u32);
        let every = u32::from(self.every);
        let mut loader = EbpfLoader::new();
        loader
            // The programs read no kernel structures: nothing to relocate.
            .btf(None)
            .override_global(global::DIRECTION, &direction, true)
            .override_global(global::TRACE, &trace, true)
            .override_global(global::EVERY, &every, true)
            .override_global(global::LINK_HEADER, &link_header, true)
            .override_global(global::ALLOW, &NEXT, true);
        for table in map::POLICY {
            loader.map_pin_path(table, self.tables.join(table));
        }
        for state in map::STATE {
            loader.map_pin_path(state, self.state.join(state));
        }
        if self.small {
            let flows = if self.every { REPORTED_FLOWS } else { PROBE_FLOWS };
            loader
                .map_max_entries(map::FLOWS, flows)
                .map_max_entries(map::FLOWS_OPENED, flows)
                .map_max_entries(map::FLOWS_GONE, flows)
                .map_max_entries(map::FRAGMENTS, PROBE_FRAGMENTS)
                .map_max_entries(map::EVENTS, PROBE_EVENT_BYTES);
        }
        loader.load(OBJECT).map_err(|error| {
            KernelError::with(
                format!("failed to create the maps of the {name} program: are CAP_BPF and CAP_NET_ADMIN there?"),
                error,
            )
        })
    }
}

/// The one for TC.
pub(crate) fn classifier(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, KernelError> {
    let program = ebpf.program_mut(PROGRAM);
    let program = program.ok_or_else(|| KernelError::new(format!("the embedded object has no program `{PROGRAM}`")))?;
    program.try_into().map_err(|error| KernelError::with(format!("`{PROGRAM}` is no classifier"), error))
}

/// The one for XDP.
pub(crate) fn early_drop(ebpf: &mut Ebpf) -> Result<&mut Xdp, KernelError> {
    let program = ebpf.program_mut(EARLY_PROGRAM);
    let program =
        program.ok_or_else(|| KernelError::new(format!("the embedded object has no program `{EARLY_PROGRAM}`")))?;
    program.try_into().map_err(|error| KernelError::with(format!("`{EARLY_PROGRAM}` is no XDP program"), error))
}

/// The kernel's id of an instance.
pub(crate) fn id(ebpf: &mut Ebpf) -> Result<u32, KernelError> {
    let info = classifier(ebpf)?.info();
    info.map(|info| info.id()).map_err(|error| KernelError::with("failed to ask for the program's id", error))
}
