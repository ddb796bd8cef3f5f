//! `cargo xtask VERB`: everything a checkout needs, from the tool chain to the tests. One module per verb. It depends
//! on no other crate of the workspace, because set-up runs before what those need is there.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};

mod bench;
mod check;
mod checkout;
mod demo;
mod process;
mod progress;
mod setup;
mod test;
mod vm;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Build, test and show Rampart", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Setup(setup::Args),
    Demo(demo::Args),
    Test(test::Args),
    Vm(vm::Args),
    Bench(bench::Args),
    Check(check::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = process::watch_signals().and_then(|()| dispatch(cli.verb));
    let interrupted = process::interrupted();
    if interrupted.is_some() {
        process::kill_orphans();
    }
    match (result, interrupted) {
        (Ok(code), _) => code,
        (Err(error), interrupted) => {
            eprintln!("error: {error:#}");
            interrupted.map_or(ExitCode::FAILURE, |signal| ExitCode::from(process::Ended::Interrupted(signal).code()))
        }
    }
}

fn dispatch(verb: Verb) -> Result<ExitCode> {
    let root = checkout::root();
    std::env::set_current_dir(root).with_context(|| format!("failed to enter `{}`", root.display()))?;
    match verb {
        Verb::Setup(args) => setup::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::Test(args) => test::run(&args, &Cli::command()),
        Verb::Vm(args) => vm::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Check(args) => check::run(&args, &Cli::command()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
