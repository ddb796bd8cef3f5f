//! A host of its own: network, mount and process namespaces held by one process. Killing the holder ends every
//! process inside, and with them the links, mounts and pins.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;

/// The first process of a namespace makes the mounts, then reaps orphans.
const HOLDER: &str = "
set -e
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs -o mode=0755 tmpfs /run
ip link set lo up
echo ready
while :; do sleep 1000 & wait; done
";

/// Whether a namespace can outlive the process that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// It dies with its maker, even by SIGKILL.
    Bound,
    /// It dies when dropped, and stays when forgotten (`--keep`).
    Keepable,
}

/// The outer processes of all namespaces that are not dropped yet, for [`end_all`].
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Ends every namespace of this process; for signal handlers' threads.
pub fn end_all() {
    for pid in RUNNING.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        if let Ok(pid) = pid.try_into() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Ctrl-C and SIGTERM end every namespace, and with them everything that was started; `clean_up` does what is left to do.
pub fn end_all_on_signal(clean_up: fn()) {
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut terminate =
                tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("a signal handler");
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        });
        end_all();
        clean_up();
        std::process::exit(130);
    });
}

/// A running host.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    unshare: Child,
    /// The first process inside, as seen from outside.
    holder: u32,
}

impl Namespace {
    /// Makes a host with nothing but a loopback interface. Needs root.
    pub fn new(name: &str, lifetime: Lifetime) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root; run this as root");
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--propagation", "private", "--"])
            .args(["sh", "-c", HOLDER])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .process_group(0);
        if lifetime == Lifetime::Bound {
            die_with_parent(&mut command);
        }
        let mut unshare = command.spawn().context("failed to start `unshare`; it is in the package util-linux")?;
        let mut ready = String::new();
        let stdout = unshare.stdout.take().context("`unshare` has no stdout")?;
        BufReader::new(stdout).read_line(&mut ready)?;
        if ready.trim() != "ready" {
            let _ = unshare.kill();
            let _ = unshare.wait();
            bail!("the namespace `{name}` did not come up; see the message above");
        }
        let holder = child_of(unshare.id())?;
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).push(unshare.id());
        Ok(Self { name: name.to_owned(), unshare, holder })
    }

    /// As given to [`Namespace::new`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process to give to `nsenter --target`.
    pub fn holder(&self) -> u32 {
        self.holder
    }

    /// Runs `work` inside, on a new thread. Sockets that it opens belong to the namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let open = |kind: &str| File::open(format!("/proc/{}/ns/{kind}", self.holder));
        let (net, pid, mnt) = (open("net")?, open("pid")?, open("mnt")?);
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                unshare(CloneFlags::CLONE_FS)?;
                setns(net, CloneFlags::CLONE_NEWNET)?;
                setns(pid, CloneFlags::CLONE_NEWPID)?;
                setns(mnt, CloneFlags::CLONE_NEWNS)?;
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
        .with_context(|| format!("in the namespace `{}`", self.name))
    }

    /// Starts a process inside; its id is that seen from outside.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.enter(|| command.spawn().with_context(|| format!("failed to start {command:?}")))
    }

    /// Runs a process inside to its end.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        let child = self.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        Ok(child.wait_with_output()?)
    }

    /// Runs a process inside that must succeed; returns its stdout.
    pub fn run(&self, program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        let output = self.output(command.args(args))?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{command:?} in `{}` ended with {}: {stdout}{stderr}", self.name, output.status);
        }
        Ok(stdout)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).retain(|pid| *pid != self.unshare.id());
    }
}

/// Sends a signal to a process that this program started.
pub fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into()?);
    Ok(nix::sys::signal::kill(pid, signal)?)
}

/// SIGKILL when the thread that starts `command` ends, so that nothing outlives a killed test.
#[allow(unsafe_code, reason = "pre_exec is unsafe by its signature")]
pub(crate) fn die_with_parent(command: &mut Command) {
    // SAFETY: the closure makes one system call, which is allowed between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
}

/// The only child of a process.
fn child_of(parent: u32) -> Result<u32> {
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // "pid (name) state ppid …"; a name may hold anything, also parentheses.
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        if rest.split_whitespace().nth(1).and_then(|ppid| ppid.parse().ok()) == Some(parent) {
            return Ok(pid);
        }
    }
    bail!("process {parent} has no child")
}
