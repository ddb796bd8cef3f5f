//! Questions about what was. Reading it takes long: not on the runtime's threads, and few at one time.

use std::sync::Arc;

use controller_api::v1;
use policy::Revision;
use tokio::sync::Semaphore;
use tonic::Status;

use super::{refused, text};
use crate::change::request::Refusal;
use crate::state::Current;
use crate::store::{AuditEntry, AuditLine, Key, Past, Store, StoreError, rows};

/// Questions at one time: each can hold a whole network.
const QUESTIONS: usize = 2;

/// The store as those who ask see it.
#[derive(Clone, Debug)]
pub(super) struct Archive {
    store: Arc<dyn Store>,
    current: Current,
    room: Arc<Semaphore>,
}

impl Archive {
    pub(super) fn new(store: Arc<dyn Store>, current: Current) -> Self {
        Self { store, current, room: Arc::new(Semaphore::new(QUESTIONS)) }
    }

    /// All objects at a revision; at the newest for revision 0.
    pub(super) async fn network(&self, revision: Revision) -> Result<v1::GetNetworkResponse, Status> {
        let current = self.current.clone();
        self.ask(move |store| {
            let state = current.get();
            if revision == Revision(0) || revision == state.policy.revision {
                let network = Some(v1::Network::from(state.network()));
                return Ok(v1::GetNetworkResponse { revision: state.policy.revision.0, network });
            }
            let snapshot = store.at(revision).map_err(not_told)?;
            let (network, _) = rows::decode(&snapshot.rows).map_err(|error| Status::internal(text(&error)))?;
            let revision = rows::policy_revision(&snapshot).0;
            Ok(v1::GetNetworkResponse { revision, network: Some(v1::Network::from(&network)) })
        })
        .await
    }

    /// The policy's revisions, newest first.
    pub(super) async fn history(&self, limit: usize) -> Result<v1::ListHistoryResponse, Status> {
        self.ask(move |store| {
            let (oldest, _) = store.kept().map_err(not_told)?;
            let past = store.history(&Key::single(rows::HEADER), limit).map_err(not_told)?;
            Ok(v1::ListHistoryResponse { revisions: past.into_iter().map(past_to_wire).collect(), oldest: oldest.0 })
        })
        .await
    }

    pub(super) async fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, Status> {
        self.ask(move |store| store.audit(limit).map_err(not_told)).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn Store) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let failed = |error: &dyn std::fmt::Display| Status::internal(format!("store could not be read: {error}"));
        let room = Arc::clone(&self.room).acquire_owned().await.map_err(|error| failed(&error))?;
        let store = Arc::clone(&self.store);
        let asked = tokio::task::spawn_blocking(move || {
            // Whoever asked may be gone; the question takes room all the same.
            let _room = room;
            question(&*store)
        });
        asked.await.map_err(|error| failed(&error))?
    }
}

fn not_told(error: StoreError) -> Status {
    refused(&Refusal::Store(error))
}

fn past_to_wire(past: Past) -> v1::PastRevision {
    let Past { revision, time, audit } = past;
    let change = |AuditLine { actor, change }| v1::PastChange { actor, change };
    v1::PastRevision { revision: revision.0, time, changes: audit.into_iter().map(change).collect() }
}
