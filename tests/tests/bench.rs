//! The bench measures: every part of it gives rows, and the rows have their shape. How fast anything is, is not asked.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// What rows must be there, by the beginning of their names.
const WANTED: [&str; 24] = [
    "policy lookup, IPv4, 100 cidrs, dense",
    "policy lookup, IPv6, 100 cidrs, sparse",
    "policy lookup, IPv4, 100 cidrs, ten times the rules",
    "one LPM lookup, IPv4",
    "Cilium's shape, IPv6",
    "two LPM and a hash, IPv4",
    "whole program, allowed by any-service, IPv4",
    "whole program, allowed by port, IPv6",
    "whole program, denied, IPv4",
    "whole program, reply of a known flow, 64 flows, IPv6",
    "whole program, new flow that needs a record, IPv4",
    "whole program, first fragment, allowed",
    "received, no policy, IPv4, 10 rules",
    "received, Rampart, IPv6, 10 rules",
    "received, Rampart / nftables, linear rules, IPv4",
    "received, Rampart / nftables, conntrack before a concatenated set, IPv6",
    "received, Rampart / iptables, linear rules, IPv4",
    "TCP, one stream, Rampart / no program",
    "TCP, eight streams, Rampart / no program, lower end of the interval",
    "UDP of 64 bytes, Rampart / no program",
    "1-byte request and response, Rampart / no program",
    "compile 300 cidrs and 3,000 rules",
    "switch to 300 cidrs and 3,000 rules",
    "apply a one-rule delta to 300 cidrs and 3,000 rules, p99",
];

/// Likewise, of the bench `control`.
const WANTED_OF_CONTROL: [&str; 22] = [
    "groups 20: cold start",
    "groups 40: controller memory per node",
    "groups 20: change of 2 nodes: commit call, p50",
    "groups 20: change of 2 nodes: controller CPU",
    "groups 20: change of 100 nodes: call to enforced, p99",
    "groups 20: change of all nodes: call to received, p99",
    "groups 40: change of 2 nodes: bytes per node that hears of it",
    "groups 40: change of 2 nodes: bytes per node that it is not meant for",
    "groups 40: a move is known to the peers, p99",
    "groups 40: moves per second",
    "groups 40: joins per second",
    "groups 40: all resumed after a restart",
    "groups 40: snapshots sent after a restart",
    "groups 40: answer to an admin while all come back, p99",
    "groups, change of 2 nodes: growth of the commit call with n, exponent",
    "mesh 20: change of 2 nodes: call to enforced, p50",
    "mesh 40: all resumed after a restart",
    "mesh, change of 2 nodes: growth of the controller CPU with n, exponent",
    "50 cidrs, 500 rules: compile, in full",
    "100 cidrs, 1000 rules: edit, compiled and held against the limits, p99",
    "100 cidrs, 1000 rules: commit call without followers, p50",
    "100 cidrs, 1000 rules: call to enforced at two nodes, p50",
];

#[test]
fn every_part_gives_its_rows() -> Result<()> {
    check("datapath", &WANTED)
}

#[test]
fn nodes_and_their_controller_are_measured() -> Result<()> {
    check("control", &WANTED_OF_CONTROL)
}

fn check(bench: &str, wanted: &[&str]) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("rows.json");
    let output = measure(&[bench, "--quick", "--json"], &json)?;
    ensure!(output.contains("targets met"), "there is no table:\n{output}");
    let rows: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    for row in &rows {
        let fields = row.as_object().context("a row is no object")?;
        ensure!(fields.keys().eq(["met", "name", "target", "unit", "value"]), "{row}");
        ensure!(row["name"].is_string() && row["unit"].is_string(), "{row}");
        ensure!(row["value"].as_f64().is_some_and(f64::is_finite), "not measured: {row}");
        ensure!(row["met"].is_boolean() == row["target"].is_number(), "{row}");
    }
    let missing: Vec<&&str> = wanted
        .iter()
        .filter(|wanted| !rows.iter().any(|row| row["name"].as_str().is_some_and(|name| name.starts_with(**wanted))))
        .collect();
    ensure!(missing.is_empty(), "no rows begin with {missing:?}");
    Ok(())
}

/// Runs the bench, whose exit status must be 0 whatever it found, and returns its table.
fn measure(arguments: &[&str], json: &Path) -> Result<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_measure")).args(arguments).arg(json).output()?;
    ensure!(
        output.status.success(),
        "the bench ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}
