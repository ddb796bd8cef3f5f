//! What aya does not offer of bpf(2), and the wait for a grace period.
#![allow(unsafe_code, reason = "bpf(2) and membarrier(2) are called as they are")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya::Pod;
use ebpf_common::EGRESS;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
const BPF_LINK_TYPE_XDP: u32 = 6;
const BPF_LINK_TYPE_TCX: u32 = 11;

/// Calls bpf(2). The kernel takes a shorter `bpf_attr` as if the rest were zero.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is one of the repr(C) structs below, which begin as the kernel's union does for the command,
    // and whose pointers refer to memory that the caller keeps alive and large enough.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes as *mut T, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn new_fd(result: libc::c_long) -> OwnedFd {
    // SAFETY: the commands that come here return a new file descriptor, which nobody else owns.
    unsafe { OwnedFd::from_raw_fd(result as libc::c_int) }
}

#[repr(C)]
#[derive(Default)]
struct BatchAttributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// Everything in a hash map. Entries that come or go meanwhile may be missed or seen.
pub(crate) fn read_hash<K: Pod, V: Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    // A bucket must fit whole; the kernel says ENOSPC when it does not.
    let mut chunk = 4_096usize;
    let mut all = Vec::new();
    let mut cursor = 0u32;
    let mut started = false;
    loop {
        let mut keys: Vec<K> = Vec::with_capacity(chunk);
        let mut values: Vec<V> = Vec::with_capacity(chunk);
        let mut next = 0u32;
        let mut attributes = BatchAttributes {
            in_batch: if started { &raw mut cursor as u64 } else { 0 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: chunk as u32,
            map_fd: map.as_raw_fd() as u32,
            ..Default::default()
        };
        let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes);
        let end = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && chunk < 1 << 20 => {
                chunk *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = (attributes.count as usize).min(chunk);
        // SAFETY: the kernel wrote that many of each, and any bytes are a K or V: they are Pod.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        all.extend(keys.into_iter().zip(values));
        if end {
            return Ok(all);
        }
        (cursor, started) = (next, true);
    }
}

/// Key and value of an entry, as bytes.
pub(crate) type RawEntry = (Vec<u8>, Vec<u8>);

/// Everything in a map, as bytes: a key and the values of every CPU that it has, `value_size` bytes in all.
pub(crate) fn read_raw(map: BorrowedFd<'_>, key_size: usize, value_size: usize) -> io::Result<Vec<RawEntry>> {
    let mut all = Vec::new();
    visit_raw(map, key_size, value_size, |key, value| all.push((key.to_vec(), value.to_vec())))?;
    Ok(all)
}

/// Bytes of values that are read at once, where a bucket of the map allows it.
const AT_ONCE: usize = 1 << 20;

/// Likewise, one after the other: with many CPUs there is much of it.
pub(crate) fn visit_raw(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut visit: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let mut chunk = (AT_ONCE / value_size.max(1)).clamp(16, 1_024);
    // An index, the number of a bucket: never more than 8 bytes in the kinds of maps that there are here.
    let mut cursor = 0u64;
    let mut started = false;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    loop {
        keys.resize(chunk * key_size, 0u8);
        values.resize(chunk * value_size, 0u8);
        let mut next = 0u64;
        let mut attributes = BatchAttributes {
            in_batch: if started { &raw mut cursor as u64 } else { 0 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: chunk as u32,
            map_fd: map.as_raw_fd() as u32,
            ..Default::default()
        };
        let end = match bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes) {
            Ok(_) if attributes.count == 0 => return Err(io::Error::other("the kernel read none of the entries")),
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && chunk < 1 << 20 => {
                chunk *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let entries = keys.chunks_exact(key_size).zip(values.chunks_exact(value_size));
        entries.take(attributes.count as usize).for_each(|(key, value)| visit(key, value));
        if end {
            return Ok(());
        }
        (cursor, started) = (next, true);
    }
}

/// Makes an array.
pub(crate) fn create_array(value_size: u32, entries: u32) -> io::Result<OwnedFd> {
    let mut array =
        CreateAttributes { kind: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, entries, ..Default::default() };
    bpf(BPF_MAP_CREATE, &mut array).map(new_fd)
}

/// Makes a hash map.
pub(crate) fn create_hash(key_size: u32, value_size: u32, entries: u32) -> io::Result<OwnedFd> {
    let mut hash = CreateAttributes { kind: BPF_MAP_TYPE_HASH, key_size, value_size, entries, ..Default::default() };
    bpf(BPF_MAP_CREATE, &mut hash).map(new_fd)
}

#[repr(C)]
#[derive(Default)]
struct ObjectAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Opens what is pinned at a path; `None`: nothing is.
pub(crate) fn object(path: &Path) -> io::Result<Option<OwnedFd>> {
    let text = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = ObjectAttributes { path: text.as_ptr() as u64, ..Default::default() };
    match bpf(BPF_OBJ_GET, &mut attributes) {
        Ok(result) => Ok(Some(new_fd(result))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a TCX link says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TcxLink {
    pub(crate) id: u32,
    pub(crate) program: u32,
    /// 0: the interface is gone.
    pub(crate) interface: u32,
    attach_type: u32,
}

impl TcxLink {
    pub(crate) fn is_at(&self, interface: u32, direction: u32) -> bool {
        self.interface == interface && self.attach_type == attach_type(direction)
    }
}

#[repr(C)]
#[derive(Default)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

/// The beginning of `bpf_link_info`, with its union as TCX fills it.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _pad: u32,
    interface: u32,
    attach_type: u32,
    _rest: [u64; 8],
}

/// `None`: a link of another kind.
pub(crate) fn tcx_link(link: BorrowedFd<'_>) -> io::Result<Option<TcxLink>> {
    let info = link_info(link)?;
    Ok((info.kind == BPF_LINK_TYPE_TCX).then_some(TcxLink {
        id: info.id,
        program: info.program,
        interface: info.interface,
        attach_type: info.attach_type,
    }))
}

/// What an XDP link says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XdpLink {
    pub(crate) id: u32,
    pub(crate) program: u32,
    /// 0: the interface is gone.
    pub(crate) interface: u32,
}

/// `None`: a link of another kind.
pub(crate) fn xdp_link(link: BorrowedFd<'_>) -> io::Result<Option<XdpLink>> {
    let LinkInfo { kind, id, program, interface, .. } = link_info(link)?;
    Ok((kind == BPF_LINK_TYPE_XDP).then_some(XdpLink { id, program, interface }))
}

fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attributes = InfoAttributes {
        fd: link.as_raw_fd() as u32,
        length: size_of::<LinkInfo>() as u32,
        info: &raw mut info as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

#[repr(C)]
#[derive(Default)]
struct ByIdAttributes {
    id: u32,
    next: u32,
    flags: u32,
}

/// Opens a program by its id, which takes CAP_SYS_ADMIN.
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    bpf(BPF_PROG_GET_FD_BY_ID, &mut ByIdAttributes { id, ..Default::default() }).map(new_fd)
}

/// The beginning of `bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    _rest: [u64; 7],
    name: [u8; 16],
}

/// A program's id and name.
pub(crate) fn program(program: BorrowedFd<'_>) -> io::Result<(u32, String)> {
    let mut info = ProgramInfo::default();
    let mut attributes = InfoAttributes {
        fd: program.as_raw_fd() as u32,
        length: size_of::<ProgramInfo>() as u32,
        info: &raw mut info as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((info.id, String::from_utf8_lossy(name).into_owned()))
}

fn attach_type(direction: u32) -> u32 {
    if direction == EGRESS { BPF_TCX_EGRESS } else { BPF_TCX_INGRESS }
}

#[repr(C)]
#[derive(Default)]
struct QueryAttributes {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    _pad: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// Ids of the TCX programs of an interface in the order in which they run. Asks for nothing by id, which would take
/// CAP_SYS_ADMIN. `None`: the kernel has no TCX.
pub(crate) fn tcx_programs(interface: u32, direction: u32) -> io::Result<Option<Vec<u32>>> {
    // The kernel allows 64 (BPF_MPROG_MAX).
    let mut programs = vec![0u32; 64];
    let mut attributes = QueryAttributes {
        target: interface,
        attach_type: attach_type(direction),
        programs: programs.as_mut_ptr() as u64,
        count: programs.len() as u32,
        ..Default::default()
    };
    match bpf(BPF_PROG_QUERY, &mut attributes) {
        Ok(_) => {
            programs.truncate(attributes.count as usize);
            Ok(Some(programs))
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// Waits until every program that ran when it was called has ended.
///
/// membarrier(2)'s global command is `synchronize_rcu()`, and programs run inside an RCU read section. Kernels that were
/// started with `nohz_full` refuse it (EINVAL); there the update of an array of maps does, which waits in the same way so
/// that userspace knows the old inner map unused.
pub(crate) fn wait_for_readers() -> io::Result<()> {
    // SAFETY: takes three integers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::ENOSYS) => replace_inner_map(),
        _ => Err(error),
    }
}

#[repr(C)]
#[derive(Default)]
struct CreateAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    inner: u32,
}

#[repr(C)]
#[derive(Default)]
struct ElementAttributes {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn replace_inner_map() -> io::Result<()> {
    let inner = create_array(4, 1)?;
    let mut outer = CreateAttributes {
        kind: BPF_MAP_TYPE_ARRAY_OF_MAPS,
        key_size: 4,
        value_size: 4,
        entries: 1,
        inner: inner.as_raw_fd() as u32,
        ..Default::default()
    };
    let outer = new_fd(bpf(BPF_MAP_CREATE, &mut outer)?);
    let (mut key, mut value) = (0u32, inner.as_raw_fd() as u32);
    let mut update = ElementAttributes {
        map: outer.as_raw_fd() as u32,
        key: &raw mut key as u64,
        value: &raw mut value as u64,
        ..Default::default()
    };
    bpf(BPF_MAP_UPDATE_ELEM, &mut update).map(drop)
}

/// A value from the bytes of a ring buffer's record; `None`: too few.
pub(crate) fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: there are enough bytes, and any bytes are a T: it is Pod.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// Nanoseconds of the clock that the programs stamp records with.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_waiting_work_here() {
        wait_for_readers().expect("membarrier");
        if nix::unistd::geteuid().is_root() {
            replace_inner_map().expect("the way for kernels without it");
        }
    }
}
