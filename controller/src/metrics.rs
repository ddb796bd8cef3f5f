//! What the controller counts, as OpenMetrics text and as the older Prometheus text.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Seconds: from a row of one object to a full compile of a very large policy.
const BUCKETS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// How a commit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Result {
    Done,
    Refused,
    Failed,
}

impl Result {
    const ALL: [Self; 3] = [Self::Done, Self::Refused, Self::Failed];

    fn label(self) -> ByResult {
        let result = match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Failed => "failed",
        };
        ByResult { result }
    }
}

/// What became of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Question {
    Answered,
    /// Its caller asks too much.
    Refused,
    /// Its caller went away, or its deadline passed.
    GivenUp,
}

impl Question {
    const ALL: [Self; 3] = [Self::Answered, Self::Refused, Self::GivenUp];

    fn label(self) -> ByResult {
        let result = match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::GivenUp => "given-up",
        };
        ByResult { result }
    }
}

/// What an update held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Update {
    Snapshot,
    Delta,
}

impl Update {
    const ALL: [Self; 2] = [Self::Snapshot, Self::Delta];

    fn label(self) -> ByKind {
        let kind = match self {
            Self::Snapshot => "snapshot",
            Self::Delta => "delta",
        };
        ByKind { kind }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

/// Every metric of the controller.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub revision: Gauge<u64, AtomicU64>,
    pub nodes: Gauge,
    pub connected: Gauge,
    pub converged: Gauge,
    commits: Family<ByResult, Counter>,
    pub outrun: Counter,
    pub commit_seconds: Histogram,
    pub compile_seconds: Histogram,
    pub publish_seconds: Histogram,
    updates: Family<ByKind, Counter>,
    update_bytes: Family<ByKind, Counter>,
    pub slow_nodes: Counter,
    enrolments: Family<ByResult, Counter>,
    pub rejected_certificates: Counter,
    pub rejected_connections: Counter,
    pub connections: Gauge,
    questions: Family<ByResult, Counter>,
    pub questions_open: Gauge,
}

impl Metrics {
    pub fn new() -> Arc<Self> {
        let histogram = || Histogram::new(BUCKETS);
        let mut metrics = Self {
            registry: Registry::default(),
            revision: Gauge::default(),
            nodes: Gauge::default(),
            connected: Gauge::default(),
            converged: Gauge::default(),
            commits: Family::default(),
            outrun: Counter::default(),
            commit_seconds: histogram(),
            compile_seconds: histogram(),
            publish_seconds: histogram(),
            updates: Family::default(),
            update_bytes: Family::default(),
            slow_nodes: Counter::default(),
            enrolments: Family::default(),
            rejected_certificates: Counter::default(),
            rejected_connections: Counter::default(),
            connections: Gauge::default(),
            questions: Family::default(),
            questions_open: Gauge::default(),
        };
        metrics.register();
        metrics.appear();
        Arc::new(metrics)
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        let rows = registry.sub_registry_with_prefix("rampart_controller");
        rows.register("revision", "Newest revision of the network", self.revision.clone());
        rows.register("nodes", "Nodes of the network, in any state", self.nodes.clone());
        rows.register("connected_nodes", "Nodes that follow the network now", self.connected.clone());
        rows.register(
            "converged_nodes",
            "Connected nodes that enforce the newest revision that was sent to them",
            self.converged.clone(),
        );
        rows.register("commits", "Changes asked for, by how they ended", self.commits.clone());
        rows.register(
            "outrun_changes",
            "Times that a change was drafted anew because another controller was faster",
            self.outrun.clone(),
        );
        let seconds = Unit::Seconds;
        rows.register_with_unit(
            "commit",
            "Time that a change took from the queue to the disk",
            seconds.clone(),
            self.commit_seconds.clone(),
        );
        rows.register_with_unit(
            "compile",
            "Time that compiling the policy took",
            seconds.clone(),
            self.compile_seconds.clone(),
        );
        rows.register_with_unit(
            "publish",
            "Time that finding what one node has to be told took",
            seconds,
            self.publish_seconds.clone(),
        );
        rows.register("updates", "Updates sent to nodes", self.updates.clone());
        rows.register_with_unit("update", "Bytes of updates sent to nodes", Unit::Bytes, self.update_bytes.clone());
        rows.register("slow_nodes", "Times that a node's queue of updates was full", self.slow_nodes.clone());
        rows.register("enrolments", "Invitations shown, by how that ended", self.enrolments.clone());
        rows.register(
            "rejected_certificates",
            "Calls refused because of the caller's certificate",
            self.rejected_certificates.clone(),
        );
        rows.register(
            "rejected_connections",
            "Connections refused or dropped before a call",
            self.rejected_connections.clone(),
        );
        rows.register("connections", "Open connections of nodes and admins", self.connections.clone());
        rows.register(
            "questions",
            "Questions of nodes and admins, by what became of them; refused: new streams and renewals too",
            self.questions.clone(),
        );
        rows.register(
            "open_questions",
            "Questions of nodes and admins that wait or are worked on",
            self.questions_open.clone(),
        );
        let build = Family::<Build, Gauge>::default();
        build.get_or_create(&Build { version: crate::VERSION }).set(1);
        registry.register("rampart_build_info", "Version of the running program; always 1", build);
    }

    /// Counters that are 0 are there from the start, so that rates begin with the first event.
    fn appear(&self) {
        for result in Result::ALL {
            drop(self.commits.get_or_create(&result.label()));
            drop(self.enrolments.get_or_create(&result.label()));
        }
        for question in Question::ALL {
            drop(self.questions.get_or_create(&question.label()));
        }
        for kind in Update::ALL {
            drop(self.updates.get_or_create(&kind.label()));
            drop(self.update_bytes.get_or_create(&kind.label()));
        }
    }

    pub fn commit(&self, result: Result) {
        self.commits.get_or_create(&result.label()).inc();
    }

    pub fn enrolment(&self, result: Result) {
        self.enrolments.get_or_create(&result.label()).inc();
    }

    pub fn question(&self, question: Question) {
        self.questions.get_or_create(&question.label()).inc();
    }

    pub fn update(&self, kind: Update, bytes: usize) {
        self.updates.get_or_create(&kind.label()).inc();
        self.update_bytes.get_or_create(&kind.label()).inc_by(u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    /// OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

/// Accounts the time since `start`.
pub fn since(histogram: &Histogram, start: std::time::Instant) {
    let elapsed: Duration = start.elapsed();
    histogram.observe(elapsed.as_secs_f64());
}

/// OpenMetrics as the older text format has it: there a counter's family bears the name that its samples bear.
pub fn prometheus_text(open_metrics: &str) -> String {
    let counters: std::collections::BTreeSet<&str> =
        open_metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let mut text = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", kind @ ("HELP" | "TYPE"), name, rest] if counters.contains(name) => {
                text.push_str(&format!("# {kind} {name}_total {rest}\n"));
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

/// Sets what is only known when somebody asks.
pub type Refresh = Arc<dyn Fn(&Metrics) + Send + Sync>;

async fn answer(State((metrics, refresh)): State<(Arc<Metrics>, Refresh)>, headers: HeaderMap) -> Response {
    refresh(&metrics);
    let text = metrics.encode();
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if accept.contains("application/openmetrics-text") {
        ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response()
    } else {
        ([(header::CONTENT_TYPE, PROMETHEUS_TEXT)], prometheus_text(&text)).into_response()
    }
}

/// A listener for `/metrics`.
pub async fn bind(address: SocketAddr) -> std::io::Result<tokio::net::TcpListener> {
    tokio::net::TcpListener::bind(address).await
}

/// Serves `/metrics` until `stop` is done.
pub async fn serve(
    listener: tokio::net::TcpListener,
    metrics: Arc<Metrics>,
    refresh: Refresh,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(answer))
        .fallback(|| async { (StatusCode::NOT_FOUND, "metrics are at /metrics\n") })
        .with_state((metrics, refresh));
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn counters_are_named_alike_in_both_formats() {
        let metrics = Metrics::new();
        metrics.commit(Result::Done);
        let text = prometheus_text(&metrics.encode());
        assert!(text.contains("# TYPE rampart_controller_commits_total counter\n"), "{text}");
        assert!(text.contains("rampart_controller_commits_total{result=\"done\"} 1\n"), "{text}");
        assert!(text.contains("rampart_build_info{version="), "{text}");
        assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
    }

    #[test]
    fn promtool_is_content() {
        let mut promtool = match Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
        {
            Ok(promtool) => promtool,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("promtool is not installed; `cargo xtask setup` brings it");
                return;
            }
            Err(error) => panic!("promtool cannot be started: {error}"),
        };
        let text = prometheus_text(&Metrics::new().encode());
        promtool.stdin.take().expect("piped").write_all(text.as_bytes()).expect("written");
        let output = promtool.wait_with_output().expect("promtool ends");
        let talk = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && talk.trim().is_empty(), "{talk}\n{text}");
    }
}
