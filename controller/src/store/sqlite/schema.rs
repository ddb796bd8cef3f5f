//! The tables, how a database is known, and how one of an earlier version is brought up to date.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::file::failure;
use crate::store::StoreError;

/// "RMPT": tells `file` and us whose database it is.
const APPLICATION_ID: i64 = 0x524d_5054;
/// Raised with every change of [`SCHEMA`].
const VERSION: i64 = 2;
const SCHEMA: &str = "
    -- compacted: the revision of the base
    CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 0), revision INTEGER NOT NULL, compacted INTEGER NOT NULL);
    INSERT INTO head VALUES (0, 0, 0);
    -- the newest rows, and the revision that wrote each
    CREATE TABLE row (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
    -- value NULL: deleted
    CREATE TABLE log (revision INTEGER NOT NULL, position INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
        PRIMARY KEY (revision, position)) WITHOUT ROWID;
    CREATE TABLE request (id TEXT PRIMARY KEY, digest BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX request_revision ON request (revision);
    CREATE TABLE audit (revision INTEGER NOT NULL, position INTEGER NOT NULL, time INTEGER NOT NULL,
        actor TEXT NOT NULL, change TEXT NOT NULL, PRIMARY KEY (revision, position)) WITHOUT ROWID;
";

/// What version 2 adds: when each revision of the log was, and the rows that the log begins from.
const HISTORY: &str = "
    CREATE TABLE history (revision INTEGER PRIMARY KEY, time INTEGER NOT NULL);
    CREATE TABLE base (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX log_key ON log (key, revision);
";

/// Version 1 kept no rows to begin from: a log that is not whole tells nothing of what was.
const START_OVER: &str = "
    UPDATE row SET revision = (SELECT revision FROM head) WHERE key = 'network';
    INSERT INTO base SELECT key, value, revision FROM row;
    UPDATE head SET compacted = revision;
    DELETE FROM log;
";

/// Version 1 wrote the row `network` only where it differed, and a revision's time only with its audit lines.
const CARRY_OVER: &str = "
    INSERT INTO log (revision, position, key, value)
        SELECT entry.revision, max(entry.position) + 1, 'network', (
            SELECT network.value FROM log AS network
            WHERE network.key = 'network' AND network.revision <= entry.revision ORDER BY network.revision DESC LIMIT 1)
        FROM log AS entry
        GROUP BY entry.revision
        HAVING NOT max(entry.key = 'network')
            AND max(substr(entry.key, 1, instr(entry.key, '/')) IN ('cidr/', 'node/', 'group/', 'service/', 'rule/'));
    UPDATE row SET revision = (SELECT max(revision) FROM log WHERE key = 'network') WHERE key = 'network';
    WITH RECURSIVE number (revision) AS (
        SELECT 1 WHERE (SELECT revision FROM head) > 0
        UNION ALL SELECT revision + 1 FROM number WHERE revision < (SELECT revision FROM head))
    INSERT INTO history
        SELECT revision, coalesce((SELECT max(time) FROM audit WHERE audit.revision <= number.revision), 0) FROM number;
";

/// Makes the tables of an empty database.
pub(super) fn create(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(&format!("BEGIN; {SCHEMA} {HISTORY} COMMIT;"))?;
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    connection.pragma_update(None, "user_version", VERSION)
}

/// Ours, whole, and of this version or brought up to it.
pub(super) fn check(path: &Path, connection: &mut Connection) -> Result<(), StoreError> {
    let fail = |error| failure(path, "be checked", error);
    let corrupt = |reason: String| StoreError::Corrupt { path: path.to_owned(), reason };
    let pragma = |name| connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(fail);
    if pragma("application_id")? != APPLICATION_ID {
        return Err(corrupt("it is not a database of controllerd".to_owned()));
    }
    let found = pragma("user_version")?;
    if !(1..=VERSION).contains(&found) {
        return Err(StoreError::Version { path: path.to_owned(), found, known: VERSION });
    }
    let report: String = connection.pragma_query_value(None, "integrity_check", |row| row.get(0)).map_err(fail)?;
    if report != "ok" {
        return Err(corrupt(report.replace('\n', ", ")));
    }
    if found == 1 {
        migrate(connection).map_err(|error| failure(path, "be brought up to date", error))?;
        tracing::info!(path = %path.display(), from = found, to = VERSION, "the database was brought up to date");
    }
    Ok(())
}

/// From version 1, all or nothing.
fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let compacted: i64 = transaction.query_row("SELECT compacted FROM head", [], |row| row.get(0))?;
    transaction.execute_batch(HISTORY)?;
    transaction.execute_batch(if compacted == 0 { CARRY_OVER } else { START_OVER })?;
    transaction.pragma_update(None, "user_version", VERSION)?;
    transaction.commit()
}
