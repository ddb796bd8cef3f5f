//! What others do to the interface: other programs, other links; and a TUN to write packets to.
#![allow(unsafe_code, reason = "bpf(2) and ioctl(2) are called as they are")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ebpf_common::EGRESS;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_MAP_FREEZE: libc::c_int = 22;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
const BPF_F_BEFORE: u32 = 1 << 3;

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` begins as the kernel's union does for the command, and its pointers live as long as the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *mut T, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn own(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the command returned a new descriptor.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    _rest: [u64; 8],
}

#[repr(C)]
#[derive(Default)]
struct CreateLink {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    _pad: u32,
    revision: u64,
}

/// A TCX link of somebody else that lets everything pass on (`TCX_NEXT`), ahead of all others. Lives until dropped.
pub fn attach_ahead(interface: u32, direction: u32) -> io::Result<OwnedFd> {
    // r0 = -1; exit
    let instructions: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];
    let mut load = Load {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: 2,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..Default::default()
    };
    let program = own(bpf(BPF_PROG_LOAD, &mut load)?);
    let mut link = CreateLink {
        program: program.as_raw_fd() as u32,
        interface,
        attach_type: if direction == EGRESS { BPF_TCX_EGRESS } else { BPF_TCX_INGRESS },
        flags: BPF_F_BEFORE,
        ..Default::default()
    };
    bpf(BPF_LINK_CREATE, &mut link).map(own)
}

#[repr(C)]
#[derive(Default)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Makes a pinned map refuse every further write from userspace.
pub fn freeze(path: &Path) -> io::Result<()> {
    let mut text = path.as_os_str().as_bytes().to_vec();
    text.push(0);
    let mut object = Object { path: text.as_ptr() as u64, ..Default::default() };
    let map = own(bpf(BPF_OBJ_GET, &mut object)?);
    let mut fd = map.as_raw_fd() as u32;
    bpf(BPF_MAP_FREEZE, &mut fd).map(drop)
}

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    _rest: [u8; 22],
}

/// A TUN interface, up, that lives as long as the descriptor. Packets have no header ahead of the IP header.
pub fn tun(name: &str) -> io::Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const IFF_TUN: u16 = 1;
    const IFF_NO_PI: u16 = 0x1000;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = InterfaceRequest { name: [0; 16], flags: IFF_TUN | IFF_NO_PI, _rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request is as long as the kernel's `ifreq`, its name ends with a zero.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let status = std::process::Command::new("ip").args(["link", "set", name, "up"]).status()?;
    if status.success() { Ok(file) } else { Err(io::Error::other("`ip link set up` failed")) }
}
