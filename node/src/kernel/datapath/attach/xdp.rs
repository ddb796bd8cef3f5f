//! Programs at XDP: in a driver, or generic where an interface has nothing better. One link for each interface, whose program
//! is replaced at once.

use std::os::fd::AsFd;
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{ProgramError, Xdp};

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin;
use crate::kernel::datapath::sys;

/// A link, held and pinned.
#[derive(Debug)]
pub(crate) struct HeldXdp {
    _link: FdLink,
    id: u32,
}

impl HeldXdp {
    /// Whether the link still holds this program and would without this process.
    pub(crate) fn is_there(&self, pin: &Path, interface: u32, program: u32) -> bool {
        pinned(pin) == Some(sys::XdpLink { id: self.id, program, interface })
    }
}

/// Attaches the program, or puts it in the place of the one that is pinned.
pub(crate) fn attach(program: &mut Xdp, interface: u32, mode: XdpMode, pin: &Path) -> Result<HeldXdp, KernelError> {
    if pinned(pin).is_some_and(|link| link.interface == interface) {
        let link = PinnedLink::from_pin(pin).map_err(failed)?;
        let link = XdpLink::try_from(FdLink::from(link)).map_err(failed)?;
        let id = program.attach_to_link(link).map_err(failed)?;
        return held(program.take_link(id).map_err(failed)?);
    }
    // A link whose interface is gone.
    pin::remove_file(pin)?;
    let id = program.attach_to_if_index(interface, mode).map_err(refused)?;
    let link = FdLink::try_from(program.take_link(id).map_err(failed)?).map_err(failed)?;
    let mut pinned = None;
    pin::replace(pin, |path| link.pin(path).map(|link| pinned = Some(link)))?;
    let link = pinned.ok_or_else(|| KernelError::new("the link was not pinned"))?;
    held(XdpLink::try_from(FdLink::from(link)).map_err(failed)?)
}

fn held(link: XdpLink) -> Result<HeldXdp, KernelError> {
    let link = FdLink::try_from(link).map_err(failed)?;
    let id = link.info().map_err(failed)?.id();
    Ok(HeldXdp { _link: link, id })
}

/// What is pinned at a path, if it is an XDP link.
fn pinned(pin: &Path) -> Option<sys::XdpLink> {
    let fd = sys::object(pin).ok()??;
    sys::xdp_link(fd.as_fd()).ok()?
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> KernelError {
    KernelError::with("failed to attach to XDP", error)
}

/// What the usual refusals mean.
fn refused(error: ProgramError) -> KernelError {
    let code = match &error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    match code {
        Some(libc::EOPNOTSUPP) => KernelError::new("the driver has none"),
        Some(libc::EBUSY | libc::EEXIST) => KernelError::new("another XDP program is there"),
        Some(libc::ERANGE) => KernelError::new("the MTU is too large for it"),
        _ => failed(error),
    }
}
