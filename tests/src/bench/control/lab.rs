//! One network with its controller and its nodes.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::crowd::{Crowd, Event};
use super::seed::{Seeded, seed};
use super::server::Server;
use super::shape::Shape;
use crate::bench::Effort;

/// Nodes that move, at most: a third of them one by one, the others together.
const MOVING: u32 = 36;

/// Nothing happened for this long.
const QUIET: Duration = Duration::from_millis(150);
/// CPU seconds per second, beyond what it uses at rest, of a controller that still has something to do.
const BUSY: f64 = 0.05;

/// Everything that runs. Dropped in this order: nodes, controller, directories.
#[derive(Debug)]
pub(super) struct Lab {
    pub(super) crowd: Crowd,
    pub(super) server: Server,
    pub(super) seeded: Seeded,
    pub(super) shape: Shape,
    pub(super) effort: Effort,
    /// Nodes that put in force what they receive.
    pub(super) enforcing: BTreeSet<u32>,
    /// Of these, the ones that move; none of those that a change is meant for alone.
    pub(super) moving: Vec<u32>,
    /// CPU seconds per second that the controller uses while nothing happens.
    pub(super) idle: f64,
}

impl Lab {
    /// The controller runs; no node has connected.
    pub(super) fn new(shape: Shape, effort: Effort) -> Result<Self> {
        eprintln!("{} ...", shape.name());
        let indices: Vec<u32> = (0..shape.nodes).collect();
        let enforcing: BTreeSet<u32> = shape.hundred().chain(shape.pair()).collect();
        let moving: Vec<u32> = shape.hundred().skip(1).take(effort.choose(MOVING, 3) as usize).collect();
        let seeded = seed(shape.parts()?, &indices)?;
        let server = Server::start(seeded.controller.path())?;
        let enforcing_list: Vec<u32> = enforcing.iter().copied().collect();
        let crowd = Crowd::new(seeded.nodes.path(), &indices, &enforcing_list, &moving)?;
        Ok(Self { crowd, server, seeded, shape, effort, enforcing, moving, idle: 0.0 })
    }

    /// Until nodes hear nothing more and the controller is at rest, or until the limit (`false`).
    pub(super) fn settle(&mut self, limit: Duration, mut each: impl FnMut(Event)) -> Result<bool> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            let (cpu, start, mut heard) = (self.server.cpu()?, Instant::now(), false);
            self.crowd.until(QUIET, |event| {
                heard = true;
                each(event);
                false
            })?;
            let busy = (self.server.cpu()? - cpu) / start.elapsed().as_secs_f64() - self.idle;
            if !heard && busy < BUSY {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The name of a row of this network.
    pub(super) fn row(&self, what: &str) -> String {
        format!("{}: {what}", self.shape.name())
    }
}
