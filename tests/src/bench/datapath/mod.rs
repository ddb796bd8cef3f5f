//! What a packet costs in the kernel, and what a policy costs, part by part.

mod control;
mod lookup;
mod program;
mod receive;
mod receiver;
mod timed;
pub(in crate::bench) mod traffic;
pub(in crate::bench) mod tunnel;
mod whole;

use anyhow::Result;
use clap::ValueEnum;

use super::Effort;
use super::report::{Report, Row};
use crate::conformance::{Lab, in_lab};
use crate::mesh::Family;

/// A part of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Nanoseconds of the policy lookup, beside what others do.
    Lookup,
    /// Nanoseconds of the whole program, by what becomes of a packet.
    Whole,
    /// Packets per second into a namespace, beside nftables and iptables.
    Receive,
    /// Throughput and round trips through WireGuard.
    Tunnel,
    /// Time and memory to compile, lower and switch a policy.
    Control,
}

/// Which parts to run.
#[derive(Clone, Debug, clap::Args)]
pub struct Selection {
    /// Only these parts.
    #[arg(long, value_delimiter = ',', value_name = "PART")]
    pub only: Vec<Part>,
}

/// Runs the parts, and returns one table.
pub fn run(selection: &Selection, effort: Effort) -> Result<Report> {
    let mut report = Report::new("cargo xtask bench datapath");
    for &part in Part::value_variants() {
        if !selection.only.is_empty() && !selection.only.contains(&part) {
            continue;
        }
        match part {
            Part::Lookup => on_host(|lab| lookup::measure(lab, effort, &mut report))?,
            Part::Whole => on_host(|lab| whole::measure(lab, effort, &mut report))?,
            Part::Receive => on_host(|lab| receive::measure(lab, effort, &mut report))?,
            Part::Tunnel => on_host(|lab| tunnel::measure(lab, effort, &mut report))?,
            Part::Control => on_host(|lab| control::measure(lab, effort, &mut report))?,
        }
    }
    Ok(report)
}

/// On a separate host with one interface and bpffs.
pub(in crate::bench) fn on_host(measure: impl FnOnce(&mut Lab) -> Result<()> + Send) -> Result<()> {
    let mut result = Ok(());
    in_lab(|lab| result = measure(lab));
    result
}

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// Of two targets, that of the family.
fn of_family<T>(family: Family, (v4, v6): (T, T)) -> T {
    match family {
        Family::V4 => v4,
        Family::V6 => v6,
    }
}

/// 10000 as "10,000".
fn thousands(number: u32) -> String {
    if number >= 1_000 { format!("{},{:03}", number / 1_000, number % 1_000) } else { number.to_string() }
}

/// A row of nanoseconds: the median, and beside it the minimum.
fn nanoseconds(name: String, cost: program::Cost) -> Row {
    Row::new(name, cost.median, "ns").also("minimum", cost.minimum)
}
