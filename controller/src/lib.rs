//! Rampart's controller: keeps the network, compiles it, and tells each node what concerns it.
//!
//! ```text
//! grpc::admin ┐                                     ┌► publish, one task a node ─► grpc::sync
//! grpc::enrol ┼► writer: intent ─► store ─► state ──┤
//! grpc::sync  ┘          (pure)   (disk)  (memory)  └► answers
//! ```
//!
//! The program is `controllerd` ([`init`], [`serve`]).

pub mod audit;
pub mod authority;
pub mod clock;
pub mod config;
pub mod enrol;
#[cfg(test)]
mod fixture;
pub mod grpc;
pub mod init;
pub mod intent;
pub mod metrics;
pub mod publish;
pub mod record;
pub mod serve;
pub mod state;
pub mod store;
pub mod writer;

/// Of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
