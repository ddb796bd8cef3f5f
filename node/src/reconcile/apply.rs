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
    /// Reads back everything that a plan needs.
    pub fn observe(&mut self) -> Result<Observed, KernelError> {
        let link = self.link.observe()?;
        // Without a link of ours there is nothing to attach to and nothing to serve.
        if link.as_ref().is_none_or(|link| link.kind == LinkKind::Foreign) {
            return Ok(Observed { link, device: None, datapath: None });
        }
        // What cannot be read back is attached anew.
        let datapath = self.datapath.observe().ok();
        Ok(Observed { link, device: self.wireguard.observe()?, datapath })
    }
}

/// What came of a list of steps.
#[derive(Debug, Default)]
pub struct Outcome {
    pub done: Vec<Step>,
    pub failed: Vec<(Step, KernelError)>,
    /// Steps that were not tried because one before them failed.
    pub skipped: Vec<Step>,
    /// Of the switch, if there was one.
    pub generation: Option<Generation>,
}

impl Outcome {
    /// One line for people: what failed, and why.
    pub fn error(&self) -> Option<String> {
        let lines: Vec<_> =
            self.failed.iter().map(|(step, error)| format!("failed to {step}: {}", chain(error))).collect();
        if lines.is_empty() { None } else { Some(lines.join("; ")) }
    }
}

/// Takes the steps in their order. One that gates the others ([`Step::gates`]) and fails ends the round: the policy in
/// force stays in force, and the next round plans again from what is there. The steps after the switch each stand for
/// themselves: one peer that the kernel refuses does not keep the others out.
pub fn apply(kernel: &mut Kernel<'_>, key: &PrivateKey, tables: Option<&Tables>, steps: Vec<Step>) -> Outcome {
    let mut outcome = Outcome::default();
    let mut steps = steps.into_iter();
    for step in steps.by_ref() {
        match take(kernel, key, tables, &step) {
            Ok(generation) => {
                outcome.generation = generation.or(outcome.generation);
                outcome.done.push(step);
            }
            Err(error) => {
                let gates = step.gates();
                if step == Step::AttachDatapath {
                    // Nothing may pass a link without the datapath. (It may be down already, or gone.)
                    let _ = kernel.link.set_up(false);
                }
                outcome.failed.push((step, error));
                if gates {
                    break;
                }
            }
        }
    }
    outcome.skipped = steps.collect();
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
        Step::CreateLink => wireguard.create()?,
        Step::AttachDatapath => datapath.attach()?,
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
