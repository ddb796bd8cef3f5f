//! The one writer: every change goes through its queue, one after the other, and what waits together is one transaction.
//!
//! ```text
//! request ─► draft (pure) ─► matrix follows, limits of whom it affects ─► touched rows ─► store
//! store's log ─► state ─► for everybody
//! ```
//!
//! It has a thread of its own, because compiling and the disk both block. Where another controller was faster at the same
//! rows, a request is drafted again on what that one made.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use policy::{Affected, Revision};
use tokio::sync::{mpsc, oneshot};

use super::audit::Actor;
use super::draft::Draft;
use super::request::{Outcome, Refusal, Request};
use super::trial;
use crate::metrics::{self, Metrics};
use crate::state::{Followed, Followers, LoadError, Policy, Publisher, State};
use crate::store::{Commit, Committed, Key, Precondition, RequestId, Store, StoreError, Watch, rows};

/// Requests that wait; callers beyond wait for room.
const QUEUE: usize = 1_024;
/// Requests that share one transaction, each with a revision of its own.
const BATCH: usize = 256;

/// Times that a request is drafted, each on a newer state, while other controllers are faster.
const TRIES: u32 = 8;
/// How long the store's log may take to tell of the commit that was faster.
const LAG: Duration = Duration::from_millis(200);

/// A request with who asks, and under what conditions.
#[derive(Clone, Debug)]
pub struct Ask {
    pub actor: Actor,
    pub request: Request,
    pub id: Option<RequestId>,
    /// Refuse unless the network is at this revision.
    pub expected: Option<Revision>,
}

impl Ask {
    pub fn new(actor: Actor, request: Request) -> Self {
        Self { actor, request, id: None, expected: None }
    }
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The policy's revision that has it; where nothing of the policy changed, the newest one.
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
    followers: impl Followers + 'static,
    metrics: Arc<Metrics>,
    clock: fn() -> u64,
) -> Result<(Writer, JoinHandle<()>), LoadError> {
    let (sender, queue) = mpsc::channel(QUEUE);
    let watch = store.watch(publisher.get().revision)?;
    let work = Work { store, watch, publisher, followers: Box::new(followers), metrics, clock };
    let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || work.run(queue));
    Ok((Writer(sender), thread.map_err(LoadError::Thread)?))
}

/// A request that is to be answered.
struct Pending {
    ask: Ask,
    reply: Reply,
    /// How often it was drafted and could not be written.
    outrun: u32,
}

impl From<(Ask, Reply)> for Pending {
    fn from((ask, reply): (Ask, Reply)) -> Self {
        Self { ask, reply, outrun: 0 }
    }
}

struct Work {
    store: Arc<dyn Store>,
    /// The store's log after what was published.
    watch: Watch,
    publisher: Publisher,
    followers: Box<dyn Followers>,
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
    /// Rows that the commits write.
    written: BTreeSet<Key>,
    /// Who is answered when the commits are done.
    waiting: Vec<(Drafted, Pending)>,
}

/// What a request comes to, once the commits of its batch are done.
enum Drafted {
    /// The batch's commit of this place.
    Commit(usize, Outcome),
    /// There is nothing to commit.
    Known(Result<Answer, Refusal>),
}

impl Work {
    fn run(mut self, mut queue: mpsc::Receiver<(Ask, Reply)>) {
        // What comes before the queue.
        let mut first = VecDeque::new();
        while let Some(pending) = first.pop_front().or_else(|| queue.blocking_recv().map(Pending::from)) {
            let start = Instant::now();
            let mut batch = self.begin();
            let mut next = Some(pending);
            while let Some(pending) = next.take() {
                let is_alone = pending.ask.expected.is_some();
                if is_alone && !batch.commits.is_empty() {
                    first.push_front(pending);
                    break;
                }
                self.add(&mut batch, pending);
                if is_alone || batch.commits.len() >= BATCH {
                    break;
                }
                next = first.pop_front().or_else(|| queue.try_recv().ok().map(Pending::from));
            }
            let outrun = self.commit(batch);
            outrun.into_iter().rev().for_each(|pending| first.push_front(pending));
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
            written: BTreeSet::new(),
            waiting: Vec::new(),
        }
    }

    /// Makes a request part of the batch. What does not hang on its commits is answered at once.
    fn add(&self, batch: &mut Batch, pending: Pending) {
        let drafted = self.draft(batch, &pending.ask).unwrap_or_else(|refusal| Drafted::Known(Err(refusal)));
        match drafted {
            Drafted::Known(answer) if batch.commits.is_empty() => self.answer(pending.reply, answer),
            drafted => batch.waiting.push((drafted, pending)),
        }
    }

    fn draft(&self, batch: &mut Batch, ask: &Ask) -> Result<Drafted, Refusal> {
        let known = batch.policy.revision;
        if let Some(id) = &ask.id {
            if let Some(revision) = self.store.request(id)? {
                return Ok(Drafted::Known(Ok(Answer { revision, outcome: Outcome::default() })));
            }
            if let Some(first) = batch.commits.iter().position(|commit| commit.request.as_ref() == Some(id)) {
                return Ok(Drafted::Commit(first, Outcome::default()));
            }
        }
        trial::check_expected(ask.expected, known)?;
        let before = batch.draft.clone();
        let outcome = batch.draft.apply(&ask.actor, &ask.request, (self.clock)())?;
        if !outcome.changed {
            return Ok(Drafted::Known(Ok(Answer { revision: known, outcome })));
        }
        let (touched, ops) = batch.draft.take_ops();
        let revision = Revision(batch.head.0 + batch.commits.len() as u64 + 1);
        let start = Instant::now();
        let followed = trial::follow(&batch.policy, &batch.draft, revision, &touched.policy);
        if let Some(policy) = followed.inspect_err(|_| batch.draft = before.clone())? {
            batch.policy = policy;
            metrics::since(&self.metrics.compile_seconds, start);
        }
        // A row is the batch's own once it is written there; that this came to be is what the order says.
        let after = (!batch.commits.is_empty()).then_some(Precondition::AfterLast);
        let accounts = (&before.accounts, &touched.accounts);
        let unchanged = rows::unchanged(&touched.policy, accounts, batch.head, &batch.written);
        batch.written.extend(ops.iter().map(|op| op.key().clone()));
        batch.commits.push(Commit {
            request: ask.id.clone(),
            preconditions: after.into_iter().chain(unchanged).collect(),
            ops,
            audit: std::mem::take(&mut batch.draft.audit),
            time: (self.clock)(),
        });
        Ok(Drafted::Commit(batch.commits.len() - 1, outcome))
    }

    /// Writes the batch, shows everybody, and answers. Returns what is to be drafted again: where another controller was
    /// faster than a part of the batch, nothing that was drafted after it counts.
    fn commit(&mut self, batch: Batch) -> Vec<Pending> {
        let Batch { commits, waiting, .. } = batch;
        if commits.is_empty() {
            return Vec::new();
        }
        let done = match self.store.commit_all(&commits) {
            Ok(done) => done,
            Err(error) => {
                tracing::error!(%error, changes = commits.len(), "changes could not be written");
                self.reload();
                let error = Arc::new(error);
                for (_, pending) in waiting {
                    self.answer(pending.reply, Err(Refusal::NotWritten(Arc::clone(&error))));
                }
                return Vec::new();
            }
        };
        self.publish(if done.iter().any(is_outrun) { LAG } else { Duration::ZERO });
        let is_whole = done.iter().all(|done| matches!(done, Ok(Committed { replayed: false, .. })));
        let done: Vec<_> = done.into_iter().map(|done| done.map_err(Arc::new)).collect();
        let mut outrun = Vec::new();
        for (drafted, pending) in waiting {
            let answer = match drafted {
                Drafted::Known(answer) => is_whole.then_some(answer),
                Drafted::Commit(place, outcome) => self.answer_to(&commits[place], &done[place], outcome),
            };
            match answer {
                Some(answer) => self.answer(pending.reply, answer),
                None if pending.outrun + 1 >= TRIES => {
                    self.answer(pending.reply, Err(Refusal::Outrun { tries: TRIES }))
                }
                None => outrun.push(Pending { outrun: pending.outrun + 1, ..pending }),
            }
        }
        self.metrics.outrun.inc_by(outrun.len() as u64);
        outrun
    }

    /// `None`: another controller was faster.
    fn answer_to(
        &self,
        commit: &Commit,
        done: &Result<Committed, Arc<StoreError>>,
        outcome: Outcome,
    ) -> Option<Result<Answer, Refusal>> {
        match done {
            Ok(Committed { revision, replayed }) => {
                // What does not touch the policy has no revision of its own there.
                let is_policy = commit.ops.iter().any(|op| op.key().as_str() == rows::HEADER);
                let revision = if is_policy || *replayed { *revision } else { self.policy_revision() };
                Some(Ok(Answer { revision, outcome }))
            }
            Err(error) if is_faster(error) => None,
            Err(error) => Some(Err(Refusal::NotWritten(Arc::clone(error)))),
        }
    }

    fn policy_revision(&self) -> Revision {
        self.publisher.get().policy.revision
    }

    /// A caller that went away has its change all the same.
    fn answer(&self, reply: Reply, answer: Result<Answer, Refusal>) {
        self.metrics.commit(match &answer {
            Ok(_) => metrics::Result::Done,
            Err(Refusal::Store(_) | Refusal::NotWritten(_)) => metrics::Result::Failed,
            Err(_) => metrics::Result::Refused,
        });
        let _ = reply.send(answer);
    }

    /// Follows the store's log to its end; the first entry may take so long.
    fn publish(&mut self, mut wait: Duration) {
        let mut state = State::clone(&self.publisher.get());
        let mut all: Option<Affected> = None;
        loop {
            let entry = match self.watch.next(std::mem::take(&mut wait)) {
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
                    self.followers.doubt(credentials);
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
            self.followers.publish(policy, affected);
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
}

fn is_outrun(done: &Result<Committed, StoreError>) -> bool {
    done.as_ref().is_err_and(is_faster)
}

/// Whether a commit was refused because of another one, and can be made on the state after that.
fn is_faster(error: &StoreError) -> bool {
    matches!(error, StoreError::Moved { .. } | StoreError::Conflict { .. } | StoreError::AfterRefused)
}

#[cfg(test)]
mod tests;
