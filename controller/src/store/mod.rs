//! Where the network is kept: a log of revisions over keys, with compare-and-swap. Not SQL everywhere: what is asked here
//! is what SQLite on one machine and etcd on several can both give. [`contract`] holds every store to it.
//!
//! The calls block; the writer makes them from a thread of its own.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use policy::Revision;

pub mod account;
#[cfg(test)]
pub(crate) mod contract;
mod error;
pub mod memory;
pub mod rows;
pub mod sqlite;
mod wanted;
mod watch;

pub use error::StoreError;
pub use wanted::{Asked, Wanted};
pub use watch::Watch;
pub(crate) use watch::Watchers;

/// Longest key in bytes.
pub const KEY_MAX: usize = 128;
/// Longest request id in bytes: room for two UUIDs and a prefix.
pub const REQUEST_ID_MAX: usize = 128;

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

/// A row as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub value: Vec<u8>,
    /// That wrote it last.
    pub revision: Revision,
}

/// All rows at one revision. Revision 0 is the empty store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub revision: Revision,
    pub rows: BTreeMap<Key, Row>,
}

impl Snapshot {
    /// Makes it the snapshot of the next revision.
    fn apply(&mut self, revision: Revision, ops: &[Op]) {
        self.revision = revision;
        for op in ops {
            match op {
                Op::Put(key, value) => drop(self.rows.insert(key.clone(), Row { value: value.clone(), revision })),
                Op::Delete(key) => drop(self.rows.remove(key)),
            }
        }
    }
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
    /// The commit before this one in its transaction was made there: not refused, and not one that had been made before.
    AfterLast,
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
    /// Seconds since the epoch.
    pub time: u64,
    pub ops: Vec<Op>,
}

/// A revision that wrote some row, with who asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Past {
    pub revision: Revision,
    /// Seconds since the epoch.
    pub time: u64,
    pub audit: Vec<AuditLine>,
}

/// What of a long list is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Only revisions before this one.
    pub before: Option<Revision>,
    /// At most so many entries.
    pub limit: usize,
}

/// A part of a list, newest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    pub entries: Vec<T>,
    /// It ends before its range, because it is [`PAGE_BYTES`] long.
    pub is_cut: bool,
}

/// Bytes after which a [`Page`] ends, with the revision that it has come to: as much as one revision can have.
const PAGE_BYTES: usize = 8 << 20;

/// How long a page has become.
#[derive(Debug, Default)]
struct Room {
    bytes: usize,
    last: Option<Revision>,
}

impl Room {
    /// Whether the next line of the list, of this revision, is part of the page too.
    fn takes(&mut self, revision: Revision, actor: &str, change: &str) -> bool {
        let is_next = self.last.replace(revision) != Some(revision);
        if is_next && self.bytes >= PAGE_BYTES {
            return false;
        }
        self.bytes += actor.len() + change.len();
        true
    }
}

/// How much history is kept: a revision that is among the newest `revisions` and not older than `age`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    pub revisions: u64,
    pub age: Duration,
}

/// A revisioned log over keys, upon a base: the rows at the oldest revision that is kept. A commit returns only when its
/// revision would survive a loss of power.
pub trait Store: Send + Sync + fmt::Debug {
    fn snapshot(&self) -> Result<Snapshot, StoreError>;
    /// The rows as they were at a revision that is kept. Holds up no commit.
    fn at(&self, revision: Revision, wanted: &Wanted) -> Result<Snapshot, StoreError>;
    /// The oldest and the newest revision that [`Store::at`] gives.
    fn kept(&self) -> Result<(Revision, Revision), StoreError>;
    /// Several commits in one transaction, in order, each with a revision, a request id and preconditions of its own. One
    /// that is refused does not take others with it; the error is one that all of them fail for.
    fn commit_all(&self, commits: &[Commit]) -> Result<Vec<Result<Committed, StoreError>>, StoreError>;
    /// Preconditions, rows, request id and audit lines in one transaction.
    fn commit(&self, commit: &Commit) -> Result<Committed, StoreError> {
        self.commit_all(std::slice::from_ref(commit))?.remove(0)
    }
    /// The revision at which this request was done, if it was and is not compacted away.
    fn request(&self, request: &RequestId) -> Result<Option<Revision>, StoreError>;
    /// Every revision after this one, in order: those that are, then those to come.
    fn watch(&self, after: Revision) -> Result<Watch, StoreError>;
    /// Folds revisions that need not be kept into the base, and forgets their request ids; never rows or audit lines. One
    /// step, so that commits wait for no more. `true`: there is more to do. `now`: seconds since the epoch.
    fn compact(&self, keep: Keep, now: u64) -> Result<bool, StoreError>;
    /// The revisions that wrote this row, of those in the log, newest first. Holds up no commit.
    fn history(&self, key: &Key, range: Range, wanted: &Wanted) -> Result<Page<Past>, StoreError>;
    /// Newest first. Holds up no commit.
    fn audit(&self, range: Range, wanted: &Wanted) -> Result<Page<AuditEntry>, StoreError>;
}

/// Revisions that one step of a compaction folds, at most.
const COMPACT_STEP: u64 = 1_024;

/// The last revision that one step of a compaction folds. `compacted`: the last one that an earlier step has folded;
/// `stale`: the last one that is too old, of all before the first that is not.
fn fold_until(keep: Keep, compacted: u64, newest: u64, stale: u64) -> u64 {
    let needless = newest.saturating_sub(keep.revisions).max(stale);
    needless.clamp(compacted, compacted + COMPACT_STEP)
}

/// Refuses a revision that is not among those from `oldest` to `newest`.
fn check_kept(revision: Revision, oldest: Revision, newest: Revision) -> Result<(), StoreError> {
    if revision > newest {
        return Err(StoreError::NotYet { revision, oldest, newest });
    }
    if revision < oldest {
        return Err(StoreError::NotKept { revision, oldest, newest });
    }
    Ok(())
}

/// See [`Precondition::AfterLast`].
fn is_new(done: &Result<Committed, StoreError>) -> bool {
    matches!(done, Ok(Committed { replayed: false, .. }))
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
