//! One boot of a machine: its output relayed, its end understood.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::image::RunDirectory;
use crate::process::{self, Running};
use crate::progress::{Progress, seconds, tail};
use crate::setup::kernel::{Kernel, directory};
use crate::setup::qemu::Qemu;

/// Holds the archive twice while the kernel unpacks it, and a mesh afterwards.
const MEMORY_MIB: u32 = 1536;
const CPUS: u32 = 2;
/// An oops stops the machine, and the machine does not start again.
const COMMAND_LINE: &str = "console=ttyS0 quiet oops=panic panic=-1 random.trust_cpu=on";
/// What a sound kernel never says.
const TROUBLE: [&str; 6] = ["Kernel panic", "Oops:", "BUG:", "general protection fault", "unable to handle", "KASAN:"];

/// How a run in a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The program ended by itself. `left` are the commands of what it left running.
    Exited { status: u8, left: Vec<String> },
    /// The machine did not get as far as the program.
    NotUp { reason: String },
    /// The kernel is at fault.
    KernelTrouble { line: String },
    /// The machine was taken down from here.
    Stopped(process::Ended),
    /// The machine stopped without a word.
    Vanished { console: String },
}

impl Ended {
    /// It ended well and left nothing behind.
    pub(crate) fn clean(&self) -> bool {
        matches!(self, Self::Exited { status: 0, left } if left.is_empty())
    }

    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Exited { status, .. } => *status,
            Self::Stopped(ended) if !ended.success() => ended.code(),
            Self::NotUp { .. } | Self::KernelTrouble { .. } | Self::Stopped(_) | Self::Vanished { .. } => 1,
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited { status, left } if left.is_empty() => write!(f, "exit status {status}"),
            Self::Exited { status, left } => {
                write!(f, "exit status {status}, and it left `{}` running", left.join("`, `"))
            }
            Self::NotUp { reason } => write!(f, "the machine failed {reason}"),
            Self::KernelTrouble { line } => {
                write!(f, "the kernel said `{line}`; see console.log beside it under target/vm")
            }
            Self::Stopped(ended) => write!(f, "the machine was {ended}"),
            Self::Vanished { console } => write!(f, "the machine stopped without a word; its console:\n{console}"),
        }
    }
}

/// Boots `initrd` and waits for its end.
pub(super) fn boot(kernel: &Kernel, run: &RunDirectory, initrd: &Path, limit: Duration) -> Result<Ended> {
    let (console, status) = (run.file("console"), run.file("status"));
    let qemu = Qemu::find()?;
    let mut booting = Some(Progress::start(format!("booting {}", kernel.release)));
    let started = Instant::now();
    let mut running = Running::spawn(&mut machine(&qemu, kernel, initrd, &console, &status))?;
    let mut lines = running.child().stdout.take().context("qemu has no output")?;
    // qemu would set flags on our own output, which others share; it gets a pipe.
    let relay = thread::spawn(move || io::copy(&mut lines, &mut io::stdout()));
    let ended = running.wait(limit, || {
        if let Some(progress) = &mut booting {
            progress.tick();
            if fs::metadata(&status).is_ok_and(|data| data.len() > 0) {
                booting = None;
                eprintln!("vm {}: {} is up after {}", kernel.version, kernel.release, seconds(started.elapsed()));
            }
        }
    })?;
    drop(booting);
    let _relayed = relay.join();
    // The log of the last machine is kept; several may run at a time.
    let kept = directory(kernel.version).join("console.log");
    fs::copy(&console, &kept).with_context(|| format!("failed to keep the console in `{}`", kept.display()))?;
    Ok(judge(ended, &fs::read_to_string(&status).unwrap_or_default(), &console))
}

fn machine(qemu: &Qemu, kernel: &Kernel, initrd: &Path, console: &Path, status: &Path) -> Command {
    let mut command = Command::new("setpriv");
    // It dies with us, however we die.
    command.args(["--pdeathsig", "KILL", "--"]);
    qemu.append_to(&mut command);
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-no-reboot", "-rtc", "base=utc"]);
    command.args(["-m", &MEMORY_MIB.to_string(), "-smp", &CPUS.to_string()]);
    command.arg("-serial").arg(format!("file:{}", console.display()));
    command.args(["-serial", "stdio"]);
    command.arg("-serial").arg(format!("file:{}", status.display()));
    command.arg("-kernel").arg(kernel.image()).arg("-initrd").arg(initrd).args(["-append", COMMAND_LINE]);
    command.stdout(Stdio::piped());
    command
}

/// The rest of each line that begins with `word`.
fn lines<'a>(status: &'a str, word: &'static str) -> impl Iterator<Item = &'a str> {
    status.lines().filter_map(move |line| line.strip_prefix(word)).map(str::trim)
}

/// What the machine told us, and what its console shows, as one answer.
fn judge(ended: process::Ended, status: &str, console: &Path) -> Ended {
    let log = fs::read(console).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    if let Some(line) = log.lines().find(|line| TROUBLE.iter().any(|trouble| line.contains(trouble))) {
        return Ended::KernelTrouble { line: line.trim().to_owned() };
    }
    if !ended.success() {
        return Ended::Stopped(ended);
    }
    let told = |word: &'static str| lines(status, word).next();
    if let Some(reason) = told("failed ") {
        return Ended::NotUp { reason: reason.to_owned() };
    }
    match told("exit ").and_then(|status| status.parse().ok()) {
        Some(code) => Ended::Exited { status: code, left: lines(status, "left ").map(str::to_owned).collect() },
        None => Ended::Vanished { console: tail(console) },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn check(name: &str, console: &str, status: &str, code: u8, text: &str) {
        let file = std::env::temp_dir().join(format!("xtask-judge-{}-{name}", std::process::id()));
        fs::write(&file, console).unwrap();
        let ended = judge(process::Ended::Exited(ExitStatus::from_raw(0)), status, &file);
        fs::remove_file(&file).unwrap();
        assert_eq!(ended.code(), code, "{ended}");
        assert!(ended.to_string().contains(text), "{ended}");
    }

    #[test]
    fn only_a_status_that_was_told_counts() {
        check("zero", "", "up 2.1\nexit 0\n", 0, "exit status 0");
        check("left", "", "up 2.1\nleft noded run\nleft sh\nexit 0\n", 0, "`noded run`, `sh`");
        check("passed-on", "", "up 2.1\nexit 3\n", 3, "exit status 3");
        check("no-init", "", "failed to mount /proc\n", 1, "failed to mount /proc");
        check("silent", "last words\n", "up 2.1\n", 1, "last words");
        check("oops", "[ 1.0] BUG: kernel NULL pointer\n", "up 2.1\nexit 0\n", 1, "NULL pointer");
    }
}
