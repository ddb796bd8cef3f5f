//! What others do to the interface: other programs, other links; and a TUN to write packets to.
#![allow(unsafe_code, reason = "bpf(2) and ioctl(2) are called as they are")]

use std::cell::RefCell;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use aya::maps::{Map, MapData, MapError, PerCpuArray, PerCpuValues};
use ebpf_common::EGRESS;
use ebpf_common::counter::{PairBucket, PairKey};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_FREEZE: libc::c_int = 22;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_PERCPU_HASH: u32 = 5;
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
    attach_tcx(&load(instructions)?, interface, direction, BPF_F_BEFORE)
}

fn load(instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut load = Load {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        ..Default::default()
    };
    bpf(BPF_PROG_LOAD, &mut load).map(own)
}

fn attach_tcx(program: &OwnedFd, interface: u32, direction: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut link = CreateLink {
        program: program.as_raw_fd() as u32,
        interface,
        attach_type: if direction == EGRESS { BPF_TCX_EGRESS } else { BPF_TCX_INGRESS },
        flags,
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

/// Where a bystander goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Ahead,
    /// It asks for no place ahead of others.
    Behind,
    /// Likewise, and after all others.
    Last,
}

/// A program of somebody else that counts the packets it sees and lets them pass on.
#[derive(Debug)]
pub struct Bystander {
    program: OwnedFd,
    counter: OwnedFd,
    pin: PathBuf,
    link: RefCell<Option<OwnedFd>>,
}

impl Bystander {
    /// Pinned at `pin` as well, where `tc` finds it.
    pub fn new(pin: &Path) -> io::Result<Self> {
        let mut create = CreateMap { kind: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size: 8, entries: 1 };
        let counter = own(bpf(BPF_MAP_CREATE, &mut create)?);
        let instruction = |code: u8, registers: u8, offset: i16, value: i32| {
            u64::from(code) | u64::from(registers) << 8 | u64::from(offset as u16) << 16 | u64::from(value as u32) << 32
        };
        let instructions = [
            instruction(0x62, 10, -4, 0),                    // *(u32 *)(r10 - 4) = 0
            instruction(0xbf, 0xa2, 0, 0),                   // r2 = r10
            instruction(0x07, 2, 0, -4),                     // r2 += -4
            instruction(0x18, 0x11, 0, counter.as_raw_fd()), // r1 = the map
            0,
            instruction(0x85, 0, 0, 1),    // call bpf_map_lookup_elem
            instruction(0x15, 0, 2, 0),    // if r0 == 0 goto +2
            instruction(0xb7, 1, 0, 1),    // r1 = 1
            instruction(0xdb, 0x10, 0, 0), // lock *(u64 *)r0 += r1
            instruction(0xb7, 0, 0, -1),   // r0 = -1
            instruction(0x95, 0, 0, 0),    // exit
        ];
        let program = load(&instructions)?;
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let mut object = Object { path: path.as_ptr() as u64, fd: program.as_raw_fd() as u32, flags: 0 };
        bpf(BPF_OBJ_PIN, &mut object)?;
        Ok(Self { program, counter, pin: pin.to_owned(), link: RefCell::new(None) })
    }

    pub fn packets(&self) -> u64 {
        let (key, mut value) = (0_u32, 0_u64);
        let mut element = Element {
            map: self.counter.as_raw_fd() as u32,
            key: &raw const key as u64,
            value: &raw mut value as u64,
            ..Default::default()
        };
        bpf(BPF_MAP_LOOKUP_ELEM, &mut element).expect("a counter");
        value
    }

    pub fn attach_tcx(&self, interface: u32, direction: u32, place: Place) -> io::Result<()> {
        let flags = if place == Place::Ahead { BPF_F_BEFORE } else { 0 };
        self.link.replace(Some(attach_tcx(&self.program, interface, direction, flags)?));
        Ok(())
    }

    pub fn attach_filter(&self, interface: &str, direction: &str, place: Place) {
        let (preference, handle) = match place {
            Place::Ahead => ("1", "9"),
            Place::Behind => ("7", "7"),
            Place::Last => ("8", "8"),
        };
        let pin = self.pin.to_str().expect("plain text");
        let words =
            ["filter", "add", "dev", interface, direction, "protocol", "all", "pref", preference, "handle", handle];
        let status = Command::new("tc").args(words).args(["bpf", "da", "object-pinned", pin]).status().expect("`tc`");
        assert!(status.success(), "`tc filter add`: {status}");
    }
}

#[repr(C)]
#[derive(Default)]
struct Element {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Changes a value of a pinned array map, of `size` bytes, whatever they mean.
pub fn edit(path: &Path, index: u32, size: usize, edit: impl FnOnce(&mut [u8])) -> io::Result<()> {
    let mut value = read(path, index, size)?;
    edit(&mut value);
    on_element(BPF_MAP_UPDATE_ELEM, path, index, &mut value)
}

/// A value of a pinned array map, of `size` bytes.
pub fn read(path: &Path, index: u32, size: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0; size];
    on_element(BPF_MAP_LOOKUP_ELEM, path, index, &mut value)?;
    Ok(value)
}

fn on_element(command: libc::c_int, path: &Path, index: u32, value: &mut [u8]) -> io::Result<()> {
    let map = open(path)?;
    let mut element = Element {
        map: map.as_raw_fd() as u32,
        key: (&raw const index) as u64,
        value: value.as_mut_ptr() as u64,
        ..Default::default()
    };
    bpf(command, &mut element).map(drop)
}

/// Takes the free slots of the pinned counters of pairs, on every processor, but the last of each of the buckets to
/// `spare`; returns how many one of them had.
pub fn fill_pairs(path: &Path, key: impl Fn(u32) -> PairKey, spare: impl Fn(u32) -> bool) -> Result<u32, MapError> {
    let map = PerCpuArray::try_from(Map::PerCpuArray(MapData::from_pin(path)?));
    let mut table: PerCpuArray<MapData, PairBucket> = map?;
    let mut most = 0;
    let mut filled: Vec<u32> = Vec::new();
    for index in 0..table.len() {
        let mut buckets = table.get(&index, 0)?.to_vec();
        filled.resize(buckets.len(), 0);
        for (bucket, filled) in buckets.iter_mut().zip(&mut filled) {
            let ways = bucket.slots.len() - usize::from(spare(index));
            for slot in bucket.slots[..ways].iter_mut().filter(|slot| slot.key == [0; 2]) {
                slot.key = key(*filled).to_words();
                *filled += 1;
                most = most.max(*filled);
            }
        }
        let buckets = PerCpuValues::try_from(buckets).map_err(MapError::IoError)?;
        table.set(index, buckets, 0)?;
    }
    Ok(most)
}

/// A socket that sends packets as they are out of an interface, past the host's IP.
#[derive(Debug)]
pub struct Out(OwnedFd);

impl Out {
    pub fn new(interface: u32) -> io::Result<Self> {
        // SAFETY: takes three integers and returns a new descriptor.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = own(fd.into());
        // SAFETY: all zeros is an address without anything in it.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = interface as i32;
        // SAFETY: the structure is the kernel's and as long as it is said to be.
        let bound = unsafe {
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
        };
        if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(socket)) }
    }

    /// A packet that is dropped on its way out is not an error.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        match nix::sys::socket::send(self.0.as_raw_fd(), packet, nix::sys::socket::MsgFlags::empty()) {
            Ok(_) | Err(nix::errno::Errno::ENOBUFS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
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

/// Detaches a pinned link from its interface, also while others hold it.
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

/// Pins an array that does not belong to Rampart.
pub fn pin_array(path: &Path, value_size: u32, entries: u32) -> io::Result<()> {
    pin_map(path, CreateMap { kind: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, entries })
}

/// Likewise a hash with a value for each processor.
pub fn pin_per_cpu_hash(path: &Path, key_size: u32, value_size: u32, entries: u32) -> io::Result<()> {
    pin_map(path, CreateMap { kind: BPF_MAP_TYPE_PERCPU_HASH, key_size, value_size, entries })
}

fn pin_map(path: &Path, mut create: CreateMap) -> io::Result<()> {
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
    open_tun(name, 0)
}

/// Likewise, with a `virtio_net_hdr` ahead of each packet, and whose reader cuts TCP and makes checksums by itself.
pub fn tun_with_offloads(name: &str) -> io::Result<File> {
    const IFF_VNET_HDR: u16 = 0x4000;
    const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
    const CHECKSUM_TSO4_TSO6: libc::c_ulong = 1 | 2 | 4;
    let file = open_tun(name, IFF_VNET_HDR)?;
    // SAFETY: takes an integer.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD as _, CHECKSUM_TSO4_TSO6) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn open_tun(name: &str, flags: u16) -> io::Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const IFF_TUN: u16 = 1;
    const IFF_NO_PI: u16 = 0x1000;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = InterfaceRequest { name: [0; 16], flags: IFF_TUN | IFF_NO_PI | flags, _rest: [0; 22] };
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
