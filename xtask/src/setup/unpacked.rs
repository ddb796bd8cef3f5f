//! Debian's packages that are unpacked under `target` and never installed.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::apt;
use crate::progress::Progress;

const DOWNLOAD_LIMIT: Duration = Duration::from_secs(15 * 60);
pub(super) const UNPACK_LIMIT: Duration = Duration::from_secs(5 * 60);

/// Where the packages that are kept in a folder are unpacked.
pub(super) fn root(kept: &Path) -> PathBuf {
    kept.join("root")
}

/// Downloads packages and unpacks them, all into one root. The folder gets its name when all is in it and `finish` has
/// done what is left to do with the root, so that it is whole if it is there.
pub(super) fn fetch(
    packages: &[String],
    kept: &Path,
    finish: impl FnOnce(&Path, &mut Progress) -> Result<()>,
) -> Result<()> {
    let Some((first, others)) = packages.split_first() else {
        bail!("there is nothing to unpack in `{}`", kept.display());
    };
    let mut progress = Progress::start(match others.len() {
        0 => format!("downloading {first}"),
        count => format!("downloading {first} and {count} packages that it needs"),
    });
    let fresh = kept.with_added_extension("new");
    remove(&fresh)?;
    fs::create_dir_all(&fresh).with_context(|| format!("failed to create `{}`", fresh.display()))?;
    download(packages, &fresh, &mut progress)?;
    let root = root(&fresh);
    for archive in archives(&fresh)? {
        let mut unpack = Command::new("dpkg");
        unpack.arg("-x").arg(&archive).arg(&root);
        progress.run(&mut unpack, UNPACK_LIMIT, &apt::log("unpack"))?;
        fs::remove_file(&archive).with_context(|| format!("failed to remove `{}`", archive.display()))?;
    }
    finish(&root, &mut progress)?;
    remove(kept)?;
    fs::rename(&fresh, kept).with_context(|| format!("failed to rename `{}`", fresh.display()))?;
    progress.done();
    Ok(())
}

fn download(packages: &[String], folder: &Path, progress: &mut Progress) -> Result<()> {
    let mut download = apt::apt_get();
    // apt's own user cannot write here.
    download.args(["-o", "APT::Sandbox::User=root", "download"]).args(packages).current_dir(folder);
    if progress.run(&mut download, DOWNLOAD_LIMIT, &apt::log("download")).is_err() {
        // The lists may name a package that the mirror has replaced since.
        apt::update()?;
        progress.run(&mut download, DOWNLOAD_LIMIT, &apt::log("download"))?;
    }
    let there = archives(folder)?.len();
    if there != packages.len() {
        bail!("the download of {} packages left {there} in `{}`", packages.len(), folder.display());
    }
    Ok(())
}

fn archives(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("failed to read `{}`", folder.display()))?;
    let is_archive = |path: &PathBuf| path.extension() == Some(OsStr::new("deb"));
    Ok(entries.flatten().map(|entry| entry.path()).filter(is_archive).collect())
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove `{}`", directory.display()))
        }
        _ => Ok(()),
    }
}
