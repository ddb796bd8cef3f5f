//! The programs in their place on an interface: attached, first, pinned, taken over, put back.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use ebpf_common::{EGRESS, INGRESS, reason};
use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use node::kernel::datapath::Trace;
use node::kernel::datapath::packet::Packet;
use node::kernel::{AttachMethod, Attachment, Datapath, DatapathState, Inspect};
use policy::{Generation, Network};

use super::network::{ENDS, allowing, flow, node, small};
use super::{DIRECTIONS, INTERFACE, Lab, attachments, foreign, name, wait_until};

fn network() -> Network {
    allowing(small(), "tcp", "cidr:web", "cidr:db", "tcp/443")
}

/// Puts a policy in force.
fn enforce(lab: &mut Lab) -> Generation {
    let network = network();
    let web1 = node(&network, "web1");
    lab.enforce(&network, web1);
    lab.generation()
}

pub(super) fn observe(lab: &mut Lab) -> DatapathState {
    lab.datapath.observe().expect("observed")
}

/// Panics unless both programs are in place and this generation is in force.
fn assert_in_force(lab: &mut Lab, generation: Generation) {
    let state = observe(lab);
    assert_eq!((state.egress, state.ingress), (true, true), "in place and first");
    assert_eq!(state.attachment, lab.attachment());
    assert_eq!(state.generation, generation);
    let [web, db, ..] = ENDS[0];
    let expected = if generation == Generation(0) { reason::NO_POLICY } else { reason::RULE };
    lab.judge().expect(EGRESS, &Packet::opening(&flow(web, db, "tcp/443")), expected);
}

pub fn is_found(lab: &mut Lab) {
    lab.datapath.attach().expect("attached");
    assert_eq!(observe(lab).attachment, attachments()[0]);
    assert_in_force(lab, Generation(0));
}

/// Packets arrive all the while, and each is counted by exactly one program.
pub fn is_taken_over(lab: &mut Lab) {
    let generation = enforce(lab);
    let revision = observe(lab).revision;
    let before = lab.counted(INGRESS);
    let [web, db, ..] = ENDS[0];
    let packet = Packet::opening(&flow(db, web, "udp/9")).to_bytes();
    let stop = AtomicBool::new(false);
    let mut tun = lab.tun.try_clone().expect("a descriptor");
    let sent = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                tun.write_all(&packet).expect("sent");
                sent += 1;
            }
            sent
        });
        for _ in 0..5 {
            lab.restart();
            let state = observe(lab);
            assert_eq!((state.egress, state.ingress), (true, true), "while no agent runs");
            assert_eq!((state.generation, state.revision), (generation, revision));
            lab.datapath.attach().expect("taken over");
        }
        stop.store(true, Ordering::Relaxed);
        sender.join().expect("the sender")
    });
    wait_until(|| lab.counted(INGRESS) >= before + sent, "every packet is counted");
    assert_eq!(lab.counted(INGRESS), before + sent, "no packet is counted twice");
    assert_in_force(lab, generation);
    // The new agent knows nothing of the tables' contents and switches all the same.
    let next = enforce(lab);
    assert_eq!(next, Generation(generation.0 + 1));
    assert_in_force(lab, next);
}

pub fn is_put_back(lab: &mut Lab) {
    let generation = enforce(lab);
    for direction in DIRECTIONS {
        match lab.attachment() {
            AttachMethod::Tcx => foreign::detach(&lab.pin(&format!("links/{}", name(direction)))).expect("detached"),
            AttachMethod::Clsact => lab.run("tc", &["filter", "del", "dev", INTERFACE, name(direction)]),
        }
        let state = observe(lab);
        assert_eq!((state.egress, state.ingress), (direction != EGRESS, direction != INGRESS), "it is gone");
        lab.datapath.attach().expect("put back");
        assert_in_force(lab, generation);
    }
    if lab.attachment() == AttachMethod::Clsact {
        lab.run("tc", &["qdisc", "del", "dev", INTERFACE, "clsact"]);
        assert!(!observe(lab).egress);
        lab.datapath.attach().expect("put back");
        assert_in_force(lab, generation);
    }
}

pub fn is_first_again(lab: &mut Lab) {
    let generation = enforce(lab);
    let index = if_nametoindex(INTERFACE).expect("the interface");
    let mut links = Vec::new();
    for direction in DIRECTIONS {
        for handle in ["9", "10"] {
            match lab.attachment() {
                AttachMethod::Tcx => links.push(foreign::attach_ahead(index, direction).expect("attached")),
                AttachMethod::Clsact => lab.run(
                    "tc",
                    &[
                        "filter",
                        "add",
                        "dev",
                        INTERFACE,
                        name(direction),
                        "protocol",
                        "all",
                        "pref",
                        "1",
                        "handle",
                        handle,
                        "bpf",
                        "da",
                        "bytecode",
                        "1,6 0 0 4294967295",
                    ],
                ),
            }
            let state = observe(lab);
            assert_eq!((state.egress, state.ingress), (direction != EGRESS, direction != INGRESS), "not first");
            let ahead: Vec<_> = state.ahead.iter().map(|program| (program.attachment, program.position)).collect();
            let place = if direction == EGRESS { Attachment::Egress } else { Attachment::Ingress };
            assert_eq!(ahead, [(place, 1)], "who is ahead is told");
            lab.datapath.attach().expect("placed ahead");
            assert_in_force(lab, generation);
        }
    }
    let before = lab.counted(INGRESS);
    let [web, db, ..] = ENDS[0];
    lab.tun.write_all(&Packet::opening(&flow(db, web, "udp/9")).to_bytes()).expect("sent");
    wait_until(|| lab.counted(INGRESS) > before, "the packet is counted");
    assert_eq!(
        lab.counted(INGRESS),
        before + 1,
        "one program of ours is left, and those of others let it have its say"
    );
}

/// What others have on the interface is told: its place, its number, its id and its name.
pub fn names_others(lab: &mut Lab) {
    enforce(lab);
    let programs = |lab: &mut Lab| lab.datapath.programs().expect("listed");
    let ours = programs(lab);
    assert!(ours.iter().all(|program| program.ours && program.position == 1), "{ours:?}");
    assert_eq!(
        ours.iter().map(|program| program.attachment).collect::<Vec<_>>(),
        [Attachment::Egress, Attachment::Ingress]
    );
    assert!(ours.iter().all(|program| program.name.as_deref() == Some("rampart")), "{ours:?}");
    let index = if_nametoindex(INTERFACE).expect("the interface");
    let _xdp = foreign::attach_xdp(index).expect("attached");
    // Filters of the older kind of BPF have no id.
    lab.run("tc", &["qdisc", "replace", "dev", INTERFACE, "clsact"]);
    for direction in DIRECTIONS {
        let add = ["filter", "add", "dev", INTERFACE, name(direction), "protocol", "all", "pref", "9"];
        lab.run("tc", &[&add[..], &["bpf", "da", "bytecode", "1,6 0 0 4294967295"]].concat());
    }
    let others: Vec<_> = programs(lab).into_iter().filter(|program| !program.ours).collect();
    let told: Vec<_> =
        others.iter().map(|program| (program.attachment, program.position, program.id.is_some())).collect();
    assert_eq!(
        told,
        [(Attachment::Egress, 2, false), (Attachment::Ingress, 2, false), (Attachment::Xdp, 1, true)],
        "{others:?}"
    );
    assert_eq!(others[0].name.as_deref(), Some("bpf"), "its kind");
    let state = observe(lab);
    assert_eq!((state.egress, state.ingress, state.ahead), (true, true, Vec::new()), "none of them is drift");
    lab.recreate_interface();
    assert_eq!(programs(lab), []);
}

pub fn is_pinned_again(lab: &mut Lab) {
    let generation = enforce(lab);
    fs::remove_dir_all(lab.bpffs.join("rampart")).expect("removed");
    let state = observe(lab);
    assert_eq!((state.egress, state.ingress), (false, false), "it would end with the agent");
    lab.datapath.attach().expect("pinned again");
    assert_in_force(lab, generation);
    fs::remove_file(lab.pin("maps/TABLES")).expect("removed");
    assert!(!observe(lab).egress);
    lab.datapath.attach().expect("pinned again");
    lab.restart();
    lab.datapath.attach().expect("taken over");
    assert_in_force(lab, generation);
}

pub fn is_closed_on_another_interface(lab: &mut Lab) {
    let generation = enforce(lab);
    lab.recreate_interface();
    let state = observe(lab);
    assert_eq!((state.egress, state.ingress), (false, false), "nothing is on the new one");
    lab.datapath.attach().expect("attached");
    // The agent that knows the tables to be its own keeps them.
    assert_in_force(lab, generation);
    lab.recreate_interface();
    lab.restart();
    lab.datapath.attach().expect("attached");
    assert_in_force(lab, Generation(0));
    assert_eq!(lab.datapath.flow_records().expect("readable"), 0);
}

pub fn is_closed_without_all_tables(lab: &mut Lab) {
    enforce(lab);
    fs::remove_file(lab.pin("maps/TABLES")).expect("removed");
    lab.restart();
    lab.datapath.attach().expect("attached");
    assert_in_force(lab, Generation(0));
    let generation = enforce(lab);
    assert_in_force(lab, generation);
}

pub fn is_attached_over_leftovers(lab: &mut Lab) {
    let generation = enforce(lab);
    // Killed between pinning under a passing name and giving the right one, and while a probe was loaded.
    let programs = lab.pin("programs");
    fs::rename(programs.join("egress"), programs.join("egress-new")).expect("renamed");
    fs::create_dir_all(lab.pin("probe-1-0")).expect("a folder");
    foreign::pin_array(&lab.pin("probe-1-0/FLOWS"), 4, 1).expect("pinned");
    if lab.attachment() == AttachMethod::Tcx {
        foreign::pin_array(&lab.pin("links/egress-new"), 4, 1).expect("pinned");
    }
    lab.restart();
    lab.datapath.attach().expect("attached");
    assert_in_force(lab, generation);
    assert!(!lab.pin("probe-1-0").exists() && !programs.join("egress-new").exists());
    // Killed after the folders were made.
    lab.datapath.detach().expect("detached");
    lab.restart();
    lab.datapath.attach().expect("attached");
    assert_in_force(lab, Generation(0));
}

pub fn leaves_nothing(lab: &mut Lab) {
    enforce(lab);
    lab.restart();
    lab.datapath.detach().expect("detached");
    assert!(!lab.bpffs.join("rampart").exists(), "no pins");
    let state = observe(lab);
    assert_eq!((state.egress, state.ingress, state.generation), (false, false, Generation(0)));
    lab.datapath.detach().expect("nothing to detach");
    enforce(lab);
    lab.recreate_interface();
    lab.datapath.detach().expect("detached, though the interface is another");
    assert!(!lab.bpffs.join("rampart").exists(), "no pins");
}

pub fn refuses_foreign_maps(lab: &mut Lab) {
    lab.datapath.attach().expect("attached");
    let control = lab.pin("maps/CONTROL");
    lab.datapath.detach().expect("detached");
    fs::create_dir_all(control.parent().expect("a folder")).expect("a folder");
    foreign::pin_array(&control, 16, 1).expect("pinned");
    let error = lab.datapath.attach().expect_err("a map of another layout").to_string();
    assert!(error.contains("CONTROL") && error.contains("16 bytes") && error.contains("remove"), "{error}");
    fs::remove_file(control).expect("removed");
    lab.datapath.attach().expect("attached");
}

/// The capabilities that the README asks for, and no more.
pub fn needs_few_capabilities(lab: &mut Lab) {
    foreign::keep_capabilities(&[foreign::CAP_NET_ADMIN, foreign::CAP_PERFMON, foreign::CAP_BPF]).expect("dropped");
    let generation = enforce(lab);
    assert_in_force(lab, generation);
    lab.datapath.settle().expect("settled");
    lab.restart();
    lab.datapath.attach().expect("taken over");
    assert_in_force(lab, generation);
    lab.datapath.read_tables().expect("read back");
    lab.datapath.counters(&[0]).expect("read");
    lab.datapath.collect_flows().expect("collected");
    lab.datapath.events().expect("events");
    lab.datapath.detach().expect("detached");
}

/// Records of the enforcing programs: collected when idle only, forgotten with an address.
pub fn forgets_flows(lab: &mut Lab) {
    let network = allowing(small(), "tcp", "cidr:db", "cidr:web", "tcp/443");
    let web1 = node(&network, "web1");
    lab.enforce(&network, web1);
    for [web, db, ..] in ENDS {
        lab.tun.write_all(&Packet::opening(&flow(db, web, "tcp/443")).to_bytes()).expect("sent");
    }
    wait_until(|| lab.datapath.flow_records().expect("readable") == ENDS.len(), "the flows are recorded");
    assert_eq!(lab.datapath.collect_flows().expect("collected"), 0, "none is idle");
    let nets = |addresses: &[&str]| -> Vec<IpNet> {
        addresses.iter().map(|address| address.parse::<IpAddr>().expect("an address").into()).collect()
    };
    let [[web_v4, _, other, _], [_, db_v6, ..]] = ENDS;
    assert_eq!(lab.datapath.forget_flows(&nets(&[other])).expect("forgotten"), 0);
    assert_eq!(lab.datapath.forget_flows(&nets(&[web_v4, db_v6])).expect("forgotten"), 2);
    assert_eq!(lab.datapath.flow_records().expect("readable"), 0);
}

/// The agent's ears: events of denied packets, and with tracing a record of every packet.
pub fn reports(lab: &mut Lab) {
    let (sender, receiver) = mpsc::channel();
    lab.restart_with(|datapath| datapath.with_trace(move |trace| sender.send(trace).expect("somebody listens")));
    let generation = enforce(lab);
    let traces: Vec<Trace> = receiver.try_iter().collect();
    assert_eq!(traces.len(), DIRECTIONS.len(), "one of each program");
    let mut events = lab.datapath.events().expect("events");
    let [web, db, ..] = ENDS[0];
    lab.tun.write_all(&Packet::opening(&flow(db, web, "udp/9")).to_bytes()).expect("sent");
    let mut event = None;
    wait_until(
        || {
            event = event.or_else(|| events.poll());
            event.is_some_and(|event| event.destination_port == 9)
        },
        "the denied packet is reported",
    );
    wait_until(|| traces.iter().any(foreign::is_readable), "a program says something");
    traces.into_iter().for_each(|mut trace| trace.flush());
    assert_in_force(lab, generation);
}

pub fn drops_short_packets(lab: &mut Lab) {
    let network = allowing(small(), "all", "any", "any", "any");
    let web1 = node(&network, "web1");
    lab.enforce(&network, web1);
    let malformed =
        |lab: &mut Lab| lab.datapath.counters(&[]).expect("readable").reasons[&(INGRESS, reason::MALFORMED)].packets;
    for [web, db, ..] in ENDS {
        let bytes = Packet::opening(&flow(db, web, "tcp/443")).to_bytes();
        for length in 1..bytes.len() {
            let before = malformed(lab);
            lab.tun.write_all(&bytes[..length]).expect("sent");
            wait_until(|| malformed(lab) > before, &format!("{length} bytes are counted as malformed"));
        }
    }
}
