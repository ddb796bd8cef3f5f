//! The store of one controller: one SQLite file, write-ahead log, every commit on the disk before it is acknowledged.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::Flock;
use policy::Revision;
use rusqlite::{Connection, ErrorCode, OptionalExtension as _, Row as Found, Transaction, TransactionBehavior, params};

use super::{
    AuditEntry, AuditLine, Commit, Committed, Entry, Keep, Key, Op, Page, Past, Precondition, Range, RequestId, Room,
    Row, Snapshot, Store, StoreError, Wanted, Watch, Watchers, check_kept, check_lengths, fold_until, is_new,
};

mod file;
mod schema;
#[cfg(test)]
mod tests;

use file::{connect, connect_reader, failure, io, lock};

/// Steps of SQLite's machine after which a question asks whether it is still wanted: some 10 us.
const STEPS: i32 = 1_000;

/// A database that this process alone writes. See [`SqliteStore::open`].
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    inner: Mutex<Inner>,
    /// Held for as long as the store lives; the kernel lets go of it even after SIGKILL.
    _lock: Flock<File>,
}

#[derive(Debug)]
struct Inner {
    connection: Connection,
    watchers: Watchers,
}

impl SqliteStore {
    /// Makes an empty database, readable by its owner only.
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        let lock = lock(path)?;
        let io = |source| StoreError::Io { path: path.to_owned(), what: "create", source };
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(StoreError::Exists { path: path.to_owned() });
            }
            Err(error) => return Err(io(error)),
        }
        let connection = connect(path)?;
        schema::create(&connection).map_err(|error| failure(path, "be set up", error))?;
        Ok(Self::new(path, connection, lock))
    }

    /// Opens an existing database: refused while another process has it open, or when it is not whole. One that an earlier
    /// version made is brought up to date.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if !path.try_exists().map_err(io(path, path, "look for"))? {
            return Err(StoreError::Missing { path: path.to_owned() });
        }
        let lock = lock(path)?;
        let mut connection = connect(path)?;
        schema::check(path, &mut connection)?;
        Ok(Self::new(path, connection, lock))
    }

    fn new(path: &Path, connection: Connection, lock: Flock<File>) -> Self {
        let inner = Inner { connection, watchers: Watchers::default() };
        Self { path: path.to_owned(), inner: Mutex::new(inner), _lock: lock }
    }

    /// A panic under the lock leaves a transaction that was rolled back.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A question of one transaction, on a connection of its own, which ends when nobody waits for the answer.
    fn read<T>(
        &self,
        wanted: &Wanted,
        ask: impl FnOnce(&Connection) -> rusqlite::Result<Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let read = || {
            let mut connection = connect_reader(&self.path)?;
            let over = wanted.clone();
            connection.progress_handler(STEPS, Some(move || over.is_over()))?;
            let transaction = connection.transaction()?;
            ask(&transaction)
        };
        match read() {
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted) => {
                Err(StoreError::Unwanted)
            }
            read => read.map_err(self.failed("be read"))?,
        }
    }

    fn failed(&self, what: &'static str) -> impl Fn(rusqlite::Error) -> StoreError + '_ {
        move |error| failure(&self.path, what, error)
    }
}

fn head(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    connection.query_row("SELECT revision, compacted FROM head", [], |row| Ok((row.get(0)?, row.get(1)?)))
}

fn find_request(connection: &Connection, request: &RequestId) -> rusqlite::Result<Option<([u8; 32], u64)>> {
    connection
        .prepare_cached("SELECT digest, revision FROM request WHERE id = ?1")?
        .query_row([&request.id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

fn same_request(found: Option<([u8; 32], u64)>, request: &RequestId) -> Result<Option<Revision>, StoreError> {
    match found {
        None => Ok(None),
        Some((digest, revision)) if digest == request.digest => Ok(Some(Revision(revision))),
        Some((_, revision)) => Err(StoreError::RequestReused { id: request.id.clone(), revision: Revision(revision) }),
    }
}

fn written_at(connection: &Connection, key: &Key) -> rusqlite::Result<Option<u64>> {
    connection
        .prepare_cached("SELECT revision FROM row WHERE key = ?1")?
        .query_row([key.as_str()], |row| row.get(0))
        .optional()
}

/// `None`: it holds.
fn violation(
    connection: &Connection,
    revision: u64,
    precondition: &Precondition,
    is_after_refused: bool,
) -> rusqlite::Result<Option<StoreError>> {
    let conflict = |key: &Key, reason| Some(StoreError::Conflict { key: key.clone(), reason });
    Ok(match precondition {
        Precondition::At(expected) if expected.0 != revision => {
            Some(StoreError::Moved { expected: *expected, found: Revision(revision) })
        }
        Precondition::AfterLast if is_after_refused => Some(StoreError::AfterRefused),
        Precondition::At(_) | Precondition::AfterLast => None,
        Precondition::Absent(key) => written_at(connection, key)?.and_then(|_| conflict(key, "exists already")),
        Precondition::Unchanged(key, since) => match written_at(connection, key)? {
            None => conflict(key, "is gone"),
            Some(written) if written > since.0 => conflict(key, "was changed meanwhile"),
            Some(_) => None,
        },
    })
}

/// Everything that one revision writes.
fn write(transaction: &Transaction<'_>, revision: u64, commit: &Commit) -> rusqlite::Result<()> {
    transaction.prepare_cached("UPDATE head SET revision = ?1")?.execute([revision])?;
    transaction.prepare_cached("INSERT INTO history VALUES (?1, ?2)")?.execute(params![revision, commit.time])?;
    let mut put =
        transaction.prepare_cached("INSERT OR REPLACE INTO row (key, value, revision) VALUES (?1, ?2, ?3)")?;
    let mut delete = transaction.prepare_cached("DELETE FROM row WHERE key = ?1")?;
    let mut log =
        transaction.prepare_cached("INSERT INTO log (revision, position, key, value) VALUES (?1, ?2, ?3, ?4)")?;
    for (position, op) in commit.ops.iter().enumerate() {
        let value = match op {
            Op::Put(key, value) => {
                put.execute(params![key.as_str(), value, revision])?;
                Some(value)
            }
            Op::Delete(key) => {
                delete.execute([key.as_str()])?;
                None
            }
        };
        log.execute(params![revision, position, op.key().as_str(), value])?;
    }
    if let Some(RequestId { id, digest }) = &commit.request {
        let mut request = transaction.prepare_cached("INSERT INTO request VALUES (?1, ?2, ?3)")?;
        request.execute(params![id, digest, revision])?;
    }
    let mut audit = transaction.prepare_cached("INSERT INTO audit VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for (position, line) in commit.audit.iter().enumerate() {
        audit.execute(params![revision, position, commit.time, line.actor, line.change])?;
    }
    Ok(())
}

/// Checks a commit and writes it. The inner error: it is refused, and nothing was written.
fn write_next(
    transaction: &Transaction<'_>,
    commit: &Commit,
    is_after_refused: bool,
) -> rusqlite::Result<Result<Committed, StoreError>> {
    if let Err(error) = check_lengths(commit) {
        return Ok(Err(error));
    }
    if let Some(request) = &commit.request {
        match same_request(find_request(transaction, request)?, request) {
            Ok(Some(revision)) => return Ok(Ok(Committed { revision, replayed: true })),
            Ok(None) => {}
            Err(error) => return Ok(Err(error)),
        }
    }
    let (newest, _) = head(transaction)?;
    for precondition in &commit.preconditions {
        if let Some(error) = violation(transaction, newest, precondition, is_after_refused)? {
            return Ok(Err(error));
        }
    }
    write(transaction, newest + 1, commit)?;
    Ok(Ok(Committed { revision: Revision(newest + 1), replayed: false }))
}

/// The revisions after `after` up to `until` that the log has, in order.
fn entries(connection: &Connection, after: u64, until: u64) -> rusqlite::Result<BTreeMap<Revision, Entry>> {
    let mut entries: BTreeMap<Revision, Entry> = connection
        .prepare_cached("SELECT revision, time FROM history WHERE revision > ?1 AND revision <= ?2")?
        .query_map([after, until], |row| {
            let revision = Revision(row.get(0)?);
            Ok((revision, Entry { revision, time: row.get(1)?, ops: Vec::new() }))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let mut statement = connection.prepare_cached(
        "SELECT revision, key, value FROM log WHERE revision > ?1 AND revision <= ?2 ORDER BY revision, position",
    )?;
    let ops = statement.query_map([after, until], |row| {
        let key = Key(row.get(1)?);
        let op = match row.get(2)? {
            Some(value) => Op::Put(key, value),
            None => Op::Delete(key),
        };
        Ok((Revision(row.get(0)?), op))
    })?;
    for op in ops {
        let (revision, op) = op?;
        if let Some(entry) = entries.get_mut(&revision) {
            entry.ops.push(op);
        }
    }
    Ok(entries)
}

fn row(found: &Found<'_>) -> rusqlite::Result<(Key, Row)> {
    Ok((Key(found.get(0)?), Row { value: found.get(1)?, revision: Revision(found.get(2)?) }))
}

/// The rows of a query for key, value and revision.
fn rows(connection: &Connection, query: &str) -> rusqlite::Result<BTreeMap<Key, Row>> {
    connection.prepare_cached(query)?.query_map([], row)?.collect()
}

/// The last revision before the first that is not older than `cutoff`.
fn stale(connection: &Connection, newest: u64, cutoff: u64) -> rusqlite::Result<u64> {
    let first: Option<u64> =
        connection.query_row("SELECT min(revision) FROM history WHERE time >= ?1", [cutoff], |row| row.get(0))?;
    Ok(first.map_or(newest, |first| first.saturating_sub(1)))
}

/// Folds the log up to a revision into the base.
fn fold(transaction: &Transaction<'_>, last: u64) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM base WHERE key IN (SELECT key FROM log WHERE revision <= ?1)", [last])?;
    transaction.execute(
        "INSERT INTO base SELECT key, value, revision FROM (
            SELECT key, value, revision,
                row_number() OVER (PARTITION BY key ORDER BY revision DESC, position DESC) AS place
            FROM log WHERE revision <= ?1)
        WHERE place = 1 AND value IS NOT NULL",
        [last],
    )?;
    for table in ["log", "history", "request"] {
        transaction.execute(&format!("DELETE FROM {table} WHERE revision <= ?1"), [last])?;
    }
    transaction.execute("UPDATE head SET compacted = ?1", [last]).map(drop)
}

/// See [`Store::history`].
fn history(connection: &Connection, key: &Key, range: Range) -> rusqlite::Result<Page<Past>> {
    let (before, limit) = bounds(range);
    let mut statement = connection.prepare_cached(
        "WITH wrote AS (
            SELECT DISTINCT revision FROM log WHERE key = ?1 AND revision < ?2 ORDER BY revision DESC LIMIT ?3)
        SELECT wrote.revision, history.time, audit.actor, audit.change
        FROM wrote JOIN history USING (revision) LEFT JOIN audit USING (revision)
        ORDER BY wrote.revision DESC, audit.position",
    )?;
    let mut found = statement.query(params![key.as_str(), before, limit])?;
    let (mut entries, mut room): (Vec<Past>, Room) = Default::default();
    while let Some(row) = found.next()? {
        let (revision, time) = (Revision(row.get(0)?), row.get(1)?);
        let (actor, change): (Option<String>, Option<String>) = (row.get(2)?, row.get(3)?);
        if !room.takes(revision, actor.as_deref().unwrap_or_default(), change.as_deref().unwrap_or_default()) {
            return Ok(Page { entries, is_cut: true });
        }
        if entries.last().is_none_or(|past| past.revision != revision) {
            entries.push(Past { revision, time, audit: Vec::new() });
        }
        if let (Some(past), Some(actor), Some(change)) = (entries.last_mut(), actor, change) {
            past.audit.push(AuditLine { actor, change });
        }
    }
    Ok(Page { entries, is_cut: false })
}

fn audit(connection: &Connection, range: Range) -> rusqlite::Result<Page<AuditEntry>> {
    let (before, limit) = bounds(range);
    let mut statement = connection.prepare_cached(
        "SELECT revision, time, actor, change FROM audit WHERE revision < ?1
        ORDER BY revision DESC, position DESC LIMIT ?2",
    )?;
    let mut found = statement.query(params![before, limit])?;
    let (mut entries, mut room) = (Vec::new(), Room::default());
    while let Some(row) = found.next()? {
        let entry =
            AuditEntry { revision: Revision(row.get(0)?), time: row.get(1)?, actor: row.get(2)?, change: row.get(3)? };
        if !room.takes(entry.revision, &entry.actor, &entry.change) {
            return Ok(Page { entries, is_cut: true });
        }
        entries.push(entry);
    }
    Ok(Page { entries, is_cut: false })
}

/// As SQLite has them, whose integers are signed.
fn bounds(Range { before, limit }: Range) -> (i64, i64) {
    let before = before.map_or(i64::MAX, |before| i64::try_from(before.0).unwrap_or(i64::MAX));
    (before, i64::try_from(limit).unwrap_or(i64::MAX))
}

impl Store for SqliteStore {
    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        self.read(&Wanted::always(), |connection| {
            let (revision, _) = head(connection)?;
            Ok(Ok(Snapshot {
                revision: Revision(revision),
                rows: rows(connection, "SELECT key, value, revision FROM row")?,
            }))
        })
    }

    fn at(&self, revision: Revision, wanted: &Wanted) -> Result<Snapshot, StoreError> {
        self.read(wanted, |connection| {
            let (newest, compacted) = head(connection)?;
            if let Err(error) = check_kept(revision, Revision(compacted), Revision(newest)) {
                return Ok(Err(error));
            }
            let rows = rows(connection, "SELECT key, value, revision FROM base")?;
            let mut snapshot = Snapshot { revision: Revision(compacted), rows };
            for entry in entries(connection, compacted, revision.0)?.into_values() {
                snapshot.apply(entry.revision, &entry.ops);
            }
            Ok(Ok(snapshot))
        })
    }

    fn kept(&self) -> Result<(Revision, Revision), StoreError> {
        let (newest, compacted) = self.read(&Wanted::always(), |connection| Ok(Ok(head(connection)?)))?;
        Ok((Revision(compacted), Revision(newest)))
    }

    fn commit_all(&self, commits: &[Commit]) -> Result<Vec<Result<Committed, StoreError>>, StoreError> {
        let mut inner = self.inner();
        let commit_all = |connection: &mut Connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let mut written: Vec<Result<Committed, StoreError>> = Vec::new();
            for commit in commits {
                let is_after_refused = written.last().is_some_and(|last| !is_new(last));
                written.push(write_next(&transaction, commit, is_after_refused)?);
            }
            transaction.commit()?;
            Ok(written)
        };
        let written = commit_all(&mut inner.connection).map_err(self.failed("be written"))?;
        for (commit, committed) in commits.iter().zip(&written) {
            if let Ok(Committed { revision, replayed: false }) = committed {
                let Commit { ops, time, .. } = commit;
                inner.watchers.publish(&Entry { revision: *revision, time: *time, ops: ops.clone() });
            }
        }
        Ok(written)
    }

    fn request(&self, request: &RequestId) -> Result<Option<Revision>, StoreError> {
        let inner = self.inner();
        same_request(find_request(&inner.connection, request).map_err(self.failed("be read"))?, request)
    }

    fn watch(&self, after: Revision) -> Result<Watch, StoreError> {
        let fail = self.failed("be read");
        let mut inner = self.inner();
        let (newest, compacted) = head(&inner.connection).map_err(&fail)?;
        if after.0 < compacted {
            return Err(StoreError::Compacted { after, compacted: Revision(compacted) });
        }
        let entries = entries(&inner.connection, after.0, newest).map_err(&fail)?;
        Ok(inner.watchers.watch(after, entries.into_values().collect()))
    }

    fn compact(&self, keep: Keep, now: u64) -> Result<bool, StoreError> {
        let mut inner = self.inner();
        let compact = |connection: &mut Connection| -> rusqlite::Result<bool> {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let (newest, compacted) = head(&transaction)?;
            let stale = stale(&transaction, newest, now.saturating_sub(keep.age.as_secs()))?;
            let last = fold_until(keep, compacted, newest, stale);
            if last > compacted {
                fold(&transaction, last)?;
                transaction.commit()?;
            }
            Ok(fold_until(keep, last, newest, stale) > last)
        };
        compact(&mut inner.connection).map_err(self.failed("be compacted"))
    }

    fn history(&self, key: &Key, range: Range, wanted: &Wanted) -> Result<Page<Past>, StoreError> {
        self.read(wanted, |connection| Ok(Ok(history(connection, key, range)?)))
    }

    fn audit(&self, range: Range, wanted: &Wanted) -> Result<Page<AuditEntry>, StoreError> {
        self.read(wanted, |connection| Ok(Ok(audit(connection, range)?)))
    }
}
