//! The persistent TUN device under the userspace backend. It is there before gotatun opens it and when gotatun is gone,
//! so that the programs on it stay.
#![allow(unsafe_code, reason = "TUN devices are made by ioctl")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;

use crate::kernel::KernelError;
use crate::kernel::link::netlink::Netlink;

/// The device that makes TUN devices.
const DEVICE: &str = "/dev/net/tun";

/// Refuses early where the kernel offers no TUN.
pub(super) fn check_available() -> Result<(), KernelError> {
    open().map(drop)
}

fn open() -> Result<File, KernelError> {
    OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => {
                "userspace WireGuard needs it; make it with `mkdir -p /dev/net && mknod /dev/net/tun c 10 200`"
            }
            io::ErrorKind::PermissionDenied => "run as root, and in a container allow the device",
            // The node is there and no driver is behind it.
            _ => "load the driver with `modprobe tun`",
        };
        KernelError::with(format!("failed to open `{DEVICE}`; {remedy}"), error)
    })
}

/// Makes a persistent TUN device of that name, down, marked as ours, which only root may open. The name must be free.
pub(super) fn create(name: &str, netlink: &Netlink) -> Result<(), KernelError> {
    let error = |what: &str, error: io::Error| KernelError::with(format!("failed to {what} `{name}`"), error);
    let device = open()?;
    // EXCL: a device of that name that appeared meanwhile is refused, not opened.
    attach(&device, name, libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL)
        .map_err(|source| error("create the TUN device", source))?;
    // Without an owner anybody who can open /dev/net/tun could attach to it while nothing serves it.
    // SAFETY: TUNSETOWNER takes a user id by value; the descriptor is open for the whole call.
    let owned = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(effective_user())) };
    check(owned).map_err(|source| error("set the owner of the TUN device", source))?;
    // The mark comes before persistence: whatever stops us here takes the device away again.
    netlink.adopt_link(name).map_err(|source| error("mark the TUN device", source))?;
    // SAFETY: TUNSETPERSIST takes a flag by value; the descriptor is open for the whole call.
    let kept = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) };
    check(kept).map_err(|source| error("keep the TUN device", source))
}

fn attach(device: &File, name: &str, flags: i32) -> io::Result<()> {
    // SAFETY: an `ifreq` is integers and byte arrays, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // The flags are 16 bits in this request, IFF_TUN_EXCL the highest of them.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives until the call is over.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

fn effective_user() -> u32 {
    nix::unistd::geteuid().as_raw()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
