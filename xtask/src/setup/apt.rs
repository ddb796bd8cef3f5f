//! Debian's packages.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::program::find;
use crate::process::output;
use crate::progress::Progress;

/// What an update of the lists, and then an installation, may take on a slow line.
const UPDATE_LIMIT: Duration = Duration::from_secs(5 * 60);
const INSTALL_LIMIT: Duration = Duration::from_secs(30 * 60);

pub(super) fn is_there() -> bool {
    find("apt-get").is_some()
}

/// An `apt-get` that asks nothing and waits for its lock.
pub(super) fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args([
        "--quiet",
        "--yes",
        "-o",
        "Dpkg::Use-Pty=0",
        "-o",
        "DPkg::Lock::Timeout=300",
    ]);
    command
}

/// Fetches the lists of packages.
pub(super) fn update() -> Result<()> {
    let mut progress = Progress::start("fetching the lists of packages");
    progress.run(apt_get().arg("update"), UPDATE_LIMIT, &log("apt-update"))?;
    progress.done();
    Ok(())
}

/// Installs packages, without letting any of them start a service.
pub(super) fn install(packages: &[String]) -> Result<()> {
    let mut packages = packages.to_vec();
    packages.sort();
    packages.dedup();
    update()?;
    let _no_services = NoServices::begin()?;
    let mut progress = Progress::start(format!("installing {}", packages.join(" ")));
    let mut command = apt_get();
    // A package that conflicts with one of the user's is not worth removing that.
    command.args(["--no-install-recommends", "--no-remove", "install"]).args(&packages);
    progress.run(&mut command, INSTALL_LIMIT, &log("apt-install"))?;
    if packages.iter().any(|package| package == "prometheus") && Path::new("/run/systemd/system").exists() {
        // The tests run their own; it was not there before, so nobody else wants this one at the next boot.
        output(Command::new("systemctl").args(["disable", "--now", "prometheus.service"]))?;
    }
    progress.done();
    Ok(())
}

pub(super) fn log(name: &str) -> std::path::PathBuf {
    crate::target().join("setup").join(format!("{name}.log"))
}

/// While this lives, packages that are installed start no service (Debian's policy-rc.d, 101: forbidden).
#[derive(Debug)]
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_TEXT: &str =
    "#!/bin/sh\n# Put here by `cargo xtask setup` of Rampart while it installs packages.\nexit 101\n";

impl NoServices {
    fn begin() -> Result<Self> {
        // One that we left when we were killed is ours to remove; any other belongs to the machine's owner.
        if fs::read_to_string(POLICY).is_ok_and(|text| text == POLICY_TEXT) {
            return Ok(Self { ours: true });
        }
        let created = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY);
        match created {
            Ok(mut file) => {
                let guard = Self { ours: true };
                file.write_all(POLICY_TEXT.as_bytes()).with_context(|| format!("failed to write `{POLICY}`"))?;
                Ok(guard)
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(Self { ours: false }),
            Err(error) => Err(error).with_context(|| format!("failed to create `{POLICY}`")),
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours {
            let _best_effort = fs::remove_file(POLICY);
        }
    }
}
