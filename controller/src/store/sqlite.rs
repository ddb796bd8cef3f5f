//! The store of one controller: one SQLite file, write-ahead log, every commit on the disk before it is acknowledged.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use policy::Revision;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension as _, Transaction, TransactionBehavior, params};

use super::{
    AuditEntry, Commit, Committed, Entry, Key, Op, Precondition, RequestId, Snapshot, Store, StoreError, Watch,
    Watchers, check_lengths,
};

/// "RMPT": tells `file` and us whose database it is.
const APPLICATION_ID: i64 = 0x524d_5054;
/// Raised with every change of [`SCHEMA`].
const SCHEMA_VERSION: i64 = 1;
/// How long a reader of ours (a copy being made with `sqlite3 .backup`) may hold us up.
const BUSY: Duration = Duration::from_secs(5);

const SCHEMA: &str = "
    CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 0), revision INTEGER NOT NULL, compacted INTEGER NOT NULL);
    INSERT INTO head VALUES (0, 0, 0);
    CREATE TABLE row (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
    -- value NULL: deleted
    CREATE TABLE log (revision INTEGER NOT NULL, position INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
        PRIMARY KEY (revision, position)) WITHOUT ROWID;
    CREATE TABLE request (id TEXT PRIMARY KEY, digest BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX request_revision ON request (revision);
    CREATE TABLE audit (revision INTEGER NOT NULL, position INTEGER NOT NULL, time INTEGER NOT NULL,
        actor TEXT NOT NULL, change TEXT NOT NULL, PRIMARY KEY (revision, position)) WITHOUT ROWID;
";

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
        let fail = |error| failure(path, "be set up", error);
        connection.execute_batch(&format!("BEGIN; {SCHEMA} COMMIT;")).map_err(fail)?;
        connection.pragma_update(None, "application_id", APPLICATION_ID).map_err(fail)?;
        connection.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(fail)?;
        Ok(Self::new(path, connection, lock))
    }

    /// Opens an existing database: refused while another process has it open, or when it is not whole.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if !path.try_exists().map_err(io(path, path, "look for"))? {
            return Err(StoreError::Missing { path: path.to_owned() });
        }
        let lock = lock(path)?;
        let connection = connect(path)?;
        check(path, &connection)?;
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

    fn failed(&self, what: &'static str) -> impl Fn(rusqlite::Error) -> StoreError + '_ {
        move |error| failure(&self.path, what, error)
    }
}

/// Why a file of this database cannot be used.
fn io(database: &Path, path: &Path, what: &'static str) -> impl FnOnce(std::io::Error) -> StoreError {
    move |source| match source.kind() {
        std::io::ErrorKind::PermissionDenied => StoreError::NotAllowed { path: database.to_owned() },
        _ => StoreError::Io { path: path.to_owned(), what, source },
    }
}

/// One process per database. The file stays: removing it would let two processes lock two files of one name.
fn lock(database: &Path) -> Result<Flock<File>, StoreError> {
    let path = database.with_extension("lock");
    let io = |what| io(database, &path, what);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&path).map_err(io("open"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let written =
                lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| write!(lock, "{}", std::process::id()));
            // The pid is for the message below only: a full disk must not keep a whole database closed.
            if let Err(error) = written {
                tracing::warn!(path = %path.display(), %error, "the pid could not be written to the lock file");
            }
            Ok(lock)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            let pid = if pid.is_empty() { "unknown".to_owned() } else { pid.trim().to_owned() };
            Err(StoreError::InUse { path: database.to_owned(), pid })
        }
        Err((_, errno)) => Err(io("lock")(errno.into())),
    }
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let fail = |error| failure(path, "be opened", error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(fail)?;
    connection.busy_timeout(BUSY).map_err(fail)?;
    connection.pragma_update(None, "journal_mode", "WAL").map_err(fail)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(fail)?;
    connection.pragma_update(None, "foreign_keys", "ON").map_err(fail)?;
    Ok(connection)
}

/// Ours, of this version, and whole.
fn check(path: &Path, connection: &Connection) -> Result<(), StoreError> {
    let fail = |error| failure(path, "be checked", error);
    let corrupt = |reason: String| StoreError::Corrupt { path: path.to_owned(), reason };
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(fail);
    if pragma("application_id")? != APPLICATION_ID {
        return Err(corrupt("it is not a database of controllerd".to_owned()));
    }
    let found = pragma("user_version")?;
    if found != SCHEMA_VERSION {
        return Err(StoreError::Version { path: path.to_owned(), found, known: SCHEMA_VERSION });
    }
    let report: String = connection.pragma_query_value(None, "integrity_check", |row| row.get(0)).map_err(fail)?;
    if report != "ok" {
        return Err(corrupt(report.replace('\n', ", ")));
    }
    Ok(())
}

fn failure(path: &Path, what: &'static str, error: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    // The shared memory of the write-ahead log has no room: a full disk by another name.
    let extended = error.sqlite_error().map(|error| error.extended_code);
    if extended == Some(rusqlite::ffi::SQLITE_IOERR_SHMSIZE) {
        return StoreError::Full { path };
    }
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full { path },
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            StoreError::Corrupt { path, reason: error.to_string() }
        }
        _ => StoreError::Sqlite { path, what, source: error },
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
) -> rusqlite::Result<Option<StoreError>> {
    let conflict = |key: &Key, reason| Some(StoreError::Conflict { key: key.clone(), reason });
    Ok(match precondition {
        Precondition::At(expected) if expected.0 != revision => {
            Some(StoreError::Moved { expected: *expected, found: Revision(revision) })
        }
        Precondition::At(_) => None,
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
    transaction.execute("UPDATE head SET revision = ?1", [revision])?;
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
        transaction.execute("INSERT INTO request VALUES (?1, ?2, ?3)", params![id, digest, revision])?;
    }
    let mut audit = transaction.prepare_cached("INSERT INTO audit VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for (position, line) in commit.audit.iter().enumerate() {
        audit.execute(params![revision, position, commit.time, line.actor, line.change])?;
    }
    Ok(())
}

/// The revisions after this one that the log still has, in order.
fn backlog(connection: &Connection, after: u64, until: u64) -> rusqlite::Result<Vec<Entry>> {
    let mut entries: Vec<Entry> =
        (after + 1..=until).map(|revision| Entry { revision: Revision(revision), ops: Vec::new() }).collect();
    let mut statement = connection
        .prepare_cached("SELECT revision, key, value FROM log WHERE revision > ?1 ORDER BY revision, position")?;
    let rows = statement.query_map([after], |row| {
        let key = Key(row.get(1)?);
        let op = match row.get(2)? {
            Some(value) => Op::Put(key, value),
            None => Op::Delete(key),
        };
        Ok((row.get::<_, u64>(0)?, op))
    })?;
    for row in rows {
        let (revision, op) = row?;
        let index = usize::try_from(revision - after - 1).unwrap_or(usize::MAX);
        if let Some(entry) = entries.get_mut(index) {
            entry.ops.push(op);
        }
    }
    Ok(entries)
}

impl Store for SqliteStore {
    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let mut inner = self.inner();
        let read = |connection: &mut Connection| -> rusqlite::Result<Snapshot> {
            let transaction = connection.transaction()?;
            let (revision, _) = head(&transaction)?;
            let rows = transaction
                .prepare_cached("SELECT key, value FROM row")?
                .query_map([], |row| Ok((Key(row.get(0)?), row.get(1)?)))?
                .collect::<rusqlite::Result<_>>()?;
            Ok(Snapshot { revision: Revision(revision), rows })
        };
        read(&mut inner.connection).map_err(self.failed("be read"))
    }

    fn commit(&self, commit: &Commit) -> Result<Committed, StoreError> {
        check_lengths(commit)?;
        let fail = self.failed("be written");
        let mut inner = self.inner();
        let transaction = inner.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(&fail)?;
        if let Some(request) = &commit.request
            && let Some(revision) = same_request(find_request(&transaction, request).map_err(&fail)?, request)?
        {
            return Ok(Committed { revision, replayed: true });
        }
        let (current, _) = head(&transaction).map_err(&fail)?;
        for precondition in &commit.preconditions {
            if let Some(error) = violation(&transaction, current, precondition).map_err(&fail)? {
                return Err(error);
            }
        }
        write(&transaction, current + 1, commit).map_err(&fail)?;
        transaction.commit().map_err(&fail)?;
        let revision = Revision(current + 1);
        inner.watchers.publish(&Entry { revision, ops: commit.ops.clone() });
        Ok(Committed { revision, replayed: false })
    }

    fn request(&self, request: &RequestId) -> Result<Option<Revision>, StoreError> {
        let inner = self.inner();
        same_request(find_request(&inner.connection, request).map_err(self.failed("be read"))?, request)
    }

    fn watch(&self, after: Revision) -> Result<Watch, StoreError> {
        let fail = self.failed("be read");
        let mut inner = self.inner();
        let (revision, compacted) = head(&inner.connection).map_err(&fail)?;
        if after.0 < compacted {
            return Err(StoreError::Compacted { after, compacted: Revision(compacted) });
        }
        let entries = backlog(&inner.connection, after.0, revision).map_err(&fail)?;
        Ok(inner.watchers.watch(after, entries.into()))
    }

    fn compact(&self, before: Revision) -> Result<(), StoreError> {
        let mut inner = self.inner();
        let forget = |connection: &mut Connection| -> rusqlite::Result<()> {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let before = before.0.min(head(&transaction)?.0 + 1);
            transaction.execute("DELETE FROM log WHERE revision < ?1", [before])?;
            transaction.execute("DELETE FROM request WHERE revision < ?1", [before])?;
            transaction.execute("UPDATE head SET compacted = max(compacted, ?1)", [before.saturating_sub(1)])?;
            transaction.commit()
        };
        forget(&mut inner.connection).map_err(self.failed("be compacted"))
    }

    fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, StoreError> {
        let inner = self.inner();
        let read = || -> rusqlite::Result<Vec<AuditEntry>> {
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let entry = |row: &rusqlite::Row<'_>| {
                Ok(AuditEntry {
                    revision: Revision(row.get(0)?),
                    time: row.get(1)?,
                    actor: row.get(2)?,
                    change: row.get(3)?,
                })
            };
            inner
                .connection
                .prepare_cached(
                    "SELECT revision, time, actor, change FROM audit ORDER BY revision DESC, position DESC LIMIT ?1",
                )?
                .query_map([limit], entry)?
                .collect()
        };
        read().map_err(self.failed("be read"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store, and the directory that goes with it.
    #[derive(Debug)]
    struct Temporary {
        store: SqliteStore,
        _directory: tempfile::TempDir,
    }

    impl std::ops::Deref for Temporary {
        type Target = SqliteStore;

        fn deref(&self) -> &SqliteStore {
            &self.store
        }
    }

    fn temporary() -> Temporary {
        let directory = tempfile::tempdir().expect("a directory");
        let store = SqliteStore::create(&directory.path().join("controller.db")).expect("a store");
        Temporary { store, _directory: directory }
    }

    crate::store::contract::store_contract!(temporary());

    #[test]
    fn who_may_not_read_the_directory_is_not_told_to_make_a_network() {
        let database = Path::new("/state/controller.db");
        let refused = io(database, database, "look for")(std::io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(refused.contains("not allowed") && refused.contains("run as the owner"), "{refused}");
    }

    fn put(key: &str, value: &[u8]) -> Commit {
        Commit { ops: vec![Op::Put(Key::single(key), value.to_vec())], ..Commit::default() }
    }

    #[test]
    fn what_was_committed_is_there_after_a_restart() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("controller.db");
        let store = SqliteStore::create(&path).expect("a store");
        store.commit(&put("network", b"corp")).expect("a commit");
        let before = store.snapshot().expect("a snapshot");
        drop(store);
        assert_eq!(SqliteStore::open(&path).expect("the store").snapshot().expect("a snapshot"), before);
    }

    #[test]
    fn a_second_process_is_refused_by_the_first_ones_pid() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("controller.db");
        let store = SqliteStore::create(&path).expect("a store");
        let error = SqliteStore::open(&path).expect_err("in use").to_string();
        assert!(error.contains(&format!("`{}`", std::process::id())) && error.contains("stop"), "{error}");
        drop(store);
        SqliteStore::open(&path).expect("free again");
    }

    #[test]
    fn a_database_that_is_missing_foreign_damaged_or_newer_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("controller.db");
        assert!(matches!(SqliteStore::open(&path), Err(StoreError::Missing { .. })));

        std::fs::write(&path, b"garbage that is no database at all").expect("a file");
        assert!(matches!(SqliteStore::open(&path), Err(StoreError::Corrupt { .. })));
        assert!(matches!(SqliteStore::create(&path), Err(StoreError::Exists { .. })));
        std::fs::remove_file(&path).expect("removed");

        let store = SqliteStore::create(&path).expect("a store");
        for number in 0..200 {
            store.commit(&put(&format!("key{number}"), &[7; 500])).expect("a commit");
        }
        drop(store);
        let whole = std::fs::read(&path).expect("bytes");
        let mut damaged = whole.clone();
        for byte in &mut damaged[4_096 * 3..4_096 * 5] {
            *byte ^= 0x5a;
        }
        std::fs::write(&path, damaged).expect("written");
        let error = SqliteStore::open(&path).expect_err("damaged");
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");

        std::fs::write(&path, whole).expect("written");
        Connection::open(&path).expect("opened").pragma_update(None, "user_version", 99).expect("updated");
        assert!(matches!(SqliteStore::open(&path), Err(StoreError::Version { found: 99, .. })));
    }

    #[test]
    fn a_full_disk_fails_the_commit_and_changes_nothing() {
        let store = temporary();
        store.commit(&put("network", b"corp")).expect("a commit");
        let before = store.snapshot().expect("a snapshot");
        let pages: i64 = {
            let inner = store.inner();
            let pages = inner.connection.pragma_query_value(None, "page_count", |row| row.get(0)).expect("a number");
            inner.connection.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).expect("a limit");
            pages
        };
        let error = store.commit(&put("large", &vec![0; 4_096 * 16])).expect_err("full");
        assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
        assert_eq!(store.snapshot().expect("a snapshot"), before);
        store
            .inner()
            .connection
            .pragma_update_and_check(None, "max_page_count", pages + 1_000, |_| Ok(()))
            .expect("room");
        store.commit(&put("large", &vec![0; 4_096 * 16])).expect("goes on once there is room");
    }
}
