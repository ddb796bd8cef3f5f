//! Where the programs hang: TCX, or clsact before 6.6. What differs between the two is here and in `clsact`.

pub(crate) mod clsact;
pub(crate) mod early_drop;
mod neighbours;
pub(crate) mod pin;
pub(crate) mod pinned;
pub(crate) mod xdp;

use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier};
use ebpf_common::{PROGRAM, underlay};
use std::os::fd::AsFd;

use crate::kernel::datapath::sys;
use crate::kernel::{AttachMethod, KernelError};

/// One direction of one interface, and whose program is meant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook<'a> {
    pub(crate) interface: &'a str,
    pub(crate) index: u32,
    pub(crate) direction: u32,
    pub(crate) owner: &'static Owner,
}

/// What tells our programs from each other and from those of others.
#[derive(Debug)]
pub(crate) struct Owner {
    /// For errors.
    pub(crate) what: &'static str,
    /// The program's name, which is that of its filter.
    pub(crate) program: &'static str,
    /// Of its filters. The second is used while the first has somebody ahead of it: a new filter goes to the head of its
    /// preference.
    pub(crate) handles: [TcHandle; 2],
    /// Whether somebody ahead of it is to be put behind it again.
    pub(crate) insists: bool,
}

/// On the interface that we made we decide first.
pub(crate) static POLICY: Owner = Owner {
    what: "the policy",
    program: PROGRAM,
    handles: [TcHandle::new(0, 0x7270), TcHandle::new(0, 0x7271)],
    insists: true,
};

/// On an interface of others we begin first, and whoever goes ahead then has a reason to.
pub(crate) static GUARD: Owner = Owner {
    what: "the guard",
    program: underlay::program::TC,
    handles: [TcHandle::new(0, 0x7272), TcHandle::new(0, 0x7273)],
    insists: false,
};

impl Owner {
    /// Whether a program that is among these is where it should be.
    fn is_in_order(&self, programs: &[Option<u32>], program: u32) -> bool {
        match self.insists {
            true => programs.first() == Some(&Some(program)),
            false => programs.contains(&Some(program)),
        }
    }
}

/// What keeps a program where it is while the agent lives; the pin does when it does not.
#[derive(Debug)]
pub(crate) enum Attached {
    /// Held, so that a pin that somebody removes does not take enforcement with it.
    Tcx {
        _link: FdLink,
        id: u32,
    },
    Clsact,
}

impl Attached {
    /// Whether the attachment would survive the agent.
    pub(crate) fn is_pinned(&self, pin: &Path) -> bool {
        match self {
            Self::Tcx { id, .. } => pinned(pin).is_some_and(|link| link.id == *id),
            Self::Clsact => true,
        }
    }
}

impl Hook<'_> {
    /// Puts the program first, without a packet in between that neither it nor its predecessor sees. `method` is what
    /// worked before; without one TCX is tried first. `inherited` are pins of links that other versions left.
    pub(crate) fn attach(
        &self,
        program: &mut SchedClassifier,
        pin: &Path,
        inherited: &[PathBuf],
        method: &mut Option<AttachMethod>,
    ) -> Result<Attached, KernelError> {
        if method.is_none_or(|method| method == AttachMethod::Tcx) {
            match self.attach_tcx(program, pin, inherited) {
                Ok(attached) => {
                    *method = Some(AttachMethod::Tcx);
                    return Ok(attached);
                }
                // Before 6.6 the kernel knows no such attach type.
                Err(TcxError::Program(ProgramError::SyscallError(error)))
                    if method.is_none() && error.io_error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(TcxError::Program(error)) => return Err(self.failed(error)),
                Err(TcxError::Link(error)) => return Err(self.failed(error)),
                Err(TcxError::Kernel(error)) => return Err(error),
            }
        }
        clsact::attach(program, self).map_err(|error| self.failed(error))?;
        *method = Some(AttachMethod::Clsact);
        Ok(Attached::Clsact)
    }

    fn attach_tcx(
        &self,
        program: &mut SchedClassifier,
        pin: &Path,
        inherited: &[PathBuf],
    ) -> Result<Attached, TcxError> {
        // One pointer in the kernel: every packet runs the old program or the new one.
        if let Some(link) = self.link_to_take_over(pin)? {
            let id = program.attach_to_link(link)?;
            return held(FdLink::try_from(program.take_link(id)?)?);
        }
        let mut taken_over = None;
        for pin in inherited {
            if let Some(link) = self.link_to_take_over(pin)? {
                taken_over = Some(program.attach_to_link(link)?);
                break;
            }
        }
        let id = match taken_over {
            Some(id) => id,
            None => {
                // Ahead of whatever is there, our earlier self included, which goes when its pin is replaced.
                let options = TcAttachOptions::TcxOrder(LinkOrder::first());
                program.attach_with_options(self.interface, clsact::attach_type(self.direction), options)?
            }
        };
        let link = FdLink::try_from(program.take_link(id)?)?;
        let mut pinned = None;
        pin::replace(pin, |path| link.pin(path).map(|link| pinned = Some(link)))?;
        let link = pinned.ok_or_else(|| KernelError::new("the link was not pinned"))?;
        held(link.into())
    }

    /// Our pinned link, if it still holds this interface and its program runs where it should there.
    fn link_to_take_over(&self, pin: &Path) -> Result<Option<SchedClassifierLink>, TcxError> {
        let Some(link) = pinned(pin).filter(|link| link.is_at(self.index, self.direction)) else { return Ok(None) };
        if !self.owner.is_in_order(&self.programs(AttachMethod::Tcx)?, link.program) {
            return Ok(None);
        }
        Ok(Some(FdLink::from(PinnedLink::from_pin(pin)?).try_into()?))
    }

    /// Ids of the programs in the order in which they run; `None`: a filter that is no program.
    pub(crate) fn programs(&self, attachment: AttachMethod) -> Result<Vec<Option<u32>>, KernelError> {
        let programs = match attachment {
            AttachMethod::Tcx => sys::tcx_programs(self.index, self.direction)
                .map(|programs| programs.unwrap_or_default().into_iter().map(Some).collect()),
            AttachMethod::Clsact => clsact::filters(self.index, self.direction)
                .map(|filters| filters.iter().map(clsact::Filter::program).collect()),
        };
        programs.map_err(|error| {
            let (direction, interface) = (pin::name(self.direction), self.interface);
            KernelError::with(format!("failed to ask which programs are at {direction} of `{interface}`"), error)
        })
    }

    /// Whether a program is attached and runs where it should.
    pub(crate) fn has(&self, attachment: AttachMethod, program: u32) -> Result<bool, KernelError> {
        Ok(self.owner.is_in_order(&self.programs(attachment)?, program))
    }

    /// Takes off what is ours of either kind, but for the kind that is to stay.
    pub(crate) fn detach(&self, pin: &Path, keep: Option<AttachMethod>) -> Result<(), KernelError> {
        if keep != Some(AttachMethod::Tcx) {
            pin::remove_file(pin)?;
        }
        if keep != Some(AttachMethod::Clsact) {
            clsact::detach(self).map_err(|error| {
                let (direction, interface) = (pin::name(self.direction), self.interface);
                KernelError::with(format!("failed to take the filter off {direction} of `{interface}`"), error)
            })?;
        }
        Ok(())
    }

    fn failed(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> KernelError {
        let (direction, interface) = (pin::name(self.direction), self.interface);
        KernelError::with(format!("failed to attach {} to {direction} of `{interface}`", self.owner.what), error)
    }
}

/// What is pinned at a path, if it is a TCX link.
fn pinned(pin: &Path) -> Option<sys::TcxLink> {
    let fd = sys::object(pin).ok()??;
    sys::tcx_link(fd.as_fd()).ok()?
}

fn held(link: FdLink) -> Result<Attached, TcxError> {
    let id = link.info()?.id();
    Ok(Attached::Tcx { _link: link, id })
}

/// Kept apart until it is known whether the kernel has TCX at all.
enum TcxError {
    Program(ProgramError),
    Link(LinkError),
    Kernel(KernelError),
}

impl From<ProgramError> for TcxError {
    fn from(error: ProgramError) -> Self {
        Self::Program(error)
    }
}

impl From<LinkError> for TcxError {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl From<KernelError> for TcxError {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}
