//! The whole state written anew on a thread of its own, while the journal goes on.
//!
//! | step | by | on disk after it |
//! | --- | --- | --- |
//! | 1 | the thread | the whole state as `state.next`, and a `journal.next` that continues it, without entries |
//! | 2 | the journal | `journal.next` has what was kept since step 1 began; from here on both journals get every entry |
//! | 3 | the thread | `state.next` is `state` |
//! | 4 | the thread | `journal.next` is `journal` |
//!
//! Each step is on disk before the next one begins, and a journal names the whole state that it continues. So whoever reads
//! finds one of the two whole states, and the journal that goes with it has all that was acknowledged.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use host::file::{self, FileError};

use super::journal::{self, MAGIC};
use super::state::{self, DIGEST, State};

/// The names of both files until they are those of the state and its journal.
const NEXT_STATE: &str = "state.next";
pub(super) const NEXT_JOURNAL: &str = "journal.next";

/// What has come of it, by step.
pub(super) enum News {
    /// After step 1; the journal is to be continued.
    Written {
        digest: [u8; DIGEST],
        whole: u64,
        journal: File,
    },
    /// After step 4.
    Replaced,
    Failed(FileError),
}

/// A compaction under way, as the journal's owner has it.
pub(super) struct Compaction {
    news: Receiver<News>,
    /// Step 3 begins when a word comes, and never if none can come any more.
    go_on: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// As the thread has it.
pub(super) struct Worker {
    state_dir: PathBuf,
    news: Sender<News>,
    go_on: Receiver<()>,
}

impl Compaction {
    pub(super) fn new(state_dir: &Path) -> (Self, Worker) {
        let ((news, hear), (go_on, wait)) = (mpsc::channel(), mpsc::channel());
        let worker = Worker { state_dir: state_dir.to_owned(), news, go_on: wait };
        (Self { news: hear, go_on: Some(go_on), thread: None }, worker)
    }

    pub(super) fn start(state_dir: &Path, state: State) -> Self {
        let (mut compaction, worker) = Self::new(state_dir);
        compaction.thread = Some(thread::spawn(move || worker.run(&state)));
        compaction
    }

    /// What has come since it was last asked.
    pub(super) fn hear(&self) -> Option<News> {
        self.news.try_recv().ok()
    }

    #[cfg(test)]
    pub(super) fn wait(&self) -> Option<News> {
        self.news.recv().ok()
    }

    /// After step 2.
    pub(super) fn go_on(&self) {
        let _ = self.go_on.iter().try_for_each(|go_on| go_on.send(()));
    }
}

/// Nobody else writes the state once it is dropped.
impl Drop for Compaction {
    fn drop(&mut self) {
        self.go_on = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Worker {
    fn run(&self, state: &State) {
        let news = match self.write(state) {
            Ok(written) => written,
            Err(error) => News::Failed(error),
        };
        let is_written = matches!(news, News::Written { .. });
        let _ = self.news.send(news);
        if !is_written || self.go_on.recv().is_err() {
            return;
        }
        let replaced = self.replace_state().and_then(|()| self.replace_journal());
        let _ = self.news.send(replaced.map_or_else(News::Failed, |()| News::Replaced));
    }

    pub(super) fn write(&self, state: &State) -> Result<News, FileError> {
        let (digest, whole) = state::store(&self.state_dir.join(NEXT_STATE), state)?;
        let path = self.state_dir.join(NEXT_JOURNAL);
        file::write_private(&path, &[MAGIC, &digest].concat())?;
        let journal = OpenOptions::new().append(true).open(&path).map_err(FileError::new("open", &path))?;
        Ok(News::Written { digest, whole, journal })
    }

    pub(super) fn replace_state(&self) -> Result<(), FileError> {
        file::replace(&self.state_dir.join(state::FILE), &self.state_dir.join(NEXT_STATE))
    }

    pub(super) fn replace_journal(&self) -> Result<(), FileError> {
        file::replace(&self.state_dir.join(journal::FILE), &self.state_dir.join(NEXT_JOURNAL))
    }
}

/// Removes what a compaction that came to no end has left.
pub(super) fn remove(state_dir: &Path) -> Result<(), FileError> {
    [NEXT_STATE, NEXT_JOURNAL].iter().try_for_each(|name| {
        file::remove_aside(&state_dir.join(name))?;
        file::remove(&state_dir.join(name))
    })
}
