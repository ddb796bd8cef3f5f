//! Compiles the protocol without `protoc`, and keeps its descriptors for server reflection.

use std::path::PathBuf;
use std::{env, error, fs};

use prost::Message as _;

const ROOT: &str = "proto";
const FILES: [&str; 4] =
    ["rampart/v1/network.proto", "rampart/v1/admin.proto", "rampart/v1/enrol.proto", "rampart/v1/sync.proto"];

fn main() -> Result<(), Box<dyn error::Error>> {
    println!("cargo::rerun-if-changed={ROOT}");
    let descriptors = protox::compile(FILES, [ROOT])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("rampart_descriptor.bin"), descriptors.encode_to_vec())?;
    // Parts of answers are shared by many streams: a copy of one is a count.
    // A snapshot has thousands of keys and prefixes: these are parts of the message's buffer, not buffers of their own.
    tonic_prost_build::configure()
        .bytes(".rampart.v1.FollowResponse")
        .bytes(".rampart.v1.Peer")
        .bytes(".rampart.v1.Prefix")
        .codec_path("crate::codec::SmallCodec")
        .compile_fds(descriptors)?;
    Ok(())
}
