//! What the kernel's verifier has to do for every program that a node loads.

use aya::EbpfLoader;
use aya::programs::{Program, ProgramError, ProgramInfo};
use ebpf_common::{EGRESS, INGRESS, global};

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin::name;

/// Every object that build.rs makes for nodes, by name.
static OBJECTS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/objects.rs"));

/// One program in one direction, as the verifier took it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Object, program and direction.
    pub name: String,
    pub outcome: Outcome,
}

/// What became of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Instructions processed, along every path that was followed.
    Accepted(u32),
    /// By a kernel before 5.16, which does not say how much work it was.
    AcceptedSilently,
    /// Why.
    Refused(String),
}

/// Loads every program of every object in each direction, with maps of its own, attaches nothing, and lets go of them.
///
/// # Errors
/// The kernel has no room for the maps.
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
                let outcome = match load(loaded) {
                    Ok(info) => info.verified_instruction_count().map_or(Outcome::AcceptedSilently, Outcome::Accepted),
                    Err(ProgramError::LoadError { io_error, verifier_log }) => {
                        Outcome::Refused(format!("{io_error}: {verifier_log}"))
                    }
                    Err(error) => Outcome::Refused(error.to_string()),
                };
                verified.push(Verified { name, outcome });
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
