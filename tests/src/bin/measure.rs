//! What `cargo xtask bench` builds and runs.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tests::bench::{Effort, control, datapath, guard};
use tests::namespace;

/// Measures, and prints one table. Exit status 0 also where a target is missed, 1 where something could not be measured.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
    /// Also write every row to a file, as JSON.
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Small and few: that it works, not how fast.
    #[arg(long, global = true)]
    quick: bool,
    /// Print the rows that have a target as Markdown.
    #[arg(long, global = true)]
    readme: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What a packet costs, and what a policy costs.
    Datapath(datapath::Selection),
    /// A node under a flood of forged handshakes.
    Guard,
    /// What nodes cost their controller, and how soon they hear of a change.
    Control(control::Selection),
    /// Nodes of the bench `control`, which starts this.
    #[command(hide = true)]
    ControlFollowers(control::Process),
}

fn main() -> ExitCode {
    let options = Options::parse();
    namespace::end_all_on_signal(control::clean_up);
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let effort = if options.quick { Effort::Quick } else { Effort::Full };
    let report = match &options.what {
        What::Datapath(selection) => datapath::run(selection, effort)?,
        What::Guard => guard::run(effort)?,
        What::Control(selection) => control::run(selection, effort)?,
        What::ControlFollowers(process) => return control::run_followers(process),
    };
    print!("{}", if options.readme { report.to_markdown() } else { report.to_text() });
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report.to_json())? + "\n";
        fs::write(path, text).with_context(|| format!("failed to write `{}`", path.display()))?;
    }
    Ok(())
}
