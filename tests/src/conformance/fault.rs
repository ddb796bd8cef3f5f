//! System calls that fail with a chosen error, or at which whoever makes them is killed: seccomp(2) hands every watched call
//! of a thread, and of the processes that it starts, to a supervisor, before it happens.
#![allow(unsafe_code, reason = "seccomp(2), its ioctls, fork(2) and a marker are called as they are")]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// What a supervisor decides of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Happens,
    /// The kernel does nothing and returns this error.
    Fails(i32),
    /// The process ends by SIGKILL; the call does not happen. Only for what [`in_child`] started.
    Kills,
}

/// A call that is about to happen, as far as it can be told without looking into the caller's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// bpf(2) with this command.
    Bpf(u32),
    /// A message to netlink, which is how clsact filters come and go.
    Send,
    /// A pin or another file gets another name.
    Rename,
    /// A name of a pin, of another file or of a folder goes.
    Unlink,
    /// A folder is made.
    MakeFolder,
    /// What was written to a file is to outlive the machine.
    Sync,
    /// [`mark`].
    Mark,
}

pub mod command {
    //! Commands of bpf(2).
    pub const MAP_CREATE: u32 = 0;
    pub const MAP_UPDATE: u32 = 2;
    pub const MAP_DELETE: u32 = 3;
    pub const PROGRAM_LOAD: u32 = 5;
    pub const PIN: u32 = 6;
    pub const MAP_UPDATE_BATCH: u32 = 26;
    pub const LINK_CREATE: u32 = 28;
    pub const LINK_UPDATE: u32 = 29;
}

impl Call {
    /// Whether the kernel is another after it: reads are not, and what nothing refers to yet is not.
    pub fn changes(self) -> bool {
        use command::{
            LINK_CREATE, LINK_UPDATE, MAP_CREATE, MAP_DELETE, MAP_UPDATE, MAP_UPDATE_BATCH, PIN, PROGRAM_LOAD,
        };
        match self {
            Self::Bpf(command) => matches!(
                command,
                MAP_CREATE
                    | MAP_UPDATE
                    | MAP_DELETE
                    | PROGRAM_LOAD
                    | PIN
                    | MAP_UPDATE_BATCH
                    | LINK_CREATE
                    | LINK_UPDATE
            ),
            Self::Send | Self::Rename | Self::Unlink | Self::MakeFolder | Self::Sync => true,
            Self::Mark => false,
        }
    }

    /// Whether a process that is killed after it leaves the kernel another than before it: what only the process holds goes
    /// with it.
    pub fn leaves_something(self) -> bool {
        self.changes() && !matches!(self, Self::Bpf(command::MAP_CREATE | command::PROGRAM_LOAD))
    }

    fn new(data: &libc::seccomp_data) -> Self {
        match libc::c_long::from(data.nr) {
            libc::SYS_bpf => Self::Bpf(data.args[0] as u32),
            libc::SYS_sendto | libc::SYS_sendmsg => Self::Send,
            libc::SYS_renameat2 | libc::SYS_renameat => Self::Rename,
            libc::SYS_unlinkat => Self::Unlink,
            libc::SYS_mkdirat => Self::MakeFolder,
            libc::SYS_fdatasync | libc::SYS_fsync => Self::Sync,
            MARK => Self::Mark,
            number => Self::of_older(number),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn of_older(number: libc::c_long) -> Self {
        match number {
            libc::SYS_rename => Self::Rename,
            libc::SYS_mkdir => Self::MakeFolder,
            _ => Self::Unlink,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_older(number: libc::c_long) -> Self {
        unreachable!("call {number} is not watched")
    }

    /// Whether it is about names of files.
    pub fn is_of_a_tree(self) -> bool {
        matches!(self, Self::Rename | Self::Unlink | Self::MakeFolder)
    }
}

/// Calls personality(2), which changes nothing and is used by nothing else here.
const MARK: libc::c_long = libc::SYS_personality;

const WATCHED: [libc::c_long; 10] = [
    libc::SYS_bpf,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_renameat2,
    libc::SYS_renameat,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    MARK,
];

/// What older architectures have beside them.
#[cfg(target_arch = "x86_64")]
const WATCHED_TOO: [libc::c_long; 4] = [libc::SYS_rename, libc::SYS_unlink, libc::SYS_mkdir, libc::SYS_rmdir];
#[cfg(not(target_arch = "x86_64"))]
const WATCHED_TOO: [libc::c_long; 0] = [];

/// Tells the supervisor that something begins.
pub fn mark() {
    // SAFETY: this value asks, and sets nothing.
    unsafe { libc::syscall(MARK, 0xffff_ffff_u64) };
}

/// From now on this process dies of the first write to the bytes from `offset` on of either value of a map of two that it
/// has in its memory: as if it were killed there, since writes to memory are no calls.
pub fn deadly(size: usize, offset: usize) -> io::Result<()> {
    const PAGE: usize = 4_096;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let number = |text: &str| usize::from_str_radix(text, 16).map_err(io::Error::other);
    for line in maps.lines().filter(|line| line.contains("bpf-map") && line.contains(" rw-s ")) {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let (start, end) = range.ok_or_else(|| io::Error::other("no range"))?;
        let (start, end) = (number(start)?, number(end)?);
        if end - start < 2 * size {
            continue;
        }
        for value in [start, start + size] {
            let page = (value + offset) / PAGE * PAGE;
            // SAFETY: pages of a mapping that stays; a write to them is meant to kill the writer.
            if unsafe { libc::mprotect(page as *mut libc::c_void, PAGE, libc::PROT_READ) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        return Ok(());
    }
    Err(io::Error::other("there is no such map in this process"))
}

/// Does `work` on a thread whose watched calls, and those of its children, `decide` is asked about.
pub fn supervised<T: Send>(decide: impl FnMut(Call) -> Fate + Send, work: impl FnOnce() -> T + Send) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        // Not a child of the watched thread, which would be watched itself.
        let supervisor = scope.spawn(move || {
            if let Ok(listener) = receiver.recv() {
                supervise(&listener, decide).expect("a supervisor");
            }
        });
        let worker = scope.spawn(move || {
            sender.send(watch_this_thread().expect("seccomp; has this kernel CONFIG_SECCOMP_FILTER?")).expect("heard");
            drop(sender);
            work()
        });
        let result = worker.join();
        supervisor.join().expect("the supervisor");
        result.unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Does `work` in a process of its own, a copy of this one with this thread alone, and says how that ended: with 0 when it
/// returned, with 1 when it panicked. `work` must make what it uses: the copy has none of this process's descriptors.
pub fn in_child(work: impl FnOnce()) -> WaitStatus {
    // SAFETY: the copy allocates, which the C library allows after fork(2), and takes no lock of this program: the tests that
    // come here have a process of their own, and their other threads send packets.
    match unsafe { fork() }.expect("forked") {
        ForkResult::Parent { child } => waitpid(child, None).expect("a child of this process"),
        ForkResult::Child => {
            // SAFETY: nothing of this copy uses a descriptor from here on.
            unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
            let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            let status = i32::from(catch_unwind(AssertUnwindSafe(work)).is_err());
            // SAFETY: ends the process without what the copied program meant to do at its end.
            unsafe { libc::_exit(status) }
        }
    }
}

/// Answers until the last watched process is gone.
fn supervise(listener: &OwnedFd, mut decide: impl FnMut(Call) -> Fate) -> io::Result<()> {
    while wait_for_call(listener)? {
        // SAFETY: all zeros is how the kernel wants the structure.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the structure is the kernel's.
        if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } < 0 {
            ignore_the_dead()?;
            continue;
        }
        let mut answer = libc::seccomp_notif_resp { id: call.id, val: 0, error: 0, flags: 0 };
        match decide(Call::new(&call.data)) {
            Fate::Happens => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
            Fate::Fails(error) => answer.error = -error,
            Fate::Kills => {
                end(call.pid as i32);
                continue;
            }
        }
        // SAFETY: the structure is the kernel's.
        if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) } < 0 {
            ignore_the_dead()?;
        }
    }
    Ok(())
}

/// `false`: no watched process is left.
fn wait_for_call(listener: &OwnedFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    loop {
        // SAFETY: one structure, for the time of the call.
        if unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        } else if poll.revents & libc::POLLIN != 0 {
            return Ok(true);
        } else if poll.revents != 0 {
            return Ok(false);
        }
    }
}

/// Whoever made a call may be gone before it is looked at.
fn ignore_the_dead() -> io::Result<()> {
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::EINTR) => Ok(()),
        _ => Err(error),
    }
}

fn end(process: i32) {
    assert!(!Path::new(&format!("/proc/self/task/{process}")).exists(), "this process was to be killed itself");
    kill(Pid::from_raw(process), Signal::SIGKILL).expect("a process to kill");
}

fn watch_this_thread() -> io::Result<OwnedFd> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    // The number of the call is the first word.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    let watched: Vec<libc::c_long> = WATCHED.into_iter().chain(WATCHED_TOO).collect();
    for (at, number) in watched.iter().enumerate() {
        let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        let to_the_end = (watched.len() - at) as u8;
        program.push(libc::sock_filter { code: jump as u16, jt: to_the_end, jf: 0, k: *number as u32 });
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF));
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the program is as long as it says and lives as long as the call.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_chosen_call_fails_and_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut calls = 0;
        let decide = |call| {
            calls += u32::from(call == Call::MakeFolder);
            if call == Call::MakeFolder && calls == 2 { Fate::Fails(libc::ENOSPC) } else { Fate::Happens }
        };
        let made = supervised(decide, || ["a", "b", "c"].map(|name| fs::create_dir(folder.path().join(name))));
        let errors = made.map(|result| result.err().and_then(|error| error.raw_os_error()));
        assert_eq!(errors, [None, Some(libc::ENOSPC), None]);
        assert!(folder.path().join("a").exists() && !folder.path().join("b").exists());
    }
}
