//! What Prometheus fetches: read from the kernel at the moment of the scrape.

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ebpf_common::counter::{
    Counter, LOSS_EVENT_FULL, LOSS_EVENT_LIMITED, LOSS_FLOW, LOSS_FLOW_QUOTA, LOSS_FRAGMENT, LOSS_PAIR,
};
use ebpf_common::{reason, underlay};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use policy::CidrId;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::enforce::Enforcer;
use crate::enforce::guard;
use crate::enforce::reconcile::Step;
use crate::kernel::inspect::Counters;
use crate::kernel::{Attachment, Backend, Device, Program};
use crate::verify::finding::{Finding, Record};
use crate::view::status::{Context, seconds};
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

/// Connections served at a time, for one scrape each; more wait. Any user of this machine may connect.
const CONCURRENT: usize = 8;
/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How a scrape gets its figures.
pub type Source = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Vec<Family>, String>> + Send>> + Send + Sync>;

/// Reads everything. Runs on the enforcer's thread.
pub fn collect(enforcer: &mut Enforcer, context: &Context) -> Result<Vec<Family>, String> {
    let observed = enforcer.observe().map_err(|error| chain(&error))?;
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

/// The same in the older text format, which tools read that do not ask for OpenMetrics: there a counter's `_total` is part
/// of its name.
pub fn prometheus_text(open_metrics: &str) -> String {
    let mut counters = Vec::new();
    for line in open_metrics.lines() {
        if let Some(name) = line.strip_prefix("# TYPE ").and_then(|rest| rest.strip_suffix(" counter")) {
            counters.push(name);
        }
    }
    let mut body = String::new();
    for line in open_metrics.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(&name) => {
                body.push_str(&format!("# {what} {name}_total {rest}\n"));
            }
            _ => {
                body.push_str(line);
                body.push('\n');
            }
        }
    }
    body
}

/// Serves `/metrics` until it is dropped.
pub async fn serve(listener: TcpListener, source: Source) {
    serve_within(listener, source, PATIENCE).await;
}

async fn serve_within(listener: TcpListener, source: Source, patience: Duration) {
    let service = TowerToHyperService::new(Router::new().route("/metrics", get(scrape)).with_state(source));
    let permits = Arc::new(Semaphore::new(CONCURRENT));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "metrics cannot be served");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let service = service.clone();
        tokio::spawn(async move {
            let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
            builder.http1().keep_alive(false);
            if let Ok(Err(error)) = timeout(patience, builder.serve_connection(TokioIo::new(stream), service)).await {
                tracing::debug!(error, "metrics connection broke");
            }
            drop(permit);
        });
    }
}

/// Binds the listener, with the remedy in the error.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    use anyhow::Context as _;
    TcpListener::bind(address).await.with_context(|| {
        format!("failed to serve metrics at `{address}`; choose another address with `--metrics`, or `off`")
    })
}

async fn scrape(State(source): State<Source>, headers: HeaderMap) -> Response {
    let text = match source().await {
        Ok(families) => open_metrics(families).map_err(|error| error.to_string()),
        Err(error) => Err(error),
    };
    let accepts = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match text {
        Ok(text) if accepts.contains("application/openmetrics-text") => {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                .into_response()
        }
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], prometheus_text(&text))
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
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
        let text = prometheus_text(&open_metrics(example()).unwrap());
        assert_eq!(
            text,
            "# HELP rampart_packets_total Packets.\n# TYPE rampart_packets_total counter\n\
             rampart_packets_total{reason=\"no \\\"rule\\\"\"} 3\n\
             # HELP rampart_policy_revision Revision.\n# TYPE rampart_policy_revision gauge\n\
             rampart_policy_revision 7\n"
        );
    }

    /// Those who hold connections open wait for nothing but their end, and cost no more than their places.
    #[tokio::test]
    async fn connections_are_bounded_and_end() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let served = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&served);
        let source: Source = Arc::new(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Box::pin(async { Ok(example()) })
        });
        let patience = Duration::from_millis(300);
        tokio::spawn(serve_within(listener, source, patience));
        let began = std::time::Instant::now();
        let mut silent = Vec::new();
        for _ in 0..CONCURRENT {
            silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
        }
        let mut scrape = tokio::net::TcpStream::connect(address).await.unwrap();
        scrape.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        // It ends although nobody asked for that.
        scrape.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(began.elapsed() >= patience, "it waited for a place");
        assert_eq!(served.load(std::sync::atomic::Ordering::Relaxed), 1);
        for mut stream in silent {
            assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0, "it was closed");
        }
    }

    #[tokio::test]
    async fn a_scrape_gets_the_format_that_it_asks_for() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let source: Source = Arc::new(|| Box::pin(async { Ok(example()) }));
        tokio::spawn(serve(listener, source));
        for (accept, expected) in
            [("application/openmetrics-text;version=1.0.0", "# EOF"), ("*/*", "# TYPE rampart_packets_total counter")]
        {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(expected), "{answer}");
        }
    }
}
