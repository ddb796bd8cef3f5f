use std::net::{IpAddr, Ipv4Addr};

use wireguard_control::{AllowedIp, PeerStats};

use super::*;

fn key(byte: u8) -> PublicKey {
    PublicKey::try_from([byte; 32].as_slice()).unwrap()
}

fn prefixes(range: std::ops::Range<u16>) -> BTreeSet<IpNet> {
    range.map(|number| IpNet::from(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + u32::from(number))))).collect()
}

fn peer(allowed_ips: BTreeSet<IpNet>) -> PeerConfig {
    PeerConfig { public_key: key(1), endpoint: None, allowed_ips, persistent_keepalive: None }
}

/// The end of the updates, by the kernel's rules: a prefix moves to who is given it, "replace" empties first.
fn run(updates: &[DeviceUpdate], mut owners: BTreeMap<IpNet, Key>) -> BTreeMap<IpNet, Key> {
    for update in updates {
        // The builders' fields are private; what they print is not.
        let text = format!("{update:?}");
        assert_eq!(text.matches("PeerConfigBuilder").count(), 1, "one peer a message");
        let field = |name: &str| {
            let (_, rest) = text.split_once(&format!("{name}: ")).unwrap_or_else(|| panic!("no `{name}` in `{text}`"));
            rest.split([',', ' ']).next().unwrap().to_owned()
        };
        let (_, list) = text.split_once("allowed_ips: [").unwrap();
        let (list, _) = list.split_once(']').unwrap();
        let given: Vec<IpNet> =
            list.split(", ").filter(|text| !text.is_empty()).map(|text| text.parse().unwrap()).collect();
        assert!(given.len() <= PREFIXES_PER_MESSAGE, "{} prefixes in one message", given.len());
        let (_, public) = text.split_once("public_key: Key(\"").unwrap();
        let public = Key::from_base64(public.split('"').next().unwrap()).unwrap();
        if field("remove_me").starts_with("true") || field("replace_allowed_ips").starts_with("true") {
            owners.retain(|_, owner| *owner != public);
        }
        owners.extend(given.into_iter().map(|prefix| (prefix, public.clone())));
    }
    owners
}

fn check(before: std::ops::Range<u16>, after: std::ops::Range<u16>, known: bool) {
    let (before, after) = (prefixes(before), prefixes(after));
    let owners = before.iter().map(|prefix| (*prefix, to_key(&key(1)))).collect();
    let updates = updates_of(&peer(after.clone()), known.then_some(&before)).unwrap();
    let owners = run(&updates, owners);
    assert_eq!(owners.keys().copied().collect::<BTreeSet<_>>(), after);
    assert!(owners.values().all(|owner| *owner == to_key(&key(1))), "{owners:?}");
}

#[test]
fn updates_end_with_exactly_the_prefixes_asked_for() {
    for known in [false, true] {
        check(0..0, 0..3, known);
        check(0..3, 0..3, known);
        check(0..3, 1..5, known);
        check(0..3, 0..0, known);
        check(0..1000, 500..1700, known);
    }
}

#[test]
fn known_peer_is_changed_without_emptying_it() {
    let updates = updates_of(&peer(prefixes(1..4)), Some(&prefixes(0..3))).unwrap();
    assert!(updates.iter().all(|update| format!("{update:?}").contains("replace_allowed_ips: false")));
    // One to add, one to move away, one to remove what took it.
    assert_eq!(updates.len(), 3);
}

#[test]
fn pieces_of_a_dump_become_one_peer() {
    let piece = |first: bool, address: [u8; 4]| {
        let mut info = PeerInfo::from_public_key(to_key(&key(1)));
        let allowed = AllowedIp { address: address.into(), cidr: 32 };
        info.config.allowed_ips = vec![allowed];
        if first {
            info.config.endpoint = Some("192.0.2.1:51820".parse().unwrap());
            info.config.persistent_keepalive_interval = Some(25);
            info.stats = PeerStats { last_handshake_time: None, rx_bytes: 7, tx_bytes: 9 };
        }
        info
    };
    let peers = merge(&[piece(true, [10, 0, 0, 1]), piece(false, [10, 0, 0, 2])]);
    let expected = DevicePeer {
        endpoint: Some("192.0.2.1:51820".parse().unwrap()),
        allowed_ips: BTreeSet::from(["10.0.0.1/32".parse().unwrap(), "10.0.0.2/32".parse().unwrap()]),
        persistent_keepalive: Some(Duration::from_secs(25)),
        last_handshake: None,
        received_bytes: 7,
        sent_bytes: 9,
    };
    assert_eq!(peers, BTreeMap::from([(key(1), expected)]));
}
