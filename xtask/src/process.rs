//! Commands with a time limit, in process groups of their own, that never outlive what started them.
//!
//! A signal that asks us to stop goes on to the group of the command that runs, which gets time to clean up. It is
//! handled and not blocked, since commands would inherit a mask.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How often a running command is looked at.
const POLL: Duration = Duration::from_millis(20);
/// What a command gets to clean up in after a signal, before it is killed. The demo takes down a mesh in it.
const GRACE: Duration = Duration::from_secs(30);

/// What orphans get to end by themselves in, as those do that die with their parent.
const ORPHAN_GRACE: Duration = Duration::from_secs(2);
/// When to give up on orphans that do not die.
const ORPHAN_LIMIT: Duration = Duration::from_secs(10);

static SIGNALS: AtomicUsize = AtomicUsize::new(0);
static LAST_SIGNAL: AtomicI32 = AtomicI32::new(0);
static REAPER: AtomicBool = AtomicBool::new(false);

/// Takes over SIGINT, SIGTERM and SIGHUP for this process, and the orphans of its commands. To be called first.
pub(crate) fn watch_signals() -> Result<()> {
    prctl::set_child_subreaper(true).context("failed to become the reaper of orphans")?;
    REAPER.store(true, Ordering::SeqCst);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("failed to handle signals")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            LAST_SIGNAL.store(signal, Ordering::SeqCst);
            SIGNALS.fetch_add(1, Ordering::SeqCst);
        }
    });
    Ok(())
}

/// The signal that asked this process to stop, if any.
pub(crate) fn interrupted() -> Option<Signal> {
    Signal::try_from(LAST_SIGNAL.load(Ordering::SeqCst)).ok()
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Exited(ExitStatus),
    /// It was killed, with everything it had started.
    TimedOut(Duration),
    Interrupted(Signal),
}

impl Ended {
    pub(crate) fn success(self) -> bool {
        matches!(self, Self::Exited(status) if status.success())
    }

    /// The exit status that says the same to our caller, as a shell would.
    pub(crate) fn code(self) -> u8 {
        let code = match self {
            Self::Exited(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            Self::TimedOut(_) => 124,
            Self::Interrupted(signal) => 128 + signal as i32,
        };
        u8::try_from(code).unwrap_or(1)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => status.fmt(f),
            Self::TimedOut(limit) => write!(f, "killed at its limit of {} s", limit.as_secs()),
            Self::Interrupted(signal) => write!(f, "interrupted by {signal}"),
        }
    }
}

/// A command that runs in a new process group. Dropping it kills the group.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    started: Instant,
    ended: Option<ExitStatus>,
}

impl Running {
    /// Starts `command` without standard input.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        if let Some(signal) = interrupted() {
            bail!("interrupted by {signal}");
        }
        let child = command
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .with_context(|| format!("failed to start `{}`", command.get_program().display()))?;
        Ok(Self { child, started: Instant::now(), ended: None })
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits until it ends, for `limit` at most. `tick` is called now and then while it runs.
    pub(crate) fn wait(mut self, limit: Duration, mut tick: impl FnMut()) -> Result<Ended> {
        let mut passed_on = None;
        loop {
            if let Some(status) = self.child.try_wait().context("failed to wait for a command")? {
                self.ended = Some(status);
                return Ok(passed_on.map_or(Ended::Exited(status), |(signal, _)| Ended::Interrupted(signal)));
            }
            match (interrupted(), passed_on) {
                (Some(signal), None) => {
                    let _gone = killpg(self.group(), signal);
                    passed_on = Some((signal, Instant::now()));
                }
                (_, Some((signal, since))) if SIGNALS.load(Ordering::SeqCst) > 1 || since.elapsed() > GRACE => {
                    self.kill()?;
                    return Ok(Ended::Interrupted(signal));
                }
                _ => {}
            }
            if passed_on.is_none() && self.started.elapsed() > limit {
                self.kill()?;
                return Ok(Ended::TimedOut(limit));
            }
            self.reap_others();
            tick();
            thread::sleep(POLL);
        }
    }

    /// Reaps orphans that have ended, so that a program that waits for a process to be gone does not wait for a zombie.
    fn reap_others(&self) {
        let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        while REAPER.load(Ordering::SeqCst) {
            match waitid(Id::All, ended | WaitPidFlag::WNOWAIT).ok().and_then(|status| status.pid()) {
                Some(pid) if pid != self.group() => drop(waitid(Id::Pid(pid), ended)),
                _ => break,
            }
        }
    }

    fn kill(&mut self) -> Result<()> {
        let _gone = killpg(self.group(), Signal::SIGKILL);
        self.ended = Some(self.child.wait().context("failed to wait for a killed command")?);
        Ok(())
    }

    fn group(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _best_effort = self.kill();
        }
    }
}

/// Runs a command with our standard output and error.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<Ended> {
    Running::spawn(command)?.wait(limit, || ())
}

/// Standard output of a command that must succeed; its standard error is part of the failure.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start `{}`", command.get_program().display()))?;
    if !output.status.success() {
        bail!("`{shown}` failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{shown}` printed something that is not text"))
}

/// A command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// A process that an ended command left behind; this process is its reaper.
#[derive(Debug)]
pub(crate) struct Orphan {
    pid: Pid,
    name: String,
}

impl fmt::Display for Orphan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ({})", self.name, self.pid)
    }
}

/// Kills what ended commands left running and says what that was. To be called while no command runs: every child
/// that is there is an orphan then.
pub(crate) fn kill_orphans() -> Vec<Orphan> {
    let started = Instant::now();
    let mut killed: Vec<Orphan> = Vec::new();
    loop {
        // The first process of a pid namespace is not gone before the others are reaped, so nothing here may block.
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status.pid().is_some()) {}
        let orphans = orphans();
        if orphans.is_empty() || started.elapsed() > ORPHAN_GRACE + ORPHAN_LIMIT {
            return killed;
        }
        if started.elapsed() > ORPHAN_GRACE {
            for orphan in orphans {
                let _gone = kill(orphan.pid, Signal::SIGKILL);
                if killed.iter().all(|known| known.pid != orphan.pid) {
                    killed.push(orphan);
                }
            }
        }
        thread::sleep(POLL);
    }
}

fn orphans() -> Vec<Orphan> {
    let own = std::process::id().to_string();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let of = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // `pid (name) state parent ...`; the name may contain anything.
        let (head, rest) = stat.rsplit_once(')')?;
        (rest.split_whitespace().nth(1)? == own)
            .then(|| Orphan { pid: Pid::from_raw(pid), name: head.split_once('(').map_or("", |(_, name)| name).into() })
    };
    entries.flatten().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_killed_at_its_limit_with_what_it_started() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & sleep 1000"]);
        let limit = Duration::from_millis(100);
        let running = Running::spawn(&mut command).unwrap();
        let group = running.group();
        assert_eq!(running.wait(limit, || ()).unwrap(), Ended::TimedOut(limit));
        let deadline = Instant::now() + Duration::from_secs(10);
        while killpg(group, None).is_ok() {
            assert!(Instant::now() < deadline, "the group is still there");
            thread::yield_now();
        }
    }

    #[test]
    fn an_exit_status_is_passed_on() {
        let mut command = Command::new("sh");
        command.args(["-c", "exit 3"]);
        let ended = run(&mut command, Duration::from_secs(10)).unwrap();
        assert_eq!((ended.success(), ended.code()), (false, 3));
    }
}
