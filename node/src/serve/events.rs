//! What the kernel reports of packets: all of it goes to the log, and what was denied or dropped to those who ask. The kernel
//! limits how much comes.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use aya::Pod;
use ebpf_common::event::Event as Seen;
use ebpf_common::packet::{TCP, UDP};
use ebpf_common::table::NO_RULE_SLOT;
use ebpf_common::underlay::{self, Event as Dropped};
use ebpf_common::{EGRESS, reason};
use jiff::{SignedDuration, Timestamp};
use nix::net::if_::if_indextoname;
use policy::{CidrId, Flow};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::enforce::Names;
use crate::kernel::datapath::{EventStream, monotonic_ns};
use crate::serve::drops::Hub;
use crate::view::{Direction, Event};

/// How often it is asked what was suppressed and no event has told of yet.
const ASK: Duration = Duration::from_secs(1);

/// Passes on what the policy's programs report, for as long as it is polled. `interface` is WireGuard's.
pub async fn run(events: EventStream, interface: &str, names: watch::Receiver<Arc<Names>>, hub: Hub) {
    let pass_on = |seen: Seen| pass_on(&seen, interface, &names.borrow(), &hub);
    if let Err(error) = follow(events, reason::name, &hub, pass_on).await {
        tracing::warn!(%error, "events of the datapath cannot be read; denials are counted but not reported");
    }
}

/// Likewise what the guard reports.
pub async fn run_guard(events: EventStream<Dropped>, hub: Hub) {
    if let Err(error) = follow(events, underlay::reason::name, &hub, |seen| pass_on_dropped(&seen, &hub)).await {
        tracing::warn!(%error, "events of the guard cannot be read; what it drops is counted but not reported");
    }
}

/// Until the maps are made anew.
async fn follow<E: Pod>(
    mut events: EventStream<E>,
    name: fn(u8) -> &'static str,
    hub: &Hub,
    pass_on: impl Fn(E),
) -> io::Result<()> {
    let mut ask = interval(ASK);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = events.next() => pass_on(event?),
            _ = ask.tick() => {
                for (reason, count) in events.suppressed()? {
                    hub.pending(name(reason), count);
                }
                if !events.is_current() {
                    return Ok(());
                }
            }
        }
    }
}

fn pass_on(seen: &Seen, interface: &str, names: &Names, hub: &Hub) {
    let event = event(seen, interface, names, wall_clock(seen.time));
    let passed = reason::ALL.get(usize::from(seen.reason)).is_some_and(|(_, _, passes)| *passes);
    log(&event, passed, seen.suppressed);
    if !passed {
        hub.publish(event, seen.suppressed);
    }
}

fn pass_on_dropped(seen: &Dropped, hub: &Hub) {
    let event = dropped(seen, wall_clock(seen.time));
    let Event { source, source_port, reason, interface, length, .. } = &event;
    // The log at its usual level has a line a minute about all of them.
    tracing::debug!(%source, source_port, reason, interface, length, suppressed = seen.suppressed, "dropped by the guard");
    hub.publish(event, seen.suppressed);
}

/// When the programs' clock showed `then`.
fn wall_clock(then: u64) -> Timestamp {
    let ago = SignedDuration::from_nanos(monotonic_ns().saturating_sub(then).cast_signed());
    let now = Timestamp::now();
    now.checked_sub(ago).unwrap_or(now)
}

fn event(seen: &Seen, interface: &str, names: &Names, time: Timestamp) -> Event {
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
        interface: interface.to_owned(),
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
        revision: Some(seen.revision),
        length: seen.length,
    }
}

fn dropped(seen: &Dropped, time: Timestamp) -> Event {
    let index = seen.interface;
    // It may have gone meanwhile; then nix says an empty name and no error.
    let name = if_indextoname(index).ok().and_then(|name| name.into_string().ok()).filter(|name| !name.is_empty());
    Event {
        time: format!("{time:.6}"),
        direction: Direction::Ingress,
        interface: name.unwrap_or_else(|| format!("interface {index}")),
        source: seen.source.into(),
        destination: seen.destination.into(),
        protocol: UDP,
        source_port: Some(seen.source_port),
        destination_port: Some(seen.destination_port),
        service: format!("udp/{}", seen.destination_port),
        source_cidr: None,
        destination_cidr: None,
        reason: underlay::reason::name(seen.reason).to_owned(),
        rule: None,
        revision: None,
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

    fn cidr(name: &str) -> policy::SliceCidr {
        let prefixes = policy::Prefixes::from_nets(["10.42.0.0/16".parse().unwrap()]).unwrap();
        policy::SliceCidr { name: name.parse().unwrap(), prefixes, is_routed: false }
    }

    fn names() -> Names {
        Names {
            cidrs: [(CidrId(3), cidr("web")), (CidrId(4), cidr("db"))].into_iter().collect(),
            rules: policy::Map::unit(2, "no-db".parse().unwrap()),
        }
    }

    #[test]
    fn an_event_names_time_ends_service_rule_and_cidrs() {
        let event = event(&seen(), "rampart0", &names(), Timestamp::UNIX_EPOCH);
        assert_eq!(
            serde_json::to_value(&event).unwrap(),
            serde_json::json!({
                "time": "1970-01-01T00:00:00.000000Z",
                "direction": "egress",
                "interface": "rampart0",
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
        let event = event(&seen, "rampart0", &names(), Timestamp::UNIX_EPOCH);
        assert_eq!((event.source_cidr, event.destination_cidr.as_deref(), event.rule), (None, Some("cidr 9"), None));
        assert_eq!((event.source_port, event.destination_port), (None, None), "an ICMP message has no ports");
    }

    #[test]
    fn what_was_denied_is_published_and_what_passed_is_not() {
        let hub = Hub::default();
        pass_on(&seen(), "rampart0", &names(), &hub);
        pass_on(&Seen { reason: reason::RULE, ..seen() }, "rampart0", &names(), &hub);
        let drops = hub.recent(&Default::default());
        assert_eq!(drops.drops.len(), 1);
        assert_eq!(drops.suppressed[0].events, 5);
    }

    #[test]
    fn what_the_guard_dropped_is_published_without_what_it_cannot_know() {
        let hub = Hub::default();
        let seen = Dropped {
            source: Address::from_v4([198, 51, 100, 7]),
            destination: Address::from_v4([192, 0, 2, 1]),
            interface: u32::MAX,
            source_port: 4_000,
            destination_port: 51_820,
            reason: underlay::reason::LIMITED_SOURCE,
            suppressed: 3,
            length: 176,
            ..Dropped::default()
        };
        pass_on_dropped(&seen, &hub);
        let drops = hub.recent(&Default::default());
        let Event { direction, interface, source, source_port, service, reason, rule, revision, .. } = &drops.drops[0];
        assert_eq!((*direction, interface.as_str()), (Direction::Ingress, "interface 4294967295"));
        assert_eq!((source.to_string().as_str(), *source_port), ("198.51.100.7", Some(4_000)));
        assert_eq!((service.as_str(), reason.as_str()), ("udp/51820", "limited-source"));
        assert_eq!((rule, revision), (&None, &None));
        assert_eq!(drops.suppressed[0].events, 3);
    }

    #[test]
    fn a_reason_is_of_the_policy_or_of_the_guard() {
        let guards = |name| underlay::reason::ALL.iter().any(|(_, other, _)| *other == name);
        assert!(reason::ALL.iter().all(|(_, name, _)| !guards(*name)), "their events and counts would be mixed up");
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
