//! What must be there before the daemon starts, checked first so that what is missing has a name and a remedy.

use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::config::Settings;
use crate::kernel::Backend;

#[derive(Debug, thiserror::Error)]
pub enum StartupError {
    #[error("not allowed: `noded` needs {missing}; run it as root, or give it these capabilities")]
    Capabilities { missing: String },
    #[error("no BPF file system at `{}`: `mount -t bpf bpf {}`, or name another with `--bpffs`", path.display(), path.display())]
    NoBpffs { path: PathBuf },
    #[error("no `{TUN}`, which the userspace WireGuard needs: `modprobe tun`, or let the container have the device")]
    NoTun,
}

const TUN: &str = "/dev/net/tun";

/// From `linux/capability.h`: number, name.
const NEEDED: [(u8, &str); 3] = [(12, "CAP_NET_ADMIN"), (39, "CAP_BPF"), (38, "CAP_PERFMON")];
const NET_ADMIN: u8 = 12;
/// Includes what CAP_BPF and CAP_PERFMON were split from.
const SYS_ADMIN: u8 = 21;

/// Checks what `noded run` and `noded leave` need of the machine.
pub fn check(settings: &Settings, backend: Backend) -> Result<(), StartupError> {
    check_capabilities(effective_capabilities())?;
    check_bpffs(&settings.bpffs)?;
    if backend == Backend::Userspace && !Path::new(TUN).exists() {
        return Err(StartupError::NoTun);
    }
    Ok(())
}

/// Checks the rights alone: they come before any question that needs them.
pub fn check_rights() -> Result<(), StartupError> {
    check_capabilities(effective_capabilities())
}

fn effective_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or("0");
    u64::from_str_radix(set.trim(), 16).unwrap_or(0)
}

fn check_capabilities(set: u64) -> Result<(), StartupError> {
    let has = |number: u8| set & (1 << number) != 0;
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(number, _)| !has(*number) && (*number == NET_ADMIN || !has(SYS_ADMIN)))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(StartupError::Capabilities { missing: missing.join(", ") }) }
}

fn check_bpffs(path: &Path) -> Result<(), StartupError> {
    match statfs(path) {
        Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => Ok(()),
        _ => Err(StartupError::NoBpffs { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let bits = |numbers: &[u8]| numbers.iter().fold(0, |set, number| set | 1 << number);
        for (set, expected) in [
            (bits(&[12, 38, 39]), None),
            (bits(&[12, 21]), None),
            (bits(&[21]), Some("CAP_NET_ADMIN")),
            (bits(&[12, 39]), Some("CAP_PERFMON")),
            (0, Some("CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON")),
        ] {
            let found = check_capabilities(set).err().map(|error| error.to_string());
            match (found, expected) {
                (None, None) => {}
                (Some(found), Some(expected)) => assert!(found.contains(&format!("needs {expected};")), "{found}"),
                other => panic!("{set:x}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_place_without_bpffs_is_named_with_the_command_that_mounts_it() {
        let error = check_bpffs(Path::new("/proc")).unwrap_err().to_string();
        assert!(error.contains("`mount -t bpf bpf /proc`"), "{error}");
    }
}
