//! The embedded object of the guard, and instances of its programs.

use std::path::Path;

use aya::programs::{ProgramError, ProgramInfo, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use ebpf_common::underlay::{LINK_HEADER, map, program};

use crate::kernel::KernelError;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/guard"));

/// Which of the two to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Tc,
    Xdp,
}

/// Loads a program; maps that are pinned are used, others made and pinned.
pub(crate) fn load(program: Program, link_header: u32, shared: &Path, own: &Path) -> Result<Ebpf, KernelError> {
    let mut loader = EbpfLoader::new();
    loader.btf(None).override_global(LINK_HEADER, &link_header, true);
    for name in map::SHARED {
        loader.map_pin_path(name, shared.join(name));
    }
    loader.map_pin_path(map::COUNTERS, own.join(map::COUNTERS));
    let mut ebpf = loader.load(OBJECT).map_err(|error| {
        KernelError::with("failed to create the guard's maps: are CAP_BPF and CAP_NET_ADMIN there?", error)
    })?;
    let loaded = match program {
        Program::Tc => classifier(&mut ebpf)?.load(),
        Program::Xdp => xdp(&mut ebpf)?.load(),
    };
    loaded
        .map_err(|error| KernelError::with("the kernel's verifier refused the guard: this build is broken", error))?;
    Ok(ebpf)
}

pub(crate) fn classifier(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, KernelError> {
    let found = ebpf.program_mut(program::TC).ok_or_else(|| missing(program::TC))?;
    found.try_into().map_err(|error| KernelError::with(format!("`{}` is no classifier", program::TC), error))
}

pub(crate) fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp, KernelError> {
    let found = ebpf.program_mut(program::XDP).ok_or_else(|| missing(program::XDP))?;
    found.try_into().map_err(|error| KernelError::with(format!("`{}` is no XDP program", program::XDP), error))
}

fn missing(name: &str) -> KernelError {
    KernelError::new(format!("the embedded object has no program `{name}`"))
}

/// The kernel's id of a loaded program.
pub(crate) fn id(info: Result<ProgramInfo, ProgramError>) -> Result<u32, KernelError> {
    info.map(|info| info.id()).map_err(|error| KernelError::with("failed to ask for the guard's id", error))
}
