//! `cargo xtask setup`: brings what is missing for building the eBPF programs and for the tests.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Error, Result, bail};
use nix::unistd::Uid;

use crate::process::interrupted;
use crate::progress::seconds;

mod apt;
mod cargo_deny;
pub(crate) mod kernel;
mod program;
pub(crate) mod qemu;
mod toolchain;
mod unpacked;

use kernel::KernelVersion;
pub(crate) use program::find as find_program;

/// Bring what is missing for building and testing
///
/// On Debian by apt, which removes nothing of yours; compilers of yours that will do are used. Safe to run again,
/// quick when nothing is missing.
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
    /// What Rampart's speed is measured with and compared to.
    Bench,
}

/// For building and for every test.
const EVERYTHING: [Purpose; 5] =
    [Purpose::Build, Purpose::Mesh, Purpose::Test, Purpose::Vm(KernelVersion::V6_1), Purpose::Vm(KernelVersion::V6_12)];
/// For `cargo xtask bench`.
pub(crate) const BENCH: [Purpose; 3] = [Purpose::Build, Purpose::Mesh, Purpose::Bench];

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
    CargoDeny,
    Kernel(KernelVersion),
    /// Unpacked, not installed, since apt would remove these packages for it.
    Qemu {
        removes: Vec<String>,
    },
    /// Nothing that set-up may do by itself.
    ByHand(String),
}

/// A remedy that was applied, and why that failed if it did.
#[derive(Debug)]
struct Tried {
    remedy: Remedy,
    failure: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    if args.check {
        let missing = missing(&EVERYTHING)?;
        if missing.is_empty() {
            println!("setup: nothing is missing ({})", seconds(started.elapsed()));
            return Ok(ExitCode::SUCCESS);
        }
        println!("{}", report(&missing, &[]));
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
    let mut tried: Vec<Tried> = Vec::new();
    loop {
        let missing = missing(purposes)?;
        if missing.is_empty() {
            return Ok(());
        }
        let untried = untried(&missing, &tried);
        let forbidden = untried.iter().any(Remedy::needs_root) && !Uid::effective().is_root();
        if untried.is_empty() || forbidden {
            bail!("{}", report(&missing, &tried));
        }
        tried.extend(apply(untried));
        if let Some(signal) = interrupted() {
            bail!("set-up was interrupted by {signal}");
        }
    }
}

/// What set-up can still do about what is missing.
fn untried(missing: &[Missing], tried: &[Tried]) -> Vec<Remedy> {
    let mut untried: Vec<Remedy> = Vec::new();
    for Missing { remedy, .. } in missing {
        let seen = untried.contains(remedy) || tried.iter().any(|tried| tried.remedy == *remedy);
        if !seen && !matches!(remedy, Remedy::ByHand(_)) {
            untried.push(remedy.clone());
        }
    }
    untried
}

fn missing(purposes: &[Purpose]) -> Result<Vec<Missing>> {
    let mut missing = program::missing(purposes);
    if purposes.contains(&Purpose::Build) {
        missing.extend(toolchain::missing()?);
    }
    if purposes.contains(&Purpose::Test) {
        missing.extend(toolchain::missing_components()?);
        missing.extend(cargo_deny::missing());
    }
    let vm = |purpose: &Purpose| matches!(purpose, Purpose::Vm(_));
    if purposes.iter().any(vm) {
        missing.extend(qemu::missing());
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

/// Applies packages first, and nothing else with them: what they bring may change what the rest needs. One that fails
/// does not keep the others from being applied. Returns what was applied.
fn apply(remedies: Vec<Remedy>) -> Vec<Tried> {
    let (packages, others): (Vec<_>, Vec<_>) = remedies.into_iter().partition(|remedy| !remedy.packages().is_empty());
    if packages.is_empty() {
        return others.into_iter().map(|remedy| Tried { failure: remedy.apply().err().map(text), remedy }).collect();
    }
    match apt::install(&packages.iter().map(Remedy::packages).collect::<Vec<_>>()) {
        Ok(results) => {
            let ended = packages.into_iter().zip(results);
            ended.map(|(remedy, result)| Tried { remedy, failure: result.err().map(text) }).collect()
        }
        Err(error) => {
            let failure = Some(text(error));
            packages.into_iter().map(|remedy| Tried { remedy, failure: failure.clone() }).collect()
        }
    }
}

fn text(error: Error) -> String {
    format!("{error:#}")
}

impl Remedy {
    /// Applies a remedy that is not a package.
    fn apply(&self) -> Result<()> {
        match self {
            Self::BpfLinker { llvm } => toolchain::install_bpf_linker(*llvm),
            Self::RustComponent(name) => toolchain::install_component(name),
            Self::CargoDeny => cargo_deny::install(),
            Self::Kernel(version) => kernel::fetch(*version),
            Self::Qemu { .. } => qemu::fetch(),
            Self::Package(_) | Self::DebianCompiler | Self::LlvmHeaders { .. } | Self::ByHand(_) => Ok(()),
        }
    }

    fn packages(&self) -> Vec<String> {
        match self {
            Self::Package(name) => vec![(*name).to_owned()],
            Self::DebianCompiler => vec!["rustc-web".to_owned(), "rust-web-src".to_owned()],
            Self::LlvmHeaders { major } => vec![format!("llvm-{major}-dev")],
            Self::BpfLinker { .. }
            | Self::RustComponent(_)
            | Self::CargoDeny
            | Self::Kernel(_)
            | Self::Qemu { .. }
            | Self::ByHand(_) => Vec::new(),
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
            Self::CargoDeny => cargo_deny::command(),
            Self::Kernel(_) => "cargo xtask setup".to_owned(),
            Self::Qemu { removes } => qemu::command(removes),
            Self::ByHand(text) => text.clone(),
        }
    }
}

/// What is missing, why what was tried did not bring it, and what to do.
fn report(missing: &[Missing], tried: &[Tried]) -> String {
    let mut text = String::from("set-up is not complete");
    for Missing { what, why, remedy } in missing {
        text.push_str(&format!("\n  missing: {what} ({why})\n      get it: {}", remedy.command()));
    }
    let mut told: Vec<&str> = Vec::new();
    let still = |tried: &&Tried| missing.iter().any(|missing| missing.remedy == tried.remedy);
    for failure in tried.iter().filter(still).filter_map(|tried| tried.failure.as_deref()) {
        // Packages fail together.
        if !told.contains(&failure) {
            told.push(failure);
            text.push_str(&format!("\n  failed: {failure}"));
        }
    }
    let untried = untried(missing, tried);
    if !untried.is_empty() {
        let root = if untried.iter().any(Remedy::needs_root) { " as root" } else { "" };
        text.push_str(&format!("\nall of it at once: run `cargo xtask setup`{root}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_each_failure_once_and_only_of_what_is_still_missing() {
        let of = |remedy: &Remedy| Missing { what: format!("{remedy:?}"), why: "is needed", remedy: remedy.clone() };
        let failed = |remedy: &Remedy, why: &str| Tried { remedy: remedy.clone(), failure: Some(why.to_owned()) };
        let [one, two, gone] = ["one", "two", "gone"].map(Remedy::Package);
        let missing = [of(&one), of(&two)];
        let tried = [failed(&one, "no network"), failed(&two, "no network"), failed(&gone, "no such package")];
        let text = report(&missing, &tried);
        assert_eq!(text.matches("no network").count(), 1, "{text}");
        assert!(!text.contains("no such package") && !text.contains("all of it at once"), "{text}");
        let text = report(&missing, &tried[..1]);
        assert!(text.ends_with("run `cargo xtask setup` as root"), "{text}");
    }
}
