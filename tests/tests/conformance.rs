//! docs/POLICY.md, section 3, on the loaded program; and section 2 on random networks, four ways at once. Needs root.

#[path = "conformance/guard.rs"]
mod guard;
#[path = "conformance/guard_place.rs"]
mod guard_place;
#[path = "conformance/place.rs"]
mod place;
#[path = "conformance/records.rs"]
mod records;

use std::time::Duration;

use ebpf_common::flow::{STATE_ESTABLISHED, STATE_OPENING, STATE_TOMBSTONE};
use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP};
use ebpf_common::table::{ALLOW, DENY};
use ebpf_common::{EGRESS, INGRESS, reason};
use node::kernel::datapath::SHORTEST;
use node::kernel::datapath::packet::{ACK, FIN, Packet, RST, SYN, ip};
use node::kernel::{Datapath, Inspect};
use node::lower::Tables;
use policy::{Action, Flow, Generation, Network, Reason, Verdict, interpret};
use tests::conformance::network::{ENDS, allowing, flow, node, small, with_rule};
use tests::conformance::random::{Found, Sides, Until};
use tests::conformance::{DIRECTIONS, Judge, Lab, foreign, in_lab, random, verifier};

#[path = "conformance/fire.rs"]
mod fire;

/// Verdicts on random networks, unless `RAMPART_RANDOM_SECONDS` says for how long, or `RAMPART_SEED` which one.
const VERDICTS: u64 = 1_000_000;

#[test]
fn interpreter_matrix_tables_and_program_agree_on_random_networks() {
    let given = |name: &str| -> Option<u64> {
        let text = std::env::var(name).ok()?;
        Some(text.parse().unwrap_or_else(|error| panic!("{name}=`{text}`: {error}")))
    };
    let until = match (given(random::SEED), given("RAMPART_RANDOM_SECONDS")) {
        (Some(seed), _) => Until::Seed(seed),
        (None, Some(seconds)) => Until::Time(Duration::from_secs(seconds)),
        (None, None) => Until::Verdicts(VERDICTS),
    };
    in_lab(|lab| {
        if let Err(found) = random::agree(lab, until, Sides::TRUE) {
            panic!("{found}");
        }
    });
}

/// A fault of each kind is found, and shrunk until nothing is left but what shows it.
#[test]
fn a_fault_is_shrunk_to_one_rule_and_one_packet() {
    // An interpreter that has forgotten a port.
    let forgetful = |network: &Network, flow: &Flow| match (interpret(network, flow), flow.protocol, flow.port) {
        (Verdict { reason: Reason::Rule, .. }, TCP, 443) => Verdict::NO_RULE,
        (verdict, ..) => verdict,
    };
    let found = find(Sides { interpret: &forgetful, ..Sides::TRUE });
    assert_eq!((found.flow.protocol, found.flow.port), (TCP, 443), "{found}");
    assert!(found.what.contains("the interpreter says deny (no-rule)"), "{found}");

    // A kernel in which one decision is another.
    let flipped = |tables: &Tables| {
        let mut tables = tables.clone();
        let rule = tables.decisions.iter_mut().find(|one| one.reason == reason::RULE && one.verdict == ALLOW);
        rule.into_iter().for_each(|decision| decision.verdict = DENY);
        tables
    };
    let found = find(Sides { load: &flipped, ..Sides::TRUE });
    assert!(found.what.contains("the program says drop (deny-rule"), "{found}");
    let [rule] = found.network.rules().values().collect::<Vec<_>>()[..] else { panic!("{found}") };
    assert_eq!(rule.action, Action::Allow, "{found}");
}

/// What is found with a side that is wrong, as it is printed.
fn find(sides: Sides<'_>) -> Found {
    let mut found = None;
    in_lab(|lab| found = random::agree(lab, Until::Time(Duration::from_secs(120)), sides).err());
    let found = *found.expect("no fault was found");
    println!("{found}");
    let network = &found.network;
    assert!(network.rules().len() == 1 && network.nodes().len() == 1 && network.groups().is_empty(), "{found}");
    assert!(network.cidrs().len() <= 3 && network.services().len() <= 1, "{found}");
    let text = found.to_string();
    for word in ["RAMPART_SEED=", "packet ", "node ", "cidr "] {
        assert!(text.contains(word), "no `{word}` in {text}");
    }
    found
}

#[test]
fn the_programs_are_no_more_work_for_the_verifier_than_recorded() {
    in_lab(|_| verifier::is_as_recorded());
}

/// The packet that opens a flow of a node of [`ENDS`] to another.
fn opening(source: &str, destination: &str, service: &str) -> Packet {
    Packet::opening(&flow(source, destination, service))
}

/// Echo requests of the family.
fn echo(source: &str) -> &'static str {
    if source.contains(':') { "icmpv6/128" } else { "icmp/8" }
}

#[test]
fn everything_is_dropped_before_the_first_policy() {
    in_lab(|lab| {
        lab.datapath.attach().expect("attached");
        assert_eq!(lab.generation(), Generation(0));
        let mut judge = lab.judge();
        for [web, db, ..] in ENDS {
            for direction in DIRECTIONS {
                judge.expect(direction, &opening(web, db, "tcp/443"), reason::NO_POLICY);
            }
        }
        for direction in DIRECTIONS {
            judge.expect_bytes(direction, &[0; SHORTEST], reason::NO_POLICY, "zeros");
        }
    });
}

#[test]
fn a_packet_that_ends_early_never_passes() {
    let network = allowing(small(), "all", "any", "any", "any");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        for [web, db, ..] in ENDS {
            let header = if web.contains(':') { 40 } else { 20 };
            for (service, transport) in [("tcp/443", 20), ("udp/53", 8), (echo(web), 8)] {
                let packet = opening(web, db, service);
                judge.expect(EGRESS, &packet, reason::RULE);
                let bytes = packet.to_bytes();
                for length in SHORTEST..bytes.len() {
                    judge.expect_bytes(
                        EGRESS,
                        &bytes[..length],
                        reason::MALFORMED,
                        &format!("{length} bytes of {packet:?}"),
                    );
                }
                // Cut before it was sent: the lengths agree, the transport header is not whole.
                for length in 0..transport {
                    let cut = ip(packet.source, packet.destination, packet.protocol, &packet.transport()[..length]);
                    judge.expect_bytes(EGRESS, &cut, reason::MALFORMED, &format!("{length} bytes of transport"));
                }
                assert!(header + transport <= bytes.len());
            }
        }
    });
}

#[test]
fn headers_that_lie_are_refused() {
    let network = allowing(small(), "all", "any", "any", "any");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        let [web, db, ..] = ENDS[0];
        type Change = fn(&mut Vec<u8>);
        let v4: [(&str, Change, u8); 9] = [
            ("version 5", |bytes| bytes[0] = 0x55, reason::MALFORMED),
            ("a header of 16 bytes", |bytes| bytes[0] = 0x44, reason::MALFORMED),
            ("a total length of 19", |bytes| bytes[2..4].copy_from_slice(&[0, 19]), reason::MALFORMED),
            ("a total length beyond the end", |bytes| bytes[2..4].copy_from_slice(&[1, 0]), reason::MALFORMED),
            ("a TCP header of 16 bytes", |bytes| bytes[32] = 0x40, reason::MALFORMED),
            ("a TCP header beyond the end", |bytes| bytes[32] = 0xf0, reason::MALFORMED),
            ("a first fragment of 20 bytes", |bytes| bytes[6] = 0x20, reason::MALFORMED),
            (
                "the end of more than 65,535 bytes",
                |bytes| bytes[6..8].copy_from_slice(&[0x1f, 0xff]),
                reason::MALFORMED,
            ),
            ("the reserved flag", |bytes| bytes[6] = 0x80, reason::RULE),
        ];
        for (what, change, expected) in v4 {
            let mut bytes = opening(web, db, "tcp/443").to_bytes();
            change(&mut bytes);
            judge.expect_bytes(EGRESS, &bytes, expected, what);
        }
        for (option, expected) in [
            (vec![131, 7, 4, 10, 42, 1, 9, 0], reason::SOURCE_ROUTE),
            (vec![1, 137, 7, 4, 10, 42, 1, 9], reason::SOURCE_ROUTE),
            (vec![7, 9, 4, 0, 0, 0, 0, 0], reason::MALFORMED),
            (vec![7, 1, 4, 0, 0, 0, 0, 0], reason::MALFORMED),
            (vec![1, 1, 1, 0, 131, 7, 4, 0], reason::RULE),
        ] {
            let packet = opening(web, db, "tcp/443");
            let mut bytes = packet.to_bytes();
            bytes.splice(20..20, option.iter().copied());
            bytes[0] = 0x45 + option.len() as u8 / 4;
            bytes[3] += option.len() as u8;
            judge.expect_bytes(EGRESS, &bytes, expected, &format!("IPv4 options {option:?}"));
        }
        let mut short_udp = opening(web, db, "udp/53").to_bytes();
        short_udp[24..26].copy_from_slice(&[0, 7]);
        judge.expect_bytes(EGRESS, &short_udp, reason::MALFORMED, "a UDP length of 7");
        short_udp[24..26].copy_from_slice(&[0, 99]);
        judge.expect_bytes(EGRESS, &short_udp, reason::MALFORMED, "a UDP length beyond the end");
    });
}

#[test]
fn extension_headers_are_walked_or_refused() {
    let network = allowing(small(), "web", "cidr:web", "cidr:db", "tcp/443");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        let [web, db, ..] = ENDS[1];
        let packet = opening(web, db, "tcp/443");
        // Each header: its own protocol, and what follows "next header" in its 8 bytes.
        let rest = |kind: u8| -> [u8; 7] { [0, if kind == 43 { 4 } else { 0 }, 0, 0, 0, 0, 0] };
        let chain = |kinds: &[u8], last: u8, transport: &[u8]| {
            let mut payload = Vec::new();
            for (at, kind) in kinds.iter().enumerate() {
                payload.push(kinds.get(at + 1).copied().unwrap_or(last));
                payload.extend(rest(*kind));
            }
            payload.extend(transport);
            ip(packet.source, packet.destination, kinds.first().copied().unwrap_or(last), &payload)
        };
        let transport = packet.transport();
        for (kinds, expected) in [
            (&[][..], reason::RULE),
            (&[0, 60, 43, 135], reason::RULE),
            (&[60; 6], reason::RULE),
            (&[60; 7], reason::EXTENSION_HEADER),
            (&[60, 0], reason::EXTENSION_HEADER),
            // Fragments that are all of their datagram.
            (&[44], reason::RULE),
            (&[60, 44, 60], reason::RULE),
            (&[44, 44], reason::EXTENSION_HEADER),
            (&[44, 0], reason::EXTENSION_HEADER),
        ] {
            judge.expect_bytes(EGRESS, &chain(kinds, TCP, &transport), expected, &format!("headers {kinds:?}"));
        }
        let mut routed = chain(&[43], TCP, &transport);
        routed[43] = 1;
        judge.expect_bytes(EGRESS, &routed, reason::SOURCE_ROUTE, "segments left");
        let mut long = chain(&[60], TCP, &transport);
        long[41] = 200;
        judge.expect_bytes(EGRESS, &long, reason::MALFORMED, "a header beyond the end");
        for protocol in [50, 51, 59] {
            judge.expect_bytes(
                EGRESS,
                &chain(&[60], protocol, &transport),
                reason::NO_RULE,
                "a protocol, not a header",
            );
        }
    });
}

#[test]
fn addresses_that_no_mesh_carries_are_dropped_as_such() {
    let network = allowing(small(), "all", "any", "any", "any");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        let out_of_scope = [
            ["169.254.1.1", "224.0.0.1", "239.255.255.255", "255.255.255.255", "127.0.0.1", "0.0.0.0"],
            ["fe80::1", "febf::1", "ff02::1", "ff0e::1", "::1", "::"],
        ];
        for ([web, ..], others) in ENDS.into_iter().zip(out_of_scope) {
            for other in others {
                judge.expect(EGRESS, &opening(web, other, "udp/53"), reason::SCOPE);
                judge.expect(INGRESS, &opening(other, web, "udp/53"), reason::SCOPE);
            }
        }
        let in_scope = opening("10.42.1.1", "8.8.8.8", "udp/53");
        judge.expect(EGRESS, &in_scope, reason::UNKNOWN_DESTINATION);
        judge.expect(INGRESS, &in_scope.reply(), reason::UNKNOWN_SOURCE);
    });
}

#[test]
fn a_node_is_no_transit_but_for_what_it_is_the_gateway_of() {
    let network = allowing(small(), "all", "any", "any", "any");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        for [web, db, other, lan] in ENDS {
            judge.expect(EGRESS, &opening(web, db, "tcp/1"), reason::RULE);
            judge.expect(INGRESS, &opening(db, web, "tcp/1"), reason::RULE);
            judge.expect(EGRESS, &opening(web, lan, "tcp/1"), reason::RULE);
            for foreign in [other, db, lan] {
                judge.expect(EGRESS, &opening(foreign, web, "tcp/1"), reason::NOT_LOCAL);
                judge.expect(INGRESS, &opening(web, foreign, "tcp/1"), reason::NOT_LOCAL);
            }
        }
        lab.enforce(&network, node(&network, "db1"));
        let mut judge = lab.judge();
        for [web, db, _, lan] in ENDS {
            judge.expect(INGRESS, &opening(web, lan, "tcp/1"), reason::RULE);
            judge.expect(EGRESS, &opening(lan, web, "tcp/1"), reason::RULE);
            judge.expect(INGRESS, &opening(web, db, "tcp/1"), reason::RULE);
            judge.expect(EGRESS, &opening(web, db, "tcp/1"), reason::NOT_LOCAL);
        }
    });
}

#[test]
fn many_services_are_told_apart_as_few_are() {
    in_lab(|lab| {
        for most in 1..=12 {
            let ports = || (0..most).map(|number| 3 * number + 250);
            let network = ports().fold(small(), |network, port| {
                allowing(network, &format!("r{port}"), "cidr:web", "cidr:db", &format!("tcp/{port}-{}", port + 1))
            });
            lab.enforce(&network, node(&network, "web1"));
            let mut judge = lab.judge();
            for [web, db, ..] in ENDS {
                for port in 248..290 {
                    let allowed = ports().any(|first| (first..first + 2).contains(&port));
                    let expected = if allowed { reason::RULE } else { reason::NO_RULE };
                    judge.expect(EGRESS, &opening(web, db, &format!("tcp/{port}")), expected);
                    judge.expect(EGRESS, &opening(web, db, &format!("udp/{port}")), reason::NO_RULE);
                }
            }
        }
    });
}

#[test]
fn one_way_rules_let_answers_pass_and_nothing_else() {
    let network = allowing(small(), "tcp", "cidr:web", "cidr:db", "tcp/443");
    let network = allowing(network, "udp", "cidr:web", "cidr:db", "udp/53");
    let network = allowing(network, "ping", "cidr:web", "cidr:db", "icmp/8");
    let network = allowing(network, "ping6", "cidr:web", "cidr:db", "icmpv6/128");
    let network = allowing(network, "gre", "cidr:web", "cidr:db", "proto/47");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        for [web, db, ..] in ENDS {
            for service in ["tcp/443", "udp/53", echo(web), "proto/47"] {
                let packet = opening(web, db, service);
                let reply = packet.reply();
                judge.expect(INGRESS, &reply, reason::NO_RULE);
                judge.expect(EGRESS, &packet, reason::RULE);
                judge.expect(INGRESS, &reply, reason::REPLY);
                let other = reply.clone().with_source_port(9);
                if packet.protocol != 47 {
                    judge.expect(INGRESS, &other, reason::NO_RULE);
                }
                if packet.protocol == TCP {
                    judge.expect(INGRESS, &reply.clone().with_flags(SYN), reason::NO_RULE);
                    judge.expect(INGRESS, &reply.with_flags(ACK | FIN), reason::REPLY);
                }
            }
            // Type 13 has no answers, and a reset opens nothing.
            let reset = opening(web, db, "tcp/443").with_source_port(7).with_flags(RST);
            judge.expect(EGRESS, &reset, reason::RULE);
            judge.expect(INGRESS, &reset.reply(), reason::NO_RULE);
        }
    });
}

#[test]
fn a_record_says_who_opened_and_which_state() {
    let network = allowing(small(), "tcp", "cidr:web", "cidr:db", "tcp/443");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        let [web, db, ..] = ENDS[0];
        let packet = opening(web, db, "tcp/443");
        judge.expect(EGRESS, &packet, reason::RULE);
        let state = |judge: &mut Judge| {
            let flows = judge.probe.flows().expect("readable");
            assert_eq!(flows.len(), 1);
            assert_eq!(flows[0].0.source, packet.source.into());
            (flows[0].1.state, flows[0].1.packets, flows[0].1.reply_packets)
        };
        assert_eq!(state(&mut judge), (STATE_OPENING, 1, 0));
        judge.expect(INGRESS, &packet.reply(), reason::REPLY);
        assert_eq!(state(&mut judge), (STATE_ESTABLISHED, 1, 1));
    });
}

#[test]
fn a_revoked_flow_is_cut_in_both_directions_at_once() {
    let open = allowing(small(), "tcp", "cidr:web", "cidr:db", "tcp/443");
    let closed = with_rule(open.clone(), "no", Action::Deny, "cidr:web", "cidr:db", "tcp/443");
    in_lab(|lab| {
        let web1 = node(&open, "web1");
        lab.enforce(&open, web1);
        let mut judge = lab.judge();
        for [web, db, ..] in ENDS {
            let packet = opening(web, db, "tcp/443").with_flags(SYN);
            let data = packet.clone().with_flags(ACK);
            judge.expect(EGRESS, &packet, reason::RULE);
            judge.expect(INGRESS, &packet.reply(), reason::REPLY);
            lab.enforce(&closed, web1);
            judge = replaced(lab, judge);
            judge.expect(INGRESS, &packet.reply().with_flags(ACK), reason::REVOKED);
            judge.expect(EGRESS, &data, reason::DENY_RULE);
            assert!(judge.probe.flows().expect("readable").iter().any(|(_, flow)| flow.state == STATE_TOMBSTONE));
            // Allowed again: it stays dead until its opener sends.
            lab.enforce(&open, web1);
            judge = replaced(lab, judge);
            judge.expect(INGRESS, &packet.reply().with_flags(ACK), reason::REVOKED);
            judge.expect(EGRESS, &data, reason::RULE);
            judge.expect(INGRESS, &packet.reply().with_flags(ACK), reason::REPLY);
        }
    });
}

/// The same probe, told of the rules that came.
fn replaced(lab: &mut Lab, judge: Judge) -> Judge {
    Judge { slots: lab.slots.pairs().into_values().collect(), ..judge }
}

#[test]
fn an_icmp_error_passes_only_about_a_flow_that_is_allowed() {
    let network = allowing(small(), "tcp", "cidr:web", "cidr:db", "tcp/443");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        for [web, db, other, _] in ENDS {
            let (protocol, kinds): (u8, &[u8]) =
                if web.contains(':') { (ICMPV6, &[1, 2, 3, 4]) } else { (ICMP, &[3, 11, 12]) };
            let error = |kind: u8, source: &str, destination: &str, quoted: &[u8]| {
                let ends = flow(source, destination, "tcp/1");
                let mut payload = vec![kind, 0, 0, 0, 0, 0, 0, 0];
                payload.extend(quoted);
                ip(ends.source, ends.destination, protocol, &payload)
            };
            let allowed = opening(web, db, "tcp/443").to_bytes();
            for kind in kinds {
                judge.expect_bytes(
                    INGRESS,
                    &error(*kind, db, web, &allowed),
                    reason::ICMP_ERROR,
                    "about an allowed flow",
                );
                let unrelated = [
                    ("a flow that is not allowed", error(*kind, db, web, &opening(web, db, "tcp/444").to_bytes())),
                    ("a flow of another", error(*kind, db, web, &opening(other, db, "tcp/443").to_bytes())),
                    ("a flow to another, without a record", error(*kind, other, web, &allowed)),
                    ("an error", error(*kind, db, web, &error(*kind, web, db, &allowed))),
                    ("nothing", error(*kind, db, web, &[])),
                    ("too little", error(*kind, db, web, &allowed[..24])),
                ];
                for (what, bytes) in unrelated {
                    judge.expect_bytes(INGRESS, &bytes, reason::ICMP_ERROR_UNRELATED, what);
                }
            }
        }
        assert!(judge.probe.flows().expect("readable").is_empty(), "errors open nothing");
    });
}

#[test]
fn rules_pairs_and_events_say_which_packets_there_were() {
    let network = allowing(small(), "tcp", "cidr:web", "cidr:db", "tcp/443");
    in_lab(|lab| {
        let (slice, tables) = lab.enforce(&network, node(&network, "web1"));
        let mut judge = lab.judge();
        let slot = *tables.rule_slots.values().next().expect("one rule");
        let [web, db, ..] = ENDS[0];
        let packet = opening(web, db, "tcp/443");
        for _ in 0..3 {
            assert_eq!(judge.packet(EGRESS, &packet).rule, Some(slot));
        }
        let denied = opening(web, db, "udp/443");
        judge.expect(EGRESS, &denied, reason::NO_RULE);
        let counters = judge.probe.counters([slot]).expect("readable");
        let length = packet.to_bytes().len() as u64;
        assert_eq!((counters.rules[&slot].packets, counters.rules[&slot].bytes), (3, 3 * length));
        let id = |name: &str| slice.cidrs.iter().find(|(_, cidr)| cidr.to_string() == name).expect("a cidr").0.0;
        let pair = |wanted| counters.pairs.iter().find(|(key, _)| key.reason == wanted).expect("counted");
        for (reason, packets) in [(reason::RULE, 3), (reason::NO_RULE, 1)] {
            let (key, counter) = pair(reason);
            assert_eq!((key.source, key.destination, counter.packets), (id("web"), id("db"), packets));
        }
        let event = judge.probe.events().poll().expect("the denied one is reported");
        assert_eq!((event.reason, event.protocol, event.destination_port), (reason::NO_RULE, UDP, 443));
        assert_eq!((event.source, event.destination), (denied.source.into(), denied.destination.into()));
        assert_eq!(event.revision, slice.revision.0);
        assert!(judge.probe.events().poll().is_none());
    });
}

#[test]
fn a_switch_that_fails_leaves_the_running_policy() {
    let open = allowing(small(), "tcp", "cidr:web", "cidr:db", "tcp/443");
    let other = allowing(small(), "udp", "cidr:web", "cidr:db", "udp/53");
    in_lab(|lab| {
        let web1 = node(&open, "web1");
        let (_, tables) = lab.enforce(&open, web1);
        lab.datapath.settle().expect("settled");
        let generation = lab.generation();
        let (_, mut broken) = lab.lower(&other, web1);
        let whole = broken.clone();
        broken.matrix[0] = 9;
        let unchanged = |lab: &mut Lab| {
            assert_eq!(lab.generation(), generation);
            assert_eq!(lab.datapath.differences(&tables).expect("readable"), Vec::<String>::new());
            let mut judge = lab.judge();
            let [web, db, ..] = ENDS[0];
            judge.expect(EGRESS, &opening(web, db, "tcp/443"), reason::RULE);
            judge.expect(EGRESS, &opening(web, db, "udp/53"), reason::NO_RULE);
        };
        lab.datapath.switch(&broken).expect_err("tables that contradict themselves");
        unchanged(lab);
        // At the last step, with the idle copy filled.
        foreign::freeze(&lab.pin("maps/CONTROL")).expect("frozen");
        lab.datapath.switch(&whole).expect_err("a map that cannot be written");
        unchanged(lab);
    });
}

#[test]
fn probes_disturb_nothing() {
    let network = allowing(small(), "tcp", "cidr:web", "cidr:db", "tcp/443");
    in_lab(|lab| {
        lab.enforce(&network, node(&network, "web1"));
        let before = lab.datapath.counters(&[0]).expect("readable").rules;
        for [web, db, ..] in ENDS {
            let probed = lab.datapath.probe(&flow(web, db, "tcp/443"), EGRESS).expect("probed");
            assert_eq!((probed.passes, probed.reason, probed.rule), (true, reason::RULE, Some(0)));
        }
        assert_eq!(lab.datapath.flow_records().expect("readable"), 0);
        assert_eq!(lab.datapath.counters(&[0]).expect("readable").rules, before);
    });
}
