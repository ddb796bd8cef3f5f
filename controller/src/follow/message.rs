//! What nodes are sent, encoded. A fragment that many are sent is encoded once.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use controller_api::convert::{digest_to_wire, endpoints_to_wire};
use controller_api::v1;
use policy::{Digest, Fragment, NodeId, Revision, Role, SliceDelta};
use prost::Message as _;
use prost::bytes::Bytes;

use crate::state::Policy;
use crate::state::directory::Directory;

/// An encoded fragment.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    /// Empty: it says nothing.
    pub(super) bytes: Bytes,
    /// What it adds to a slice's digest.
    pub(super) difference: Digest,
    /// The peers that it names.
    pub(super) peers: Vec<NodeId>,
}

impl From<Fragment> for Part {
    fn from(fragment: Fragment) -> Self {
        let Fragment { rows, difference } = fragment;
        let bytes = if rows.is_empty() { Bytes::new() } else { v1::Update::from(&rows).encode_to_vec().into() };
        Self { bytes, difference, peers: rows.peers.into_keys().collect() }
    }
}

/// What one node is sent, and what it holds then.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) response: v1::FollowResponse,
    pub(super) holds: Holds,
    pub(super) is_snapshot: bool,
}

/// What a node holds: the slice of a revision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holds {
    pub(super) revision: Revision,
    pub(super) digest: Digest,
}

/// What a node stood for, if it is known, and what it stands for now.
type Turn = (Option<Arc<Role>>, Arc<Role>);

/// Messages that lead to one policy from another one, or from nothing.
#[derive(Debug)]
pub(super) struct Messages {
    old: Option<Arc<Policy>>,
    new: Arc<Policy>,
    /// The nodes that are other peers, or stand for other classes; `None`: not known.
    changed: Option<BTreeSet<NodeId>>,
    directory: Directory,
    cidrs: Option<Part>,
    roles: HashMap<Turn, (Part, Bytes)>,
    size: usize,
}

impl Messages {
    pub(super) fn new(
        old: Option<Arc<Policy>>,
        new: Arc<Policy>,
        changed: Option<BTreeSet<NodeId>>,
        directory: Directory,
    ) -> Self {
        Self { old, new, changed, directory, cidrs: None, roles: HashMap::new(), size: 0 }
    }

    pub(super) fn old(&self) -> Option<&Arc<Policy>> {
        self.old.as_ref()
    }

    /// Bytes of the parts that are kept.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// For a node that holds its slice of the old policy. `None`: it is not active. A message without an update: nothing
    /// has changed for it. `is_affected`: more than the cidrs may differ.
    pub(super) fn to(&mut self, node: NodeId, holds: Holds, is_affected: bool) -> Option<Message> {
        let role = Arc::clone(self.new.matrix.role(node)?);
        let known = self.old.as_ref().and_then(|old| old.matrix.role(node)).cloned();
        let is_snapshot = known.is_none();
        let holds = if is_snapshot { Holds::default() } else { holds };
        let cidrs = self.cidrs();
        let (mut parts, mut digest) = (vec![cidrs.bytes], holds.digest + cidrs.difference);
        let (mut local, mut endpoints) = (None, Bytes::new());
        if is_affected || is_snapshot {
            let (shared, seen) = self.of_role(known, role);
            let own = Fragment::of_node(self.old.as_ref().map(|old| &old.matrix), &self.new.matrix, node)?;
            digest = digest + shared.difference + own.difference;
            parts.push(shared.bytes);
            (local, endpoints) = (own.rows.local, seen);
        }
        parts.retain(|part| !part.is_empty());
        let update = if parts.is_empty() && local.is_none() && !is_snapshot {
            Vec::new()
        } else {
            let head = SliceDelta {
                from: holds.revision,
                base: holds.digest,
                revision: self.new.revision,
                digest,
                local,
                ..SliceDelta::default()
            };
            parts.insert(0, head_bytes(&head));
            parts
        };
        let endpoints = Vec::from_iter((!endpoints.is_empty()).then_some(endpoints));
        let holds = if update.is_empty() { holds } else { Holds { revision: self.new.revision, digest } };
        Some(Message { response: v1::FollowResponse { update, endpoints }, holds, is_snapshot })
    }

    fn cidrs(&mut self) -> Part {
        let (old, new) = (self.old.as_ref().map(|old| &old.matrix), &self.new.matrix);
        self.cidrs.get_or_insert_with(|| Fragment::of_cidrs(old, new).into()).clone()
    }

    /// With where the peers in it were seen.
    fn of_role(&mut self, known: Option<Arc<Role>>, role: Arc<Role>) -> (Part, Bytes) {
        let key = (known, role);
        if let Some(made) = self.roles.get(&key) {
            return made.clone();
        }
        let old = key.0.as_ref().and_then(|known| Some((&self.old.as_ref()?.matrix, known)));
        let part = Part::from(Fragment::of_role(old, (&self.new.matrix, &key.1), self.changed.as_ref()));
        let seen = endpoints(&self.directory, part.peers.iter().copied());
        self.size += part.bytes.len() + seen.len();
        self.roles.insert(key, (part.clone(), seen.clone()));
        (part, seen)
    }
}

fn head_bytes(head: &SliceDelta) -> Bytes {
    v1::Update::from(head).encode_to_vec().into()
}

/// Where these nodes were seen; empty: none of them was.
pub(super) fn endpoints(directory: &Directory, nodes: impl IntoIterator<Item = NodeId>) -> Bytes {
    let seen = directory.of(nodes);
    if seen.is_empty() { Bytes::new() } else { endpoints_to_wire(seen).encode_to_vec().into() }
}

/// To a node that holds just what it should: the revision that its slice is of.
pub(super) fn up_to_date(holds: Holds, revision: Revision) -> Message {
    let Holds { revision: from, digest } = holds;
    let update = v1::Update {
        from: from.0,
        revision: revision.0,
        base: digest_to_wire(digest),
        digest: digest_to_wire(digest),
        ..v1::Update::default()
    };
    let response = v1::FollowResponse { update: vec![update.encode_to_vec().into()], endpoints: Vec::new() };
    Message { response, holds: Holds { revision, digest }, is_snapshot: false }
}

/// The last word to a node that has no part in the network (any more): it has no peers, and nothing is allowed. Should it
/// come back, it begins anew. `old`: a policy in which it was active.
pub(super) fn dismissal(old: &Policy, node: NodeId, revision: Revision) -> Option<v1::FollowResponse> {
    let slice = old.matrix.slice(node, revision)?.emptied(revision);
    let update = v1::Update::from(&slice.to_delta()).encode_to_vec();
    Some(v1::FollowResponse { update: vec![update.into()], endpoints: Vec::new() })
}
