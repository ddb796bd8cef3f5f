//! What the kernel's verifier has to do for every program that a node loads.

use aya::EbpfLoader;
use aya::programs::{Program, ProgramError, ProgramInfo};
use ebpf_common::{EGRESS, INGRESS, global};

use super::pin::name;
use crate::kernel::KernelError;

/// Every object that build.rs makes for nodes, by name.
static OBJECTS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/objects.rs"));

/// One program in one direction, as the verifier took it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Object, program and direction.
    pub name: String,
    /// Instructions processed, along every path that was followed. None: a kernel before 5.16 does not say.
    pub instructions: Option<u32>,
}

/// Loads every program of every object in each direction, with maps of its own, attaches nothing, and lets go of them.
///
/// # Errors
/// The verifier refuses one, or the kernel has no room for the maps.
pub fn verified() -> Result<Vec<Verified>, KernelError> {
    let mut verified = Vec::new();
    for (object, bytes) in OBJECTS {
        for direction in [EGRESS, INGRESS] {
            let mut loader = EbpfLoader::new();
            // Not every object has it.
            loader.btf(None).override_global(global::DIRECTION, &direction, false);
            let mut ebpf = loader.load(bytes).map_err(|error| {
                KernelError::with(format!("failed to create the maps of the object `{object}`"), error)
            })?;
            for (program, loaded) in ebpf.programs_mut() {
                let name = format!("{object} {program} {}", name(direction));
                let info = load(loaded).map_err(|error| {
                    KernelError::with(format!("the kernel's verifier refused `{name}`: this build is broken"), error)
                })?;
                verified.push(Verified { name, instructions: info.verified_instruction_count() });
            }
        }
    }
    verified.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(verified)
}

fn load(program: &mut Program) -> Result<ProgramInfo, ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load().and_then(|()| program.info()),
        Program::Xdp(program) => program.load().and_then(|()| program.info()),
        // A kind that nodes load is loaded above.
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}
