//! The program that whoever was here before had attached, found by its pin.

use aya::programs::SchedClassifier;

use crate::kernel::datapath::attach::Hook;
use crate::kernel::datapath::attach::pin::Pins;
use crate::kernel::{AttachMethod, KernelError};

/// Id of the program that whoever was here before had attached.
pub(crate) fn pinned_program(pins: &Pins, direction: u32) -> Option<u32> {
    Some(SchedClassifier::from_pin(pins.program(direction)).ok()?.info().ok()?.id())
}

pub(crate) fn is_pinned_first(hook: &Hook<'_>, pins: &Pins) -> Result<bool, KernelError> {
    let Some(program) = pinned_program(pins, hook.direction) else { return Ok(false) };
    Ok(hook.has(AttachMethod::Tcx, program)? || hook.has(AttachMethod::Clsact, program)?)
}

/// Whether an earlier process's program is attached in some direction, wherever among others.
pub(crate) fn is_enforced(hooks: &[Hook<'_>; 2], pins: &Pins) -> Result<bool, KernelError> {
    for hook in hooks {
        let Some(program) = pinned_program(pins, hook.direction) else { continue };
        for attachment in [AttachMethod::Tcx, AttachMethod::Clsact] {
            if hook.programs(attachment)?.contains(&Some(program)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
