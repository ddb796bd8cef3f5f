//! Whether WireGuard could listen on a port. Asked before a change, since neither backend fails it cleanly.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};

/// Binds both families for a moment, as WireGuard does.
pub(super) fn check_free(port: u16) -> io::Result<()> {
    match UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)) {
        // No IPv6 here.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map(drop)
        }
        other => other.map(drop),
    }
}
