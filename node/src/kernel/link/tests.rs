use std::process::Command;

use super::*;

/// Runs the test in a thread with a network namespace of its own, which goes with the thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .expect("this test makes a network namespace: run it as root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// The `ip` of iproute2, which judges from outside what netlink did.
fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split_whitespace()).output().expect("`ip` of iproute2 is installed");
    assert!(output.status.success(), "`ip {words}`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A TUN device that is marked as ours.
fn our_link(name: &str) -> NetlinkLink {
    ip(&format!("tuntap add {name} mode tun"));
    let link = NetlinkLink::new(name).unwrap();
    link.netlink.adopt_link(name).unwrap();
    link
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

#[test]
fn link_is_observed_as_it_was_set() {
    in_namespace(|| {
        let mut link = our_link("rampart0");
        let state = link.observe().unwrap().unwrap();
        assert_eq!((state.kind, state.up, state.mtu), (LinkKind::Tun, false, 1500));
        link.set_mtu(1420).unwrap();
        link.set_up(true).unwrap();
        let addresses = BTreeSet::from([net("10.42.1.2/32"), net("10.42.1.3/24"), net("fd42:0:0:1::2/128")]);
        let routes = BTreeSet::from([net("10.42.0.0/16"), net("0.0.0.0/0"), net("fd42::/48"), net("::/0")]);
        for _ in 0..2 {
            // Twice: what is there already is no error.
            addresses.iter().for_each(|address| link.add_address(*address).unwrap());
            routes.iter().for_each(|route| link.add_route(*route).unwrap());
        }
        let state = link.observe().unwrap().unwrap();
        assert_eq!((state.up, state.mtu), (true, 1420));
        assert_eq!(state.addresses, addresses);
        assert_eq!(state.routes, routes);
        assert!(ip("link show rampart0").starts_with(&format!("{}: ", state.index)));
        for _ in 0..2 {
            link.remove_route(net("10.42.0.0/16")).unwrap();
            link.remove_address(net("fd42:0:0:1::2/128")).unwrap();
        }
        let state = link.observe().unwrap().unwrap();
        assert!(!state.routes.contains(&net("10.42.0.0/16")) && !state.addresses.contains(&net("fd42:0:0:1::2/128")));
        link.set_up(false).unwrap();
        assert!(!link.observe().unwrap().unwrap().up);
    });
}

#[test]
fn kernel_adds_nothing_of_its_own() {
    in_namespace(|| {
        let mut link = our_link("rampart0");
        link.set_up(true).unwrap();
        link.add_address(net("10.42.1.3/24")).unwrap();
        link.add_address(net("fd42:0:0:1::2/64")).unwrap();
        link.add_route(net("10.42.0.0/16")).unwrap();
        link.add_route(net("fd42::/48")).unwrap();
        // No prefix route for an address, no link-local address, and our number on what is ours.
        assert_eq!(
            ip("-4 route show table main").split_whitespace().collect::<Vec<_>>().join(" "),
            "10.42.0.0/16 dev rampart0 proto 117 scope link linkdown"
        );
        let v6 = ip("-6 addr show dev rampart0");
        assert!(!v6.contains("fe80") && v6.contains("nodad") && v6.contains("noprefixroute"), "{v6}");
        assert!(!v6.contains("tentative"), "{v6}");
        let routes = ip("-6 route show table main proto 117");
        assert!(routes.starts_with("fd42::/48 dev rampart0") && routes.lines().count() == 1, "{routes}");
        assert!(ip("link show rampart0").contains(OWNER));
    });
}

#[test]
fn routes_of_others_are_neither_seen_nor_taken() {
    in_namespace(|| {
        let mut link = our_link("rampart0");
        link.set_up(true).unwrap();
        let _other = our_link("other0");
        ip("link set other0 up");
        ip("route add 10.43.0.0/16 dev rampart0 proto static");
        ip("route add 10.44.0.0/16 dev other0 proto 117");
        ip("route add 10.45.0.0/16 dev rampart0 proto 117 table 99");
        ip("route add blackhole 10.46.0.0/16 proto 117");
        ip("-6 route add fd43::/48 dev other0");
        assert_eq!(link.observe().unwrap().unwrap().routes, BTreeSet::new());
        for taken in ["10.43.0.0/16", "10.44.0.0/16", "10.46.0.0/16"] {
            let error = link.add_route(net(taken)).unwrap_err().to_string();
            assert!(error.contains(taken) && error.contains("ip route delete"), "{error}");
        }
        // Removing what is not ours removes nothing.
        link.remove_route(net("10.43.0.0/16")).unwrap();
        link.remove_route(net("10.44.0.0/16")).unwrap();
        assert_eq!(ip("-4 route show table main").lines().count(), 3);
    });
}

/// Packets for the mesh never take the default route, whatever becomes of the link.
#[test]
fn without_the_link_the_mesh_is_unreachable_at_once() {
    in_namespace(|| {
        ip("link set lo up");
        let _default = our_link("uplink0");
        ip("link set uplink0 up");
        ip("addr add 192.0.2.2/24 dev uplink0");
        ip("addr add 2001:db8::2/64 dev uplink0 nodad");
        ip("route add default dev uplink0");
        ip("-6 route add default dev uplink0");
        let mut link = our_link("rampart0");
        let mesh = BTreeSet::from([net("10.42.0.0/16"), net("fd42::/48")]);
        for _ in 0..2 {
            mesh.iter().for_each(|prefix| link.add_barrier(*prefix).unwrap());
        }
        assert_eq!(link.barriers().unwrap(), mesh);
        link.set_up(true).unwrap();
        mesh.iter().for_each(|prefix| link.add_route(*prefix).unwrap());
        assert_eq!((link.observe().unwrap().unwrap().routes, link.barriers().unwrap()), (mesh.clone(), mesh.clone()));
        let device = |address: &str| {
            let output = Command::new("ip").args(["route", "get", address]).output().unwrap();
            String::from_utf8_lossy(&output.stdout)
                .split_whitespace()
                .skip_while(|word| *word != "dev")
                .nth(1)
                .map(str::to_owned)
        };
        let addresses = ["10.42.7.7", "fd42::7"];
        // An equal route of another with the metric that the kernel gives does not win.
        ip("-6 route add fd42::/48 dev uplink0");
        addresses.iter().for_each(|address| assert_eq!(device(address).as_deref(), Some("rampart0")));
        ip("-6 route delete fd42::/48 dev uplink0");
        // As the kernel lets drift happen: it takes the link's own route, and the barrier stays.
        ip("route delete 10.42.0.0/16 dev rampart0");
        ip("link set rampart0 down");
        let unreachable = || {
            for address in addresses {
                let to = std::net::SocketAddr::new(address.parse().unwrap(), 80);
                let error = std::net::TcpStream::connect(to).unwrap_err();
                assert!(is(&error, &[libc::EHOSTUNREACH, libc::ENETUNREACH]), "{address}: {error}");
                assert_eq!(device(address), None, "{address}: the refusal is the node's own");
            }
        };
        unreachable();
        ip("link delete rampart0");
        unreachable();
        assert_eq!(link.barriers().unwrap(), mesh);
        // Another interface's daemon has its own.
        let mut other = NetlinkLink::new("rampart1").unwrap();
        assert_eq!(other.barriers().unwrap(), BTreeSet::new());
        mesh.iter().for_each(|prefix| other.add_barrier(*prefix).unwrap());
        for _ in 0..2 {
            mesh.iter().for_each(|prefix| link.remove_barrier(*prefix).unwrap());
        }
        assert_eq!((link.barriers().unwrap(), other.barriers().unwrap()), (BTreeSet::new(), mesh.clone()));
        mesh.iter().for_each(|prefix| other.remove_barrier(*prefix).unwrap());
        addresses.iter().for_each(|address| assert_eq!(device(address).as_deref(), Some("uplink0")));
    });
}

#[test]
fn foreign_link_is_seen_and_never_changed() {
    in_namespace(|| {
        for (name, create) in [
            ("foreign0", "link add foreign0 type veth peer name foreign1"),
            ("tun9", "tuntap add tun9 mode tun"),
            ("tap9", "tuntap add tap9 mode tap"),
        ] {
            ip(create);
            let before = ip(&format!("link show {name}"));
            let mut link = NetlinkLink::new(name).unwrap();
            assert_eq!(link.observe().unwrap().unwrap().kind, LinkKind::Foreign, "{name}");
            let errors = [
                link.set_mtu(1400),
                link.set_up(true),
                link.add_address(net("10.0.0.1/32")),
                link.remove_address(net("10.0.0.1/32")),
                link.add_route(net("10.0.0.0/8")),
                link.remove_route(net("10.0.0.0/8")),
            ];
            for error in errors {
                let error = error.unwrap_err().to_string();
                assert!(error.contains(name) && error.contains("not Rampart's"), "{error}");
            }
            assert_eq!(ip(&format!("link show {name}")), before);
        }
    });
}

#[test]
fn link_that_is_not_there_is_none_and_cannot_be_changed() {
    in_namespace(|| {
        let mut link = NetlinkLink::new("rampart0").unwrap();
        assert_eq!(link.observe().unwrap(), None);
        assert_eq!(link.set_up(true).unwrap_err().to_string(), "there is no interface `rampart0`");
    });
}

#[test]
fn names_that_are_no_interface_are_refused() {
    fn check(name: &str, expected: &str) {
        assert_eq!(check_name(name).unwrap_err().to_string(), expected);
    }
    check("", "interface name `` is empty; take one like `rampart0`");
    check("sixteen-bytes-xx", "interface name `sixteen-bytes-xx` is longer than 15 bytes; take one like `rampart0`");
    check("..", "interface name `..` is reserved; take one like `rampart0`");
    for name in ["a/b", "a b", "a%d", "a:b", "ä"] {
        assert!(check_name(name).unwrap_err().to_string().contains("other characters"), "{name}");
    }
    check_name("fifteen-bytes-x").unwrap();
}
