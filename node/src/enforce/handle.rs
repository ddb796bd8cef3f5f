//! How others reach the thread that touches the kernel.

use std::sync::Arc;
use std::sync::mpsc;

use policy::Slice;
use tokio::sync::{oneshot, watch};

use super::{Enforcer, Names};
use crate::uplink::follow::Enforced;
use crate::view::Unanswered;

/// How others reach the thread. It ends when the last of these is gone; what it enforces stays.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) commands: mpsc::Sender<Command>,
    pub enforced: watch::Receiver<Enforced>,
    pub names: watch::Receiver<Arc<Names>>,
}

/// The thread is no more; that is a bug, and the kernel keeps enforcing what it has.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the thread that owns the kernel's interface has ended: restart `noded`")]
pub struct Gone;

impl From<Gone> for Unanswered {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

/// What the thread is told or asked.
pub(super) enum Command {
    Enforce(Arc<Slice>),
    Ask(Box<dyn FnOnce(&mut Enforcer) + Send>),
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Enforce(slice) => write!(f, "Enforce({})", slice.revision),
            Self::Ask(_) => f.write_str("Ask"),
        }
    }
}

impl Handle {
    /// Makes a slice the intent. What came of it shows in `enforced`.
    pub fn enforce(&self, slice: Arc<Slice>) -> Result<(), Gone> {
        self.commands.send(Command::Enforce(slice)).map_err(|_| Gone)
    }

    /// Runs something on the thread, between two rounds.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Enforcer) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        self.put(|enforcer, answer| drop(answer.send(question(enforcer)))).await
    }

    /// As [`Self::ask`], for what changes nothing: passed over where nobody waits for the answer any more.
    pub async fn look<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Enforcer) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let unless_gone = |enforcer: &mut Enforcer, answer: oneshot::Sender<T>| {
            if !answer.is_closed() {
                drop(answer.send(question(enforcer)));
            }
        };
        self.put(unless_gone).await
    }

    async fn put<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Enforcer, oneshot::Sender<T>) + Send + 'static,
    ) -> Result<T, Gone> {
        let (answer, answered) = oneshot::channel();
        let question = Box::new(move |enforcer: &mut Enforcer| question(enforcer, answer));
        self.commands.send(Command::Ask(question)).map_err(|_| Gone)?;
        answered.await.map_err(|_| Gone)
    }
}
