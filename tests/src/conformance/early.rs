//! The early drop at XDP: what it drops could not have passed, and what could it leaves to the classifier.

use std::io::Write;

use ebpf_common::packet::UDP;
use ebpf_common::{INGRESS, reason};
use nix::net::if_::if_nametoindex;
use node::kernel::datapath::packet::{ACK, Packet, SYN, ip};
use node::kernel::{Datapath, EarlyDrop, Inspect};

use super::network::{ENDS, allowing, flow, node, small};
use super::{INTERFACE, Lab, wait_until};

/// Each packet through the interface is counted once, by whichever of the two programs dropped it or let it pass.
pub fn drops_what_could_not_pass(lab: &mut Lab) {
    let network = allowing(small(), "dns", "cidr:web", "cidr:db", "udp/53");
    lab.restart_with(|datapath| datapath.with_early_drop(true));
    lab.enforce(&network, node(&network, "web1"));
    assert_eq!(lab.datapath.observe().expect("observed").early_drop, EarlyDrop::On);
    for [web, db, ..] in ENDS {
        let question = Packet::opening(&flow(web, db, "udp/53"));
        let mut fragment = question.to_bytes();
        fragment.truncate(fragment.len() - 4);
        for (packet, expected, what) in [
            (Packet::opening(&flow(db, web, "udp/53")).to_bytes(), reason::NO_RULE, "what no rule allows"),
            (Packet::opening(&flow(db, web, "tcp/53")).with_flags(SYN).to_bytes(), reason::NO_RULE, "a SYN"),
            (Packet::opening(&flow(db, db, "udp/53")).to_bytes(), reason::NOT_LOCAL, "what is for others"),
            (question.reply().to_bytes(), reason::NO_RULE, "an answer to nothing"),
            (fragment, reason::MALFORMED, "what ends early"),
        ] {
            assert_eq!(receive(lab, &packet), vec![(expected, 1)], "{what}");
        }
    }
    assert!(lab.datapath.flows().expect("readable").is_empty(), "it records nothing");
}

/// Replies, fragments and errors are the classifier's to judge: only it knows of the flow.
pub fn leaves_the_rest(lab: &mut Lab) {
    let network = allowing(small(), "dns", "cidr:web", "cidr:db", "udp/53");
    let network = allowing(network, "tcp", "cidr:web", "cidr:db", "tcp/443");
    let network = allowing(network, "back", "cidr:db", "cidr:web", "udp/9");
    lab.restart_with(|datapath| datapath.with_early_drop(true));
    lab.enforce(&network, node(&network, "web1"));
    for [web, db, ..] in ENDS {
        let allowed = Packet::opening(&flow(db, web, "udp/9")).to_bytes();
        assert_eq!(receive(lab, &allowed), vec![(reason::RULE, 1)], "what a rule allows");
        for service in ["udp/53", "tcp/443"] {
            let question = Packet::opening(&flow(web, db, service)).with_flags(SYN);
            super::foreign::send_frame(INTERFACE, &question.to_bytes()).expect("sent");
            let answer = question.reply().with_flags(SYN | ACK).to_bytes();
            assert_eq!(receive(lab, &answer), vec![(reason::REPLY, 1)], "an answer");
        }
        let (source, destination) = (flow(db, web, "udp/9").source, flow(db, web, "udp/9").destination);
        if source.is_ipv4() {
            let mut later = ip(source, destination, UDP, &[0; 16]);
            later[7] = 9;
            assert_eq!(receive(lab, &later), vec![(reason::FRAGMENT, 1)], "a later fragment");
        }
    }
}

/// It goes when it is no longer asked for, and comes back when somebody took it off.
pub fn is_kept_as_asked(lab: &mut Lab) {
    let network = allowing(small(), "dns", "cidr:web", "cidr:db", "udp/53");
    let early = |lab: &mut Lab| lab.datapath.observe().expect("observed");
    lab.restart_with(|datapath| datapath.with_early_drop(true));
    lab.enforce(&network, node(&network, "web1"));
    let pin = lab.pin("links/early");
    lab.restart();
    assert!(pin.exists(), "it outlives the agent");
    lab.restart_with(|datapath| datapath.with_early_drop(true));
    lab.datapath.attach().expect("taken over");
    assert!(early(lab).ingress);
    super::foreign::detach(&pin).expect("detached");
    assert!(!early(lab).ingress, "somebody took it off");
    lab.datapath.attach().expect("put back");
    assert_eq!((early(lab).ingress, early(lab).early_drop), (true, EarlyDrop::On));
    lab.restart();
    lab.datapath.attach().expect("attached");
    assert_eq!((pin.exists(), early(lab).early_drop), (false, EarlyDrop::Off), "no longer asked for");
    // Another program's place is not taken, and the policy is enforced all the same.
    let interface = if_nametoindex(INTERFACE).expect("it is there");
    let mut foreign = None;
    // The kernel frees an unpinned link when its last reader is gone.
    wait_until(
        || {
            foreign = super::foreign::attach_xdp(interface).ok();
            foreign.is_some()
        },
        "a foreign program",
    );
    lab.restart_with(|datapath| datapath.with_early_drop(true));
    lab.enforce(&network, node(&network, "web1"));
    let state = early(lab);
    assert!(
        matches!(&state.early_drop, EarlyDrop::Failed(error) if error.contains("another XDP program")),
        "{state:?}"
    );
    assert!(state.egress && state.ingress);
}

/// What the interface's programs count of a packet that arrives.
pub(super) fn receive(lab: &mut Lab, packet: &[u8]) -> Vec<(u8, u64)> {
    let before = lab.datapath.counters(&[]).expect("readable").reasons;
    lab.tun.write_all(packet).expect("written");
    let after = lab.datapath.counters(&[]).expect("readable").reasons;
    let moved = after.into_iter().filter(|((direction, _), _)| *direction == INGRESS);
    let moved = moved.map(|(key, counter)| (key, counter.packets - before.get(&key).map_or(0, |one| one.packets)));
    moved.filter(|(_, packets)| *packets > 0).map(|((_, reason), packets)| (reason, packets)).collect()
}
