//! The `controllerd` that is measured: a process of its own, whose CPU and memory are read from outside.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use controller_api::v1::admin_client::AdminClient;
use controller_api::{client, v1};
use nix::sys::signal::Signal;
use policy::Change;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use super::running::Running;
use crate::mesh::program_folder;
use crate::metrics::Page;
use crate::namespace::signal;

/// Where it listens, at every address of the namespace.
pub(super) const PORT: u16 = 7_443;
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9_587);
/// How long it may take to read the largest network.
const START: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(15);
/// Between two looks at something that has no other way to tell.
pub(super) const POLL: Duration = Duration::from_millis(10);

/// A running controller.
#[derive(Debug)]
pub(super) struct Server {
    process: Running,
    state_dir: PathBuf,
    runtime: Runtime,
    admin: AdminClient<Channel>,
}

/// What was sent to nodes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sent {
    pub(super) snapshots: f64,
    pub(super) deltas: f64,
    /// Of the deltas.
    pub(super) bytes: f64,
}

impl Sent {
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            snapshots: self.snapshots - before.snapshots,
            deltas: self.deltas - before.deltas,
            bytes: self.bytes - before.bytes,
        }
    }

    pub(super) fn plus(self, more: Self) -> Self {
        Self {
            snapshots: self.snapshots + more.snapshots,
            deltas: self.deltas + more.deltas,
            bytes: self.bytes + more.bytes,
        }
    }
}

impl Server {
    /// Starts it on a state directory, and waits until it answers.
    pub(super) fn start(state_dir: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let mut process = spawn(state_dir)?;
        let admin = runtime.block_on(answers(state_dir, &mut process))?;
        Ok(Self { process, state_dir: state_dir.to_owned(), runtime, admin })
    }

    /// Ends it as an upgrade would, and starts it again. Returns the moment at which the new process was started.
    pub(super) fn restart(&mut self) -> Result<Instant> {
        signal(&self.process.0, Signal::SIGTERM)?;
        let end = Instant::now() + STOP;
        while self.process.0.try_wait()?.is_none() {
            ensure!(Instant::now() < end, "`controllerd` does not end");
            std::thread::sleep(POLL);
        }
        let started = Instant::now();
        self.process = spawn(&self.state_dir)?;
        self.admin = self.runtime.block_on(answers(&self.state_dir, &mut self.process))?;
        Ok(started)
    }

    /// One commit: its revision, and how long the call took.
    pub(super) fn commit(&mut self, change: &Change) -> Result<(u64, Duration)> {
        let request = v1::ChangeRequest {
            request_id: String::new(),
            expected_revision: 0,
            changes: vec![change.try_into()?],
            dry_run: false,
        };
        let start = Instant::now();
        let response = self.runtime.block_on(self.admin.change(request)).context("a change was refused")?;
        Ok((response.into_inner().revision, start.elapsed()))
    }

    /// How long a question of an admin takes: what is known of every node.
    pub(super) fn ask(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let asked = self.admin.get_status(v1::GetStatusRequest {});
        self.runtime.block_on(asked).context("a question was not answered")?;
        Ok(start.elapsed())
    }

    /// Runs something on the runtime that the bench itself uses.
    pub(super) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Nodes that are connected, and of these the ones that enforce what was sent to them.
    pub(super) fn followers(&self) -> Result<(u32, u32)> {
        let page = Page::scrape_here(METRICS)?;
        let gauge = |name: &str| page.sum(&format!("rampart_controller_{name}_nodes"), &[]) as u32;
        Ok((gauge("connected"), gauge("converged")))
    }

    pub(super) fn sent(&self) -> Result<Sent> {
        let page = Page::scrape_here(METRICS)?;
        let updates = |kind| page.sum("rampart_controller_updates_total", &[("kind", kind)]);
        let bytes = page.sum("rampart_controller_update_bytes_total", &[("kind", "delta")]);
        Ok(Sent { snapshots: updates("snapshot"), deltas: updates("delta"), bytes })
    }

    /// CPU seconds that the process has used so far.
    pub(super) fn cpu(&self) -> Result<f64> {
        process_cpu(self.process.0.id())
    }

    /// Memory that is its own, in KB, with its part of what it shares.
    pub(super) fn memory(&self) -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.process.0.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }
}

fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("bench.sock")
}

fn spawn(state_dir: &Path) -> Result<Running> {
    let mut command = Command::new(program_folder()?.join("controllerd"));
    command
        .args(["serve", "--config", "/dev/null", "--state-dir"])
        .arg(state_dir)
        .args(["--listen", &format!("0.0.0.0:{PORT}"), "--metrics", &METRICS.to_string(), "--socket"])
        .arg(socket(state_dir))
        .env("RUST_LOG", "error");
    Running::start(&mut command)
}

/// Waits until it answers at its socket.
async fn answers(state_dir: &Path, process: &mut Running) -> Result<AdminClient<Channel>> {
    let end = Instant::now() + START;
    loop {
        if let Ok(channel) = client::connect_unix(socket(state_dir)).await {
            let mut admin = AdminClient::new(channel).max_decoding_message_size(usize::MAX);
            if admin.list_admins(v1::ListAdminsRequest {}).await.is_ok() {
                return Ok(admin);
            }
        }
        if let Some(ended) = process.0.try_wait()? {
            bail!("`controllerd` ended with {ended}; see the message above");
        }
        ensure!(Instant::now() < end, "`controllerd` does not answer within {} s", START.as_secs());
        tokio::time::sleep(POLL).await;
    }
}

/// User and system time of all threads of a process, also of those that have ended. `/proc/PID/stat` counts ticks of
/// 10 ms; the process's own clock counts nanoseconds.
#[allow(unsafe_code, reason = "nix has no clocks of other processes without a feature that nothing else needs")]
fn process_cpu(pid: u32) -> Result<f64> {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: both pointers are to variables of this function that outlive the calls.
    let failed = unsafe {
        libc::clock_getcpuclockid(i32::try_from(pid)?, &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
    };
    ensure!(!failed, "process {pid} has no clock");
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9)
}
