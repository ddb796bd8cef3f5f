//! How many connections there may be: in all, of one caller, and, before anybody knows who calls, of one address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use controller_api::identity::Identity;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::listener::Peer;
use crate::metrics::Metrics;
use crate::record::KeyHash;

/// Handshakes at one time; connections beyond wait in the kernel's queue.
pub const HANDSHAKES: usize = 1_024;
/// Handshakes at one time of one address (IPv6: of one /64): many nodes can be behind one, and yet it is not everybody.
const ADDRESS_HANDSHAKES: usize = 64;
/// Connections of certified callers at one time: nodes and a few admins.
const CERTIFIED: usize = 16_384;
/// Connections without a certificate at one time, which can only enrol.
const ANONYMOUS: usize = 512;
/// Connections at one time of callers whose certificate is not accepted (any more), who only hear why.
const REFUSED: usize = 512;
/// Connections of one node: one that it has, and some that broke without a word.
const PER_NODE: usize = 4;
/// Connections of one admin, whose scripts may run side by side.
const PER_ADMIN: usize = 16;
/// Files besides connections: the database, the sockets, the runtime's own.
const OTHER_FILES: usize = 128;
/// File descriptors that all of that can take.
pub const FILES: usize = HANDSHAKES + CERTIFIED + ANONYMOUS + REFUSED + OTHER_FILES;
/// How often connections are inspected. Who is not accepted for a whole round is sent away: time enough to hear why.
pub const ROUND: Duration = Duration::from_secs(5);

/// All places.
#[derive(Clone, Debug)]
pub struct Places(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    certified: Arc<Semaphore>,
    anonymous: Arc<Semaphore>,
    refused: Arc<Semaphore>,
    held: Mutex<Held>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Held {
    taken: u64,
    /// Oldest first.
    by: BTreeMap<Holder, Vec<Entry>>,
}

/// Whose connections are counted together. One who is refused takes no place from the one who has the name now.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    Accepted(Identity),
    Refused(Identity, KeyHash),
}

#[derive(Debug)]
struct Entry {
    number: u64,
    peer: Peer,
    /// Was not accepted at the last inspection.
    struck: bool,
    /// Dropped to close the connection.
    _close: oneshot::Sender<()>,
}

/// A place, for as long as this lives.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
    places: Places,
    holder: Option<(Holder, u64)>,
}

/// Is done when the connection is to be closed.
pub type Close = oneshot::Receiver<()>;

impl Places {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Shared {
            certified: Arc::new(Semaphore::new(CERTIFIED)),
            anonymous: Arc::new(Semaphore::new(ANONYMOUS)),
            refused: Arc::new(Semaphore::new(REFUSED)),
            held: Mutex::default(),
            metrics,
        }))
    }

    /// A place for this caller, unless there are too many. Who has too many of its own loses the oldest, which may well be
    /// dead: nobody is kept out by what it left behind.
    pub fn take(&self, peer: &Peer, accepted: bool) -> Option<(Place, Option<Close>)> {
        let (places, holder) = match (peer, accepted) {
            (Peer::Root | Peer::Anonymous { .. }, _) => (&self.0.anonymous, None),
            (Peer::Certified { certificate, .. }, true) => {
                (&self.0.certified, Some(Holder::Accepted(certificate.identity.clone())))
            }
            (Peer::Certified { certificate, .. }, false) => {
                (&self.0.refused, Some(Holder::Refused(certificate.identity.clone(), certificate.key)))
            }
        };
        let permit = Arc::clone(places).try_acquire_owned().ok()?;
        self.0.metrics.connections.inc();
        let (holder, close) = holder.map(|holder| self.enter(holder, peer.clone())).unzip();
        Some((Place { _permit: permit, places: self.clone(), holder }, close))
    }

    fn enter(&self, holder: Holder, peer: Peer) -> ((Holder, u64), Close) {
        let most = match &holder {
            Holder::Accepted(Identity::Admin(_)) => PER_ADMIN,
            Holder::Accepted(_) | Holder::Refused(..) => PER_NODE,
        };
        let (sender, close) = oneshot::channel();
        let mut held = self.held();
        held.taken += 1;
        let number = held.taken;
        let entries = held.by.entry(holder.clone()).or_default();
        if entries.len() >= most {
            entries.remove(0);
        }
        entries.push(Entry { number, peer, struck: false, _close: sender });
        ((holder, number), close)
    }

    /// One round: closes connections of callers that were not accepted at the last one either.
    pub fn inspect(&self, accepts: impl Fn(&Peer) -> bool) {
        self.held().by.retain(|_, entries| {
            entries.retain_mut(|entry| {
                let strikes = if accepts(&entry.peer) { 0 } else { 1 + u8::from(entry.struck) };
                entry.struck = strikes > 0;
                strikes < 2
            });
            !entries.is_empty()
        });
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.0.metrics.connections.dec();
        let Some((holder, number)) = &self.holder else { return };
        let mut held = self.places.held();
        if let Some(entries) = held.by.get_mut(holder) {
            entries.retain(|entry| entry.number != *number);
            if entries.is_empty() {
                held.by.remove(holder);
            }
        }
    }
}

/// Handshakes in progress, by address.
#[derive(Clone, Debug, Default)]
pub struct Handshakes(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

/// One handshake in progress, for as long as this lives.
#[derive(Debug)]
pub struct Handshake {
    handshakes: Handshakes,
    source: IpAddr,
}

impl Handshakes {
    /// `None`: this address has too many.
    pub fn begin(&self, address: IpAddr) -> Option<Handshake> {
        let source = source(address);
        let mut counts = self.counts();
        let count = counts.entry(source).or_default();
        if *count >= ADDRESS_HANDSHAKES {
            return None;
        }
        *count += 1;
        Some(Handshake { handshakes: self.clone(), source })
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut counts = self.handshakes.counts();
        if let Some(count) = counts.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.source);
            }
        }
    }
}

/// What one machine cannot choose freely of its address.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{key_hash, parse};
    use crate::grpc::listener::PeerCertificate;
    use policy::NodeId;

    fn node(id: u32, key: u8) -> Peer {
        let identity = Identity::Node(NodeId(id));
        let certificate =
            PeerCertificate { network: parse("corp"), identity, key: key_hash(key), expires_at: u64::MAX };
        Peer::Certified { address: parse("192.0.2.1:5000"), certificate }
    }

    fn is_closed(close: &mut Option<Close>) -> bool {
        let close = close.as_mut().expect("can be closed");
        close.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn the_newest_connections_of_a_caller_stay() {
        let metrics = Metrics::new();
        let places = Places::new(Arc::clone(&metrics));
        let take = |peer: &Peer, accepted| places.take(peer, accepted).expect("a place");
        let (_other, mut other) = take(&node(2, 2), true);
        let mut own: Vec<_> = (0..PER_NODE).map(|_| take(&node(1, 1), true)).collect();
        // Keys that were replaced take nothing from those that count now.
        let _replaced: Vec<_> = (0..=PER_NODE).map(|_| take(&node(1, 9), false)).collect();
        assert!(own.iter_mut().all(|(_, close)| !is_closed(close)));
        own.push(take(&node(1, 1), true));
        let closed: Vec<_> = own.iter_mut().map(|(_, close)| is_closed(close)).collect();
        assert_eq!(closed, [true, false, false, false, false]);
        // A place that was given up is free again.
        own.pop();
        own.push(take(&node(1, 1), true));
        assert!(!is_closed(&mut own[1].1) && !is_closed(&mut other));
        drop((own, _other, _replaced));
        assert_eq!(metrics.connections.get(), 0);
        assert!(places.held().by.is_empty());
    }

    #[test]
    fn who_is_not_accepted_for_a_round_is_sent_away() {
        let places = Places::new(Metrics::new());
        let (_place, mut close) = places.take(&node(1, 1), true).expect("a place");
        let (_kept, mut kept) = places.take(&node(2, 2), true).expect("a place");
        let one_refused = |peer: &Peer| *peer != node(1, 1);
        places.inspect(one_refused);
        places.inspect(|_| true);
        places.inspect(one_refused);
        assert!(!is_closed(&mut close), "it was accepted meanwhile");
        places.inspect(one_refused);
        assert!(is_closed(&mut close) && !is_closed(&mut kept));
    }

    #[test]
    fn one_address_has_a_part_of_the_handshakes() {
        let handshakes = Handshakes::default();
        for (one, same, other) in
            [("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")]
        {
            let mut held: Vec<_> =
                (0..ADDRESS_HANDSHAKES).map(|_| handshakes.begin(parse(one)).expect("room")).collect();
            assert!(handshakes.begin(parse(same)).is_none());
            assert!(handshakes.begin(parse(other)).is_some());
            held.pop();
            assert!(handshakes.begin(parse(same)).is_some());
        }
        assert!(handshakes.counts().is_empty());
    }
}
