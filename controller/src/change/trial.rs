//! What would come of a request: a question, which is answered from the newest state without the writer.

use std::sync::Arc;

use policy::{Revision, Rows};

use super::audit::Actor;
use super::draft::Draft;
use super::request::{Outcome, Refusal, Request};
use crate::state::{Policy, State};

/// The same warnings, and the same refusal, as if it were done to this state. `now`: seconds since the epoch.
pub fn attempt(state: &State, actor: &Actor, request: &Request, now: u64) -> Result<Outcome, Refusal> {
    let mut draft = Draft::of(state);
    let outcome = draft.apply(actor, request, now)?;
    let (touched, _) = draft.take_ops();
    follow(&state.policy, &draft, Revision(state.revision.0 + 1), &touched.policy)?;
    Ok(outcome)
}

/// Whether what was asked for builds on this revision of the policy.
pub fn check_expected(expected: Option<Revision>, found: Revision) -> Result<(), Refusal> {
    match expected {
        Some(expected) if expected != found => Err(Refusal::Revision { expected, found }),
        _ => Ok(()),
    }
}

/// The policy of the draft, which differs from this one in these rows, held against the limits of whom that affects.
/// `None`: it is the same policy.
pub(super) fn follow(
    policy: &Policy,
    draft: &Draft,
    revision: Revision,
    rows: &Rows,
) -> Result<Option<Arc<Policy>>, Refusal> {
    if rows.is_empty() {
        return Ok(None);
    }
    let (policy, affected) = policy.follow(revision, &draft.network, rows).map_err(Refusal::Limit)?;
    policy.matrix.check_affected(&affected)?;
    Ok(Some(Arc::new(policy)))
}
