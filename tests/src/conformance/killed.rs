//! Agents that are killed at every call with which they change the kernel, while packets come: what they leave is the old
//! policy or the new one, and the next agent goes on from there.

use std::env;
use std::fs::File;
use std::mem::offset_of;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use ebpf_common::table::TableCopy;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use node::kernel::Datapath;
use node::kernel::datapath::EbpfDatapath;
use node::lower::Tables;

use super::ear::Ear;
use super::fault::{Call, Fate, deadly, in_child, mark, supervised};
use super::network::{ENDS, allowing, node, small};
use super::{INTERFACE, Lab, attachments, is_emulated, wait_until};

/// The numbers of the calls to be killed at: each, or on an emulated processor one of a few.
fn calls() -> impl Iterator<Item = usize> {
    let step = if is_emulated() { 8 } else { 1 };
    (0..).step_by(step)
}

/// Set in the environment of a test that runs in a separate process.
const ALONE: &str = "RAMPART_ALONE";

/// Runs the test of this name in a separate process: the test forks, and a child would keep open what other tests close.
pub fn alone(name: &str, test: impl FnOnce()) {
    if env::var_os(ALONE).is_some() {
        return test();
    }
    let own = env::current_exe().expect("this program");
    let output = Command::new(own).args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().expect("started");
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "`{name}` by itself: {}", output.status);
}

const BOTH: u16 = 1_001;
const OLD: u16 = 1_002;
const NEW: u16 = 1_003;
const NEITHER: u16 = 1_004;

struct Bench<'a> {
    lab: &'a mut Lab,
    ears: Vec<(u16, Ear)>,
    old: Tables,
    new: Tables,
}

/// How an agent ended that was to be killed at a call.
enum Ended {
    Killed(Call),
    /// It made fewer calls than that.
    Finished,
}

pub fn leave_the_old_policy_or_the_new(lab: &mut Lab) {
    lab.give_addresses();
    let [web, db, ..] = ENDS[0];
    let tun = lab.tun.try_clone().expect("a descriptor");
    let ears = [BOTH, OLD, NEW, NEITHER].map(|port| (port, Ear::new(&tun, db, web, port))).into_iter().collect();
    let mut tables = |own: u16| {
        let network = allowing(small(), "both", "cidr:db", "cidr:web", &format!("udp/{BOTH}"));
        let network = allowing(network, &format!("open-{own}"), "cidr:db", "cidr:web", &format!("udp/{own}"));
        lab.lower(&network, node(&network, "web1")).1
    };
    let (old, new) = (tables(OLD), tables(NEW));
    let mut bench = Bench { lab, ears, old, new };
    bench.while_attaching_anew();
    bench.under_traffic(&tun, Bench::while_taking_over);
    // The switch is the same however the programs hang on the interface.
    if bench.lab.attachment() == attachments()[0] {
        bench.under_traffic(&tun, Bench::while_switching);
        bench.under_traffic(&tun, Bench::while_filling);
    }
    bench.lab.restart();
    bench.lab.datapath.detach().expect("detached");
    assert!(!bench.lab.bpffs.join("rampart").exists(), "no pins are left");
}

/// However an agent ends, what it put in force stays, without any process that holds it.
pub fn leave_enforcement(lab: &mut Lab) {
    lab.give_addresses();
    let [web, db, ..] = ENDS[0];
    let mut ears = [OLD, NEW].map(|port| Ear::new(&lab.tun, db, web, port));
    let mut tables = [OLD, NEW].map(|port| {
        let network = allowing(small(), &format!("open-{port}"), "cidr:db", "cidr:web", &format!("udp/{port}"));
        lab.lower(&network, node(&network, "web1")).1
    });
    // What a panic leaves behind: its destructors run; and a signal: they do not.
    type End = (&'static str, fn(), WaitStatus);
    let child = nix::unistd::Pid::from_raw(0);
    let ends: [End; 3] = [
        ("a clean exit", || (), WaitStatus::Exited(child, 0)),
        ("a panic", || panic!("as a bug would"), WaitStatus::Exited(child, 1)),
        ("SIGKILL", mark, WaitStatus::Signaled(child, Signal::SIGKILL, false)),
    ];
    for (at, (what, end, expected)) in ends.into_iter().enumerate() {
        let (bpffs, attachment, tables) = (lab.bpffs.clone(), lab.attachment(), tables[at % 2].clone());
        let at_the_mark = |call| if call == Call::Mark { Fate::Kills } else { Fate::Happens };
        let status = supervised(at_the_mark, || {
            in_child(|| {
                let mut datapath = EbpfDatapath::new(INTERFACE, &bpffs).with_attachment(attachment);
                datapath.attach().expect("attached");
                datapath.switch(&tables).expect("switched");
                end();
            })
        });
        match (status, expected) {
            (WaitStatus::Exited(_, a), WaitStatus::Exited(_, b)) if a == b => {}
            (WaitStatus::Signaled(_, a, _), WaitStatus::Signaled(_, b, _)) if a == b => {}
            (status, _) => panic!("{what}: the agent ended with {status:?}"),
        }
        let open = ears.each_mut().map(Ear::hears);
        assert_eq!(open, [at % 2 == 0, at % 2 == 1], "after {what}");
        let state = lab.datapath.observe().expect("observed");
        assert_eq!((state.egress, state.ingress, state.generation.0), (true, true, at as u64 + 1), "after {what}");
    }
    tables.reverse();
    lab.datapath.attach().expect("taken over");
    lab.datapath.switch(&tables[0]).expect("switched");
    assert_eq!(ears.each_mut().map(Ear::hears), [false, true]);
}

impl Bench<'_> {
    /// What both policies allow passes, and what neither does not, at each moment of `work`.
    fn under_traffic(&mut self, tun: &File, work: fn(&mut Self)) {
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        self.take_over_and_switch();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let [web, db, ..] = ENDS[1];
                let mut both = Ear::new(tun, db, web, BOTH);
                let mut neither = Ear::new(tun, db, web, NEITHER);
                let mut sent = 0_u64;
                while !over.load(Ordering::Acquire) {
                    assert!(both.hears(), "what both policies allow was dropped after {sent} packets");
                    assert!(!neither.hears(), "what both policies deny passed after {sent} packets");
                    sent += 1;
                }
                sent
            });
            let end = End(&over);
            work(self);
            drop(end);
            println!("{} packets of each kind meanwhile", sender.join().expect("the sender"));
        });
    }

    /// A new agent, as after a crash, finds one of the policies in force and puts the old one there.
    fn take_over_and_switch(&mut self) {
        self.lab.restart();
        self.lab.datapath.attach().expect("taken over");
        self.lab.datapath.switch(&self.old).expect("switched");
        assert_eq!(self.open(), [BOTH, OLD], "after a switch of the next agent");
        let state = self.lab.datapath.observe().expect("observed");
        assert_eq!((state.egress, state.ingress), (true, true), "in place");
        // Nothing but the pins holds it from here on.
        self.lab.restart();
    }

    fn open(&mut self) -> Vec<u16> {
        self.ears.iter_mut().filter_map(|(port, ear)| ear.hears().then_some(*port)).collect()
    }

    fn while_switching(&mut self) {
        let mut killed = Vec::new();
        for number in calls() {
            let new = &self.new;
            let agent = |datapath: &mut EbpfDatapath| {
                datapath.attach().expect("attached");
                mark();
                datapath.switch(new).expect("switched");
                datapath.settle().expect("settled");
            };
            let ended = self.kill_at(number, true, agent);
            let open = self.open();
            assert!(
                open == [BOTH, OLD] || open == [BOTH, NEW],
                "killed at call {number} of a switch: {open:?} are open"
            );
            self.take_over_and_switch();
            match ended {
                Ended::Killed(call) => killed.push((call, open)),
                Ended::Finished => break,
            }
        }
        println!("killed {} times while switching", killed.len());
        assert!(killed.first().is_some_and(|(_, open)| *open == [BOTH, OLD]), "{killed:?}");
    }

    /// The idle copy is filled by writes to memory.
    fn while_filling(&mut self) {
        let tables = [
            ("blocks", offset_of!(TableCopy, blocks)),
            ("paths", offset_of!(TableCopy, paths)),
            ("leaves", offset_of!(TableCopy, leaves)),
            ("matrix", offset_of!(TableCopy, matrix)),
            ("pages", offset_of!(TableCopy, pages)),
            ("ports", offset_of!(TableCopy, ports)),
            ("decisions", offset_of!(TableCopy, decisions)),
        ];
        for (name, offset) in tables {
            let (bpffs, attachment, new) = (self.lab.bpffs.clone(), self.lab.attachment(), &self.new);
            let status = supervised(
                |_| Fate::Happens,
                || {
                    in_child(|| {
                        let mut datapath = EbpfDatapath::new(INTERFACE, &bpffs).with_attachment(attachment);
                        datapath.attach().expect("attached");
                        deadly(size_of::<TableCopy>(), offset).expect("guarded");
                        datapath.switch(new).expect("switched");
                    })
                },
            );
            assert!(
                matches!(status, WaitStatus::Signaled(_, Signal::SIGSEGV, _)),
                "{name} were not written: {status:?}"
            );
            assert_eq!(self.open(), [BOTH, OLD], "killed where {name} are written");
            self.take_over_and_switch();
        }
        println!("killed {} times while filling the idle copy", tables.len());
    }

    fn while_taking_over(&mut self) {
        let mut killed = 0;
        for number in calls() {
            let ended = self.kill_at(number, false, |datapath| datapath.attach().expect("attached"));
            assert_eq!(self.open(), [BOTH, OLD], "killed at call {number} of taking over");
            self.take_over_and_switch();
            match ended {
                Ended::Killed(_) => killed += 1,
                Ended::Finished => break,
            }
        }
        println!("killed {killed} times while taking over");
        assert!(killed > 0, "nothing was killed");
    }

    /// The link is not up yet: packets that arrive before the programs are attached are not the agent's fault.
    fn while_attaching_anew(&mut self) {
        let mut killed = 0;
        // A dozen of about sixty, others each time: most of them pin maps, all alike.
        let step = if is_emulated() { 30 } else { 5 };
        let mut number = rand::random_range(0..step);
        println!("begins with call {number}");
        loop {
            let ended = self.kill_at(number, false, |datapath| datapath.attach().expect("attached"));
            let open = self.open();
            let all = [BOTH, OLD, NEW, NEITHER];
            assert!(open.is_empty() || open == all, "killed at call {number} of attaching: {open:?} are open");
            self.lab.restart();
            self.lab.datapath.attach().expect("attached over what is there");
            assert_eq!(self.open(), Vec::<u16>::new(), "before the first policy, killed at call {number}");
            self.take_over_and_switch();
            self.lab.datapath.detach().expect("detached");
            assert!(!self.lab.bpffs.join("rampart").exists(), "pins are left, killed at call {number}");
            wait_until(|| self.open() == all, "the programs are gone");
            match ended {
                Ended::Killed(_) => killed += 1,
                Ended::Finished => break,
            }
            number += step;
        }
        println!("killed {killed} times while attaching");
        assert!(killed > 0, "nothing was killed");
    }

    /// Runs an agent that is killed at the call of this number among those that change something.
    fn kill_at(&self, number: usize, after_mark: bool, agent: impl Fn(&mut EbpfDatapath) + Sync) -> Ended {
        let (mut counting, mut seen, mut at) = (!after_mark, 0, None);
        let decide = |call: Call| {
            counting |= call == Call::Mark;
            // Nothing refers to a new map or program, nor does a read leave anything.
            if !(counting && call.leaves_something()) {
                return Fate::Happens;
            }
            seen += 1;
            if seen <= number {
                return Fate::Happens;
            }
            at = Some(call);
            Fate::Kills
        };
        let (bpffs, attachment) = (self.lab.bpffs.clone(), self.lab.attachment());
        let status = supervised(decide, || {
            in_child(|| agent(&mut EbpfDatapath::new(INTERFACE, &bpffs).with_attachment(attachment)))
        });
        match (status, at) {
            (WaitStatus::Signaled(_, Signal::SIGKILL, _), Some(call)) => Ended::Killed(call),
            (WaitStatus::Exited(_, 0), None) => Ended::Finished,
            other => panic!("the agent ended with {other:?}"),
        }
    }
}
