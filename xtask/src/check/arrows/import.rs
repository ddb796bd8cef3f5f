//! One file's import of another.

use std::fmt;
use std::path::PathBuf;

/// A file of a crate.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct File {
    pub(super) path: PathBuf,
    /// The room that it belongs to.
    pub(super) folder: PathBuf,
    /// Its module, from the root of the crate.
    pub(super) module: Vec<String>,
}

impl File {
    /// The module at the root of the crate that it is part of.
    pub(super) fn layer(&self) -> &str {
        self.module.first().map_or("", String::as_str)
    }
}

/// What one file names of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Import {
    pub(super) from: File,
    pub(super) to: File,
    /// Each path, with the first line where it stands.
    pub(super) paths: Vec<(usize, String)>,
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` -> `{}` (", self.from.path.display(), self.to.path.display())?;
        for (index, (line, path)) in self.paths.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{line}: `{path}`")?;
        }
        f.write_str(")")
    }
}
