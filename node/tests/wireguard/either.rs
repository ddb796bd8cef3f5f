//! What holds whichever WireGuard carries the packets.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use node::kernel::PeerConfig;
use node::kernel::wireguard::Preference;
use node::key::PrivateKey;

use crate::end::{Echo, End};

/// A peer that exists nowhere, with prefixes in nobody's way.
pub(crate) fn stranger(number: u16) -> PeerConfig {
    let prefixes = [format!("10.42.{}.{}/32", 1 + number / 256, number % 256), format!("fd42:0:0:1::{number:x}/128")];
    PeerConfig {
        public_key: PrivateKey::generate().unwrap().public(),
        endpoint: None,
        allowed_ips: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(),
        persistent_keepalive: None,
    }
}

pub(crate) fn traffic_passes_and_is_counted(preference: Preference) {
    let (first, second) = End::pair_with(preference);
    let peers = |end: &End| end.observe().unwrap().unwrap().peers;
    let before = peers(&first)[&second.key.public()].clone();
    assert_eq!((before.last_handshake, before.received_bytes), (None, 0));
    for (from, to) in [("10.42.0.1", "10.42.0.2"), ("fd42::1", "fd42::2")] {
        let mut echo = Echo::new(&first, from, &second, to);
        echo.until_through();
        (0..100).for_each(|_| echo.once());
    }
    for (end, other) in [(&first, &second), (&second, &first)] {
        let device = end.observe().unwrap().unwrap();
        assert_eq!((device.public_key, device.listen_port), (Some(end.key.public()), 51820));
        assert_eq!(device.peers.len(), 1);
        let peer = &device.peers[&other.key.public()];
        assert_eq!(peer.endpoint, other.as_peer().endpoint);
        assert_eq!(peer.allowed_ips, BTreeSet::from(other.prefixes()));
        // 200 packets of 8 bytes under headers, and the handshake.
        assert!(peer.received_bytes > 200 * 36 && peer.sent_bytes > 200 * 36, "{peer:?}");
        let age = SystemTime::now().duration_since(peer.last_handshake.unwrap()).unwrap();
        assert!(age < Duration::from_secs(120), "{age:?}");
    }
    let reading = || peers(&first)[&second.key.public()].last_handshake;
    assert_eq!(reading(), reading());
}

pub(crate) fn edits_lose_no_packet(preference: Preference) {
    let (first, second) = End::pair_with(preference);
    let mut echoes =
        [("10.42.0.1", "10.42.0.2"), ("fd42::1", "fd42::2")].map(|(from, to)| Echo::new(&first, from, &second, to));
    echoes.iter_mut().for_each(Echo::until_through);
    let done = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let streams = echoes.each_mut().map(|echo| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    echo.once();
                }
                echo.sent()
            })
        });
        for round in 0..40 {
            for (end, other) in [(&first, &second), (&second, &first)] {
                edit(end, other, round);
            }
        }
        done.store(true, Ordering::Relaxed);
        streams.map(|stream| stream.join().unwrap())
    });
    assert!(sent.iter().all(|sent| *sent > 100), "the streams ran beside the edits: {sent:?}");
}

/// Every kind of edit that leaves the other end its addresses.
fn edit(end: &End, other: &End, round: u16) {
    let key = end.key.clone();
    let mut peer = other.as_peer();
    end.wireguard(move |wireguard| {
        let (one, two) = (stranger(round), stranger(round));
        wireguard.set_device(&key, 51820).unwrap();
        wireguard.set_peer(&one).unwrap();
        // The second takes the first one's prefixes.
        wireguard.set_peer(&two).unwrap();
        // Unchanged, with more prefixes, with another keepalive, and as it was.
        wireguard.set_peer(&peer).unwrap();
        peer.allowed_ips.extend(&one.allowed_ips);
        wireguard.set_peer(&peer).unwrap();
        peer.persistent_keepalive = Some(Duration::from_secs(25));
        wireguard.set_peer(&peer).unwrap();
        let device = wireguard.observe().unwrap().unwrap();
        assert_eq!(device.peers[&peer.public_key].allowed_ips, peer.allowed_ips);
        assert_eq!(device.peers[&peer.public_key].persistent_keepalive, peer.persistent_keepalive);
        assert!(device.peers[&one.public_key].allowed_ips.is_empty());
        assert!(device.peers[&two.public_key].allowed_ips.is_empty());
        peer.allowed_ips = peer.allowed_ips.difference(&one.allowed_ips).copied().collect();
        peer.persistent_keepalive = None;
        wireguard.set_peer(&peer).unwrap();
        wireguard.remove_peer(&one.public_key).unwrap();
        wireguard.remove_peer(&two.public_key).unwrap();
        let device = wireguard.observe().unwrap().unwrap();
        assert_eq!(device.peers.keys().collect::<Vec<_>>(), [&peer.public_key]);
    });
}

pub(crate) fn peer_that_lost_its_prefixes_or_itself_is_cut_off(preference: Preference) {
    let (first, second) = End::pair_with(preference);
    let mut echo = Echo::new(&first, "10.42.0.1", &second, "10.42.0.2");
    echo.until_through();
    let key = second.key.public();
    let cut = Duration::from_millis(300);
    let nothing = PeerConfig { allowed_ips: BTreeSet::new(), ..second.as_peer() };
    first.wireguard(move |wireguard| wireguard.set_peer(&nothing)).unwrap();
    assert!(!echo.try_once(cut));
    let back = second.as_peer();
    first.wireguard(move |wireguard| wireguard.set_peer(&back)).unwrap();
    echo.once();
    first.wireguard(move |wireguard| wireguard.remove_peer(&key)).unwrap();
    assert!(!echo.try_once(cut));
    let back = second.as_peer();
    first.wireguard(move |wireguard| wireguard.set_peer(&back)).unwrap();
    echo.until_through();
}

pub(crate) fn port_that_is_taken_is_said_and_the_old_one_stays(preference: Preference) {
    let (first, second) = End::pair_with(preference);
    let mut echo = Echo::new(&first, "10.42.0.1", &second, "10.42.0.2");
    echo.until_through();
    let taken = first.namespace.run(|| std::net::UdpSocket::bind("0.0.0.0:51821")).unwrap();
    let key = first.key.clone();
    let error = first.wireguard(move |wireguard| wireguard.set_device(&key, 51821)).unwrap_err().to_string();
    assert!(error.contains("port `51821`") && error.contains("choose another `listen-port`"), "{error}");
    let before = first.observe().unwrap().unwrap();
    assert_eq!(before.listen_port, 51820);
    echo.once();
    drop(taken);
    let key = first.key.clone();
    first.wireguard(move |wireguard| wireguard.set_device(&key, 51821)).unwrap();
    let after = first.observe().unwrap().unwrap();
    assert_eq!(after.listen_port, 51821);
    echo.until_through();
    // The peer is the same to who counts its bytes.
    let (before, after) = (&before.peers[&second.key.public()], &after.peers[&second.key.public()]);
    assert!(after.received_bytes >= before.received_bytes && after.last_handshake >= before.last_handshake);
    assert_eq!((&after.allowed_ips, after.endpoint), (&before.allowed_ips, before.endpoint));
}

pub(crate) fn foreign_link_is_refused_and_left(preference: Preference) {
    for (create, kind) in [("tuntap add rampart0 mode tun", "tun"), ("link add rampart0 type veth peer name x", "veth")]
    {
        let end = End::with(1, preference);
        end.namespace.ip(create);
        let before = end.namespace.ip("link show");
        for refused in [
            end.wireguard(|wireguard| wireguard.create()),
            end.wireguard(|wireguard| wireguard.serve()),
            end.wireguard(|wireguard| wireguard.destroy()),
            end.wireguard(|wireguard| wireguard.set_peer(&stranger(1))),
        ] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(&format!("of kind `{kind}`")) && error.contains("noded run --interface"), "{error}");
        }
        assert_eq!(end.observe().unwrap(), None);
        assert_eq!(end.namespace.ip("link show"), before);
    }
}

/// More than one netlink message holds, in either direction.
pub(crate) fn many_prefixes_are_set_and_read_back(preference: Preference) {
    let end = End::with(1, preference);
    end.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
    end.configure();
    let prefixes = |range: std::ops::Range<u32>| -> BTreeSet<IpNet> {
        let v4 = range.clone().map(|number| IpNet::from(IpAddr::V4(Ipv4Addr::from(0x0a2b_0000 + number))));
        let v6 = range.map(|number| IpNet::from(IpAddr::V6(Ipv6Addr::from((0xfd43_u128 << 112) + u128::from(number)))));
        v4.chain(v6).collect()
    };
    let public_key = PrivateKey::generate().unwrap().public();
    end.wireguard(move |wireguard| {
        wireguard.observe().unwrap();
        for range in [0..1000, 500..1500, 1400..1500, 0..0, 0..700] {
            let allowed_ips = prefixes(range);
            let peer = PeerConfig { public_key, endpoint: None, allowed_ips, persistent_keepalive: None };
            wireguard.set_peer(&peer).unwrap();
            let device = wireguard.observe().unwrap().unwrap();
            assert_eq!(device.peers.keys().collect::<Vec<_>>(), [&public_key]);
            assert_eq!(device.peers[&public_key].allowed_ips, peer.allowed_ips);
        }
    });
}
