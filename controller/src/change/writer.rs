//! The one writer: every change goes through its queue, one after the other, and what waits together is one transaction.
//!
//! ```text
//! request ─► draft (pure) ─► matrix follows, limits of whom it affects ─► touched rows ─► store
//! store's log ─► state ─► for everybody
//! ```
//!
//! It has a thread of its own, because compiling and the disk both block.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use policy::{Affected, Revision};
use tokio::sync::{mpsc, oneshot};

use super::audit::Actor;
use super::draft::Draft;
use super::request::{Outcome, Refusal, Request};
use crate::follow::dispatcher::Dispatch;
use crate::metrics::{self, Metrics};
use crate::state::{Followed, LoadError, Policy, Publisher, State};
use crate::store::{Commit, Precondition, RequestId, Store, Watch};

/// Requests that wait; callers beyond wait for room.
const QUEUE: usize = 1_024;
/// Requests that share one transaction, each with a revision of its own.
const BATCH: usize = 256;

/// A request with who asks, and under what conditions.
#[derive(Clone, Debug)]
pub struct Ask {
    pub actor: Actor,
    pub request: Request,
    pub id: Option<RequestId>,
    /// Refuse unless the network is at this revision.
    pub expected: Option<Revision>,
    /// Only say what would happen.
    pub dry_run: bool,
}

impl Ask {
    pub fn new(actor: Actor, request: Request) -> Self {
        Self { actor, request, id: None, expected: None, dry_run: false }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The revision that has it; where nothing changed, the newest one.
    pub revision: Revision,
    pub outcome: Outcome,
}

type Reply = oneshot::Sender<Result<Answer, Refusal>>;

/// The queue's end for callers.
#[derive(Clone, Debug)]
pub struct Writer(mpsc::Sender<(Ask, Reply)>);

impl Writer {
    /// Returns when the change is on the disk and everybody can see it.
    pub async fn ask(&self, ask: Ask) -> Result<Answer, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.0.send((ask, reply)).await.map_err(|_| Refusal::Stopping)?;
        answer.await.unwrap_or(Err(Refusal::Stopping))
    }
}

/// Starts the thread; it ends when every [`Writer`] is gone. `clock`: seconds since the epoch.
pub fn spawn(
    store: Arc<dyn Store>,
    publisher: Publisher,
    dispatch: Dispatch,
    metrics: Arc<Metrics>,
    clock: fn() -> u64,
) -> Result<(Writer, JoinHandle<()>), LoadError> {
    let (sender, queue) = mpsc::channel(QUEUE);
    let watch = store.watch(publisher.get().revision)?;
    let work = Work { store, watch, publisher, dispatch, metrics, clock };
    let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || work.run(queue));
    Ok((Writer(sender), thread.map_err(LoadError::Thread)?))
}

struct Work {
    store: Arc<dyn Store>,
    /// The store's log after what was published.
    watch: Watch,
    publisher: Publisher,
    dispatch: Dispatch,
    metrics: Arc<Metrics>,
    clock: fn() -> u64,
}

/// The state that the requests of one transaction lead to, before any of it is committed.
struct Batch {
    draft: Draft,
    policy: Arc<Policy>,
    /// Of the store, before the first commit.
    head: Revision,
    commits: Vec<Commit>,
    /// Who is answered when the commits are done.
    waiting: Vec<(Outcome, Reply)>,
}

impl Work {
    fn run(mut self, mut queue: mpsc::Receiver<(Ask, Reply)>) {
        let mut next = None;
        while let Some(first) = next.take().or_else(|| queue.blocking_recv()) {
            let start = Instant::now();
            let mut batch = self.begin();
            let mut asked = Some(first);
            while let Some((ask, reply)) = asked.take() {
                let is_alone = ask.expected.is_some() || ask.dry_run;
                if is_alone && !batch.commits.is_empty() {
                    next = Some((ask, reply));
                    break;
                }
                self.add(&mut batch, ask, reply);
                if is_alone || batch.commits.len() >= BATCH {
                    break;
                }
                asked = queue.try_recv().ok();
            }
            self.commit(batch);
            metrics::since(&self.metrics.commit_seconds, start);
        }
    }

    fn begin(&self) -> Batch {
        let state = self.publisher.get();
        Batch {
            draft: Draft::of(&state),
            policy: Arc::clone(&state.policy),
            head: state.revision,
            commits: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// Makes a request part of the batch, or answers it at once.
    fn add(&self, batch: &mut Batch, ask: Ask, reply: Reply) {
        match self.draft(batch, &ask) {
            Ok((_, outcome)) if outcome.changed && !ask.dry_run => batch.waiting.push((outcome, reply)),
            answered => {
                let answer = answered.map(|(revision, outcome)| Answer { revision, outcome });
                self.count(&answer);
                // A caller that went away has its change all the same.
                let _ = reply.send(answer);
            }
        }
    }

    /// The revision is that of something that was done before.
    fn draft(&self, batch: &mut Batch, ask: &Ask) -> Result<(Revision, Outcome), Refusal> {
        let known = batch.policy.revision;
        if let Some(id) = &ask.id {
            if let Some(revision) = self.store.request(id)? {
                return Ok((revision, Outcome::default()));
            }
            if let Some(first) = batch.commits.iter().position(|commit| commit.request.as_ref() == Some(id)) {
                return Ok((Revision(batch.head.0 + first as u64 + 1), Outcome::default()));
            }
        }
        if let Some(expected) = ask.expected
            && expected != known
        {
            return Err(Refusal::Revision { expected, found: known });
        }
        let before = batch.draft.clone();
        let outcome = batch.draft.apply(&ask.actor, &ask.request, (self.clock)())?;
        if !outcome.changed {
            return Ok((known, outcome));
        }
        let (touched, ops) = batch.draft.take_ops();
        let revision = Revision(batch.head.0 + batch.commits.len() as u64 + 1);
        let followed = self.follow(&batch.policy, &batch.draft, revision, &touched.policy);
        let policy = followed.inspect_err(|_| batch.draft = before.clone())?;
        if ask.dry_run {
            batch.draft = before;
            return Ok((known, outcome));
        }
        batch.policy = policy.map_or_else(|| Arc::clone(&batch.policy), Arc::new);
        batch.commits.push(Commit {
            request: ask.id.clone(),
            preconditions: vec![Precondition::At(Revision(revision.0 - 1))],
            ops,
            audit: std::mem::take(&mut batch.draft.audit),
            time: (self.clock)(),
        });
        Ok((revision, outcome))
    }

    /// The policy of the draft, if it is another one, held against the limits of whom it affects.
    fn follow(
        &self,
        policy: &Policy,
        draft: &Draft,
        revision: Revision,
        rows: &policy::Rows,
    ) -> Result<Option<Policy>, Refusal> {
        if rows.is_empty() {
            return Ok(None);
        }
        let start = Instant::now();
        let (policy, affected) = policy.follow(revision, &draft.network, rows).map_err(Refusal::Limit)?;
        policy.matrix.check_affected(&affected)?;
        metrics::since(&self.metrics.compile_seconds, start);
        Ok(Some(policy))
    }

    /// Writes the batch, shows everybody, and answers.
    fn commit(&mut self, batch: Batch) {
        let Batch { commits, waiting, .. } = batch;
        if commits.is_empty() {
            return;
        }
        match self.store.commit_all(&commits) {
            Ok(committed) => {
                self.publish();
                for ((outcome, reply), committed) in waiting.into_iter().zip(committed) {
                    self.metrics.commit(metrics::Result::Done);
                    let _ = reply.send(Ok(Answer { revision: committed.revision, outcome }));
                }
            }
            Err(error) => {
                tracing::error!(%error, changes = commits.len(), "changes could not be written");
                self.reload();
                let error = Arc::new(error);
                for (_, reply) in waiting {
                    self.metrics.commit(metrics::Result::Failed);
                    let _ = reply.send(Err(Refusal::NotWritten(Arc::clone(&error))));
                }
            }
        }
    }

    /// Follows the store's log to its end.
    fn publish(&mut self) {
        let mut state = State::clone(&self.publisher.get());
        let mut all: Option<Affected> = None;
        loop {
            let entry = match self.watch.next(Duration::ZERO) {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "the store's log could not be followed");
                    return self.reload();
                }
            };
            match state.follow(&entry) {
                Ok((next, Followed { policy, credentials })) => {
                    state = next;
                    match (&mut all, policy) {
                        (Some(all), Some(more)) => all.extend(&more),
                        (None, Some(first)) => all = Some(first),
                        (_, None) => {}
                    }
                    self.dispatch.doubt(credentials);
                }
                Err(error) => {
                    tracing::error!(%error, revision = %entry.revision, "a revision could not be followed");
                    return self.reload();
                }
            }
        }
        self.show(state, all);
    }

    fn show(&self, state: State, affected: Option<Affected>) {
        self.metrics.revision.set(state.policy.revision.0);
        self.metrics.nodes.set(i64::try_from(state.network().nodes().len()).unwrap_or(i64::MAX));
        let policy = Arc::clone(&state.policy);
        self.publisher.publish(state);
        if let Some(affected) = affected {
            self.dispatch.publish(policy, affected);
        }
    }

    /// After something that failed, what the store holds is the truth.
    fn reload(&mut self) {
        let reloaded = State::load(&*self.store).and_then(|state| Ok((self.store.watch(state.revision)?, state)));
        match reloaded {
            Ok((watch, state)) => {
                self.watch = watch;
                if state.revision != self.publisher.get().revision {
                    let everybody = state.policy.matrix.nodes().collect();
                    let affected =
                        Affected { common: true, is_everybody: true, nodes: everybody, ..Affected::default() };
                    self.show(state, Some(affected));
                }
            }
            Err(error) => tracing::error!(%error, "the store could not be read again"),
        }
    }

    fn count(&self, result: &Result<Answer, Refusal>) {
        self.metrics.commit(match result {
            Ok(_) => metrics::Result::Done,
            Err(Refusal::Store(_)) => metrics::Result::Failed,
            Err(_) => metrics::Result::Refused,
        });
    }
}
