//! Records of flows: who opened them, and whose there is room for (docs/POLICY.md, section 3).

use std::io::Write;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use ebpf_common::counter::{LOSS_FLOW, LOSS_FLOW_QUOTA, PairKey};
use ebpf_common::flow::{FILTER_UNKNOWN, FlowFilter, Remote};
use ebpf_common::{EGRESS, INGRESS, limit, reason};
use nix::net::if_::if_nametoindex;
use node::kernel::datapath::packet::{ACK, Packet, SYN};
use node::kernel::{Datapath, Inspect};

use super::foreign::Out;
use super::network::{ENDS, allowing, flow, node, small};
use super::{INTERFACE, Lab, foreign, on_processor, share};

/// What db opened is not kept alive by web's own right to talk to db.
pub fn belong_to_their_opener(lab: &mut Lab) {
    let web_to_db = allowing(small(), "web-to-db", "cidr:web", "cidr:db", "tcp");
    let both = allowing(web_to_db.clone(), "db-to-web", "cidr:db", "cidr:web", "tcp");
    let web1 = node(&both, "web1");
    for [web, db, ..] in ENDS {
        lab.enforce(&both, web1);
        let mut judge = lab.judge();
        let opened_by_db = Packet::opening(&flow(db, web, "tcp/8080")).with_flags(SYN);
        judge.expect(INGRESS, &opened_by_db, reason::RULE);
        let answer = opened_by_db.reply().with_flags(SYN | ACK);
        judge.expect(EGRESS, &answer, reason::RULE);

        lab.enforce(&web_to_db, web1);
        judge.slots = lab.slots.pairs().into_values().collect();
        let (data, answer) = (opened_by_db.with_flags(ACK), answer.with_flags(ACK));
        judge.expect(INGRESS, &data, reason::NO_RULE);
        judge.expect(EGRESS, &answer, reason::RULE);
        judge.expect(INGRESS, &data, reason::NO_RULE);
        // Web's own flow between the same ports is another one.
        judge.expect(EGRESS, &answer.clone().with_flags(SYN), reason::RULE);
        judge.expect(INGRESS, &data, reason::REPLY);
        judge.expect(INGRESS, &data.with_flags(SYN), reason::NO_RULE);
    }
}

/// Once half of the room is taken, who has much of it gets no more, and who has little does.
pub fn are_shared_out(lab: &mut Lab) {
    let network = allowing(small(), "udp", "cidr:web", "cidr:db", "udp");
    lab.enforce(&network, node(&network, "web1"));
    let out = Out::new(if_nametoindex(INTERFACE).expect("it is there")).expect("a socket");
    let [web, greedy, ..] = ENDS[0];
    let modest = "10.42.2.77";
    let to = |remote: &str, port: u16, number: u16| {
        let packet = Packet::opening(&flow(web, remote, &format!("udp/{port}"))).with_source_port(number);
        out.send(&packet.to_bytes()).expect("sent");
        packet
    };
    let lost = |lab: &mut Lab| {
        let losses = lab.datapath.counters(&[]).expect("readable").losses;
        (losses[LOSS_FLOW as usize], losses[LOSS_FLOW_QUOTA as usize])
    };
    for number in 0..limit::FLOWS_FREE {
        to(greedy, 1 + (number >> 15) as u16, (number & 0x7fff) as u16 + 1);
    }
    let records = |lab: &mut Lab| lab.datapath.flow_records().expect("readable") as u32;
    assert_eq!((records(lab), lost(lab)), (limit::FLOWS_FREE, (0, 0)), "half of the room is anybody's");
    let refused = to(greedy, 9, 1);
    assert_eq!((records(lab), lost(lab)), (limit::FLOWS_FREE, (0, 1)), "no more for who has it all");
    let kept = to(modest, 9, 1);
    assert_eq!((records(lab), lost(lab)), (limit::FLOWS_FREE + 1, (0, 1)), "and some for another");
    // Never allowed for want of room: the answer is dropped, the packets of the opener pass by the rule.
    assert_eq!(super::early::receive(lab, &refused.reply().to_bytes()), vec![(reason::NO_RULE, 1)]);
    assert_eq!(super::early::receive(lab, &kept.reply().to_bytes()), vec![(reason::REPLY, 1)]);

    // What is gone is counted as gone when records are collected.
    let flows = lab.datapath.flows().expect("readable");
    assert!(flows.iter().all(|(key, flow)| {
        let remote = Remote::of(key, flow);
        remote == Remote::new(key.destination, 0) && u32::from(flow.direction) == EGRESS
    }));
    lab.datapath.forget_flows(&[format!("{greedy}/32").parse().expect("a prefix")]).expect("forgotten");
    lab.datapath.collect_flows().expect("collected");
    to(greedy, 9, 1);
    assert_eq!((records(lab), lost(lab)), (2, (0, 1)), "there is room again");
}

/// Fillings of the filter while flows are opened and answered.
const FILLINGS: u64 = 60;
/// Flows of each end between two of them, and how often each is answered before the next is opened: they take about as long
/// as a filling.
const FLOWS: u64 = 256;
const ANSWERS: u64 = 8;

/// While the filter is filled anew again and again, because records go all the time, no answer is taken for one to nothing.
pub fn are_found_while_others_go(lab: &mut Lab) {
    let network = allowing(small(), "kept", "cidr:web", "cidr:db", "udp");
    let network = allowing(network, "gone", "cidr:web", "cidr:lan", "udp");
    let (_, tables) = lab.enforce(&network, node(&network, "web1"));
    let [web, kept, _, gone] = ENDS[0];
    let (fillings, over) = (&AtomicU64::new(0), &AtomicBool::new(false));
    let tun = &lab.tun.try_clone().expect("a descriptor");
    let answered = thread::scope(|scope| {
        let senders = [kept, gone].into_iter().enumerate().map(|(cpu, remote)| {
            scope.spawn(move || {
                on_processor(cpu);
                let out = Out::new(if_nametoindex(INTERFACE).expect("it is there")).expect("a socket");
                let (mut tun, mut answered) = (tun, 0u64);
                while !over.load(Ordering::Acquire) {
                    let port = fillings.load(Ordering::Relaxed) * FLOWS + answered / ANSWERS % FLOWS;
                    let opener = Packet::opening(&flow(web, remote, "udp/53")).with_source_port(1 + port as u16);
                    out.send(&opener.to_bytes()).expect("sent");
                    tun.write_all(&opener.reply().to_bytes()).expect("written");
                    answered += 1;
                }
                answered
            })
        });
        let senders: Vec<_> = senders.collect();
        let mut half = state(lab);
        while fillings.load(Ordering::Relaxed) < share(FILLINGS) {
            lab.datapath.forget_flows(&[format!("{gone}/32").parse().expect("a prefix")]).expect("forgotten");
            lab.datapath.collect_flows().expect("collected");
            let other = state(lab);
            assert!([1, 2].contains(&other), "{other}");
            fillings.fetch_add(u64::from(other != half), Ordering::Relaxed);
            half = other;
        }
        over.store(true, Ordering::Release);
        senders.into_iter().map(|sender| sender.join().expect("a sender")).collect::<Vec<_>>()
    });
    let pairs = lab.datapath.counters(&[]).expect("readable").pairs;
    let received = |from: &str, reason: u8| -> u64 {
        let source = tables.leaf(from.parse().expect("an address")).expect("whole tables").cidr;
        let of = |key: &PairKey| (key.source, u32::from(key.direction), key.reason) == (source, INGRESS, reason);
        pairs.iter().filter(|(key, _)| of(key)).map(|(_, counter)| counter.packets).sum()
    };
    println!("{answered:?} packets were answered");
    let [kept, gone] = [kept, gone].map(|from| [reason::REPLY, reason::NO_RULE].map(|reason| received(from, reason)));
    assert_eq!(kept, [answered[0], 0]);
    // Few records were forgotten between a packet and its answer.
    assert_eq!(gone.iter().sum::<u64>(), answered[1]);
    assert!(kept[0] > 0 && gone[0] > gone[1], "{gone:?}");
}

/// A filter whose bits were cleared drops answers until records are collected; without a filled filter the records are
/// looked up.
pub fn are_found_again_where_the_filter_was_lost(lab: &mut Lab) {
    let network = allowing(small(), "udp", "cidr:web", "cidr:db", "udp");
    lab.enforce(&network, node(&network, "web1"));
    let out = Out::new(if_nametoindex(INTERFACE).expect("it is there")).expect("a socket");
    let answers = ENDS.map(|[web, db, ..]| {
        let opener = Packet::opening(&flow(web, db, "udp/53"));
        out.send(&opener.to_bytes()).expect("sent");
        opener.reply().to_bytes()
    });
    let expect = |lab: &mut Lab, reason: u8, what: &str| {
        for answer in &answers {
            assert_eq!(super::early::receive(lab, answer), vec![(reason, 1)], "{what}");
        }
    };
    let edit = |lab: &Lab, edit: &dyn Fn(&mut [u8])| {
        foreign::edit(&lab.pin("maps/FLOW_FILTER"), 0, size_of::<FlowFilter>(), edit).expect("edited");
    };
    let bits = offset_of!(FlowFilter, bits);
    assert!([1, 2].contains(&state(lab)), "the filter is in force from the beginning");
    expect(lab, reason::REPLY, "as the programs noted");
    edit(lab, &|bytes| bytes[bits..].fill(0));
    expect(lab, reason::NO_RULE, "the filter is believed");
    lab.datapath.collect_flows().expect("collected");
    expect(lab, reason::REPLY, "it is believed no more");
    assert_eq!(state(lab), FILTER_UNKNOWN);
    for unknown in [FILTER_UNKNOWN, 3, u64::MAX] {
        edit(lab, &|bytes| {
            bytes[bits..].fill(0);
            bytes[..8].copy_from_slice(&unknown.to_ne_bytes());
        });
        expect(lab, reason::REPLY, "nobody says that there are none");
        assert_eq!(state(lab), unknown);
        lab.datapath.collect_flows().expect("collected");
        assert!([1, 2].contains(&state(lab)), "in force again");
        expect(lab, reason::REPLY, "it was filled");
    }
}

fn state(lab: &Lab) -> u64 {
    let filter = foreign::read(&lab.pin("maps/FLOW_FILTER"), 0, size_of::<FlowFilter>()).expect("readable");
    u64::from_ne_bytes(filter[offset_of!(FlowFilter, state)..][..8].try_into().expect("8 bytes"))
}
