//! The qemu that boots the virtual machines: the machine's own, or one that is unpacked under `target/setup/qemu` where
//! apt could install it only by removing something of the user's, such as a later `qemu-utils` from backports.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::program::{find, missing_program};
use super::{Missing, Remedy, apt, unpacked};
use crate::process::output;

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";
const WHY: &str = "boots kernels with a WireGuard of their own";
/// In an unpacked root: where the packages keep their libraries, before and after Debian merged `/lib` into `/usr`.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
/// What qemu starts a machine with (its own), and the BIOS.
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";

/// A qemu and what it has to be told to run from where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Qemu {
    program: PathBuf,
    /// None of them if it is installed.
    libraries: Vec<PathBuf>,
    firmware: Vec<PathBuf>,
}

impl Qemu {
    /// The installed one, else the one that set-up unpacked.
    pub(crate) fn find() -> Result<Self> {
        let installed = find(PROGRAM).map(|program| Self { program, libraries: Vec::new(), firmware: Vec::new() });
        let here = || Self::unpacked(&unpacked::root(&folder()));
        installed.or_else(here).with_context(|| format!("`{PROGRAM}` is missing; run `cargo xtask setup`"))
    }

    fn unpacked(root: &Path) -> Option<Self> {
        let program = root.join("usr/bin").join(PROGRAM);
        let folders = |names: [&str; 2]| names.map(|name| root.join(name)).to_vec();
        program.is_file().then(|| Self { program, libraries: folders(LIBRARIES), firmware: folders(FIRMWARE) })
    }

    /// Puts it at the end of a command that runs the program it is given, such as `setpriv`.
    pub(crate) fn append_to(&self, command: &mut Command) {
        command.arg(&self.program);
        command.args(self.firmware.iter().flat_map(|folder| ["-L".as_ref(), folder.as_os_str()]));
        if let Some(path) = self.library_path() {
            command.env(LIBRARY_PATH, path);
        }
    }

    fn library_path(&self) -> Option<OsString> {
        let users = std::env::var_os(LIBRARY_PATH).unwrap_or_default();
        let users = std::env::split_paths(&users).filter(|folder| !folder.as_os_str().is_empty());
        let folders = self.libraries.iter().cloned().chain(users);
        (!self.libraries.is_empty()).then(|| std::env::join_paths(folders).expect("no folder has a colon"))
    }

    /// Whether it starts: all its libraries are there.
    fn check(&self) -> Result<()> {
        let mut command = Command::new(&self.program);
        if let Some(path) = self.library_path() {
            command.env(LIBRARY_PATH, path);
        }
        output(command.arg("--version")).map(drop)
    }
}

fn folder() -> PathBuf {
    crate::checkout::target().join("setup/qemu")
}

pub(super) fn missing() -> Option<Missing> {
    // An unpacked one shares libraries with the machine, which may have lost some since.
    let runs = || Qemu::unpacked(&unpacked::root(&folder())).is_some_and(|qemu| qemu.check().is_ok());
    if find(PROGRAM).is_some() || runs() {
        return None;
    }
    // Without lists of packages the answer is unknown: the installation fetches them, and a refusal leads back here.
    let plan = apt::simulate(&[PACKAGE.to_owned()]).unwrap_or_default();
    if plan.removes.is_empty() {
        return Some(missing_program(PROGRAM, PACKAGE, WHY));
    }
    Some(Missing { what: format!("`{PROGRAM}`"), why: WHY, remedy: Remedy::Qemu { removes: plan.removes } })
}

/// Downloads and unpacks it, with those of its dependencies that are not installed.
pub(super) fn fetch() -> Result<()> {
    let mut packages = apt::simulate(&[PACKAGE.to_owned()])?.installs;
    // The one that the others are for is named first.
    packages.sort_by_key(|package| package != PACKAGE);
    unpacked::fetch(&packages, &folder(), |root, _| {
        let qemu = Qemu::unpacked(root).with_context(|| format!("`{PACKAGE}` has no `{PROGRAM}` in it"))?;
        qemu.check().with_context(|| format!("the unpacked `{PROGRAM}` does not run"))
    })
}

pub(super) fn command(removes: &[String]) -> String {
    format!(
        "cargo xtask setup (unpacks it under target; to install {PACKAGE}, apt would remove {})",
        removes.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(qemu: &Qemu) -> String {
        let mut command = Command::new("setpriv");
        qemu.append_to(&mut command);
        crate::process::shown(&command)
    }

    #[test]
    fn an_unpacked_qemu_is_told_where_its_libraries_and_firmware_are() {
        let installed = Qemu { program: "/usr/bin/q".into(), libraries: Vec::new(), firmware: Vec::new() };
        assert_eq!((words(&installed).as_str(), installed.library_path()), ("setpriv /usr/bin/q", None));
        let libraries = vec!["/t/usr/lib".into(), "/t/lib".into()];
        let unpacked = Qemu { program: "/t/q".into(), libraries, firmware: vec!["/t/a".into(), "/t/b".into()] };
        assert_eq!(words(&unpacked), "setpriv /t/q -L /t/a -L /t/b");
        let path = unpacked.library_path().unwrap().into_string().unwrap();
        assert!(path.starts_with("/t/usr/lib:/t/lib"), "{path}");
    }

    #[test]
    fn a_folder_without_the_program_is_no_qemu() {
        assert_eq!(Qemu::unpacked(Path::new("/proc/self/fd")), None);
    }
}
