//! What is asked and changes nothing: how much of it one caller may ask, and how much is worked on for all. None of it is
//! done on the runtime's threads or by the writer.
//!
//! One question of a caller is worked on at a time, and its others wait behind it: so at most one of each caller stands in
//! the queue that all wait in, which is served in order. A caller who asks much waits for itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use policy::NodeId;
use tokio::sync::Semaphore;
use tonic::Status;

use super::bucket::{Bucket, Rate};
use super::caller::Caller;
use crate::metrics::{self, Metrics};
use crate::store::Wanted;

/// What callers of one kind may ask.
#[derive(Clone, Copy, Debug)]
struct Bound {
    /// Of one caller: worked on or waiting.
    asked: usize,
    /// Costly questions of one caller, and what else it may not do all the time.
    rate: Rate,
    /// Of all callers of this kind: worked on at a time.
    places: usize,
}

/// `nodectl explain` is all that a node asks; beside that it opens a stream now and then.
const NODE: Bound = Bound { asked: 8, rate: Rate { per_second: 5, burst: 100 }, places: 1 };
/// Scripts run side by side and ask again and again; each command asks one or two questions. An answer can hold a whole network.
const OPERATOR: Bound = Bound { asked: 256, rate: Rate { per_second: 500, burst: 2_000 }, places: 2 };

/// Whose questions are counted together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asker {
    Root,
    Admin(String),
    Node(NodeId),
}

/// How much a question costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// As much as there are nodes, at most: it may be asked as often as it is answered.
    Low,
    /// The policy, or the disk.
    High,
}

/// The questions of all callers. Nodes leave the operators' places alone.
#[derive(Clone, Debug)]
pub struct Questions(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    nodes: Kind,
    operators: Kind,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Kind {
    bound: Bound,
    places: Arc<Semaphore>,
    callers: Mutex<BTreeMap<Asker, Account>>,
}

/// What is kept of one caller.
#[derive(Debug)]
struct Account {
    asked: usize,
    /// Of costly questions, and of what else is paced.
    bucket: Bucket,
    paced: Bucket,
    /// The one question that is worked on, or is the next to be.
    turn: Arc<Semaphore>,
}

impl Default for Account {
    fn default() -> Self {
        Self { asked: 0, bucket: Bucket::default(), paced: Bucket::default(), turn: Arc::new(Semaphore::new(1)) }
    }
}

impl Account {
    fn is_full(&self, now: Instant) -> bool {
        self.bucket.is_full(now) && self.paced.is_full(now)
    }
}

impl Questions {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let kind =
            |bound: Bound| Kind { bound, places: Arc::new(Semaphore::new(bound.places)), callers: Mutex::default() };
        Self(Arc::new(Shared { nodes: kind(NODE), operators: kind(OPERATOR), metrics }))
    }

    /// Answers a question on a thread that may block, when it is this caller's turn. A question whose caller is gone, or
    /// whose deadline has passed, is dropped here with the call: it is not begun, and sees in [`Wanted`] that it is over.
    pub async fn ask<T: Send + 'static>(
        &self,
        caller: &Caller,
        cost: Cost,
        question: impl FnOnce(&Wanted) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let (mut entered, turn) = self.enter(caller, cost, Instant::now())?;
        let (_asked, wanted) = Wanted::new();
        let failed = |error: &dyn std::fmt::Display| Status::internal(format!("question was not answered: {error}"));
        let turn = turn.acquire_owned().await.map_err(|error| failed(&error))?;
        let places = Arc::clone(&entered.kind().places);
        let place = places.acquire_owned().await.map_err(|error| failed(&error))?;
        let answered = tokio::task::spawn_blocking(move || {
            let answer = question(&wanted);
            entered.is_answered = !wanted.is_over();
            // Before the answer is heard, so that the caller can ask the next question.
            drop((entered, place, turn));
            answer
        });
        answered.await.map_err(|error| failed(&error))?
    }

    /// Takes a token of the caller's second bucket, which is for calls that are not questions: new streams and renewals.
    pub fn pace(&self, caller: &Caller) -> Result<(), Status> {
        self.pace_at(caller, Instant::now())
    }

    fn pace_at(&self, caller: &Caller, now: Instant) -> Result<(), Status> {
        let (asker, kind) = self.asker(caller);
        let mut callers = kind.callers();
        let paced = callers.entry(asker).or_default().paced.take(kind.bound.rate, now);
        paced.map_err(|wait| self.refuse(TooMuch::Often(wait), caller, kind.bound))
    }

    /// Forgets callers that could ask as much as ever.
    pub fn sweep(&self, now: Instant) {
        for kind in [&self.0.nodes, &self.0.operators] {
            kind.callers().retain(|_, account| account.asked > 0 || !account.is_full(now));
        }
    }

    fn enter(&self, caller: &Caller, cost: Cost, now: Instant) -> Result<(Entered, Arc<Semaphore>), Status> {
        let (asker, kind) = self.asker(caller);
        let turn = kind.enter(&asker, cost, now).map_err(|refused| self.refuse(refused, caller, kind.bound))?;
        self.0.metrics.questions_open.inc();
        Ok((Entered { questions: self.clone(), asker, is_answered: false }, turn))
    }

    fn asker(&self, caller: &Caller) -> (Asker, &Kind) {
        let asker = match caller {
            Caller::Root => Asker::Root,
            Caller::Admin { name } => Asker::Admin(name.clone()),
            Caller::Node(node) => Asker::Node(node.id),
        };
        let kind = self.kind(&asker);
        (asker, kind)
    }

    fn kind(&self, asker: &Asker) -> &Kind {
        match asker {
            Asker::Root | Asker::Admin(_) => &self.0.operators,
            Asker::Node(_) => &self.0.nodes,
        }
    }

    fn refuse(&self, refused: TooMuch, caller: &Caller, bound: Bound) -> Status {
        self.0.metrics.question(metrics::Question::Refused);
        refused.status(caller, bound)
    }
}

impl Kind {
    fn enter(&self, asker: &Asker, cost: Cost, now: Instant) -> Result<Arc<Semaphore>, TooMuch> {
        let mut callers = self.callers();
        let account = callers.entry(asker.clone()).or_default();
        if account.asked >= self.bound.asked {
            return Err(TooMuch::AtOnce);
        }
        if cost == Cost::High {
            account.bucket.take(self.bound.rate, now).map_err(TooMuch::Often)?;
        }
        account.asked += 1;
        Ok(Arc::clone(&account.turn))
    }

    fn callers(&self) -> MutexGuard<'_, BTreeMap<Asker, Account>> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A question that is waiting or worked on, for as long as this lives.
struct Entered {
    questions: Questions,
    asker: Asker,
    is_answered: bool,
}

impl Entered {
    fn kind(&self) -> &Kind {
        self.questions.kind(&self.asker)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(account) = self.kind().callers().get_mut(&self.asker) {
            account.asked -= 1;
        }
        let metrics = &self.questions.0.metrics;
        metrics.questions_open.dec();
        metrics.question(match self.is_answered {
            true => metrics::Question::Answered,
            false => metrics::Question::GivenUp,
        });
    }
}

/// Why a question is not even heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TooMuch {
    AtOnce,
    Often(std::time::Duration),
}

impl TooMuch {
    fn status(self, caller: &Caller, bound: Bound) -> Status {
        let who = match caller {
            Caller::Root => "root".to_owned(),
            Caller::Admin { name } => format!("admin `{name}`"),
            Caller::Node(node) => format!("node `{}`", node.name),
        };
        let Bound { asked, rate: Rate { per_second, burst }, places: _ } = bound;
        Status::resource_exhausted(match self {
            Self::AtOnce => format!(
                "{who} has {asked} questions open, which is as many as one caller may have; try again when one of them is \
                 answered"
            ),
            Self::Often(wait) => format!(
                "{who} calls too often: one caller may call {burst} times at once, and then {per_second} times a second; \
                 try again in {} ms",
                wait.as_millis().max(1)
            ),
        })
    }
}

#[cfg(test)]
mod tests;
