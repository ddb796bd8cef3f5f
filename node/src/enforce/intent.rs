//! What should be in force, and what it asks of the interface.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use policy::{Generation, Peer, PublicKey, Slice};

use super::reconcile::Desired;
use crate::kernel::PeerConfig;
use crate::lower::Tables;

/// What should be in force.
pub struct Intent {
    pub slice: Arc<Slice>,
    pub tables: Tables,
    /// Of the switch that put the tables in force; `None`: not yet.
    pub generation: Option<Generation>,
    /// Whether the last round did all that it had to: what differs later was changed by others.
    pub(super) settled: bool,
    pub(super) fresh_endpoints: BTreeSet<PublicKey>,
    pub(super) changed_holder: Vec<IpNet>,
}

impl std::fmt::Debug for Intent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Intent")
            .field("revision", &self.slice.revision)
            .field("settled", &self.settled)
            .finish_non_exhaustive()
    }
}

/// The interface that a slice asks for; port and MTU are the caller's.
pub fn desired(slice: &Slice, public_key: PublicKey, persistent_keepalive: Option<Duration>) -> Desired {
    let local = &slice.local;
    Desired {
        public_key,
        listen_port: 0,
        mtu: 0,
        addresses: local.addresses.iter().map(IpNet::from).collect(),
        // Whoever the peers are: a packet into the network that the policy denies dies here, counted, and never leaves
        // in clear by another route.
        routes: local.roots.iter().chain(local.external_routes.iter().copied()).collect(),
        peers: peers(slice, persistent_keepalive),
        revision: slice.revision,
        reload: false,
        fresh_endpoints: BTreeSet::new(),
        changed_holder: Vec::new(),
    }
}

/// Every peer of a slice.
pub(super) fn peers(slice: &Slice, persistent_keepalive: Option<Duration>) -> BTreeMap<PublicKey, PeerConfig> {
    slice.peers.values().map(|peer| (peer.public_key, configured(peer, persistent_keepalive))).collect()
}

/// Where a peer is to be found, as far as the controller says.
pub(super) fn endpoint(peer: &Peer) -> Option<SocketAddr> {
    peer.reached_at()
}

/// A peer as it should be.
pub(super) fn configured(peer: &Peer, persistent_keepalive: Option<Duration>) -> PeerConfig {
    PeerConfig {
        public_key: peer.public_key,
        endpoint: endpoint(peer),
        allowed_ips: (*peer.allowed_ips).clone(),
        persistent_keepalive,
    }
}

/// Peers whose endpoint the new slice gives otherwise than the old one. Without an old one nothing is news: what
/// WireGuard has learned while no agent ran is as good as what the agent once heard.
pub(super) fn fresh_endpoints(old: Option<&Slice>, new: &Slice) -> BTreeSet<PublicKey> {
    let Some(old) = old else { return BTreeSet::new() };
    let known: BTreeMap<_, _> = old.peers.values().map(|peer| (peer.public_key, endpoint(peer))).collect();
    new.peers
        .values()
        .filter(|peer| endpoint(peer).is_some() && known.get(&peer.public_key) != Some(&endpoint(peer)))
        .map(|peer| peer.public_key)
        .collect()
}
