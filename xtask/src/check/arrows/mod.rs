//! Which crate may depend on which, and inside a crate which layer on which. No two files of different folders import each
//! other.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::output;

mod crates;
mod import;
mod judge;
mod module;
mod source;

use module::Tree;

pub(super) fn findings(root: &Path) -> Result<Vec<String>> {
    let text = output(Command::new("cargo").args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&text).context("failed to read what `cargo metadata` printed")?;
    let mut findings = crates::findings(&metadata)?;
    for (name, target) in targets(&metadata)? {
        let tree = Tree::read(&target, root)?;
        findings.extend(judge::findings(&name, &tree.imports()));
    }
    Ok(findings)
}

/// The name of each crate and the roots of its library and programs. Tests and examples may import as they like.
fn targets(metadata: &Value) -> Result<Vec<(String, PathBuf)>> {
    let packages = metadata["packages"].as_array().context("`cargo metadata` names no packages")?;
    let is_checked = |target: &&Value| {
        let kinds = target["kind"].as_array().map(Vec::as_slice).unwrap_or_default();
        kinds.iter().any(|kind| kind == "lib" || kind == "bin")
    };
    let roots = |package: &Value| {
        let name = package["name"].as_str().unwrap_or_default().to_owned();
        let targets = package["targets"].as_array().cloned().unwrap_or_default();
        let paths: Vec<PathBuf> =
            targets.iter().filter(is_checked).filter_map(|target| Some(target["src_path"].as_str()?.into())).collect();
        paths.into_iter().map(move |path| (name.clone(), path)).collect::<Vec<_>>()
    };
    Ok(packages.iter().flat_map(roots).collect())
}
