//! A network namespace with nothing but a loopback interface, which has many addresses: a node that connects to one of
//! them comes from it, so that nodes are as many callers as they would be. The addresses are those that are set aside for
//! benchmarks (RFC 2544), since 127.0.0.0/8 is never where a node is reached.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};

/// Addresses that nodes share.
const ADDRESSES: u32 = 250;

/// The address of a node, from which and at which it finds the controller.
pub(super) fn address(index: u32) -> Ipv4Addr {
    let last = u8::try_from(index % ADDRESSES + 1).unwrap_or(u8::MAX);
    Ipv4Addr::new(198, 18, 1, last)
}

/// Takes this thread, and what it starts from now on, into a namespace of its own.
pub(super) fn enter() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "a network namespace needs root; run this as root");
    unshare(CloneFlags::CLONE_NEWNET).context("failed to make a network namespace")?;
    let mut ip = Command::new("ip");
    let mut ip = ip.args(["-batch", "-"]).stdin(Stdio::piped()).spawn().context("failed to start `ip`")?;
    let mut commands = String::from("link set lo up\n");
    for index in 0..ADDRESSES {
        commands += &format!("address add {}/32 dev lo\n", address(index));
    }
    ip.stdin.take().context("`ip` has no stdin")?.write_all(commands.as_bytes())?;
    ensure!(ip.wait()?.success(), "`ip -batch` failed; see the message above");
    Ok(())
}
