//! What the controller knows: the policy and the accounts, from the store, and the directory, from what nodes say.

use std::collections::BTreeSet;
use std::sync::Arc;

use ::policy::{Affected, ChangeError, LimitError, Network, NodeId, Revision};
use tokio::sync::watch;

use crate::store::account::Accounts;
use crate::store::rows::{self, Changed, RowError};
use crate::store::{Entry, Snapshot, Store, StoreError};

pub mod directory;
pub mod history;
pub mod policy;

pub use self::policy::Policy;

/// What the store holds at one revision. Never changed: the next revision is another one. Its parts are shared with the
/// next one where that leaves them alone.
#[derive(Clone, Debug)]
pub struct State {
    /// Of the store. The policy's own is that of the last commit that touched it.
    pub revision: Revision,
    pub policy: Arc<Policy>,
    pub accounts: Arc<Accounts>,
}

/// What one revision of the store means for those who follow.
#[derive(Debug, Default)]
pub struct Followed {
    /// Whom it affects; `None`: it does not touch the policy.
    pub policy: Option<Affected>,
    /// The nodes whose certificates may be refused now.
    pub credentials: BTreeSet<NodeId>,
}

/// Why the store's content cannot be read as a state.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Row(#[from] RowError),
    #[error("the stored policy is beyond this controllerd's limits; run the version that accepted it")]
    Limit(#[from] LimitError),
    #[error("failed to start a thread")]
    Thread(#[source] std::io::Error),
    #[error("revision `{revision}` of the store contradicts what was there; restore a copy of the state directory")]
    Change {
        revision: Revision,
        #[source]
        reason: ChangeError,
    },
}

impl State {
    /// The store's newest revision.
    pub fn load(store: &dyn Store) -> Result<Self, LoadError> {
        Self::of(&store.snapshot()?)
    }

    pub fn of(snapshot: &Snapshot) -> Result<Self, LoadError> {
        let (network, accounts) = rows::decode(&snapshot.rows)?;
        let policy = Policy::compile(rows::policy_revision(snapshot), &network)?;
        Ok(Self { revision: snapshot.revision, policy: Arc::new(policy), accounts: Arc::new(accounts) })
    }

    /// The state after one more revision of the store, which leaves alone what it does not touch.
    pub fn follow(&self, entry: &Entry) -> Result<(Self, Followed), LoadError> {
        let mut next = Self { revision: entry.revision, ..self.clone() };
        let mut followed = Followed::default();
        let Changed { policy, accounts } = rows::changed(&entry.ops)?;
        if let Some(replacement) = policy {
            let mut network = self.network().clone();
            network.take_touched();
            network.replace(replacement).map_err(|reason| LoadError::Change { revision: entry.revision, reason })?;
            let rows = network.take_touched();
            let (policy, affected) = self.policy.follow(entry.revision, &network, &rows)?;
            (next.policy, followed.policy) = (Arc::new(policy), Some(affected));
        }
        if !accounts.is_empty() {
            let mut changed = Accounts::clone(&self.accounts);
            accounts.into_iter().for_each(|change| changed.follow(change));
            followed.credentials = changed.take_touched().credentials;
            next.accounts = Arc::new(changed);
        }
        Ok((next, followed))
    }

    pub fn network(&self) -> &Network {
        self.policy.network()
    }

    /// Whether this node may speak to the controller and its peers.
    pub fn is_active(&self, node: NodeId, now: u64) -> bool {
        self.policy.is_active(node, now)
    }
}

/// The newest state, for many readers and one writer.
#[derive(Clone, Debug)]
pub struct Current(watch::Receiver<Arc<State>>);

/// The nodes that follow, as those see them who make policies.
pub trait Followers: std::fmt::Debug + Send {
    /// A new policy, and whom it affects as against the one before. Does not wait for a node.
    fn publish(&self, policy: Arc<Policy>, affected: Affected);

    /// Nodes whose certificates may be refused now.
    fn doubt(&self, nodes: BTreeSet<NodeId>);
}

/// The writer's end of a [`Current`].
#[derive(Debug)]
pub struct Publisher(watch::Sender<Arc<State>>);

/// The two ends of one state.
pub fn channel(state: State) -> (Publisher, Current) {
    let (sender, receiver) = watch::channel(Arc::new(state));
    (Publisher(sender), Current(receiver))
}

impl Current {
    pub fn get(&self) -> Arc<State> {
        Arc::clone(&self.0.borrow())
    }
}

impl Publisher {
    pub fn publish(&self, state: State) {
        self.0.send_replace(Arc::new(state));
    }

    pub fn get(&self) -> Arc<State> {
        Arc::clone(&self.0.borrow())
    }
}
