//! The revisions of a store as they come.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use policy::Revision;

use super::{Entry, StoreError};

/// Commits that wait for one watcher before it is cut off; it then watches again from where it was.
const QUEUE: usize = 1_024;

/// See [`Store::watch`](super::Store::watch).
#[derive(Debug)]
pub struct Watch {
    after: Revision,
    backlog: VecDeque<Entry>,
    live: Receiver<Entry>,
}

impl Watch {
    /// The next revision; `None` if there is none within this time.
    pub fn next(&mut self, wait: Duration) -> Result<Option<Entry>, StoreError> {
        let entry = match self.backlog.pop_front() {
            Some(entry) => entry,
            None => match self.live.recv_timeout(wait) {
                Ok(entry) => entry,
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(StoreError::Lagged { after: self.after }),
            },
        };
        self.after = entry.revision;
        Ok(Some(entry))
    }
}

/// Those who watch one store. A watcher that does not keep up is cut off, and nobody waits for it.
#[derive(Debug, Default)]
pub(crate) struct Watchers(Vec<SyncSender<Entry>>);

impl Watchers {
    /// Called under the lock that commits are made under, so that nothing falls between backlog and live.
    pub(super) fn watch(&mut self, after: Revision, backlog: VecDeque<Entry>) -> Watch {
        let (sender, live) = sync_channel(QUEUE);
        self.0.push(sender);
        Watch { after, backlog, live }
    }

    pub(super) fn publish(&mut self, entry: &Entry) {
        self.0.retain(|watcher| watcher.try_send(entry.clone()).is_ok());
    }
}
