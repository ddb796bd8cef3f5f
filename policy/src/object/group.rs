//! Groups: sets of nodes and cidrs for rules to name. There are no groups in groups.

use std::collections::BTreeSet;

use crate::object::id::{CidrId, GroupId, GroupName, NodeId};

/// A named set of nodes and cidrs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub id: GroupId,
    pub name: GroupName,
    pub nodes: BTreeSet<NodeId>,
    pub cidrs: BTreeSet<CidrId>,
}

impl Group {
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.cidrs.is_empty()
    }
}
