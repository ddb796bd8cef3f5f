//! Compiles the protocol of the daemon's local socket, without `protoc`.

const ROOT: &str = "proto";
const FILE: &str = "rampart/node/v1/local.proto";

pub(crate) fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed={ROOT}");
    let descriptors = protox::compile([FILE], [ROOT]).map_err(|error| format!("`{ROOT}/{FILE}`: {error}"))?;
    // Maps in the order of their keys: answers are printed.
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_fds(descriptors)
        .map_err(|error| format!("failed to write the code of `{ROOT}/{FILE}`: {error}"))
}
