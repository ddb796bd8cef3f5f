//! The network as it is at one revision: what every answer is computed from.

use std::sync::Arc;

use policy::{LimitError, Matrix, Network, NodeId, NodeState, Revision};
use tokio::sync::watch;

use crate::store::account::Accounts;
use crate::store::rows::{self, RowError};
use crate::store::{Store, StoreError};

/// Everything that belongs to one revision. Never changed: the next revision is another one.
#[derive(Debug)]
pub struct State {
    pub revision: Revision,
    pub network: Arc<Network>,
    /// Compiled from `network`.
    pub matrix: Arc<Matrix>,
    pub accounts: Arc<Accounts>,
}

/// Why the store's content is no state.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Row(#[from] RowError),
    #[error("the stored policy is beyond this controllerd's limits; run the version that accepted it")]
    Limit(#[from] LimitError),
}

impl State {
    /// The store's newest revision.
    pub fn load(store: &dyn Store) -> Result<Self, LoadError> {
        let snapshot = store.snapshot()?;
        let (network, accounts) = rows::decode(&snapshot.rows)?;
        let matrix = Matrix::compile(&network)?;
        Ok(Self {
            revision: snapshot.revision,
            network: Arc::new(network),
            matrix: Arc::new(matrix),
            accounts: Arc::new(accounts),
        })
    }

    /// Whether this node may speak to the controller and its peers.
    pub fn is_active(&self, node: NodeId, now: u64) -> bool {
        let Some(node) = self.network.nodes().get(&node) else {
            return false;
        };
        node.state == NodeState::Active && node.expires_at.is_none_or(|expires_at| now < expires_at)
    }
}

/// The newest state, for many readers and one writer.
#[derive(Clone, Debug)]
pub struct Current(watch::Receiver<Arc<State>>);

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

    /// As [`Current::get`]; [`Current::changed`] then waits for the next one.
    pub fn take(&mut self) -> Arc<State> {
        Arc::clone(&self.0.borrow_and_update())
    }

    /// Waits for a state that was not taken yet. `false`: there will be none.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
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
