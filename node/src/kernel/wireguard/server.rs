//! gotatun behind the UAPI. Edits become the smallest calls that have their effect: gotatun's own UAPI resets the
//! session of every peer that it is told about, and forgets that a prefix which moved to another peer is gone from the
//! first; here an unchanged peer is not touched and a prefix has one owner.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use gotatun::device::configure::{DeviceWrite, PeerMut, PeerStats};
use gotatun::device::{Device, DeviceBuilder, Error, Peer};
use gotatun::packet::{Ip, Packet, PacketBufPool};
use gotatun::tun::tun_async_device::TunDevice;
use gotatun::tun::{IpRecv, IpSend, MtuWatcher};
use gotatun::udp::socket::UdpSocketFactory;
use gotatun::x25519;
use ipnet::IpNet;
use policy::PublicKey;

use super::port::check_free;
use super::uapi::{Answer, AnswerPeer, Set, SetPeer, SharedKey};
use crate::key::{KEY_LENGTH, PrivateKey};

/// Two readings of one handshake's time differ by less; gotatun gives ages, not times.
const HANDSHAKE_JITTER: Duration = Duration::from_secs(1);

/// How long a closed port may stay taken: gotatun lets go of its socket a moment after it says so.
const PORT_PATIENCE: Duration = Duration::from_secs(2);

/// gotatun and what it was told.
///
/// A change of key or port starts another device in place of the first. gotatun could change its own, but the tasks that it
/// stops for it may be taken for a device that failed.
pub(super) struct Server {
    tun: Tun,
    /// `None` until there is a key, without which gotatun does nothing.
    device: Option<(Device<Transports>, PrivateKey)>,
    /// As asked for; 0 is any.
    port: u16,
    fwmark: u32,
    model: Model,
    /// gotatun forgets a handshake with its session; `wg` and the metrics do not.
    handshakes: BTreeMap<PublicKey, SystemTime>,
}

type Transports = (UdpSocketFactory, Tun, Tun);

impl Server {
    pub(super) fn new(tun: TunDevice) -> Self {
        Self { tun: Tun(tun), device: None, port: 0, fwmark: 0, model: Model::default(), handshakes: BTreeMap::new() }
    }

    /// Returns when gotatun cannot go on.
    pub(super) async fn failed(&mut self) {
        match &mut self.device {
            Some((device, _)) => device.wait().await,
            None => std::future::pending().await,
        }
    }

    pub(super) async fn stop(self) {
        if let Some((device, _)) = self.device {
            device.stop().await;
        }
    }

    pub(super) async fn get(&mut self) -> Answer {
        let Some((device, key)) = &self.device else {
            return Answer { private_key: None, listen_port: self.port, fwmark: self.fwmark, peers: Vec::new() };
        };
        let (listen_port, peers) = device.read(async |device| (device.listen_port(), device.peers().await)).await;
        let now = SystemTime::now();
        let mut answers = Vec::with_capacity(peers.len());
        for PeerStats { peer, stats, .. } in peers {
            let Some((public_key, known)) = self.model.find(&peer.public_key) else { continue };
            let seen = stats.last_handshake.and_then(|age| now.checked_sub(age));
            answers.push(AnswerPeer {
                public_key,
                preshared_key: known.preshared_key.clone(),
                endpoint: peer.endpoint,
                persistent_keepalive: known.persistent_keepalive,
                last_handshake: remember(&mut self.handshakes, public_key, seen),
                received_bytes: known.received_before + stats.rx_bytes as u64,
                sent_bytes: known.sent_before + stats.tx_bytes as u64,
                allowed_ips: known.allowed_ips.clone(),
            });
        }
        answers.sort_by_key(|peer| peer.public_key);
        Answer { private_key: Some(key.clone()), listen_port, fwmark: self.fwmark, peers: answers }
    }

    /// Makes the change, or says by an `errno` why not.
    pub(super) async fn set(&mut self, set: Set) -> Result<(), i32> {
        let (old_key, old_port) = match &self.device {
            Some((device, key)) => (Some(key.clone()), device.read(async |device| device.listen_port()).await),
            None => (None, self.port),
        };
        let Some(key) = set.private_key.clone().or(old_key.clone()) else {
            return self.prepare(&set);
        };
        let port = set.listen_port.filter(|port| ![self.port, old_port].contains(port));
        if let Some(port) = port {
            // Before anything stops: gotatun would be left without a socket.
            check_free(port).map_err(|error| error.raw_os_error().unwrap_or(libc::EADDRINUSE))?;
            self.port = port;
        }
        let mark = set.fwmark.filter(|mark| *mark != self.fwmark);
        self.fwmark = mark.unwrap_or(self.fwmark);
        let edits = self.model.plan(&set);
        for edit in &edits {
            if let Edit::Remove(key) = edit {
                self.handshakes.remove(key);
            }
        }
        let changed = match &self.device {
            Some((device, _)) if port.is_none() && old_key == Some(key.clone()) => edit(device, edits, mark).await,
            _ => self.restart(key).await,
        };
        changed.map_err(|error| errno_of(&error))
    }

    /// Notes what can be noted before there is a key.
    fn prepare(&mut self, set: &Set) -> Result<(), i32> {
        if set.peers.iter().any(|peer| !peer.remove && !peer.update_only) {
            return Err(libc::ENOKEY);
        }
        self.port = set.listen_port.unwrap_or(self.port);
        self.fwmark = set.fwmark.unwrap_or(self.fwmark);
        Ok(())
    }

    /// Starts gotatun with what the model holds, in place of the one that runs.
    async fn restart(&mut self, key: PrivateKey) -> Result<(), Error> {
        if let Some((device, _)) = self.device.take() {
            for stats in device.peers().await {
                self.model.carry_over(&stats);
            }
            device.stop().await;
        }
        let deadline = Instant::now() + PORT_PATIENCE;
        while check_free(self.port).is_err() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let builder = DeviceBuilder::new().with_default_udp().with_ip(self.tun.clone()).with_listen_port(self.port);
        let builder = if self.fwmark == 0 { builder } else { builder.with_fwmark(self.fwmark) };
        let device = builder.build().await?;
        // gotatun opens its socket when it gets a key, and not for peers alone.
        let start = async |device: &mut DeviceWrite<'_, Transports>| {
            device.set_private_key(key.to_secret()).await;
            for (public_key, known) in &self.model.peers {
                device.add_peer(known.to_peer(public_key));
            }
        };
        device.write(start).await?;
        self.device = Some((device, key));
        Ok(())
    }
}

async fn edit(device: &Device<Transports>, edits: Vec<Edit>, fwmark: Option<u32>) -> Result<(), Error> {
    if edits.is_empty() && fwmark.is_none() {
        return Ok(());
    }
    let change = async |device: &mut DeviceWrite<'_, Transports>| {
        for edit in edits {
            edit.apply(device).await;
        }
        fwmark.map_or(Ok(()), |mark| device.set_fwmark(mark))
    };
    device.write(change).await?
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
    /// As last told; where the peer really is, gotatun knows.
    endpoint: Option<SocketAddr>,
    persistent_keepalive: u16,
    allowed_ips: BTreeSet<IpNet>,
    /// What the devices before this one have counted.
    received_before: u64,
    sent_before: u64,
}

/// One call to gotatun.
#[derive(Debug, PartialEq, Eq)]
enum Edit {
    Add { public_key: PublicKey, known: Known },
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

    fn find(&self, key: &x25519::PublicKey) -> Option<(PublicKey, &Known)> {
        let key = PublicKey::try_from(key.as_bytes().as_slice()).ok()?;
        self.peers.get(&key).map(|known| (key, known))
    }

    /// Keeps for the next device what only this one knows.
    fn carry_over(&mut self, PeerStats { peer, stats, .. }: &PeerStats) {
        let key = PublicKey::try_from(peer.public_key.as_bytes().as_slice());
        if let Some(known) = key.ok().and_then(|key| self.peers.get_mut(&key)) {
            known.endpoint = peer.endpoint.or(known.endpoint);
            known.received_before += stats.rx_bytes as u64;
            known.sent_before += stats.tx_bytes as u64;
        }
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
            endpoint: peer.endpoint,
            persistent_keepalive: peer.persistent_keepalive.unwrap_or(0),
            allowed_ips,
            received_before: 0,
            sent_before: 0,
        };
        self.peers.insert(peer.public_key, known.clone());
        edits.push(Edit::Add { public_key: peer.public_key, known });
    }

    fn modify(&mut self, peer: &SetPeer, edits: &mut Vec<Edit>) {
        let old = self.peers[&peer.public_key].clone();
        let mut new = old.clone();
        if let Some(key) = &peer.preshared_key {
            new.preshared_key = present(key.clone());
        }
        new.endpoint = peer.endpoint.or(old.endpoint);
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

impl Known {
    fn to_peer(&self, public_key: &PublicKey) -> Peer {
        let mut peer = with_prefixes(Peer::new(to_x25519(public_key)), &self.allowed_ips);
        peer.endpoint = self.endpoint;
        peer.preshared_key = self.preshared_key.as_ref().map(|key| *key.0);
        peer.keepalive = seconds(self.persistent_keepalive);
        peer
    }
}

impl Edit {
    async fn apply(self, device: &mut DeviceWrite<'_, Transports>) {
        match self {
            Self::Remove(key) => {
                device.remove_peer(&to_x25519(&key)).await;
            }
            Self::Add { public_key, known } => {
                device.add_peer(known.to_peer(&public_key));
            }
            Self::Modify { public_key, change } => {
                let public_key = to_x25519(&public_key);
                let modify = |peer: &mut PeerMut| {
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
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::ENOBUFS | libc::ENOMEM)) =>
            {
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

fn errno_of(error: &Error) -> i32 {
    match error {
        Error::IoError(error) | Error::Bind(error, _) => error.raw_os_error().unwrap_or(libc::EIO),
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests;
