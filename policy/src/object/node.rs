//! Nodes: the machines of the mesh.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use crate::object::id::{CidrId, NodeId, NodeName};
use crate::object::key::PublicKey;
use crate::object::prefix::Addresses;

/// A machine. Its cidr is the deepest one that contains its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub id: NodeId,
    pub name: NodeName,
    pub addresses: Addresses,
    /// Known once the node has joined.
    pub public_key: Option<PublicKey>,
    pub state: NodeState,
    /// External cidrs whose gateway this node can be.
    pub gateway_for: BTreeSet<CidrId>,
    /// Where its WireGuard is reached, if an operator has said so.
    pub endpoint: Option<SocketAddr>,
    /// Seconds since the epoch.
    pub expires_at: Option<u64>,
}

/// What a node may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeState {
    /// Has a place and an invitation, but no key yet.
    Invited,
    Active,
    /// Nobody's peer until enabled again.
    Disabled,
    Expired,
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Invited => "invited",
            Self::Active => "active",
            Self::Disabled => "disabled",
            Self::Expired => "expired",
        })
    }
}
