//! What follows from what was done: the state on disk, counters of rules that went, and who hears of it.

use std::sync::Arc;

use host::error::chain;
use host::file::FileError;

use super::{Enforcer, Named, Names};
use crate::difference::differing_keys;
use crate::uplink::follow::Enforced;
use crate::uplink::state::State;

impl Enforcer {
    /// Tells everybody how it stands; a new policy is on disk before it is acknowledged.
    pub(super) fn conclude(&mut self, mut error: Option<String>, was_settled: bool) {
        let switched = std::mem::take(&mut self.switched);
        self.unsaved |= switched;
        if self.unsaved && self.intent.as_ref().is_some_and(|intent| intent.generation.is_some()) {
            let stored = self.store();
            self.unsaved = stored.is_err();
            let failed = stored.err().map(|failed| chain(&failed));
            let failed = failed.map(|text| format!("enforced, but the last good state cannot be kept: {text}"));
            error = error.or(failed);
        }
        if let Some(error) = error.as_ref().filter(|error| self.error.as_ref() != Some(error)) {
            if self.attached {
                tracing::warn!(error, "not everything could be done; trying again");
            } else {
                // At the start it is for the agent to say, and to end.
                tracing::debug!(error, "nothing is attached yet");
            }
        } else if error.is_none() && self.error.is_some() {
            tracing::info!("everything is done now");
        }
        let changed = error != self.error;
        self.error.clone_from(&error);
        let Some(intent) = &self.intent else { return };
        let report = Enforced {
            revision: intent.slice.revision,
            generation: intent.generation.unwrap_or_else(|| self.enforced.borrow().generation),
            error,
            lacks: self.lacks.clone(),
        };
        if switched {
            self.name();
            tracing::info!(revision = %report.revision, generation = %report.generation, "policy in force");
        }
        if switched || changed || !was_settled {
            self.enforced.send_replace(report);
        }
    }

    fn store(&mut self) -> Result<(), FileError> {
        let Some(slice) = self.received.clone() else { return Ok(()) };
        self.time = self.time.max(host::clock::now());
        let time = self.time;
        let state = State { slice, slots: self.slots.clone(), holders: self.holders.clone(), time };
        self.journal.keep(&state)
    }

    /// Tells those who read events what the numbers in them mean now.
    fn name(&mut self) {
        let Some(intent) = &self.intent else { return };
        let (slots, rules) = (&intent.tables.rule_slots, &intent.slice.rules);
        let mut names = Names { cidrs: intent.slice.cidrs.clone(), ..Names::clone(&self.names.borrow()) };
        let mut touched = differing_keys(&self.named.slots, slots);
        touched.extend(differing_keys(&self.named.rules, rules));
        for slot in touched.iter().filter_map(|rule| self.named.slots.get(rule)) {
            names.rules.remove(slot);
        }
        for rule in &touched {
            if let (Some(slot), Some(named)) = (slots.get(rule), rules.get(rule)) {
                names.rules.insert(*slot, named.name.clone());
            }
        }
        self.named = Named { slots: slots.clone(), rules: rules.clone() };
        self.names.send_replace(Arc::new(names));
    }

    /// Before the first switch: counters that nobody remembers the rules of begin anew.
    pub(super) fn reset_stale_counters(&mut self) {
        let every: Vec<u32> = (0..ebpf_common::limit::RULES).collect();
        match self.datapath.reset_rules(&every) {
            Ok(()) => self.stale_counters = false,
            Err(error) => tracing::debug!(error = chain(&error), "rule counters cannot be reset yet"),
        }
    }

    /// Rules that went count no more: their counters are free once they are zero again.
    pub(super) fn release_slots(&mut self) {
        let retired = self.slots.retired();
        if retired.is_empty() {
            return;
        }
        match self.datapath.reset_rules(&retired) {
            Ok(()) => self.slots.release(&retired),
            Err(error) => tracing::warn!(error = chain(&error), "counters of rules that went cannot be reset"),
        }
    }
}
