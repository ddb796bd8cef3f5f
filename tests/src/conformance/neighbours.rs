//! Programs of others on the same interface: they stay, and see what Rampart let pass and nothing else.

use nix::net::if_::if_nametoindex;
use node::kernel::{AttachMethod, Datapath};

use super::ear::Ear;
use super::foreign::{Bystander, Place};
use super::network::{ENDS, allowing, node, small};
use super::{INTERFACE, Lab, name, wait_until};
use ebpf_common::INGRESS;

const OPEN: u16 = 1_001;
const CLOSED: u16 = 1_002;
/// Packets of each kind.
const PACKETS: u64 = 10;

struct Bench<'a> {
    lab: &'a mut Lab,
    open: Ear,
    closed: Ear,
}

impl Bench<'_> {
    /// Sends of both kinds, and says how many of them each bystander saw.
    fn seen<const N: usize>(&mut self, bystanders: [&Bystander; N], open: bool, closed: bool) -> [u64; N] {
        let before = bystanders.map(Bystander::packets);
        for _ in 0..PACKETS {
            assert_eq!((self.open.hears(), self.closed.hears()), (open, closed));
        }
        let mut after = bystanders.map(Bystander::packets);
        after.iter_mut().zip(before).for_each(|(after, before)| *after -= before);
        after
    }

    fn add(&self, place: Place) -> Bystander {
        let index = if_nametoindex(INTERFACE).expect("the interface");
        let bystander = Bystander::new(&self.lab.bpffs.join(format!("bystander-{place:?}"))).expect("loaded");
        match self.lab.attachment() {
            AttachMethod::Tcx => bystander.attach_tcx(index, INGRESS, place).expect("attached"),
            AttachMethod::Clsact => bystander.attach_filter(INTERFACE, name(INGRESS), place),
        }
        bystander
    }

    fn is_first(&mut self) -> bool {
        self.lab.datapath.observe().expect("observed").ingress
    }
}

pub fn see_what_passed(lab: &mut Lab) {
    lab.give_addresses();
    let [web, db, ..] = ENDS[0];
    let [open, closed] = [OPEN, CLOSED].map(|port| Ear::new(&lab.tun, db, web, port));
    let mut bench = Bench { lab, open, closed };
    if bench.lab.attachment() == AttachMethod::Clsact {
        bench.lab.run("tc", &["qdisc", "add", "dev", INTERFACE, "clsact"]);
    }
    let early = bench.add(Place::Behind);
    assert_eq!(bench.seen([&early], true, true), [2 * PACKETS], "before Rampart is there");
    let network = allowing(small(), "open", "cidr:db", "cidr:web", &format!("udp/{OPEN}"));
    bench.lab.enforce(&network, node(&network, "web1"));
    assert_eq!(bench.seen([&early], true, false), [PACKETS], "of one that was there before");
    let late = bench.add(Place::Last);
    assert_eq!(bench.seen([&early, &late], true, false), [PACKETS; 2], "of one that came later");
    assert!(bench.is_first());
    let ahead = bench.add(Place::Ahead);
    assert_eq!(
        bench.seen([&ahead, &early, &late], true, false),
        [2 * PACKETS, PACKETS, PACKETS],
        "of one that got ahead"
    );
    assert!(!bench.is_first(), "that is drift");
    bench.lab.datapath.attach().expect("put ahead again");
    assert_eq!(bench.seen([&ahead, &early, &late], true, false), [PACKETS; 3], "of one that was put behind");
    assert!(bench.is_first());
    // Another agent takes over Rampart's programs and leaves those of others.
    bench.lab.restart();
    bench.lab.datapath.attach().expect("taken over");
    assert_eq!(bench.seen([&ahead, &early, &late], true, false), [PACKETS; 3], "after another agent came");
    bench.lab.datapath.detach().expect("detached");
    wait_until(|| bench.closed.hears(), "Rampart's program is gone");
    assert_eq!(bench.seen([&ahead, &early, &late], true, true), [2 * PACKETS; 3], "once Rampart is gone");
}
