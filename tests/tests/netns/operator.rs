//! What an operator sees of a node: denied packets, live flows, and whether the kernel has the policy.

use std::io::{BufRead, BufReader, Read};
use std::mem::offset_of;
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use ebpf_common::table::{ALLOW, Control, DENY, Decision, TableCopy};
use ebpf_common::{map, reason};
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::conformance::foreign;
use tests::mesh::{Mesh, START_LIMIT, wait_for};
use tests::namespace::signal;
use tests::probe::{self, RunningFlow, SILENCE, Traffic};

use super::story;

fn json(mesh: &Mesh, node: &str, words: &[&str]) -> Result<Value> {
    let text = mesh.nodectl_ok(node, &[words, &["-o", "json"]].concat())?;
    serde_json::from_str(&text).with_context(|| text)
}

/// Seconds of RFC 3339 in UTC, as text that sorts by time.
fn seconds(mesh: &Mesh) -> Result<String> {
    Ok(mesh.controller().run("date", &["-u", "+%Y-%m-%dT%H:%M:%S"])?.trim().to_owned())
}

/// A `nodectl` that follows, with its lines as they come.
struct Follower {
    process: Child,
    lines: Receiver<String>,
}

impl Follower {
    fn start(mesh: &Mesh, node: &str, words: &[&str]) -> Result<Self> {
        let mut command = mesh.program("nodectl");
        command.args(["drops", "--follow", "-o", "json"]).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = mesh.node(node)?.namespace().spawn(&mut command)?;
        let stdout = process.stdout.take().context("no stdout")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            // Ends with the process, or with the test.
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Ok(Self { process, lines })
    }

    /// Waits for a record of this kind that fits.
    fn wait(&self, kind: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = SystemTime::now() + START_LIMIT;
        loop {
            let left = deadline.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO);
            let line = self.lines.recv_timeout(left).with_context(|| format!("no `{kind}` that fits came"))?;
            let record: Value = serde_json::from_str(&line).with_context(|| line)?;
            if record["kind"] == kind && fits(&record) {
                return Ok(record);
            }
        }
    }

    /// Interrupts it; its exit code and what it said last.
    fn interrupt(mut self) -> Result<(Option<i32>, String)> {
        signal(&self.process, Signal::SIGINT)?;
        let status = self.process.wait()?;
        let mut said = String::new();
        self.process.stderr.take().context("no stderr")?.read_to_string(&mut said)?;
        Ok((status.code(), said))
    }
}

#[test]
fn a_denied_packet_is_told_with_all_that_is_known_of_it() -> Result<()> {
    let (mesh, _servers) = story()?;
    let (web, db) = (mesh.node("web1")?, mesh.node("db1")?);
    let followers = [
        Follower::start(&mesh, "web1", &[])?,
        Follower::start(&mesh, "web1", &["--reason", "no-rule", "--destination", &db.v6.to_string()])?,
    ];
    let before = seconds(&mesh)?;
    for address in [db.v4.into(), db.v6.into()] {
        probe::attempt(web.namespace(), address, Traffic::Tcp(5432), SILENCE)?;
    }
    let v4 = followers[0].wait("drop", |drop| drop["destination"] == db.v4.to_string())?;
    let v6 = followers[1].wait("drop", |_| true)?;
    let after = seconds(&mesh)?;
    let revision = json(&mesh, "web1", &["status"])?["revision"].clone();
    for (drop, source, destination) in
        [(&v4, web.v4.to_string(), db.v4.to_string()), (&v6, web.v6.to_string(), db.v6.to_string())]
    {
        for (field, expected) in [
            ("direction", Value::from("egress")),
            ("interface", "rampart0".into()),
            ("source", source.into()),
            ("destination", destination.into()),
            ("protocol", 6.into()),
            ("destination-port", 5_432.into()),
            ("service", "tcp/5432".into()),
            ("source-cidr", "web".into()),
            ("destination-cidr", "db".into()),
            ("reason", "no-rule".into()),
            ("rule", Value::Null),
            ("revision", revision.clone()),
        ] {
            ensure!(drop[field] == expected, "{field} is not {expected}: {drop}");
        }
        ensure!(drop["source-port"].as_u64() > Some(1_023), "no port of a client: {drop}");
        let time = drop["time"].as_str().context("no time")?;
        ensure!(time.ends_with('Z') && before.as_str() <= &time[..19] && &time[..19] <= after.as_str(), "{drop}");
    }
    let remembered = json(&mesh, "web1", &["drops"])?;
    let mut known = v4.clone();
    known.as_object_mut().context("an object")?.remove("kind");
    ensure!(remembered["drops"].as_array().is_some_and(|drops| drops.contains(&known)), "{remembered}");
    let none = json(&mesh, "web1", &["drops", "--reason", "revoked"])?;
    ensure!(none["drops"].as_array().is_some_and(Vec::is_empty), "{none}");

    // More than the kernel reports: what is left out is said, to followers and to those who ask later.
    let socket = probe::udp_socket(web.namespace(), db.v4.into())?;
    let before = mesh.scrape_node("web1")?.sum("rampart_events_suppressed_total", &[]);
    for _ in 0..200 {
        socket.send_to(b"flood", SocketAddr::new(db.v4.into(), 9))?;
    }
    let told = followers[0].wait("suppressed", |record| record["reason"] == "no-rule")?;
    ensure!(told["since-last"].as_u64() > Some(0) && told["events"].as_u64() >= Some(100), "{told}");
    let counted = mesh.scrape_node("web1")?.sum("rampart_events_suppressed_total", &[]) - before;
    wait_for("every suppressed event to be told", START_LIMIT, || {
        let suppressed = json(&mesh, "web1", &["drops"])?["suppressed"].clone();
        Ok(suppressed[0]["reason"] == "no-rule" && suppressed[0]["events"].as_f64() >= Some(counted))
    })?;
    let [first, second] = followers;
    let (code, said) = first.interrupt()?;
    ensure!(code == Some(0) && said.contains("shown; not reported since the daemon started: "), "{code:?} {said}");
    let (code, said) = second.interrupt()?;
    ensure!(code == Some(0) && said.contains("no-rule"), "{code:?} {said}");
    Ok(())
}

#[test]
fn a_live_flow_is_listed_at_both_ends_and_as_revoked_when_its_rule_goes() -> Result<()> {
    let (mesh, _servers) = story()?;
    let (web, app) = (mesh.node("web1")?, mesh.node("app1")?);
    let mut flow = RunningFlow::open(web.namespace(), SocketAddr::new(app.v4.into(), 8080))?;
    ensure!(flow.beats(), "the flow carries nothing");
    let listed = |node: &str| -> Result<Value> {
        let flows = json(&mesh, node, &["flows", "--address", &format!("{}/32", app.v4)])?;
        Ok(flows["flows"].as_array().and_then(|flows| flows.first().cloned()).unwrap_or_default())
    };
    for (node, direction) in [("web1", "egress"), ("app1", "ingress")] {
        let seen = listed(node)?;
        for (field, expected) in [
            ("direction", Value::from(direction)),
            ("source", web.v4.to_string().into()),
            ("destination", app.v4.to_string().into()),
            ("service", "tcp/8080".into()),
            ("state", "established".into()),
            ("rule", "web-to-app".into()),
            ("source-cidr", "web".into()),
            ("destination-cidr", "app".into()),
        ] {
            ensure!(seen[field] == expected, "{node}: {field} is not {expected}: {seen}");
        }
        for field in ["packets", "bytes", "reply-packets", "reply-bytes", "expires-in"] {
            ensure!(seen[field].as_u64() > Some(0), "{node}: {field} is nothing: {seen}");
        }
    }
    let text = mesh.nodectl_ok("web1", &["flows", "--limit", "1"])?;
    ensure!(text.lines().count() == 3 && text.contains("in all"), "one flow and how many there are: {text}");
    mesh.meshctl_ok(&["rule", "delete", "web-to-app"])?;
    wait_for("the flow to be revoked", START_LIMIT, || Ok(!flow.beats() && listed("web1")?["state"] == "revoked"))?;

    // Who made the policy another one, and what it was.
    let history: Value = serde_json::from_str(&mesh.meshctl_ok(&["history", "--limit", "2", "-o", "json"])?)?;
    let newest = &history[0];
    ensure!(newest["actor"] == "root" && newest["change"] == "rule delete web-to-app", "{history}");
    let before = (newest["revision"].as_u64().context("a number")? - 1).to_string();
    let show = |more: &[&str]| mesh.meshctl_ok(&[&["policy", "show", "--from", "web", "--to", "app"], more].concat());
    let (then, now) = (show(&["--at", &before])?, show(&[])?);
    ensure!(then.contains("tcp/8080") && !now.contains("tcp/8080"), "{then}\n{now}");
    Ok(())
}

/// Turns every decision of web1's tables in force that allows by a rule into one that denies.
fn close_by_hand(mesh: &Mesh) -> Result<()> {
    mesh.node("web1")?.namespace().enter(|| {
        let pins = std::fs::read_dir(format!("/sys/fs/bpf/rampart/v{}", ebpf_common::ABI_VERSION))?;
        let namespace = pins.last().context("no pins")??.path();
        let maps = namespace.join("rampart0/maps");
        let control = MapData::from_pin(maps.join(map::CONTROL)).map(Map::Array)?;
        let control: Array<MapData, Control> = Array::try_from(control)?;
        let mut closed = 0;
        foreign::edit(&maps.join(map::TABLES), control.get(&0, 0)?.active, size_of::<TableCopy>(), |copy| {
            let decisions = &mut copy[offset_of!(TableCopy, decisions)..];
            for decision in decisions.chunks_mut(size_of::<Decision>()).take(16) {
                let (verdict, by) = (offset_of!(Decision, verdict), offset_of!(Decision, reason));
                if decision[verdict] == ALLOW && decision[by] == reason::RULE {
                    decision[verdict] = DENY;
                    closed += 1;
                }
            }
        })?;
        ensure!(closed > 0, "no decision allows by a rule");
        Ok(())
    })
}

#[test]
fn tables_that_somebody_wrote_to_are_named_cell_by_cell_and_repaired() -> Result<()> {
    let (mesh, _servers) = story()?;
    let equal = mesh.nodectl_ok("web1", &["policy", "verify"])?;
    ensure!(equal.contains("all as the policy says"), "{equal}");
    let repairs =
        || Ok::<_, anyhow::Error>(mesh.scrape_node("web1")?.sum("rampart_drift_repairs_total", &[("kind", "tables")]));
    for words in [&["policy", "verify", "-o", "json"][..], &["policy", "verify"]] {
        let before = repairs()?;
        close_by_hand(&mesh)?;
        let found = mesh.nodectl("web1", words)?;
        let text = String::from_utf8_lossy(&found.stdout).into_owned();
        ensure!(found.status.code() == Some(3), "{found:?}");
        for word in ["egress", "web", "app", "tcp/8080", "deny", "allow", "web-to-app"] {
            ensure!(text.contains(word), "{word} is not named: {text}");
        }
        if words.contains(&"json") {
            let verified: Value = serde_json::from_str(&text)?;
            let detail = &verified["differences"][0]["detail"];
            ensure!(
                verified["equal"] == false && detail["kind"] == "cell" && detail["found"]["verdict"] == "deny",
                "{text}"
            );
        }
        wait_for("the repair to be counted", START_LIMIT, || Ok(repairs()? == before + 1.0))?;
        let after = mesh.nodectl("web1", &["policy", "verify"])?;
        ensure!(after.status.success(), "the tables are still wrong: {after:?}");
    }
    let page = mesh.scrape_node("web1")?;
    ensure!(page.sum("rampart_policy_verify_result", &[]) == 1.0, "{}", page.text);
    ensure!(page.sum("rampart_policy_verify_differences", &[]) == 0.0, "{}", page.text);
    ensure!(page.sum("rampart_policy_verify_runs_total", &[("result", "different")]) == 2.0, "{}", page.text);
    ensure!(page.sum("rampart_policy_verify_runs_total", &[("result", "equal")]) >= 3.0, "{}", page.text);
    ensure!(page.sum("rampart_policy_verify_duration_seconds", &[]) > 0.0, "{}", page.text);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    let last = page.sum("rampart_policy_verify_timestamp_seconds", &[]);
    ensure!(last <= now && last > now - START_LIMIT.as_secs_f64(), "verified at {last}, now is {now}");
    Ok(())
}

/// The check on the interval finds it, without `nodectl policy verify`.
#[test]
fn tables_are_verified_at_intervals() -> Result<()> {
    let (mut mesh, _servers) = story()?;
    mesh.stop_node("web1", Signal::SIGTERM)?;
    let settings = "state-dir = \"/run/rampart-node\"\nverify-interval = 1\n";
    mesh.node("web1")?.namespace().enter(|| Ok(std::fs::write("/run/node.toml", settings)?))?;
    mesh.start_node_with("web1", &["--config", "/run/node.toml"])?;
    mesh.wait_until_up("web1")?;
    wait_for("the tables to be found wrong and repaired", START_LIMIT, || {
        let page = mesh.scrape_node("web1")?;
        let found = page.sum("rampart_policy_verify_runs_total", &[("result", "different")]);
        if found == 0.0 {
            // A switch may have put right what was written before it.
            let _already_closed = close_by_hand(&mesh);
        }
        Ok(found > 0.0 && page.sum("rampart_drift_repairs_total", &[("kind", "tables")]) == found)
    })
    .with_context(|| mesh.log("web1"))?;
    ensure!(mesh.log("web1").contains("the tables in the kernel are not the policy"), "{}", mesh.log("web1"));
    Ok(())
}
