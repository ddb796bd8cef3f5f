//! Questions about what was, answered from the store.

use std::sync::Arc;

use controller_api::v1;
use host::error::chain;
use policy::Revision;
use tonic::Status;

use super::{Context, refused};
use crate::access::caller::Caller;
use crate::access::questions::Cost;
use crate::change::request::Refusal;
use crate::store::{AuditEntry, AuditLine, Key, Page, Past, Range, Store, StoreError, Wanted, rows};

/// The store as those who ask see it.
#[derive(Clone, Debug)]
pub(super) struct Archive<'a>(pub(super) &'a Context);

impl Archive<'_> {
    /// All objects at a revision; at the newest for revision 0.
    pub(super) async fn network(&self, caller: &Caller, revision: Revision) -> Result<v1::GetNetworkResponse, Status> {
        let current = self.0.current.clone();
        self.ask(caller, move |store, wanted| {
            let state = current.get();
            if revision == Revision(0) || revision == state.policy.revision {
                let network = Some(v1::Network::from(state.network()));
                return Ok(v1::GetNetworkResponse { revision: state.policy.revision.0, network });
            }
            let snapshot = store.at(revision, wanted).map_err(|error| not_told(from_the_first(error)))?;
            let (network, _) = rows::decode(&snapshot.rows).map_err(|error| Status::internal(chain(&error)))?;
            wanted.check().map_err(not_told)?;
            let revision = rows::policy_revision(&snapshot).0;
            Ok(v1::GetNetworkResponse { revision, network: Some(v1::Network::from(&network)) })
        })
        .await
    }

    /// The policy's revisions, newest first.
    pub(super) async fn history(&self, caller: &Caller, range: Range) -> Result<v1::ListHistoryResponse, Status> {
        self.ask(caller, move |store, wanted| {
            let (oldest, _) = store.kept().map_err(not_told)?;
            let Page { entries, is_cut } =
                store.history(&Key::single(rows::HEADER), range, wanted).map_err(not_told)?;
            let revisions = entries.into_iter().map(past_to_wire).collect();
            Ok(v1::ListHistoryResponse { revisions, oldest: oldest.0, cut: is_cut })
        })
        .await
    }

    pub(super) async fn audit(&self, caller: &Caller, range: Range) -> Result<v1::ListAuditResponse, Status> {
        self.ask(caller, move |store, wanted| {
            let Page { entries, is_cut } = store.audit(range, wanted).map_err(not_told)?;
            let entry = |entry: AuditEntry| {
                let AuditEntry { revision, time, actor, change } = entry;
                v1::AuditEntry { revision: revision.0, time, actor, change }
            };
            Ok(v1::ListAuditResponse { entries: entries.into_iter().map(entry).collect(), cut: is_cut })
        })
        .await
    }

    async fn ask<T: Send + 'static>(
        &self,
        caller: &Caller,
        question: impl FnOnce(&dyn Store, &Wanted) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let store = Arc::clone(&self.0.store);
        self.0.questions.ask(caller, Cost::High, move |wanted| question(&*store, wanted)).await
    }
}

fn not_told(error: StoreError) -> Status {
    refused(&Refusal::Store(error))
}

/// An empty store, at revision 0, has no policy.
fn from_the_first(error: StoreError) -> StoreError {
    let first = |oldest: Revision| oldest.max(Revision(1));
    match error {
        StoreError::NotKept { revision, oldest, newest } => {
            StoreError::NotKept { revision, oldest: first(oldest), newest }
        }
        StoreError::NotYet { revision, oldest, newest } => {
            StoreError::NotYet { revision, oldest: first(oldest), newest }
        }
        other => other,
    }
}

fn past_to_wire(past: Past) -> v1::PastRevision {
    let Past { revision, time, audit } = past;
    let change = |AuditLine { actor, change }| v1::PastChange { actor, change };
    v1::PastRevision { revision: revision.0, time, changes: audit.into_iter().map(change).collect() }
}
