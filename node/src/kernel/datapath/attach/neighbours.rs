//! Who else has a program on the interface.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use crate::kernel::datapath::EbpfDatapath;
use crate::kernel::datapath::attach::Hook;
use crate::kernel::datapath::attach::clsact;
use crate::kernel::datapath::attach::pin::{self, Pins};
use crate::kernel::datapath::sys;
use crate::kernel::program::{Attachment, Program};
use crate::kernel::{AttachMethod, KernelError};

impl EbpfDatapath {
    /// Every program on the interface, by place and in the order in which they run; none where there is no interface.
    pub(crate) fn list_programs(&self) -> Result<Vec<Program>, KernelError> {
        let Ok(index) = self.index() else { return Ok(Vec::new()) };
        let ours = self.own_programs()?;
        let mut programs = Vec::new();
        for (hook, attachment) in self.hooks(index).iter().zip([Attachment::Egress, Attachment::Ingress]) {
            for (number, (id, name)) in listed(hook)?.into_iter().enumerate() {
                let ours = id.is_some_and(|id| ours.contains(&id));
                programs.push(Program { attachment, position: number + 1, id, name, ours });
            }
        }
        let xdp = clsact::xdp_programs(index).map_err(|error| {
            KernelError::with(format!("failed to ask for XDP programs on `{}`", self.interface), error)
        })?;
        for (number, id) in xdp.into_iter().enumerate() {
            let (name, ours) = (name_of(id), ours.contains(&id));
            programs.push(Program { attachment: Attachment::Xdp, position: number + 1, id: Some(id), name, ours });
        }
        Ok(programs)
    }

    /// Those that run ahead of ours in a direction where ours is, but not first.
    pub(crate) fn ahead(&self) -> Result<Vec<Program>, KernelError> {
        let programs = self.list_programs()?;
        let ours = |at| programs.iter().find(|program| program.attachment == at && program.ours);
        let is_ahead = |program: &&Program| {
            program.attachment != Attachment::Xdp
                && ours(program.attachment).is_some_and(|ours| program.position < ours.position)
        };
        Ok(programs.iter().filter(is_ahead).cloned().collect())
    }

    /// Ids of what this process or an earlier one has loaded and pinned.
    fn own_programs(&self) -> Result<BTreeSet<u32>, KernelError> {
        let running = self.running.iter().flat_map(|running| [running.egress.id, running.ingress.id]);
        let mut ids: BTreeSet<u32> = running.chain(self.early_drop.program()).collect();
        let pins = Pins::new(&self.pin_root, &self.interface)?;
        for pin in pins.all_programs() {
            if let Ok(Some(fd)) = sys::object(&pin)
                && let Ok((id, _)) = sys::program(fd.as_fd())
            {
                ids.insert(id);
            }
        }
        Ok(ids)
    }
}

/// Id and name, as far as there are any.
type Named = (Option<u32>, Option<String>);

/// TCX programs run ahead of clsact's filters.
fn listed(hook: &Hook<'_>) -> Result<Vec<Named>, KernelError> {
    let tcx = hook.programs(AttachMethod::Tcx)?.into_iter().map(|id| (id, id.and_then(name_of)));
    let filters = clsact::filters(hook.index, hook.direction).map_err(|error| {
        let (direction, interface) = (pin::name(hook.direction), hook.interface);
        KernelError::with(format!("failed to ask which filters are at {direction} of `{interface}`"), error)
    })?;
    let named = |filter: &clsact::Filter| (filter.program(), Some(filter.name()).filter(|name| !name.is_empty()));
    Ok(tcx.chain(filters.iter().map(named)).collect())
}

/// Asking by id takes CAP_SYS_ADMIN; without it there is no name. The program may be gone by now.
fn name_of(id: u32) -> Option<String> {
    let fd = sys::program_by_id(id).ok()?;
    let (_, name) = sys::program(fd.as_fd()).ok()?;
    Some(name).filter(|name| !name.is_empty())
}
