//! Which WireGuard carries the packets: the kernel's own, or gotatun over a persistent TUN device in a process of its
//! own (`noded wireguard`), which outlives the agent.
//!
//! Either way the interface is created by this module, down, and marked as ours ([`super::link::OWNER`]); a link of that
//! name without the mark belongs to somebody else and is never touched.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::link::netlink::{Netlink, RefusedKind};
use super::{Backend, KernelError, LinkKind, WireGuard};

mod kernel;
mod port;
mod process;
mod server;
mod tun;
mod uapi;
mod userspace;

pub use process::{UserspaceArgs, run_userspace};

/// Where WireGuard's own tools look for the sockets of userspace implementations.
pub const SOCKET_DIRECTORY: &str = "/var/run/wireguard";

/// Which WireGuard the configuration asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// The kernel's where it has one, else userspace. An interface that is already there keeps its kind.
    #[default]
    Auto,
    Kernel,
    Userspace,
}

/// What the userspace backend needs to know; the kernel's needs nothing.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the UAPI socket, `<interface>.sock`.
    pub socket_directory: PathBuf,
    /// The program whose verb `wireguard` runs gotatun. `None`: the running one.
    pub executable: Option<PathBuf>,
    /// File for what that process says, emptied at each start. `None`: it says nothing.
    pub log: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self { socket_directory: SOCKET_DIRECTORY.into(), executable: None, log: None }
    }
}

/// Chooses the backend for `interface`. Creates nothing that stays.
pub fn detect(interface: &str, preference: Preference, options: Options) -> Result<Box<dyn WireGuard>, KernelError> {
    super::link::check_name(interface)?;
    match choose(interface, preference)? {
        Backend::Kernel => Ok(Box::new(kernel::KernelWireGuard::new(interface)?)),
        Backend::Userspace => {
            tun::check_available()?;
            Ok(Box::new(userspace::UserspaceWireGuard::new(interface, options)?))
        }
    }
}

fn choose(interface: &str, preference: Preference) -> Result<Backend, KernelError> {
    match preference {
        Preference::Userspace => return Ok(Backend::Userspace),
        Preference::Kernel | Preference::Auto => {}
    }
    let netlink = Netlink::new()?;
    if preference == Preference::Auto
        && let Some(link) = netlink.find_link(interface)?
        && link.ours
    {
        match link.kind {
            LinkKind::WireGuard => return Ok(Backend::Kernel),
            LinkKind::Tun => return Ok(Backend::Userspace),
            LinkKind::Foreign => {}
        }
    }
    match (netlink.probe_wireguard(), preference) {
        (Ok(()), _) => Ok(Backend::Kernel),
        (Err(RefusedKind::Unsupported), Preference::Auto) => Ok(Backend::Userspace),
        (Err(RefusedKind::Unsupported), _) => Err(KernelError::new(
            "this kernel has no WireGuard; load it with `modprobe wireguard`, or set `wireguard = \"auto\"`",
        )),
        (Err(RefusedKind::Other(error)), _) => {
            Err(KernelError::with("failed to create a WireGuard link; it takes CAP_NET_ADMIN", error))
        }
    }
}

impl fmt::Display for Preference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        })
    }
}

impl FromStr for Preference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "kernel" => Ok(Self::Kernel),
            "userspace" => Ok(Self::Userspace),
            other => Err(format!("`{other}` is no WireGuard backend; it is `auto`, `kernel` or `userspace`")),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Preference {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl serde::Serialize for Preference {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Says whose the link is, for a link that is in the way.
fn foreign(interface: &str, kind: &str) -> KernelError {
    KernelError::new(format!(
        "interface `{interface}` is there already, of kind `{kind}`, and not Rampart's; choose another with \
         `noded run --interface NAME`, or remove it with `ip link delete {interface}`"
    ))
}

/// Says that our link was made for the other backend.
fn other_backend(interface: &str, kind: &str) -> KernelError {
    KernelError::new(format!(
        "interface `{interface}` is Rampart's but of kind `{kind}`, made for the other WireGuard backend; set \
         `wireguard = \"auto\"`, or remove it with `ip link delete {interface}`"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preference_reads_what_it_prints() {
        for preference in [Preference::Auto, Preference::Kernel, Preference::Userspace] {
            assert_eq!(preference.to_string().parse(), Ok(preference));
        }
        let error = "wireguard-go".parse::<Preference>().unwrap_err();
        assert_eq!(error, "`wireguard-go` is no WireGuard backend; it is `auto`, `kernel` or `userspace`");
    }
}
