//! `cargo xtask setup`: brings what is missing for building the eBPF programs and for the tests.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::process::interrupted;
use crate::progress::seconds;
use crate::vm::KernelVersion;

mod apt;
pub(crate) mod kernel;
mod program;
mod toolchain;

pub(crate) use program::find as find_program;

/// Bring what is missing for building and testing
///
/// On Debian by apt; compilers of yours that will do are used. Safe to run again, quick when nothing is missing.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask setup --check")]
pub(crate) struct Args {
    /// Change nothing; say what is missing and how to get it, exit status 1 if anything is
    #[arg(long)]
    check: bool,
}

/// What a verb is going to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Build,
    /// Namespaces and traffic on this kernel.
    Mesh,
    /// Format, lint, scrape.
    Test,
    Vm(KernelVersion),
}

const EVERYTHING: [Purpose; 5] =
    [Purpose::Build, Purpose::Mesh, Purpose::Test, Purpose::Vm(KernelVersion::V6_1), Purpose::Vm(KernelVersion::V6_12)];

/// Something that is missing.
#[derive(Debug)]
struct Missing {
    what: String,
    why: &'static str,
    remedy: Remedy,
}

/// How to get it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Remedy {
    Package(&'static str),
    /// Debian's compiler with the source of `core`, and LLVM of the same version.
    DebianCompiler,
    LlvmHeaders {
        major: u32,
    },
    BpfLinker {
        llvm: u32,
    },
    RustComponent(&'static str),
    Kernel(KernelVersion),
    /// Nothing that set-up may do by itself.
    ByHand(String),
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    if args.check {
        let missing = missing(&EVERYTHING)?;
        if missing.is_empty() {
            println!("setup: nothing is missing ({})", seconds(started.elapsed()));
            return Ok(ExitCode::SUCCESS);
        }
        println!("{}", report(&missing));
        return Ok(ExitCode::FAILURE);
    }
    ensure(&EVERYTHING)?;
    println!("setup: everything is there ({})", seconds(started.elapsed()));
    Ok(ExitCode::SUCCESS)
}

/// What `cargo xtask test` needs. What only the virtual machines lack is said here, and fails their stages alone.
pub(crate) fn ensure_tests() -> Result<()> {
    match ensure(&EVERYTHING) {
        Err(error) if interrupted().is_none() => {
            eprintln!("{error:#}");
            ensure(&[Purpose::Build, Purpose::Mesh, Purpose::Test]).context("the tests cannot run")
        }
        result => result,
    }
}

/// Brings what is missing for these purposes.
pub(crate) fn ensure(purposes: &[Purpose]) -> Result<()> {
    // A remedy can uncover the next thing that is missing: the compiler says which LLVM, LLVM lets the linker build.
    let mut before: Vec<Remedy> = Vec::new();
    loop {
        let missing = missing(purposes)?;
        if missing.is_empty() {
            return Ok(());
        }
        let tried = |missing: &Missing| before.contains(&missing.remedy) || matches!(missing.remedy, Remedy::ByHand(_));
        if missing.iter().all(tried) {
            bail!("{}", report(&missing));
        }
        let needs_root = missing.iter().any(|missing| missing.remedy.needs_root());
        if needs_root && !Uid::effective().is_root() {
            bail!("{}", report(&missing));
        }
        before.extend(apply(missing.into_iter().map(|missing| missing.remedy).collect())?);
    }
}

fn missing(purposes: &[Purpose]) -> Result<Vec<Missing>> {
    let mut missing = program::missing(purposes);
    if purposes.contains(&Purpose::Build) {
        missing.extend(toolchain::missing()?);
    }
    if purposes.contains(&Purpose::Test) {
        missing.extend(toolchain::missing_components()?);
    }
    for purpose in purposes {
        if let Purpose::Vm(version) = purpose
            && !kernel::is_there(*version)
        {
            missing.push(Missing {
                what: format!("Debian's kernel {version}"),
                why: "has a WireGuard of its own; it is unpacked, not installed",
                remedy: Remedy::Kernel(*version),
            });
        }
    }
    Ok(missing)
}

/// Applies packages first, and nothing else with them: what they bring may change what the rest needs. Returns what was
/// applied.
fn apply(mut remedies: Vec<Remedy>) -> Result<Vec<Remedy>> {
    if remedies.iter().any(|remedy| !remedy.packages().is_empty()) {
        remedies.retain(|remedy| !remedy.packages().is_empty());
        apt::install(&remedies.iter().flat_map(Remedy::packages).collect::<Vec<_>>())?;
        return Ok(remedies);
    }
    for remedy in &remedies {
        match remedy {
            Remedy::BpfLinker { llvm } => toolchain::install_bpf_linker(*llvm)?,
            Remedy::RustComponent(name) => toolchain::install_component(name)?,
            Remedy::Kernel(version) => kernel::fetch(*version)?,
            Remedy::Package(_) | Remedy::DebianCompiler | Remedy::LlvmHeaders { .. } | Remedy::ByHand(_) => {}
        }
    }
    Ok(remedies)
}

impl Remedy {
    fn packages(&self) -> Vec<String> {
        match self {
            Self::Package(name) => vec![(*name).to_owned()],
            Self::DebianCompiler => vec!["rustc-web".to_owned(), "rust-web-src".to_owned()],
            Self::LlvmHeaders { major } => vec![format!("llvm-{major}-dev")],
            Self::BpfLinker { .. } | Self::RustComponent(_) | Self::Kernel(_) | Self::ByHand(_) => Vec::new(),
        }
    }

    fn needs_root(&self) -> bool {
        !self.packages().is_empty()
    }

    /// What to type, for somebody who would rather do it by hand.
    fn command(&self) -> String {
        match self {
            Self::Package(_) | Self::DebianCompiler | Self::LlvmHeaders { .. } => {
                format!("apt-get install --no-install-recommends {}", self.packages().join(" "))
            }
            Self::BpfLinker { llvm } => toolchain::bpf_linker_command(*llvm),
            Self::RustComponent(name) => format!("rustup component add {name}"),
            Self::Kernel(_) => "cargo xtask setup".to_owned(),
            Self::ByHand(text) => text.clone(),
        }
    }
}

fn report(missing: &[Missing]) -> String {
    let mut text = String::from("set-up is not complete");
    for Missing { what, why, remedy } in missing {
        text.push_str(&format!("\n  missing: {what} ({why})\n      get it: {}", remedy.command()));
    }
    let root = if missing.iter().any(|missing| missing.remedy.needs_root()) { " as root" } else { "" };
    if missing.iter().any(|missing| !matches!(missing.remedy, Remedy::ByHand(_))) {
        text.push_str(&format!("\nall of it at once: run `cargo xtask setup`{root}"));
    }
    text
}
