//! `cargo xtask check`: what must hold of the repository and no compiler looks at.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Command, ValueEnum};

mod arrows;
mod dependencies;
mod docs;

/// Check what no compiler looks at
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: cargo xtask check arrows")]
pub(crate) struct Args {
    /// What to check; everything if nothing is given
    #[arg(value_enum)]
    what: Option<What>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// Which crate, layer and folder may import from which
    Arrows,
    /// Licences, duplicates and sources of what is linked in
    Dependencies,
    /// Links between documents, and commands in them
    Docs,
}

/// `xtask` is the command line that documents speak of.
pub(crate) fn run(args: &Args, xtask: &Command) -> Result<ExitCode> {
    let checks = args.what.map_or_else(|| What::value_variants().to_vec(), |what| vec![what]);
    let mut good = true;
    for what in checks {
        good &= check(what, xtask)?;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Checks one thing and prints what is wrong with it, or that nothing is.
pub(crate) fn check(what: What, xtask: &Command) -> Result<bool> {
    let root = crate::checkout::root();
    let findings = match what {
        What::Arrows => arrows::findings(root)?,
        What::Dependencies => dependencies::findings()?,
        What::Docs => docs::findings(root, xtask)?,
    };
    let name = what.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    for finding in &findings {
        eprintln!("{name}: {finding}");
    }
    if findings.is_empty() {
        println!("{name}: in order");
    }
    Ok(findings.is_empty())
}
