//! The files of a database: who may use them, and why they cannot be used.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::store::StoreError;

/// How long a reader of ours (a copy being made with `sqlite3 .backup`) may hold us up.
const BUSY: Duration = Duration::from_secs(5);

/// One process per database. The file stays: removing it would let two processes lock two files of one name.
pub(super) fn lock(database: &Path) -> Result<Flock<File>, StoreError> {
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

/// For the one who writes.
pub(super) fn connect(path: &Path) -> Result<Connection, StoreError> {
    let fail = |error| failure(path, "be opened", error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(fail)?;
    connection.busy_timeout(BUSY).map_err(fail)?;
    connection.pragma_update(None, "journal_mode", "WAL").map_err(fail)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(fail)?;
    connection.pragma_update(None, "foreign_keys", "ON").map_err(fail)?;
    Ok(connection)
}

/// For a question that holds up nobody who writes.
pub(super) fn connect_reader(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    Ok(connection)
}

/// Why a file of this database cannot be used.
pub(super) fn io(database: &Path, path: &Path, what: &'static str) -> impl FnOnce(std::io::Error) -> StoreError {
    move |source| match source.kind() {
        std::io::ErrorKind::PermissionDenied => StoreError::NotAllowed { path: database.to_owned() },
        _ => StoreError::Io { path: path.to_owned(), what, source },
    }
}

pub(super) fn failure(path: &Path, what: &'static str, error: rusqlite::Error) -> StoreError {
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
