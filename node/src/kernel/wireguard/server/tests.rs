use super::*;

fn key(byte: u8) -> PublicKey {
    PublicKey::try_from([byte; 32].as_slice()).unwrap()
}

fn prefixes(list: &[&str]) -> BTreeSet<IpNet> {
    list.iter().map(|prefix| prefix.parse().unwrap()).collect()
}

fn replace(byte: u8, list: &[&str]) -> SetPeer {
    SetPeer { replace_allowed_ips: true, add_allowed_ips: prefixes(list), ..SetPeer::new(key(byte)) }
}

fn set(peers: Vec<SetPeer>) -> Set {
    Set { peers, ..Set::default() }
}

/// Two peers, of which the first holds two prefixes.
fn model() -> Model {
    let mut model = Model::default();
    let edits = model.plan(&set(vec![replace(1, &["10.0.0.1/32", "10.1.0.0/16"]), replace(2, &["fd42::2/128"])]));
    assert!(matches!(edits[..], [Edit::Add { .. }, Edit::Add { .. }]), "{edits:?}");
    model
}

fn keeps_one_owner(model: &Model) {
    let mut seen = BTreeMap::new();
    for (key, known) in &model.peers {
        for prefix in &known.allowed_ips {
            assert_eq!(seen.insert(*prefix, *key), None, "`{prefix}` has two owners");
        }
    }
    assert_eq!(seen, model.owners);
}

#[test]
fn unchanged_peer_is_not_touched() {
    let mut model = model();
    let again = set(vec![replace(1, &["10.1.0.0/16", "10.0.0.1/32"]), replace(2, &["fd42::2/128"])]);
    assert_eq!(model.plan(&again), []);
    let again = Set { replace_peers: true, ..again };
    assert_eq!(model.plan(&again), []);
}

#[test]
fn prefix_that_moves_is_taken_from_its_owner() {
    let mut model = model();
    let edits = model.plan(&set(vec![replace(2, &["10.1.0.0/16", "fd42::2/128"])]));
    let modify = |byte, list: &[&str]| Edit::Modify {
        public_key: key(byte),
        change: Change { allowed_ips: Some(prefixes(list)), ..Change::default() },
    };
    assert_eq!(edits, [modify(1, &["10.0.0.1/32"]), modify(2, &["10.1.0.0/16", "fd42::2/128"])]);
    keeps_one_owner(&model);
    // Also when the one that takes it is new.
    let edits = model.plan(&set(vec![replace(3, &["10.1.0.0/16"])]));
    assert_eq!(edits[0], modify(2, &["fd42::2/128"]));
    assert!(matches!(edits[1..], [Edit::Add { .. }]), "{edits:?}");
    keeps_one_owner(&model);
}

#[test]
fn two_peers_that_exchange_prefixes_end_as_asked() {
    let mut model = model();
    model.plan(&set(vec![replace(1, &["fd42::2/128"]), replace(2, &["10.0.0.1/32", "10.1.0.0/16"])]));
    assert_eq!(model.peers[&key(1)].allowed_ips, prefixes(&["fd42::2/128"]));
    assert_eq!(model.peers[&key(2)].allowed_ips, prefixes(&["10.0.0.1/32", "10.1.0.0/16"]));
    keeps_one_owner(&model);
}

#[test]
fn only_what_differs_is_changed() {
    let mut model = model();
    let change = SetPeer { persistent_keepalive: Some(25), ..replace(1, &["10.0.0.1/32", "10.1.0.0/16"]) };
    let expected = Change { persistent_keepalive: Some(25), ..Change::default() };
    assert_eq!(model.plan(&set(vec![change])), [Edit::Modify { public_key: key(1), change: expected }]);
    let change = SetPeer { remove_allowed_ips: prefixes(&["10.1.0.0/16"]), ..SetPeer::new(key(1)) };
    let expected = Change { allowed_ips: Some(prefixes(&["10.0.0.1/32"])), ..Change::default() };
    assert_eq!(model.plan(&set(vec![change])), [Edit::Modify { public_key: key(1), change: expected }]);
    keeps_one_owner(&model);
}

#[test]
fn peers_leave_by_name_and_by_not_being_named() {
    let mut model = model();
    assert_eq!(model.plan(&set(vec![SetPeer { remove: true, ..SetPeer::new(key(9)) }])), []);
    let edits = model.plan(&set(vec![SetPeer { remove: true, ..SetPeer::new(key(1)) }]));
    assert_eq!(edits, [Edit::Remove(key(1))]);
    keeps_one_owner(&model);
    let edits = model.plan(&Set { replace_peers: true, peers: vec![replace(3, &[])], ..Set::default() });
    assert_eq!(edits[0], Edit::Remove(key(2)));
    assert_eq!(model.peers.keys().copied().collect::<Vec<_>>(), [key(3)]);
    keeps_one_owner(&model);
}

#[test]
fn update_only_adds_nobody() {
    let mut model = model();
    assert_eq!(model.plan(&set(vec![SetPeer { update_only: true, ..replace(3, &["10.9.0.0/16"]) }])), []);
    assert!(!model.peers.contains_key(&key(3)));
}

#[test]
fn handshake_is_steady_and_outlives_its_session() {
    let mut known = BTreeMap::new();
    let first = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    assert_eq!(remember(&mut known, key(1), None), None);
    assert_eq!(remember(&mut known, key(1), Some(first)), Some(first));
    assert_eq!(remember(&mut known, key(1), Some(first + Duration::from_millis(3))), Some(first));
    assert_eq!(remember(&mut known, key(1), None), Some(first));
    let second = first + Duration::from_secs(120);
    assert_eq!(remember(&mut known, key(1), Some(second)), Some(second));
}
