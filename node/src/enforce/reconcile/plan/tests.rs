//! Plans as tables: what is there, what should be, and the steps in between.

use std::net::SocketAddr;
use std::time::Duration;

use policy::Generation;

use super::*;
use crate::kernel::{AttachMethod, EarlyDrop};

fn key(byte: u8) -> PublicKey {
    PublicKey::try_from([byte; 32].as_slice()).unwrap()
}

fn nets(text: &str) -> BTreeSet<IpNet> {
    text.split_whitespace().map(|net| net.parse().unwrap()).collect()
}

fn endpoint(text: &str) -> Option<SocketAddr> {
    Some(text.parse().unwrap())
}

fn wanted(byte: u8, allowed_ips: &str) -> PeerConfig {
    PeerConfig {
        public_key: key(byte),
        endpoint: endpoint("192.0.2.1:51820"),
        allowed_ips: nets(allowed_ips),
        persistent_keepalive: None,
    }
}

fn seen(byte: u8, allowed_ips: &str) -> (PublicKey, DevicePeer) {
    let peer = DevicePeer {
        endpoint: endpoint("192.0.2.1:51820"),
        allowed_ips: nets(allowed_ips),
        persistent_keepalive: None,
        last_handshake: None,
        received_bytes: 0,
        sent_bytes: 0,
    };
    (key(byte), peer)
}

fn desired(peers: &[PeerConfig]) -> Desired {
    Desired {
        public_key: key(100),
        listen_port: 51_820,
        mtu: 1_420,
        addresses: nets("10.42.1.2/32 fd42::2/128"),
        routes: nets("10.42.0.0/16 fd42::/48"),
        peers: peers.iter().map(|peer| (peer.public_key, peer.clone())).collect(),
        revision: Revision(7),
        reload: false,
        fresh_endpoints: BTreeSet::new(),
        changed_holder: Vec::new(),
    }
}

/// Everything as `desired` wants it, with these peers.
fn settled(peers: &[(PublicKey, DevicePeer)]) -> Observed {
    Observed {
        link: Some(LinkState {
            index: 7,
            kind: LinkKind::WireGuard,
            up: true,
            mtu: 1_420,
            addresses: nets("10.42.1.2/32 fd42::2/128"),
            routes: nets("10.42.0.0/16 fd42::/48"),
        }),
        device: Some(Device {
            public_key: Some(key(100)),
            listen_port: 51_820,
            peers: peers.iter().cloned().collect(),
        }),
        unseen: None,
        barriers: nets("10.42.0.0/16 fd42::/48"),
        datapath: Some(DatapathState {
            attachment: AttachMethod::Tcx,
            egress: true,
            ingress: true,
            ahead: Vec::new(),
            generation: Generation(3),
            revision: Revision(7),
            early_drop: EarlyDrop::Off,
        }),
    }
}

fn check(desired: &Desired, observed: &Observed, steps: &[&str]) {
    let planned: Vec<_> = plan(Some(desired), observed).iter().map(Step::to_string).collect();
    let a = key(1).to_string();
    let b = key(2).to_string();
    let steps: Vec<_> = steps.iter().map(|step| step.replace("{a}", &a).replace("{b}", &b)).collect();
    assert_eq!(planned, steps);
}

#[test]
fn nothing_is_done_where_all_is_right() {
    check(&desired(&[wanted(1, "10.42.2.2/32")]), &settled(&[seen(1, "10.42.2.2/32")]), &[]);
}

#[test]
fn a_new_interface_denies_before_it_is_up_and_has_its_policy_before_its_peers() {
    check(
        &desired(&[wanted(1, "10.42.2.2/32")]),
        &Observed::default(),
        &[
            "add unreachable route 10.42.0.0/16",
            "add unreachable route fd42::/48",
            "create the link",
            "attach the datapath",
            "switch the tables to revision 7",
            "serve the device",
            "set the key and listen on port 51820",
            "set the mtu to 1420",
            "add address 10.42.1.2/32",
            "add address fd42::2/128",
            "set the link up",
            "set peer {a} with 10.42.2.2/32",
            "add route 10.42.0.0/16",
            "add route fd42::/48",
        ],
    );
}

#[test]
fn without_a_policy_only_the_datapath_is_asked_for() {
    let steps = |observed: &Observed| plan(None, observed);
    assert_eq!(steps(&Observed::default()), [Step::CreateLink, Step::AttachDatapath, Step::ServeWireGuard]);
    assert_eq!(steps(&settled(&[seen(1, "10.42.2.2/32")])), []);
}

#[test]
fn the_withdrawn_goes_before_the_switch_and_the_new_comes_after() {
    let mut observed = settled(&[seen(1, "10.42.2.2/32")]);
    observed.datapath.as_mut().unwrap().revision = Revision(6);
    check(
        &desired(&[wanted(2, "10.42.3.2/32")]),
        &observed,
        &["remove peer {a}", "switch the tables to revision 7", "set peer {b} with 10.42.3.2/32"],
    );
}

#[test]
fn an_address_that_moves_has_no_holder_in_between_and_takes_no_flows_along() {
    let mut desired = desired(&[wanted(1, "10.42.2.2/32"), wanted(2, "10.42.2.3/32 10.42.3.2/32")]);
    desired.changed_holder = vec!["10.42.2.3/32".parse().unwrap()];
    let mut observed = settled(&[seen(1, "10.42.2.2/32 10.42.2.3/32"), seen(2, "10.42.3.2/32")]);
    observed.datapath.as_mut().unwrap().revision = Revision(6);
    check(
        &desired,
        &observed,
        &[
            "narrow peer {a} to 10.42.2.2/32",
            "switch the tables to revision 7",
            "forget flows of 10.42.2.3/32",
            "set peer {b} with 10.42.2.3/32 10.42.3.2/32",
        ],
    );
}

#[test]
fn a_peer_that_loses_some_and_gains_some_is_narrowed_first() {
    let mut observed = settled(&[seen(1, "10.42.2.2/32 10.42.2.3/32")]);
    observed.datapath.as_mut().unwrap().revision = Revision(6);
    check(
        &desired(&[wanted(1, "10.42.2.3/32 10.42.2.4/32")]),
        &observed,
        &[
            "narrow peer {a} to 10.42.2.3/32",
            "switch the tables to revision 7",
            "set peer {a} with 10.42.2.3/32 10.42.2.4/32",
        ],
    );
}

#[test]
fn what_others_changed_is_put_right() {
    let desired = desired(&[wanted(1, "10.42.2.2/32"), wanted(2, "10.42.3.2/32")]);
    let fine = || settled(&[seen(1, "10.42.2.2/32"), seen(2, "10.42.3.2/32")]);
    let changed = |change: &dyn Fn(&mut Observed)| {
        let mut observed = fine();
        change(&mut observed);
        observed
    };
    let link = |change: &'static dyn Fn(&mut LinkState)| changed(&move |o| change(o.link.as_mut().unwrap()));
    // A peer took another's address by hand.
    let stolen = settled(&[seen(1, ""), seen(2, "10.42.2.2/32 10.42.3.2/32")]);
    check(&desired, &stolen, &["narrow peer {b} to 10.42.3.2/32", "set peer {a} with 10.42.2.2/32"]);
    check(&desired, &settled(&[seen(1, "10.42.2.2/32")]), &["set peer {b} with 10.42.3.2/32"]);
    let extra = settled(&[seen(1, "10.42.2.2/32"), seen(2, "10.42.3.2/32"), seen(3, "0.0.0.0/0")]);
    check(&desired, &extra, &[&format!("remove peer {}", key(3))]);
    check(&desired, &changed(&|o| o.datapath.as_mut().unwrap().ingress = false), &["attach the datapath"]);
    check(
        &desired,
        &changed(&|o| o.datapath.as_mut().unwrap().revision = Revision(9)),
        &["switch the tables to revision 7"],
    );
    check(
        &desired,
        &changed(&|o| o.device.as_mut().unwrap().listen_port = 1),
        &["set the key and listen on port 51820"],
    );
    check(&desired, &link(&|link| link.mtu = 9_000), &["set the mtu to 1420"]);
    check(
        &desired,
        &link(&|link| link.routes = nets("10.42.0.0/16 0.0.0.0/0")),
        &["remove route 0.0.0.0/0", "add route fd42::/48"],
    );
    check(
        &desired,
        &link(&|link| link.addresses = nets("10.42.1.2/32 fd42::2/128 10.9.9.9/32")),
        &["remove address 10.9.9.9/32"],
    );
    check(
        &desired,
        &changed(&|o| o.barriers = nets("10.42.0.0/16 10.43.0.0/16")),
        &["add unreachable route fd42::/48", "remove unreachable route 10.43.0.0/16"],
    );
    check(
        &desired,
        &link(&|link| {
            link.up = false;
            link.routes.clear()
        }),
        &["set the link up", "add route 10.42.0.0/16", "add route fd42::/48"],
    );
}

#[test]
fn a_process_that_died_is_started_and_configured() {
    let observed = Observed { device: None, ..settled(&[]) };
    check(
        &desired(&[wanted(1, "10.42.2.2/32")]),
        &observed,
        &["serve the device", "set the key and listen on port 51820", "set peer {a} with 10.42.2.2/32"],
    );
}

#[test]
fn a_foreign_link_is_left_to_be_refused() {
    let mut link = settled(&[]).link.unwrap();
    link.kind = LinkKind::Foreign;
    let observed = Observed { link: Some(link), barriers: settled(&[]).barriers, ..Observed::default() };
    assert_eq!(plan(Some(&desired(&[])), &observed).first(), Some(&Step::CreateLink));
}

#[test]
fn a_learned_endpoint_stays_until_there_is_news() {
    let mut desired = desired(&[wanted(1, "10.42.2.2/32")]);
    let mut roamed = seen(1, "10.42.2.2/32");
    roamed.1.endpoint = endpoint("198.51.100.9:1");
    check(&desired, &settled(&[roamed.clone()]), &[]);
    desired.fresh_endpoints.insert(key(1));
    check(&desired, &settled(&[roamed.clone()]), &["set peer {a} with 10.42.2.2/32"]);
    desired.fresh_endpoints.clear();
    // Another reason to touch the peer does not bring the old endpoint back.
    desired.peers.get_mut(&key(1)).unwrap().persistent_keepalive = Some(Duration::from_secs(25));
    let Some(Step::SetPeer(peer)) = plan(Some(&desired), &settled(&[roamed.clone()])).pop() else { panic!("no step") };
    assert_eq!(peer.endpoint, None);
    roamed.1.endpoint = None;
    let Some(Step::SetPeer(peer)) = plan(Some(&desired), &settled(&[roamed])).pop() else { panic!("no step") };
    assert_eq!(peer.endpoint, endpoint("192.0.2.1:51820"));
}

#[test]
fn nothing_is_planned_about_what_was_not_seen() {
    let desired = Desired { revision: Revision(8), ..desired(&[wanted(1, "10.42.2.2/32")]) };
    let unseen = Some("no answer".to_owned());
    let observed = Observed { device: None, unseen: unseen.clone(), ..settled(&[]) };
    check(&desired, &observed, &["switch the tables to revision 8"]);
    let mut down = observed.clone();
    down.link.as_mut().unwrap().mtu = 9_000;
    check(&desired, &down, &["switch the tables to revision 8", "set the mtu to 1420"]);
    let observed = Observed { datapath: observed.datapath, unseen, ..Observed::default() };
    check(&desired, &observed, &["switch the tables to revision 8"]);
}

#[test]
fn a_part_of_anothers_network_moves_without_the_other_holding_it_in_between() {
    let outer = || wanted(1, "10.50.0.0/16");
    let both = || [outer(), wanted(2, "10.50.1.0/24")];
    check(
        &desired(&both()),
        &settled(&[]),
        &["set peer {a} with nothing", "set peer {b} with 10.50.1.0/24", "set peer {a} with 10.50.0.0/16"],
    );
    check(
        &desired(&both()),
        &settled(&[seen(1, "10.50.0.0/16")]),
        &["narrow peer {a} to nothing", "set peer {b} with 10.50.1.0/24", "set peer {a} with 10.50.0.0/16"],
    );
    check(
        &desired(&[outer()]),
        &settled(&[seen(1, "10.50.0.0/16"), seen(2, "10.50.1.0/24")]),
        &["narrow peer {a} to nothing", "remove peer {b}", "set peer {a} with 10.50.0.0/16"],
    );
    // Each has a part of the other's.
    let crossed = [wanted(1, "10.50.0.0/16 10.60.1.0/24"), wanted(2, "10.50.1.0/24 10.60.0.0/15")];
    check(
        &desired(&crossed),
        &settled(&[]),
        &[
            "set peer {a} with 10.60.1.0/24",
            "set peer {b} with 10.50.1.0/24",
            "set peer {a} with 10.50.0.0/16 10.60.1.0/24",
            "set peer {b} with 10.50.1.0/24 10.60.0.0/15",
        ],
    );
    check(
        &desired(&crossed),
        &settled(&[seen(1, "10.50.0.0/16 10.60.1.0/24"), seen(2, "10.50.1.0/24 10.60.0.0/15")]),
        &[],
    );
    // A change elsewhere touches nothing of it.
    check(
        &desired(&[outer(), wanted(2, "10.50.1.0/24 10.42.2.2/32")]),
        &settled(&[seen(1, "10.50.0.0/16"), seen(2, "10.50.1.0/24")]),
        &["set peer {b} with 10.42.2.2/32 10.50.1.0/24"],
    );
}

#[test]
fn a_peer_around_one_that_could_not_be_set_waits_for_it() {
    let set = |byte, allowed_ips| Step::SetPeer(wanted(byte, allowed_ips));
    let inner = set(2, "10.42.2.2/32 10.50.1.0/24");
    for (step, waits) in [
        (set(1, "10.50.0.0/16"), true),
        (set(1, "10.42.2.3/32"), false),
        (set(1, "10.50.1.0/24"), false),
        (Step::AddRoute("10.50.0.0/16".parse().unwrap()), false),
    ] {
        assert_eq!(step.waits_for(&inner), waits, "{step}");
    }
}

#[test]
fn who_got_ahead_is_named_and_what_is_missing_is_attached() {
    let other =
        |attachment| Program { attachment, position: 1, id: Some(7), name: Some("tap".to_owned()), ours: false };
    for (egress, ingress, ahead, expected) in [
        (true, true, vec![], vec![]),
        (false, true, vec![], vec!["attach the datapath"]),
        (false, true, vec![Attachment::Egress], vec!["put the datapath ahead of `tap` (id 7) at tc egress, number 1"]),
        (
            false,
            false,
            vec![Attachment::Ingress],
            vec!["attach the datapath", "put the datapath ahead of `tap` (id 7) at tc ingress, number 1"],
        ),
    ] {
        let mut observed = settled(&[]);
        let datapath = observed.datapath.as_mut().unwrap();
        (datapath.egress, datapath.ingress) = (egress, ingress);
        datapath.ahead = ahead.into_iter().map(other).collect();
        let steps: Vec<_> = plan(None, &observed).iter().map(Step::to_string).collect();
        assert_eq!(steps, expected);
    }
}
