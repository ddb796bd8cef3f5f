//! What Prometheus fetches: read from the kernel at the moment of the scrape.

use std::fmt;

use ebpf_common::counter::{
    Counter, LOSS_EVENT_FULL, LOSS_EVENT_LIMITED, LOSS_FLOW, LOSS_FLOW_QUOTA, LOSS_FRAGMENT, LOSS_PAIR,
};
use ebpf_common::{reason, underlay};
use policy::CidrId;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::enforce::Enforcer;
use crate::enforce::guard;
use crate::enforce::reconcile::Step;
use crate::kernel::inspect::Counters;
use crate::kernel::{Attachment, Backend, Device, Program};
use crate::verify::finding::{Finding, Record};
use crate::view::Unanswered;
use crate::view::status::Context;
use host::clock::seconds;
use host::error::chain;

/// One metric with all its label sets. A counter's name is without its `_total`.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: Kind,
    pub samples: Vec<(Labels, u64)>,
}

type Labels = Vec<(&'static str, String)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    /// A gauge of seconds, given in microseconds.
    Seconds,
}

/// Reads everything. Runs on the enforcer's thread.
pub fn collect(enforcer: &mut Enforcer, context: &Context) -> Result<Vec<Family>, Unanswered> {
    let observed = enforcer.observe().map_err(|error| Unanswered::Kernel(chain(&error)))?;
    let slots: Vec<u32> = enforcer.slots.pairs().into_values().collect();
    let mut families = node(enforcer, context, observed.datapath.as_ref());
    let device = observed.device.unwrap_or_default();
    families.extend(verifications(&enforcer.verifications));
    families.extend(wireguard(enforcer, context, &device));
    // Before the first attachment there is nothing to count.
    if let Ok(counters) = enforcer.datapath.counters(&slots) {
        families.extend(packets(enforcer, &counters));
        families.extend(losses(&counters));
    }
    families.extend(guarded(&mut enforcer.guard));
    if let Ok(programs) = enforcer.datapath.programs() {
        families.push(foreign_programs(&programs));
    }
    families.push(gauge(
        "rampart_flow_records",
        "Records of flows in the kernel.",
        enforcer.datapath.flow_records().unwrap_or(0) as u64,
    ));
    Ok(families)
}

fn node(enforcer: &Enforcer, context: &Context, datapath: Option<&crate::kernel::DatapathState>) -> Vec<Family> {
    let backend = match enforcer.wireguard.backend() {
        Backend::Kernel => "kernel",
        Backend::Userspace => "userspace",
    };
    let build = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("network", context.network.clone()),
        ("node", context.node.clone()),
        ("wireguard", backend.to_owned()),
    ];
    let repaired =
        |kind: &'static str| (vec![("kind", kind.to_owned())], enforcer.repairs.get(kind).copied().unwrap_or(0));
    let repairs = Step::KINDS.into_iter().chain([guard::REPAIR]).map(repaired).collect();
    let attached = datapath.is_some_and(|datapath| datapath.egress && datapath.ingress);
    vec![
        Family {
            name: "rampart_build_info",
            help: "Version of noded, and whose it is.",
            kind: Kind::Gauge,
            samples: vec![(build, 1)],
        },
        gauge(
            "rampart_policy_revision",
            "Revision that the tables in force were made from.",
            datapath.map_or(0, |state| state.revision.0),
        ),
        gauge(
            "rampart_policy_generation",
            "Switches of the tables; 0 means that everything is denied.",
            datapath.map_or(0, |state| state.generation.0),
        ),
        gauge(
            "rampart_policy_received_revision",
            "Newest revision that the controller sent.",
            context.received_revision,
        ),
        gauge(
            "rampart_policy_error",
            "Whether something of the policy could not be enforced.",
            u64::from(enforcer.error.is_some() || enforcer.refused.is_some()),
        ),
        gauge(
            "rampart_datapath_attached",
            "Whether the programs are attached at egress and ingress.",
            u64::from(attached),
        ),
        gauge(
            "rampart_controller_connected",
            "Whether the controller is connected.",
            u64::from(context.controller.connected),
        ),
        gauge(
            "rampart_certificate_expiry_timestamp_seconds",
            "When the node's certificate ends.",
            context.certificate_expires_at,
        ),
        Family {
            name: "rampart_drift_repairs",
            help: "Things that others changed in the kernel and noded put right.",
            kind: Kind::Counter,
            samples: repairs,
        },
    ]
}

fn foreign_programs(programs: &[Program]) -> Family {
    let of = |place: Attachment| programs.iter().filter(|program| program.attachment == place && !program.ours).count();
    let sample = |place: Attachment| (vec![("hook", place.to_string())], of(place) as u64);
    Family {
        name: "rampart_foreign_programs",
        help: "Programs and filters of others on the interface; they run after Rampart's.",
        kind: Kind::Gauge,
        samples: Attachment::ALL.into_iter().map(sample).collect(),
    }
}

/// Absent until the tables have been verified once.
fn verifications(record: &Record) -> Vec<Family> {
    let last = |name, help, kind, value: &dyn Fn(&Finding) -> u64| {
        let samples = record.last.iter().map(|finding| (Vec::new(), value(finding))).collect();
        Family { name, help, kind, samples }
    };
    let runs = |result: &str, count| (vec![("result", result.to_owned())], count);
    vec![
        last(
            "rampart_policy_verify_result",
            "Whether the tables in the kernel were the policy when last verified.",
            Kind::Gauge,
            &|finding| u64::from(finding.verified.equal),
        ),
        last("rampart_policy_verify_differences", "Places at which they were not.", Kind::Gauge, &|finding| {
            finding.count() as u64
        }),
        last(
            "rampart_policy_verify_timestamp_seconds",
            "When they were last verified, in seconds since the epoch.",
            Kind::Gauge,
            &Finding::at,
        ),
        last("rampart_policy_verify_duration_seconds", "How long that took.", Kind::Seconds, &|finding| {
            u64::try_from(finding.took.as_micros()).unwrap_or(u64::MAX)
        }),
        Family {
            name: "rampart_policy_verify_runs",
            help: "Verifications of the tables, by what was found.",
            kind: Kind::Counter,
            samples: vec![runs("equal", record.equal), runs("different", record.different)],
        },
    ]
}

fn gauge(name: &'static str, help: &'static str, value: u64) -> Family {
    Family { name, help, kind: Kind::Gauge, samples: vec![(Vec::new(), value)] }
}

fn wireguard(enforcer: &Enforcer, context: &Context, device: &Device) -> Vec<Family> {
    let slice = enforcer.intent.as_ref().map(|intent| &intent.slice);
    let name = |key| {
        let peer = slice.and_then(|slice| slice.peers.values().find(|peer| peer.public_key == key));
        peer.map(|peer| peer.name.to_string()).unwrap_or_default()
    };
    let labels = |key: policy::PublicKey| {
        vec![("interface", context.interface.clone()), ("public_key", key.to_string()), ("friendly_name", name(key))]
    };
    let family = |name, help, kind, value: &dyn Fn(&crate::kernel::DevicePeer) -> u64| {
        let samples = device.peers.iter().map(|(key, peer)| (labels(*key), value(peer))).collect();
        Family { name, help, kind, samples }
    };
    vec![
        family("wireguard_sent_bytes", "Bytes sent to the peer.", Kind::Counter, &|peer| peer.sent_bytes),
        family("wireguard_received_bytes", "Bytes received from the peer.", Kind::Counter, &|peer| peer.received_bytes),
        family(
            "wireguard_latest_handshake_seconds",
            "When the latest handshake with the peer was, in seconds since the epoch; 0: never.",
            Kind::Gauge,
            &|peer| peer.last_handshake.and_then(seconds).unwrap_or(0),
        ),
    ]
}

fn packets(enforcer: &Enforcer, counters: &Counters) -> Vec<Family> {
    let intent = enforcer.intent.as_ref();
    let cidr = |id: u32| match (id, intent.and_then(|intent| intent.slice.cidrs.get(&CidrId(id)))) {
        (0, _) => String::new(),
        (_, Some(name)) => name.to_string(),
        (_, None) => format!("cidr {id}"),
    };
    let mut pairs = [Vec::new(), Vec::new()];
    for (key, counter) in &counters.pairs {
        let mut labels = outcome(key.direction.into(), key.reason);
        labels.push(("source", cidr(key.source)));
        labels.push(("destination", cidr(key.destination)));
        pairs[0].push((labels.clone(), counter.packets));
        pairs[1].push((labels, counter.bytes));
    }
    let [packets, bytes] = pairs;
    let reasons = counters
        .reasons
        .iter()
        .map(|((direction, reason), counter)| (outcome(*direction, *reason), counter.packets))
        .collect();
    let rule_name = |slot: &u32| {
        let rule = enforcer.slots.rule(*slot).and_then(|rule| intent.and_then(|intent| intent.slice.rules.get(&rule)));
        rule.map(|rule| rule.name.to_string())
    };
    let rules = |value: &dyn Fn(&Counter) -> u64| {
        let named = counters
            .rules
            .iter()
            .filter_map(|(slot, counter)| Some((vec![("rule", rule_name(slot)?)], value(counter))));
        named.collect::<Vec<_>>()
    };
    let counter = |name, help, samples| Family { name, help, kind: Kind::Counter, samples };
    vec![
        counter("rampart_packets", "Packets by what became of them and the cidrs of their ends.", packets),
        counter(
            "rampart_bytes",
            "Bytes, from the IP header on, by what became of them and the cidrs of their ends.",
            bytes,
        ),
        counter("rampart_reason_packets", "Packets by what became of them, those of no cidr included.", reasons),
        counter("rampart_rule_packets", "Packets that the rule decided.", rules(&|counter| counter.packets)),
        counter(
            "rampart_rule_bytes",
            "Bytes, from the IP header on, that the rule decided.",
            rules(&|counter| counter.bytes),
        ),
    ]
}

fn outcome(direction: u32, number: u8) -> Labels {
    let passes = reason::ALL.get(usize::from(number)).is_some_and(|(_, _, passes)| *passes);
    vec![
        ("direction", if direction == ebpf_common::EGRESS { "egress" } else { "ingress" }.to_owned()),
        ("verdict", if passes { "allow" } else { "deny" }.to_owned()),
        ("reason", reason::name(number).to_owned()),
    ]
}

/// The guard on the underlay.
fn guarded(watch: &mut guard::Watch) -> Vec<Family> {
    let mut families = Vec::new();
    if watch.is_wanted() {
        let there = |place: &crate::kernel::guard::GuardAttachment| {
            let hook = place.hook.map(|hook| hook.to_string()).unwrap_or_default();
            let labels = vec![("interface", place.interface.clone()), ("hook", hook)];
            (labels, u64::from(place.hook.is_some()))
        };
        families.push(Family {
            name: "rampart_guard_attached",
            help: "Whether the guard on the underlay is attached.",
            kind: Kind::Gauge,
            samples: watch.attachments().iter().map(there).collect(),
        });
        families.push(gauge(
            "rampart_guard_error",
            "Whether the guard on the underlay is nowhere, or not up to date.",
            u64::from(watch.error().is_some()),
        ));
    }
    let counters = watch.counters().unwrap_or_default();
    let samples = |value: &dyn Fn(&Counter) -> u64| {
        let sample = |((interface, number), counter): (&(String, u8), &Counter)| {
            let verdict = if underlay::reason::passes(*number) { "allow" } else { "deny" };
            let labels = vec![
                ("interface", interface.clone()),
                ("verdict", verdict.to_owned()),
                ("reason", underlay::reason::name(*number).to_owned()),
            ];
            (labels, value(counter))
        };
        counters.iter().map(sample).collect::<Vec<_>>()
    };
    let counter = |name, help, samples| Family { name, help, kind: Kind::Counter, samples };
    families.extend([
        counter(
            "rampart_guard_packets",
            "Packets to WireGuard's port by what the guard did with them.",
            samples(&|counter| counter.packets),
        ),
        counter(
            "rampart_guard_bytes",
            "Bytes of their messages, by what the guard did with them.",
            samples(&|counter| counter.bytes),
        ),
    ]);
    families
}

fn losses(counters: &Counters) -> Vec<Family> {
    let loss = |index: u32| counters.losses.get(index as usize).copied().unwrap_or(0);
    let cause = |cause: &str, index| (vec![("cause", cause.to_owned())], loss(index));
    let one = |name, help, value| Family { name, help, kind: Kind::Counter, samples: vec![(Vec::new(), value)] };
    vec![
        Family {
            name: "rampart_events_suppressed",
            help: "Denials that were counted but not reported: too many a second, or the buffer was full.",
            kind: Kind::Counter,
            samples: vec![cause("rate-limit", LOSS_EVENT_LIMITED), cause("buffer-full", LOSS_EVENT_FULL)],
        },
        Family {
            name: "rampart_flows_unrecorded",
            help: "Flows that got no record, so that their replies are dropped: no room, or more than the node's share.",
            kind: Kind::Counter,
            samples: vec![cause("full", LOSS_FLOW), cause("quota", LOSS_FLOW_QUOTA)],
        },
        one(
            "rampart_fragments_unrecorded",
            "Datagrams in fragments that found no room for a record; their later fragments are dropped.",
            loss(LOSS_FRAGMENT),
        ),
        one("rampart_pairs_uncounted", "Packets whose pair of cidrs found no room for a counter.", loss(LOSS_PAIR)),
    ]
}

#[derive(Debug)]
struct Families(Vec<Family>);

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for Family { name, help, kind, samples } in &self.0 {
            if samples.is_empty() {
                continue;
            }
            let metric_type = match kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge | Kind::Seconds => MetricType::Gauge,
            };
            let mut metric = encoder.encode_descriptor(name, help, None, metric_type)?;
            for (labels, value) in samples {
                match labels.as_slice() {
                    // The library would write empty braces.
                    [] => kind.write(*value, &mut metric)?,
                    labels => kind.write(*value, &mut metric.encode_family(&labels)?)?,
                }
            }
        }
        Ok(())
    }
}

impl Kind {
    fn write(self, value: u64, metric: &mut MetricEncoder<'_>) -> Result<(), fmt::Error> {
        match self {
            Self::Counter => metric.encode_counter::<[(String, String); 0], _, u64>(&value, None),
            Self::Gauge => metric.encode_gauge(&value),
            Self::Seconds => metric.encode_gauge(&(value as f64 / 1e6)),
        }
    }
}

/// OpenMetrics 1.0.
pub fn open_metrics(families: Vec<Family>) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Families(families)));
    let mut body = String::new();
    text::encode(&mut body, &registry)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Vec<Family> {
        let labels = vec![("reason", "no \"rule\"".to_owned())];
        vec![
            Family { name: "rampart_packets", help: "Packets.", kind: Kind::Counter, samples: vec![(labels, 3)] },
            gauge("rampart_policy_revision", "Revision.", 7),
            Family { name: "rampart_empty", help: "Nothing yet.", kind: Kind::Counter, samples: Vec::new() },
        ]
    }

    #[test]
    fn open_metrics_names_counters_without_their_suffix() {
        let text = open_metrics(example()).unwrap();
        assert_eq!(
            text,
            "# HELP rampart_packets Packets.\n# TYPE rampart_packets counter\n\
             rampart_packets_total{reason=\"no \\\"rule\\\"\"} 3\n\
             # HELP rampart_policy_revision Revision.\n# TYPE rampart_policy_revision gauge\n\
             rampart_policy_revision 7\n# EOF\n"
        );
    }

    #[test]
    fn the_older_format_names_counters_as_their_samples() {
        let text = host::scrape::prometheus_text(&open_metrics(example()).unwrap());
        assert_eq!(
            text,
            "# HELP rampart_packets_total Packets.\n# TYPE rampart_packets_total counter\n\
             rampart_packets_total{reason=\"no \\\"rule\\\"\"} 3\n\
             # HELP rampart_policy_revision Revision.\n# TYPE rampart_policy_revision gauge\n\
             rampart_policy_revision 7\n"
        );
    }
}
