//! `cargo xtask test`: every test from one command, stage by stage.

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::unistd::Uid;
use serde_json::Value;

use crate::check::{self, What};
use crate::demo;
use crate::process::{self, Running, interrupted, kill_orphans};
use crate::progress::seconds;
use crate::setup::kernel::KernelVersion;
use crate::setup::{self, Purpose};
use crate::vm::{self, Job};

/// Run every test
///
/// Brings what is missing, then runs the stages one after the other; a failed one does not keep the others from
/// running. Needs root, for namespaces and eBPF. Exit status 0 only if all is well.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask test --only conformance --minutes 30")]
pub(crate) struct Args {
    /// Only this stage; may be given several times
    #[arg(long, value_enum, value_name = "STAGE")]
    only: Vec<Stage>,
    /// How long conformance judges packets of random networks, in place of a million verdicts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MOST_MINUTES))]
    minutes: Option<u64>,
}

/// A week. A longer run is a second one.
const MOST_MINUTES: u64 = 7 * 24 * 60;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// The code is formatted
    Format,
    /// Dependencies between crates, layers and folders
    Arrows,
    /// Licences, duplicates and sources of what is linked in
    Dependencies,
    /// Links and commands in documents
    Docs,
    /// Clippy has nothing to say
    Lint,
    /// Everything builds
    Build,
    /// Tests of each crate by itself
    Unit,
    /// Interpreter, compiled matrix and loaded program give one verdict
    Conformance,
    /// Nodes in namespaces on this kernel, end to end
    Netns,
    /// Conformance, the kernel's WireGuard, the demo and lost agents under kernel 6.1
    #[value(name = "vm-6.1")]
    Vm6_1,
    /// Conformance, the kernel's WireGuard, the demo and lost agents under kernel 6.12
    #[value(name = "vm-6.12")]
    Vm6_12,
}

const MINUTE: Duration = Duration::from_secs(60);
const CONFORMANCE: &str = "conformance";
/// Crate `tests`; and `ebpf`, which has none, but with which cargo resolves the same features as for the workspace.
const TESTS: [&str; 4] = ["-p", "tests", "-p", "ebpf"];
/// How long conformance draws random networks on an emulated processor, which spends most of that on one of them.
const EMULATED_SECONDS: u64 = 15;
/// Read by the conformance tests.
const RANDOM_SECONDS: &str = "RAMPART_RANDOM_SECONDS";
/// And how many times less often they do what takes thousands of repetitions.
const SHARE: &str = "RAMPART_SHARE=8";
/// Output that differs from its committed snapshot fails, and nothing is written.
const SNAPSHOTS: (&str, &str) = ("INSTA_UPDATE", "no");
/// Run by another stage.
const NOT_NETNS: [&str; 1] = [CONFORMANCE];

impl Stage {
    /// Several times what a stage takes on two cores, for a machine that is slow or building for the first time.
    fn limit(self, minutes: Option<u64>) -> Duration {
        match self {
            Self::Conformance => {
                15 * MINUTE + minutes.map_or(Duration::ZERO, |minutes| Duration::from_secs(60 * minutes))
            }
            Self::Format | Self::Arrows | Self::Dependencies | Self::Docs => 2 * MINUTE,
            Self::Lint | Self::Build => 30 * MINUTE,
            Self::Unit => 15 * MINUTE,
            Self::Netns => 20 * MINUTE,
            Self::Vm6_1 | Self::Vm6_12 => 38 * MINUTE,
        }
    }

    fn needs_root(self) -> bool {
        matches!(self, Self::Unit | Self::Conformance | Self::Netns)
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default().as_str())
    }
}

/// A stage that is over. `Err` says why it failed.
#[derive(Debug)]
struct Outcome {
    stage: Stage,
    result: Result<(), String>,
    took: Duration,
}

/// `xtask` is the command line that documents speak of.
pub(crate) fn run(args: &Args, xtask: &clap::Command) -> Result<ExitCode> {
    let started = Instant::now();
    setup::ensure_tests()?;
    let wanted = |stage: &&Stage| args.only.is_empty() || args.only.contains(stage);
    let mut outcomes: Vec<Outcome> = Vec::new();
    for &stage in Stage::value_variants().iter().filter(wanted) {
        let unbuilt = outcomes.iter().any(|outcome| outcome.stage == Stage::Build && outcome.result.is_err());
        outcomes.push(run_stage(stage, args.minutes, unbuilt, xtask));
        if let Some(signal) = interrupted() {
            print_summary(&outcomes, started.elapsed());
            bail!("interrupted by {signal}");
        }
    }
    print_summary(&outcomes, started.elapsed());
    let good = outcomes.iter().all(|outcome| outcome.result.is_ok());
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_stage(stage: Stage, minutes: Option<u64>, unbuilt: bool, xtask: &clap::Command) -> Outcome {
    let limit = stage.limit(minutes);
    println!("\n==> {stage} (at most {} min)", limit.as_secs() / 60);
    let started = Instant::now();
    let result = if unbuilt {
        Err("not run: the build failed".to_owned())
    } else {
        stage_result(stage, minutes, xtask).map_err(|error| format!("{error:#}"))
    };
    let orphans = kill_orphans();
    let result = match (result, orphans.as_slice()) {
        (Ok(()), [first, ..]) => Err(format!("left {} processes running, such as {first}", orphans.len())),
        (result, _) => result,
    };
    let took = started.elapsed();
    match &result {
        Ok(()) => println!("<== {stage}: ok in {}", seconds(took)),
        Err(reason) => println!("<== {stage}: FAILED in {}: {reason}", seconds(took)),
    }
    let _best_effort = std::io::stdout().flush();
    Outcome { stage, result, took }
}

fn stage_result(stage: Stage, minutes: Option<u64>, xtask: &clap::Command) -> Result<()> {
    if stage.needs_root() && !Uid::effective().is_root() {
        bail!("it makes namespaces and loads eBPF programs; run `cargo xtask test` as root");
    }
    let limit = stage.limit(minutes);
    match stage {
        Stage::Format => cargo(&["fmt", "--all", "--check"], limit),
        Stage::Lint => cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], limit),
        Stage::Arrows => in_order(What::Arrows, xtask),
        Stage::Dependencies => in_order(What::Dependencies, xtask),
        Stage::Docs => in_order(What::Docs, xtask),
        Stage::Build => {
            let built = demo::build()?;
            if !built.success() {
                bail!("`cargo build`: {built}");
            }
            cargo(&["test", "--workspace", "--no-run"], limit)
        }
        Stage::Unit => cargo(&["test", "--workspace", "--exclude", "tests"], limit),
        Stage::Conformance => {
            let arguments = [&["test"], &TESTS[..], &["--lib", "--bins", "--test", CONFORMANCE]].concat();
            let environment = minutes.map(|minutes| (RANDOM_SECONDS, (60 * minutes).to_string()));
            cargo_with(&arguments, environment, limit)
        }
        Stage::Netns => netns(limit),
        Stage::Vm6_1 => machine(KernelVersion::V6_1, limit),
        Stage::Vm6_12 => machine(KernelVersion::V6_12, limit),
    }
}

fn cargo(arguments: &[&str], limit: Duration) -> Result<()> {
    cargo_with(arguments, None, limit)
}

fn cargo_with(arguments: &[&str], environment: Option<(&str, String)>, limit: Duration) -> Result<()> {
    println!("cargo {}", arguments.join(" "));
    let environment = environment.iter().map(|(name, value)| (*name, value.as_str())).chain([SNAPSHOTS]);
    let ended = process::run(Command::new("cargo").args(arguments).envs(environment), limit)?;
    if !ended.success() {
        bail!("{ended}");
    }
    Ok(())
}

fn in_order(what: What, xtask: &clap::Command) -> Result<()> {
    if !check::check(what, xtask)? {
        bail!("see the findings above");
    }
    Ok(())
}

fn netns(limit: Duration) -> Result<()> {
    if !Path::new("/dev/net/tun").exists() {
        bail!(
            "there is no `/dev/net/tun` for the userspace WireGuard; load the module `tun`, or give it to the container"
        );
    }
    let build = demo::build()?;
    if !build.success() {
        bail!("`cargo build`: {build}");
    }
    let files = netns_tests(&crate::checkout::root().join("tests/tests"))?;
    let mut arguments = [&["test", "--no-fail-fast"], &TESTS[..]].concat();
    arguments.extend(files.iter().flat_map(|file| ["--test", file]));
    cargo(&arguments, limit)
}

/// The integration tests of crate `tests` that no other stage runs, by name.
fn netns_tests(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("failed to read `{}`", folder.display()))?;
    let name = |path: PathBuf| {
        let is_test = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").exists();
        Some(path.file_stem().filter(|_| is_test)?.to_str()?.to_owned())
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| name(entry.path()))
        .filter(|name| !NOT_NETNS.contains(&name.as_str()))
        .collect();
    names.sort();
    if names.is_empty() {
        bail!("there are no tests in `{}`", folder.display());
    }
    Ok(names)
}

/// What needs the kernel's WireGuard or another way to attach: conformance, WireGuard itself, the demo, and the tests that
/// detach programs and kill agents.
fn machine(version: KernelVersion, limit: Duration) -> Result<()> {
    setup::ensure(&[Purpose::Vm(version)])?;
    let started = Instant::now();
    let build = demo::build()?;
    if !build.success() {
        bail!("`cargo build`: {build}");
    }
    let [conformance, wireguard, netns] = test_executables([CONFORMANCE, "wireguard", "netns"], limit)?;
    let runs: [(PathBuf, &[&str]); 4] = [
        (conformance, &[]),
        (wireguard, &["--ignored"]),
        (crate::checkout::target().join("debug/demo"), &[]),
        (netns, &["--test-threads=1", "ingress_alone", "killed_agents"]),
    ];
    for (program, arguments) in runs {
        let left = limit.saturating_sub(started.elapsed());
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        println!("kernel {version}: {name} {}", arguments.join(" "));
        let _best_effort = std::io::stdout().flush();
        let mut job = Job::new(&program, arguments, left);
        job.environment.extend([format!("{RANDOM_SECONDS}={EMULATED_SECONDS}"), SHARE.to_owned()]);
        let ended = vm::start(version, job)?;
        if !ended.clean() {
            bail!("`{name}`: {ended}");
        }
    }
    Ok(())
}

/// Builds integration tests by name and says where they are.
fn test_executables<const N: usize>(names: [&str; N], limit: Duration) -> Result<[PathBuf; N]> {
    let list = crate::checkout::target().join("tests.json");
    let file = fs::File::create(&list).with_context(|| format!("failed to create `{}`", list.display()))?;
    let mut command = Command::new("cargo");
    command.args(["test", "--workspace", "--no-run"]).args(names.iter().flat_map(|name| ["--test", name]));
    command.arg("--message-format=json-render-diagnostics").stdout(Stdio::from(file));
    let ended = Running::spawn(&mut command)?.wait(limit, || ())?;
    if !ended.success() {
        bail!("failed to build the tests ({ended})");
    }
    let text = fs::read_to_string(&list).with_context(|| format!("failed to read `{}`", list.display()))?;
    let messages: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let executable = |name: &str| {
        let of_test = messages.iter().filter(|message| message["target"]["name"] == name);
        of_test.filter_map(|message| message["executable"].as_str()).next().map(PathBuf::from)
    };
    let mut found = names.map(|_| PathBuf::new());
    for (place, name) in found.iter_mut().zip(names) {
        *place = executable(name).with_context(|| format!("cargo built no test `{name}`"))?;
    }
    Ok(found)
}

fn print_summary(outcomes: &[Outcome], took: Duration) {
    println!("\nstage         result      time");
    for Outcome { stage, result, took } in outcomes {
        let (word, reason) = match result {
            Ok(()) => ("ok", ""),
            Err(reason) => ("FAILED", reason.lines().next().unwrap_or_default()),
        };
        let line = format!("{:<12}  {word:<6}  {:>12}  {reason}", stage.to_string(), seconds(*took));
        println!("{}", line.trim_end());
    }
    let failed = outcomes.iter().filter(|outcome| outcome.result.is_err()).count();
    let verdict =
        if failed == 0 { "every stage is ok".to_owned() } else { format!("{failed} of {} FAILED", outcomes.len()) };
    println!("{verdict}, {} in all", seconds(took));
    let _best_effort = std::io::stdout().flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_have_the_names_that_their_kernels_have() {
        let names: Vec<String> = Stage::value_variants().iter().map(Stage::to_string).collect();
        for version in KernelVersion::value_variants() {
            assert!(names.contains(&format!("vm-{version}")), "{names:?}");
        }
    }
}
