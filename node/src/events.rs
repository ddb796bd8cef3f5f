//! What the kernel reports of packets: all of it goes to the log, and what was denied to those who ask. The kernel limits
//! how much comes.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ebpf_common::event::Event as Seen;
use ebpf_common::packet::{TCP, UDP};
use ebpf_common::table::NO_RULE_SLOT;
use ebpf_common::{EGRESS, reason};
use jiff::{SignedDuration, Timestamp};
use policy::{CidrId, Flow};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::drops::Hub;
use crate::enforcer::Names;
use crate::kernel::datapath::{EventStream, monotonic_ns};
use crate::report::{Direction, Event};

/// How often it is asked what was suppressed and no event has told of yet.
const ASK: Duration = Duration::from_secs(1);

/// Passes events on for as long as it is polled.
pub async fn run(mut events: EventStream, names: watch::Receiver<Arc<Names>>, hub: Hub) {
    let mut ask = interval(ASK);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let result = tokio::select! {
            event = events.next() => event.map(|seen| pass_on(&seen, &names.borrow(), &hub)),
            _ = ask.tick() => events.suppressed().map(|counts| {
                for (reason, count) in counts {
                    hub.pending(reason::name(reason), count);
                }
            }),
        };
        if let Err(error) = result {
            tracing::warn!(%error, "events of the datapath cannot be read; denials are counted but not reported");
            return;
        }
    }
}

fn pass_on(seen: &Seen, names: &Names, hub: &Hub) {
    let event = event(seen, names, wall_clock(seen.time));
    let passed = reason::ALL.get(usize::from(seen.reason)).is_some_and(|(_, _, passes)| *passes);
    log(&event, passed, seen.suppressed);
    if !passed {
        hub.publish(event, seen.suppressed);
    }
}

/// When the programs' clock showed `then`.
fn wall_clock(then: u64) -> Timestamp {
    let ago = SignedDuration::from_nanos(monotonic_ns().saturating_sub(then).cast_signed());
    let now = Timestamp::now();
    now.checked_sub(ago).unwrap_or(now)
}

fn event(seen: &Seen, names: &Names, time: Timestamp) -> Event {
    let (source, destination) = (IpAddr::from(seen.source), IpAddr::from(seen.destination));
    let has_ports = matches!(seen.protocol, TCP | UDP);
    let flow = Flow { source, destination, protocol: seen.protocol, port: seen.destination_port };
    let cidr = |id: u32| {
        let name = || names.cidrs.get(&CidrId(id)).map_or_else(|| format!("cidr {id}"), ToString::to_string);
        (id != 0).then(name)
    };
    let rule = |slot: u32| names.rules.get(&slot).map_or_else(|| format!("rule in slot {slot}"), ToString::to_string);
    Event {
        time: format!("{time:.6}"),
        direction: if u32::from(seen.direction) == EGRESS { Direction::Egress } else { Direction::Ingress },
        source,
        destination,
        protocol: seen.protocol,
        source_port: has_ports.then_some(seen.source_port),
        destination_port: has_ports.then_some(seen.destination_port),
        service: flow.to_string().rsplit(' ').next().unwrap_or_default().to_owned(),
        source_cidr: cidr(seen.source_cidr),
        destination_cidr: cidr(seen.destination_cidr),
        reason: reason::name(seen.reason).to_owned(),
        rule: (seen.rule != NO_RULE_SLOT).then(|| rule(seen.rule)),
        revision: seen.revision,
        length: seen.length,
    }
}

fn log(event: &Event, passed: bool, suppressed: u64) {
    let source = match event.source_port {
        Some(port) => SocketAddr::new(event.source, port).to_string(),
        None => event.source.to_string(),
    };
    let Event { destination, service, reason, rule, direction, source_cidr, destination_cidr, length, .. } = event;
    let (source_cidr, destination_cidr) =
        (source_cidr.as_deref().unwrap_or("-"), destination_cidr.as_deref().unwrap_or("-"));
    let (rule, suppressed) = (rule.as_deref(), (suppressed > 0).then_some(suppressed));
    if passed {
        tracing::info!(
            source,
            %destination,
            service,
            reason,
            rule,
            %direction,
            source_cidr,
            destination_cidr,
            length,
            suppressed,
            "passed"
        );
    } else {
        tracing::info!(
            source,
            %destination,
            service,
            reason,
            rule,
            %direction,
            source_cidr,
            destination_cidr,
            length,
            suppressed,
            "denied"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebpf_common::table::Address;

    fn seen() -> Seen {
        Seen {
            source: Address::from_v4([10, 42, 1, 2]),
            destination: Address::from_v4([10, 42, 3, 2]),
            source_cidr: 3,
            destination_cidr: 4,
            rule: 2,
            revision: 7,
            length: 60,
            source_port: 40_000,
            destination_port: 5_432,
            protocol: 6,
            direction: EGRESS as u8,
            reason: reason::DENY_RULE,
            suppressed: 5,
            ..Seen::default()
        }
    }

    fn names() -> Names {
        Names {
            cidrs: [(CidrId(3), "web".parse().unwrap()), (CidrId(4), "db".parse().unwrap())].into(),
            rules: [(2, "no-db".parse().unwrap())].into(),
        }
    }

    #[test]
    fn an_event_names_time_ends_service_rule_and_cidrs() {
        let event = event(&seen(), &names(), Timestamp::UNIX_EPOCH);
        assert_eq!(
            serde_json::to_value(&event).unwrap(),
            serde_json::json!({
                "time": "1970-01-01T00:00:00.000000Z",
                "direction": "egress",
                "source": "10.42.1.2",
                "destination": "10.42.3.2",
                "protocol": 6,
                "source-port": 40_000,
                "destination-port": 5_432,
                "service": "tcp/5432",
                "source-cidr": "web",
                "destination-cidr": "db",
                "reason": "deny-rule",
                "rule": "no-db",
                "revision": 7,
                "length": 60,
            })
        );
    }

    #[test]
    fn what_is_not_known_is_not_named() {
        let seen = Seen { source_cidr: 0, destination_cidr: 9, rule: NO_RULE_SLOT, protocol: 1, ..seen() };
        let event = event(&seen, &names(), Timestamp::UNIX_EPOCH);
        assert_eq!((event.source_cidr, event.destination_cidr.as_deref(), event.rule), (None, Some("cidr 9"), None));
        assert_eq!((event.source_port, event.destination_port), (None, None), "an ICMP message has no ports");
    }

    #[test]
    fn what_was_denied_is_published_and_what_passed_is_not() {
        let hub = Hub::default();
        pass_on(&seen(), &names(), &hub);
        pass_on(&Seen { reason: reason::RULE, ..seen() }, &names(), &hub);
        let drops = hub.recent(&Default::default());
        assert_eq!(drops.drops.len(), 1);
        assert_eq!(drops.suppressed[0].events, 5);
    }

    #[test]
    fn the_programs_clock_is_told_in_wall_time() {
        let second = 1_000_000_000;
        let then = wall_clock(monotonic_ns() - 10 * second);
        let ago = Timestamp::now().duration_since(then);
        assert!(ago >= SignedDuration::from_secs(10), "{ago:?}");
        assert!(wall_clock(u64::MAX) >= then, "a clock that is ahead is not the future of the epoch");
    }
}
