//! `cargo xtask vm`: runs a program of this machine under one of Debian's kernels, which have a WireGuard of their
//! own, in qemu without any help of the hardware.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::setup::kernel::{Kernel, KernelVersion};
use crate::setup::{self, Purpose, find_program};

mod boot;
mod image;

pub(crate) use boot::Ended;

/// Run a program in a virtual machine with one of Debian's kernels
///
/// The program is one of this machine's: it goes into the machine with its libraries, at the same path, together with
/// Rampart's own programs from target/debug and the usual tools (bash, ip, tc, wg, ping, nsenter, unshare, busybox).
/// Its output comes out here; its exit status is ours.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask vm 6.1 -- wg --version")]
pub(crate) struct Args {
    /// Kernel to boot
    kernel: KernelVersion,
    /// Seconds until it is killed
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    limit: u64,
    /// Set a variable in the program's environment
    #[arg(long = "env", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// Another file of this machine to take along, at the same path
    #[arg(long = "file", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Program and its arguments: a path, or a name that is looked for in target/debug and then on the path
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

/// What is to run in a machine.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) argv: Vec<String>,
    pub(crate) environment: Vec<String>,
    /// Files of this machine to take along besides Rampart's programs.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) limit: Duration,
}

impl Job {
    pub(crate) fn new(program: &Path, arguments: &[&str], limit: Duration) -> Self {
        let argv = [program.to_string_lossy().as_ref()].iter().chain(arguments).map(|&word| word.to_owned()).collect();
        Self { argv, environment: Vec::new(), files: Vec::new(), limit }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure(&[Purpose::Vm(args.kernel)])?;
    let job = Job {
        argv: args.program.clone(),
        environment: args.environment.clone(),
        files: args.files.clone(),
        limit: Duration::from_secs(args.limit),
    };
    let ended = start(args.kernel, job)?;
    if !ended.clean() {
        eprintln!("vm {}: {ended}", args.kernel);
    }
    Ok(ExitCode::from(ended.code()))
}

/// Boots the kernel, runs the job in it and takes the machine down.
pub(crate) fn start(version: KernelVersion, mut job: Job) -> Result<Ended> {
    let kernel = Kernel::open(version)?;
    let name = job.argv.first().context("no program was given to run")?;
    let program = locate(name)?;
    // Names of the machine's own tools stay names: the machine has them on its path.
    if name.contains('/') || program.starts_with(crate::checkout::target()) {
        job.argv[0] = program.to_string_lossy().into_owned();
    }
    let run = image::RunDirectory::create()?;
    let initrd = image::build(&kernel, &run, &program, &job)?;
    boot::boot(&kernel, &run, &initrd, job.limit)
}

/// The file of a program given by path or name.
fn locate(name: &str) -> Result<PathBuf> {
    let built = crate::checkout::target().join("debug").join(name);
    let found = match name.contains('/') {
        true => Some(crate::checkout::root().join(name)).filter(|path| path.is_file()),
        false => Some(built).filter(|path| path.is_file()).or_else(|| find_program(name)),
    };
    match found {
        Some(path) => std::path::absolute(&path).with_context(|| format!("failed to resolve `{}`", path.display())),
        None => bail!("there is no program `{name}` to run in the machine; build it, or install it here"),
    }
}
