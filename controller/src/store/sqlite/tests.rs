//! What only this store must do.

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

/// A database as version 1 made it: three revisions of a network, one of which touches accounts only.
fn version_1(path: &Path, compacted: u64) {
    let connection = Connection::open(path).expect("a file");
    let tables = "
        CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 0), revision INTEGER NOT NULL, compacted INTEGER NOT NULL);
        CREATE TABLE row (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
        CREATE TABLE log (revision INTEGER NOT NULL, position INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
            PRIMARY KEY (revision, position)) WITHOUT ROWID;
        CREATE TABLE request (id TEXT PRIMARY KEY, digest BLOB NOT NULL, revision INTEGER NOT NULL) WITHOUT ROWID;
        CREATE INDEX request_revision ON request (revision);
        CREATE TABLE audit (revision INTEGER NOT NULL, position INTEGER NOT NULL, time INTEGER NOT NULL,
            actor TEXT NOT NULL, change TEXT NOT NULL, PRIMARY KEY (revision, position)) WITHOUT ROWID;";
    let content = "
        INSERT INTO row VALUES ('network', 'corp', 1), ('cidr/1', 'web', 4), ('admin/alice', 'key', 3);
        INSERT INTO log VALUES (1, 0, 'network', 'corp'), (2, 0, 'cidr/1', 'old'), (2, 1, 'cidr/2', 'gone'),
            (3, 0, 'admin/alice', 'key'), (4, 0, 'cidr/1', 'web'), (4, 1, 'cidr/2', NULL);
        INSERT INTO request VALUES ('change/r', zeroblob(32), 4);
        INSERT INTO audit VALUES (1, 0, 100, 'root', 'init'), (2, 0, 200, 'root', 'cidr add'),
            (4, 0, 400, 'root', 'cidr rename');";
    connection.execute_batch(&format!("BEGIN; {tables} {content} COMMIT;")).expect("tables");
    connection.execute("INSERT INTO head VALUES (0, 5, ?1)", [compacted]).expect("a head");
    connection.execute("DELETE FROM log WHERE revision <= ?1", [compacted]).expect("compacted");
    for table in ["row", "log"] {
        connection.execute(&format!("UPDATE {table} SET value = CAST(value AS BLOB)"), []).expect("bytes");
    }
    connection.pragma_update(None, "application_id", 0x524d_5054).expect("updated");
    connection.pragma_update(None, "user_version", 1).expect("updated");
}

fn texts(snapshot: Snapshot) -> Vec<(String, String, u64)> {
    let text = |(key, row): (Key, Row)| (key.to_string(), String::from_utf8(row.value).expect("text"), row.revision.0);
    snapshot.rows.into_iter().map(text).collect()
}

fn expected(rows: &[(&str, &str, u64)]) -> Vec<(String, String, u64)> {
    rows.iter().map(|(key, value, revision)| ((*key).to_owned(), (*value).to_owned(), *revision)).collect()
}

#[test]
fn a_database_of_version_1_is_brought_up_to_date_with_its_history() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("controller.db");
    version_1(&path, 0);
    for _ in 0..2 {
        let store = SqliteStore::open(&path).expect("the store");
        let newest = expected(&[("admin/alice", "key", 3), ("cidr/1", "web", 4), ("network", "corp", 4)]);
        assert_eq!(texts(store.snapshot().expect("a snapshot")), newest);
        assert_eq!(texts(store.at(Revision(5), &Wanted::always()).expect("kept")), newest);
        let second = expected(&[("cidr/1", "old", 2), ("cidr/2", "gone", 2), ("network", "corp", 2)]);
        assert_eq!(texts(store.at(Revision(2), &Wanted::always()).expect("kept")), second);
        // The row `network` is written with each change of the policy, and with no other.
        let history = store
            .history(&Key::single("network"), Range { before: None, limit: 10 }, &Wanted::always())
            .expect("history")
            .entries;
        let times: Vec<_> = history.iter().map(|past| (past.revision.0, past.time, past.audit.len())).collect();
        assert_eq!(times, [(4, 400, 1), (2, 200, 1), (1, 100, 1)]);
        let request = RequestId { id: "change/r".to_owned(), digest: [0; 32] };
        assert_eq!(store.request(&request).expect("an answer"), Some(Revision(4)));
    }
    let store = SqliteStore::open(&path).expect("the store");
    assert_eq!(store.commit(&put("network", b"corp2")).expect("a commit").revision, Revision(6));
}

#[test]
fn a_compacted_database_of_version_1_begins_its_history_anew() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("controller.db");
    version_1(&path, 3);
    let store = SqliteStore::open(&path).expect("the store");
    let newest = expected(&[("admin/alice", "key", 3), ("cidr/1", "web", 4), ("network", "corp", 5)]);
    assert_eq!(texts(store.snapshot().expect("a snapshot")), newest);
    assert_eq!(texts(store.at(Revision(5), &Wanted::always()).expect("kept")), newest);
    assert_eq!(store.kept().expect("kept"), (Revision(5), Revision(5)));
    assert_eq!(store.audit(Range { before: None, limit: 10 }, &Wanted::always()).expect("audit").entries.len(), 3);
    store.commit(&put("network", b"corp2")).expect("a commit");
    assert_eq!(
        texts(store.at(Revision(6), &Wanted::always()).expect("kept"))[2],
        ("network".to_owned(), "corp2".to_owned(), 6)
    );
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
    store.inner().connection.pragma_update_and_check(None, "max_page_count", pages + 1_000, |_| Ok(())).expect("room");
    store.commit(&put("large", &vec![0; 4_096 * 16])).expect("goes on once there is room");
}
