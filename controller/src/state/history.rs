//! The newest policies, one after the other, for nodes that were away. They share what they have alike, so that each costs
//! what its change touched.

use std::collections::BTreeMap;
use std::sync::Arc;

use std::time::Duration;

use policy::Revision;

use super::{LoadError, Policy, State};
use crate::store::{Store, Wanted};

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
        // An empty store is at revision 0, which has no policy.
        let first = first.max(Revision(1)).min(newest);
        let mut state = State::of(&store.at(first, &Wanted::always())?)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{NOW, allow, apply, network};
    use crate::store::account::Accounts;
    use crate::store::memory::MemoryStore;
    use crate::store::{Commit, Op, Precondition, rows};

    /// A store with the fixture's network at revision 1, and a rule more with each of `revisions`.
    fn store(revisions: u64) -> MemoryStore {
        let (store, mut network) = (MemoryStore::new(), network());
        let commit = |revision, ops: Vec<Op>| {
            let preconditions = vec![Precondition::At(Revision(revision))];
            let commit = Commit { request: None, preconditions, ops, audit: Vec::new(), time: NOW };
            store.commit(&commit).expect("committed");
        };
        commit(0, rows::of_everything(&network, &Accounts::default()));
        network.take_touched();
        for port in 1..=revisions {
            apply(&mut network, &allow(&format!("r{port}"), "cidr:app", "cidr:db", &format!("tcp/{port}")));
            let touched = network.take_touched();
            commit(port, rows::of_policy(&network, &touched));
        }
        store
    }

    #[test]
    fn a_start_finds_the_policies_of_the_log() {
        let store = store(5);
        let (state, history) = History::load(&store).expect("loads");
        assert_eq!(state.revision, Revision(6));
        assert!(Arc::ptr_eq(history.newest(), &state.policy));
        let loaded = State::load(&store).expect("a state");
        for node in state.network().nodes().keys() {
            let slice = |policy: &Policy| policy.matrix.slice(*node, Revision(1));
            assert_eq!(slice(&state.policy), slice(&loaded.policy));
        }
        for revision in 1..=6 {
            let policy = history.at(Revision(revision)).expect("is kept");
            assert_eq!(policy.revision, Revision(revision));
            assert_eq!(policy.network().rules().len() as u64, revision);
        }
        assert!(history.at(Revision(0)).is_none());
    }

    #[test]
    fn the_oldest_policies_go_first() {
        let network = network();
        let policy = |revision| Arc::new(Policy::compile(Revision(revision), &network).expect("within limits"));
        let mut history = History::new(policy(1));
        let kept = KEPT as u64;
        (2..=kept + 1).for_each(|revision| history.push(policy(2 * revision)));
        assert!(history.at(Revision(3)).is_none(), "revision 1 is gone");
        assert_eq!(history.at(Revision(5)).expect("is kept").revision, Revision(4), "the newest one then");
        assert_eq!(history.newest().revision, Revision(2 * kept + 2));
    }
}
