//! Many nodes in several processes, since one may not have as many connections. A process is told on its stdin what to
//! do, and tells on its stdout what its nodes hear.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

use super::follower::Follower;
use super::running::Running;
use super::seed::node_dir;
use super::shape::Shape;

/// Nodes of one process, each of which is an open file or two.
const EACH: usize = 3_500;
/// Nodes of one process that connect for the first time at once. This machine has the CPUs of one of them.
const CONNECTING: usize = 64;
/// Bytes by which the heap of one process grows.
const HEAP_STEP: usize = 8 << 20;
/// Threads of one process's runtime.
const THREADS: usize = 2;

/// What a node has heard or done, and when, in nanoseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A new slice is here, checked whole.
    Received { index: u32, revision: u64, at: u64 },
    /// It is in force (or acknowledged, at a node that has no kernel).
    Enforced { index: u32, revision: u64, at: u64 },
    /// A peer's WireGuard is now at this port.
    Moved { observer: u32, index: u32, port: u16, at: u64 },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Received { index, revision, at } => write!(f, "received {index} {revision} {at}"),
            Self::Enforced { index, revision, at } => write!(f, "enforced {index} {revision} {at}"),
            Self::Moved { observer, index, port, at } => write!(f, "moved {observer} {index} {port} {at}"),
        }
    }
}

impl FromStr for Event {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        Ok(match words[..] {
            ["received", index, revision, at] => {
                Self::Received { index: index.parse()?, revision: revision.parse()?, at: at.parse()? }
            }
            ["enforced", index, revision, at] => {
                Self::Enforced { index: index.parse()?, revision: revision.parse()?, at: at.parse()? }
            }
            ["moved", observer, index, port, at] => {
                Self::Moved { observer: observer.parse()?, index: index.parse()?, port: port.parse()?, at: at.parse()? }
            }
            _ => anyhow::bail!("`{line}` is no event"),
        })
    }
}

/// Nanoseconds since the epoch: what processes of one machine have in common.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Where nodes tell their events.
#[derive(Clone, Debug)]
pub(super) struct Events(Sender<Event>);

impl Events {
    pub(super) fn say(&self, event: impl FnOnce(u64) -> Event) {
        // The process ends when nobody listens.
        let _ = self.0.send(event(now()));
    }
}

/// What a process of nodes is told at its start.
#[derive(Clone, Debug, clap::Args)]
pub struct Process {
    /// The directory of the nodes' state directories.
    #[arg(long)]
    nodes: PathBuf,
    /// Its nodes, by index.
    #[arg(long, value_delimiter = ',')]
    indices: Vec<u32>,
    /// Nodes that put in force what they receive, and watch those that move.
    #[arg(long, value_delimiter = ',')]
    enforcing: Vec<u32>,
    /// Nodes that can be made to move.
    #[arg(long, value_delimiter = ',')]
    moving: Vec<u32>,
}

/// A process of nodes: until its stdin ends.
pub fn run(process: &Process) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || write_events(&receiver));
    let events = Events(sender);
    let runtime = Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let mut moving: BTreeMap<u32, (Follower, Option<Runtime>)> = BTreeMap::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["start"] => {
                for follower in process.followers() {
                    if process.moving.contains(&follower.index) {
                        let own = start_alone(&follower, &events)?;
                        moving.insert(follower.index, (follower, Some(own)));
                    }
                }
                start_all(process, &runtime, &events);
            }
            ["move", index, port] => {
                let (follower, own) = moving.get_mut(&index.parse()?).context("that node does not move")?;
                if let Some(own) = own.take() {
                    own.shutdown_background();
                }
                follower.listen_port = port.parse()?;
                *own = Some(start_alone(follower, &events)?);
            }
            _ => anyhow::bail!("`{line}` is no command"),
        }
    }
    runtime.shutdown_background();
    moving.into_values().filter_map(|(_, own)| own).for_each(Runtime::shutdown_background);
    Ok(())
}

/// With a runtime of its own, so that it can be stopped.
fn start_alone(follower: &Follower, events: &Events) -> Result<Runtime> {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let _inside = runtime.enter();
    follower.start(None, events.clone())?;
    drop(_inside);
    Ok(runtime)
}

fn start_all(process: &Process, runtime: &Runtime, events: &Events) {
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let followers: Vec<Follower> =
        process.followers().filter(|follower| !process.moving.contains(&follower.index)).collect();
    let events = events.clone();
    runtime.spawn(async move {
        for follower in followers {
            let Ok(turn) = Arc::clone(&connecting).acquire_owned().await else { return };
            if let Err(error) = follower.start(Some(turn), events.clone()) {
                eprintln!("error: node {}: {error:#}", follower.index);
                std::process::exit(1);
            }
        }
    });
}

impl Process {
    fn followers(&self) -> impl Iterator<Item = Follower> {
        let watched: Arc<Vec<_>> = Arc::new(self.moving.iter().map(|&index| (index, Shape::node_id(index))).collect());
        self.indices.iter().map(move |&index| {
            let enforces = self.enforcing.contains(&index);
            Follower {
                index,
                state_dir: node_dir(&self.nodes, index),
                listen_port: Shape::port(index),
                enforces,
                watched: if enforces { Arc::clone(&watched) } else { Arc::default() },
                held: Arc::new(Mutex::default()),
            }
        })
    }
}

fn write_events(receiver: &Receiver<Event>) {
    let mut stdout = BufWriter::new(std::io::stdout().lock());
    while let Ok(event) = receiver.recv() {
        let mut written = writeln!(stdout, "{event}");
        while let Ok(event) = receiver.try_recv() {
            written = written.and_then(|()| writeln!(stdout, "{event}"));
        }
        if written.and_then(|()| stdout.flush()).is_err() {
            std::process::exit(0);
        }
    }
}

/// All nodes of a network, as the bench holds them.
#[derive(Debug)]
pub(super) struct Crowd {
    processes: Vec<(Vec<u32>, Running, ChildStdin)>,
    events: Receiver<Event>,
}

impl Crowd {
    /// Makes the processes; no node connects yet. `moving` are among `enforcing`.
    pub(super) fn new(nodes: &std::path::Path, indices: &[u32], enforcing: &[u32], moving: &[u32]) -> Result<Self> {
        let (sender, events) = mpsc::channel();
        let mut processes = Vec::new();
        for indices in indices.chunks(EACH) {
            let list = |of: &[u32]| {
                let own: Vec<String> = of.iter().map(u32::to_string).collect();
                own.join(",")
            };
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["control-followers", "--nodes"]).arg(nodes).args(["--indices", &list(indices)]);
            for (option, of) in [("--enforcing", enforcing), ("--moving", moving)] {
                if !of.is_empty() {
                    command.args([option, &list(of)]);
                }
            }
            // Thousands of nodes share an allocator that each has for itself elsewhere: one heap, which grows in larger steps.
            command.env("MALLOC_ARENA_MAX", "1").env("MALLOC_TOP_PAD_", HEAP_STEP.to_string());
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut process = Running::start(&mut command)?;
            let child = &mut process.0;
            let (stdin, stdout) = (child.stdin.take().context("no stdin")?, child.stdout.take().context("no stdout")?);
            let sender = sender.clone();
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    let sent = line.parse().map(|event| sender.send(event));
                    if !matches!(sent, Ok(Ok(()))) {
                        return;
                    }
                }
            });
            processes.push((indices.to_vec(), process, stdin));
        }
        Ok(Self { processes, events })
    }

    /// Lets every node connect.
    pub(super) fn start(&mut self) -> Result<()> {
        for (_, _, stdin) in &mut self.processes {
            writeln!(stdin, "start")?;
        }
        Ok(())
    }

    /// Lets a node connect anew, with WireGuard at another port.
    pub(super) fn move_to(&mut self, index: u32, port: u16) -> Result<()> {
        let process = self.processes.iter_mut().find(|(indices, ..)| indices.contains(&index));
        let (_, _, stdin) = process.context("there is no such node")?;
        Ok(writeln!(stdin, "move {index} {port}")?)
    }

    /// Events until `enough` says so, or until the time is over (`false`).
    pub(super) fn until(&mut self, limit: Duration, mut enough: impl FnMut(Event) -> bool) -> Result<bool> {
        let end = Instant::now() + limit;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(event) if enough(event) => return Ok(true),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the processes of nodes have ended"),
            }
        }
    }

    /// Every process is still there.
    pub(super) fn check(&mut self) -> Result<()> {
        for (_, process, _) in &mut self.processes {
            let ended = process.0.try_wait()?;
            ensure!(ended.is_none(), "a process of nodes has ended: {ended:?}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_as_it_was_written() {
        let events = [
            Event::Received { index: 1, revision: 2, at: 3 },
            Event::Enforced { index: 9_999, revision: u64::MAX, at: 1 },
            Event::Moved { observer: 4, index: 5, port: 6, at: 7 },
        ];
        for event in events {
            assert_eq!(event.to_string().parse::<Event>().expect("an event"), event);
        }
        assert!("received 1 2".parse::<Event>().is_err() && "gone 1 2 3".parse::<Event>().is_err());
    }
}
