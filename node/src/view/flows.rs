//! The records of flows in words.

use std::net::IpAddr;
use std::sync::Arc;

use ebpf_common::flow::{Flow as Record, FlowKey, STATE_CLOSING, STATE_ESTABLISHED, STATE_TOMBSTONE, idle_timeout_ns};
use ebpf_common::packet::{ICMP, ICMPV6, TCP, UDP};
use ebpf_common::reason;
use ebpf_common::table::{LOCAL, NO_RULE_SLOT};
use policy::Slice;

use crate::enforce::Enforcer;
use crate::kernel::datapath::monotonic_ns;
use crate::lower::{RuleSlots, Tables};
use crate::view::{Direction, FlowFilter, FlowState, Flows, LiveFlow, Unanswered};

/// Everything that the answer is made from, read at one moment; the rest need not hold up the enforcer.
pub struct Snapshot {
    records: Vec<(FlowKey, Record)>,
    /// Nanoseconds on the clock of the records.
    now: u64,
    slice: Option<Arc<Slice>>,
    /// Read where there is no slice to say whose an address is.
    tables: Option<Tables>,
    slots: RuleSlots,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("records", &self.records.len()).finish_non_exhaustive()
    }
}

/// Reads the records.
pub fn snapshot(enforcer: &mut Enforcer) -> Result<Snapshot, Unanswered> {
    let records = enforcer.datapath.list_flows().map_err(super::status::unanswered)?;
    let slice = enforcer.intent.as_ref().map(|intent| Arc::clone(&intent.slice));
    let tables = if slice.is_none() { enforcer.datapath.read_tables().ok() } else { None };
    Ok(Snapshot { records, now: monotonic_ns(), slice, tables, slots: enforcer.slots.clone() })
}

/// `nodectl flows`.
pub fn flows(snapshot: Snapshot, filter: FlowFilter) -> Flows {
    let total = snapshot.records.len();
    let admits = |key: &FlowKey| {
        filter
            .address
            .is_none_or(|net| net.contains(&IpAddr::from(key.source)) || net.contains(&IpAddr::from(key.destination)))
    };
    let mut admitted: Vec<_> = snapshot.records.iter().filter(|(key, _)| admits(key)).collect();
    let matching = admitted.len();
    admitted.sort_by_cached_key(|(key, _)| {
        let (source, destination) = (IpAddr::from(key.source), IpAddr::from(key.destination));
        (source, destination, key.protocol, key.source_port, key.destination_port)
    });
    let flows = admitted.into_iter().take(filter.limit).map(|(key, record)| snapshot.flow(key, record)).collect();
    Flows { total, matching, flows }
}

impl Snapshot {
    fn flow(&self, key: &FlowKey, record: &Record) -> LiveFlow {
        const SECOND: u64 = 1_000_000_000;
        let (source, destination) = (IpAddr::from(key.source), IpAddr::from(key.destination));
        // The programs' clock may be a little ahead.
        let idle = self.now.saturating_sub(record.seen);
        let echo = matches!(key.protocol, ICMP | ICMPV6);
        let has_ports = matches!(key.protocol, TCP | UDP);
        LiveFlow {
            direction: self.direction(source),
            source,
            destination,
            protocol: key.protocol,
            source_port: (has_ports || echo).then_some(key.source_port),
            destination_port: has_ports.then_some(key.destination_port),
            service: service(key),
            source_cidr: self.cidr(source),
            destination_cidr: self.cidr(destination),
            state: match record.state {
                STATE_ESTABLISHED => FlowState::Established,
                STATE_CLOSING => FlowState::Closing,
                STATE_TOMBSTONE => FlowState::Revoked,
                _ => FlowState::Opening,
            },
            reason: reason::name(record.reason).to_owned(),
            rule: (record.rule != NO_RULE_SLOT).then(|| self.rule(record.rule)),
            age: self.now.saturating_sub(record.opened) / SECOND,
            idle: idle / SECOND,
            expires_in: idle_timeout_ns(key.protocol, record.state).saturating_sub(idle) / SECOND,
            packets: record.packets,
            bytes: record.bytes,
            reply_packets: record.reply_packets,
            reply_bytes: record.reply_bytes,
        }
    }

    fn direction(&self, source: IpAddr) -> Option<Direction> {
        let own = match (&self.slice, &self.tables) {
            (Some(slice), _) => slice.stands_for(source),
            (None, Some(tables)) => tables.leaf(source).is_some_and(|leaf| leaf.flags & LOCAL != 0),
            (None, None) => return None,
        };
        Some(if own { Direction::Egress } else { Direction::Ingress })
    }

    fn cidr(&self, address: IpAddr) -> Option<String> {
        let slice = self.slice.as_ref()?;
        slice.lookup(address).and_then(|(_, cidr)| slice.cidrs.get(&cidr)).map(ToString::to_string)
    }

    fn rule(&self, slot: u32) -> String {
        let rule = self.slots.rule(slot).and_then(|rule| self.slice.as_ref()?.rules.get(&rule));
        rule.map_or_else(|| format!("rule in slot {slot}"), |rule| rule.name.to_string())
    }
}

/// As rules name it. Of an echo the record has no type: its identifier stands for the flow.
fn service(key: &FlowKey) -> String {
    match key.protocol {
        TCP => format!("tcp/{}", key.destination_port),
        UDP => format!("udp/{}", key.destination_port),
        ICMP => "icmp".to_owned(),
        ICMPV6 => "icmpv6".to_owned(),
        other => format!("proto/{other}"),
    }
}

#[cfg(test)]
mod tests {
    use ebpf_common::flow::STATE_OPENING;

    use super::*;
    use crate::fixture;

    const SECOND: u64 = 1_000_000_000;

    fn key(source: &str, destination: &str, protocol: u8, ports: [u16; 2]) -> FlowKey {
        let address = |text: &str| text.parse::<IpAddr>().unwrap().into();
        FlowKey {
            source: address(source),
            destination: address(destination),
            source_port: ports[0],
            destination_port: ports[1],
            protocol,
            _pad: [0; 3],
        }
    }

    fn snapshot(records: Vec<(FlowKey, Record)>) -> Snapshot {
        let slice = fixture::slice(&fixture::network(), "web1", 5);
        let mut slots = RuleSlots::new();
        crate::lower::lower(&slice, &mut slots).unwrap();
        Snapshot { records, now: 1_000 * SECOND, slice: Some(slice), tables: None, slots }
    }

    fn all() -> FlowFilter {
        FlowFilter { address: None, limit: usize::MAX }
    }

    #[test]
    fn a_record_is_shown_with_its_opener_rule_ages_and_counts() {
        let mut snapshot = snapshot(Vec::new());
        let rule = fixture::network().rule_named(&"web-to-app".parse().unwrap()).unwrap().id;
        let record = Record {
            opened: 900 * SECOND,
            seen: 990 * SECOND,
            packets: 3,
            bytes: 300,
            reply_packets: 2,
            reply_bytes: 200,
            rule: snapshot.slots.slot(rule).unwrap(),
            state: STATE_ESTABLISHED,
            reason: reason::RULE,
            ..Record::default()
        };
        snapshot.records.push((key("10.42.1.1", "10.42.2.1", TCP, [40_000, 8_080]), record));
        let flows = flows(snapshot, all());
        let shown = &flows.flows[0];
        assert_eq!((flows.total, flows.matching), (1, 1));
        assert_eq!((shown.direction, shown.service.as_str()), (Some(Direction::Egress), "tcp/8080"));
        assert_eq!((shown.source_port, shown.destination_port), (Some(40_000), Some(8_080)));
        assert_eq!((shown.source_cidr.as_deref(), shown.destination_cidr.as_deref()), (Some("web"), Some("app")));
        assert_eq!((shown.reason.as_str(), shown.rule.as_deref()), ("rule", Some("web-to-app")));
        assert_eq!((shown.age, shown.idle, shown.expires_in), (100, 10, 7_190));
        assert_eq!((shown.packets, shown.bytes, shown.reply_packets, shown.reply_bytes), (3, 300, 2, 200));
    }

    #[test]
    fn states_are_told_apart_and_what_is_due_expires_now() {
        let flow = |state, port| {
            let record = Record { state, rule: NO_RULE_SLOT, reason: reason::LINEAGE, ..Record::default() };
            (key("10.42.2.1", "10.42.1.1", TCP, [port, 80]), record)
        };
        let states = [STATE_OPENING, STATE_ESTABLISHED, STATE_CLOSING, STATE_TOMBSTONE];
        let records = states.iter().zip(1..).map(|(state, port)| flow(*state, port)).collect();
        let flows = flows(snapshot(records), all());
        let seen: Vec<_> = flows.flows.iter().map(|flow| flow.state).collect();
        assert_eq!(seen, [FlowState::Opening, FlowState::Established, FlowState::Closing, FlowState::Revoked]);
        assert_eq!((flows.flows[0].expires_in, flows.flows[0].direction), (0, Some(Direction::Ingress)));
        assert_eq!(flows.flows[0].rule, None);
    }

    #[test]
    fn the_order_is_that_of_addresses_and_limit_and_filter_are_said() {
        let ends = [
            ("fd42:0:0:1::1", "fd42:0:0:2::1"),
            ("10.42.1.200", "10.42.2.1"),
            ("10.42.1.3", "10.42.2.1"),
            ("10.42.1.3", "10.42.2.0"),
        ];
        let records: Vec<_> = ends
            .iter()
            .map(|(a, b)| (key(a, b, UDP, [1, 53]), Record { rule: NO_RULE_SLOT, ..Record::default() }))
            .collect();
        let shown = |filter| {
            let flows = flows(snapshot(records.clone()), filter);
            let ends: Vec<_> = flows.flows.iter().map(|flow| format!("{} {}", flow.source, flow.destination)).collect();
            (flows.total, flows.matching, ends.join(", "))
        };
        let sorted = "10.42.1.3 10.42.2.0, 10.42.1.3 10.42.2.1, 10.42.1.200 10.42.2.1, fd42:0:0:1::1 fd42:0:0:2::1";
        assert_eq!(shown(all()), (4, 4, sorted.to_owned()));
        let net = |text: &str| Some(text.parse().unwrap());
        assert_eq!(
            shown(FlowFilter { address: net("10.42.1.3/32"), limit: 1 }),
            (4, 2, "10.42.1.3 10.42.2.0".to_owned())
        );
        assert_eq!(shown(FlowFilter { address: net("10.42.2.0/24"), limit: 9 }).1, 3);
        assert_eq!(shown(FlowFilter { address: net("10.43.0.0/16"), limit: 9 }), (4, 0, String::new()));
    }
}
