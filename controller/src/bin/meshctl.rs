//! `meshctl`, the admin's tool.

use std::process::ExitCode;

fn main() -> ExitCode {
    controller::cli::main()
}
