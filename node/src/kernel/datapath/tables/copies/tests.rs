//! The copies in the kernel. Needs root.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::fixture;
use crate::kernel::datapath::EbpfDatapath;
use crate::kernel::{Datapath, Inspect};
use crate::lower::{RuleSlots, lower};

/// Runs the test with an interface and a BPF file system of its own, which go with its thread.
fn with_datapath(test: impl FnOnce(&mut EbpfDatapath) + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
            .expect("this test makes namespaces: run it as root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let folder = tempfile::tempdir().unwrap();
        mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), none).unwrap();
        let made = std::process::Command::new("ip").args(["tuntap", "add", "rampart0", "mode", "tun"]).status();
        assert!(made.expect("`ip` of iproute2 is installed").success());
        test(&mut EbpfDatapath::new("rampart0", folder.path()));
        nix::mount::umount(folder.path()).unwrap();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// What somebody wrote into the copy in force is found, and is in neither copy after two more switches: what this process
/// remembers of a copy is not believed once the kernel has something else.
#[test]
fn a_cell_edited_by_hand_is_found_and_gone_from_both_copies() {
    with_datapath(|datapath| {
        let mut slots = RuleSlots::new();
        let mut tables = |revision| lower(&fixture::slice(&fixture::network(), "web1", revision), &mut slots).unwrap();
        let first = tables(1);
        datapath.attach().unwrap();
        datapath.switch(&first).unwrap();
        datapath.settle().unwrap();
        assert_eq!(datapath.differences(&first).unwrap(), [""; 0]);

        let other = first.matrix.iter().position(|word| *word != first.matrix[0]).expect("two kinds of cells");
        let copies = &mut datapath.running().unwrap().copies;
        let matrix = place(copies.control().unwrap().active, offset_of!(TableCopy, matrix));
        copies.tables.write(matrix + other * size_of::<u32>(), &[first.matrix[0]]);
        assert_ne!(datapath.differences(&first).unwrap(), [""; 0]);

        // As the round does that found it.
        datapath.switch(&first).unwrap();
        check_both(datapath, &first);
        let second = tables(2);
        datapath.switch(&second).unwrap();
        check_both(datapath, &second);
    });
}

/// Settles, and reads each copy as if it were in force.
fn check_both(datapath: &mut EbpfDatapath, expected: &Tables) {
    datapath.settle().unwrap();
    for _ in 0..2 {
        let seen = datapath.read_tables().unwrap();
        assert_eq!(expected.differences(&seen), [""; 0]);
        let copies = &mut datapath.running().unwrap().copies;
        let Control { active, generation } = copies.control().unwrap();
        copies.put_in_force(Control { active: 1 - active, generation }).unwrap();
    }
}
