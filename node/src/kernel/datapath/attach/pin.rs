//! Where maps, programs and links are pinned, so that they outlive the agent.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ebpf_common::{ABI_VERSION, EGRESS};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::kernel::KernelError;

/// Where bpffs is mounted on every distribution.
pub const DEFAULT_ROOT: &str = "/sys/fs/bpf";

/// The folders of one interface in one network namespace:
/// `<root>/rampart/v<ABI>/net-<inode of the namespace>/<interface>/{maps,programs,links}`.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    root: PathBuf,
    /// Of the ABI.
    pub(crate) version: u32,
    pub(crate) top: PathBuf,
    pub(crate) maps: PathBuf,
    programs: PathBuf,
    links: PathBuf,
}

impl Pins {
    /// For the network namespace of the calling thread.
    pub(crate) fn new(root: &Path, interface: &str) -> Result<Self, KernelError> {
        Self::of_version(ABI_VERSION, root, interface)
    }

    /// Those of other versions that are there, the newest first.
    pub(crate) fn others(root: &Path, interface: &str) -> Result<Vec<Self>, KernelError> {
        let entries = fs::read_dir(root.join("rampart")).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut versions: Vec<u32> = names.filter_map(|name| version(&name)).collect();
        versions.sort_unstable_by(|a, b| b.cmp(a));
        let all = versions.into_iter().map(|version| Self::of_version(version, root, interface));
        let mut all = all.collect::<Result<Vec<_>, _>>()?;
        all.retain(|pins| pins.top.exists());
        Ok(all)
    }

    fn of_version(version: u32, root: &Path, interface: &str) -> Result<Self, KernelError> {
        let namespace = fs::metadata("/proc/thread-self/ns/net")
            .map_err(|error| KernelError::with("failed to tell the network namespace: is `/proc` mounted?", error))?
            .ino();
        // bpffs reserves dots. No interface has a colon in its name.
        let interface = interface.replace('.', ":");
        let top = root.join("rampart").join(format!("v{version}")).join(format!("net-{namespace}")).join(interface);
        Ok(Self {
            root: root.to_owned(),
            version,
            maps: top.join("maps"),
            programs: top.join("programs"),
            links: top.join("links"),
            top,
        })
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.maps.join(name)
    }

    pub(crate) fn program(&self, direction: u32) -> PathBuf {
        self.programs.join(name(direction))
    }

    /// Whatever programs are pinned.
    pub(crate) fn all_programs(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.programs).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    }

    pub(crate) fn link(&self, direction: u32) -> PathBuf {
        self.links.join(name(direction))
    }

    /// Of the early drop.
    pub(crate) fn early_link(&self) -> PathBuf {
        self.links.join("early")
    }

    /// Makes the folders. Refuses a root that is no bpffs, where nothing can be pinned.
    pub(crate) fn create(&self) -> Result<(), KernelError> {
        self.require_bpffs()?;
        for folder in [&self.maps, &self.programs, &self.links] {
            create_folder(folder)?;
        }
        Ok(())
    }

    fn require_bpffs(&self) -> Result<(), KernelError> {
        let root = self.root.display();
        let remedy = format!("mount it with `mount -t bpf bpf {root}`");
        let kind = statfs(&self.root)
            .map_err(|error| {
                KernelError::with(format!("failed to look at the BPF file system `{root}`: {remedy}"), error)
            })?
            .filesystem_type();
        if kind == BPF_FS_MAGIC {
            return Ok(());
        }
        Err(KernelError::new(format!(
            "`{root}` is no BPF file system, without which enforcement would end with the agent: {remedy}"
        )))
    }

    /// Removes everything, and the folders above as far as they are empty then.
    pub(crate) fn remove(&self) -> Result<(), KernelError> {
        match fs::remove_dir_all(&self.top) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(KernelError::with(
                    format!("failed to remove the pins below `{}`", self.top.display()),
                    error,
                ));
            }
            _ => {}
        }
        for folder in self.top.ancestors().skip(1).take_while(|folder| *folder != self.root) {
            // Another interface's pins may be there.
            if fs::remove_dir(folder).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// The version whose folder has this name, if it is another than ours.
fn version(folder: &str) -> Option<u32> {
    folder.strip_prefix('v')?.parse().ok().filter(|version| *version != ABI_VERSION)
}

/// Pins under a name that is not looked at, then gives it the name that is, replacing what had it. Whoever is killed in
/// between leaves a file that the next call removes.
pub(crate) fn replace<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    path: &Path,
    pin: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), KernelError> {
    let mut new = path.as_os_str().to_owned();
    new.push("-new");
    let new = PathBuf::from(new);
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        KernelError::with(format!("failed to pin `{}`", path.display()), error)
    };
    remove_file(&new)?;
    pin(&new).map_err(|error| failed(error.into()))?;
    fs::rename(&new, path).map_err(|error| {
        // What cannot be done now is begun anew by the next call.
        let _ = fs::remove_file(&new);
        failed(error.into())
    })
}

/// Removes a pin that may not be there.
pub(crate) fn remove_file(path: &Path) -> Result<(), KernelError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::with(format!("failed to remove the pin `{}`", path.display()), error))
        }
        _ => Ok(()),
    }
}

pub(crate) fn create_folder(folder: &Path) -> Result<(), KernelError> {
    fs::create_dir_all(folder).map_err(|error| {
        KernelError::with(format!("failed to create the folder `{}` for pins", folder.display()), error)
    })
}

/// As pins, logs and errors name a direction.
pub(crate) fn name(direction: u32) -> &'static str {
    if direction == EGRESS { "egress" } else { "ingress" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_other_versions_are_told_apart() {
        assert_eq!(version(&format!("v{}", ABI_VERSION + 1)), Some(ABI_VERSION + 1));
        assert_eq!([version(&format!("v{ABI_VERSION}")), version("vx"), version("net-1"), version("v")], [None; 4]);
    }

    #[test]
    fn a_root_that_is_no_bpffs_is_refused_with_the_remedy() {
        let folder = tempfile::tempdir().expect("a folder");
        let pins = Pins::new(folder.path(), "rampart0").expect("a network namespace");
        let error = pins.create().expect_err("not a bpffs").to_string();
        assert!(error.contains("mount -t bpf bpf"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 0, "nothing was made");
    }
}
