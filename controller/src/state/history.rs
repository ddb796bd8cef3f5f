//! The newest policies, one after the other, for nodes that were away. They share what they have alike, so that each costs
//! what its change touched.

use std::collections::BTreeMap;
use std::sync::Arc;

use std::time::Duration;

use policy::Revision;

use super::{LoadError, Policy, State};
use crate::store::Store;

/// Policies that are kept in memory. A node that was away for longer gets a snapshot.
pub const KEPT: usize = 1_024;

/// By revision; never empty.
#[derive(Debug)]
pub struct History {
    policies: BTreeMap<Revision, Arc<Policy>>,
    newest: Arc<Policy>,
}

impl History {
    /// The store's newest state, made from the newest part of its log, with the policies on the way there: a node that
    /// was away while the controller was finds what it holds.
    pub fn load(store: &dyn Store) -> Result<(State, Self), LoadError> {
        let (oldest, newest) = store.kept()?;
        let first = oldest.max(Revision(newest.0.saturating_sub(KEPT as u64)));
        // A store begins with nothing, which is no policy.
        let first = first.max(Revision(1)).min(newest);
        let mut state = State::of(&store.at(first)?)?;
        let mut history = Self::new(Arc::clone(&state.policy));
        let mut watch = store.watch(first)?;
        while let Some(entry) = watch.next(Duration::ZERO)? {
            let (next, followed) = state.follow(&entry)?;
            state = next;
            if followed.policy.is_some() {
                history.push(Arc::clone(&state.policy));
            }
        }
        Ok((state, history))
    }

    pub fn new(policy: Arc<Policy>) -> Self {
        Self { policies: BTreeMap::from([(policy.revision, Arc::clone(&policy))]), newest: policy }
    }

    pub fn newest(&self) -> &Arc<Policy> {
        &self.newest
    }

    /// Makes a policy the newest one.
    pub fn push(&mut self, policy: Arc<Policy>) {
        self.policies.insert(policy.revision, Arc::clone(&policy));
        self.newest = policy;
        while self.policies.len() > KEPT {
            self.policies.pop_first();
        }
    }

    /// The policy that was the newest one at a revision.
    pub fn at(&self, revision: Revision) -> Option<&Arc<Policy>> {
        self.policies.range(..=revision).next_back().map(|(_, policy)| policy)
    }
}
