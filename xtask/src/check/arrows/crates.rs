//! Which crate of the workspace may depend on which.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

/// A crate and those that it may depend on.
struct Arrow {
    from: &'static str,
    to: &'static [&'static str],
    /// And those that its own tests may depend on besides.
    tests: &'static [&'static str],
}

const fn arrow(from: &'static str, to: &'static [&'static str]) -> Arrow {
    Arrow { from, to, tests: &[] }
}

/// `tests` may depend on anything.
const ARROWS: [Arrow; 9] = [
    arrow("controller", &["controller-api", "node-host", "policy"]),
    arrow("controller-api", &["policy"]),
    // `meshctl` runs where no controller is, so nothing of the daemon is in it.
    Arrow { from: "controller-cli", to: &["controller-api", "policy"], tests: &["controller"] },
    arrow("ebpf", &["ebpf-common"]),
    arrow("ebpf-common", &[]),
    arrow("node", &["controller-api", "ebpf-common", "node-host", "policy"]),
    arrow("node-host", &[]),
    arrow("policy", &[]),
    arrow("xtask", &[]),
];
const SINK: &str = "tests";

pub(super) fn findings(metadata: &Value) -> Result<Vec<String>> {
    Ok(judge(&crates(metadata)?))
}

/// A dependency on a crate of the workspace, and whether it is for tests only.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Dependency {
    name: String,
    tests_only: bool,
}

/// Each crate of the workspace with those that it depends on.
fn crates(metadata: &Value) -> Result<BTreeMap<String, BTreeSet<Dependency>>> {
    let packages = metadata["packages"].as_array().context("`cargo metadata` names no packages")?;
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    // Only dependencies inside the workspace have a path.
    let ours = |dependency: &&Value| dependency["path"].is_string();
    let read = |dependency: &Value| Dependency { name: name(dependency), tests_only: dependency["kind"] == "dev" };
    let dependencies = |package: &Value| {
        let all = package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter().filter(ours).map(read).collect()
    };
    Ok(packages.iter().map(|package| (name(package), dependencies(package))).collect())
}

fn judge(crates: &BTreeMap<String, BTreeSet<Dependency>>) -> Vec<String> {
    let mut findings = Vec::new();
    for (name, dependencies) in crates.iter().filter(|(name, _)| *name != SINK) {
        let Some(Arrow { to, tests, .. }) = ARROWS.iter().find(|arrow| arrow.from == name) else {
            findings.push(format!("crate `{name}` has no arrows yet; add it to xtask/src/check/arrows/crates.rs"));
            continue;
        };
        // A crate may name itself, to switch on a feature in its own tests.
        let is_allowed = |Dependency { name: other, tests_only }: &&Dependency| {
            other == name || to.contains(&other.as_str()) || *tests_only && tests.contains(&other.as_str())
        };
        for Dependency { name: other, .. } in dependencies.iter().filter(|dependency| !is_allowed(dependency)) {
            let allowed = if to.is_empty() { "no crate of the workspace".to_owned() } else { to.join(", ") };
            findings.push(format!("`{name}` depends on `{other}`; it may depend on {allowed}"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_kind(name: &str, other: &str, tests_only: bool, findings: usize) {
        let dependency = Dependency { name: other.to_owned(), tests_only };
        let crates = BTreeMap::from([(name.to_owned(), BTreeSet::from([dependency]))]);
        let found = judge(&crates);
        assert_eq!(found.len(), findings, "{name} -> {other}: {found:?}");
    }

    fn check(name: &str, other: &str, findings: usize) {
        check_kind(name, other, false, findings);
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

    #[test]
    fn tests_may_depend_on_more_where_it_is_said() {
        check_kind("controller-cli", "controller", true, 0);
        check_kind("node", "controller", true, 1);
    }
}
