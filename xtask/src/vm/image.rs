//! What a machine boots into: an archive of tools and modules that is kept between runs, and one of what this run
//! brings. The kernel unpacks both, one over the other.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::Job;
use crate::process::output;
use crate::progress::Progress;
use crate::setup::find_program;
use crate::setup::kernel::{Kernel, directory};

/// Loaded at boot, with what they depend on.
const MODULES: [&str; 5] = ["wireguard", "veth", "sch_ingress", "cls_bpf", "tun"];
/// The real ones, not busybox's; everything else is a link to busybox.
const TOOLS: [&str; 15] = [
    "bash", "bridge", "ip", "modprobe", "mount", "nsenter", "ping", "ps", "setpriv", "ss", "sysctl", "tc", "umount",
    "unshare", "wg",
];
/// Rampart's, from target/debug, as far as they are built.
const PROGRAMS: [&str; 5] = ["noded", "nodectl", "controllerd", "meshctl", "demo"];
/// Variables of this process that a test in the machine needs.
const PASSED_ON: [&str; 3] = ["RAMPART_", "PROPTEST_", "RUST_"];
/// Begins the name of a run's directory; the process id follows.
const RUN: &str = "run-";
const INIT: &str = include_str!("init.sh");
const ETC: [(&str, &str); 5] = [
    ("hosts", "127.0.0.1 localhost vm\n::1 localhost\n"),
    ("passwd", "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    ("group", "root:x:0:\nnogroup:x:65534:\n"),
    ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\nprotocols: files\nservices: files\n"),
    ("resolv.conf", ""),
];

/// A directory of one run, gone when the run is over.
#[derive(Debug)]
pub(super) struct RunDirectory(PathBuf);

impl RunDirectory {
    pub(super) fn create() -> Result<Self> {
        let folder = crate::checkout::target().join("vm");
        remove_stale(&folder)?;
        let run = Self(folder.join(format!("{RUN}{}", std::process::id())));
        create(&run.0)?;
        Ok(run)
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        let _best_effort = fs::remove_dir_all(&self.0);
    }
}

/// Removes what runs that were killed could not.
fn remove_stale(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("failed to read `{}`", folder.display()))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(process) = name.strip_prefix(RUN)
            && (!Path::new("/proc").join(process).exists() || process == std::process::id().to_string())
        {
            fs::remove_dir_all(entry.path())
                .with_context(|| format!("failed to remove `{}`", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Builds what the kernel boots into.
pub(super) fn build(kernel: &Kernel, run: &RunDirectory, program: &Path, job: &Job) -> Result<PathBuf> {
    let base = base(kernel)?;
    let overlay = overlay(run, program, job)?;
    let initrd = run.file("initrd");
    let mut whole = File::create(&initrd).with_context(|| format!("failed to create `{}`", initrd.display()))?;
    for part in [&base, &overlay] {
        File::open(part)
            .and_then(|mut part| io::copy(&mut part, &mut whole))
            .with_context(|| format!("failed to add `{}` to `{}`", part.display(), initrd.display()))?;
    }
    Ok(initrd)
}

/// The archive of tools and modules. It is built again when a tool, the kernel or our own list has changed.
fn base(kernel: &Kernel) -> Result<PathBuf> {
    let mut files = BTreeSet::new();
    for tool in TOOLS {
        files.insert(find_program(tool).with_context(|| format!("`{tool}` is missing; run `cargo xtask setup`"))?);
    }
    let busybox = find_program("busybox").context("`busybox` is missing; run `cargo xtask setup`")?;
    files.extend(libraries(&files)?);
    files.insert(busybox.clone());
    let manifest = manifest(kernel, &files)?;
    let archive = directory(kernel.version).join("base.cpio");
    let kept = archive.with_extension("manifest");
    if archive.exists() && fs::read_to_string(&kept).is_ok_and(|text| text == manifest) {
        return Ok(archive);
    }
    let progress = Progress::start(format!("packing tools and modules for kernel {}", kernel.version));
    let tree = directory(kernel.version).join("base");
    let _gone = fs::remove_dir_all(&tree);
    skeleton(&tree)?;
    for file in &files {
        copy(file, &tree)?;
    }
    applets(&busybox, &tree)?;
    modules(kernel, &tree)?;
    for (name, text) in ETC {
        write(&tree.join("etc").join(name), text.as_bytes())?;
    }
    write(
        &tree.join("etc/vm/modules"),
        MODULES.join("\n").as_bytes().iter().chain(b"\n").copied().collect::<Vec<_>>(),
    )?;
    write(&tree.join("init"), INIT.as_bytes())?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))
        .context("failed to make init a program")?;
    pack(&tree, &archive)?;
    fs::remove_dir_all(&tree).with_context(|| format!("failed to remove `{}`", tree.display()))?;
    write(&kept, manifest.as_bytes())?;
    progress.done();
    Ok(archive)
}

/// All that the archive is made from, so that a change shows.
fn manifest(kernel: &Kernel, files: &BTreeSet<PathBuf>) -> Result<String> {
    let mut text = format!("{}\n{MODULES:?}\n{ETC:?}\n{INIT}\n", kernel.release);
    for file in files {
        let data = fs::metadata(file).with_context(|| format!("failed to look at `{}`", file.display()))?;
        text.push_str(&format!("{} {} {}\n", file.display(), data.len(), age(&data)?));
    }
    Ok(text)
}

fn age(data: &fs::Metadata) -> Result<u128> {
    let modified = data.modified().context("this file system keeps no times")?;
    Ok(modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos())
}

/// The archive of one run: Rampart's programs, the program to run, and what to run.
fn overlay(run: &RunDirectory, program: &Path, job: &Job) -> Result<PathBuf> {
    let tree = run.file("overlay");
    let debug = crate::checkout::target().join("debug");
    let ours = PROGRAMS.iter().map(|name| debug.join(name)).filter(|path| path.is_file());
    let programs: BTreeSet<PathBuf> = ours.chain([program.to_owned()]).collect();
    let loaded = libraries(&programs)?;
    skeleton(&tree)?;
    for program in &programs {
        let stripped = stripped(program)?;
        place(&stripped, &inside(&tree, program))?;
    }
    for file in loaded.iter().chain(&job.files) {
        let file = std::path::absolute(file).with_context(|| format!("failed to resolve `{}`", file.display()))?;
        copy(&file, &tree)?;
    }
    create(&inside(&tree, crate::checkout::root()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let passed_on = std::env::vars()
        .filter(|(name, _)| PASSED_ON.iter().any(|prefix| name.starts_with(prefix)) && !name.contains("RUSTUP"))
        .map(|(name, value)| format!("{name}={value}"));
    let path = format!("PATH={}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/opt/busybox", debug.display());
    let environment: Vec<String> = passed_on.chain([path]).chain(job.environment.iter().cloned()).collect();
    let etc = tree.join("etc/vm");
    write(&etc.join("argv"), zero_terminated(&job.argv))?;
    write(&etc.join("environment"), zero_terminated(&environment))?;
    write(&etc.join("directory"), format!("{}\n", crate::checkout::root().display()))?;
    write(&etc.join("now"), format!("{now}\n"))?;
    let archive = run.file("overlay.cpio");
    pack(&tree, &archive)?;
    Ok(archive)
}

fn zero_terminated(words: &[String]) -> String {
    words.iter().map(|word| format!("{word}\0")).collect()
}

/// Directories as Debian has them: `/bin` and its like are links into `/usr`.
fn skeleton(tree: &Path) -> Result<()> {
    for dir in ["etc/vm", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "opt/busybox", "dev", "proc", "sys"] {
        create(&tree.join(dir))?;
    }
    for dir in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{dir}"), tree.join(dir)).with_context(|| format!("failed to link `{dir}`"))?;
    }
    Ok(())
}

/// The shared libraries of programs, as the loader would find them.
fn libraries(programs: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    // It also fails where a program is static, which is fine here.
    let listed = Command::new("ldd").args(programs).stdin(Stdio::null()).output().context("failed to start `ldd`")?;
    let text = String::from_utf8_lossy(&listed.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("a library of a program for the machine is missing here: `{}`", line.trim());
    }
    let path = |line: &str| {
        let line = line.strip_prefix('\t')?;
        let file = line.split_once(" => ").map_or(line, |(_, file)| file).split(" (").next()?;
        file.starts_with('/').then(|| PathBuf::from(file))
    };
    Ok(text.lines().filter_map(path).collect())
}

/// A program without its symbols, kept until the program changes.
fn stripped(program: &Path) -> Result<PathBuf> {
    let data = fs::metadata(program).with_context(|| format!("failed to look at `{}`", program.display()))?;
    let name = program.file_name().context("a program has a name")?.to_string_lossy();
    let keep = crate::checkout::target().join("vm/stripped");
    let kept = keep.join(format!("{name}-{}-{}", data.len(), age(&data)?));
    if kept.exists() {
        return Ok(kept);
    }
    create(&keep)?;
    for old in fs::read_dir(&keep).context("failed to read the stripped programs")?.flatten() {
        let old_name = old.file_name().to_string_lossy().into_owned();
        if old_name.rsplitn(3, '-').nth(2).is_some_and(|stem| stem == name) {
            let _best_effort = fs::remove_file(old.path());
        }
    }
    let mut head = [0; 4];
    let elf = File::open(program).and_then(|mut file| io::Read::read_exact(&mut file, &mut head)).is_ok();
    if elf && head == *b"\x7fELF" {
        let fresh = keep.join(format!("{name}.{}", std::process::id()));
        output(Command::new("strip").arg("-o").arg(&fresh).arg(program))?;
        fs::rename(&fresh, &kept).with_context(|| format!("failed to rename `{}`", fresh.display()))?;
    } else {
        fs::copy(program, &kept).with_context(|| format!("failed to copy `{}`", program.display()))?;
    }
    Ok(kept)
}

fn applets(busybox: &Path, tree: &Path) -> Result<()> {
    for applet in output(Command::new(busybox).arg("--list"))?.lines() {
        let link = tree.join("opt/busybox").join(applet);
        symlink(busybox, &link).with_context(|| format!("failed to link `{}`", link.display()))?;
    }
    Ok(())
}

/// The modules with what they depend on, unpacked, and their index.
fn modules(kernel: &Kernel, tree: &Path) -> Result<()> {
    let modprobe = find_program("modprobe").context("`modprobe` is missing; run `cargo xtask setup`")?;
    let mut command = Command::new(modprobe);
    command.arg("-d").arg(&kernel.root).args(["-S", &kernel.release, "--show-depends", "-a"]).args(MODULES);
    let listed = output(&mut command)?;
    let files: BTreeSet<&str> =
        listed.lines().filter_map(|line| line.strip_prefix("insmod ")?.split_whitespace().next()).collect();
    let target = tree.join("lib/modules").join(&kernel.release);
    for file in files {
        let path = Path::new(file);
        let within = path
            .strip_prefix(kernel.modules())
            .with_context(|| format!("module `{file}` is not under `{}`", kernel.modules().display()))?;
        let copy = target.join(within);
        place(path, &copy)?;
        let unpacker = match copy.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => Some("xz"),
            Some("zst") => Some("zstd"),
            _ => None,
        };
        if let Some(unpacker) = unpacker {
            output(Command::new(unpacker).args(["--decompress", "--quiet", "--force"]).arg(&copy))?;
            let _zstd_keeps_it = fs::remove_file(&copy);
        }
    }
    for index in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        place(&kernel.modules().join(index), &target.join(index))?;
    }
    let depmod = find_program("depmod").context("`depmod` is missing; run `cargo xtask setup`")?;
    output(Command::new(depmod).arg("-b").arg(tree).arg(&kernel.release))?;
    Ok(())
}

/// Packs a tree as the kernel wants it.
fn pack(tree: &Path, archive: &Path) -> Result<()> {
    let fresh = archive.with_extension("cpio.new");
    let file = File::create(&fresh).with_context(|| format!("failed to create `{}`", fresh.display()))?;
    let mut find = Command::new("find")
        .args([".", "-print0"])
        .current_dir(tree)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start `find`")?;
    let names = find.stdout.take().context("`find` has no output")?;
    let packed = Command::new("cpio")
        .args(["--create", "--format=newc", "--null", "--quiet", "--owner=0:0"])
        .current_dir(tree)
        .stdin(names)
        .stdout(file)
        .status()
        .context("failed to start `cpio`")?;
    if !packed.success() || !find.wait().context("failed to wait for `find`")?.success() {
        bail!("failed to pack `{}` ({packed}); is the disk full?", tree.display());
    }
    fs::rename(&fresh, archive).with_context(|| format!("failed to rename `{}`", fresh.display()))
}

fn inside(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

fn copy(file: &Path, tree: &Path) -> Result<()> {
    place(file, &inside(tree, file))
}

fn place(file: &Path, target: &Path) -> Result<()> {
    if let Some(dir) = target.parent() {
        create(dir)?;
    }
    fs::copy(file, target)
        .map(drop)
        .with_context(|| format!("failed to copy `{}` to `{}`", file.display(), target.display()))
}

fn write(file: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    fs::write(file, content).with_context(|| format!("failed to write `{}`", file.display()))
}

fn create(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("failed to create `{}`", dir.display()))
}
