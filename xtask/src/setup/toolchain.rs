//! What compiles the eBPF programs: a compiler that has the source of `core`, and `bpf-linker` with an LLVM that reads
//! that compiler's output. Either rustup's nightly with `rust-src`, or Debian's `rustc-web` and `rust-web-src`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::program::find;
use super::{Missing, Remedy, apt};
use crate::process::output;
use crate::progress::Progress;

const BPF_LINKER: &str = "0.13.0";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// `core` in a compiler's sysroot.
const SOURCE: &str = "lib/rustlib/src/rust/library/core/Cargo.toml";
/// Building `bpf-linker` takes 75 s on two cores.
const LINKER_LIMIT: Duration = Duration::from_secs(20 * 60);
const COMPONENT_LIMIT: Duration = Duration::from_secs(5 * 60);

pub(super) fn missing() -> Result<Vec<Missing>> {
    let Some(llvm) = compiler()? else {
        let remedy = if apt::is_there() {
            Remedy::DebianCompiler
        } else {
            Remedy::ByHand("rustup toolchain install nightly --component rust-src".to_owned())
        };
        let what = "a Rust compiler with the source of `core`".to_owned();
        return Ok(vec![Missing { what, why: "compiles the eBPF programs", remedy }]);
    };
    if find("bpf-linker").is_some_and(|linker| linker_reads(&linker, llvm)) {
        return Ok(Vec::new());
    }
    let mut missing = Vec::new();
    let headers = PathBuf::from(format!("/usr/lib/llvm-{llvm}/include/llvm-c/Core.h"));
    if apt::is_there() && !headers.exists() {
        let remedy = Remedy::LlvmHeaders { major: llvm };
        missing.push(Missing { what: format!("LLVM {llvm}"), why: "is what `bpf-linker` is built on", remedy });
    }
    let remedy = if apt::is_there() {
        Remedy::BpfLinker { llvm }
    } else {
        Remedy::ByHand(format!("cargo install bpf-linker --version {BPF_LINKER}"))
    };
    let what = format!("`bpf-linker` {BPF_LINKER} for LLVM {llvm}");
    missing.push(Missing { what, why: "links the eBPF programs", remedy });
    Ok(missing)
}

/// The parts of the Rust toolchain in use that the tests need and a minimal installation lacks.
pub(super) fn missing_components() -> Result<Vec<Missing>> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let bin = Path::new(sysroot.trim()).join("bin");
    let components = [("rustfmt", "cargo-fmt", "checks the format"), ("clippy", "cargo-clippy", "checks the code")];
    let absent = |(name, file, why): (&'static str, &str, &'static str)| {
        // A toolchain that is not rustup's may keep its programs anywhere on the path.
        let there = if find("rustup").is_some() { bin.join(file).exists() } else { find(file).is_some() };
        let remedy = if find("rustup").is_some() {
            Remedy::RustComponent(name)
        } else {
            Remedy::ByHand(format!("install `{file}` of your Rust toolchain"))
        };
        (!there).then(|| Missing { what: format!("`{name}`"), why, remedy })
    };
    Ok(components.into_iter().filter_map(absent).collect())
}

pub(super) fn install_component(name: &str) -> Result<()> {
    let mut progress = Progress::start(format!("installing {name}"));
    let mut command = Command::new("rustup");
    command.args(["component", "add", name]);
    progress.run(&mut command, COMPONENT_LIMIT, &apt::log("rustup"))?;
    progress.done();
    Ok(())
}

pub(super) fn bpf_linker_command(llvm: u32) -> String {
    let words = bpf_linker_arguments(llvm).join(" ");
    format!("LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo {words}")
}

pub(super) fn install_bpf_linker(llvm: u32) -> Result<()> {
    let mut progress = Progress::start(format!("building bpf-linker {BPF_LINKER} for LLVM {llvm} (about a minute)"));
    let mut command = Command::new("cargo");
    command.args(bpf_linker_arguments(llvm)).arg("--force").env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"));
    progress.run(&mut command, LINKER_LIMIT, &apt::log("bpf-linker"))?;
    progress.done();
    Ok(())
}

fn bpf_linker_arguments(llvm: u32) -> Vec<String> {
    let feature = format!("llvm-{llvm}");
    ["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--no-default-features", "--features", &feature]
        .map(str::to_owned)
        .to_vec()
}

/// The LLVM of the compiler that will build the eBPF programs: the first of this build's own, Debian's and rustup's
/// nightly that has the source of `core`, as `node/build.rs` chooses.
fn compiler() -> Result<Option<u32>> {
    let candidates = [Some(PathBuf::from("rustc")), Some(PathBuf::from(DEBIAN_RUSTC)), rustup_nightly()];
    for rustc in candidates.into_iter().flatten() {
        let Ok(sysroot) = output(Command::new(&rustc).args(["--print", "sysroot"])) else {
            continue;
        };
        if Path::new(sysroot.trim()).join(SOURCE).exists() {
            return llvm_major(&output(Command::new(&rustc).arg("-vV"))?).map(Some);
        }
    }
    Ok(None)
}

fn rustup_nightly() -> Option<PathBuf> {
    let which = output(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"])).ok()?;
    Some(PathBuf::from(which.trim()))
}

/// Whether a linker is built on this LLVM or a later one. One that does not say (static LLVM) gets the benefit.
fn linker_reads(linker: &Path, llvm: u32) -> bool {
    let Ok(libraries) = output(Command::new("ldd").arg(linker)) else {
        return true;
    };
    let absent = libraries.lines().any(|line| line.contains("libLLVM") && line.contains("not found"));
    let linked = libraries.split("libLLVM").nth(1).and_then(|rest| {
        let digits = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
        digits.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok()
    });
    !absent && linked.is_none_or(|linked| linked >= llvm)
}

/// The major version of LLVM out of `rustc -vV`.
fn llvm_major(version: &str) -> Result<u32> {
    version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next()?.parse().ok())
        .with_context(|| format!("`rustc -vV` names no LLVM version: `{}`", version.trim()))
}

#[cfg(test)]
mod tests {
    use super::llvm_major;

    #[test]
    fn the_llvm_version_is_read_and_not_assumed() {
        assert_eq!(llvm_major("rustc 1.96.0\nrelease: 1.96.0\nLLVM version: 22.1.8\n").unwrap(), 22);
        assert!(llvm_major("rustc 1.96.0\n").is_err());
    }
}
