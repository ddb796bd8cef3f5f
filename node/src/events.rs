//! Denied packets in the log. The kernel limits how many come.

use std::net::IpAddr;
use std::sync::Arc;

use ebpf_common::event::Event;
use ebpf_common::table::NO_RULE_SLOT;
use ebpf_common::{EGRESS, reason};
use policy::{CidrId, Flow};
use tokio::sync::watch;

use crate::enforcer::Names;
use crate::kernel::datapath::EventStream;

/// Logs events for as long as it is polled.
pub async fn run(mut events: EventStream, names: watch::Receiver<Arc<Names>>) {
    loop {
        match events.next().await {
            Ok(event) => log(&event, &names.borrow()),
            Err(error) => {
                tracing::warn!(%error, "events of the datapath cannot be read; denials are counted but not reported");
                return;
            }
        }
    }
}

/// One event in words.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    passed: bool,
    source: String,
    destination: String,
    service: String,
    reason: &'static str,
    rule: Option<String>,
    direction: &'static str,
    source_cidr: String,
    destination_cidr: String,
    length: u32,
    /// Events of this reason that the kernel did not report before this one.
    suppressed: u64,
}

fn log(event: &Event, names: &Names) {
    let Line {
        passed,
        source,
        destination,
        service,
        reason,
        rule,
        direction,
        source_cidr,
        destination_cidr,
        length,
        suppressed,
    } = line(event, names);
    let (rule, suppressed) = (rule.as_deref(), (suppressed > 0).then_some(suppressed));
    if passed {
        tracing::info!(
            source,
            destination,
            service,
            reason,
            rule,
            direction,
            source_cidr,
            destination_cidr,
            length,
            suppressed,
            "passed"
        );
    } else {
        tracing::info!(
            source,
            destination,
            service,
            reason,
            rule,
            direction,
            source_cidr,
            destination_cidr,
            length,
            suppressed,
            "denied"
        );
    }
}

fn line(event: &Event, names: &Names) -> Line {
    let (source, destination) = (IpAddr::from(event.source), IpAddr::from(event.destination));
    let flow = Flow { source, destination, protocol: event.protocol, port: event.destination_port };
    let service = flow.to_string();
    let cidr = |id: u32| match names.cidrs.get(&CidrId(id)) {
        Some(name) => name.to_string(),
        None if id == 0 => "-".to_owned(),
        None => format!("cidr {id}"),
    };
    Line {
        passed: reason::ALL.get(usize::from(event.reason)).is_some_and(|(_, _, passes)| *passes),
        source: with_port(source, event.source_port, event.protocol),
        destination: destination.to_string(),
        service: service.rsplit(' ').next().unwrap_or_default().to_owned(),
        reason: reason::name(event.reason),
        rule: (event.rule != NO_RULE_SLOT).then(|| {
            names.rules.get(&event.rule).map_or_else(|| format!("rule in slot {}", event.rule), ToString::to_string)
        }),
        direction: if u32::from(event.direction) == EGRESS { "egress" } else { "ingress" },
        source_cidr: cidr(event.source_cidr),
        destination_cidr: cidr(event.destination_cidr),
        length: event.length,
        suppressed: event.suppressed,
    }
}

fn with_port(address: IpAddr, port: u16, protocol: u8) -> String {
    match protocol {
        6 | 17 => std::net::SocketAddr::new(address, port).to_string(),
        _ => address.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebpf_common::table::Address;

    #[test]
    fn an_event_names_addresses_service_rule_and_cidrs() {
        let names = Names {
            cidrs: [(CidrId(3), "web".parse().unwrap()), (CidrId(4), "db".parse().unwrap())].into(),
            rules: [(2, "no-db".parse().unwrap())].into(),
        };
        let event = Event {
            source: Address::from_v4([10, 42, 1, 2]),
            destination: Address::from_v4([10, 42, 3, 2]),
            source_cidr: 3,
            destination_cidr: 4,
            rule: 2,
            source_port: 40_000,
            destination_port: 5_432,
            protocol: 6,
            direction: EGRESS as u8,
            reason: reason::DENY_RULE,
            ..Event::default()
        };
        let seen = line(&event, &names);
        assert_eq!((seen.source.as_str(), seen.destination.as_str()), ("10.42.1.2:40000", "10.42.3.2"));
        assert_eq!((seen.service.as_str(), seen.reason, seen.passed), ("tcp/5432", "deny-rule", false));
        assert_eq!((seen.rule.as_deref(), seen.direction), (Some("no-db"), "egress"));
        assert_eq!((seen.source_cidr.as_str(), seen.destination_cidr.as_str()), ("web", "db"));
        let unknown = line(&Event { source_cidr: 0, rule: NO_RULE_SLOT, ..event }, &names);
        assert_eq!((unknown.source_cidr.as_str(), unknown.rule), ("-", None));
    }
}
