//! Network namespaces, each held by a thread that runs what is given to it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::mpsc;
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace; it goes when its last process and this are gone.
pub(crate) struct Namespace {
    jobs: mpsc::Sender<Job>,
    thread: i32,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (sender, started) = mpsc::channel();
        thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .expect("this test makes a network namespace: run it as root");
            sender.send(nix::unistd::gettid().as_raw()).unwrap();
            queue.into_iter().for_each(|job| job());
        });
        let thread = started.recv().expect("this test makes a network namespace: run it as root");
        let namespace = Self { jobs, thread };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `job` inside and waits for it; its panic is the caller's.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, result) = mpsc::channel();
        let job = Box::new(move || {
            let _ = sender.send(catch_unwind(AssertUnwindSafe(job)));
        });
        self.jobs.send(job).expect("the namespace's thread runs");
        result.recv().unwrap().unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs iproute2's `ip` inside and gives what it prints.
    pub(crate) fn ip(&self, words: &str) -> String {
        let words = words.to_owned();
        self.run(move || {
            let output = Command::new("ip").args(words.split_whitespace()).output().expect("`ip` is installed");
            assert!(output.status.success(), "`ip {words}`: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// Joins the two by an underlay: 192.0.2.1 and 2001:db8::1 here, .2 and ::2 there, on a link `underlay`.
    pub(crate) fn join(&self, other: &Self) {
        self.ip(&format!("link add underlay type veth peer name underlay netns {}", other.thread));
        for (namespace, number) in [(self, 1), (other, 2)] {
            namespace.ip(&format!("addr add 192.0.2.{number}/24 dev underlay"));
            namespace.ip(&format!("addr add 2001:db8::{number}/64 dev underlay nodad"));
            namespace.ip("link set underlay up");
        }
    }
}
