//! What is known of each node while this controller runs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use policy::{Generation, Network, NodeId, Revision};

/// Characters of a node's error that are kept.
pub(crate) const ERROR_MAX: usize = 500;

/// What is known of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub connected: bool,
    /// Seconds since the epoch; 0: never.
    pub last_seen: u64,
    /// The newest revision that was sent, or that the node was found to hold.
    pub sent: Revision,
    /// The newest revision that the node said it enforces.
    pub enforced: Revision,
    pub generation: Generation,
    /// Why the node could not enforce what it was sent; empty: it could.
    pub error: String,
    /// What the policy requires of the node that it does not understand, and therefore denies.
    pub lacks: Vec<String>,
    /// The agent's.
    pub version: String,
    /// The stream that speaks for the node.
    stream: StreamId,
    /// Whether that stream has brought anything yet.
    greeted: bool,
}

/// Number of a stream, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(pub u64);

impl Report {
    /// Whether the node enforces everything that concerns it.
    pub fn converged(&self) -> bool {
        self.connected
            && self.error.is_empty()
            && self.lacks.is_empty()
            && self.sent != Revision(0)
            && self.enforced == self.sent
    }
}

/// Of every node that follows, or followed.
#[derive(Clone, Debug, Default)]
pub struct Reports(Arc<Mutex<BTreeMap<NodeId, Report>>>);

impl Reports {
    fn inner(&self) -> MutexGuard<'_, BTreeMap<NodeId, Report>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn of(&self, node: NodeId) -> Report {
        self.inner().get(&node).cloned().unwrap_or_default()
    }

    /// Connected, and converged.
    pub fn count(&self) -> (usize, usize) {
        let inner = self.inner();
        let count = |is: fn(&Report) -> bool| inner.values().filter(|report| is(report)).count();
        (count(|report| report.connected), count(Report::converged))
    }

    /// Forgets nodes that are gone.
    pub fn retain(&self, network: &Network) {
        self.inner().retain(|node, _| network.nodes().contains_key(node));
    }

    /// A stream speaks for a node from now on.
    pub(super) fn open(&self, node: NodeId, stream: StreamId, version: String, now: u64) {
        let mut inner = self.inner();
        let report = inner.entry(node).or_default();
        let (error, lacks) = (String::new(), Vec::new());
        *report =
            Report { connected: true, last_seen: now, version, error, lacks, stream, greeted: false, ..report.clone() };
    }

    pub(super) fn sent(&self, node: NodeId, stream: StreamId, revision: Revision) {
        self.update(node, stream, |report| {
            report.sent = revision;
            report.greeted = true;
        });
    }

    pub(super) fn close(&self, node: NodeId, stream: StreamId) {
        self.update(node, stream, |report| report.connected = false);
    }

    /// Nothing is changed for a stream that another one has replaced.
    fn update<T>(&self, node: NodeId, stream: StreamId, change: impl FnOnce(&mut Report) -> T) -> Option<T> {
        self.inner().get_mut(&node).filter(|report| report.stream == stream).map(change)
    }

    /// What a node said of the revision that it enforces. Before the stream's first update a node may speak of what an
    /// earlier controller sent: this is ignored.
    pub fn acknowledge(&self, node: NodeId, stream: StreamId, said: Said, now: u64) -> Result<(), NeverSent> {
        let Said { revision, generation, error, lacks } = said;
        let acknowledged = self.update(node, stream, |report| {
            report.last_seen = now;
            match (revision > report.sent, report.greeted) {
                (true, false) => return Ok(()),
                (true, true) => return Err(NeverSent { acknowledged: revision, sent: report.sent }),
                (false, _) => {}
            }
            report.error = error.chars().take(ERROR_MAX).collect();
            report.lacks = lacks;
            if error.is_empty() {
                report.enforced = revision;
                report.generation = generation;
            }
            Ok(())
        });
        acknowledged.unwrap_or(Ok(()))
    }
}

/// An acknowledgement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    pub revision: Revision,
    pub generation: Generation,
    pub error: String,
    pub lacks: Vec<String>,
}

/// An acknowledgement of something that was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("revision `{acknowledged}` was acknowledged, and `{sent}` is the newest that was sent; restart `noded`")]
pub struct NeverSent {
    acknowledged: Revision,
    sent: Revision,
}
