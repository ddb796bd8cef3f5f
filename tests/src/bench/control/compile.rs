//! A policy of many cidrs and rules: what it costs to compile, to edit and to commit.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use policy::{Action, Change, Matrix};

use super::crowd::{Crowd, Event, now};
use super::seed::seed;
use super::server::Server;
use super::shape::rule_change;
use crate::bench::Effort;
use crate::bench::report::{Report, Row, Target};
use crate::bench::scale::{Families, Layout, Scale, Size};
use crate::bench::statistics::{median, quantile};

/// Milliseconds to compile 1,000 cidrs and 10,000 rules, and ten times that.
const COMPILE: (f64, f64) = (25.0, 500.0);
/// Milliseconds of one edit, of 99 in 100.
const EDIT: f64 = 1.0;
const RULES_PER_CIDR: u32 = 10;
/// Nodes that follow; two of them put in force what they receive.
const FOLLOWERS: u32 = 100;
const SUBJECTS: [u32; 2] = [1, 2];
/// For the edits, and for the commits of one kind.
const LIMIT: Duration = Duration::from_secs(20);
/// For all followers to have their snapshot, or for a change to be in force.
const FOLLOW: Duration = Duration::from_secs(60);

pub(super) fn measure(effort: Effort, report: &mut Report) -> Result<()> {
    let sizes = effort.choose([(1_000, COMPILE.0), (10_000, COMPILE.1)], [(50, COMPILE.0), (100, COMPILE.1)]);
    for (cidrs, most) in sizes {
        let mut scale = Scale::new(Size::mixed(cidrs, RULES_PER_CIDR, Layout::Dense, Families::Both))?;
        let of = format!("{cidrs} cidrs, {} rules", cidrs * RULES_PER_CIDR);
        policy(&mut scale, &of, most, effort, report)?;
        if (cidrs, most) == sizes[1] {
            commits(scale, &of, effort, report)?;
        }
    }
    Ok(())
}

/// Without a controller.
fn policy(scale: &mut Scale, of: &str, most: f64, effort: Effort, report: &mut Report) -> Result<()> {
    let mut took = Vec::new();
    for _ in 0..effort.choose(5, 2) {
        let start = Instant::now();
        Matrix::compile(&scale.network)?;
        took.push(milliseconds(start.elapsed()));
    }
    let name = format!("{of}: compile, in full");
    report.push(Row::new(name, median(&took), "ms").target(Target::AtMost(most)));
    let mut matrix = Matrix::compile(&scale.network)?;
    scale.network.take_touched();
    let (mut took, began) = (Vec::new(), Instant::now());
    while took.len() < effort.choose(200, 4) && began.elapsed() < LIMIT {
        let change = between_subjects(scale, took.len() as u32)?;
        let start = Instant::now();
        edit(scale, &mut matrix, &change)?;
        took.push(milliseconds(start.elapsed()));
    }
    let name = format!("{of}: edit, compiled and held against the limits, p99");
    let row = Row::new(name, quantile(&took, 0.99), "ms").also("p50", median(&took));
    report.push(row.target(Target::AtMost(EDIT)));
    Ok(())
}

/// What the controller does with one change, up to the store.
fn edit(scale: &mut Scale, matrix: &mut Matrix, change: &Change) -> Result<()> {
    scale.network.apply(change)?;
    let rows = scale.network.take_touched();
    let (next, affected) = matrix.follow(&scale.network, &rows)?;
    next.check_affected(&affected)?;
    *matrix = next;
    Ok(())
}

/// With a controller, and without and with followers.
fn commits(scale: Scale, of: &str, effort: Effort, report: &mut Report) -> Result<()> {
    let mut parts = scale.network.to_parts();
    parts.nodes.retain(|node| node.id != scale.subject);
    let followers: Vec<u32> = (0..effort.choose(FOLLOWERS, 5)).collect();
    let seeded = seed(parts, &followers)?;
    let mut server = Server::start(seeded.controller.path())?;
    let alone = commit_often(&mut server, None, &scale, effort)?;
    let name = format!("{of}: commit call without followers, p50");
    report.push(Row::new(name, median(&alone[0]), "ms").also("p99", quantile(&alone[0], 0.99)));
    let mut crowd = Crowd::new(seeded.nodes.path(), &followers, &SUBJECTS, &[])?;
    crowd.start()?;
    let mut owed: std::collections::BTreeSet<u32> = followers.iter().copied().collect();
    let here = crowd.until(FOLLOW, |event| {
        if let Event::Enforced { index, .. } = event {
            owed.remove(&index);
        }
        owed.is_empty()
    })?;
    let count = followers.len();
    if !here {
        let name = format!("{of}: commit call with {count} followers, p50");
        report.push(Row::missing(name, format!("not within {} s", FOLLOW.as_secs()), "ms"));
        return Ok(());
    }
    let [calls, enforced] = commit_often(&mut server, Some(&mut crowd), &scale, effort)?;
    let name = format!("{of}: commit call with {count} followers, p50");
    report.push(Row::new(name, median(&calls), "ms").also("p99", quantile(&calls, 0.99)));
    let name = format!("{of}: call to enforced at two nodes, p50");
    report.push(Row::new(name, median(&enforced), "ms").also("p99", quantile(&enforced, 0.99)));
    Ok(())
}

/// How long each call took, and until the nodes that it was about had it in force.
fn commit_often(
    server: &mut Server,
    mut crowd: Option<&mut Crowd>,
    scale: &Scale,
    effort: Effort,
) -> Result<[Vec<f64>; 2]> {
    let (mut calls, mut enforced, began) = (Vec::new(), Vec::new(), Instant::now());
    while calls.len() < effort.choose(40, 4) && (began.elapsed() < LIMIT || calls.len() % 2 == 1) {
        let change = between_subjects(scale, calls.len() as u32)?;
        let start = now();
        let (of, call) = server.commit(&change)?;
        calls.push(milliseconds(call));
        let Some(crowd) = &mut crowd else { continue };
        let mut owed = Vec::from(SUBJECTS);
        let there = crowd.until(FOLLOW, |event| {
            if let Event::Enforced { index, revision, at } = event
                && revision >= of
                && owed.contains(&index)
            {
                owed.retain(|other| *other != index);
                enforced.push(at.saturating_sub(start) as f64 / 1e6);
            }
            owed.is_empty()
        })?;
        anyhow::ensure!(there, "a change was not in force within {} s", FOLLOW.as_secs());
    }
    Ok([calls, enforced])
}

/// A rule between the cidrs of the two subjects, and on odd turns its end.
fn between_subjects(scale: &Scale, turn: u32) -> Result<Change> {
    let mut nodes = scale.network.nodes().values().filter(|node| node.id != scale.subject).skip(SUBJECTS[0] as usize);
    let mut cidr = || {
        let node = nodes.next().context("there are too few nodes")?;
        let cidr = scale.network.cidr_of_node(node.id).context("a node has no cidr")?;
        Ok::<_, anyhow::Error>(format!("cidr:{}", cidr.name))
    };
    let (from, to) = (cidr()?, cidr()?);
    rule_change("extra", Action::Allow, [&from, &to], "tcp/443", turn % 2 == 1)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
