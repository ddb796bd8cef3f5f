//! The one writer: every change of the network goes through its queue, one after the other.
//!
//! ```text
//! request ─► draft (pure) ─► compile, limits ─► rows that differ ─► store, one transaction ─► new state, for everybody
//! ```
//!
//! It has a thread of its own, because compiling and the disk both block.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use policy::{Matrix, Revision};
use tokio::sync::{mpsc, oneshot};

use super::audit::Actor;
use super::draft::Draft;
use super::request::{Outcome, Refusal, Request};
use crate::metrics::{self, Metrics};
use crate::state::{Publisher, State};
use crate::store::{Commit, Precondition, RequestId, Store, StoreError, rows};

/// Requests that wait; callers beyond wait for room.
const QUEUE: usize = 1_024;
/// Observed endpoints that share one commit, so that a thousand nodes that connect at once are not a thousand commits.
const BATCH: usize = 1_024;
/// Revisions between two compactions.
const COMPACT_EVERY: u64 = 1_024;
/// Revisions, with the request ids of their changes, that compaction keeps.
const KEEP: u64 = 16_384;

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
    metrics: Arc<Metrics>,
    clock: fn() -> u64,
) -> std::io::Result<(Writer, JoinHandle<()>)> {
    let (sender, queue) = mpsc::channel(QUEUE);
    let work = Work { store, publisher, metrics, clock };
    let thread = std::thread::Builder::new().name("writer".to_owned()).spawn(move || work.run(queue))?;
    Ok((Writer(sender), thread))
}

struct Work {
    store: Arc<dyn Store>,
    publisher: Publisher,
    metrics: Arc<Metrics>,
    clock: fn() -> u64,
}

impl Work {
    fn run(self, mut queue: mpsc::Receiver<(Ask, Reply)>) {
        let mut waiting = None;
        while let Some((ask, reply)) = waiting.take().or_else(|| queue.blocking_recv()) {
            let start = Instant::now();
            if is_observation(&ask) {
                let mut batch = vec![(ask, reply)];
                while batch.len() < BATCH && waiting.is_none() {
                    match queue.try_recv() {
                        Ok(next) if is_observation(&next.0) => batch.push(next),
                        Ok(next) => waiting = Some(next),
                        Err(_) => break,
                    }
                }
                self.observe(batch);
            } else {
                let result = self.one(&ask);
                self.count(&result);
                // A caller that went away has its change all the same.
                let _ = reply.send(result);
            }
            metrics::since(&self.metrics.commit_seconds, start);
            self.compact();
        }
    }

    fn one(&self, ask: &Ask) -> Result<Answer, Refusal> {
        let state = self.publisher.get();
        if let Some(id) = &ask.id
            && let Some(revision) = self.store.request(id)?
        {
            return Ok(Answer { revision, outcome: Outcome::default() });
        }
        if let Some(expected) = ask.expected
            && expected != state.revision
        {
            return Err(Refusal::Revision { expected, found: state.revision });
        }
        let mut draft = Draft::of(&state);
        let outcome = draft.apply(&ask.actor, &ask.request, (self.clock)())?;
        if !outcome.changed {
            return Ok(Answer { revision: state.revision, outcome });
        }
        let revision = self.commit(&state, draft, ask.id.clone(), ask.dry_run)?;
        Ok(Answer { revision, outcome })
    }

    /// Each is refused or accepted for itself; those accepted are one revision.
    fn observe(&self, batch: Vec<(Ask, Reply)>) {
        let state = self.publisher.get();
        let mut draft = Draft::of(&state);
        let now = (self.clock)();
        let mut accepted = Vec::new();
        for (ask, reply) in batch {
            match draft.apply(&ask.actor, &ask.request, now) {
                Ok(outcome) => accepted.push((outcome, reply)),
                Err(refusal) => {
                    let _ = reply.send(Err(refusal));
                }
            }
        }
        let changed = accepted.iter().any(|(outcome, _)| outcome.changed);
        let result = if changed { self.commit(&state, draft, None, false) } else { Ok(state.revision) };
        if changed {
            self.metrics.commit(if result.is_ok() { metrics::Result::Done } else { metrics::Result::Failed });
        }
        for (outcome, reply) in accepted {
            let answer = match &result {
                Ok(revision) => Ok(Answer { revision: *revision, outcome }),
                Err(error) => {
                    tracing::warn!(%error, "an observed endpoint could not be stored");
                    Err(Refusal::Stopping)
                }
            };
            let _ = reply.send(answer);
        }
    }

    /// Compiles, writes, and shows everybody.
    fn commit(
        &self,
        state: &State,
        draft: Draft,
        request: Option<RequestId>,
        dry_run: bool,
    ) -> Result<Revision, Refusal> {
        let Draft { network, accounts, recompile, audit } = draft;
        let matrix = if recompile {
            let start = Instant::now();
            let matrix = Matrix::compile(&network).map_err(Refusal::Limit)?;
            matrix.check_slices(&network)?;
            metrics::since(&self.metrics.compile_seconds, start);
            Arc::new(matrix)
        } else {
            Arc::clone(&state.matrix)
        };
        if dry_run {
            return Ok(state.revision);
        }
        let commit = Commit {
            request,
            preconditions: vec![Precondition::At(state.revision)],
            ops: rows::diff(Some((&state.network, &state.accounts)), (&network, &accounts)),
            audit,
            time: (self.clock)(),
        };
        let committed = self.store.commit(&commit).inspect_err(|error| self.recover(error))?;
        self.publish(State { revision: committed.revision, network, matrix, accounts });
        Ok(committed.revision)
    }

    fn publish(&self, state: State) {
        self.metrics.revision.set(state.revision.0);
        self.metrics.nodes.set(i64::try_from(state.network.nodes().len()).unwrap_or(i64::MAX));
        self.publisher.publish(state);
    }

    /// After a commit that failed, what the store holds is the truth.
    fn recover(&self, error: &StoreError) {
        tracing::error!(%error, "a change could not be written");
        match State::load(&*self.store) {
            Ok(state) if state.revision != self.publisher.get().revision => self.publish(state),
            Ok(_) => {}
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

    fn compact(&self) {
        let revision = self.publisher.get().revision.0;
        if revision.is_multiple_of(COMPACT_EVERY)
            && revision > KEEP
            && let Err(error) = self.store.compact(Revision(revision - KEEP))
        {
            tracing::warn!(%error, "old revisions could not be compacted");
        }
    }
}

fn is_observation(ask: &Ask) -> bool {
    matches!(ask.request, Request::Observe { .. }) && ask.id.is_none() && ask.expected.is_none() && !ask.dry_run
}
