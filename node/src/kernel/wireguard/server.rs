//! gotatun behind the UAPI. Edits become the smallest calls that have their effect: gotatun's own UAPI resets the
//! session of every peer that it is told about, and forgets that a prefix which moved to another peer is gone from the
//! first; here an unchanged peer is not touched and a prefix has one owner.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, SystemTime};

use gotatun::device::configure::DeviceWrite;
use gotatun::device::{Device, DeviceBuilder, Error, Peer};
use gotatun::packet::{Ip, Packet, PacketBufPool};
use gotatun::tun::tun_async_device::TunDevice;
use gotatun::tun::{IpRecv, IpSend, MtuWatcher};
use gotatun::udp::socket::UdpSocketFactory;
use gotatun::x25519;
use ipnet::IpNet;
use policy::PublicKey;

use super::uapi::{Answer, AnswerPeer, Set, SetPeer, SharedKey};
use crate::key::{KEY_LENGTH, PrivateKey};

/// Two readings of one handshake's time differ by less; gotatun gives ages, not times.
const HANDSHAKE_JITTER: Duration = Duration::from_secs(1);

/// A running gotatun and what it was told.
pub(super) struct Server {
    device: Device<Transports>,
    model: Model,
    /// Asked for before there is a key, without which gotatun opens no socket.
    waiting_port: Option<u16>,
    /// gotatun forgets a handshake with its session; `wg` and the metrics do not.
    handshakes: BTreeMap<PublicKey, SystemTime>,
}

type Transports = (UdpSocketFactory, Tun, Tun);

/// Why a change was not made; the change was then not made at all.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) errno: i32,
    /// The device is left without a socket, and only a new process helps.
    pub(super) broken: bool,
}

impl Server {
    pub(super) async fn start(tun: TunDevice) -> Result<Self, Error> {
        let device = DeviceBuilder::new().with_default_udp().with_ip(Tun(tun)).build().await?;
        Ok(Self { device, model: Model::default(), waiting_port: None, handshakes: BTreeMap::new() })
    }

    /// Returns when gotatun cannot go on, for one because the TUN device is gone.
    pub(super) async fn failed(&mut self) {
        self.device.wait().await;
    }

    pub(super) async fn stop(self) {
        self.device.stop().await;
    }

    pub(super) async fn get(&mut self) -> Answer {
        let (private_key, listen_port, fwmark, peers) = self
            .device
            .read(async |device| {
                let key = device.private_key().and_then(|key| PrivateKey::from_bytes(key.as_bytes()).ok());
                (key, device.listen_port(), device.fwmark(), device.peers().await)
            })
            .await;
        let now = SystemTime::now();
        let mut answers = Vec::with_capacity(peers.len());
        for peer in peers {
            let Ok(public_key) = PublicKey::try_from(peer.peer.public_key.as_bytes().as_slice()) else { continue };
            let seen = peer.stats.last_handshake.and_then(|age| now.checked_sub(age));
            let known = self.model.peers.get(&public_key);
            answers.push(AnswerPeer {
                public_key,
                preshared_key: peer.peer.preshared_key.map(|key| SharedKey(key.into())),
                endpoint: peer.peer.endpoint,
                persistent_keepalive: peer.peer.keepalive.unwrap_or(0),
                last_handshake: remember(&mut self.handshakes, public_key, seen),
                received_bytes: peer.stats.rx_bytes as u64,
                sent_bytes: peer.stats.tx_bytes as u64,
                allowed_ips: known.map(|known| known.allowed_ips.clone()).unwrap_or_default(),
            });
        }
        answers.sort_by_key(|peer| peer.public_key);
        let listen_port = self.waiting_port.unwrap_or(listen_port);
        Answer { private_key, listen_port, fwmark: fwmark.unwrap_or(0), peers: answers }
    }

    pub(super) async fn set(&mut self, set: Set) -> Result<(), Refused> {
        let refused = |errno| Refused { errno, broken: false };
        let (keyed, old_port) =
            self.device.read(async |device| (device.private_key().is_some(), device.listen_port())).await;
        let adds = set.peers.iter().any(|peer| !peer.remove && !peer.update_only);
        if !keyed && set.private_key.is_none() {
            if adds {
                return Err(refused(libc::ENOKEY));
            }
            self.waiting_port = set.listen_port.or(self.waiting_port);
            return Ok(());
        }
        let port = set.listen_port.or(self.waiting_port).filter(|port| *port != old_port);
        if let Some(port) = port {
            check_free(port).map_err(|error| refused(error.raw_os_error().unwrap_or(libc::EADDRINUSE)))?;
        }
        self.waiting_port = None;
        let edits = self.model.plan(&set);
        let changed = self
            .device
            .write(async |device| {
                if let Some(key) = &set.private_key {
                    device.set_private_key(key.to_secret()).await;
                }
                if let Some(port) = port {
                    device.set_listen_port(port);
                }
                for edit in edits {
                    edit.apply(device).await;
                }
                set.fwmark.map_or(Ok(()), |mark| device.set_fwmark(mark))
            })
            .await;
        self.handshakes.retain(|key, _| self.model.peers.contains_key(key));
        match changed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(refused(errno_of(&error))),
            // The socket was closed and could not be opened again: somebody took the port in between.
            Err(error) => Err(Refused { errno: errno_of(&error), broken: true }),
        }
    }
}

/// What gotatun holds, as far as edits depend on it.
#[derive(Debug, Default)]
struct Model {
    peers: BTreeMap<PublicKey, Known>,
    /// Who holds a prefix: one peer at a time.
    owners: BTreeMap<IpNet, PublicKey>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    preshared_key: Option<SharedKey>,
    persistent_keepalive: u16,
    allowed_ips: BTreeSet<IpNet>,
}

/// One call to gotatun.
#[derive(Debug, PartialEq, Eq)]
enum Edit {
    Add { public_key: PublicKey, endpoint: Option<SocketAddr>, known: Known },
    Modify { public_key: PublicKey, change: Change },
    Remove(PublicKey),
}

/// What of a peer becomes different; what is `None` stays.
#[derive(Debug, Default, PartialEq, Eq)]
struct Change {
    preshared_key: Option<Option<SharedKey>>,
    endpoint: Option<SocketAddr>,
    persistent_keepalive: Option<u16>,
    allowed_ips: Option<BTreeSet<IpNet>>,
}

impl Model {
    /// Applies the change to the model and says what gotatun must be told, in order.
    fn plan(&mut self, set: &Set) -> Vec<Edit> {
        let mut edits = Vec::new();
        if set.replace_peers {
            let named: BTreeSet<_> = set.peers.iter().map(|peer| peer.public_key).collect();
            let others: Vec<_> = self.peers.keys().filter(|key| !named.contains(key)).copied().collect();
            edits.extend(others.into_iter().filter_map(|key| self.remove(key)));
        }
        for peer in &set.peers {
            match self.peers.contains_key(&peer.public_key) {
                _ if peer.remove => edits.extend(self.remove(peer.public_key)),
                true => self.modify(peer, &mut edits),
                false if peer.update_only => {}
                false => self.add(peer, &mut edits),
            }
        }
        edits
    }

    fn remove(&mut self, key: PublicKey) -> Option<Edit> {
        for prefix in self.peers.remove(&key)?.allowed_ips {
            self.owners.remove(&prefix);
        }
        Some(Edit::Remove(key))
    }

    fn add(&mut self, peer: &SetPeer, edits: &mut Vec<Edit>) {
        let allowed_ips: BTreeSet<_> = peer.add_allowed_ips.difference(&peer.remove_allowed_ips).copied().collect();
        self.take(peer.public_key, &allowed_ips, edits);
        let known = Known {
            preshared_key: peer.preshared_key.clone().and_then(present),
            persistent_keepalive: peer.persistent_keepalive.unwrap_or(0),
            allowed_ips,
        };
        self.peers.insert(peer.public_key, known.clone());
        edits.push(Edit::Add { public_key: peer.public_key, endpoint: peer.endpoint, known });
    }

    fn modify(&mut self, peer: &SetPeer, edits: &mut Vec<Edit>) {
        let old = self.peers[&peer.public_key].clone();
        let mut new = old.clone();
        if let Some(key) = &peer.preshared_key {
            new.preshared_key = present(key.clone());
        }
        new.persistent_keepalive = peer.persistent_keepalive.unwrap_or(old.persistent_keepalive);
        if peer.replace_allowed_ips {
            new.allowed_ips.clear();
        }
        new.allowed_ips.extend(&peer.add_allowed_ips);
        new.allowed_ips.retain(|prefix| !peer.remove_allowed_ips.contains(prefix));
        self.take(peer.public_key, &new.allowed_ips, edits);
        for prefix in old.allowed_ips.difference(&new.allowed_ips) {
            self.owners.remove(prefix);
        }
        let change = Change {
            preshared_key: (new.preshared_key != old.preshared_key).then(|| new.preshared_key.clone()),
            endpoint: peer.endpoint,
            persistent_keepalive: (new.persistent_keepalive != old.persistent_keepalive)
                .then_some(new.persistent_keepalive),
            allowed_ips: (new.allowed_ips != old.allowed_ips).then(|| new.allowed_ips.clone()),
        };
        self.peers.insert(peer.public_key, new);
        if change != Change::default() {
            edits.push(Edit::Modify { public_key: peer.public_key, change });
        }
    }

    /// Makes `key` the owner of the prefixes, and takes them from whoever has them.
    fn take(&mut self, key: PublicKey, prefixes: &BTreeSet<IpNet>, edits: &mut Vec<Edit>) {
        let mut losers = BTreeSet::new();
        for prefix in prefixes {
            if let Some(loser) = self.owners.insert(*prefix, key).filter(|owner| *owner != key) {
                self.peers.get_mut(&loser).expect("an owner is a peer").allowed_ips.remove(prefix);
                losers.insert(loser);
            }
        }
        for loser in losers {
            let allowed_ips = Some(self.peers[&loser].allowed_ips.clone());
            edits.push(Edit::Modify { public_key: loser, change: Change { allowed_ips, ..Change::default() } });
        }
    }
}

impl Edit {
    async fn apply(self, device: &mut DeviceWrite<'_, Transports>) {
        match self {
            Self::Remove(key) => {
                device.remove_peer(&to_x25519(&key)).await;
            }
            Self::Add { public_key, endpoint, known } => {
                let mut peer = with_prefixes(Peer::new(to_x25519(&public_key)), &known.allowed_ips);
                peer.endpoint = endpoint;
                peer.preshared_key = known.preshared_key.map(|key| *key.0);
                peer.keepalive = seconds(known.persistent_keepalive);
                device.add_peer(peer);
            }
            Self::Modify { public_key, change } => {
                let public_key = to_x25519(&public_key);
                let modify = |peer: &mut gotatun::device::configure::PeerMut| {
                    if let Some(key) = change.preshared_key {
                        peer.set_preshared_key(key.map(|key| *key.0));
                    }
                    if change.endpoint.is_some() {
                        peer.set_endpoint(change.endpoint);
                    }
                    if let Some(interval) = change.persistent_keepalive {
                        peer.set_keepalive(seconds(interval));
                    }
                    if let Some(allowed_ips) = change.allowed_ips {
                        peer.clear_allowed_ips();
                        peer.add_allowed_ips(with_prefixes(Peer::new(public_key), &allowed_ips).allowed_ips);
                    }
                };
                device.modify_peer(&public_key, modify).await;
            }
        }
    }
}

/// The TUN device, of which one bad packet or a moment of being down is not the end.
#[derive(Clone)]
pub(super) struct Tun(TunDevice);

impl IpSend for Tun {
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        match self.0.send(packet).await {
            // The link is down, the packet is none, or there is no memory for it: the packet is lost, and gotatun, which
            // stops at any error, goes on.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::ENOBUFS | libc::ENOMEM)) => {
                Ok(())
            }
            other => other,
        }
    }
}

impl IpRecv for Tun {
    async fn recv<'a>(
        &'a mut self,
        pool: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        loop {
            match self.0.recv(pool).await {
                Ok(mut packets) => {
                    if let Some(packet) = packets.next() {
                        return Ok(std::iter::once(packet));
                    }
                }
                // Not of the operating system: somebody wrote what is no IP packet into the link.
                Err(error) if error.raw_os_error().is_none() => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn mtu(&self) -> MtuWatcher {
        self.0.mtu()
    }
}

fn present(key: SharedKey) -> Option<SharedKey> {
    Some(key).filter(|key| *key.0 != [0; KEY_LENGTH])
}

fn seconds(interval: u16) -> Option<u16> {
    Some(interval).filter(|seconds| *seconds != 0)
}

fn to_x25519(key: &PublicKey) -> x25519::PublicKey {
    x25519::PublicKey::from(*key.as_bytes())
}

/// By way of text, for which gotatun's own type of prefix need not be named.
fn with_prefixes(peer: Peer, prefixes: &BTreeSet<IpNet>) -> Peer {
    prefixes.iter().fold(peer, |peer, prefix| {
        peer.with_allowed_ip(prefix.to_string().parse().expect("one crate's prefix is the other's"))
    })
}

/// Keeps the time of the latest handshake, steady over readings and beyond the session's end.
fn remember(
    handshakes: &mut BTreeMap<PublicKey, SystemTime>,
    key: PublicKey,
    seen: Option<SystemTime>,
) -> Option<SystemTime> {
    if let Some(seen) = seen {
        let known = handshakes.entry(key).or_insert(seen);
        let distance = seen.duration_since(*known).unwrap_or_else(|error| error.duration());
        if distance > HANDSHAKE_JITTER {
            *known = seen;
        }
    }
    handshakes.get(&key).copied()
}

/// Whether gotatun could open the port: it closes the old socket first and has none if it cannot.
fn check_free(port: u16) -> io::Result<()> {
    match UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map(drop)
        }
        other => other.map(drop),
    }
}

fn errno_of(error: &Error) -> i32 {
    match error {
        Error::IoError(error) | Error::Bind(error, _) => error.raw_os_error().unwrap_or(libc::EIO),
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests;
