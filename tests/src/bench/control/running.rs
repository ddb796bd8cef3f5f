//! What a bench starts and leaves behind nowhere: processes and directories, also when a signal ends it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::namespace::die_with_parent;

/// What there is at this moment, for [`clean_up`].
static THINGS: Mutex<Things> = Mutex::new(Things { processes: Vec::new(), directories: Vec::new() });

struct Things {
    /// Not waited for yet, so that their ids are theirs.
    processes: Vec<u32>,
    directories: Vec<PathBuf>,
}

fn things() -> MutexGuard<'static, Things> {
    THINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process that is killed when dropped, and dies with this one.
#[derive(Debug)]
pub(super) struct Running(pub(super) Child);

impl Running {
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        die_with_parent(command);
        let mut things = things();
        let child = command.spawn().with_context(|| format!("failed to start {command:?}"))?;
        things.processes.push(child.id());
        Ok(Self(child))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        things().processes.retain(|id| *id != self.0.id());
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An empty directory below `root` that is removed when dropped.
pub(super) fn directory(root: &Path) -> Result<tempfile::TempDir> {
    let mut things = things();
    let directory = tempfile::Builder::new().prefix("rampart-bench-").tempdir_in(root)?;
    things.directories.push(directory.path().to_owned());
    Ok(directory)
}

/// Kills every process and removes every directory that there still is; for signal handlers' threads. Nothing can be
/// started any more.
pub fn clean_up() {
    let things = things();
    for id in &things.processes {
        let _ = i32::try_from(*id).map(|id| kill(Pid::from_raw(id), Signal::SIGKILL));
    }
    for directory in &things.directories {
        let _ = std::fs::remove_dir_all(directory);
    }
    // Held until the process ends.
    std::mem::forget(things);
}
