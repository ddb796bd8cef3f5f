//! What every store must do. `store_contract!(expression that makes a pointer to an empty store)` makes
//! these the tests of one.

use std::time::Duration;

use policy::Revision;

use super::{
    AuditEntry, AuditLine, COMPACT_STEP, Commit, Committed, Entry, KEY_MAX, Keep, Key, Op, PAGE_BYTES, Page, Past,
    Precondition, REQUEST_ID_MAX, Range, RequestId, Row, Snapshot, Store, StoreError, Wanted,
};

macro_rules! store_contract {
    ($make:expr) => {
        crate::store::contract::store_contract!(@cases $make;
            starts_empty, commits_count_revisions, rows_carry_the_revision_that_wrote_them, a_commit_is_whole_or_nothing, preconditions_are_checked,
            a_request_is_done_once, a_request_id_serves_one_request, audit_is_newest_first, watch_sees_every_revision,
            watch_waits_no_longer_than_asked, every_kept_revision_is_there, compact_forgets_history_only,
            history_is_bounded_by_count_and_age, a_compaction_is_done_in_steps, the_history_of_a_row_says_who_wrote_it, a_page_ends_where_it_is_long_enough,
            what_nobody_waits_for_is_given_up,
            a_batch_is_many_revisions, a_batch_is_in_order, what_builds_on_a_refused_commit_is_refused, lengths_are_bounded,
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

fn row(value: &str, revision: u64) -> Row {
    Row { value: value.as_bytes().to_vec(), revision: Revision(revision) }
}

/// Keeps that many, however old.
fn newest(revisions: u64) -> Keep {
    Keep { revisions, age: Duration::from_secs(NOW) }
}

/// To the end.
fn compact(store: &dyn Store, keep: Keep) {
    while store.compact(keep, NOW).expect("compacted") {}
}

fn range(limit: usize) -> Range {
    Range { before: None, limit }
}

fn audited(store: &dyn Store, limit: usize) -> Vec<AuditEntry> {
    let Page { entries, is_cut } = store.audit(range(limit), &Wanted::always()).expect("audit");
    assert!(!is_cut);
    entries
}

fn written(store: &dyn Store, row: &Key, limit: usize) -> Vec<Past> {
    let Page { entries, is_cut } = store.history(row, range(limit), &Wanted::always()).expect("history");
    assert!(!is_cut);
    entries
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
    assert_eq!(audited(store, 10), []);
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
    assert_eq!(snapshot.rows.into_iter().collect::<Vec<_>>(), [(key("b"), row("x", 5))]);
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
    assert_eq!(audited(store, 10), []);
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
    assert_eq!((snapshot.revision, &snapshot.rows[&key("a")]), (Revision(2), &row("2", 2)));
    assert_eq!(audited(store, 10).len(), 1);
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
    let entries = audited(store, 2);
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
        assert_eq!(entry, Entry { revision: Revision(revision), time: NOW, ops: expected });
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
    compact(store, newest(2));
    assert_eq!(store.snapshot().expect("a snapshot"), before);
    assert_eq!(audited(store, 10).len(), 4);
    let refused = store.watch(Revision(1));
    assert!(matches!(refused, Err(StoreError::Compacted { compacted: Revision(2), .. })), "{refused:?}");
    let mut watch = store.watch(Revision(2)).expect("a watch");
    assert_eq!(watch.next(SOON).expect("no gap").expect("a revision").revision, Revision(3));
    assert_eq!(store.request(&request("r2", 1)).expect("an answer"), None);
    assert_eq!(store.request(&request("r3", 1)).expect("an answer"), Some(Revision(3)));
    compact(store, newest(99));
    assert_eq!(store.kept().expect("kept"), (Revision(2), Revision(4)), "what was folded stays folded");
    compact(store, newest(0));
    assert_eq!(store.kept().expect("kept"), (Revision(4), Revision(4)));
    assert_eq!(store.commit(&commit([])).expect("a commit").revision, Revision(5));
    assert_eq!(
        store.watch(Revision(4)).expect("a watch").next(SOON).expect("no gap").expect("one").revision,
        Revision(5)
    );
}

pub(crate) fn rows_carry_the_revision_that_wrote_them(store: &dyn Store) {
    store.commit(&commit([put("a", "1"), put("b", "1")])).expect("a commit");
    store.commit(&commit([put("b", "2")])).expect("a commit");
    let rows = store.snapshot().expect("a snapshot").rows;
    assert_eq!((&rows[&key("a")], &rows[&key("b")]), (&row("1", 1), &row("2", 2)));
}

pub(crate) fn every_kept_revision_is_there(store: &dyn Store) {
    let ops = [
        vec![put("a", "1"), put("b", "1")],
        vec![put("a", "2")],
        vec![],
        vec![Op::Delete(key("b")), put("c", "1")],
        vec![put("b", "again"), Op::Delete(key("a")), put("a", "3"), Op::Delete(key("c"))],
        vec![Op::Delete(key("a"))],
    ];
    let mut were: Vec<Snapshot> = vec![store.snapshot().expect("a snapshot")];
    for ops in ops {
        store.commit(&commit(ops)).expect("a commit");
        were.push(store.snapshot().expect("a snapshot"));
    }
    for oldest in 0..=6_u64 {
        compact(store, newest(6 - oldest));
        assert_eq!(store.kept().expect("kept"), (Revision(oldest), Revision(6)));
        for was in &were {
            let found = store.at(was.revision, &Wanted::always());
            if was.revision.0 < oldest {
                let expected = (was.revision, Revision(oldest), Revision(6));
                let Err(StoreError::NotKept { revision, oldest, newest }) = found else { panic!("{found:?}") };
                assert_eq!((revision, oldest, newest), expected);
            } else {
                assert_eq!(&found.expect("kept"), was);
            }
        }
        assert!(matches!(
            store.at(Revision(7), &Wanted::always()),
            Err(StoreError::NotYet { newest: Revision(6), .. })
        ));
    }
}

pub(crate) fn history_is_bounded_by_count_and_age(store: &dyn Store) {
    const DAY: u64 = 86_400;
    for days in [50, 40, 30, 20, 10, 0] {
        store.commit(&Commit { time: NOW - days * DAY, ..commit([put("a", "x")]) }).expect("a commit");
    }
    let oldest = |revisions, days| {
        compact(store, Keep { revisions, age: Duration::from_secs(days * DAY) });
        store.kept().expect("kept").0.0
    };
    assert_eq!(oldest(100, 100), 0);
    assert_eq!(oldest(100, 45), 1, "the first is too old");
    assert_eq!(oldest(100, 30), 2, "the third is as old as may be");
    assert_eq!(oldest(3, 30), 3, "there are too many");
    assert_eq!(oldest(3, 5), 5, "the age says more than the count");
    assert_eq!(oldest(3, 0), 5, "the newest is never too old");
}

pub(crate) fn a_compaction_is_done_in_steps(store: &dyn Store) {
    let total = COMPACT_STEP + 10;
    let commits: Vec<_> = (0..total).map(|number| commit([put("a", &number.to_string())])).collect();
    store.commit_all(&commits).expect("commits");
    assert!(store.compact(newest(5), NOW).expect("compacted"), "there is more to do");
    assert_eq!(store.kept().expect("kept").0, Revision(COMPACT_STEP));
    assert!(!store.compact(newest(5), NOW).expect("compacted"));
    assert_eq!(store.kept().expect("kept").0, Revision(total - 5));
}

pub(crate) fn the_history_of_a_row_says_who_wrote_it(store: &dyn Store) {
    let line = |change: &str| AuditLine { actor: "admin:alice".to_owned(), change: change.to_owned() };
    let lines = |changes: &[&str]| changes.iter().map(|change| line(change)).collect::<Vec<_>>();
    for (time, row, audit) in [
        (1, "a", lines(&["one", "two"])),
        (2, "b", lines(&["other"])),
        (3, "a", lines(&[])),
        (4, "a", lines(&["three"])),
    ] {
        store.commit(&Commit { audit, time, ..commit([put(row, "x"), put("c", "x")]) }).expect("a commit");
    }
    let past =
        |revision, changes: &[&str]| Past { revision: Revision(revision), time: revision, audit: lines(changes) };
    let (first, third, fourth) = (past(1, &["one", "two"]), past(3, &[]), past(4, &["three"]));
    assert_eq!(written(store, &key("a"), 10), [fourth.clone(), third.clone(), first]);
    assert_eq!(written(store, &key("a"), 2), [fourth.clone(), third]);
    compact(store, newest(1));
    assert_eq!(written(store, &key("a"), 10), [fourth]);
    assert_eq!(written(store, &key("never"), 10), []);
}

/// One revision has its lines together, however long they are.
pub(crate) fn a_page_ends_where_it_is_long_enough(store: &dyn Store) {
    let line = || AuditLine { actor: "root".to_owned(), change: "x".repeat(PAGE_BYTES / 4) };
    for _ in 0..4 {
        store.commit(&Commit { audit: vec![line(), line(), line()], ..commit([put("a", "x")]) }).expect("a commit");
    }
    let wanted = Wanted::always();
    let mut seen = (Vec::new(), Vec::new());
    for (before, more) in [(None, true), (Some(Revision(3)), false), (Some(Revision(1)), false)] {
        let range = Range { before, limit: 100 };
        let past = store.history(&key("a"), range, &wanted).expect("history");
        let audit = store.audit(range, &wanted).expect("audit");
        assert_eq!((past.is_cut, audit.is_cut), (more, more), "before {before:?}");
        seen.0.extend(past.entries.iter().map(|past| (past.revision.0, past.audit.len())));
        seen.1.extend(audit.entries.iter().map(|entry| entry.revision.0));
    }
    assert_eq!(seen.0, [(4, 3), (3, 3), (2, 3), (1, 3)]);
    assert_eq!(seen.1, [4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1]);
}

pub(crate) fn what_nobody_waits_for_is_given_up(store: &dyn Store) {
    let batch: Vec<_> = (0..1_000)
        .map(|number: u32| {
            let audit = vec![AuditLine { actor: "root".to_owned(), change: number.to_string() }];
            Commit { audit, ..commit([put("a", "x"), put("b", "x")]) }
        })
        .collect();
    store.commit_all(&batch).expect("commits");
    let (asked, wanted) = Wanted::new();
    drop(asked);
    let unwanted = |error| matches!(error, StoreError::Unwanted);
    assert!(store.at(Revision(999), &wanted).is_err_and(unwanted));
    assert!(store.history(&key("a"), range(1_000), &wanted).is_err_and(unwanted));
    assert!(store.audit(range(1_000), &wanted).is_err_and(unwanted));
}

pub(crate) fn a_batch_is_many_revisions(store: &dyn Store) {
    let audit = |change: &str| vec![AuditLine { actor: "root".to_owned(), change: change.to_owned() }];
    let batch = [
        Commit { request: Some(request("r1", 1)), audit: audit("one"), ..commit([put("a", "1")]) },
        Commit { preconditions: vec![Precondition::Absent(key("a"))], audit: audit("no"), ..commit([put("a", "2")]) },
        Commit { request: Some(request("r1", 2)), ..commit([put("a", "3")]) },
        Commit { request: Some(request("r1", 1)), ..commit([put("a", "4")]) },
        commit([Op::Put(key(&"k".repeat(KEY_MAX)), Vec::new())]),
        Commit { audit: audit("two"), ..commit([put("b", "1")]) },
    ];
    let mut watch = store.watch(Revision(0)).expect("a watch");
    let done = store.commit_all(&batch).expect("a transaction");
    let committed = |revision, replayed| Committed { revision: Revision(revision), replayed };
    assert_eq!(done[0].as_ref().expect("done"), &committed(1, false));
    assert!(matches!(done[1], Err(StoreError::Conflict { .. })), "{done:?}");
    assert!(matches!(done[2], Err(StoreError::RequestReused { revision: Revision(1), .. })), "{done:?}");
    assert_eq!(done[3].as_ref().expect("done before"), &committed(1, true));
    assert!(matches!(done[4], Err(StoreError::TooLong { .. })), "{done:?}");
    assert_eq!(done[5].as_ref().expect("done"), &committed(2, false));
    let rows = store.snapshot().expect("a snapshot").rows;
    assert_eq!(rows.into_iter().collect::<Vec<_>>(), [(key("a"), row("1", 1)), (key("b"), row("1", 2))]);
    let changes: Vec<_> = audited(store, 10).into_iter().map(|entry| entry.change).collect();
    assert_eq!(changes, ["two", "one"]);
    let seen: Vec<_> = std::iter::from_fn(|| watch.next(SOON).expect("no gap")).map(|entry| entry.revision.0).collect();
    assert_eq!(seen, [1, 2]);
    assert_eq!(store.commit_all(&[]).expect("nothing to do").len(), 0);
}

/// Preconditions of one see what those before it wrote.
pub(crate) fn a_batch_is_in_order(store: &dyn Store) {
    let after =
        |revision, ops: Op| Commit { preconditions: vec![Precondition::At(Revision(revision))], ..commit([ops]) };
    let batch = [
        after(0, put("a", "1")),
        after(0, put("a", "2")),
        after(1, put("b", "1")),
        Commit {
            preconditions: vec![Precondition::Unchanged(key("a"), Revision(1))],
            ..commit([Op::Delete(key("a"))])
        },
        Commit { preconditions: vec![Precondition::Unchanged(key("a"), Revision(1))], ..commit([]) },
    ];
    let done: Vec<_> = store.commit_all(&batch).expect("a transaction").iter().map(Result::is_ok).collect();
    assert_eq!(done, [true, false, true, true, false]);
    assert_eq!(store.snapshot().expect("a snapshot").rows.into_keys().collect::<Vec<_>>(), [key("b")]);
}

pub(crate) fn what_builds_on_a_refused_commit_is_refused(store: &dyn Store) {
    store.commit(&Commit { request: Some(request("r", 1)), ..commit([]) }).expect("a commit");
    let refused = Commit { preconditions: vec![Precondition::At(Revision(9))], ..commit([]) };
    let replayed = Commit { request: Some(request("r", 1)), ..commit([]) };
    let after = || Commit { preconditions: vec![Precondition::AfterLast], ..commit([put("a", "1")]) };
    let batch = [after(), refused, after(), after(), commit([]), after(), replayed, after()];
    let done = store.commit_all(&batch).expect("a transaction");
    assert!(matches!(done[2], Err(StoreError::AfterRefused)), "{done:?}");
    let done: Vec<_> = done.iter().map(Result::is_ok).collect();
    // What had been made before is not what the next one builds on.
    assert_eq!(done, [true, false, false, false, true, true, true, false]);
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
