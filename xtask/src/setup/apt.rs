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

/// What an installation would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// The packages that were asked for and what they need, as far as it is not installed.
    pub(super) installs: Vec<String>,
    pub(super) removes: Vec<String>,
}

/// What apt would do to install packages, going by the lists that it has.
pub(super) fn simulate(packages: &[String]) -> Result<Plan> {
    Ok(plan(&output(simulation().args(packages))?))
}

fn simulation() -> Command {
    let mut command = apt_get();
    command.env("LC_ALL", "C").args(["--simulate", "--no-install-recommends", "install"]);
    command
}

fn plan(simulation: &str) -> Plan {
    // `Inst NAME [OLD] (NEW ORIGIN [ARCHITECTURE])`, `Remv NAME [OLD]`, and talk.
    let names = |word: &str| {
        let rest = simulation.lines().filter_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
        rest.filter_map(|rest| rest.split_whitespace().next()).map(str::to_owned).collect()
    };
    Plan { installs: names("Inst"), removes: names("Remv") }
}

/// Installs groups of packages, without letting any of them start a service, and says how each group ended. One that
/// apt cannot install does not keep the others from being installed.
pub(super) fn install(groups: &[Vec<String>]) -> Result<Vec<Result<()>>> {
    update()?;
    // A package that conflicts with one of the user's is not worth removing that.
    let results = choose(groups, |packages| output(simulation().arg("--no-remove").args(packages)).map(drop));
    let chosen = groups.iter().zip(&results).filter(|(_, result)| result.is_ok());
    let mut packages: Vec<String> = chosen.flat_map(|(group, _)| group.clone()).collect();
    packages.sort();
    packages.dedup();
    if !packages.is_empty() {
        install_all(&packages)?;
    }
    Ok(results)
}

/// Which groups can be installed together: all of them, or those that can be with the ones before them.
fn choose(groups: &[Vec<String>], possible: impl Fn(&[String]) -> Result<()>) -> Vec<Result<()>> {
    if possible(&groups.concat()).is_ok() {
        return groups.iter().map(|_| Ok(())).collect();
    }
    let mut chosen: Vec<String> = Vec::new();
    let add = |group: &Vec<String>| {
        let more = [chosen.as_slice(), group].concat();
        possible(&more).map(|()| chosen = more)
    };
    groups.iter().map(add).collect()
}

fn install_all(packages: &[String]) -> Result<()> {
    let _no_services = NoServices::begin()?;
    let mut progress = Progress::start(format!("installing {}", packages.join(" ")));
    let mut command = apt_get();
    command.args(["--no-install-recommends", "--no-remove", "install"]).args(packages);
    progress.run(&mut command, INSTALL_LIMIT, &log("apt-install"))?;
    if packages.iter().any(|package| package == "prometheus") && Path::new("/run/systemd/system").exists() {
        // The tests start their own; the service was not there before, so it need not start at the next boot.
        output(Command::new("systemctl").args(["disable", "--now", "prometheus.service"]))?;
    }
    progress.done();
    Ok(())
}

pub(super) fn log(name: &str) -> std::path::PathBuf {
    crate::checkout::target().join("setup").join(format!("{name}.log"))
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

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_simulation_says_what_comes_and_what_goes() {
        let simulation = "The following packages will be REMOVED:\n  old-utils\n\
                          0 upgraded, 2 newly installed, 1 to remove and 3 not upgraded.\n\
                          Remv old-utils [1:10.0]\n\
                          Inst libone (1.2 Debian:12.15/oldstable [amd64])\n\
                          Inst libtwo [1.0] (2.0 Debian:12.15/oldstable [amd64]) []\n\
                          Conf libone (1.2 Debian:12.15/oldstable [amd64])\n";
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let expected = Plan { installs: names(&["libone", "libtwo"]), removes: names(&["old-utils"]) };
        assert_eq!(plan(simulation), expected);
    }

    #[test]
    fn an_impossible_package_does_not_sink_the_others() {
        let groups = [vec!["a".to_owned()], vec!["b".to_owned(), "impossible".to_owned()], vec!["c".to_owned()]];
        let possible = |packages: &[String]| match packages.iter().find(|package| *package == "impossible") {
            Some(package) => bail!("no `{package}`"),
            None => Ok(()),
        };
        let check = |groups: &[Vec<String>], expected: &[bool]| {
            let results = choose(groups, possible);
            assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), expected);
        };
        check(&groups, &[true, false, true]);
        check(&groups[..1], &[true]);
        check(&[], &[]);
    }

    #[test]
    fn packages_that_exclude_each_other_are_not_chosen_together() {
        let groups = [vec!["a".to_owned()], vec!["b".to_owned()], vec!["c".to_owned()]];
        let both = |packages: &[String]| ["a", "b"].iter().all(|name| packages.iter().any(|package| package == name));
        let possible = |packages: &[String]| if both(packages) { bail!("`a` conflicts with `b`") } else { Ok(()) };
        let results = choose(&groups, possible);
        assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
    }
}
