//! The newest policies, one after the other, for nodes that were away. They share what they have alike, so that each costs
//! what its change touched.

use std::collections::BTreeMap;
use std::sync::Arc;

use policy::Revision;

use super::Policy;

/// Policies that are kept in memory. A node that was away for longer gets a snapshot.
pub const KEPT: usize = 1_024;

/// By revision; never empty.
#[derive(Debug)]
pub struct History {
    policies: BTreeMap<Revision, Arc<Policy>>,
    newest: Arc<Policy>,
}

impl History {
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
