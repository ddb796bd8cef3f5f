//! `cargo xtask bench`: measures on this machine, and prints one table.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;
use nix::unistd::Uid;

use crate::demo;
use crate::process::{Ended, kill_orphans, run as run_command};
use crate::setup::kernel::KernelVersion;
use crate::setup::{self, Purpose};
use crate::vm::{self, Job};

/// Optimised, and quicker to build than a release. A first build on two cores takes some minutes.
const PROFILE: &str = "measured";
/// Of crate `tests`. (Crate `ebpf` has a `bench`.)
const PROGRAM: &str = "measure";
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
/// The part of a bench for which the kernel's own WireGuard matters.
const IN_MACHINE: &str = "tunnel";
/// A full run of one bench takes less than twelve minutes on two cores.
const RUN_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Measure on this machine and print one table
///
/// Builds everything optimised (profile `measured`). A target that is missed is printed as missed; exit status 1 only
/// where something could not be measured. Run it on a machine that does nothing else.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask bench datapath --json bench.json")]
pub(crate) struct Args {
    /// What to measure
    what: What,
    /// Also write every row to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Small and few: that it works, not how fast
    #[arg(long)]
    quick: bool,
    /// Print the rows that have a target, in Markdown
    #[arg(long)]
    readme: bool,
    /// Measure in a virtual machine with this kernel of Debian's and its own WireGuard: the shape, not the speed, of what
    /// goes through a tunnel
    #[arg(long, value_name = "KERNEL", conflicts_with = "json")]
    vm: Option<KernelVersion>,
    /// Only these parts of it
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<String>,
}

/// A bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// What a packet costs, and what a policy costs
    Datapath,
    /// A node under a flood of forged handshakes
    Guard,
    /// What nodes cost their controller, and how soon they hear of a change
    Control,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if !Uid::effective().is_root() {
        bail!("a bench makes namespaces and loads eBPF programs; run it as root");
    }
    if let Some(version) = args.vm {
        return run_in_machine(args, version);
    }
    setup::ensure(&setup::BENCH)?;
    eprintln!("building with the profile `{PROFILE}` (a first build takes some minutes) ...");
    let mut build = Command::new("cargo");
    build.args(["build", "--workspace", "--bins", "--profile", PROFILE]);
    let built = run_command(&mut build, BUILD_LIMIT)?;
    if !built.success() {
        bail!("failed to build the bench ({built})");
    }
    let mut command = Command::new(crate::checkout::target().join(PROFILE).join(PROGRAM));
    command.args(args.words());
    let ended = run_command(&mut command, RUN_LIMIT)?;
    if !matches!(ended, Ended::Exited(_)) {
        eprintln!("the bench was {ended}");
    }
    for orphan in kill_orphans() {
        eprintln!("the bench left {orphan} running; killed it");
    }
    Ok(ExitCode::from(ended.code()))
}

/// The programs are those of the demo and the tests, which machines bring along.
fn run_in_machine(args: &Args, version: KernelVersion) -> Result<ExitCode> {
    setup::ensure(&[Purpose::Build, Purpose::Vm(version)])?;
    let built = demo::build()?;
    if !built.success() {
        bail!("failed to build the bench ({built})");
    }
    let mut words = args.words();
    if args.only.is_empty() {
        words.extend(["--only".to_owned(), IN_MACHINE.to_owned()]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let program = crate::checkout::target().join("debug").join(PROGRAM);
    let ended = vm::start(version, Job::new(&program, &words, RUN_LIMIT))?;
    if !ended.clean() {
        eprintln!("vm {version}: {ended}");
    }
    Ok(ExitCode::from(if ended.clean() { 0 } else { ended.code().max(1) }))
}

impl Args {
    /// As the program of crate `tests` takes them.
    fn words(&self) -> Vec<String> {
        let what = self.what.to_possible_value().map(|value| value.get_name().to_owned());
        let mut words = Vec::from_iter(what);
        for (wanted, option) in [(self.quick, "--quick"), (self.readme, "--readme")] {
            words.extend(wanted.then(|| option.to_owned()));
        }
        if let Some(path) = &self.json {
            words.extend(["--json".to_owned(), path.display().to_string()]);
        }
        if !self.only.is_empty() {
            words.extend(["--only".to_owned(), self.only.join(",")]);
        }
        words
    }
}
