//! Time and memory of a policy on its way into the kernel.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use controller_api::v1;
use ebpf_common::map;
use node::enforce::guard::Watch;
use node::enforce::{Enforcer, Setup};
use node::kernel::datapath::EbpfDatapath;
use node::kernel::fake::FakeKernel;
use node::kernel::{Backend, Datapath};
use node::key::PrivateKey;
use node::lower::{RuleSlots, lower};
use node::uplink::follow::receive;
use node::uplink::journal::Journal;
use policy::{Change, Matrix, RuleSpec, Slice};
use prost::Message as _;
use tokio::sync::watch;

use super::thousands;
use super::timed::{Switched, Timed};
use crate::bench::Effort;
use crate::bench::report::{Report, Row};
use crate::bench::scale::{Families, Layout, Scale, Size};
use crate::bench::statistics::{median, quantile};
use crate::conformance::{INTERFACE, Lab};

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
    let (slice, took) = timed(|| scale.slice_of(&matrix, 1));
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
    measure_deltas(lab, &mut scale, &slice?, effort, &format!("apply a one-rule delta to {of}"), report)
}

/// Deltas, as a node takes them from its controller: a rule about the subject comes, and goes again. WireGuard is one in
/// memory; the tables are the kernel's.
fn measure_deltas(
    lab: &mut Lab,
    scale: &mut Scale,
    slice: &Slice,
    effort: Effort,
    name: &str,
    report: &mut Report,
) -> Result<()> {
    let switched = Switched::default();
    let state_dir = tempfile::tempdir()?;
    let mut enforcer = enforcer(lab, switched.clone(), state_dir.path().to_owned())?;
    let mut held = Arc::new(receive(None, slice.to_delta(), scale.subject)?);
    let (_, took) = timed(|| enforcer.enforce(Arc::clone(&held)));
    report.push(Row::new("put the first policy in force, with peers and disk", took, "ms"));
    enforcer.settle();

    let (mut in_force, mut received, mut acknowledged, mut settled) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for turn in 0..effort.choose(100, 4) {
        scale.network.apply(&change(scale, turn)?)?;
        let matrix = Matrix::compile(&scale.network)?;
        let next = scale.slice_of(&matrix, u64::from(turn) + 2)?;
        let update = v1::Update::from(&held.diff(&next)).encode_to_vec();
        switched.take();
        let start = Instant::now();
        held = Arc::new(receive(Some(&held), v1::Update::decode(&update[..])?.try_into()?, scale.subject)?);
        let since = |moment: Instant| moment.duration_since(start).as_secs_f64() * 1e3;
        received.push(since(Instant::now()));
        enforcer.enforce(Arc::clone(&held));
        acknowledged.push(since(Instant::now()));
        in_force.push(since(switched.take().context("the delta was not put in force")?));
        enforcer.settle();
        settled.push(since(Instant::now()));
        ensure!(enforcer.error.is_none(), "the enforcer could not do everything: {:?}", enforcer.error);
    }
    let p99 = quantile(&in_force, 0.99);
    report.push(Row::new(format!("{name}, median"), median(&in_force), "ms").at_most(Some(DELTA)));
    report.push(Row::new(format!("{name}, p99"), p99, "ms").at_most(Some(DELTA)));
    let parts = [
        ("of that, until it is checked", received),
        ("until it can be acknowledged, with peers and disk", acknowledged),
        ("until the next one need not wait", settled),
    ];
    for (what, part) in parts {
        report.push(Row::new(format!("{name}: {what}"), median(&part), "ms").also("p99", quantile(&part, 0.99)));
    }
    Ok(())
}

/// As `nodectl policy verify` does: every table is read back and compared with the intent.
fn verify_in_kernel(lab: &Lab, slice: &policy::Slice, tables: &node::lower::Tables) -> Result<()> {
    let reader = node::kernel::datapath::TableReader::open(crate::conformance::INTERFACE, &lab.bpffs)?;
    let (_, read) = reader.read()?.context("the tables were switched meanwhile")?;
    let slots = tables.rule_slots.iter().map(|(rule, slot)| (*rule, *slot)).collect();
    let verification = node::verify::verify(slice, &read, &slots);
    ensure!(verification.is_equal(), "the kernel's tables are not the policy: {verification:?}");
    Ok(())
}

/// What `noded` does with slices, on the tables of the lab.
fn enforcer(lab: &mut Lab, switched: Switched, state_dir: PathBuf) -> Result<Enforcer> {
    let kernel = FakeKernel::new(Backend::Userspace);
    lab.restart();
    let mut datapath = std::mem::replace(&mut lab.datapath, EbpfDatapath::new(INTERFACE, &lab.bpffs));
    datapath.attach()?;
    kernel.world().datapath = Some(datapath.observe()?);
    let setup = Setup {
        wireguard: Box::new(kernel.wireguard()),
        link: Box::new(kernel.link()),
        datapath: Box::new(Timed { datapath, switched }),
        guard: Watch::none(),
        key: PrivateKey::generate()?,
        journal: Journal::new(state_dir),
        listen_port: 51_820,
        mtu: 1_420,
        persistent_keepalive: None,
        reconcile_interval: Duration::from_secs(60),
        slots: Some(RuleSlots::new()),
        holders: Default::default(),
        time: 0,
    };
    let (enforced, _) = watch::channel(Default::default());
    let (names, _) = watch::channel(Default::default());
    let mut enforcer = Enforcer::new(setup, enforced, names);
    enforcer.round();
    Ok(enforcer)
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
