//! What others do to the interface: other programs, other links; and a TUN to write packets to.
#![allow(unsafe_code, reason = "bpf(2) and ioctl(2) are called as they are")]

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use ebpf_common::EGRESS;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_FREEZE: libc::c_int = 22;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
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
    attach_program(&[0xffff_ffff_0000_00b7, 0x95], interface, direction)
}

/// The least that keeps a flood away: drops what arrives for a UDP port and begins with a 1, behind an Ethernet and an IPv4
/// header without options, and lets everything else pass on. Lives until dropped.
pub fn attach_bare_drop(interface: u32, port: u16) -> io::Result<OwnedFd> {
    const PORT_AT: u32 = 14 + 20 + 2;
    const TYPE_AT: u32 = 14 + 20 + 8;
    let instruction = |code: u8, registers: u8, offset: u16, value: u32| {
        u64::from(code) | u64::from(registers) << 8 | u64::from(offset) << 16 | u64::from(value) << 32
    };
    let instructions = [
        instruction(0xbf, 0x16, 0, 0),               // r6 = r1, where these loads find the packet
        instruction(0x28, 0, 0, PORT_AT),            // r0 = 2 bytes of the packet
        instruction(0x55, 0x00, 4, u32::from(port)), // if r0 != port: pass
        instruction(0x30, 0, 0, TYPE_AT),            // r0 = 1 byte of the packet
        instruction(0x55, 0x00, 2, 1),               // if r0 != 1: pass
        instruction(0xb7, 0x00, 0, 2),               // r0 = TCX_DROP
        instruction(0x95, 0, 0, 0),                  // exit
        instruction(0xb7, 0x00, 0, u32::MAX),        // pass: r0 = TCX_NEXT
        instruction(0x95, 0, 0, 0),                  // exit
    ];
    attach_program(&instructions, interface, ebpf_common::INGRESS)
}

fn attach_program(instructions: &[u64], interface: u32, direction: u32) -> io::Result<OwnedFd> {
    let mut load = Load {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: instructions.len() as u32,
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

/// An XDP link of somebody else that lets everything pass. Lives until dropped.
pub fn attach_xdp(interface: u32) -> io::Result<OwnedFd> {
    const BPF_PROG_TYPE_XDP: u32 = 6;
    const BPF_XDP: u32 = 37;
    const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
    // r0 = XDP_PASS; exit
    let instructions = [0x0000_0002_0000_00b7_u64, 0x95];
    let mut load = Load {
        kind: BPF_PROG_TYPE_XDP,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..Default::default()
    };
    let program = own(bpf(BPF_PROG_LOAD, &mut load)?);
    let program = program.as_raw_fd() as u32;
    let mut link =
        CreateLink { program, interface, attach_type: BPF_XDP, flags: XDP_FLAGS_SKB_MODE, ..Default::default() };
    bpf(BPF_LINK_CREATE, &mut link).map(own)
}

#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    flags: [u32; 2],
    programs: u64,
    count: u32,
    _rest: [u32; 9],
}

/// How many TCX programs an interface has in a direction.
pub fn tcx_programs(interface: u32, direction: u32) -> io::Result<usize> {
    let attach_type = if direction == EGRESS { BPF_TCX_EGRESS } else { BPF_TCX_INGRESS };
    let mut query = Query { target: interface, attach_type, ..Default::default() };
    bpf(BPF_PROG_QUERY, &mut query)?;
    Ok(query.count as usize)
}

/// How many clsact filters that are programs an interface has in a direction.
pub fn filters(interface: &str, direction: &str) -> usize {
    let shown = Command::new("tc").args(["filter", "show", "dev", interface, direction]).output().expect("`tc`");
    String::from_utf8_lossy(&shown.stdout).lines().filter(|line| line.contains("handle 0x")).count()
}

#[repr(C)]
#[derive(Default)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut object = Object { path: path.as_ptr() as u64, ..Default::default() };
    bpf(BPF_OBJ_GET, &mut object).map(own)
}

/// Makes a pinned map refuse every further write from userspace.
pub fn freeze(path: &Path) -> io::Result<()> {
    let map = open(path)?;
    let mut fd = map.as_raw_fd() as u32;
    bpf(BPF_MAP_FREEZE, &mut fd).map(drop)
}

/// Takes a pinned link off its interface, whoever holds it.
pub fn detach(path: &Path) -> io::Result<()> {
    let link = open(path)?;
    let mut fd = link.as_raw_fd() as u32;
    bpf(BPF_LINK_DETACH, &mut fd).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct CreateMap {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
}

/// Pins an array that is none of ours.
pub fn pin_array(path: &Path, value_size: u32, entries: u32) -> io::Result<()> {
    let mut create = CreateMap { kind: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, entries };
    let map = own(bpf(BPF_MAP_CREATE, &mut create)?);
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut object = Object { path: path.as_ptr() as u64, fd: map.as_raw_fd() as u32, flags: 0 };
    bpf(BPF_OBJ_PIN, &mut object).map(drop)
}

/// Whether there is something to read at this moment.
pub fn is_readable(file: &impl AsRawFd) -> bool {
    becomes_readable(file, 0)
}

/// Whether there is something to read within so many milliseconds.
pub fn becomes_readable(file: &impl AsRawFd, milliseconds: i32) -> bool {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure, for the time of the call.
    unsafe { libc::poll(&raw mut poll, 1, milliseconds) == 1 }
}

pub const CAP_NET_ADMIN: u32 = 12;
pub const CAP_PERFMON: u32 = 38;
pub const CAP_BPF: u32 = 39;

/// Takes every other capability from the calling thread.
pub fn keep_capabilities(kept: &[u32]) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let words = [0, 32]
        .map(|base| kept.iter().filter(|bit| (base..base + 32).contains(*bit)).map(|bit| 1 << (bit - base)).sum());
    let header: [u32; 2] = [VERSION_3, 0];
    // Effective, permitted and inheritable; the low words, then the high ones.
    let data: [u32; 6] = [words[0], words[0], 0, words[1], words[1], 0];
    // SAFETY: both are laid out as the kernel's structures of that version.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
    let status = Command::new("ip").args(["link", "set", name, "up"]).status()?;
    if status.success() { Ok(file) } else { Err(io::Error::other("`ip link set up` failed")) }
}

#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    _flags: [u32; 2],
    programs: u64,
    count: u32,
    _rest: [u32; 9],
}

/// How many TCX programs an interface has in one direction.
pub fn count_tcx(interface: u32, direction: u32) -> io::Result<usize> {
    let attach_type = if direction == EGRESS { BPF_TCX_EGRESS } else { BPF_TCX_INGRESS };
    let mut query = Query { target: interface, attach_type, ..Default::default() };
    bpf(BPF_PROG_QUERY, &mut query)?;
    Ok(query.count as usize)
}

/// Sends a whole frame, link header included, out of an interface.
pub fn send_frame(interface: &str, frame: &[u8]) -> io::Result<()> {
    let index = nix::net::if_::if_nametoindex(interface)?;
    // SAFETY: the call returns a new descriptor, or -1.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    let socket = own(socket.into());
    // SAFETY: all zero is a valid address of this kind.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (address.sll_family, address.sll_ifindex) = (libc::AF_PACKET as u16, index.cast_signed());
    // SAFETY: bytes and address are as long as is said and live as long as the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
