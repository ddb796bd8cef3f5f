//! Members: the active nodes that stand for a class.

use imbl::OrdSet;

use crate::object::digest::Digest;
use crate::object::id::NodeId;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Members {
    pub(super) nodes: OrdSet<NodeId>,
    /// Those of them that stand for other classes too.
    pub(super) several: OrdSet<NodeId>,
    /// The digests of the others, as their peers configure them.
    pub(super) sum: Digest,
}

impl Members {
    pub(super) fn insert(&mut self, node: NodeId, is_in_several: bool, peer: Digest) {
        self.nodes.insert(node);
        if is_in_several {
            self.several.insert(node);
        } else {
            self.sum += peer;
        }
    }

    pub(super) fn remove(&mut self, node: NodeId, peer: Digest) {
        self.nodes.remove(&node);
        if self.several.remove(&node).is_none() {
            self.sum -= peer;
        }
    }
}
