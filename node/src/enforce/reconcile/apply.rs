//! Carries steps out, one after the other.

use policy::Generation;

use super::plan::{Observed, Step};
use crate::kernel::{Datapath, KernelError, Link, LinkKind, WireGuard};
use crate::key::PrivateKey;
use crate::lower::Tables;

/// The three halves of the interface.
pub struct Kernel<'a> {
    pub wireguard: &'a mut dyn WireGuard,
    pub link: &'a mut dyn Link,
    pub datapath: &'a mut dyn Datapath,
}

impl std::fmt::Debug for Kernel<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").finish_non_exhaustive()
    }
}

impl Kernel<'_> {
    /// Reads back what a plan needs. Where the link or the device cannot be read, the datapath still is.
    pub fn observe(&mut self) -> Result<Observed, KernelError> {
        // What cannot be read back is attached anew.
        let datapath = |kernel: &mut Self| kernel.datapath.observe().ok();
        let seen = self.link.observe().and_then(|link| Ok((link, self.link.barriers()?)));
        let (link, barriers) = match seen {
            Ok(seen) => seen,
            Err(error) => {
                // What has our programs is our link.
                let datapath = datapath(self).filter(|datapath| datapath.egress && datapath.ingress);
                let unseen = Some(chain(&error));
                return datapath.ok_or(error).map(|datapath| Observed {
                    unseen,
                    datapath: Some(datapath),
                    ..Observed::default()
                });
            }
        };
        // Without a link of ours there is nothing to attach to and nothing to serve.
        if link.as_ref().is_none_or(|link| link.kind == LinkKind::Foreign) {
            return Ok(Observed { link, barriers, ..Observed::default() });
        }
        let (device, unseen) = match self.wireguard.observe() {
            Ok(device) => (device, None),
            Err(error) => (None, Some(chain(&error))),
        };
        Ok(Observed { link, device, unseen, datapath: datapath(self), barriers })
    }
}

/// What came of a list of steps.
#[derive(Debug, Default)]
pub struct Outcome {
    pub done: Vec<Step>,
    pub failed: Vec<(Step, KernelError)>,
    /// Steps that were not tried because one before them failed.
    pub skipped: Vec<Step>,
    /// What could not be read, so that no step was planned about it, and why.
    pub unseen: Option<String>,
    /// Of the switch, if there was one.
    pub generation: Option<Generation>,
}

impl Outcome {
    /// Whether nothing is left to do.
    pub fn is_complete(&self) -> bool {
        self.failed.is_empty() && self.unseen.is_none()
    }

    /// One line for people: what failed, and why.
    pub fn error(&self) -> Option<String> {
        let failed = self.failed.iter().map(|(step, error)| format!("failed to {step}: {}", chain(error)));
        let lines: Vec<_> = self.unseen.iter().cloned().chain(failed).collect();
        if lines.is_empty() { None } else { Some(lines.join("; ")) }
    }
}

/// Takes the steps in their order, but for those that wait for one that failed ([`Step::waits_for`]); the next round plans
/// again from what is there.
pub fn apply(kernel: &mut Kernel<'_>, key: &PrivateKey, tables: Option<&Tables>, steps: Vec<Step>) -> Outcome {
    let mut outcome = Outcome::default();
    for step in steps {
        if outcome.failed.iter().any(|(failed, _)| step.waits_for(failed)) {
            outcome.skipped.push(step);
            continue;
        }
        match take(kernel, key, tables, &step) {
            Ok(generation) => {
                outcome.generation = generation.or(outcome.generation);
                outcome.done.push(step);
            }
            Err(error) => {
                if matches!(step, Step::AttachDatapath | Step::Overtake(_)) {
                    // Nothing may pass a link without the datapath. (It may be down already, or gone.)
                    let _ = kernel.link.set_up(false);
                }
                outcome.failed.push((step, error));
            }
        }
    }
    outcome
}

fn take(
    kernel: &mut Kernel<'_>,
    key: &PrivateKey,
    tables: Option<&Tables>,
    step: &Step,
) -> Result<Option<Generation>, KernelError> {
    let Kernel { wireguard, link, datapath } = kernel;
    match step {
        Step::AddBarrier(prefix) => link.add_barrier(*prefix)?,
        Step::RemoveBarrier(prefix) => link.remove_barrier(*prefix)?,
        Step::CreateLink => wireguard.create()?,
        Step::AttachDatapath | Step::Overtake(_) => datapath.attach()?,
        Step::ServeWireGuard => wireguard.serve()?,
        Step::SetDevice { listen_port } => wireguard.set_device(key, *listen_port)?,
        Step::SetMtu(mtu) => link.set_mtu(*mtu)?,
        Step::RemovePeer(peer) => wireguard.remove_peer(peer)?,
        Step::NarrowPeer(peer) | Step::SetPeer(peer) => wireguard.set_peer(peer)?,
        Step::RemoveRoute(prefix) => link.remove_route(*prefix)?,
        Step::RemoveAddress(address) => link.remove_address(*address)?,
        Step::SwitchTables(revision) => {
            let tables = tables.filter(|tables| tables.revision == *revision);
            let tables =
                tables.ok_or_else(|| KernelError::new(format!("there are no tables of revision {revision}")))?;
            return datapath.switch(tables).map(Some);
        }
        Step::ForgetFlows(addresses) => drop(datapath.forget_flows(addresses)?),
        Step::AddAddress(address) => link.add_address(*address)?,
        Step::SetUp => link.set_up(true)?,
        Step::AddRoute(prefix) => link.add_route(*prefix)?,
    }
    Ok(None)
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
