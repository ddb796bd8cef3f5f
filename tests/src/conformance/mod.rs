//! The loaded program against the policy: a host with an interface, the datapath on it, and probes.
//!
//! `tests/conformance.rs` is made of these. Everything runs as root in namespaces of one thread; nothing of it is seen
//! outside, and it goes with the thread.

pub mod ear;
pub mod early;
pub mod failing;
pub mod fault;
pub mod fire;
pub mod foreign;
pub mod fragments;
pub mod killed;
pub mod large;
pub mod load;
pub mod neighbours;
pub mod network;
pub mod place;
pub mod random;
pub mod records;
pub mod shrink;
pub mod underlay;
pub mod upgrade;
pub mod verifier;

use std::fs::{self, File};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ebpf_common::{EGRESS, INGRESS, reason};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::unistd::Pid;
use node::kernel::datapath::packet::Packet;
use node::kernel::datapath::{EbpfDatapath, Probe};
use node::kernel::inspect::Probed;
use node::kernel::{AttachMethod, Datapath, Inspect};
use node::lower::{RuleSlots, Tables, lower};
use policy::{Generation, Matrix, Network, NodeId, Revision, Slice};
use tempfile::TempDir;

/// Name of the interface in every lab.
pub const INTERFACE: &str = "rampart0";

/// A host with one interface and bpffs.
#[derive(Debug)]
pub struct Lab {
    pub datapath: EbpfDatapath,
    /// Where bpffs is mounted.
    pub bpffs: PathBuf,
    /// Packets written here arrive at the interface.
    pub tun: File,
    pub slots: RuleSlots,
    attachment: Option<AttachMethod>,
    /// Of the last slice.
    pub revision: u64,
    _folder: TempDir,
}

/// Runs a test in a lab. Panics without root: a test that did not run has not passed.
pub fn in_lab(test: impl FnOnce(&mut Lab) + Send) {
    in_lab_with(None, test);
}

/// Runs a test in one lab after the other, for each way of attaching that this kernel has. On an emulated processor for the
/// one that the kernel prefers: both are tested on this machine, and each on the emulated kernel that is there for it.
pub fn in_each_lab(test: impl Fn(&mut Lab) + Sync) {
    let ways = if is_emulated() { &attachments()[..1] } else { attachments() };
    for attachment in ways {
        println!("{attachment:?}");
        in_lab_with(Some(*attachment), |lab| test(lab));
    }
}

fn in_lab_with(attachment: Option<AttachMethod>, test: impl FnOnce(&mut Lab) + Send) {
    assert!(nix::unistd::geteuid().is_root(), "the kernel's programs can only be tested as root: run this as root");
    let result = thread::scope(|scope| scope.spawn(|| test(&mut Lab::new(attachment))).join());
    if let Err(panic) = result {
        resume_unwind(panic);
    }
}

/// Runs a test in several labs at once, which attach in each way that this kernel has by turns. `prepare` does what must be
/// done on the thread whose namespaces a lab has.
pub fn in_labs<T: Send>(
    count: usize,
    prepare: impl Fn(&mut Lab) -> T + Sync,
    test: impl FnOnce(Vec<(&mut Lab, T)>) + Send,
) {
    in_more_labs(count, &prepare, Vec::new(), test);
}

/// What runs in several labs, each with what was prepared in it.
type Boxed<'a, T> = Box<dyn FnOnce(Vec<(&mut Lab, T)>) + Send + 'a>;

fn in_more_labs<T: Send>(
    count: usize,
    prepare: &(impl Fn(&mut Lab) -> T + Sync),
    labs: Vec<(&mut Lab, T)>,
    test: impl FnOnce(Vec<(&mut Lab, T)>) + Send,
) {
    if labs.len() == count {
        return test(labs);
    }
    let attachment = attachments()[labs.len() % attachments().len()];
    // Boxed, else each depth would be another type.
    let test: Boxed<'_, T> = Box::new(test);
    in_lab_with(Some(attachment), move |lab| {
        let prepared = prepare(lab);
        let labs = labs.into_iter().chain([(lab, prepared)]).collect();
        in_more_labs(count, prepare, labs, test);
    });
}

/// The ways of attaching that this kernel has by its version, the preferred one first: TCX came with 6.6.
pub fn attachments() -> &'static [AttachMethod] {
    let name = nix::sys::utsname::uname().expect("a kernel");
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 6) { &[AttachMethod::Tcx, AttachMethod::Clsact] } else { &[AttachMethod::Clsact] }
}

impl Lab {
    /// Keeps the kernel from sending packets by itself, which would be counted: it has no IPv6 any more.
    pub fn silence(&self) {
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").expect("without IPv6 of its own");
    }

    /// Leaves the namespaces of the calling thread.
    fn new(attachment: Option<AttachMethod>) -> Self {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("namespaces of its own");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts of its own");
        let folder = tempfile::tempdir().expect("a folder");
        let bpffs = folder.path().to_owned();
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), none).expect("a BPF file system");
        let tun = foreign::tun(INTERFACE).expect("a TUN interface; is there `/dev/net/tun`?");
        let datapath = EbpfDatapath::new(INTERFACE, &bpffs);
        let mut lab = Self { datapath, bpffs, tun, slots: RuleSlots::new(), attachment, revision: 0, _folder: folder };
        lab.restart();
        lab
    }

    /// As if the agent had been killed and started: it holds nothing, and the pins are there.
    pub fn restart(&mut self) {
        self.restart_with(|datapath| datapath);
    }

    /// Likewise, with other options.
    pub fn restart_with(&mut self, options: impl FnOnce(EbpfDatapath) -> EbpfDatapath) {
        let datapath = options(EbpfDatapath::new(INTERFACE, &self.bpffs));
        self.datapath = match self.attachment {
            Some(attachment) => datapath.with_attachment(attachment),
            None => datapath,
        };
    }

    /// The way in which this lab attaches.
    pub fn attachment(&self) -> AttachMethod {
        self.attachment.unwrap_or(attachments()[0])
    }

    /// Packets that the enforcing programs counted in a direction, whatever became of them.
    pub fn counted(&mut self, direction: u32) -> u64 {
        let counters = self.datapath.counters(&[]).expect("readable");
        counters
            .reasons
            .iter()
            .filter(|((counted, _), _)| *counted == direction)
            .map(|(_, counter)| counter.packets)
            .sum()
    }

    /// Takes the interface away and makes another of its name.
    pub fn recreate_interface(&mut self) {
        self.take_interface_away();
        self.tun = foreign::tun(INTERFACE).expect("a TUN interface");
    }

    /// Also while a clone or a process that is just being started holds the descriptor.
    pub fn take_interface_away(&mut self) {
        self.run("ip", &["link", "delete", INTERFACE]);
        self.tun = File::open("/dev/null").expect("/dev/null");
    }

    /// Attaches where it is not yet, and puts the policy in force as a node has it.
    pub fn enforce(&mut self, network: &Network, node: NodeId) -> (Slice, Tables) {
        let (slice, tables) = self.lower(network, node);
        self.datapath.attach().expect("attached");
        self.datapath.switch(&tables).expect("switched");
        (slice, tables)
    }

    /// A slice at a new revision, and its tables.
    pub fn lower(&mut self, network: &Network, node: NodeId) -> (Slice, Tables) {
        self.revision += 1;
        let matrix = Matrix::compile(network).expect("within limits");
        let slice = matrix.slice(node, Revision(self.revision)).expect("an active node");
        let tables = lower(&slice, &mut self.slots).expect("within limits");
        (slice, tables)
    }

    /// The generation in force.
    pub fn generation(&mut self) -> Generation {
        self.datapath.observe().expect("observed").generation
    }

    /// A probe on the live tables.
    pub fn judge(&mut self) -> Judge {
        let slots = self.slots.pairs().into_values().collect();
        Judge { probe: self.datapath.new_probe().expect("a probe"), slots }
    }

    /// Runs a program to its end, which must be good.
    pub fn run(&self, program: &str, arguments: &[&str]) {
        let status = Command::new(program).args(arguments).status().expect(program);
        assert!(status.success(), "`{program} {}` ended with {status}", arguments.join(" "));
    }

    /// The pin of something of the interface.
    pub fn pin(&self, path: &str) -> PathBuf {
        let only = |folder: &Path| -> PathBuf {
            let mut entries = folder.read_dir().expect("a folder of pins");
            entries.next().expect("one entry").expect("readable").path()
        };
        let top = self.bpffs.join("rampart");
        only(&only(&top)).join(INTERFACE).join(path)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Else the folder could not be removed. The namespace ends with the thread in any case.
        let _ = umount2(&self.bpffs, MntFlags::MNT_DETACH);
    }
}

/// A probe, and whose rule counters to look at.
#[derive(Debug)]
pub struct Judge {
    pub probe: Probe,
    pub slots: Vec<u32>,
}

impl Judge {
    /// What the program does with bytes. That it counts exactly one reason, and that the one it returns, is checked by
    /// the probe.
    pub fn bytes(&mut self, direction: u32, bytes: &[u8]) -> Probed {
        self.probe
            .judge(direction, bytes, self.slots.iter().copied())
            .unwrap_or_else(|error| panic!("{error}: {:?}, packet {bytes:02x?}", std::error::Error::source(&error)))
    }

    pub fn packet(&mut self, direction: u32, packet: &Packet) -> Probed {
        self.bytes(direction, &packet.to_bytes())
    }

    /// Panics unless the packet has this fate.
    pub fn expect(&mut self, direction: u32, packet: &Packet, expected: u8) {
        let seen = self.packet(direction, packet);
        check(seen, expected, &format!("{packet:?} at {}", name(direction)));
    }

    pub fn expect_bytes(&mut self, direction: u32, bytes: &[u8], expected: u8, what: &str) {
        let seen = self.bytes(direction, bytes);
        check(seen, expected, &format!("{what} at {}", name(direction)));
    }
}

fn check(seen: Probed, expected: u8, what: &str) {
    assert_eq!(reason::name(seen.reason), reason::name(expected), "{what}");
}

/// Says that the processor is emulated: long loops are done so many times less often.
pub const SHARE: &str = "RAMPART_SHARE";

/// A number of repetitions on this machine.
pub fn share(repetitions: u64) -> u64 {
    let given = std::env::var(SHARE).ok();
    let divisor = given.map_or(1, |given| given.parse::<u64>().expect("RAMPART_SHARE is a number"));
    (repetitions / divisor.max(1)).max(1)
}

/// Whether repetitions are to be few.
pub fn is_emulated() -> bool {
    share(2) == 1
}

/// Keeps the calling thread on a processor, or on any where there is none of that number.
pub fn on_processor(number: usize) {
    let mut set = CpuSet::new();
    set.set(number).expect("a processor");
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

/// Asks again and again, on a processor that others need too. Panics after half a minute.
pub fn wait_until(mut condition: impl FnMut() -> bool, what: &str) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(30), "waited too long until {what}");
        thread::yield_now();
    }
}

/// Both directions.
pub const DIRECTIONS: [u32; 2] = [EGRESS, INGRESS];

/// For messages.
pub fn name(direction: u32) -> &'static str {
    if direction == EGRESS { "egress" } else { "ingress" }
}
