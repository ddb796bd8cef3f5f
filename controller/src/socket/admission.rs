//! How many connections there may be: in all, of one caller, and, before anybody knows who calls, of one address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use controller_api::identity::Identity;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::principal::Principal;
use crate::metrics::Metrics;
use crate::store::account::KeyHash;

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

/// Connections that there are, and room for more.
#[derive(Clone, Debug)]
pub struct Admission(Arc<Shared>);

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
    by: BTreeMap<Counted, Vec<Entry>>,
}

/// Whose connections are counted together. One who is refused takes no room from the one who has the name now.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Counted {
    Accepted(Identity),
    Refused(Identity, KeyHash),
}

#[derive(Debug)]
struct Entry {
    number: u64,
    principal: Principal,
    /// Was not accepted at the last inspection.
    struck: bool,
    /// Dropped to close the connection.
    _close: oneshot::Sender<()>,
}

/// An admitted connection, for as long as this lives.
#[derive(Debug)]
pub struct Admitted {
    _permit: OwnedSemaphorePermit,
    admission: Admission,
    counted: Option<(Counted, u64)>,
}

/// Is done when the connection is to be closed.
pub type Close = oneshot::Receiver<()>;

impl Admission {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self(Arc::new(Shared {
            certified: Arc::new(Semaphore::new(CERTIFIED)),
            anonymous: Arc::new(Semaphore::new(ANONYMOUS)),
            refused: Arc::new(Semaphore::new(REFUSED)),
            held: Mutex::default(),
            metrics,
        }))
    }

    /// Room for this caller, unless there are too many. Who has too many of its own loses the oldest, which may well be
    /// dead: nobody is kept out by what it left behind.
    pub fn admit(&self, principal: &Principal, accepted: bool) -> Option<(Admitted, Option<Close>)> {
        let (room, counted) = match (principal, accepted) {
            (Principal::Root | Principal::Anonymous { .. }, _) => (&self.0.anonymous, None),
            (Principal::Certified { certificate, .. }, true) => {
                (&self.0.certified, Some(Counted::Accepted(certificate.identity.clone())))
            }
            (Principal::Certified { certificate, .. }, false) => {
                (&self.0.refused, Some(Counted::Refused(certificate.identity.clone(), certificate.key)))
            }
        };
        let permit = Arc::clone(room).try_acquire_owned().ok()?;
        self.0.metrics.connections.inc();
        let (counted, close) = counted.map(|counted| self.enter(counted, principal.clone())).unzip();
        Some((Admitted { _permit: permit, admission: self.clone(), counted }, close))
    }

    fn enter(&self, counted: Counted, principal: Principal) -> ((Counted, u64), Close) {
        let most = match &counted {
            Counted::Accepted(Identity::Admin(_)) => PER_ADMIN,
            Counted::Accepted(_) | Counted::Refused(..) => PER_NODE,
        };
        let (sender, close) = oneshot::channel();
        let mut held = self.held();
        held.taken += 1;
        let number = held.taken;
        let entries = held.by.entry(counted.clone()).or_default();
        if entries.len() >= most {
            entries.remove(0);
        }
        entries.push(Entry { number, principal, struck: false, _close: sender });
        ((counted, number), close)
    }

    /// One round: closes connections of callers that were not accepted at the last one either.
    pub fn inspect(&self, accepts: impl Fn(&Principal) -> bool) {
        self.held().by.retain(|_, entries| {
            entries.retain_mut(|entry| {
                let strikes = if accepts(&entry.principal) { 0 } else { 1 + u8::from(entry.struck) };
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

impl Drop for Admitted {
    fn drop(&mut self) {
        self.admission.0.metrics.connections.dec();
        let Some((counted, number)) = &self.counted else { return };
        let mut held = self.admission.held();
        if let Some(entries) = held.by.get_mut(counted) {
            entries.retain(|entry| entry.number != *number);
            if entries.is_empty() {
                held.by.remove(counted);
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
    use crate::socket::principal::Certificate;
    use policy::NodeId;

    fn node(id: u32, key: u8) -> Principal {
        let identity = Identity::Node(NodeId(id));
        let certificate = Certificate { network: parse("corp"), identity, key: key_hash(key), expires_at: u64::MAX };
        Principal::Certified { address: parse("192.0.2.1:5000"), certificate }
    }

    fn is_closed(close: &mut Option<Close>) -> bool {
        let close = close.as_mut().expect("can be closed");
        close.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn the_newest_connections_of_a_caller_stay() {
        let metrics = Metrics::new();
        let admission = Admission::new(Arc::clone(&metrics));
        let take = |principal: &Principal, accepted| admission.admit(principal, accepted).expect("room");
        let (_other, mut other) = take(&node(2, 2), true);
        let mut own: Vec<_> = (0..PER_NODE).map(|_| take(&node(1, 1), true)).collect();
        // Keys that were replaced take nothing from those that count now.
        let _replaced: Vec<_> = (0..=PER_NODE).map(|_| take(&node(1, 9), false)).collect();
        assert!(own.iter_mut().all(|(_, close)| !is_closed(close)));
        own.push(take(&node(1, 1), true));
        let closed: Vec<_> = own.iter_mut().map(|(_, close)| is_closed(close)).collect();
        assert_eq!(closed, [true, false, false, false, false]);
        // Room that was given up is free again.
        own.pop();
        own.push(take(&node(1, 1), true));
        assert!(!is_closed(&mut own[1].1) && !is_closed(&mut other));
        drop((own, _other, _replaced));
        assert_eq!(metrics.connections.get(), 0);
        assert!(admission.held().by.is_empty());
    }

    #[test]
    fn who_is_not_accepted_for_a_round_is_sent_away() {
        let admission = Admission::new(Metrics::new());
        let (_admitted, mut close) = admission.admit(&node(1, 1), true).expect("room");
        let (_kept, mut kept) = admission.admit(&node(2, 2), true).expect("room");
        let one_refused = |principal: &Principal| *principal != node(1, 1);
        admission.inspect(one_refused);
        admission.inspect(|_| true);
        admission.inspect(one_refused);
        assert!(!is_closed(&mut close), "it was accepted meanwhile");
        admission.inspect(one_refused);
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
