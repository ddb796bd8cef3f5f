//! Runs every command of the README's quick start, in its order, on hosts made for it.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use tests::mesh::{START_LIMIT, program_folder, wait_for};
use tests::namespace::{Lifetime, Namespace};
use tests::underlay::Underlay;

/// One command and where to type it.
#[derive(Debug, PartialEq)]
struct Typed {
    host: String,
    line: String,
}

/// The lines of blocks that open with "```sh HOST".
fn commands(markdown: &str) -> Vec<Typed> {
    let mut typed = Vec::new();
    let mut host = None;
    for line in markdown.lines() {
        match (line.strip_prefix("```"), &host) {
            (Some(_), Some(_)) => host = None,
            (Some(opening), None) => {
                host = Some(opening.strip_prefix("sh ").map(str::to_owned));
            }
            (None, Some(Some(host))) if !line.trim().is_empty() => {
                typed.push(Typed { host: host.clone(), line: line.to_owned() });
            }
            _ => {}
        }
    }
    typed
}

#[test]
fn the_quick_start_works_as_written() -> Result<()> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let typed = commands(&std::fs::read_to_string(readme)?);
    ensure!(typed.len() > 15, "the quick start was not found: {typed:?}");
    let mut underlay = Underlay::new(Lifetime::Bound)?;
    let controller = Namespace::new("controller", Lifetime::Bound)?;
    let (address, _) = underlay.connect(&controller)?;
    let mut nodes = Vec::new();
    for name in ["web1", "app1"] {
        let node = Namespace::new(name, Lifetime::Bound)?;
        underlay.connect(&node)?;
        nodes.push(node);
    }
    for host in nodes.iter().chain([&controller]) {
        // State of its own where the defaults put it, and the controller's name.
        host.run("mount", &["-t", "tmpfs", "tmpfs", "/var/lib"])?;
        host.enter(|| Ok(std::fs::write("/run/hosts", format!("{address} controller.example\n"))?))?;
        host.run("mount", &["--bind", "/run/hosts", "/etc/hosts"])?;
    }
    let mut invitations = Vec::new();
    for Typed { host, line } in &typed {
        if host == "controller" {
            let output = type_in(&controller, line)?;
            if line.starts_with("meshctl node invite") {
                invitations.push(output.trim().to_owned());
            }
            continue;
        }
        for (index, node) in nodes.iter().enumerate() {
            let invitation = invitations.get(index).map_or("", String::as_str);
            type_in(node, &line.replace("rampart1:…", invitation))?;
        }
    }
    Ok(())
}

/// Types a line into a host's shell; a command that needs a daemon that is still starting is tried again.
fn type_in(host: &Namespace, line: &str) -> Result<String> {
    let path = format!("{}:{}", program_folder()?.display(), std::env::var("PATH")?);
    let mut shell = Command::new("sh");
    shell.env("PATH", path).stdin(Stdio::null());
    if let Some(daemon) = line.strip_suffix('&') {
        shell.args(["-c", &format!("exec {daemon} >>/run/daemon.log 2>&1")]);
        host.spawn(&mut shell)?;
        return Ok(String::new());
    }
    shell.args(["-c", line]);
    let mut last = None;
    let done = wait_for(line, START_LIMIT, || {
        let output = host.output(&mut shell)?;
        let done = output.status.success();
        last = Some(output);
        Ok(done)
    });
    let last = last.with_context(|| format!("`{line}` was not tried"))?;
    done.with_context(|| {
        let log = host.enter(|| Ok(std::fs::read_to_string("/run/daemon.log")?)).unwrap_or_default();
        format!("`{line}` on {}: {}\n{log}", host.name(), String::from_utf8_lossy(&last.stderr))
    })?;
    Ok(String::from_utf8(last.stdout)?)
}

#[test]
fn blocks_are_told_apart_by_host() {
    let typed = commands("```sh a\none\n```\n\n    indented\n```toml\nx = 1\n```\n```sh b\ntwo\n```\n");
    let expected = [("a", "one"), ("b", "two")].map(|(host, line)| Typed { host: host.into(), line: line.into() });
    assert_eq!(typed, expected);
}

#[test]
fn every_program_is_in_the_quick_start() -> Result<()> {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md"))?;
    for program in ["controllerd", "meshctl", "noded", "nodectl"] {
        ensure!(commands(&readme).iter().any(|typed| typed.line.starts_with(program)), "no `{program}` in the README");
    }
    Ok(())
}
