//! The kernel refuses one call after the other, in each step of attaching and switching, with each error that it has for
//! that: what ran goes on as before, the error says so, nothing is left lying about, and the next attempt succeeds.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ebpf_common::{EGRESS, INGRESS};
use nix::net::if_::if_nametoindex;
use node::kernel::{AttachMethod, Datapath, KernelError};
use node::lower::Tables;
use policy::Generation;

use super::ear::Ear;
use super::fault::{Call, Fate, command, supervised};
use super::network::{ENDS, allowing, node, small};
use super::{DIRECTIONS, INTERFACE, Lab, attachments, foreign, is_emulated, name, share, wait_until};

const ERRORS: [i32; 4] = [libc::EPERM, libc::ENOMEM, libc::ENOSPC, libc::EINVAL];
/// Of what changes names of files.
const ERRORS_OF_A_TREE: [i32; 3] = [libc::EPERM, libc::ENOSPC, libc::EIO];

/// Ports of `web1` that the first policy, the second, and neither allow.
const FIRST: u16 = 1_001;
const SECOND: u16 = 1_002;
const NEITHER: u16 = 1_003;

/// One call that does not happen, and none of its kind after it: libraries try again.
#[derive(Clone, Copy, Debug)]
struct Fault {
    call: Call,
    /// Calls of this kind that happen before.
    after: usize,
    error: i32,
}

/// What is done while calls fail, from the same state each time.
#[derive(Clone, Copy)]
struct Operation {
    name: &'static str,
    /// Brings about the state in which it begins.
    prepare: fn(&mut Bench<'_>),
    run: fn(&mut Bench<'_>) -> Result<(), KernelError>,
    /// The ports that are open before, and after a failure.
    before: &'static [u16],
    /// The ports that are open once it succeeded.
    after: &'static [u16],
    errors: &'static [i32],
    errors_of_a_tree: &'static [i32],
}

const OPERATIONS: [Operation; 5] = [
    Operation {
        name: "attaching to a bare interface",
        prepare: |bench| {
            bench.lab.datapath.detach().expect("detached");
            // The kernel takes an unpinned link off a little later.
            wait_until(|| DIRECTIONS.iter().all(|direction| bench.programs(*direction) == 0), "nothing is attached");
        },
        run: |bench| bench.lab.datapath.attach(),
        // Until something is attached everything passes: an interface that is up was never without.
        before: &[FIRST, SECOND, NEITHER],
        after: &[],
        errors: &ERRORS,
        errors_of_a_tree: &ERRORS_OF_A_TREE,
    },
    Operation {
        name: "taking over from a killed agent",
        prepare: |bench| bench.enforce_first(),
        run: |bench| {
            bench.lab.restart();
            bench.lab.datapath.attach()
        },
        before: &[FIRST],
        after: &[FIRST],
        errors: &ERRORS,
        errors_of_a_tree: &ERRORS_OF_A_TREE,
    },
    Operation {
        name: "putting a program back",
        prepare: |bench| {
            bench.enforce_first();
            bench.take_off(EGRESS);
        },
        run: |bench| bench.lab.datapath.attach(),
        before: &[FIRST],
        after: &[FIRST],
        errors: &[libc::ENOSPC, libc::EPERM],
        errors_of_a_tree: &[libc::EIO],
    },
    Operation {
        name: "pinning again what somebody unpinned",
        prepare: |bench| {
            bench.enforce_first();
            fs::remove_dir_all(bench.lab.bpffs.join("rampart")).expect("removed");
        },
        run: |bench| bench.lab.datapath.attach(),
        before: &[FIRST],
        after: &[FIRST],
        errors: &[libc::EINVAL, libc::ENOMEM],
        errors_of_a_tree: &[libc::ENOSPC],
    },
    Operation {
        name: "a switch",
        prepare: |bench| {
            bench.enforce_first();
            bench.lab.datapath.settle().expect("settled");
        },
        run: |bench| bench.lab.datapath.switch(&bench.second).map(drop),
        before: &[FIRST],
        after: &[SECOND],
        errors: &ERRORS,
        errors_of_a_tree: &ERRORS_OF_A_TREE,
    },
];

struct Bench<'a> {
    lab: &'a mut Lab,
    ears: Vec<(u16, Ear)>,
    first: Tables,
    second: Tables,
}

/// Every operation under every fault.
pub fn changes_nothing(lab: &mut Lab) {
    lab.give_addresses();
    let [web, db, ..] = ENDS[0];
    let ears = [FIRST, SECOND, NEITHER].map(|port| (port, Ear::new(&lab.tun, db, web, port)));
    let mut tables = [FIRST, SECOND].map(|port| {
        let network = allowing(small(), "open", "cidr:db", "cidr:web", &format!("udp/{port}"));
        lab.lower(&network, node(&network, "web1")).1
    });
    let [first, second] = tables.each_mut().map(|tables| tables.clone());
    let mut bench = Bench { lab, ears: ears.into_iter().collect(), first, second };
    bench.lab.datapath.attach().expect("attached");
    for operation in OPERATIONS.into_iter().filter(|operation| operation.errors.len() == ERRORS.len() || !is_emulated())
    {
        bench.check(operation);
    }
    bench.lab.datapath.detach().expect("detached");
    assert!(!bench.lab.bpffs.join("rampart").exists(), "no pins are left");
}

impl Bench<'_> {
    fn check(&mut self, operation: Operation) {
        let (calls, pins) = self.watch(operation);
        let mut faults = 0;
        for call in calls.iter().copied().collect::<BTreeSet<_>>() {
            let of_kind = calls.iter().filter(|other| **other == call).count();
            // Each error once, the first and the last call among them.
            let errors = if call.is_of_a_tree() { operation.errors_of_a_tree } else { operation.errors };
            let errors = &errors[..share(errors.len() as u64) as usize];
            for (at, error) in errors.iter().enumerate() {
                let after = (of_kind - 1) * at / (errors.len() - 1).max(1);
                self.fail(operation, Fault { call, after, error: *error }, &pins);
                faults += 1;
            }
        }
        println!("{}: {faults} faults in {} calls", operation.name, calls.len());
    }

    /// The calls that change something when all goes well, and the pins there are then.
    fn watch(&mut self, operation: Operation) -> (Vec<Call>, BTreeSet<PathBuf>) {
        (operation.prepare)(self);
        let calls = Mutex::new(Vec::new());
        // The other way of attaching differs in its messages to netlink only.
        let in_full = self.lab.attachment() == attachments()[0];
        let decide = |call: Call| {
            if call.changes() && (in_full || call == Call::Send) {
                calls.lock().expect("no panic").push(call);
            }
            Fate::Happens
        };
        supervised(decide, || (operation.run)(self)).expect(operation.name);
        self.assert_open(operation.after, operation.name);
        let calls = calls.into_inner().expect("no panic");
        assert!(!calls.is_empty() || !in_full, "{} changes nothing", operation.name);
        (calls, self.pins())
    }

    fn fail(&mut self, operation: Operation, fault: Fault, pins: &BTreeSet<PathBuf>) {
        let what = format!("{} with {fault:?}", operation.name);
        (operation.prepare)(self);
        self.assert_open(operation.before, &what);
        let mut seen = 0;
        let decide = |call| {
            if call != fault.call {
                return Fate::Happens;
            }
            seen += 1;
            if seen > fault.after { Fate::Fails(fault.error) } else { Fate::Happens }
        };
        let error = supervised(decide, || (operation.run)(self)).expect_err(&what);
        assert_is_explained(&error, fault, &what);
        // A program on the bare interface drops everything, whether or not the other is there.
        if operation.after.is_empty() {
            let left = self.programs(INGRESS);
            self.assert_open(if left == 0 { operation.before } else { &[] }, &what);
        } else {
            self.assert_open(operation.before, &what);
        }
        for direction in DIRECTIONS {
            assert!(self.programs(direction) <= 1, "{what}: programs are left at {}", name(direction));
        }
        let left: Vec<_> = self.pins().difference(pins).cloned().collect();
        assert!(left.is_empty(), "{what}: these pins are left: {left:?}");
        (operation.run)(self).unwrap_or_else(|error| panic!("{what}, tried again: {error}: {:?}", error.source()));
        self.assert_open(operation.after, &what);
        assert_eq!(self.pins(), *pins, "{what}, tried again");
        let state = self.lab.datapath.observe().expect("observed");
        assert_eq!((state.egress, state.ingress), (true, true), "{what}, tried again");
        for direction in DIRECTIONS {
            assert_eq!(self.programs(direction), 1, "{what}, tried again: at {}", name(direction));
        }
        let generation = if operation.after.is_empty() { Generation(0) } else { state.generation };
        assert_eq!(state.generation, generation, "{what}, tried again");
    }

    fn enforce_first(&mut self) {
        self.lab.datapath.attach().expect("attached");
        self.lab.datapath.switch(&self.first).expect("switched");
    }

    fn assert_open(&mut self, open: &[u16], what: &str) {
        for (port, ear) in &mut self.ears {
            assert_eq!(ear.hears(), open.contains(port), "{what}: whether port {port} is open");
        }
    }

    /// Rampart's programs at a hook of the interface, as the kernel lists them.
    fn programs(&self, direction: u32) -> usize {
        let index = if_nametoindex(INTERFACE).expect("the interface");
        match self.lab.attachment() {
            AttachMethod::Tcx => foreign::count_tcx(index, direction).expect("queried"),
            AttachMethod::Clsact => foreign::filters(INTERFACE, name(direction)),
        }
    }

    fn take_off(&self, direction: u32) {
        match self.lab.attachment() {
            AttachMethod::Tcx => {
                foreign::detach(&self.lab.pin(&format!("links/{}", name(direction)))).expect("detached")
            }
            AttachMethod::Clsact => self.lab.run("tc", &["filter", "del", "dev", INTERFACE, name(direction)]),
        }
    }

    fn pins(&self) -> BTreeSet<PathBuf> {
        let mut pins = BTreeSet::new();
        list(&self.lab.bpffs, &mut pins);
        pins
    }
}

fn list(folder: &Path, pins: &mut BTreeSet<PathBuf>) {
    for entry in folder.read_dir().expect("a folder of pins") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            list(&path, pins);
        } else {
            pins.insert(path);
        }
    }
}

/// An error names the operation, its object, and the kernel's own error.
fn assert_is_explained(error: &KernelError, fault: Fault, what: &str) {
    let mut chain = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        chain = format!("{chain}: {cause}");
        source = cause.source();
    }
    let kernel = io::Error::from_raw_os_error(fault.error).to_string();
    assert!(chain.contains(&kernel), "{what}: the error does not say `{kernel}`: {chain}");
    let subject = ["`", "program", "tables", "records"].iter().any(|word| error.what.contains(word));
    assert!(subject, "{what}: the error does not say on what: {chain}");
}

/// Where TCX is refused for a reason that a kernel without it gives as well, the policy is attached in the other way.
pub fn is_attached_in_the_other_way(lab: &mut Lab) {
    let network = allowing(small(), "open", "cidr:db", "cidr:web", &format!("udp/{FIRST}"));
    let refused = |call| {
        if call == Call::Bpf(command::LINK_CREATE) { Fate::Fails(libc::EINVAL) } else { Fate::Happens }
    };
    supervised(refused, || lab.datapath.attach()).expect("attached");
    lab.enforce(&network, node(&network, "web1"));
    let state = lab.datapath.observe().expect("observed");
    assert_eq!((state.attachment, state.egress, state.ingress), (AttachMethod::Clsact, true, true));
    // The next agent finds TCX, and takes the policy over without leaving the filters behind.
    lab.restart();
    lab.datapath.attach().expect("attached");
    let taken = lab.datapath.observe().expect("observed");
    assert_eq!((taken.egress, taken.ingress, taken.generation), (true, true, state.generation));
    for direction in DIRECTIONS {
        let filters = foreign::filters(INTERFACE, name(direction));
        assert_eq!(filters, usize::from(taken.attachment == AttachMethod::Clsact), "at {}", name(direction));
    }
}
