//! What is linked in: licences, duplicates and sources, as deny.toml allows them.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Not `advisories`: their database comes from the network, and the tests run without one.
const CHECKS: [&str; 3] = ["bans", "licenses", "sources"];

/// `cargo-deny` reports at length, with the way to each crate; what it says is one finding.
pub(super) fn findings() -> Result<Vec<String>> {
    let mut command = Command::new("cargo");
    command.args(["deny", "--color", "never", "check"]).args(CHECKS).stdin(Stdio::null());
    let output = command.output().context("failed to start `cargo deny`")?;
    let text = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Ok(Vec::new()),
        Some(101) if text.contains("no such command") => bail!("`cargo-deny` is missing; run `cargo xtask setup`"),
        _ => Ok(vec![text.trim().to_owned()]),
    }
}
