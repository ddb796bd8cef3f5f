//! WireGuard by the kernel, through `wireguard-control`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use ipnet::IpNet;
use policy::PublicKey;
use wireguard_control::{Backend as Control, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder, PeerInfo};
use zeroize::Zeroize as _;

use super::port::check_free;
use super::{foreign, other_backend};
use crate::kernel::link::netlink::{FoundLink, Netlink, is};
use crate::kernel::{Backend, Device, DevicePeer, KernelError, LinkKind, PeerConfig, WireGuard};
use crate::key::PrivateKey;

/// Prefixes in one netlink message. A message holds 201 of IPv6, and `wireguard-control` does not split a peer's.
const PREFIXES_PER_MESSAGE: usize = 150;

/// What reading back does, for its errors.
const READ: &str = "read WireGuard's state";

/// [`WireGuard`] by the kernel.
#[derive(Debug)]
pub(super) struct KernelWireGuard {
    interface: String,
    name: InterfaceName,
    netlink: Netlink,
    /// The prefixes of each peer as last read back or written, by which a change is known from what is there already. A
    /// stale entry costs a round of repair, never a wrong end.
    prefixes: BTreeMap<PublicKey, BTreeSet<IpNet>>,
    /// Whose each of them is.
    owners: BTreeMap<IpNet, PublicKey>,
}

impl KernelWireGuard {
    pub(super) fn new(interface: &str) -> Result<Self, KernelError> {
        let name = interface
            .parse()
            .map_err(|error| KernelError::with(format!("interface name `{interface}` is malformed"), error))?;
        Ok(Self {
            interface: interface.to_owned(),
            name,
            netlink: Netlink::new()?,
            prefixes: BTreeMap::new(),
            owners: BTreeMap::new(),
        })
    }

    fn error(&self, what: impl std::fmt::Display, error: io::Error) -> KernelError {
        KernelError::with(format!("failed to {what} of `{}`", self.interface), error)
    }

    /// Our link, which must be there: `wireguard-control` would make one, unmarked and without programs.
    fn link(&self) -> Result<FoundLink, KernelError> {
        match self.netlink.find_link(&self.interface)? {
            None => Err(KernelError::new(format!("there is no interface `{}`", self.interface))),
            Some(link) if !link.ours => Err(foreign(&self.interface, &link.kind_name)),
            Some(link) if link.kind != LinkKind::WireGuard => Err(other_backend(&self.interface, &link.kind_name)),
            Some(link) => Ok(link),
        }
    }

    fn apply(&self, update: DeviceUpdate, what: impl std::fmt::Display) -> Result<(), KernelError> {
        self.link()?;
        update.apply(&self.name, Control::Kernel).map_err(|error| self.error(what, error))
    }

    fn read(&self) -> io::Result<Option<wireguard_control::Device>> {
        match wireguard_control::Device::get(&self.name, Control::Kernel) {
            Ok(mut device) => {
                // Its `Debug` prints the key; nobody needs it.
                if let Some(key) = &mut device.private_key {
                    key.0.zeroize();
                }
                device.private_key = None;
                Ok(Some(device))
            }
            Err(error) if is(&error, &[libc::ENODEV, libc::EOPNOTSUPP]) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is known of a peer's prefixes is known no more.
    fn forget(&mut self, peer: &PublicKey) {
        for prefix in self.prefixes.remove(peer).unwrap_or_default() {
            self.owners.remove(&prefix);
        }
    }

    /// Whether an unmarked WireGuard link is one that we made and could not mark: nobody has configured it.
    fn is_untouched(&self, link: &FoundLink) -> Result<bool, KernelError> {
        if link.kind != LinkKind::WireGuard || link.up {
            return Ok(false);
        }
        let device = self.read().map_err(|error| self.error(READ, error))?;
        Ok(device.is_some_and(|device| device.public_key.is_none() && device.peers.is_empty()))
    }
}

impl WireGuard for KernelWireGuard {
    fn backend(&self) -> Backend {
        Backend::Kernel
    }

    fn create(&mut self) -> Result<(), KernelError> {
        match self.netlink.find_link(&self.interface)? {
            Some(link) if link.ours => return self.link().map(drop),
            Some(link) if !self.is_untouched(&link)? => return Err(foreign(&self.interface, &link.kind_name)),
            Some(_) => {}
            None => self.netlink.create_wireguard(&self.interface).map_err(|error| {
                KernelError::with(format!("failed to create interface `{}`", self.interface), error)
            })?,
        }
        self.netlink
            .adopt_link(&self.interface)
            .map_err(|error| KernelError::with(format!("failed to mark interface `{}`", self.interface), error))
    }

    fn serve(&mut self) -> Result<(), KernelError> {
        self.link().map(drop)
    }

    fn observe(&mut self) -> Result<Option<Device>, KernelError> {
        (self.prefixes, self.owners) = Default::default();
        match self.netlink.find_link(&self.interface)? {
            Some(link) if link.ours && link.kind == LinkKind::WireGuard => {}
            _ => return Ok(None),
        }
        let Some(found) = self.read().map_err(|error| self.error(READ, error))? else { return Ok(None) };
        let device = Device {
            public_key: found.public_key.as_ref().and_then(to_public),
            listen_port: found.listen_port.unwrap_or(0),
            peers: merge(&found.peers),
        };
        self.prefixes = device.peers.iter().map(|(key, peer)| (*key, peer.allowed_ips.clone())).collect();
        let owned = device.peers.iter().flat_map(|(key, peer)| peer.allowed_ips.iter().map(|prefix| (*prefix, *key)));
        self.owners = owned.collect();
        Ok(Some(device))
    }

    fn set_device(&mut self, key: &PrivateKey, listen_port: u16) -> Result<(), KernelError> {
        self.link()?;
        let what = format!("set key and port `{listen_port}`");
        let found = self.read().map_err(|error| self.error(READ, error))?;
        if found.and_then(|device| device.listen_port) != Some(listen_port) {
            // The kernel keeps its old socket where it cannot open the new one, and says that it has the new port.
            check_free(listen_port).map_err(|error| {
                let name = &self.interface;
                KernelError::with(
                    format!("failed to {what} of `{name}`; the port is taken, choose another `listen-port`"),
                    error,
                )
            })?;
        }
        self.apply(DeviceUpdate::new().set_private_key(Key(*key.as_bytes())).set_listen_port(listen_port), what)
    }

    fn set_peer(&mut self, peer: &PeerConfig) -> Result<(), KernelError> {
        let known = self.prefixes.get(&peer.public_key);
        let updates = updates_of(peer, known)
            .map_err(|error| KernelError::with(format!("failed to change peer `{}`", peer.public_key), error))?;
        for update in updates {
            self.apply(update, format_args!("set peer `{}`", peer.public_key))?;
        }
        self.forget(&peer.public_key);
        for prefix in &peer.allowed_ips {
            // A prefix has one owner: what this peer has now, no other has.
            if let Some(other) = self.owners.insert(*prefix, peer.public_key)
                && let Some(prefixes) = self.prefixes.get_mut(&other)
            {
                prefixes.remove(prefix);
            }
        }
        self.prefixes.insert(peer.public_key, peer.allowed_ips.clone());
        Ok(())
    }

    fn remove_peer(&mut self, peer: &PublicKey) -> Result<(), KernelError> {
        let update = DeviceUpdate::new().add_peer(PeerConfigBuilder::new(&to_key(peer)).remove());
        self.apply(update, format_args!("remove peer `{peer}`"))?;
        self.forget(peer);
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), KernelError> {
        if self.netlink.find_link(&self.interface)?.is_none() {
            return Ok(());
        }
        self.link()?;
        (self.prefixes, self.owners) = Default::default();
        self.netlink
            .delete_link(&self.interface)
            .map_err(|error| KernelError::with(format!("failed to delete interface `{}`", self.interface), error))
    }
}

/// The messages that make the peer as it should be without a moment in which a prefix that it keeps is not its own.
///
/// The kernel's "replace" empties the peer's prefixes first, and packets in between are lost. So prefixes are added, and
/// those that must go are moved, which is one step, to a peer that is made for it and removed with them.
fn updates_of(peer: &PeerConfig, known: Option<&BTreeSet<IpNet>>) -> Result<Vec<DeviceUpdate>, crate::key::KeyError> {
    let none = BTreeSet::new();
    let known_prefixes = known.unwrap_or(&none);
    let added: Vec<_> = peer.allowed_ips.difference(known_prefixes).copied().collect();
    let removed: Vec<_> = known_prefixes.difference(&peer.allowed_ips).copied().collect();
    let key = to_key(&peer.public_key);
    let mut updates = Vec::new();
    let mut batches = added.chunks(PREFIXES_PER_MESSAGE);
    let keepalive = peer.persistent_keepalive.map_or(0, |interval| interval.as_secs());
    let mut first = with_prefixes(PeerConfigBuilder::new(&key), batches.next().unwrap_or_default())
        .set_persistent_keepalive_interval(keepalive.try_into().unwrap_or(u16::MAX));
    if let Some(endpoint) = peer.endpoint {
        first = first.set_endpoint(endpoint);
    }
    if known.is_none() {
        // Nothing is known of it, so it is new, or what it has is not wanted.
        first = first.replace_allowed_ips();
    }
    updates.push(DeviceUpdate::new().add_peer(first));
    for batch in batches {
        updates.push(DeviceUpdate::new().add_peer(with_prefixes(PeerConfigBuilder::new(&key), batch)));
    }
    if !removed.is_empty() {
        let bin = to_key(&PrivateKey::generate()?.public());
        for batch in removed.chunks(PREFIXES_PER_MESSAGE) {
            updates.push(DeviceUpdate::new().add_peer(with_prefixes(PeerConfigBuilder::new(&bin), batch)));
        }
        updates.push(DeviceUpdate::new().add_peer(PeerConfigBuilder::new(&bin).remove()));
    }
    Ok(updates)
}

fn with_prefixes(builder: PeerConfigBuilder, prefixes: &[IpNet]) -> PeerConfigBuilder {
    prefixes.iter().fold(builder, |builder, prefix| builder.add_allowed_ip(prefix.network(), prefix.prefix_len()))
}

/// A dump gives a peer with many prefixes in several pieces, of which only the first says more than prefixes.
fn merge(pieces: &[PeerInfo]) -> BTreeMap<PublicKey, DevicePeer> {
    let mut peers = BTreeMap::<PublicKey, DevicePeer>::new();
    for piece in pieces {
        let Some(key) = to_public(&piece.config.public_key) else { continue };
        let prefixes = piece.config.allowed_ips.iter().filter_map(|ip| IpNet::new(ip.address, ip.cidr).ok());
        let peer = peers.entry(key).or_insert_with(|| DevicePeer {
            endpoint: None,
            allowed_ips: BTreeSet::new(),
            persistent_keepalive: None,
            last_handshake: None,
            received_bytes: 0,
            sent_bytes: 0,
        });
        peer.allowed_ips.extend(prefixes);
        peer.endpoint = peer.endpoint.or(piece.config.endpoint);
        let keepalive = piece.config.persistent_keepalive_interval.filter(|seconds| *seconds != 0);
        peer.persistent_keepalive =
            peer.persistent_keepalive.or(keepalive.map(|seconds| Duration::from_secs(seconds.into())));
        peer.last_handshake = peer.last_handshake.max(piece.stats.last_handshake_time);
        peer.received_bytes = peer.received_bytes.max(piece.stats.rx_bytes);
        peer.sent_bytes = peer.sent_bytes.max(piece.stats.tx_bytes);
    }
    peers
}

fn to_key(key: &PublicKey) -> Key {
    Key(*key.as_bytes())
}

/// `None` for zeros, which stand for no key.
fn to_public(key: &Key) -> Option<PublicKey> {
    PublicKey::try_from(key.0.as_slice()).ok()
}

#[cfg(test)]
mod tests;
