//! Nodes that come from elsewhere: those that move, and those that join.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::crowd::{Event, now};
use super::follower;
use super::growth::Growth;
use super::lab::Lab;
use super::seed::node_dir;
use super::shape::Shape;
use crate::bench::report::{Report, Row, Target};
use crate::bench::statistics::{median, quantile};

/// What is added to a node's port when it moves.
const STEP: u16 = 30_000;
/// For one move to be known, and for many.
const MOVE_LIMIT: Duration = Duration::from_secs(10);
/// Milliseconds until the peers know where a node has moved to.
const KNOWN: f64 = 1_000.0;
/// For all that join.
const JOIN_LIMIT: Duration = Duration::from_secs(10);
/// That join at once.
const JOINING: usize = 16;

/// Nodes connect anew with WireGuard at another port: one by one, then many together.
pub(super) fn moves(lab: &mut Lab, report: &mut Report, _: &mut Growth) -> Result<Option<String>> {
    let (alone, together) = lab.moving.split_at(lab.moving.len().div_ceil(3));
    let (alone, together) = (alone.to_vec(), together.to_vec());
    let name = lab.row("a move is known to the peers, p99");
    let mut known = Vec::new();
    for index in alone {
        let start = now();
        let late = wait_for(lab, &[index], |at| known.push(at.saturating_sub(start) as f64 / 1e6))?;
        if late > 0 {
            let why = format!("not within {} s at {late} of its peers", MOVE_LIMIT.as_secs());
            report.push(Row::missing(name, why, "ms").target(Target::AtMost(KNOWN)));
            return Ok(None);
        }
    }
    let p99 = Row::new(name, quantile(&known, 0.99), "ms").also("p50", median(&known));
    report.push(p99.target(Target::AtMost(KNOWN)));
    let name = lab.row(&format!("moves per second, {} together", together.len()));
    let start = Instant::now();
    let late = wait_for(lab, &together, |_| {})?;
    report.push(match late {
        0 => Row::new(name, together.len() as f64 / start.elapsed().as_secs_f64(), "/s"),
        _ => Row::missing(name, format!("not within {} s: {late} peers do not know", MOVE_LIMIT.as_secs()), "/s"),
    });
    Ok(None)
}

/// Moves them, and waits until everybody who watches knows each of them; how many do not. `each` hears when one does.
fn wait_for(lab: &mut Lab, indices: &[u32], mut each: impl FnMut(u64)) -> Result<usize> {
    let mut owed = BTreeSet::new();
    for &index in indices {
        owed.extend(lab.shape.hundred().filter(|observer| *observer != index).map(|observer| (observer, index)));
        lab.crowd.move_to(index, Shape::port(index) + STEP)?;
    }
    lab.crowd.until(MOVE_LIMIT, |event| {
        if let Event::Moved { observer, index, port, at } = event
            && port == Shape::port(index) + STEP
            && owed.remove(&(observer, index))
        {
            each(at);
        }
        owed.is_empty()
    })?;
    Ok(owed.len())
}

/// Invited nodes redeem their invitations, as `noded join` does, while all others follow.
pub(super) fn joins(lab: &mut Lab, report: &mut Report, _: &mut Growth) -> Result<Option<String>> {
    let turns = Arc::new(Semaphore::new(JOINING));
    let nodes = lab.seeded.nodes.path().to_owned();
    let invitations = lab.seeded.invitations.clone();
    let start = Instant::now();
    let joined = lab.server.block_on(async {
        let mut joining = JoinSet::new();
        for (index, invitation) in invitations {
            let (turns, directory) = (Arc::clone(&turns), node_dir(&nodes, index));
            joining.spawn(async move {
                let _turn = turns.acquire_owned().await.context("no more turns")?;
                follower::join(&directory, &invitation).await
            });
        }
        let mut joined = 0_u32;
        let all = async {
            while let Some(result) = joining.join_next().await {
                result??;
                joined += 1;
            }
            Ok::<_, anyhow::Error>(())
        };
        match tokio::time::timeout(JOIN_LIMIT, all).await {
            Ok(result) => result.map(|()| joined),
            Err(_) => Ok(joined),
        }
    })?;
    let rate = f64::from(joined) / start.elapsed().as_secs_f64();
    report.push(Row::new(lab.row("joins per second"), rate, "/s").also("joined", f64::from(joined)));
    Ok(None)
}
