//! The guard in its place: on an interface of others, whatever becomes of it. Needs root.

use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;

use ebpf_common::INGRESS;
use ebpf_common::underlay::reason;
use nix::net::if_::if_nametoindex;
use node::kernel::guard::EbpfGuard;
use node::kernel::guard::{Hook, Interfaces, Kept, Mode, Wanted};
use node::kernel::{AttachMethod, Guard};
use tests::conformance::underlay::{PORT, plenty, wanted};
use tests::conformance::{INTERFACE, Lab, foreign, in_each_lab, in_lab};
use tests::forge::initiation;

/// The end that is guarded, and the one that is sent from.
const NEAR: &str = "near0";
const FAR: &str = "far0";

/// A pair of interfaces with addresses, both here: what is sent to a neighbour that the far end is told of arrives at the
/// near one.
fn connect(lab: &Lab) {
    lab.run("ip", &["link", "add", NEAR, "type", "veth", "peer", "name", FAR]);
    lab.run("ip", &["address", "add", "192.0.2.1/24", "dev", NEAR]);
    lab.run("ip", &["link", "set", NEAR, "up"]);
    lab.run("ip", &["link", "set", FAR, "up"]);
}

/// A new process's guard.
fn guard(lab: &Lab) -> EbpfGuard {
    let guard = EbpfGuard::new(INTERFACE, &lab.bpffs).expect("netlink");
    guard.with_attachment(lab.attachment())
}

fn here(mode: Mode) -> Wanted {
    let interfaces = Interfaces::These([NEAR.to_owned()].into());
    Wanted { interfaces, mode, ..wanted(plenty(), &[]) }
}

/// The one place, as it should be.
fn hook(kept: &Kept) -> Hook {
    assert_eq!(kept.error, None);
    let [place] = &kept.attachments[..] else { panic!("one place: {kept:?}") };
    place.hook.unwrap_or_else(|| panic!("attached: {kept:?}"))
}

/// A forged initiation that arrives at the near end is counted by the guard.
fn sees(guard: &mut EbpfGuard) -> bool {
    let count = |guard: &mut EbpfGuard| {
        let counters = guard.counters().expect("readable");
        counters.get(&(NEAR.to_owned(), reason::WRONG_MAC)).map_or(0, |counter| counter.packets)
    };
    let before = count(guard);
    foreign::send_frame(FAR, &frame()).expect("sent");
    // veth delivers on the sender's own CPU, at the latest when that has nothing else to do.
    (0..200).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(5));
        count(guard) > before
    })
}

/// To everybody on the link: broadcasts reach a WireGuard socket too.
fn frame() -> Vec<u8> {
    let mut bytes = Vec::new();
    etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 9], [0xff; 6])
        .ipv4([192, 0, 2, 9], [192, 0, 2, 255], 64)
        .udp(4000, PORT)
        .write(&mut bytes, &initiation(1))
        .expect("a packet");
    bytes
}

fn pins(lab: &Lab) -> PathBuf {
    lab.pin(&format!("guard-v{}", ebpf_common::underlay::VERSION))
}

#[test]
fn the_guard_outlives_its_agent_and_is_taken_over() {
    in_each_lab(|lab| {
        connect(lab);
        let expected = if lab.attachment() == AttachMethod::Tcx { Hook::Tcx } else { Hook::Clsact };
        let mut former = guard(lab);
        assert_eq!(hook(&former.keep(Some(&here(Mode::Tc)))), expected);
        assert!(sees(&mut former));
        drop(former);
        foreign::send_frame(FAR, &frame()).expect("sent");
        let mut next = guard(lab);
        assert_eq!(hook(&next.keep(Some(&here(Mode::Tc)))), expected);
        let counted = next.counters().expect("readable")[&(NEAR.to_owned(), reason::WRONG_MAC)].packets;
        assert!(counted >= 2, "{counted}: what nobody minded was counted, and what was before");
        assert!(sees(&mut next));
        expect_programs(lab, 1);
        next.detach().expect("detached");
        expect_programs(lab, 0);
        assert!(!lab.bpffs.join("rampart").exists() || !pins(lab).exists());
    });
}

/// Programs at ingress of the near end, by the kernel's own tools as far as there are any for the kind.
fn programs_at(lab: &Lab) -> usize {
    match lab.attachment() {
        AttachMethod::Tcx => foreign::count_tcx(if_nametoindex(NEAR).expect("an interface"), INGRESS).expect("asked"),
        AttachMethod::Clsact => {
            let output = Command::new("tc").args(["filter", "show", "dev", NEAR, "ingress"]).output().expect("tc");
            String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.contains(" handle ")).count()
        }
    }
}

/// The kernel lets go of a link a grace period after its pin has gone.
fn expect_programs(lab: &Lab, expected: usize) {
    let begin = std::time::Instant::now();
    while programs_at(lab) != expected {
        assert!(begin.elapsed().as_secs() < 10, "{} programs and not {expected}", programs_at(lab));
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_guard_that_somebody_takes_off_is_put_back_and_counted() {
    in_each_lab(|lab| {
        connect(lab);
        let mut guard = guard(lab);
        assert_eq!(guard.keep(Some(&here(Mode::Tc))).repaired, 0);
        assert_eq!(guard.keep(Some(&here(Mode::Tc))).repaired, 0, "nothing to do");
        match lab.attachment() {
            AttachMethod::Tcx => foreign::detach(&pins(lab).join("at").join(NEAR).join("tcx")).expect("detached"),
            AttachMethod::Clsact => lab.run("tc", &["qdisc", "del", "dev", NEAR, "clsact"]),
        }
        expect_programs(lab, 0);
        assert_eq!(guard.keep(Some(&here(Mode::Tc))).repaired, 1);
        assert!(sees(&mut guard));
        if lab.attachment() == AttachMethod::Tcx {
            std::fs::remove_file(pins(lab).join("at").join(NEAR).join("tcx")).expect("unpinned");
            assert_eq!(guard.keep(Some(&here(Mode::Tc))).repaired, 1, "it would not have outlived the agent");
            expect_programs(lab, 1);
        }
    });
}

#[test]
fn an_interface_that_vanishes_and_comes_is_followed() {
    in_each_lab(|lab| {
        connect(lab);
        let mut guard = guard(lab);
        hook(&guard.keep(Some(&here(Mode::Tc))));
        lab.run("ip", &["link", "del", NEAR]);
        let kept = guard.keep(Some(&here(Mode::Tc)));
        assert_eq!((kept.attachments[0].hook, kept.repaired), (None, 0));
        assert!(kept.attachments[0].note.as_deref().is_some_and(|note| note.contains("no such interface")), "{kept:?}");
        connect(lab);
        hook(&guard.keep(Some(&here(Mode::Tc))));
        assert!(sees(&mut guard));
        // No longer named: taken off.
        let elsewhere = Wanted { interfaces: Interfaces::These([FAR.to_owned()].into()), ..here(Mode::Tc) };
        guard.keep(Some(&elsewhere));
        expect_programs(lab, 0);
        guard.keep(None);
        assert!(!pins(lab).exists());
    });
}

#[test]
fn by_default_it_stands_where_the_default_routes_lead() {
    in_lab(|lab| {
        connect(lab);
        let auto = Wanted { interfaces: Interfaces::Auto, ..here(Mode::Tc) };
        let kept = guard(lab).keep(Some(&auto));
        assert!(kept.error.as_deref().is_some_and(|error| error.contains("`[guard]`")), "{kept:?}");
        lab.run("ip", &["route", "add", "default", "via", "192.0.2.9", "dev", NEAR]);
        let kept = guard(lab).keep(Some(&auto));
        assert_eq!(kept.attachments[0].interface, NEAR);
        hook(&kept);
    });
}

#[test]
fn others_are_left_where_they_are() {
    in_lab(|lab| {
        if lab.attachment() != AttachMethod::Tcx {
            // Of clsact's filters a new one of the same preference comes first: nothing can be put ahead meanwhile.
            return;
        }
        connect(lab);
        let mut guard = guard(lab);
        assert_eq!(guard.keep(Some(&here(Mode::Tc))).attachments[0].ahead, 0);
        let index = if_nametoindex(NEAR).expect("an interface");
        let _other = foreign::attach_ahead(index, INGRESS).expect("attached");
        let kept = guard.keep(Some(&here(Mode::Tc)));
        assert_eq!((kept.attachments[0].ahead, kept.repaired), (1, 0), "{kept:?}");
        assert!(sees(&mut guard), "the other one lets on");
        expect_programs(lab, 2);
    });
}

#[test]
fn in_a_driver_it_stands_where_the_driver_can_and_else_at_tc() {
    in_lab(|lab| {
        connect(lab);
        let mut former = guard(lab);
        assert_eq!(hook(&former.keep(Some(&here(Mode::Xdp)))), Hook::Xdp, "veth has it");
        assert!(sees(&mut former));
        drop(former);
        let mut next = guard(lab);
        assert_eq!(hook(&next.keep(Some(&here(Mode::Xdp)))), Hook::Xdp);
        assert!(sees(&mut next), "taken over");
        foreign::detach(&pins(lab).join("at").join(NEAR).join("xdp")).expect("detached");
        assert_eq!(next.keep(Some(&here(Mode::Xdp))).repaired, 1);
        assert!(sees(&mut next));
        let tc = hook(&next.keep(Some(&here(Mode::Tc))));
        assert_ne!(tc, Hook::Xdp);
        assert!(sees(&mut next));
        assert!(!pins(lab).join("at").join(NEAR).join("xdp").exists());
        assert_eq!(hook(&next.keep(Some(&here(Mode::Xdp)))), Hook::Xdp);
        expect_programs(lab, 0);

        // Loopback has none.
        let elsewhere = Wanted { interfaces: Interfaces::These(["lo".to_owned()].into()), ..here(Mode::Xdp) };
        let kept = next.keep(Some(&elsewhere));
        assert_eq!(hook(&kept), tc);
        assert!(kept.attachments[0].note.as_deref().is_some_and(|note| note.contains("driver")), "{kept:?}");
        assert_eq!(next.keep(Some(&elsewhere)).repaired, 0, "not tried again every time");
    });
}

#[test]
fn what_another_build_left_makes_room() {
    in_lab(|lab| {
        connect(lab);
        hook(&guard(lab).keep(Some(&here(Mode::Tc))));
        let map = pins(lab).join("maps").join(ebpf_common::underlay::map::TOTALS);
        std::fs::remove_file(&map).expect("removed");
        foreign::pin_array(&map, 16, 3).expect("pinned");
        let mut next = guard(lab);
        hook(&next.keep(Some(&here(Mode::Tc))));
        assert!(sees(&mut next));
        expect_programs(lab, 1);
    });
}

#[test]
fn what_is_sent_to_the_port_and_makes_no_sense_is_not_received() {
    in_each_lab(|lab| {
        connect(lab);
        let socket = UdpSocket::bind(("0.0.0.0", PORT)).expect("bound");
        socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).expect("set");
        foreign::send_frame(FAR, &frame()).expect("sent");
        assert!(socket.recv(&mut [0; 200]).is_ok(), "without a guard it arrives");
        let mut guard = guard(lab);
        for mode in [Mode::Tc, Mode::Xdp] {
            guard.keep(Some(&here(mode)));
            foreign::send_frame(FAR, &frame()).expect("sent");
            assert!(socket.recv(&mut [0; 200]).is_err(), "{mode:?}");
        }
    });
}
