//! A change in force at the cost of what it touches: steps from what the slice before asked for, without a look at the
//! kernel. The whole look follows on its interval.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use policy::{Peer, PublicKey, Slice, Touched};

use super::intent::{configured, endpoint};
use super::reconcile::{Holders, PeerChange};
use crate::kernel::DevicePeer;

/// What a change asks for, and who holds what once it is made.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) peers: PeerChange,
    pub(super) holders: Holders,
}

impl Change {
    /// What differs between two slices. `None`: the interface is another, or a prefix that changes hands lies around or
    /// inside one of another holder, so that the whole must be looked at.
    pub(super) fn between(old: &Slice, new: &Slice, memory: &Holders, keepalive: Option<Duration>) -> Option<Self> {
        if !Arc::ptr_eq(&old.local, &new.local) && old.local != new.local {
            return None;
        }
        let touched = Touched::between(old, new);
        let is_switched = old.revision != new.revision
            || touched.addresses()
            || !(touched.rules.is_empty() && touched.cells.is_empty() && touched.cidrs.is_empty());
        let mut change = PeerChange { switch: is_switched.then_some(new.revision), ..PeerChange::default() };
        let (mut left, mut taken): (Vec<Holding>, Vec<Holding>) = Default::default();
        for id in &touched.peers {
            let (before, after) = (old.peers.get(id), new.peers.get(id));
            if let Some(peer) = before {
                change.present.insert(peer.public_key, present(peer, keepalive));
            }
            if let Some(peer) = after {
                change.wanted.insert(peer.public_key, configured(peer, keepalive));
                if endpoint(peer).is_some() && before.is_none_or(|before| !is_alike(before, peer)) {
                    change.fresh_endpoints.insert(peer.public_key);
                }
            }
            left.extend(before.into_iter().flat_map(|peer| holdings_beyond(peer, after)));
            taken.extend(after.into_iter().flat_map(|peer| holdings_beyond(peer, before)));
        }
        let mut holders = memory.clone();
        for (prefix, key) in &taken {
            let last = holders.insert(*prefix, *key);
            if last.is_some_and(|last| last != *key) {
                change.changed_holder.push(*prefix);
            }
        }
        if left.iter().chain(&taken).any(|(prefix, _)| overlaps(&holders, *prefix)) {
            return None;
        }
        change.changed_holder.sort_unstable();
        Some(Self { peers: change, holders })
    }
}

/// Who holds what.
type Holding = (IpNet, PublicKey);

/// What a peer holds and, as another slice has it, did not or will not.
fn holdings_beyond(peer: &Peer, other: Option<&Peer>) -> Vec<Holding> {
    let other = other.filter(|other| other.public_key == peer.public_key).map(|other| &other.allowed_ips);
    let is_beyond = |prefix: &&IpNet| other.is_none_or(|other| !other.contains(*prefix));
    peer.allowed_ips.iter().filter(is_beyond).map(|prefix| (*prefix, peer.public_key)).collect()
}

/// Whether WireGuard was told the same of where a peer is.
fn is_alike(before: &Peer, after: &Peer) -> bool {
    before.public_key == after.public_key && endpoint(before) == endpoint(after)
}

/// A peer as the slice before made it. What WireGuard has learned of its endpoint since stays where no news of it came.
fn present(peer: &Peer, persistent_keepalive: Option<Duration>) -> DevicePeer {
    DevicePeer {
        endpoint: endpoint(peer),
        allowed_ips: (*peer.allowed_ips).clone(),
        persistent_keepalive,
        last_handshake: None,
        received_bytes: 0,
        sent_bytes: 0,
    }
}

/// Whether a longer or a shorter prefix is held that shares addresses with this one.
fn overlaps(holders: &Holders, prefix: IpNet) -> bool {
    // In their order a prefix comes right before all that lies in it.
    let inside = holders.range(prefix..).find(|(other, _)| **other != prefix);
    if inside.is_some_and(|(other, _)| prefix.contains(other)) {
        return true;
    }
    let around = std::iter::successors(prefix.supernet(), IpNet::supernet);
    around.into_iter().any(|around| holders.contains_key(&around))
}

#[cfg(test)]
mod tests;
