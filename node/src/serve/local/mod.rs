//! The daemon's Unix socket, on which `nodectl` asks: gRPC, in a protocol of this crate's own.
//!
//! - [`server`]: who may ask, how many at a time, for how long; [`client`]: one question, or a stream of records.
//! - `convert`: between the wire and what is shown.

use std::time::Duration;

pub mod client;
mod convert;
pub mod server;
#[cfg(test)]
mod tests;

/// Generated from `proto/rampart/node/v1`.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    missing_debug_implementations,
    rust_2018_idioms,
    reason = "generated code"
)]
mod v1 {
    tonic::include_proto!("rampart.node.v1");
}

/// How long a question may take, answer included: the client's deadline, and the daemon's own.
pub const PATIENCE: Duration = Duration::from_secs(30);
