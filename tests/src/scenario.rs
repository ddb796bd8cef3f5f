//! The demo's story as data: who tries what, and what must become of it. The namespace and VM tests tell the same one.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::mesh::{Family, Mesh};
use crate::probe::{self, EchoServer, RunningFlow, Seen, Traffic};

/// Ports on which every node echoes, allowed or not: a denial must come from the policy, not from a closed port.
pub const PORTS: [u16; 5] = [5432, 8080, 8081, 9000, 9001];

/// How long a change may take before the demo calls it lost.
const CHANGE_LIMIT: Duration = Duration::from_secs(20);

/// One attempt and what must become of it.
#[derive(Clone, Debug)]
pub struct Line {
    pub from: &'static str,
    pub to: &'static str,
    pub family: Family,
    pub traffic: Traffic,
    pub expected: Expected,
}

/// What must become of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    Answered,
    /// Silence, and this counter of this node moved.
    Dropped {
        at: &'static str,
        direction: &'static str,
        reason: &'static str,
    },
}

/// What became of it.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    pub seen: Seen,
    /// How far the expected counter moved.
    pub dropped: f64,
}

impl Line {
    /// Makes the attempt; asks no counter.
    pub fn try_it(&self, mesh: &Mesh) -> Result<Seen> {
        let patience = if self.expected == Expected::Answered { probe::PATIENCE } else { probe::SILENCE };
        let destination = mesh.node(self.to)?.address(self.family);
        probe::attempt(mesh.node(self.from)?.namespace(), destination, self.traffic, patience)
            .with_context(|| format!("{self}"))
    }

    /// Whether the outcome is the expected one.
    pub fn holds(&self, outcome: &Outcome) -> bool {
        match self.expected {
            Expected::Answered => outcome.seen == Seen::Answered,
            Expected::Dropped { .. } => outcome.seen == Seen::Silent && outcome.dropped >= 1.0,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let service = match self.traffic {
            Traffic::Tcp(port) => format!("tcp/{port}"),
            Traffic::Udp(port) => format!("udp/{port}"),
            Traffic::Ping => "ping".to_owned(),
        };
        let family = match self.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        write!(f, "{} -> {} {service} {family}", self.from, self.to)
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answered => f.write_str("answered"),
            Self::Dropped { at, direction, reason } => write!(f, "dropped at {at} {direction}, {reason}"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.seen {
            Seen::Answered => f.write_str("answered"),
            Seen::Silent => write!(f, "silent, counter +{}", self.dropped),
        }
    }
}

/// The cidrs and nodes of the story: `web1` in `web`, `app1` in `app`, `db1` in `db`.
pub fn build(mesh: &mut Mesh, mut progress: impl FnMut(&str)) -> Result<()> {
    for (index, name) in ["web", "app", "db"].iter().enumerate() {
        let n = index + 1;
        mesh.meshctl_ok(&["cidr", "add", name, &format!("10.42.{n}.0/24"), &format!("fd42:0:0:{n}::/64")])?;
    }
    for (node, cidr) in [("web1", "web"), ("app1", "app"), ("db1", "db")] {
        progress(&format!("{node} joins"));
        mesh.add_node(node, cidr)?;
    }
    Ok(())
}

/// web -> app tcp/8080 and ping, app -> db tcp/5432, nothing else.
pub fn allow(mesh: &Mesh) -> Result<()> {
    let web_to_app = ["rule", "add", "web-to-app", "--from", "cidr:web", "--to", "cidr:app"];
    let services = ["--service", "tcp/8080", "--service", "icmp/8", "--service", "icmpv6/128"];
    mesh.meshctl_ok(&[&web_to_app[..], &services[..]].concat())?;
    mesh.meshctl_ok(&["rule", "add", "app-to-db", "--from", "cidr:app", "--to", "cidr:db", "--service", "tcp/5432"])?;
    mesh.converge()
}

/// Every attempt of the story, in both families.
pub fn lines() -> Vec<Line> {
    const fn egress(at: &'static str) -> Expected {
        Expected::Dropped { at, direction: "egress", reason: "no-rule" }
    }
    let attempts = [
        ("web1", "app1", Traffic::Tcp(8080), Expected::Answered),
        ("web1", "app1", Traffic::Ping, Expected::Answered),
        ("app1", "db1", Traffic::Tcp(5432), Expected::Answered),
        ("web1", "db1", Traffic::Tcp(5432), egress("web1")),
        ("web1", "db1", Traffic::Ping, egress("web1")),
        ("web1", "app1", Traffic::Tcp(8081), egress("web1")),
        ("web1", "app1", Traffic::Udp(8080), egress("web1")),
        ("app1", "web1", Traffic::Tcp(8080), egress("app1")),
        ("app1", "db1", Traffic::Ping, egress("app1")),
        ("db1", "app1", Traffic::Tcp(8080), egress("db1")),
    ];
    let both = [Family::V4, Family::V6];
    let lines = attempts
        .into_iter()
        .flat_map(|(from, to, traffic, expected)| both.map(|family| Line { from, to, family, traffic, expected }));
    lines.collect()
}

/// Makes every attempt. Attempts that move the same counter run one after the other, all others in parallel.
pub fn run(mesh: &Mesh, lines: &[Line]) -> Result<Vec<Outcome>> {
    let mut groups = BTreeMap::<_, Vec<usize>>::new();
    for (index, line) in lines.iter().enumerate() {
        groups.entry((line.from, line.to)).or_default().push(index);
    }
    let mut outcomes = vec![None; lines.len()];
    let results = thread::scope(|scope| {
        let run_group = |indices: &Vec<usize>| -> Result<Vec<(usize, Outcome)>> {
            let (answered, dropped): (Vec<usize>, Vec<usize>) =
                indices.iter().partition(|index| lines[**index].expected == Expected::Answered);
            answered.into_iter().chain(dropped).map(|index| Ok((index, attempt(mesh, &lines[index])?))).collect()
        };
        let running: Vec<_> = groups.values().map(|indices| scope.spawn(move || run_group(indices))).collect();
        let results: Vec<_> = running.into_iter().map(|thread| thread.join().expect("a probe panicked")).collect();
        results
    });
    for result in results {
        for (index, outcome) in result? {
            outcomes[index] = Some(outcome);
        }
    }
    outcomes.into_iter().collect::<Option<_>>().context("an attempt was not made")
}

/// Makes one attempt.
pub fn attempt(mesh: &Mesh, line: &Line) -> Result<Outcome> {
    let before = dropped(mesh, line)?;
    let seen = line.try_it(mesh)?;
    Ok(Outcome { seen, dropped: dropped(mesh, line)? - before })
}

/// The counter that a denied line must move, for this pair of cidrs alone.
fn dropped(mesh: &Mesh, line: &Line) -> Result<f64> {
    let Expected::Dropped { at, direction, reason } = line.expected else { return Ok(0.0) };
    let cidr = |node: &'static str| node.trim_end_matches('1');
    let labels =
        [("direction", direction), ("reason", reason), ("source", cidr(line.from)), ("destination", cidr(line.to))];
    Ok(mesh.scrape_node(at)?.sum("rampart_packets_total", &labels))
}

/// Echo servers on every node.
pub fn serve(mesh: &Mesh) -> Result<Vec<EchoServer>> {
    mesh.nodes().map(|(_, node)| EchoServer::start(node.namespace(), &PORTS)).collect()
}

/// Adds a rule while datagrams are sent every millisecond: the time from the start of `meshctl` to the first echo.
pub fn time_to_allow(mesh: &Mesh, family: Family) -> Result<Duration> {
    let destination = SocketAddr::new(mesh.node("app1")?.address(family), 9000);
    let web = mesh.node("web1")?.namespace();
    ensure!(
        probe::first_echo(web, destination, Duration::from_millis(200))?.is_none(),
        "web1 -> app1 udp/9000 passes before a rule allows it"
    );
    thread::scope(|scope| {
        let echo = scope.spawn(|| probe::first_echo(web, destination, CHANGE_LIMIT));
        let start = Instant::now();
        mesh.meshctl_ok(&["rule", "add", "extra", "--from", "cidr:web", "--to", "cidr:app", "--service", "udp/9000"])?;
        let first = echo.join().expect("the probe panicked")?;
        let first = first.context("the rule was added, and web1 -> app1 udp/9000 stayed silent")?;
        ensure!(first > start, "an echo arrived before the rule was added");
        mesh.meshctl_ok(&["rule", "delete", "extra"])?;
        Ok(first - start)
    })
}

/// Revokes a running TCP flow: the time from the start of `meshctl` to the last echo.
pub fn time_to_revoke(mesh: &Mesh, family: Family) -> Result<Duration> {
    let destination = SocketAddr::new(mesh.node("app1")?.address(family), 9001);
    let stream = ["rule", "add", "stream", "--from", "cidr:web", "--to", "cidr:app", "--service", "tcp/9001"];
    mesh.meshctl_ok(&stream)?;
    mesh.converge()?;
    let mut flow = RunningFlow::open(mesh.node("web1")?.namespace(), destination).context("the flow does not open")?;
    ensure!(flow.beats(), "the flow carries nothing");
    thread::scope(|scope| {
        let last = scope.spawn(move || flow.last_beat(CHANGE_LIMIT));
        thread::park_timeout(Duration::from_millis(50)); // let it run
        let start = Instant::now();
        mesh.meshctl_ok(&["rule", "delete", "stream"])?;
        let last = last.join().expect("the flow panicked").context("the rule is gone, and the flow still runs")?;
        ensure!(last > start, "the flow stopped before its rule was deleted");
        Ok(last - start)
    })
}
