//! Where nodes were seen: in memory, made anew from what they say when they connect. No revision, and no disk.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use policy::{Network, NodeId};

/// For one writer and many readers.
#[derive(Clone, Debug, Default)]
pub struct Directory(Arc<Mutex<BTreeMap<NodeId, SocketAddr>>>);

impl Directory {
    fn inner(&self) -> MutexGuard<'_, BTreeMap<NodeId, SocketAddr>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, node: NodeId) -> Option<SocketAddr> {
        self.inner().get(&node).copied()
    }

    /// Of those of these nodes that were seen.
    pub fn of(&self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<(NodeId, SocketAddr)> {
        let inner = self.inner();
        nodes.into_iter().filter_map(|node| Some((node, *inner.get(&node)?))).collect()
    }

    /// Whether the node was not seen there before. What no peer could use is left out.
    pub fn observe(&self, network: &Network, node: NodeId, address: SocketAddr) -> bool {
        is_useful(network, address) && self.inner().insert(node, address) != Some(address)
    }

    /// Forgets nodes that are gone.
    pub fn retain(&self, network: &Network) {
        self.inner().retain(|node, _| network.nodes().contains_key(node));
    }
}

/// Whether others can reach a node there: not this machine's own loopback, and not through the mesh itself.
fn is_useful(network: &Network, address: SocketAddr) -> bool {
    let ip = address.ip();
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    address.port() != 0
        && !ip.is_loopback()
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !link_local
        && !network.roots().contains(ip)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{id, network, parse};

    #[test]
    fn what_no_peer_can_use_is_not_kept() {
        let (network, directory) = (network(), Directory::default());
        let web = id(&network, "web1");
        for address in
            ["127.0.0.1:1", "0.0.0.0:1", "10.42.7.1:1", "192.0.2.1:0", "169.254.0.1:1", "[fe80::1]:1", "[::1]:1"]
        {
            assert!(!directory.observe(&network, web, parse(address)), "{address}");
        }
        assert_eq!(directory.get(web), None);
        for (address, is_news) in [("192.0.2.1:1", true), ("192.0.2.1:1", false), ("[2001:db8::1]:1", true)] {
            assert_eq!(directory.observe(&network, web, parse(address)), is_news, "{address}");
        }
        assert_eq!(directory.of([web, NodeId(9_999)]), [(web, parse("[2001:db8::1]:1"))]);
        directory.retain(&network);
        assert!(directory.get(web).is_some());
        directory.retain(&crate::fixture::empty());
        assert_eq!(directory.get(web), None);
    }
}
