//! The early drop: the verdict at XDP for what neither a rule nor a record could let in, where it is asked for. It reads and
//! drops; what it lets pass is judged by the classifier, so that a node without it enforces the same.
//!
//! Generic XDP, since a WireGuard interface has no driver's: it takes the interface its GRO (docs/POLICY.md tells when it is
//! worth that).

use aya::Ebpf;
use aya::programs::xdp::XdpMode;
use ebpf_common::INGRESS;

use crate::kernel::datapath::attach::pin::{self, Pins};
use crate::kernel::datapath::attach::xdp::{self, HeldXdp};
use crate::kernel::datapath::program::{Instance, early_drop};
use crate::kernel::{EarlyDrop, KernelError};
use host::error::chain;

/// What was asked for, and what came of it.
#[derive(Default)]
pub(crate) struct EarlyDropProgram {
    pub(crate) wanted: bool,
    loaded: Option<Loaded>,
    /// Why it is not there.
    error: Option<String>,
}

struct Loaded {
    _ebpf: Ebpf,
    interface: u32,
    id: u32,
    held: HeldXdp,
}

impl EarlyDropProgram {
    /// Attaches it or takes it off, whichever was asked for. That it cannot be had is said, and no reason to do without the
    /// rest.
    pub(crate) fn keep(&mut self, pins: &Pins, interface: u32) -> Result<(), KernelError> {
        if !self.wanted {
            return self.remove(pins);
        }
        if self.is_there(pins) {
            return Ok(());
        }
        match attach(pins, interface) {
            Ok(loaded) => (self.loaded, self.error) = (Some(loaded), None),
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(error, "early drop is not attached; the policy is enforced without it");
                (self.loaded, self.error) = (None, Some(error));
            }
        }
        Ok(())
    }

    pub(crate) fn remove(&mut self, pins: &Pins) -> Result<(), KernelError> {
        (self.loaded, self.error) = (None, None);
        pin::remove_file(&pins.early_link())
    }

    fn is_there(&self, pins: &Pins) -> bool {
        self.loaded.as_ref().is_some_and(|loaded| loaded.held.is_there(&pins.early_link(), loaded.interface, loaded.id))
    }

    /// Whether there is nothing to do: it is where it should be, or was refused.
    pub(crate) fn is_settled(&self, pins: &Pins) -> bool {
        !self.wanted || self.error.is_some() || self.is_there(pins)
    }

    /// Id of the program that this process has attached.
    pub(crate) fn program(&self) -> Option<u32> {
        self.loaded.as_ref().map(|loaded| loaded.id)
    }

    pub(crate) fn state(&self) -> EarlyDrop {
        match (&self.error, self.wanted) {
            (_, false) => EarlyDrop::Off,
            (None, true) => EarlyDrop::On,
            (Some(error), true) => EarlyDrop::Failed(error.clone()),
        }
    }
}

fn attach(pins: &Pins, interface: u32) -> Result<Loaded, KernelError> {
    let (tables, state) = (&*pins.maps, &*pins.maps);
    let mut ebpf =
        Instance { direction: INGRESS, trace: false, tables, state, small: false, every: false }.load_early_drop()?;
    let program = early_drop(&mut ebpf)?;
    let id = program.info().map_err(|error| KernelError::with("failed to ask for the program's id", error))?.id();
    let held = xdp::attach(program, interface, XdpMode::Skb, &pins.early_link())?;
    Ok(Loaded { _ebpf: ebpf, interface, id, held })
}
