use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use policy::Change;

use super::*;
use crate::fixture::{NOW, add_cidr, id, key_hash, network, parse};
use crate::follow::dispatcher;
use crate::init::found;
use crate::state;
use crate::state::history::History;
use crate::store::account::Settings;
use crate::store::memory::MemoryStore;
use crate::store::{AuditEntry, Keep, Page, Past, Range, Snapshot, Wanted};

/// A store whose transactions wait until the test says how each ends, and are counted.
#[derive(Debug)]
struct Held {
    store: MemoryStore,
    sizes: Mutex<Vec<usize>>,
    /// `false`: the disk is full.
    ends: Mutex<Receiver<bool>>,
}

impl Store for Held {
    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        self.store.snapshot()
    }

    fn at(&self, revision: Revision, wanted: &Wanted) -> Result<Snapshot, StoreError> {
        self.store.at(revision, wanted)
    }

    fn kept(&self) -> Result<(Revision, Revision), StoreError> {
        self.store.kept()
    }

    fn commit_all(&self, commits: &[Commit]) -> Result<Vec<Result<Committed, StoreError>>, StoreError> {
        self.sizes.lock().expect("a number").push(commits.len());
        match self.ends.lock().expect("an end").recv() {
            Ok(true) => self.store.commit_all(commits),
            _ => Err(StoreError::Full { path: "controller.db".into() }),
        }
    }

    fn request(&self, request: &RequestId) -> Result<Option<Revision>, StoreError> {
        self.store.request(request)
    }

    fn watch(&self, after: Revision) -> Result<Watch, StoreError> {
        self.store.watch(after)
    }

    fn compact(&self, keep: Keep, now: u64) -> Result<bool, StoreError> {
        self.store.compact(keep, now)
    }

    fn history(&self, key: &Key, range: Range, wanted: &Wanted) -> Result<Page<Past>, StoreError> {
        self.store.history(key, range, wanted)
    }

    fn audit(&self, range: Range, wanted: &Wanted) -> Result<Page<AuditEntry>, StoreError> {
        self.store.audit(range, wanted)
    }
}

struct Fixture {
    store: Arc<Held>,
    writer: Writer,
    current: state::Current,
    end: Sender<bool>,
}

/// At revision 1 of a small network.
fn start() -> Fixture {
    let (end, ends) = channel();
    let store = MemoryStore::new();
    found(&store, &network(), Settings::default(), NOW).expect("founded");
    let store = Arc::new(Held { store, sizes: Mutex::default(), ends: Mutex::new(ends) });
    let state = State::load(&*store).expect("a state");
    let metrics = Metrics::new();
    let dispatch = dispatcher::start(History::new(Arc::clone(&state.policy)), Arc::clone(&metrics)).expect("started");
    let (publisher, current) = state::channel(state);
    let shared: Arc<dyn Store> = store.clone();
    let (writer, _thread) = spawn(shared, publisher, dispatch, metrics, || NOW).expect("a writer");
    Fixture { store, writer, current, end }
}

type Asked = oneshot::Receiver<Result<Answer, Refusal>>;

impl Fixture {
    /// Puts a request into the queue.
    fn ask(&self, ask: Ask) -> Asked {
        let (reply, answer) = oneshot::channel();
        self.writer.0.try_send((ask, reply)).expect("room");
        answer
    }

    /// The writer has begun a transaction, which waits.
    async fn until_held(&self, transactions: usize) {
        while self.store.sizes.lock().expect("a number").len() < transactions {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn add(name: &str, prefix: &str) -> Ask {
    Ask::new(Actor::Root, Request::Change(vec![add_cidr(name, prefix)]))
}

fn is_open(asked: &mut Asked) -> bool {
    matches!(asked.try_recv(), Err(oneshot::error::TryRecvError::Empty))
}

async fn revision(asked: Asked) -> u64 {
    asked.await.expect("an answer").expect("done").revision.0
}

#[tokio::test]
async fn what_waits_together_is_one_transaction_of_many_revisions() {
    let fixture = start();
    let first = fixture.ask(add("one", "10.42.101.0/24"));
    fixture.until_held(1).await;
    // Comes while the disk is busy.
    let named = |ask: Ask| Ask { id: Some(RequestId { id: "r".to_owned(), digest: [1; 32] }), ..ask };
    let second = fixture.ask(named(add("two", "10.42.102.0/24")));
    let mut refused = fixture.ask(add("two", "10.42.103.0/24"));
    let mut again = fixture.ask(named(add("two", "10.42.102.0/24")));
    let node = id(fixture.current.get().network(), "web1");
    let (shown, requested) = (key_hash(u8::try_from(node.0).expect("small")), key_hash(90));
    let rekeyed = fixture.ask(Ask::new(Actor::Controller, Request::Rekey { node, shown, requested }));
    let third = fixture.ask(add("three", "10.42.103.0/24"));
    fixture.end.send(true).expect("the writer");
    assert_eq!(revision(first).await, 2);
    fixture.until_held(2).await;
    assert_eq!(fixture.current.get().policy.revision, Revision(2), "nothing is shown before it is on the disk");
    assert!(is_open(&mut refused) && is_open(&mut again), "an answer came before what it hangs on");
    fixture.end.send(true).expect("the writer");
    assert_eq!((revision(second).await, revision(again).await), (3, 3));
    let refusal = refused.await.expect("an answer").expect_err("the name is taken").to_string();
    assert!(refusal.contains("`two`"), "{refusal}");
    assert!(matches!(rekeyed.await.expect("an answer"), Err(Refusal::NoKey { .. })), "the fixture has no credentials");
    assert_eq!(revision(third).await, 4);
    assert_eq!(*fixture.store.sizes.lock().expect("numbers"), [1, 2]);
    let state = fixture.current.get();
    assert_eq!((state.revision, state.policy.revision), (Revision(4), Revision(4)));
    assert!(state.network().cidr_named(&parse("three")).is_some());
}

#[tokio::test]
async fn a_revision_of_accounts_is_none_of_the_policy() {
    let fixture = start();
    let before = Arc::clone(&fixture.current.get().policy);
    let subject = controller_api::invitation::Subject::Admin("alice".to_owned());
    let hash = crate::store::account::SecretHash([1; 32]);
    let invite = Request::Invite { subject, hash, expires_at: NOW + 60 };
    let invited = fixture.ask(Ask::new(Actor::Root, invite));
    fixture.until_held(1).await;
    fixture.end.send(true).expect("the writer");
    assert_eq!(revision(invited).await, 1);
    let state = fixture.current.get();
    assert_eq!((state.revision, state.policy.revision), (Revision(2), Revision(1)));
    assert!(Arc::ptr_eq(&state.policy, &before), "the policy was made anew");
    // `expected` goes by the policy's revision, after a restart too.
    assert_eq!(State::load(&*fixture.store).expect("a state").policy.revision, Revision(1));
    let expecting = Ask { expected: Some(Revision(1)), ..add("one", "10.42.101.0/24") };
    let changed = fixture.ask(expecting);
    fixture.end.send(true).expect("the writer");
    assert_eq!(revision(changed).await, 3);
    let late = Ask { expected: Some(Revision(1)), ..add("two", "10.42.102.0/24") };
    let late = fixture.ask(late).await.expect("an answer");
    assert!(matches!(late, Err(Refusal::Revision { found: Revision(3), .. })), "{late:?}");
}

#[tokio::test]
async fn a_transaction_that_fails_changes_nothing_and_the_next_one_goes_on() {
    let fixture = start();
    let first = fixture.ask(add("one", "10.42.101.0/24"));
    fixture.until_held(1).await;
    let second = fixture.ask(add("two", "10.42.102.0/24"));
    let taken = fixture.ask(add("two", "10.42.103.0/24"));
    fixture.end.send(false).expect("the writer");
    fixture.until_held(2).await;
    fixture.end.send(false).expect("the writer");
    for asked in [first, second, taken] {
        let failed = asked.await.expect("an answer");
        assert!(
            matches!(&failed, Err(Refusal::NotWritten(error)) if matches!(**error, StoreError::Full { .. })),
            "{failed:?}"
        );
    }
    assert_eq!(fixture.current.get().revision, Revision(1));
    let again = fixture.ask(add("two", "10.42.102.0/24"));
    fixture.end.send(true).expect("the writer");
    assert_eq!(revision(again).await, 2);
}

impl Fixture {
    /// Commits as another controller would, behind the writer's back.
    fn commit_elsewhere(&self, request: Option<RequestId>, changes: Vec<Change>) -> Revision {
        let mut theirs = Draft::of(&State::load(&self.store.store).expect("a state"));
        theirs.apply(&Actor::Root, &Request::Change(changes), NOW).expect("a change");
        let commit = Commit { request, ops: theirs.take_ops().1, time: NOW, ..Commit::default() };
        self.store.store.commit(&commit).expect("the other one's").revision
    }
}

fn named(id: &str, ask: Ask) -> Ask {
    Ask { id: Some(RequestId { id: id.to_owned(), digest: [1; 32] }), ..ask }
}

#[tokio::test]
async fn who_was_faster_at_the_same_rows_is_not_overwritten_but_built_upon() {
    let fixture = start();
    let first = fixture.ask(add("one", "10.42.101.0/24"));
    fixture.until_held(1).await;
    let second = fixture.ask(named("r", add("two", "10.42.102.0/24")));
    let expecting = Ask { expected: Some(Revision(1)), ..add("three", "10.42.103.0/24") };
    let third = fixture.ask(expecting);
    fixture.commit_elsewhere(None, vec![Change::DeleteRule { name: parse("web-to-app") }]);
    fixture.end.send(true).expect("the writer");
    // What was outrun comes first, with what waits.
    fixture.until_held(2).await;
    assert!(fixture.current.get().network().rules().is_empty(), "what the other one did is followed");
    fixture.end.send(true).expect("the writer");
    assert_eq!((revision(first).await, revision(second).await), (3, 4));
    let refused = third.await.expect("an answer");
    assert!(matches!(refused, Err(Refusal::Revision { expected: Revision(1), found: Revision(4) })), "{refused:?}");
    assert_eq!(*fixture.store.sizes.lock().expect("numbers"), [1, 2]);
    let state = fixture.current.get();
    let known = ["one", "two"].map(|name| state.network().cidr_named(&parse(name)).is_some());
    assert_eq!((known, state.network().rules().len()), ([true, true], 0));
    let stored = State::load(&*fixture.store).expect("a state");
    assert_eq!(stored.network().to_parts(), state.network().to_parts());
}

/// A request that was repeated at another controller.
#[tokio::test]
async fn a_request_that_another_controller_did_meanwhile_is_done_once() {
    let fixture = start();
    let first = fixture.ask(add("zero", "10.42.100.0/24"));
    fixture.until_held(1).await;
    let request = named("r", add("one", "10.42.101.0/24"));
    let (same, after) = (fixture.ask(request.clone()), fixture.ask(add("two", "10.42.102.0/24")));
    fixture.end.send(true).expect("the writer");
    fixture.until_held(2).await;
    // Both are drafted; the other controller is faster with the first of them.
    let theirs = fixture.commit_elsewhere(request.id.clone(), vec![add_cidr("one", "10.42.101.0/24")]);
    fixture.end.send(true).expect("the writer");
    assert_eq!((revision(first).await, revision(same).await), (2, theirs.0));
    fixture.until_held(3).await;
    fixture.end.send(true).expect("the writer");
    assert_eq!(revision(after).await, 4);
    assert_eq!(*fixture.store.sizes.lock().expect("numbers"), [1, 2, 1]);
    let again = fixture.ask(request);
    assert_eq!(revision(again).await, theirs.0);
    let stored = State::load(&*fixture.store).expect("a state");
    assert_eq!(stored.network().to_parts(), fixture.current.get().network().to_parts());
}

#[tokio::test]
async fn who_is_outrun_again_and_again_is_told_so() {
    let fixture = start();
    let asked = fixture.ask(add("one", "10.42.101.0/24"));
    for time in 1..=TRIES {
        fixture.until_held(time as usize).await;
        let prefix = format!("10.42.{}.0/24", 110 + time);
        fixture.commit_elsewhere(None, vec![add_cidr(&format!("theirs{time}"), &prefix)]);
        fixture.end.send(true).expect("the writer");
    }
    let refused = asked.await.expect("an answer").expect_err("outrun").to_string();
    assert!(refused.contains("faster at the same rows, 8 times") && refused.contains("try again"), "{refused}");
    assert!(fixture.current.get().network().cidr_named(&parse("one")).is_none());
    let again = fixture.ask(add("one", "10.42.101.0/24"));
    fixture.end.send(true).expect("the writer");
    assert_eq!(revision(again).await, u64::from(TRIES) + 2);
}
