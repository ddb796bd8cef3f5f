//! What every store must do. `store_contract!(expression that makes a pointer to an empty store)` makes
//! these the tests of one.

use std::time::Duration;

use policy::Revision;

use super::{AuditLine, Commit, Entry, KEY_MAX, Key, Op, Precondition, REQUEST_ID_MAX, RequestId, Store, StoreError};

macro_rules! store_contract {
    ($make:expr) => {
        crate::store::contract::store_contract!(@cases $make;
            starts_empty, commits_count_revisions, a_commit_is_whole_or_nothing, preconditions_are_checked,
            a_request_is_done_once, a_request_id_serves_one_request, audit_is_newest_first, watch_sees_every_revision,
            watch_waits_no_longer_than_asked, compact_forgets_history_only, lengths_are_bounded,
            concurrent_commits_at_one_revision_have_one_winner);
    };
    (@cases $make:expr; $($case:ident),*) => {
        $(
            #[test]
            fn $case() {
                let made = $make;
                crate::store::contract::$case(&*made);
            }
        )*
    };
}
pub(crate) use store_contract;

const NOW: u64 = 1_700_000_000;
const SOON: Duration = Duration::from_millis(20);

fn key(name: &str) -> Key {
    Key::new("test", name)
}

fn put(name: &str, value: &str) -> Op {
    Op::Put(key(name), value.as_bytes().to_vec())
}

fn commit(ops: impl Into<Vec<Op>>) -> Commit {
    Commit { ops: ops.into(), time: NOW, ..Commit::default() }
}

fn request(id: &str, content: u8) -> RequestId {
    RequestId { id: id.to_owned(), digest: [content; 32] }
}

pub(crate) fn starts_empty(store: &dyn Store) {
    let snapshot = store.snapshot().expect("a snapshot");
    assert_eq!((snapshot.revision, snapshot.rows.len()), (Revision(0), 0));
    assert_eq!(store.audit(10).expect("audit"), []);
}

pub(crate) fn commits_count_revisions(store: &dyn Store) {
    for expected in 1..=3 {
        let committed = store.commit(&commit([put("a", &expected.to_string())])).expect("a commit");
        assert_eq!((committed.revision, committed.replayed), (Revision(expected), false));
    }
    store.commit(&commit([])).expect("a revision without a change of rows");
    store.commit(&commit([put("b", "x"), Op::Delete(key("a")), Op::Delete(key("never"))])).expect("a commit");
    let snapshot = store.snapshot().expect("a snapshot");
    assert_eq!(snapshot.revision, Revision(5));
    assert_eq!(snapshot.rows.into_iter().collect::<Vec<_>>(), [(key("b"), b"x".to_vec())]);
}

pub(crate) fn a_commit_is_whole_or_nothing(store: &dyn Store) {
    store.commit(&commit([put("a", "1")])).expect("a commit");
    let before = store.snapshot().expect("a snapshot");
    let refused = Commit {
        request: Some(request("r", 1)),
        preconditions: vec![Precondition::At(Revision(1)), Precondition::Absent(key("a"))],
        audit: vec![AuditLine { actor: "root".to_owned(), change: "nothing".to_owned() }],
        ..commit([put("b", "2"), Op::Delete(key("a"))])
    };
    store.commit(&refused).expect_err("a precondition fails");
    assert_eq!(store.snapshot().expect("a snapshot"), before);
    assert_eq!(store.audit(10).expect("audit"), []);
    assert_eq!(store.request(&request("r", 1)).expect("an answer"), None);
}

pub(crate) fn preconditions_are_checked(store: &dyn Store) {
    store.commit(&commit([put("old", "1")])).expect("a commit");
    store.commit(&commit([put("new", "1")])).expect("a commit");
    let attempt = |precondition: Precondition| {
        store.commit(&Commit { preconditions: vec![precondition], ..commit([]) }).map(|committed| committed.revision)
    };
    let moved = attempt(Precondition::At(Revision(1)));
    assert!(matches!(moved, Err(StoreError::Moved { expected: Revision(1), found: Revision(2) })), "{moved:?}");
    for precondition in [
        Precondition::Absent(key("old")),
        Precondition::Unchanged(key("new"), Revision(1)),
        Precondition::Unchanged(key("gone"), Revision(2)),
    ] {
        let refused = attempt(precondition.clone());
        assert!(matches!(refused, Err(StoreError::Conflict { .. })), "{precondition:?}: {refused:?}");
    }
    for (precondition, revision) in [
        (Precondition::At(Revision(2)), 3),
        (Precondition::Absent(key("gone")), 4),
        (Precondition::Unchanged(key("old"), Revision(1)), 5),
        (Precondition::Unchanged(key("new"), Revision(2)), 6),
    ] {
        assert_eq!(attempt(precondition).expect("it holds"), Revision(revision));
    }
}

pub(crate) fn a_request_is_done_once(store: &dyn Store) {
    let once = Commit {
        request: Some(request("r", 1)),
        preconditions: vec![Precondition::Absent(key("a"))],
        audit: vec![AuditLine { actor: "root".to_owned(), change: "put a".to_owned() }],
        ..commit([put("a", "1")])
    };
    assert_eq!(store.request(&request("r", 1)).expect("an answer"), None);
    store.commit(&once).expect("a commit");
    store.commit(&commit([put("a", "2")])).expect("a commit");
    let again = store.commit(&once).expect("the same answer");
    assert_eq!((again.revision, again.replayed), (Revision(1), true));
    assert_eq!(store.request(&request("r", 1)).expect("an answer"), Some(Revision(1)));
    let snapshot = store.snapshot().expect("a snapshot");
    assert_eq!((snapshot.revision, &snapshot.rows[&key("a")][..]), (Revision(2), &b"2"[..]));
    assert_eq!(store.audit(10).expect("audit").len(), 1);
}

pub(crate) fn a_request_id_serves_one_request(store: &dyn Store) {
    let first = Commit { request: Some(request("r", 1)), ..commit([put("a", "1")]) };
    let other = Commit { request: Some(request("r", 2)), ..commit([put("a", "2")]) };
    store.commit(&first).expect("a commit");
    let refused = store.commit(&other);
    assert!(matches!(refused, Err(StoreError::RequestReused { revision: Revision(1), .. })), "{refused:?}");
    assert!(matches!(store.request(&request("r", 2)), Err(StoreError::RequestReused { .. })));
    assert_eq!(store.snapshot().expect("a snapshot").revision, Revision(1));
}

pub(crate) fn audit_is_newest_first(store: &dyn Store) {
    let line = |change: &str| AuditLine { actor: "admin:alice".to_owned(), change: change.to_owned() };
    store.commit(&Commit { audit: vec![line("one"), line("two")], ..commit([]) }).expect("a commit");
    store.commit(&Commit { audit: vec![line("three")], ..commit([]) }).expect("a commit");
    let entries = store.audit(2).expect("audit");
    let seen: Vec<_> = entries.iter().map(|entry| (entry.revision.0, entry.change.as_str())).collect();
    assert_eq!(seen, [(2, "three"), (1, "two")]);
    assert!(entries.iter().all(|entry| entry.time == NOW && entry.actor == "admin:alice"));
}

pub(crate) fn watch_sees_every_revision(store: &dyn Store) {
    let ops = [vec![put("a", "1")], vec![], vec![Op::Delete(key("a")), put("b", "2")], vec![put("c", "3")]];
    for ops in &ops[..3] {
        store.commit(&commit(ops.clone())).expect("a commit");
    }
    let mut watch = store.watch(Revision(1)).expect("a watch");
    store.commit(&commit(ops[3].clone())).expect("a commit");
    for revision in 2..=4_u64 {
        let entry = watch.next(SOON).expect("no gap").expect("a revision");
        let expected = ops[usize::try_from(revision).expect("small") - 1].clone();
        assert_eq!(entry, Entry { revision: Revision(revision), ops: expected });
    }
}

pub(crate) fn watch_waits_no_longer_than_asked(store: &dyn Store) {
    let mut watch = store.watch(Revision(0)).expect("a watch");
    assert!(watch.next(SOON).expect("no gap").is_none());
    store.commit(&commit([])).expect("a commit");
    assert!(watch.next(SOON).expect("no gap").is_some());
}

pub(crate) fn compact_forgets_history_only(store: &dyn Store) {
    let audit = vec![AuditLine { actor: "root".to_owned(), change: "put".to_owned() }];
    for number in 1..=4 {
        let request = Some(request(&format!("r{number}"), 1));
        store
            .commit(&Commit { request, audit: audit.clone(), ..commit([put(&number.to_string(), "x")]) })
            .expect("a commit");
    }
    let before = store.snapshot().expect("a snapshot");
    store.compact(Revision(3)).expect("compacted");
    assert_eq!(store.snapshot().expect("a snapshot"), before);
    assert_eq!(store.audit(10).expect("audit").len(), 4);
    let refused = store.watch(Revision(1));
    assert!(matches!(refused, Err(StoreError::Compacted { compacted: Revision(2), .. })), "{refused:?}");
    let mut watch = store.watch(Revision(2)).expect("a watch");
    assert_eq!(watch.next(SOON).expect("no gap").expect("a revision").revision, Revision(3));
    assert_eq!(store.request(&request("r2", 1)).expect("an answer"), None);
    assert_eq!(store.request(&request("r3", 1)).expect("an answer"), Some(Revision(3)));
    store.compact(Revision(1)).expect("nothing to do");
    store.compact(Revision(99)).expect("compacts what there is");
    assert_eq!(store.commit(&commit([])).expect("a commit").revision, Revision(5));
    assert_eq!(
        store.watch(Revision(4)).expect("a watch").next(SOON).expect("no gap").expect("one").revision,
        Revision(5)
    );
}

pub(crate) fn lengths_are_bounded(store: &dyn Store) {
    let long_key = commit([Op::Put(key(&"k".repeat(KEY_MAX)), Vec::new())]);
    let long_id = Commit { request: Some(request(&"r".repeat(REQUEST_ID_MAX + 1), 1)), ..commit([]) };
    let no_id = Commit { request: Some(request("", 1)), ..commit([]) };
    for refused in [long_key, long_id, no_id] {
        assert!(matches!(store.commit(&refused), Err(StoreError::TooLong { .. })));
    }
    assert_eq!(store.snapshot().expect("a snapshot").revision, Revision(0));
}

pub(crate) fn concurrent_commits_at_one_revision_have_one_winner(store: &dyn Store) {
    const RACERS: usize = 8;
    let attempt = || {
        let at = Commit { preconditions: vec![Precondition::At(Revision(0))], ..commit([put("a", "1")]) };
        store.commit(&at).is_ok()
    };
    let winners = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..RACERS).map(|_| scope.spawn(attempt)).collect();
        racers.into_iter().map(|racer| racer.join().expect("no panic")).filter(|won| *won).count()
    });
    assert_eq!((winners, store.snapshot().expect("a snapshot").revision), (1, Revision(1)));
}
