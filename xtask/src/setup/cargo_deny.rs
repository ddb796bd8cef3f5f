//! `cargo-deny`, which checks what the programs link.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::program::find;
use super::{Missing, Remedy, apt};
use crate::process::output;
use crate::progress::Progress;

/// Reads deny.toml as it is written, as later versions do.
const VERSION: &str = "0.20.2";
/// Unoptimised: it is built in a minute on two cores and runs for four seconds. Optimised it takes several minutes.
const INSTALL: [&str; 6] = ["install", "cargo-deny", "--version", VERSION, "--locked", "--debug"];
const LIMIT: Duration = Duration::from_secs(20 * 60);

pub(super) fn missing() -> Option<Missing> {
    let found = find("cargo-deny").and_then(|program| output(Command::new(program).arg("--version")).ok());
    if found.as_deref().and_then(version) >= version(VERSION) {
        return None;
    }
    let what = format!("`cargo-deny` {VERSION}");
    Some(Missing { what, why: "checks licences and duplicates of dependencies", remedy: Remedy::CargoDeny })
}

pub(super) fn command() -> String {
    format!("cargo {}", INSTALL.join(" "))
}

pub(super) fn install() -> Result<()> {
    let mut progress = Progress::start(format!("building cargo-deny {VERSION} (about a minute)"));
    let mut command = Command::new("cargo");
    command.args(INSTALL).arg("--force").env("CARGO_PROFILE_DEV_DEBUG", "0");
    progress.run(&mut command, LIMIT, &apt::log("cargo-deny"))?;
    progress.done();
    Ok(())
}

/// The numbers of `0.20.2` or `cargo-deny 0.20.2`.
fn version(text: &str) -> Option<Vec<u32>> {
    text.split_whitespace().last()?.split('.').map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert!(version("cargo-deny 0.9.0\n") < version("0.20.2"));
        assert!(version("cargo-deny 0.20.10\n") > version("0.20.2"));
        assert!(version("cargo-deny of somebody") < version("0.20.2"));
    }
}
