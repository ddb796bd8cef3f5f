//! The node's daemon.

fn main() -> std::process::ExitCode {
    node::cli::noded::main()
}
