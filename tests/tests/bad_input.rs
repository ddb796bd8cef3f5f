//! What the programs say to bad input: the value, the reason and the remedy, the exit status, and that nothing changed.

use std::process::Output;

use anyhow::{Context, Result, ensure};
use tests::mesh::Mesh;
use tests::namespace::Lifetime;
use tests::scenario;

/// Every word must be in the message; the first is the offending value.
struct Case {
    args: &'static [&'static str],
    code: i32,
    words: &'static [&'static str],
}

const MESHCTL: &[Case] = &[
    Case {
        args: &["cidr", "add", "x", "10.42.9.1/24"],
        code: 2,
        words: &["10.42.9.1/24", "host bits", "10.42.9.0/24"],
    },
    Case { args: &["cidr", "add", "x", "10.42.9.0/33"], code: 2, words: &["10.42.9.0/33"] },
    Case { args: &["cidr", "add", "x", "10.42.1.0/24"], code: 1, words: &["10.42.1.0/24", "web"] },
    Case { args: &["cidr", "add", "x", "10.99.0.0/24"], code: 1, words: &["10.99.0.0/24", "10.42.0.0/16"] },
    Case { args: &["cidr", "add", "x", "127.0.0.0/8"], code: 2, words: &["127.0.0.0/8", "loopback"] },
    Case { args: &["cidr", "add", "web", "10.42.9.0/24"], code: 1, words: &["web", "taken"] },
    Case { args: &["cidr", "add", "We b", "10.42.9.0/24"], code: 2, words: &["We b"] },
    Case { args: &["cidr", "delete", "web"], code: 1, words: &["web", "web1", "web-to-app"] },
    Case { args: &["cidr", "delete", "wbe"], code: 1, words: &["wbe", "web"] },
    Case { args: &["cidr", "move", "web", "10.42.77.0/24"], code: 1, words: &["web1"] },
    Case {
        args: &["node", "invite", "n", "--cidr", "web", "--address", "10.42.2.9"],
        code: 1,
        words: &["10.42.2.9", "web"],
    },
    Case { args: &["node", "invite", "n", "--cidr", "nope"], code: 1, words: &["nope"] },
    Case {
        args: &["rule", "add", "r", "--from", "cidr:wbe", "--to", "cidr:app", "--service", "tcp/1"],
        code: 1,
        words: &["wbe", "web"],
    },
    Case {
        args: &["rule", "add", "r", "--from", "zone:web", "--to", "cidr:app", "--service", "tcp/1"],
        code: 2,
        words: &["zone:web", "cidr:"],
    },
    Case {
        args: &["rule", "add", "r", "--from", "cidr:web", "--to", "cidr:app", "--service", "tcp/65536"],
        code: 2,
        words: &["65536", "65535"],
    },
    Case {
        args: &["rule", "add", "r", "--from", "cidr:web", "--to", "cidr:app", "--service", "udp/20-10"],
        code: 2,
        words: &["20-10"],
    },
    Case {
        args: &["rule", "add", "r", "--from", "cidr:web", "--to", "cidr:app", "--service", "tpc/1"],
        code: 2,
        words: &["tpc/1", "tcp"],
    },
    Case {
        args: &["rule", "add", "web-to-app", "--from", "any", "--to", "any", "--service", "any"],
        code: 1,
        words: &["web-to-app", "taken"],
    },
    Case { args: &["rule", "delete", "web-to-ap"], code: 1, words: &["web-to-ap", "web-to-app"] },
    Case { args: &["node", "invite", "n", "--cidr", "web", "--expires", "soon"], code: 2, words: &["soon", "1h"] },
    Case { args: &["--controller", "127.0.0.1:1", "status"], code: 4, words: &["identity"] },
    Case { args: &["--socket", "/run/nothing.sock", "status"], code: 5, words: &["/run/nothing.sock"] },
];

#[test]
fn meshctl_refuses_and_changes_nothing() -> Result<()> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    scenario::build(&mut mesh, |_| ())?;
    scenario::allow(&mesh)?;
    let network = || {
        mesh.meshctl_ok(&["cidr", "list", "-o", "json"]).and_then(|cidrs| {
            Ok(cidrs
                + &mesh.meshctl_ok(&["rule", "list", "-o", "json"])?
                + &mesh.meshctl_ok(&["node", "list", "-o", "json"])?)
        })
    };
    let before = network()?;
    let mut wrong = Vec::new();
    for case in MESHCTL {
        if let Err(error) = check(case, &mesh.meshctl(case.args)?) {
            wrong.push(format!("meshctl {}: {error:#}", case.args.join(" ")));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(network()? == before, "a refused command changed something");
    Ok(())
}

#[test]
fn noded_refuses_bad_invitations() -> Result<()> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    scenario::build(&mut mesh, |_| ())?;
    let good = mesh.meshctl_ok(&["node", "invite", "web2", "--cidr", "web", "--expires", "1h"])?.trim().to_owned();
    let web = mesh.node("web1")?.namespace();
    let join = |state: &str, invitation: &str| {
        let mut command = mesh.program("noded");
        web.output(command.args(["join", "--state-dir", state, invitation]))
    };
    let mut tampered = good.clone().into_bytes();
    let middle = tampered.len() / 2;
    tampered[middle] = if tampered[middle] == b'A' { b'B' } else { b'A' };
    let tampered = String::from_utf8(tampered)?;
    let refused: [(&str, &[&str]); 4] = [
        (&tampered, &["invitation"]),
        (&good[..good.len() - 7], &["invitation"]),
        ("rampart9:AAAA", &["version 9", "upgrade"]),
        ("hello", &["rampart1"]),
    ];
    for (invitation, words) in refused {
        let output = join("/run/elsewhere", invitation)?;
        let code = output.status.code().context("killed")?;
        ensure!(code == 1 || code == 2, "`{invitation}`: exit status {code}");
        contains(&output, words).with_context(|| invitation.to_owned())?;
    }
    // Joined already, as somebody else.
    let output = join("/run/rampart-node", &good)?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    contains(&output, &["web1", "noded leave"])?;
    // Redeemed, then redeemed again by other keys.
    ensure!(join("/run/second", &good)?.status.success(), "the good invitation is refused");
    ensure!(join("/run/second", &good)?.status.success(), "the same keys again are refused");
    let output = join("/run/third", &good)?;
    ensure!(output.status.code() == Some(1), "other keys: {output:?}");
    contains(&output, &["other key", "meshctl node invite"])
}

#[test]
fn the_daemons_refuse_what_they_cannot_do() -> Result<()> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    scenario::build(&mut mesh, |_| ())?;
    let run = |host: &tests::namespace::Namespace, program: &str, args: &[&str]| {
        let mut command = mesh.program(program);
        host.output(command.args(args))
    };
    let web = mesh.node("web1")?.namespace();
    // Two of a kind.
    let second = run(web, "noded", &["run", "--state-dir", "/run/rampart-node"])?;
    ensure!(second.status.code() == Some(1), "a second noded: {second:?}");
    contains(&second, &["rampart0", "pid"])?;
    let second = run(mesh.controller(), "controllerd", &["serve", "--state-dir", "/run/rampart-controller"])?;
    ensure!(second.status.code() == Some(1), "a second controllerd: {second:?}");
    contains(&second, &["pid"])?;
    let again = ["init", "--network", "corp", "--root", "10.42.0.0/16", "--endpoint", "a:1", "--state-dir"];
    let again = run(mesh.controller(), "controllerd", &[&again[..], &["/run/rampart-controller"]].concat())?;
    ensure!(again.status.code() == Some(1), "a second init: {again:?}");
    contains(&again, &["/run/rampart-controller"])?;
    // A link of somebody else.
    web.run("ip", &["link", "add", "taken0", "type", "veth", "peer", "name", "taken1"])?;
    web.run("cp", &["-r", "/run/rampart-node", "/run/copy"])?; // the node itself runs
    let foreign = run(web, "noded", &["run", "--state-dir", "/run/copy", "--interface", "taken0", "--metrics", "off"])?;
    ensure!(foreign.status.code() == Some(1), "a foreign link: {foreign:?}");
    contains(&foreign, &["taken0", "--interface"])?;
    ensure!(web.run("ip", &["link", "show", "taken0"]).is_ok(), "the foreign link was touched");
    // Not joined.
    let stranger = run(web, "noded", &["run", "--state-dir", "/run/nobody", "--interface", "other0"])?;
    ensure!(stranger.status.code() == Some(1), "not joined: {stranger:?}");
    contains(&stranger, &["noded join"])?;
    // Configuration.
    web.enter(|| Ok(std::fs::write("/run/bad.toml", "interfcae = \"x\"\n")?))?;
    let config = run(web, "noded", &["run", "--config", "/run/bad.toml"])?;
    ensure!(matches!(config.status.code(), Some(1 | 2)), "bad configuration: {config:?}");
    contains(&config, &["interfcae", "interface"])
}

/// What a machine lacks is named, with the remedy, and nothing is left half-made.
#[test]
fn what_the_machine_lacks_is_named() -> Result<()> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    scenario::build(&mut mesh, |_| ())?;
    mesh.stop_node("web1", nix::sys::signal::Signal::SIGTERM)?;
    let web = mesh.node("web1")?.namespace();
    let noded = |args: &[&str]| web.output(mesh.program("noded").args(args));
    let refused = |output: Output, words: &[&str]| {
        ensure!(output.status.code() == Some(1), "{output:?}");
        contains(&output, words)
    };
    let run = ["run", "--state-dir", "/run/rampart-node"];

    let unprivileged = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let mut setpriv = std::process::Command::new("setpriv");
    setpriv.args(unprivileged).arg(mesh.program("noded").get_program()).args(run);
    refused(web.output(&mut setpriv)?, &["root"]).context("not root")?;

    web.run("umount", &["/sys/fs/bpf"])?;
    refused(noded(&run)?, &["/sys/fs/bpf", "mount -t bpf"]).context("no bpffs")?;
    web.run("mount", &["-t", "bpf", "bpf", "/sys/fs/bpf"])?;

    web.run("mount", &["-t", "tmpfs", "-o", "size=16k", "tmpfs", "/mnt"])?;
    let line = mesh.meshctl_ok(&["node", "invite", "web2", "--cidr", "web"])?;
    web.run("sh", &["-c", "head -c 20000 /dev/zero >/mnt/full 2>/dev/null || true"])?;
    refused(noded(&["join", "--state-dir", "/mnt/node", line.trim()])?, &["/mnt/node", "space"])
        .context("a full disk")?;

    let other = Mesh::new(Lifetime::Bound, "deny")?;
    other.meshctl_ok(&["cidr", "add", "web", "10.42.1.0/24"])?;
    let foreign = other.meshctl_ok(&["node", "invite", "web3", "--cidr", "web"])?;
    // The same address as the other network's controller, and another authority behind it.
    refused(noded(&["join", "--state-dir", "/run/other", foreign.trim()])?, &["authority"]).context("another CA")?;

    web.run("mount", &["-t", "tmpfs", "tmpfs", "/dev/net"])?;
    web.run("ip", &["link", "delete", "rampart0"])?;
    refused(noded(&[&run[..], &["--wireguard", "userspace"]].concat())?, &["/dev/net/tun"]).context("no TUN device")
}

/// A damaged state file is kept aside and fetched anew; meanwhile nothing passes that should not.
#[test]
fn a_corrupt_state_file_is_refused_and_fetched_anew() -> Result<()> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    scenario::build(&mut mesh, |_| ())?;
    mesh.stop_node("web1", nix::sys::signal::Signal::SIGTERM)?;
    let damaged = mesh.node("web1")?.namespace().enter(|| {
        let mut damaged = 0;
        for entry in std::fs::read_dir("/run/rampart-node")? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("state")) {
                let mut bytes = std::fs::read(&path)?;
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0xff;
                std::fs::write(&path, bytes)?;
                damaged += 1;
            }
        }
        Ok(damaged)
    })?;
    ensure!(damaged > 0, "there is no state file to damage");
    mesh.start_node("web1")?;
    mesh.wait_until_up("web1")?;
    mesh.converge()?;
    ensure!(mesh.log("web1").contains("corrupt"), "nothing was said of the damage:\n{}", mesh.log("web1"));
    let kept = mesh.node("web1")?.namespace().run("ls", &["/run/rampart-node"])?;
    ensure!(kept.contains("corrupt"), "the damaged file was not kept aside: {kept}");
    Ok(())
}

fn check(case: &Case, output: &Output) -> Result<()> {
    let code = output.status.code().context("killed by a signal")?;
    ensure!(
        code == case.code,
        "exit status {code} instead of {}: {}",
        case.code,
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(output.stdout.is_empty(), "an error on stdout: {}", String::from_utf8_lossy(&output.stdout));
    contains(output, case.words)
}

fn contains(output: &Output, words: &[&str]) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    for word in words {
        ensure!(said.contains(word), "the message does not say `{word}`: {said}");
    }
    Ok(())
}
