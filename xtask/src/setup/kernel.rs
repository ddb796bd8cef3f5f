//! Debian's kernels, unpacked under `target/vm/<version>` and never installed.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::{apt, unpacked};
use crate::process::output;

/// A kernel that Debian 12 has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KernelVersion {
    /// Debian 12's own; programs attach by clsact
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's; programs attach by TCX
    #[value(name = "6.12")]
    V6_12,
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) version: KernelVersion,
    /// As `uname -r` says it.
    pub(crate) release: String,
    /// Where its package is unpacked.
    pub(crate) root: PathBuf,
}

impl Kernel {
    pub(crate) fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    pub(crate) fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    /// Opens the kernel that set-up unpacked.
    pub(crate) fn open(version: KernelVersion) -> Result<Self> {
        let root = unpacked::root(&directory(version));
        let release = release_in(&root).with_context(|| {
            format!("kernel {version} is not in `{}`; run `cargo xtask setup`", directory(version).display())
        })?;
        Ok(Self { version, release, root })
    }
}

/// Where everything about one kernel lies.
pub(crate) fn directory(version: KernelVersion) -> PathBuf {
    crate::checkout::target().join("vm").join(version.to_string())
}

pub(super) fn is_there(version: KernelVersion) -> bool {
    Kernel::open(version).is_ok_and(|kernel| kernel.image().exists() && kernel.modules().join("modules.dep").exists())
}

/// Downloads and unpacks a kernel.
pub(super) fn fetch(version: KernelVersion) -> Result<()> {
    let package = match image_package(version)? {
        Some(package) => package,
        None => {
            apt::update()?;
            image_package(version)?.with_context(|| no_package(version))?
        }
    };
    let depmod = super::find_program("depmod").context("`depmod` is missing")?;
    unpacked::fetch(std::slice::from_ref(&package), &directory(version), |root, progress| {
        if !root.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", root.join("lib")).context("failed to link `lib` to `usr/lib`")?;
        }
        let release = release_in(root).with_context(|| format!("`{package}` has no kernel image in it"))?;
        let mut index = Command::new(depmod);
        index.arg("-b").arg(root).arg(&release);
        progress.run(&mut index, unpacked::UNPACK_LIMIT, &apt::log("kernel-depmod"))
    })
}

fn release_in(root: &Path) -> Option<String> {
    let entries = fs::read_dir(root.join("boot")).ok()?;
    entries.flatten().find_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
}

/// The package that holds the image of this version: what the right one of Debian's meta packages depends on.
fn image_package(version: KernelVersion) -> Result<Option<String>> {
    if !apt::is_there() {
        bail!("kernel {version} is fetched by apt-get, which is not here; the virtual machines need Debian");
    }
    let metas = [format!("linux-image-{version}-cloud-amd64"), "linux-image-cloud-amd64".to_owned()];
    for meta in metas {
        let text = output(Command::new("apt-cache").args(["show", "--no-all-versions", &meta])).unwrap_or_default();
        if let Some(package) = dependency(&text, version) {
            return Ok(Some(package));
        }
        // Backports have a later version than the candidate.
        let text = output(Command::new("apt-cache").args(["show", &meta])).unwrap_or_default();
        if let Some(package) = dependency(&text, version) {
            return Ok(Some(package));
        }
    }
    Ok(None)
}

/// Out of the records of a meta package, the first dependency on an image of this version.
fn dependency(records: &str, version: KernelVersion) -> Option<String> {
    let wanted = format!("linux-image-{version}.");
    records
        .lines()
        .filter_map(|line| line.strip_prefix("Depends: "))
        .flat_map(|line| line.split(','))
        .filter_map(|dependency| dependency.split_whitespace().next())
        .find(|package| package.starts_with(&wanted))
        .map(str::to_owned)
}

fn no_package(version: KernelVersion) -> String {
    format!(
        "apt knows no cloud kernel {version}; add Debian 12's `bookworm`, `bookworm-security` or `bookworm-backports` \
         to the sources of apt"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meta_package_leads_to_the_image_of_its_version_only() {
        let records = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.12.9+bpo-cloud-amd64 (= 6.12.9-1~bpo)\n\n\
                       Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        let check = |version, expected: &str| assert_eq!(dependency(records, version).as_deref(), Some(expected));
        check(KernelVersion::V6_1, "linux-image-6.1.0-56-cloud-amd64");
        check(KernelVersion::V6_12, "linux-image-6.12.9+bpo-cloud-amd64");
        assert_eq!(dependency("Package: x\n", KernelVersion::V6_1), None);
    }
}
