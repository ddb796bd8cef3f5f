//! What goes through WireGuard with a large policy on both ends, against no program at all.
//!
//! The mesh is a real one: a controller, two nodes, their WireGuard. Once it stands the agents are killed; what they leave
//! carries the packets. The bench then takes the two interfaces over and puts the large policy on them, and off again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, Xdp, XdpMode};
use aya::sys::{Stats, enable_stats};
use aya::{Ebpf, EbpfLoader};
use ebpf_common::{ABI_VERSION, INGRESS};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use node::kernel::datapath::{BENCH_OBJECT, DEFAULT_ROOT, EbpfDatapath};
use node::kernel::{Datapath, Inspect};
use node::lower::{RuleSlots, Tables, lower};
use policy::{Action, Change, Matrix, Revision, RuleSpec};

use super::thousands;
use super::traffic::{Load, PORT, Way};
use crate::bench::Effort;
use crate::bench::report::{Report, Row, Target};
use crate::bench::scale::{Families, Layout, Scale, Size};
use crate::bench::statistics::{median, ratio};
use crate::conformance::{INTERFACE, Lab};
use crate::mesh::{Family, Mesh, kernel_has_wireguard, wait_for};
use crate::namespace::{Lifetime, Namespace};

/// Least share of the throughput without any program, and least lower end of its interval.
const TCP: (f64, f64) = (0.99, 0.97);
const SMALL_UDP: (f64, f64) = (0.95, 0.93);
/// How long the first handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// Of the mesh, and where the large network has them too.
const NODES: [(&str, &str, &str); 2] = [("web1", "web", "n1"), ("app1", "app", "n2")];

pub(super) fn measure(lab: &Lab, effort: Effort, report: &mut Report) -> Result<()> {
    let cidrs = effort.choose(10_000, 300);
    let mesh = Mesh::new(Lifetime::Bound, "deny")?;
    let wireguard = if kernel_has_wireguard(mesh.controller())? { "kernel" } else { "userspace" };
    let what = format!("{wireguard} WireGuard, {} rules", thousands(cidrs * 10));
    let mut tunnel = Tunnel::build(mesh, cidrs, &lab.bpffs)?;
    let turns = effort.choose(30, 2);
    let time = effort.choose(Duration::from_millis(350), Duration::from_millis(50));
    let mut pairs: BTreeMap<usize, Vec<(f64, f64)>> = BTreeMap::new();
    for turn in 0..turns {
        // Two halves, the first of which the turn before has left in place.
        let halves = [turn % 2 == 0, turn % 2 != 0];
        let mut seen = BTreeMap::new();
        for enforced in halves {
            tunnel.enforce(enforced)?;
            for (index, load) in Load::ALL.into_iter().enumerate() {
                let rate = tunnel.way()?.carry(load, time).with_context(|| format!("{}, {what}", load.name()))?;
                seen.insert((index, enforced), rate);
            }
        }
        for index in 0..Load::ALL.len() {
            pairs.entry(index).or_default().push((seen[&(index, true)], seen[&(index, false)]));
        }
    }
    for (index, pairs) in &pairs {
        tell(Load::ALL[*index], pairs, &what, report);
    }
    tunnel.enforce(true)?;
    for load in [Load::Tcp { streams: 1 }, Load::SmallUdp] {
        tunnel.measure_share(load, time * 3, &what, report)?;
    }
    tunnel.measure_early(turns, time, &what, report)
}

fn tell(load: Load, pairs: &[(f64, f64)], what: &str, report: &mut Report) {
    let name = load.name();
    let half = |choose: fn(&(f64, f64)) -> f64| median(&pairs.iter().map(choose).collect::<Vec<_>>());
    report.push(Row::new(format!("{name}, no program, {what}"), half(|pair| pair.1), load.unit()));
    report.push(Row::new(format!("{name}, Rampart, {what}"), half(|pair| pair.0), load.unit()));
    let ratio = ratio(pairs);
    let targets = match load {
        Load::Tcp { .. } => Some(TCP),
        Load::SmallUdp => Some(SMALL_UDP),
        Load::RoundTrips => None,
    };
    let row = Row::estimate(format!("{name}, Rampart / no program, {what}"), ratio, "times");
    let Some((least, least_low)) = targets else { return report.push(row) };
    report.push(row.target(Target::AtLeast(least)));
    let low = Row::new(format!("{name}, Rampart / no program, lower end of the interval, {what}"), ratio.low, "times");
    report.push(low.target(Target::AtLeast(least_low)));
}

struct Tunnel {
    mesh: Mesh,
    ends: Vec<End>,
    enforced: bool,
}

/// One node, as its killed agent left it.
struct End {
    name: &'static str,
    datapath: EbpfDatapath,
    tables: Tables,
    /// Where the bench pins, apart from what the agent had pinned.
    bpffs: PathBuf,
}

impl Tunnel {
    fn build(mut mesh: Mesh, cidrs: u32, bpffs: &Path) -> Result<Self> {
        for (number, (node, cidr, _)) in (1..).zip(NODES) {
            mesh.meshctl_ok(&[
                "cidr",
                "add",
                cidr,
                &format!("10.42.{number}.0/24"),
                &format!("fd42:0:0:{number}::/64"),
            ])?;
            mesh.add_node(node, cidr)?;
        }
        mesh.meshctl_ok(&["rule", "add", "all", "--from", "cidr:web", "--to", "cidr:app", "--service", "any"])?;
        mesh.converge()?;
        let mut tunnel = Self { mesh, ends: Vec::new(), enforced: false };
        wait_for("the first handshake", HANDSHAKE, || {
            Ok(tunnel.way()?.carry(Load::RoundTrips, Duration::from_millis(1)).is_ok())
        })?;
        for (node, ..) in NODES {
            tunnel.mesh.stop_node(node, Signal::SIGKILL)?;
            take_programs_off(tunnel.mesh.node(node)?.namespace())?;
        }
        tunnel.ends = ends(&tunnel.mesh, cidrs, bpffs)?;
        Ok(tunnel)
    }

    fn way(&self) -> Result<Way<'_>> {
        let [client, server] = [self.mesh.node(NODES[0].0)?, self.mesh.node(NODES[1].0)?];
        Ok(Way { client: client.namespace(), server: server.namespace(), address: server.address(Family::V4) })
    }

    /// Puts the large policy on both ends, or takes every program off.
    fn enforce(&mut self, enforce: bool) -> Result<()> {
        if self.enforced == enforce {
            return Ok(());
        }
        for end in &mut self.ends {
            let End { name, datapath, tables, .. } = end;
            in_network(self.mesh.node(name)?.namespace(), || {
                if !enforce {
                    return Ok(datapath.detach()?);
                }
                datapath.attach()?;
                datapath.switch(tables)?;
                Ok(datapath.settle()?)
            })?;
        }
        self.enforced = enforce;
        Ok(())
    }

    /// What the programs take of all that the processors do, by the kernel's own clock.
    fn measure_share(&mut self, load: Load, time: Duration, what: &str, report: &mut Report) -> Result<()> {
        let statistics = enable_stats(Stats::RunTime).context("failed to have the kernel time programs")?;
        let (before, busy_before) = (self.ran()?, busy()?);
        self.way()?.carry(load, time)?;
        let (after, busy_after) = (self.ran()?, busy()?);
        drop(statistics);
        let (time, runs) = (after.0 - before.0, after.1 - before.1);
        ensure!(runs > 0.0, "the programs did not run");
        let (name, busy) = (load.name(), busy_after - busy_before);
        report.push(Row::new(format!("{name}, the programs' time per skb, {what}"), time / runs, "ns"));
        report.push(Row::new(format!("{name}, the processors' time per skb, {what}"), busy / runs, "ns"));
        let share = 100.0 * time / busy;
        report.push(Row::new(format!("{name}, the programs' share of the processors' time, {what}"), share, "%"));
        Ok(())
    }

    /// What an XDP program on the interface costs, whatever it does: the kernel no longer joins segments there.
    fn measure_early(&mut self, turns: usize, time: Duration, what: &str, report: &mut Report) -> Result<()> {
        let load = Load::Tcp { streams: 1 };
        let (mut rates, mut joined) = (Vec::new(), [Vec::new(), Vec::new()]);
        for turn in 0..turns {
            let mut seen = [0.0; 2];
            for early in [turn % 2 == 0, turn % 2 != 0] {
                let host = self.mesh.node(NODES[1].0)?.namespace();
                let program = if early { Some(in_network(host, attach_early)?) } else { None };
                let before = self.arrived()?;
                seen[usize::from(early)] = self.way()?.carry(load, time)?;
                let after = self.arrived()?;
                drop(program);
                joined[usize::from(early)].push((after.1 - before.1) / (after.0 - before.0));
            }
            rates.push((seen[1], seen[0]));
        }
        for (joined, with) in joined.iter().zip(["without an", "with an empty"]) {
            let name =
                format!("{}, segments per skb at the receiver's ingress, {with} XDP program, {what}", load.name());
            report.push(Row::new(name, median(joined), "segments"));
        }
        let name = format!("{}, an empty XDP program / none on the receiver's interface, {what}", load.name());
        report.push(Row::estimate(name, ratio(&rates), "times"));
        Ok(())
    }

    /// Nanoseconds and runs of all programs on both ends.
    fn ran(&self) -> Result<(f64, f64)> {
        let mut sum = (0.0, 0.0);
        for end in &self.ends {
            let bpffs = &end.bpffs;
            let infos = in_network(self.mesh.node(end.name)?.namespace(), || {
                let namespace = fs::metadata("/proc/thread-self/ns/net")?.ino();
                let top = bpffs.join(format!("rampart/v{ABI_VERSION}/net-{namespace}/{INTERFACE}/programs"));
                let info = |direction| Ok(SchedClassifier::from_pin(top.join(direction))?.info()?);
                ["egress", "ingress"].into_iter().map(info).collect::<Result<Vec<_>>>()
            })?;
            for info in infos {
                sum = (sum.0 + info.run_time().as_nanos() as f64, sum.1 + info.run_count() as f64);
            }
        }
        Ok(sum)
    }

    /// Packets and segments that arrived at the second node.
    fn arrived(&mut self) -> Result<(f64, f64)> {
        let end = self.ends.last_mut().context("no ends")?;
        let host = self.mesh.node(end.name)?.namespace();
        let counters = in_network(host, || Ok(end.datapath.counters(&[])?))?;
        let ingress = counters.reasons.iter().filter(|((direction, _), _)| *direction == INGRESS);
        Ok(ingress
            .fold((0.0, 0.0), |sum, (_, counter)| (sum.0 + counter.packets as f64, sum.1 + counter.segments as f64)))
    }
}

/// The large network, in which the mesh's nodes have their addresses and may talk on one port: replies pass by record.
fn ends(mesh: &Mesh, cidrs: u32, bpffs: &Path) -> Result<Vec<End>> {
    let mut scale = Scale::new(Size::mixed(cidrs, 10, Layout::Dense, Families::Both))?;
    scale.network.apply(&Change::AddRule(RuleSpec {
        name: "bench".parse()?,
        action: Action::Allow,
        from: vec![format!("cidr:{}", Scale::SUBJECT_CIDR).parse()?],
        to: vec!["cidr:c2".parse()?],
        services: vec![format!("tcp/{PORT}").parse()?, format!("udp/{PORT}").parse()?],
        priority: 1,
        both: false,
        log: false,
        comment: String::new(),
    }))?;
    let matrix = Matrix::compile(&scale.network)?;
    let end = |(name, _, large): (&'static str, &str, &str)| {
        let there = scale.network.node_named(&large.parse()?).with_context(|| format!("no node `{large}`"))?;
        let here = mesh.node(name)?;
        ensure!(there.addresses.v4() == Some(here.v4), "`{name}` is not where `{large}` is");
        let slice = matrix.slice(there.id, Revision(1)).context("the node is not active")?;
        let tables = lower(&slice, &mut RuleSlots::new())?;
        Ok(End { name, datapath: EbpfDatapath::new(INTERFACE, bpffs), tables, bpffs: bpffs.to_owned() })
    };
    NODES.into_iter().map(end).collect()
}

/// Does work in a host's network alone: files and processes are this process's.
pub(in crate::bench) fn in_network<T: Send>(host: &Namespace, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let network = File::open(format!("/proc/{}/ns/net", host.holder()))?;
    thread::scope(|scope| {
        let inside = scope.spawn(move || {
            setns(network, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
    .with_context(|| format!("in the network of `{}`", host.name()))
}

/// An XDP program that does nothing, there until dropped. In generic mode, which is all that WireGuard's interfaces have.
fn attach_early() -> Result<Ebpf> {
    let mut ebpf = EbpfLoader::new().btf(None).load(BENCH_OBJECT)?;
    let program: &mut Xdp = ebpf.program_mut("empty_early").context("the bench has no XDP program")?.try_into()?;
    program.load()?;
    program.attach(INTERFACE, XdpMode::Skb).context("failed to attach an XDP program")?;
    Ok(ebpf)
}

/// What an agent left attached: pinned links of TCX, filters of clsact.
fn take_programs_off(host: &Namespace) -> Result<()> {
    host.run("rm", &["-r", &format!("{DEFAULT_ROOT}/rampart")])?;
    let mut clsact = Command::new("tc");
    // There is none where the kernel has TCX.
    host.output(clsact.args(["qdisc", "delete", "dev", INTERFACE, "clsact"])).map(drop)
}

/// Nanoseconds that all processors have been busy.
fn busy() -> Result<f64> {
    /// The kernel's unit in this file (USER_HZ).
    const TICK: f64 = 1e7;
    let text = fs::read_to_string("/proc/stat")?;
    let words: Vec<f64> =
        text.lines().next().unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq; what guests took is in user.
    ensure!(words.len() >= 7, "`/proc/stat` is not as expected");
    Ok((words[0] + words[1] + words[2] + words[5] + words[6]) * TICK)
}
