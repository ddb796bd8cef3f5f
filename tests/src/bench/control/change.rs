//! One change of the policy, at a time: what it costs the controller, and when nodes have it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::crowd::{Event, now};
use super::growth::Growth;
use super::lab::Lab;
use super::server::Sent;
use super::shape::Reach;
use crate::bench::report::{Report, Row, Target};
use crate::bench::statistics::{median, quantile};

/// Changes of each kind, if there is time.
const TURNS: u32 = 30;
const TURNS_QUICK: u32 = 4;
/// For all changes of one kind.
const LIMIT: Duration = Duration::from_secs(12);
/// For one change to be in force where it is meant for.
const ONE_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of an update that one change causes.
const BYTES: f64 = 200.0;
/// Milliseconds from the call to 100 nodes that enforce: median, and of 99 in 100.
const ENFORCED: (f64, f64) = (20.0, 100.0);
/// Milliseconds from the call to all nodes that have received it, of 99 in 100.
const RECEIVED: f64 = 500.0;

/// What several changes of one kind have shown. Times in milliseconds, from the beginning of the call.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) calls: Vec<f64>,
    pub(super) received: Vec<f64>,
    pub(super) enforced: Vec<f64>,
    /// CPU seconds of the controller.
    cpu: f64,
    sent: Sent,
    /// Nodes that heard of a change, in all turns, and those of them that it was not meant for.
    heard: usize,
    heard_besides: usize,
    turns: u32,
}

/// Changes that affect 2, 100 and all nodes.
pub(super) fn measure(lab: &mut Lab, report: &mut Report, growth: &mut Growth) -> Result<Option<String>> {
    for reach in Reach::EACH {
        let meant: BTreeSet<u32> = match reach {
            Reach::Two => lab.shape.pair().into(),
            Reach::Hundred => lab.shape.hundred().collect(),
            Reach::All => BTreeSet::new(),
        };
        let mut seen = Seen::default();
        let (start, turns) = (Instant::now(), lab.effort.choose(TURNS, TURNS_QUICK));
        // An even number, so that the network is as it was.
        while seen.turns < turns && (start.elapsed() < LIMIT || seen.turns % 2 == 1) {
            if !turn(lab, reach, &meant, &mut seen)? {
                let why = format!("not within {} s: a change of {}", ONE_LIMIT.as_secs(), reach.name());
                return Ok(Some(why));
            }
        }
        report_seen(lab, reach, &seen, report);
        if reach == Reach::Two {
            growth.add(f64::from(lab.shape.nodes), &seen.calls, seen.cpu_per_change(), &seen.enforced);
        }
    }
    Ok(None)
}

impl Seen {
    fn cpu_per_change(&self) -> f64 {
        self.cpu * 1e3 / f64::from(self.turns)
    }
}

/// One change. `false`: it did not come to those it was meant for.
fn turn(lab: &mut Lab, reach: Reach, meant: &BTreeSet<u32>, seen: &mut Seen) -> Result<bool> {
    let change = lab.shape.change(reach, seen.turns)?;
    let (cpu, sent, began, start) = (lab.server.cpu()?, lab.server.sent()?, Instant::now(), now());
    let (of, call) = lab.server.commit(&change)?;
    let (mut received, mut enforced) = (BTreeMap::new(), BTreeMap::new());
    let mut note = |event: Event| match event {
        Event::Received { index, revision, at } if revision >= of => drop(received.entry(index).or_insert(at)),
        Event::Enforced { index, revision, at } if revision >= of => drop(enforced.entry(index).or_insert(at)),
        _ => {}
    };
    if !meant.is_empty() {
        let mut owed = meant.clone();
        let there = lab.crowd.until(ONE_LIMIT, |event| {
            note(event);
            if let Event::Enforced { index, revision, .. } = event
                && revision >= of
            {
                owed.remove(&index);
            }
            owed.is_empty()
        })?;
        if !there {
            return Ok(false);
        }
    }
    lab.settle(ONE_LIMIT, &mut note)?;
    seen.cpu += (lab.server.cpu()? - cpu - lab.idle * began.elapsed().as_secs_f64()).max(0.0);
    seen.sent = seen.sent.plus(lab.server.sent()?.since(sent));
    seen.calls.push(call.as_secs_f64() * 1e3);
    let since = |at: &u64| at.saturating_sub(start) as f64 / 1e6;
    seen.heard += received.len();
    let besides = if meant.is_empty() { 0 } else { received.keys().filter(|index| !meant.contains(index)).count() };
    seen.heard_besides += besides;
    seen.received.extend(received.values().map(since));
    let subjects = if meant.is_empty() { &lab.enforcing } else { meant };
    seen.enforced.extend(enforced.iter().filter(|(index, _)| subjects.contains(index)).map(|(_, at)| since(at)));
    seen.turns += 1;
    Ok(true)
}

fn report_seen(lab: &Lab, reach: Reach, seen: &Seen, report: &mut Report) {
    let row = |what: &str| lab.row(&format!("change of {}: {what}", reach.name()));
    let turns = f64::from(seen.turns);
    report.push(Row::new(row("commit call, p50"), median(&seen.calls), "ms").also("p99", quantile(&seen.calls, 0.99)));
    report.push(Row::new(row("controller CPU"), seen.cpu_per_change(), "ms"));
    report.push(Row::new(row("nodes that hear of it"), seen.heard as f64 / turns, ""));
    if seen.heard == 0 {
        return;
    }
    let (half, most) = (quantile(&seen.received, 0.5), quantile(&seen.received, 0.99));
    let received = Row::new(row("call to received, p99"), most, "ms").also("p50", half);
    report.push(received.at_most((reach == Reach::All).then_some(RECEIVED)));
    let hundred = reach == Reach::Hundred;
    for (what, share, target) in [("p50", 0.5, ENFORCED.0), ("p99", 0.99, ENFORCED.1)] {
        let name = row(&format!("call to enforced, {what}"));
        report.push(Row::new(name, quantile(&seen.enforced, share), "ms").at_most(hundred.then_some(target)));
    }
    let bytes = seen.sent.bytes / seen.sent.deltas;
    let mut row_of_bytes = Row::new(row("bytes per node that hears of it"), bytes, "B").target(Target::AtMost(BYTES));
    if seen.sent.snapshots > 0.0 {
        row_of_bytes = row_of_bytes.also("snapshots besides", seen.sent.snapshots);
    }
    report.push(row_of_bytes);
    if reach != Reach::All {
        let others = f64::from(lab.shape.nodes) * turns - (seen.heard - seen.heard_besides) as f64;
        let bytes = bytes * seen.heard_besides as f64 / others.max(1.0);
        report.push(Row::new(row("bytes per node that it is not meant for"), bytes, "B").target(Target::AtMost(0.0)));
    }
}
