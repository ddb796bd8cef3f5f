//! The two programs' command lines.

use std::io::IsTerminal;
use std::process::ExitCode;

pub mod nodectl;
pub mod noded;
mod table;

/// Exit codes, the same in all of Rampart's programs (2, usage, is clap's).
const FAILED: u8 = 1;
const DIFFERS: u8 = 3;
const DENIED: u8 = 4;
const UNREACHABLE: u8 = 5;

/// Prints an error with its causes, once.
fn fail(program: &str, error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("{program}: {error:#}");
    ExitCode::from(code)
}

/// Whether to colour what goes to stdout. Tests read it, whatever they run on.
fn colour() -> bool {
    !cfg!(test) && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && std::io::stdout().is_terminal()
}
