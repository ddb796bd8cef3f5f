//! All nodes at once: when they have nothing, and when their controller was away for a moment.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::crowd::Event;
use super::growth::Growth;
use super::lab::Lab;
use super::server::POLL;
use crate::bench::report::{Report, Row, Target};
use crate::bench::statistics::{median, quantile};

/// Longer than this nobody waits.
const LIMIT: Duration = Duration::from_secs(90);
/// Seconds, for 10,000 nodes.
const START: f64 = 15.0;
/// KB of the controller per node, in groups and in a mesh.
const MEMORY: (f64, f64) = (48.0, 64.0);
/// When so many have come, the controller gathers their endpoints for seconds before it tells their peers.
const GATHERED: Duration = Duration::from_secs(4);
/// Over which the controller's CPU at rest is measured.
const REST: Duration = Duration::from_secs(1);
const REST_QUICK: Duration = Duration::from_millis(100);
/// Between two questions of an admin.
const QUESTIONS: Duration = Duration::from_millis(100);

/// Every node comes for the first time, as fast as the controller takes them.
pub(super) fn cold(lab: &mut Lab, report: &mut Report, _: &mut Growth) -> Result<Option<String>> {
    let nodes = f64::from(lab.shape.nodes);
    let (cpu, memory, start) = (lab.server.cpu()?, lab.server.memory()?, Instant::now());
    lab.crowd.start()?;
    let (mut here, wanted) = (BTreeSet::new(), lab.shape.nodes as usize);
    let whole = lab.crowd.until(LIMIT, |event| {
        if let Event::Received { index, .. } = event {
            here.insert(index);
        }
        here.len() == wanted
    })?;
    let name = lab.row("cold start");
    if !whole || !converged(lab, start)? {
        let why = format!("not within {} s; {} of {} nodes had their snapshot", LIMIT.as_secs(), here.len(), wanted);
        report.push(Row::missing(name, &why, "s").target(Target::AtMost(START)));
        return Ok(Some(why));
    }
    let (took, cpu) = (start.elapsed().as_secs_f64(), lab.server.cpu()? - cpu);
    report.push(Row::new(name, took, "s").also("CPU of the controller", cpu).target(Target::AtMost(START)));
    report.push(Row::new(lab.row("controller CPU per node, cold start"), cpu * 1e3 / nodes, "ms"));
    lab.settle(LIMIT, |_| {})?;
    std::thread::sleep(lab.effort.choose(GATHERED, REST_QUICK));
    lab.settle(LIMIT, |_| {})?;
    let grown = (lab.server.memory()? - memory) / nodes;
    let most = if lab.shape.kind == super::Kind::Groups { MEMORY.0 } else { MEMORY.1 };
    report.push(Row::new(lab.row("controller memory per node"), grown, "KB").target(Target::AtMost(most)));
    let (cpu, start) = (lab.server.cpu()?, Instant::now());
    std::thread::sleep(lab.effort.choose(REST, REST_QUICK));
    lab.idle = (lab.server.cpu()? - cpu) / start.elapsed().as_secs_f64();
    report.push(Row::new(lab.row("controller CPU at rest"), lab.idle * 1e3, "ms/s"));
    Ok(None)
}

/// Until every node enforces what was sent to it.
fn converged(lab: &Lab, start: Instant) -> Result<bool> {
    while lab.server.followers()?.1 < lab.shape.nodes {
        if start.elapsed() > LIMIT {
            return Ok(false);
        }
        std::thread::sleep(POLL);
    }
    Ok(true)
}

/// The controller is restarted, and all come back to it. Meanwhile an admin asks questions.
pub(super) fn resume(lab: &mut Lab, report: &mut Report, _: &mut Growth) -> Result<Option<String>> {
    let nodes = f64::from(lab.shape.nodes);
    let start = lab.server.restart()?;
    let mut answers = Vec::new();
    let name = lab.row("all resumed after a restart");
    while lab.server.followers()?.1 < lab.shape.nodes {
        if start.elapsed() > LIMIT {
            let (connected, _) = lab.server.followers()?;
            let why = format!("not within {} s; {connected} nodes were connected", LIMIT.as_secs());
            report.push(Row::missing(name, &why, "s").target(Target::AtMost(START)));
            return Ok(Some(why));
        }
        answers.push(lab.server.ask()?.as_secs_f64() * 1e3);
        std::thread::sleep(QUESTIONS);
    }
    let (took, cpu) = (start.elapsed().as_secs_f64(), lab.server.cpu()?);
    report.push(Row::new(name, took, "s").also("CPU of the controller", cpu).target(Target::AtMost(START)));
    let snapshots = lab.server.sent()?.snapshots;
    let name = lab.row("snapshots sent after a restart");
    report.push(Row::new(name, snapshots, "").target(Target::AtMost(0.0)));
    report.push(Row::new(lab.row("controller CPU per node, restart"), cpu * 1e3 / nodes, "ms"));
    let name = lab.row("answer to an admin while all come back, p99");
    report.push(Row::new(name, quantile(&answers, 0.99), "ms").also("p50", median(&answers)));
    Ok(None)
}
