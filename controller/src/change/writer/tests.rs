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
use crate::store::{AuditEntry, Keep, Past, Snapshot};

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

    fn at(&self, revision: Revision) -> Result<Snapshot, StoreError> {
        self.store.at(revision)
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

    fn history(&self, key: &Key, limit: usize) -> Result<Vec<Past>, StoreError> {
        self.store.history(key, limit)
    }

    fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, StoreError> {
        self.store.audit(limit)
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

/// As another controller would.
#[tokio::test]
async fn who_was_faster_at_the_same_rows_is_not_overwritten() {
    let fixture = start();
    let mut theirs = Draft::of(&fixture.current.get());
    let change = Request::Change(vec![Change::DeleteRule { name: parse("web-to-app") }]);
    theirs.apply(&Actor::Root, &change, NOW).expect("a change");
    let commit = Commit { ops: theirs.take_ops().1, time: NOW, ..Commit::default() };
    let first = fixture.ask(add("one", "10.42.101.0/24"));
    fixture.until_held(1).await;
    fixture.store.store.commit(&commit).expect("the other one's");
    fixture.end.send(true).expect("the writer");
    let refused = first.await.expect("an answer").expect_err("somebody was faster").to_string();
    assert!(refused.contains("`network` was changed meanwhile"), "{refused}");
    // What the other one did is followed, and the next change builds on it.
    assert!(fixture.current.get().network().rules().is_empty());
    let again = fixture.ask(add("one", "10.42.101.0/24"));
    fixture.end.send(true).expect("the writer");
    assert_eq!(revision(again).await, 3);
}
