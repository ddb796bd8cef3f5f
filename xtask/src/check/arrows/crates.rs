//! Which crate of the workspace may depend on which.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

/// Every crate, and all that it may depend on, for whatever purpose. `tests` may depend on anything.
const ARROWS: [(&str, &[&str]); 9] = [
    ("controller", &["controller-api", "node-host", "policy"]),
    ("controller-api", &["policy"]),
    // `meshctl` runs where no controller is, and speaks to it as anybody else would.
    ("controller-cli", &["controller-api", "policy"]),
    ("ebpf", &["ebpf-common"]),
    ("ebpf-common", &[]),
    ("node", &["controller-api", "ebpf-common", "node-host", "policy"]),
    ("node-host", &[]),
    ("policy", &[]),
    ("xtask", &[]),
];
const SINK: &str = "tests";

pub(super) fn findings(metadata: &Value) -> Result<Vec<String>> {
    Ok(judge(&crates(metadata)?))
}

/// Each crate of the workspace with those that it depends on.
fn crates(metadata: &Value) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let packages = metadata["packages"].as_array().context("`cargo metadata` names no packages")?;
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    // Only dependencies of ours have a path.
    let ours = |dependency: &&Value| dependency["path"].is_string();
    let dependencies = |package: &Value| {
        let all = package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter().filter(ours).map(name).collect()
    };
    Ok(packages.iter().map(|package| (name(package), dependencies(package))).collect())
}

fn judge(crates: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let mut findings = Vec::new();
    for (name, dependencies) in crates.iter().filter(|(name, _)| *name != SINK) {
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| known == name) else {
            findings.push(format!("crate `{name}` has no arrows yet; add it to xtask/src/check/arrows/crates.rs"));
            continue;
        };
        // A crate may name itself, to switch on a feature in its own tests.
        let known = |dependency: &str| dependency == name || allowed.contains(&dependency);
        for dependency in dependencies.iter().filter(|dependency| !known(dependency)) {
            let allowed = if allowed.is_empty() { "no crate of the workspace".to_owned() } else { allowed.join(", ") };
            findings.push(format!("`{name}` depends on `{dependency}`; it may depend on {allowed}"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, dependency: &str, findings: usize) {
        let crates = BTreeMap::from([(name.to_owned(), BTreeSet::from([dependency.to_owned()]))]);
        let found = judge(&crates);
        assert_eq!(found.len(), findings, "{name} -> {dependency}: {found:?}");
    }

    #[test]
    fn only_the_arrows_of_the_house_are_allowed() {
        check("controller", "controller-api", 0);
        check("node", "ebpf-common", 0);
        check("tests", "node", 0);
        check("policy", "policy", 0);
        check("ebpf", "policy", 1);
        check("node", "node-host", 0);
        check("node", "controller", 1);
        check("controller-cli", "controller-api", 0);
        check("controller-cli", "controller", 1);
        check("node-host", "policy", 1);
        check("policy", "tests", 1);
        check("xtask", "policy", 1);
        check("stranger", "policy", 1);
    }
}
