//! Compiles the protocol of the local socket, and builds the eBPF programs.

#[path = "build/ebpf.rs"]
mod ebpf;
#[path = "build/protocol.rs"]
mod protocol;

fn main() {
    // Cargo says it in one line and fails; a status other than 0 would add a page of its own.
    if let Err(message) = protocol::build().and_then(|()| ebpf::build()) {
        println!("cargo::error={message}");
    }
}
