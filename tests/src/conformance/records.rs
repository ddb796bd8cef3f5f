//! Records of flows: who opened them, and whose there is room for (docs/POLICY.md, section 3).

use ebpf_common::counter::{LOSS_FLOW, LOSS_FLOW_QUOTA};
use ebpf_common::flow::Remote;
use ebpf_common::{EGRESS, INGRESS, limit, reason};
use nix::net::if_::if_nametoindex;
use node::kernel::datapath::packet::{ACK, Packet, SYN};
use node::kernel::{Datapath, Inspect};

use super::foreign::Out;
use super::network::{ENDS, allowing, flow, node, small};
use super::{INTERFACE, Lab};

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
