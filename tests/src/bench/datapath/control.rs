//! Time and memory of a policy on its way into the kernel.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use ebpf_common::map;
use node::kernel::Datapath;
use node::lower::{RuleSlots, lower};
use policy::{Change, Matrix, RuleSpec};

use super::thousands;
use crate::bench::Effort;
use crate::bench::report::{Report, Row};
use crate::bench::scale::{Families, Layout, Scale, Size};
use crate::bench::statistics::{median, quantile};
use crate::conformance::Lab;

/// Milliseconds to switch to the large policy.
const SWITCH: f64 = 250.0;
/// Milliseconds to apply a one-rule delta.
const DELTA: f64 = 1.0;
/// Megabytes of one copy of the tables.
const TABLES: f64 = 16.0;

pub(super) fn measure(lab: &mut Lab, effort: Effort, report: &mut Report) -> Result<()> {
    let cidrs = effort.choose(10_000, 300);
    let size = Size::mixed(cidrs, 10, Layout::Dense, Families::Both);
    let of = format!("{} cidrs and {} rules", thousands(cidrs), thousands(cidrs * 10));
    let mut scale = Scale::new(size)?;
    let before = resident()?;
    let (matrix, compile) = timed(|| Matrix::compile(&scale.network));
    let matrix = matrix?;
    report.push(Row::new(format!("compile {of}"), compile, "ms"));
    report.push(Row::new(format!("the matrix of {of}"), resident()? - before, "MB"));
    let (mut slice, took) = timed(|| scale.slice_of(&matrix, 1, None));
    report.push(Row::new(format!("the slice of one node of {of}"), took, "ms"));

    let mut slots = RuleSlots::new();
    let before = resident()?;
    let (tables, took) = timed(|| {
        lower(slice.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?, &mut slots).map_err(anyhow::Error::from)
    });
    let tables = tables?;
    report.push(Row::new(format!("lower the slice of {of}"), took, "ms"));
    report.push(Row::new(format!("the lowered tables of {of} in `noded`"), resident()? - before, "MB"));
    lab.datapath.attach()?;
    let (switched, took) = timed(|| lab.datapath.switch(&tables));
    switched?;
    report.push(Row::new(format!("switch to {of}, from nothing"), took, "ms").at_most(Some(SWITCH)));
    let (settled, took) = timed(|| lab.datapath.settle());
    settled?;
    report.push(Row::new(format!("the other copy follows, {of}"), took, "ms"));
    let held = slice.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
    let (verified, took) = timed(|| verify_in_kernel(lab, held, &tables));
    verified?;
    let sizes = format!("{} cidrs, {} rules", thousands(cidrs), thousands(cidrs * 10));
    report.push(Row::new(format!("policy verify, {sizes}"), took, "ms"));
    report.push(Row::new("one copy of the tables in the kernel", copy_megabytes(lab)?, "MB").at_most(Some(TABLES)));
    let slice = slice.as_mut().map_err(|error| anyhow::anyhow!("{error}"))?;

    // Deltas: a rule about the subject comes, and goes again.
    let (mut whole, mut parts) = (Vec::new(), [Vec::new(), Vec::new(), Vec::new()]);
    for turn in 0..effort.choose(100, 4) {
        scale.network.apply(&change(&scale, turn)?)?;
        let matrix = Matrix::compile(&scale.network)?;
        let next = scale.slice_of(&matrix, u64::from(turn) + 2, Some(slice))?;
        let delta = slice.diff(&next);
        let start = Instant::now();
        slice.apply(delta)?;
        let applied = start.elapsed();
        let tables = lower(slice, &mut slots)?;
        let lowered = start.elapsed();
        lab.datapath.switch(&tables)?;
        let switched = start.elapsed();
        for (part, took) in parts.iter_mut().zip([applied, lowered - applied, switched - lowered]) {
            part.push(took.as_secs_f64() * 1e3);
        }
        whole.push(switched.as_secs_f64() * 1e3);
        // As the agent does, off the path of the change.
        lab.datapath.settle()?;
    }
    let name = format!("apply a one-rule delta to {of}");
    let p99 = quantile(&whole, 0.99);
    report.push(Row::new(format!("{name}, median"), median(&whole), "ms").at_most(Some(DELTA)));
    report.push(Row::new(format!("{name}, p99"), p99, "ms").at_most(Some(DELTA)));
    for (what, part) in ["the slice", "lowering", "the switch"].iter().zip(&parts) {
        report.push(Row::new(format!("{name}: {what}"), median(part), "ms").also("p99", quantile(part, 0.99)));
    }
    Ok(())
}

/// As `nodectl policy verify` does: every table is read back and compared with the intent.
fn verify_in_kernel(lab: &Lab, slice: &policy::Slice, tables: &node::lower::Tables) -> Result<()> {
    let reader = node::kernel::datapath::TableReader::open(crate::conformance::INTERFACE, &lab.bpffs)?;
    let (_, read) = reader.read()?.context("the tables were switched meanwhile")?;
    let verification = node::verify::verify(slice, &read, &tables.rule_slots);
    ensure!(verification.is_equal(), "the kernel's tables are not the policy: {verification:?}");
    Ok(())
}

/// A rule from one partner to the subject on odd turns, and its end on even ones.
fn change(scale: &Scale, turn: u32) -> Result<Change> {
    let name = "extra".parse()?;
    if turn % 2 == 1 {
        return Ok(Change::DeleteRule { name });
    }
    let from = scale.partner_names().nth(turn as usize * 3 + 5).expect("there are more");
    Ok(Change::AddRule(RuleSpec {
        name,
        action: policy::Action::Allow,
        from: vec![format!("cidr:{from}").parse()?],
        to: vec![format!("cidr:{}", Scale::SUBJECT_CIDR).parse()?],
        services: vec!["tcp/443".parse()?],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    }))
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed().as_secs_f64() * 1e3)
}

/// Memory of this process, in MB.
fn resident() -> Result<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = statm.split(' ').nth(1).unwrap_or_default().parse()?;
    Ok(pages * 4_096.0 / 1e6)
}

/// What the kernel holds for one of the two copies: each table map has room for both.
fn copy_megabytes(lab: &Lab) -> Result<f64> {
    let mut bytes = 0;
    for table in map::POLICY {
        let info = MapData::from_pin(lab.pin("maps").join(table))?.info()?;
        // An array's entry takes whole words.
        bytes += u64::from(info.value_size().next_multiple_of(8)) * u64::from(info.max_entries());
    }
    Ok(bytes as f64 / 2.0 / 1e6)
}
