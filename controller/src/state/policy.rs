//! The policy at one revision: the network and the matrix that it compiles to.

use policy::{Affected, LimitError, Matrix, Network, NodeId, NodeState, Revision, Rows};

/// Everything that belongs to one revision. Never changed: the next revision is another one, which shares what the two have
/// alike.
#[derive(Clone, Debug)]
pub struct Policy {
    pub revision: Revision,
    pub matrix: Matrix,
}

impl Policy {
    pub fn compile(revision: Revision, network: &Network) -> Result<Self, LimitError> {
        Ok(Self { revision, matrix: Matrix::compile(network)? })
    }

    /// The policy of a network that differs from this one's in these rows, at most; and whom that affects.
    pub fn follow(&self, revision: Revision, network: &Network, rows: &Rows) -> Result<(Self, Affected), LimitError> {
        let (matrix, affected) = self.matrix.follow(network, rows)?;
        Ok((Self { revision, matrix }, affected))
    }

    pub fn network(&self) -> &Network {
        self.matrix.network()
    }

    /// Whether this node may speak to the controller and its peers. `now`: seconds since the epoch.
    pub fn is_active(&self, node: NodeId, now: u64) -> bool {
        let Some(node) = self.network().nodes().get(&node) else { return false };
        node.state == NodeState::Active && node.expires_at.is_none_or(|expires_at| now < expires_at)
    }
}
