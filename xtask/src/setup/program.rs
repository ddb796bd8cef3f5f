//! Programs that must be on the path, and the Debian packages that have them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{Missing, Purpose, Remedy};

/// A program, its Debian package, and what it is for.
struct Program {
    name: &'static str,
    package: &'static str,
    why: &'static str,
    needed_for: fn(Purpose) -> bool,
}

const fn program(
    name: &'static str,
    package: &'static str,
    why: &'static str,
    needed_for: fn(Purpose) -> bool,
) -> Program {
    Program { name, package, why, needed_for }
}

fn build(purpose: Purpose) -> bool {
    purpose == Purpose::Build
}
fn mesh_or_vm(purpose: Purpose) -> bool {
    purpose == Purpose::Mesh || vm(purpose)
}
fn test(purpose: Purpose) -> bool {
    purpose == Purpose::Test
}
fn vm(purpose: Purpose) -> bool {
    matches!(purpose, Purpose::Vm(_))
}
/// The tests run every bench, small.
fn bench(purpose: Purpose) -> bool {
    matches!(purpose, Purpose::Bench | Purpose::Test)
}

const PROGRAMS: [Program; 24] = [
    program("cc", "build-essential", "links programs and compiles SQLite", build),
    program("ip", "iproute2", "makes links and namespaces", mesh_or_vm),
    program("tc", "iproute2", "shows what is attached", mesh_or_vm),
    program("ping", "iputils-ping", "probes", mesh_or_vm),
    program("nsenter", "util-linux", "enters a node's namespaces", mesh_or_vm),
    program("unshare", "util-linux", "makes a node's namespaces", mesh_or_vm),
    program("ps", "procps", "finds what was left behind", mesh_or_vm),
    program("wg", "wireguard-tools", "shows WireGuard's own view", mesh_or_vm),
    program("curl", "curl", "is in the README's quick start", test),
    program("prometheus", "prometheus", "scrapes the metrics in tests", test),
    program("promtool", "prometheus", "checks the metrics", test),
    program("setpriv", "util-linux", "ties a virtual machine to what started it", vm),
    program("modprobe", "kmod", "finds a kernel's modules", vm),
    program("depmod", "kmod", "indexes a kernel's modules", vm),
    program("xz", "xz-utils", "unpacks modules", vm),
    program("zstd", "zstd", "unpacks modules", vm),
    program("cpio", "cpio", "packs what a kernel boots into", vm),
    program("strip", "binutils", "makes what a kernel boots into small", vm),
    program("ldd", "libc-bin", "finds a program's libraries", vm),
    program("bash", "bash", "is the first process of a virtual machine", vm),
    program("dpkg", "dpkg", "unpacks Debian's kernels", vm),
    program("nft", "nftables", "is what the policy's speed is compared with", bench),
    program("iptables", "iptables", "is what the policy's speed is compared with", bench),
    program("iperf3", "iperf3", "measures throughput", bench),
];

/// The file of a program: on the path, where root's programs are, or where cargo installs.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cargo = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .chain(cargo.map(|home| home.join("bin")))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn needed(purposes: &[Purpose]) -> impl Iterator<Item = &'static Program> {
    PROGRAMS.iter().filter(|program| purposes.iter().any(|purpose| (program.needed_for)(*purpose)))
}

pub(super) fn missing(purposes: &[Purpose]) -> Vec<Missing> {
    let mut missing: Vec<Missing> = needed(purposes)
        .filter(|program| find(program.name).is_none())
        .map(|program| missing_program(program.name, program.package, program.why))
        .collect();
    if purposes.iter().any(|purpose| vm(*purpose)) && !find("busybox").is_some_and(|file| is_static(&file)) {
        missing.push(missing_program("busybox", "busybox-static", "has the small programs of a virtual machine"));
    }
    missing
}

pub(super) fn missing_program(name: &str, package: &'static str, why: &'static str) -> Missing {
    let remedy = if super::apt::is_there() {
        Remedy::Package(package)
    } else {
        Remedy::ByHand(format!("install what has `{name}`; on Debian it is the package `{package}`"))
    };
    Missing { what: format!("`{name}`"), why, remedy }
}

/// Whether a program needs no loader. The loader's path is named within the first page of one that does.
fn is_static(file: &Path) -> bool {
    let mut page = [0; 4096];
    let read = File::open(file).and_then(|mut file| file.read(&mut page));
    let loader = b"/ld-linux";
    read.is_ok_and(|length| !page[..length].windows(loader.len()).any(|window| window == loader))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::kernel::KernelVersion;

    #[test]
    fn a_program_that_needs_a_loader_is_not_static() {
        assert!(!is_static(Path::new("/bin/sh")));
    }

    #[test]
    fn a_program_that_is_nowhere_is_not_found() {
        assert_eq!(find("no-such-program-anywhere"), None);
        assert!(find("sh").is_some());
    }

    #[test]
    fn what_is_measured_with_is_asked_of_who_measures_or_tests_alone() {
        let packages = |purposes: &[Purpose]| needed(purposes).map(|program| program.package).collect::<Vec<_>>();
        let bench = packages(&[Purpose::Bench]);
        assert_eq!(bench, ["nftables", "iptables", "iperf3"]);
        let tests = packages(&[Purpose::Test]);
        assert!(bench.iter().all(|package| tests.contains(package)), "{tests:?}");
        let others = packages(&[Purpose::Build, Purpose::Mesh, Purpose::Vm(KernelVersion::V6_12)]);
        assert!(bench.iter().all(|package| !others.contains(package)), "{others:?}");
    }
}
