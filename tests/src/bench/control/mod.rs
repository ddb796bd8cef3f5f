//! What nodes cost their controller, and how soon they hear of a change: the node's own code with a kernel that only
//! remembers, against a real `controllerd` over mutual TLS in a network namespace that has nothing but a loopback interface.
//!
//! ```text
//! measure control ──Unix socket (admin)──► controllerd ◄──mTLS, 198.18.1.x── measure control-followers (3,500 nodes each)
//!        ▲──────────────────────── what nodes hear and do, and when ────────────────────────────┘
//! ```

mod arrive;
mod change;
mod compile;
mod crowd;
mod follower;
mod growth;
mod lab;
mod loopback;
mod node;
mod running;
mod seed;
mod server;
mod shape;
mod start;

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;

use self::growth::Growth;
use self::lab::Lab;
use self::shape::{Kind, Shape};
use super::Effort;
use super::report::{Report, Row};

pub use self::crowd::{Process, run as run_followers};
pub use self::running::clean_up;

/// A part of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Cidrs of 100 nodes each, default deny.
    Groups,
    /// One cidr, and everybody reaches everybody.
    Mesh,
    /// Many cidrs and rules, few followers.
    Compile,
    /// One node, without a controller.
    Node,
}

/// Which parts to run.
#[derive(Clone, Debug, clap::Args)]
pub struct Selection {
    /// Only these parts.
    #[arg(long, value_delimiter = ',', value_name = "PART")]
    pub only: Vec<Part>,
}

/// Nodes that join while all others follow.
const JOINING: u32 = 200;
/// What there is left of the time of one network decides whether its next measurement begins.
const NETWORK_LIMIT: Duration = Duration::from_secs(240);

/// Runs the parts, and returns one table.
pub fn run(selection: &Selection, effort: Effort) -> Result<Report> {
    loopback::enter()?;
    let mut report = Report::new("cargo xtask bench control");
    report.heading.extend([
        "nodes: the code of `noded`; keys and certificates made in bulk (the network's own authority, the store before \
         `controllerd` starts), state on a file system in memory; `controllerd`'s state is on the disk"
            .to_owned(),
        "nodes that 2 and 100 of them stand for, and those who watch others move, put slices in force in a kernel in \
         memory; every other node acknowledges what it has received and checked"
            .to_owned(),
        "controller and nodes share these processors; CPU and memory are those of `controllerd` alone".to_owned(),
    ]);
    for &part in Part::value_variants() {
        if !selection.only.is_empty() && !selection.only.contains(&part) {
            continue;
        }
        match part {
            Part::Groups => {
                networks(Kind::Groups, &effort.choose(vec![100, 1_000, 10_000], vec![20, 40]), effort, &mut report)?
            }
            Part::Mesh => {
                networks(Kind::Mesh, &effort.choose(vec![100, 1_000, 2_000], vec![20, 40]), effort, &mut report)?
            }
            Part::Compile => compile::measure(effort, &mut report)?,
            Part::Node => node::measure(effort, &mut report)?,
        }
    }
    Ok(report)
}

/// One kind of network in several sizes, and how the cost of a change grows with them.
fn networks(kind: Kind, sizes: &[u32], effort: Effort, report: &mut Report) -> Result<()> {
    let mut growth = Growth::default();
    for &nodes in sizes {
        let shape = Shape { kind, nodes, invited: effort.choose(JOINING, 4) };
        let mut lab = Lab::new(shape, effort)?;
        match network(&mut lab, report, &mut growth)? {
            None => {}
            Some(why) => report.push(Row::missing(format!("{}: everything that follows", shape.name()), why, "")),
        }
    }
    growth.report(kind, report);
    Ok(())
}

/// Measures something of one network; the text: why nothing can follow it.
type Measure = fn(&mut Lab, &mut Report, &mut Growth) -> Result<Option<String>>;

/// Everything that is measured of one network; what ended it early, if anything did.
fn network(lab: &mut Lab, report: &mut Report, growth: &mut Growth) -> Result<Option<String>> {
    let began = Instant::now();
    let parts: [Measure; 5] = [start::cold, change::measure, arrive::moves, arrive::joins, start::resume];
    for part in parts {
        if began.elapsed() > NETWORK_LIMIT {
            return Ok(Some(format!("not within {} s", NETWORK_LIMIT.as_secs())));
        }
        if let Some(why) = part(lab, report, growth)? {
            return Ok(Some(why));
        }
        lab.crowd.check()?;
    }
    Ok(None)
}
