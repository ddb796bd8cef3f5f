//! One look at the kernel, and what follows from it.

use host::error::chain;

use super::intent::desired;
use super::reconcile::{Desired, Kernel, Observed, Outcome, Step, apply, plan};
use super::{Enforcer, guard};
use crate::kernel::Device;

impl Enforcer {
    /// One look at the kernel, and what follows from it.
    pub fn round(&mut self) {
        let device = self.look();
        // Last, and off the path of a change: it protects the node from being kept busy, and decides about nothing.
        let peers = self.peers();
        let repaired = self.guard.round(self.listen_port, self.key.public(), device.as_ref(), peers.values());
        if repaired > 0 {
            *self.repairs.entry(guard::REPAIR).or_default() += repaired;
        }
    }

    /// Returns the device as it was before.
    fn look(&mut self) -> Option<Device> {
        self.rounds += 1;
        self.is_guard_behind = false;
        let settled = self.intent.as_ref().is_none_or(|intent| intent.settled);
        let (outcome, device) = match self.kernel().observe() {
            Ok(mut observed) => {
                if !self.attached {
                    // What another process attached is taken over by attaching.
                    observed.datapath = None;
                }
                (self.reconcile(&observed), observed.device)
            }
            Err(error) => {
                self.conclude(Some(chain(&error)), settled);
                return None;
            }
        };
        let first = self.rounds == 1;
        for step in &outcome.done {
            if !settled || first {
                tracing::debug!(%step, "done");
            } else {
                *self.repairs.entry(step.kind()).or_default() += 1;
                tracing::warn!(%step, kind = step.kind(), "drift repaired");
            }
        }
        self.switched |= outcome.generation.is_some();
        self.note(&outcome);
        self.conclude(outcome.error(), settled);
        device
    }

    fn reconcile(&mut self, observed: &Observed) -> Outcome {
        let desired = self.desired(observed);
        let steps = plan(desired.as_ref(), observed);
        let outcome = self.apply(steps);
        Outcome { unseen: observed.unseen.clone(), ..outcome }
    }

    /// Takes steps towards the intent.
    pub(super) fn apply(&mut self, steps: Vec<Step>) -> Outcome {
        let mut kernel =
            Kernel { wireguard: &mut *self.wireguard, link: &mut *self.link, datapath: &mut *self.datapath };
        apply(&mut kernel, &self.key, self.intent.as_ref().map(|intent| &intent.tables), steps)
    }

    fn desired(&mut self, observed: &Observed) -> Option<Desired> {
        let intent = self.intent.as_ref()?;
        let generation = observed.datapath.as_ref().map(|datapath| datapath.generation);
        let mut desired = desired(&intent.slice, self.key.public(), self.persistent_keepalive);
        desired.listen_port = self.listen_port;
        desired.mtu = self.mtu;
        desired.reload = self.tables_wrong || intent.generation.is_none() || intent.generation != generation;
        desired.fresh_endpoints.clone_from(&intent.fresh_endpoints);
        desired.changed_holder.clone_from(&intent.changed_holder);
        Some(desired)
    }

    /// Remembers what steps have brought about.
    pub(super) fn note(&mut self, outcome: &Outcome) {
        self.attached |= outcome.done.contains(&Step::AttachDatapath);
        self.tables_wrong &= outcome.generation.is_none();
        let Some(intent) = &mut self.intent else { return };
        intent.generation = outcome.generation.or(intent.generation);
        for step in &outcome.done {
            match step {
                Step::ForgetFlows(_) => intent.changed_holder.clear(),
                Step::SetPeer(peer) => drop(intent.fresh_endpoints.remove(&peer.public_key)),
                _ => {}
            }
        }
        if outcome.is_complete() {
            // A peer that has the endpoint already needed no step.
            intent.fresh_endpoints.clear();
        }
        intent.settled = outcome.is_complete();
        if self.switched {
            self.release_slots();
        }
    }
}
