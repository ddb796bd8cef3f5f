//! One answer of each kind, for tests of how answers travel and print.

use super::verified::{ClassEnd, Detail, Differing, Ownership, Said};
use super::*;

/// When somebody asks, in seconds since the epoch.
pub(crate) const NOW: u64 = 1_767_229_200;

pub(crate) fn status() -> Status {
    Status {
        network: "corp".to_owned(),
        node: "web1".to_owned(),
        interface: "rampart0".to_owned(),
        version: "0.1.0".to_owned(),
        addresses: vec![[10, 42, 1, 2].into(), "fd42:0:0:1::2".parse().unwrap()],
        wireguard: "kernel".to_owned(),
        listen_port: 51_820,
        public_key: "2tq7O1NCAJhW1xTGeFCkFH5nVZlAGSWFS0Jmo2Y2zlE=".to_owned(),
        link_up: true,
        attachment: Some("tcx".to_owned()),
        early_drop: "on".to_owned(),
        programs: vec![
            Program { hook: "tc ingress".to_owned(), position: 1, id: Some(41), name: None, ours: true },
            Program {
                hook: "tc egress".to_owned(),
                position: 2,
                id: Some(40),
                name: Some("shaper".to_owned()),
                ours: false,
            },
            Program { hook: "tc egress".to_owned(), position: 3, id: None, name: Some("u32".to_owned()), ours: false },
        ],
        revision: 7,
        generation: 3,
        received_revision: 8,
        controller: Controller {
            connected: true,
            endpoints: vec!["192.0.2.1:7443".to_owned()],
            since: 1_767_225_600,
            error: None,
        },
        peers: 2,
        flow_records: 12,
        guard: Guard {
            enabled: true,
            error: None,
            attachments: vec![
                GuardAttachment {
                    interface: "eth0".to_owned(),
                    hook: Some("xdp".to_owned()),
                    ahead: 1,
                    note: Some("generic mode".to_owned()),
                    passed: 120,
                    dropped: [("wrong-mac".to_owned(), 9), ("too-many".to_owned(), 2)].into(),
                },
                GuardAttachment {
                    interface: "eth1".to_owned(),
                    hook: None,
                    ahead: 0,
                    note: None,
                    passed: 0,
                    dropped: Default::default(),
                },
            ],
        },
        drift_repairs: 1,
        certificate_expires_at: 1_798_761_600,
        lacks: vec!["shadow-rules".to_owned()],
        error: Some("the interface cannot be configured".to_owned()),
    }
}

/// Of a daemon that has just begun.
pub(crate) fn fresh_status() -> Status {
    Status {
        addresses: Vec::new(),
        link_up: false,
        attachment: None,
        early_drop: "off".to_owned(),
        programs: Vec::new(),
        revision: 0,
        generation: 0,
        received_revision: 0,
        controller: Controller { error: Some("refused the connection".to_owned()), ..Controller::default() },
        peers: 0,
        flow_records: 0,
        guard: Guard::default(),
        drift_repairs: 0,
        certificate_expires_at: 0,
        lacks: Vec::new(),
        error: None,
        ..status()
    }
}

pub(crate) fn peers() -> Vec<Peer> {
    let peer = |name: Option<&str>, state| Peer {
        name: name.map(str::to_owned),
        public_key: "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=".to_owned(),
        endpoint: Some("198.51.100.7:51820".parse().unwrap()),
        allowed_ips: vec!["10.42.2.1/32".parse().unwrap(), "fd42:0:0:2::1/128".parse().unwrap()],
        latest_handshake: Some(NOW - 190),
        received_bytes: 1_536,
        sent_bytes: 12,
        state,
    };
    let missing = Peer {
        endpoint: None,
        allowed_ips: Vec::new(),
        latest_handshake: None,
        ..peer(Some("db1"), PeerState::Missing)
    };
    vec![
        peer(Some("app1"), PeerState::Ok),
        missing,
        peer(Some("app2"), PeerState::Differs),
        peer(None, PeerState::Unknown),
    ]
}

pub(crate) fn policy() -> Policy {
    let end = |cidr: &str, only: &[&str]| End {
        cidr: cidr.to_owned(),
        only: only.iter().map(|prefix| prefix.parse().unwrap()).collect(),
    };
    let first = Entry {
        direction: Direction::Egress,
        source: end("web", &[]),
        destination: end("app", &["10.42.2.1/32", "fd42:0:0:2::1/128"]),
        services: vec!["tcp/8080".to_owned(), "icmp".to_owned()],
        verdict: "allow".to_owned(),
        decided_by: "web-to-app (log)".to_owned(),
        packets: Some(3),
        bytes: Some(300),
    };
    let second = Entry {
        direction: Direction::Ingress,
        source: end("app", &[]),
        destination: end("web", &[]),
        services: Vec::new(),
        verdict: "deny".to_owned(),
        decided_by: "no-rule".to_owned(),
        packets: None,
        bytes: None,
    };
    Policy {
        status: Status { received_revision: 7, error: None, lacks: Vec::new(), ..status() },
        differences: vec!["peer `app1` is not configured".to_owned()],
        entries: vec![first, second],
    }
}

/// A difference of each kind.
pub(crate) fn verified() -> Verified {
    let end = |addresses: &str, cidr: &str| ClassEnd { addresses: addresses.to_owned(), cidr: cidr.to_owned() };
    let ownership = |cidr: Option<&str>, gateway: Option<&str>| Ownership {
        cidr: cidr.map(str::to_owned),
        local: gateway.is_none(),
        external: gateway.is_some(),
        gateway: gateway.map(str::to_owned),
    };
    let said = |verdict: &str, rule: Option<&str>| Said {
        verdict: verdict.to_owned(),
        reason: "rule".to_owned(),
        rule: rule.map(str::to_owned),
        slot: rule.map(|_| 4),
        log: rule.is_none(),
    };
    let details = [
        Detail::Revision { intended: 7, found: 6 },
        Detail::Malformed { table: "BLOCKS".to_owned(), index: 3, what: "points beyond the table".to_owned() },
        Detail::Prefix {
            addresses: "10.42.1.0/24".to_owned(),
            intended: ownership(Some("web"), None),
            found: ownership(None, Some("gw1")),
        },
        Detail::Cell {
            direction: Direction::Egress,
            source: end("10.42.1.0/24", "web"),
            destination: end("10.42.2.1-10.42.2.9", "app"),
            service: "tcp/8080".to_owned(),
            intended: said("allow", Some("web-to-app")),
            found: said("deny", None),
        },
        Detail::Record {
            direction: Direction::Ingress,
            source: end("10.42.2.0/24", "app"),
            destination: end("10.42.1.0/24", "web"),
            intended: true,
            found: false,
        },
    ];
    let differences = details.into_iter().zip(1..);
    Verified {
        equal: false,
        revision: 7,
        generation: 3,
        prefixes: 14,
        cells: 9,
        differences: differences.map(|(detail, n)| Differing { text: format!("difference {n}"), detail }).collect(),
        more: 2,
    }
}

pub(crate) fn explanation() -> Explanation {
    let said = |allowed, reason: &str, rule: Option<&str>| Answer {
        allowed,
        reason: reason.to_owned(),
        rule: rule.map(str::to_owned),
    };
    Explanation {
        source: [10, 42, 1, 2].into(),
        destination: [10, 42, 2, 2].into(),
        service: "tcp/8080".to_owned(),
        source_cidr: Some("web".to_owned()),
        destination_cidr: None,
        kernel: vec![KernelAnswer { direction: Direction::Egress, answer: said(true, "rule", Some("web-to-app")) }],
        compiled: Some(said(true, "rule", Some("web-to-app"))),
        interpreted: Interpreted {
            unavailable: Some("the controller is not connected".to_owned()),
            ..Interpreted::default()
        },
        revision: 7,
        agree: true,
        allowed: true,
    }
}

/// One in which the interpreter has answered, and does not agree.
pub(crate) fn contradiction() -> Explanation {
    let denied = Answer { allowed: false, reason: "no-rule".to_owned(), rule: None };
    let interpreted = Interpreted { answer: Some(denied), revision: Some(7), unavailable: None };
    Explanation { interpreted, agree: false, ..explanation() }
}

pub(crate) fn flows() -> Flows {
    let flow = LiveFlow {
        direction: Some(Direction::Ingress),
        source: [10, 42, 1, 2].into(),
        destination: [10, 42, 3, 2].into(),
        protocol: 6,
        source_port: Some(40_000),
        destination_port: Some(443),
        service: "tcp/443".to_owned(),
        source_cidr: Some("web".to_owned()),
        destination_cidr: Some("db".to_owned()),
        state: FlowState::Revoked,
        reason: "rule".to_owned(),
        rule: Some("web-to-db".to_owned()),
        age: 61,
        idle: 1,
        expires_in: 59,
        packets: 3,
        bytes: 300,
        reply_packets: 2,
        reply_bytes: 2_048,
    };
    let echo = LiveFlow {
        direction: None,
        source: "fd42:0:0:1::2".parse().unwrap(),
        destination: "fd42:0:0:2::2".parse().unwrap(),
        protocol: 58,
        destination_port: None,
        service: "icmpv6".to_owned(),
        source_cidr: None,
        state: FlowState::Opening,
        reason: "lineage".to_owned(),
        rule: None,
        age: 7_300,
        ..flow.clone()
    };
    let of = |state| LiveFlow { state, ..flow.clone() };
    let flows = vec![flow.clone(), echo, of(FlowState::Established), of(FlowState::Closing)];
    Flows { total: 12, matching: 9, flows }
}

pub(crate) fn event() -> Event {
    Event {
        time: "2026-01-01T00:00:00.000000Z".to_owned(),
        direction: Direction::Egress,
        interface: "rampart0".to_owned(),
        source: [10, 42, 1, 2].into(),
        destination: [10, 42, 3, 2].into(),
        protocol: 6,
        source_port: Some(40_000),
        destination_port: Some(5_432),
        service: "tcp/5432".to_owned(),
        source_cidr: Some("web".to_owned()),
        destination_cidr: None,
        reason: "no-rule".to_owned(),
        rule: None,
        revision: Some(7),
        length: 60,
    }
}

pub(crate) fn drops() -> Drops {
    let suppressed = Suppressed { reason: "no-rule".to_owned(), events: 1_204, since_last: None };
    let forged = Event {
        direction: Direction::Ingress,
        interface: "eth0".to_owned(),
        source: "2001:db8::1".parse().unwrap(),
        destination: "2001:db8::2".parse().unwrap(),
        source_port: None,
        destination_port: None,
        reason: "wrong-mac".to_owned(),
        rule: Some("nothing-in".to_owned()),
        revision: None,
        ..event()
    };
    Drops { drops: vec![event(), forged], forgotten: 3, suppressed: vec![suppressed] }
}

/// A record of each kind.
pub(crate) fn records() -> Vec<DropRecord> {
    let suppressed = |since_last| Suppressed { reason: "no-rule".to_owned(), events: 9, since_last };
    vec![
        DropRecord::Forgotten { events: 4 },
        DropRecord::Suppressed(suppressed(None)),
        DropRecord::Drop(event()),
        DropRecord::Suppressed(suppressed(Some(4))),
        DropRecord::Missed { records: 4 },
    ]
}
