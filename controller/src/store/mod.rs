//! Where the network is kept: a log of revisions over keys, with compare-and-swap. Not SQL everywhere: what is asked here
//! is what SQLite on one machine and etcd on several can both give. [`contract`] holds every store to it.
//!
//! The calls block; the writer makes them from a thread of its own.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use policy::Revision;

pub mod account;
#[cfg(test)]
pub(crate) mod contract;
pub mod memory;
pub mod rows;
pub mod sqlite;

/// Longest key in bytes.
pub const KEY_MAX: usize = 128;
/// Longest request id in bytes: room for two UUIDs and a prefix.
pub const REQUEST_ID_MAX: usize = 128;
/// Commits that wait for one watcher before it is cut off; it then watches again from where it was.
const WATCH_QUEUE: usize = 1_024;

/// The name of a row: "cidr/3".
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// `kind` and `id` are ours or hexadecimal, never a user's text as it came.
    pub fn new(kind: &str, id: impl fmt::Display) -> Self {
        Self(format!("{kind}/{id}"))
    }

    /// A row of which there is one.
    pub fn single(kind: &str) -> Self {
        Self(kind.to_owned())
    }

    /// The kind, and the id within it ("" for a row of which there is one).
    pub fn split(&self) -> (&str, &str) {
        self.0.split_once('/').unwrap_or((&self.0, ""))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// All rows at one revision. Revision 0 is the empty store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub revision: Revision,
    pub rows: BTreeMap<Key, Vec<u8>>,
}

/// One change of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Put(Key, Vec<u8>),
    Delete(Key),
}

impl Op {
    pub fn key(&self) -> &Key {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

/// What must hold when a commit is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// The store is at this revision.
    At(Revision),
    /// There is no such row.
    Absent(Key),
    /// There is such a row, and it was last written at or before this revision.
    Unchanged(Key, Revision),
}

/// A caller's name for what it asks: asked again, it is not done again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId {
    pub id: String,
    /// SHA-256 of what was asked: the same id for something else is refused.
    pub digest: [u8; 32],
}

/// Who changed what, as the audit log keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditLine {
    pub actor: String,
    pub change: String,
}

/// An audit line with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEntry {
    pub revision: Revision,
    /// Seconds since the epoch.
    pub time: u64,
    pub actor: String,
    pub change: String,
}

/// One revision to be: all of it, or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    pub request: Option<RequestId>,
    pub preconditions: Vec<Precondition>,
    pub ops: Vec<Op>,
    pub audit: Vec<AuditLine>,
    /// Seconds since the epoch.
    pub time: u64,
}

/// One revision that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    pub revision: Revision,
    /// The request had been done before, at this revision; nothing was done now.
    pub replayed: bool,
}

/// What one revision changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub revision: Revision,
    pub ops: Vec<Op>,
}

/// A revisioned log over keys. `commit` returns only when the revision would survive a loss of power.
pub trait Store: Send + Sync + fmt::Debug {
    fn snapshot(&self) -> Result<Snapshot, StoreError>;
    /// Preconditions, rows, request id and audit lines in one transaction.
    fn commit(&self, commit: &Commit) -> Result<Committed, StoreError>;
    /// Several commits, each with a revision of its own, all or none: those of one transaction.
    fn commit_all(&self, commits: &[Commit]) -> Result<Vec<Committed>, StoreError> {
        commits.iter().map(|commit| self.commit(commit)).collect()
    }
    /// The revision at which this request was done, if it was and is not compacted away.
    fn request(&self, request: &RequestId) -> Result<Option<Revision>, StoreError>;
    /// Every revision after this one, in order: those that are, then those to come.
    fn watch(&self, after: Revision) -> Result<Watch, StoreError>;
    /// Forgets what revisions before this one changed, and their request ids; never rows or audit lines.
    fn compact(&self, before: Revision) -> Result<(), StoreError>;
    /// Newest first.
    fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, StoreError>;
}

/// Why a store would not, or could not. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the store is at revision `{found}`, not at `{expected}`; read it again and repeat the change")]
    Moved { expected: Revision, found: Revision },
    #[error("row `{key}` {reason}; read it again and repeat the change")]
    Conflict { key: Key, reason: &'static str },
    #[error("request id `{id}` was used for another request at revision `{revision}`; use a new id for each request")]
    RequestReused { id: String, revision: Revision },
    #[error("`{what}` is longer than the {max} bytes that the store keeps; shorten it")]
    TooLong { what: String, max: usize },
    #[error(
        "revisions up to `{compacted}` are compacted, so there is no watch after `{after}`; take a snapshot instead"
    )]
    Compacted { after: Revision, compacted: Revision },
    #[error("the watch fell behind after revision `{after}`; watch again from there")]
    Lagged { after: Revision },
    #[error("there is no database `{}`; make the network with `controllerd init`", path.display())]
    Missing { path: PathBuf },
    #[error("not allowed to use database `{}`; run as the owner of the state directory (usually root)", path.display())]
    NotAllowed { path: PathBuf },
    #[error("`{}` exists already; choose another `--state-dir`, or remove it if its network is to be lost", path.display())]
    Exists { path: PathBuf },
    #[error("database `{}` is in use by the `controllerd` with pid `{pid}`; stop that one first (`systemctl stop controllerd`, or `kill {pid}`)", path.display())]
    InUse { path: PathBuf, pid: String },
    #[error("database `{}` is corrupt: {reason}; nothing was changed: move it aside and restore a copy of the state directory", path.display())]
    Corrupt { path: PathBuf, reason: String },
    #[error("database `{}` has schema version `{found}`, and this controllerd knows `{known}`; run the version that wrote it", path.display())]
    Version { path: PathBuf, found: i64, known: i64 },
    #[error("the disk of database `{}` is full; nothing was changed: free some space and repeat the change", path.display())]
    Full { path: PathBuf },
    #[error("database `{}` failed to {what}", path.display())]
    Sqlite {
        path: PathBuf,
        what: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    #[error("failed to {what} `{}`", path.display())]
    Io {
        path: PathBuf,
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// Revisions as they come. See [`Store::watch`].
#[derive(Debug)]
pub struct Watch {
    after: Revision,
    backlog: VecDeque<Entry>,
    live: Receiver<Entry>,
}

impl Watch {
    /// The next revision; `None` if there is none within this time.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Entry>, StoreError> {
        let entry = match self.backlog.pop_front() {
            Some(entry) => entry,
            None => match self.live.recv_timeout(wait) {
                Ok(entry) => entry,
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(StoreError::Lagged { after: self.after }),
            },
        };
        self.after = entry.revision;
        Ok(Some(entry))
    }
}

/// Those who watch one store. A watcher that does not keep up is cut off, and nobody waits for it.
#[derive(Debug, Default)]
pub(crate) struct Watchers(Vec<SyncSender<Entry>>);

impl Watchers {
    /// Called under the lock that commits are made under, so that nothing falls between backlog and live.
    fn watch(&mut self, after: Revision, backlog: VecDeque<Entry>) -> Watch {
        let (sender, live) = sync_channel(WATCH_QUEUE);
        self.0.push(sender);
        Watch { after, backlog, live }
    }

    fn publish(&mut self, entry: &Entry) {
        self.0.retain(|watcher| watcher.try_send(entry.clone()).is_ok());
    }
}

/// What every store refuses alike, before it looks at its rows.
fn check_lengths(commit: &Commit) -> Result<(), StoreError> {
    let too_long = |what: &str, max| StoreError::TooLong { what: what.to_owned(), max };
    if let Some(request) = &commit.request
        && (request.id.is_empty() || request.id.len() > REQUEST_ID_MAX)
    {
        return Err(too_long(&request.id, REQUEST_ID_MAX));
    }
    match commit.ops.iter().find(|op| op.key().as_str().len() > KEY_MAX) {
        Some(op) => Err(too_long(op.key().as_str(), KEY_MAX)),
        None => Ok(()),
    }
}
