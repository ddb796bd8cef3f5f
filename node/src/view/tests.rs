//! Views of a kernel in memory.

use ::policy::{Change, Network, Revision};
use ebpf_common::counter::Counter;
use ebpf_common::table::ALLOW;
use ebpf_common::{EGRESS, INGRESS, reason};

use super::explanation::{agree, explain};
use super::policy::{key, policy};
use super::status::{Context, peers};
use super::*;
use crate::enforce::tests::Node;
use crate::fixture;

fn context() -> Context {
    Context {
        network: "corp".to_owned(),
        node: "web1".to_owned(),
        interface: "rampart0".to_owned(),
        listen_port: 51_820,
        received_revision: 5,
        controller: Default::default(),
        certificate_expires_at: 0,
    }
}

fn enforcing(network: &Network) -> Node {
    let mut node = Node::new();
    node.enforcer.enforce(fixture::slice(network, "web1", 5));
    node
}

fn lines(policy: &Policy) -> Vec<String> {
    let count = |count: Option<u64>| count.map_or("-".to_owned(), |count| count.to_string());
    let line = |entry: &Entry| {
        let Entry { direction, source, destination, services, verdict, decided_by, packets, bytes } = entry;
        let services = services.join(" ");
        format!(
            "{direction} {source} > {destination} [{services}] {verdict} {decided_by} {} {}",
            count(*packets),
            count(*bytes)
        )
    };
    policy.entries.iter().map(line).collect()
}

fn count(node: &Node, network: &Network, direction: u32, ends: (&str, &str), reason: u8, packets: u64) {
    let id = |cidr: &str| network.cidr_named(&cidr.parse().unwrap()).unwrap().id.0;
    let key = key(direction, (id(ends.0), 0), (id(ends.1), 0), reason);
    let counter = Counter { packets, bytes: packets * 100, segments: packets };
    node.kernel.world().counters.pairs.insert(key, counter);
}

#[test]
fn the_kernels_tables_are_shown_in_the_words_of_the_policy_with_their_counters() {
    let network = fixture::network();
    let mut node = enforcing(&network);
    count(&node, &network, EGRESS, ("web", "app"), reason::RULE, 3);
    count(&node, &network, EGRESS, ("web", "app"), reason::NO_RULE, 2);
    count(&node, &network, INGRESS, ("app", "web"), reason::REPLY, 1);
    let shown = policy(&mut node.enforcer, &context()).unwrap();
    assert_eq!(shown.differences, [""; 0]);
    assert_eq!(
        lines(&shown),
        [
            "egress web > app [tcp/8080] allow web-to-app 3 300",
            "egress web > app [any other] deny no-rule 2 200",
            "ingress app > web [] allow reply 1 100",
        ]
    );
}

#[test]
fn addresses_that_the_policy_tells_apart_are_shown_apart() {
    let mut network = fixture::network();
    fixture::allow(&mut network, "ssh-to-app1", "cidr:web", "node:app1", "tcp/22");
    let mut node = enforcing(&network);
    count(&node, &network, EGRESS, ("web", "app"), reason::RULE, 3);
    let shown = policy(&mut node.enforcer, &context()).unwrap();
    assert_eq!(
        lines(&shown),
        [
            "egress web > app [tcp/8080] allow web-to-app 3 300",
            "egress web > app (10.42.2.1/32 fd42:0:0:2::1/128) [tcp/22] allow ssh-to-app1 - -",
            "egress web > app (10.42.2.1/32 fd42:0:0:2::1/128) [tcp/8080] allow web-to-app - -",
        ]
    );
}

#[test]
fn tables_peers_and_programs_that_are_not_the_policys_are_named() {
    let mut node = enforcing(&fixture::network());
    node.kernel.world().tables.as_mut().unwrap().decisions[0].verdict ^= 1;
    node.kernel.world().device.as_mut().unwrap().peers.clear();
    node.kernel.world().datapath.as_mut().unwrap().ingress = false;
    let shown = policy(&mut node.enforcer, &context()).unwrap();
    for word in ["DECISIONS[0]", "at ingress", "peer `app1` is not configured"] {
        assert!(
            shown.differences.iter().any(|difference| difference.contains(word)),
            "{word}: {:?}",
            shown.differences
        );
    }
    let peers = peers(&mut node.enforcer).unwrap();
    assert_eq!((peers[0].name.as_deref(), peers[0].state), (Some("app1"), PeerState::Missing));
}

#[test]
fn without_a_policy_everything_is_said_to_be_denied() {
    let mut node = Node::new();
    let shown = policy(&mut node.enforcer, &context()).unwrap();
    assert_eq!((shown.status.generation, shown.entries.len(), shown.differences.len()), (0, 0, 0));
    let question =
        Question { source: [10, 42, 1, 1].into(), destination: [10, 42, 2, 1].into(), protocol: 6, port: 80 };
    assert!(explain(&mut node.enforcer, question).unwrap_err().to_string().contains("no policy"));
}

#[test]
fn kernel_and_policy_explain_alike_until_somebody_touches_the_tables() {
    let mut node = enforcing(&fixture::network());
    let question = |destination: [u8; 4], port| Question {
        source: [10, 42, 1, 1].into(),
        destination: destination.into(),
        protocol: 6,
        port,
    };
    for (question, allowed, reason) in [
        (question([10, 42, 2, 1], 8_080), true, "rule"),
        (question([10, 42, 2, 1], 8_081), false, "no-rule"),
        (question([10, 42, 9, 9], 8_080), false, "unknown-destination"),
        (question([10, 43, 9, 9], 8_080), false, "unknown-destination"),
        (question([224, 0, 0, 1], 8_080), false, "scope"),
    ] {
        let explanation = explain(&mut node.enforcer, question).unwrap();
        assert!(agree(&explanation), "{explanation:?}");
        assert_eq!((explanation.allowed, explanation.kernel[0].answer.reason.as_str()), (allowed, reason));
    }
    let foreign = Question { source: [10, 42, 3, 1].into(), ..question([10, 42, 2, 1], 80) };
    assert!(explain(&mut node.enforcer, foreign).unwrap_err().to_string().contains("`10.42.3.1`"));
    for decision in node.kernel.world().tables.as_mut().unwrap().decisions.iter_mut() {
        decision.verdict = ALLOW;
    }
    let explanation = explain(&mut node.enforcer, question([10, 42, 2, 1], 8_081)).unwrap();
    assert!(!agree(&explanation));
}

#[test]
fn an_interpreter_that_is_ahead_counts_and_one_that_is_behind_does_not() {
    let mut node = enforcing(&fixture::network());
    let question =
        Question { source: [10, 42, 1, 1].into(), destination: [10, 42, 2, 1].into(), protocol: 6, port: 8_080 };
    let mut explanation = explain(&mut node.enforcer, question).unwrap();
    for (revision, agreed) in [(4, true), (5, false), (6, false)] {
        let denied = Answer { allowed: false, reason: "no-rule".to_owned(), rule: None };
        explanation.interpreted = Interpreted { answer: Some(denied), revision: Some(revision), unavailable: None };
        assert_eq!(agree(&explanation), agreed, "revision {revision}");
    }
}

#[test]
fn metrics_name_peers_rules_and_cidrs() {
    let mut network = fixture::network();
    let delete = Change::DeleteRule { name: "app-to-db".parse().unwrap() };
    network.apply(&delete).unwrap();
    let mut node = enforcing(&network);
    count(&node, &network, EGRESS, ("web", "app"), reason::RULE, 3);
    let slot = node.enforcer.slots.slot(network.rule_named(&"web-to-app".parse().unwrap()).unwrap().id).unwrap();
    let counter = Counter { packets: 4, bytes: 400, segments: 4 };
    node.kernel.world().counters.rules.insert(slot, counter);
    let families = crate::serve::scrape::collect(&mut node.enforcer, &context()).unwrap();
    let text = crate::serve::scrape::open_metrics(families).unwrap();
    let key = fixture::public_key("app1");
    for line in [
        "rampart_packets_total{direction=\"egress\",verdict=\"allow\",reason=\"rule\",source=\"web\",destination=\"app\"} 3",
        "rampart_rule_packets_total{rule=\"web-to-app\"} 4",
        "rampart_policy_revision 5",
        "rampart_policy_generation 1",
        "rampart_controller_connected 0",
        "rampart_drift_repairs_total{kind=\"peer\"} 0",
        &format!("wireguard_sent_bytes_total{{interface=\"rampart0\",public_key=\"{key}\",friendly_name=\"app1\"}} 0"),
    ] {
        assert!(text.lines().any(|seen| seen == line), "{line} is not in\n{text}");
    }
}

#[test]
fn a_policy_in_force_that_the_disk_does_not_have_yet_is_shown_as_such() {
    let network = fixture::network();
    let node = enforcing(&network);
    node.kernel.world().datapath.as_mut().unwrap().revision = Revision(6);
    let mut node = node.restart();
    let shown = policy(&mut node.enforcer, &context()).unwrap();
    assert_eq!(
        shown.differences,
        ["revision 6 is newer than revision 5, which is on disk; it stays until the controller answers"]
    );
    assert!(!shown.entries.is_empty());
}
