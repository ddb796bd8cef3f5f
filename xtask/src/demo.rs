//! `cargo xtask demo`: a mesh of real nodes on this machine, or in a virtual one.

use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::process::{Ended, kill_orphans, run as run_command};
use crate::setup::kernel::KernelVersion;
use crate::setup::{self, Purpose};
use crate::vm::{self, Job};

/// A first build on two cores takes 6 minutes.
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);
/// The demo takes half a minute here, and several times that in a machine without hardware to help it.
const RUN_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Run a real mesh and show its policy enforced
///
/// A controller and the nodes web1, app1 and db1, each in namespaces of its own, joined by invitation. Exit status 0
/// only if all traffic went as the policy says.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask demo --keep")]
pub(crate) struct Args {
    /// Leave the mesh running and say how to enter each node
    #[arg(long, conflicts_with = "vm")]
    keep: bool,
    /// Run it in a virtual machine with this kernel of Debian's and its own WireGuard
    #[arg(long, value_name = "KERNEL")]
    vm: Option<KernelVersion>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let mut purposes = vec![Purpose::Build, Purpose::Mesh];
    purposes.extend(args.vm.map(Purpose::Vm));
    setup::ensure(&purposes)?;
    eprintln!("building (a first build takes some minutes) ...");
    let built = build()?;
    if !built.success() {
        bail!("failed to build the demo ({built})");
    }
    let program = crate::checkout::target().join("debug/demo");
    if let Some(version) = args.vm {
        let ended = vm::start(version, Job::new(&program, &[], RUN_LIMIT))?;
        if !ended.clean() {
            eprintln!("vm {version}: {ended}");
        }
        return Ok(ExitCode::from(if ended.clean() { 0 } else { ended.code().max(1) }));
    }
    let mut command = Command::new(&program);
    if args.keep {
        command.arg("--keep");
    }
    let ended = run_command(&mut command, RUN_LIMIT)?;
    if !matches!(ended, Ended::Exited(_)) {
        eprintln!("the demo was {ended}");
    }
    if !(args.keep && ended.success()) {
        for orphan in kill_orphans() {
            eprintln!("the demo left {orphan} running; killed it");
        }
    }
    Ok(ExitCode::from(ended.code()))
}

/// Builds every program that the demo and the tests run. The whole workspace, here and in the tests: cargo resolves
/// features for what it is asked to build, so that anything less would build much of it twice.
pub(crate) fn build() -> Result<Ended> {
    let mut command = Command::new("cargo");
    command.args(["build", "--workspace", "--bins"]);
    run_command(&mut command, BUILD_LIMIT)
}
