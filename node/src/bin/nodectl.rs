//! What root asks the node's daemon.

fn main() -> std::process::ExitCode {
    node::cli::nodectl::main()
}
