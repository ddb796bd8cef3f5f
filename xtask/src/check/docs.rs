//! Documents: their links lead somewhere, the files and the verbs of xtask that they name are there. (The commands of the
//! README's quick start are run by the test `readme` of crate `tests`.)

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;

const COMMAND: &str = "cargo xtask ";
/// What the path of a file begins with.
const FOLDERS: [&str; 7] = ["controller/", "docs/", "ebpf/", "node/", "policy/", "tests/", "xtask/"];

pub(super) fn findings(root: &Path, xtask: &Command) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    for path in documents(root)? {
        let document = path.strip_prefix(root).unwrap_or(&path);
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
        let folder = path.parent().unwrap_or(root);
        for link in links(&text).filter(|link| !folder.join(link).exists()) {
            findings.push(format!("`{}` links to `{link}`, which is not there", document.display()));
        }
        for named in files(&text).filter(|file| !root.join(file).exists()) {
            findings.push(format!("`{}` names `{named}`, which is not there", document.display()));
        }
        for command in commands(&text) {
            let words = ["xtask"].into_iter().chain(command.split_whitespace());
            if let Err(error) = xtask.clone().try_get_matches_from(words)
                && error.use_stderr()
            {
                let reason = error.to_string();
                let reason = reason.lines().next().unwrap_or_default();
                findings.push(format!("`{}` says `{COMMAND}{command}`: {reason}", document.display()));
            }
        }
    }
    Ok(findings)
}

/// Every document of the repository, whether git knows it yet or not.
fn documents(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut documents = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("failed to read `{}`", folder.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("failed to read `{}`", folder.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            documents.extend(self::documents(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            documents.push(path);
        }
    }
    documents.sort();
    Ok(documents)
}

/// The files that a document links to, without the headings in them.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')'))
        .map(|(link, _)| link.split('#').next().unwrap_or_default())
        .filter(|link| !link.is_empty() && !link.contains("://") && !link.starts_with("mailto:"))
}

/// The files and folders that are named in a line, as seen from the root.
fn files(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2)).filter(|word| {
        let is_path = |c: char| c.is_ascii_alphanumeric() || "/_-.".contains(c);
        FOLDERS.iter().any(|folder| word.starts_with(folder)) && word.chars().all(is_path)
    })
}

/// What follows `cargo xtask` where it stands at the start of a line of code.
fn commands(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter_map(|line| line.trim_start().trim_start_matches("$ ").strip_prefix(COMMAND))
        .map(|command| command.split(" #").next().unwrap_or_default().trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_from_other_words() {
        let text = "`node/src/lib.rs`, `a/node/b`, `ebpf/`, `tests/*.rs`, policy/src and `cargo xtask`.\n";
        assert_eq!(files(text).collect::<Vec<_>>(), ["node/src/lib.rs", "ebpf/"]);
    }

    #[test]
    fn links_and_commands_are_found() {
        let text =
            "See [a](docs/A.md#top), [b](https://b.example) and [c](#here).\n\n    cargo xtask demo --keep  # shows\n";
        assert_eq!(links(text).collect::<Vec<_>>(), ["docs/A.md"]);
        assert_eq!(commands(text).collect::<Vec<_>>(), ["demo --keep"]);
    }
}
