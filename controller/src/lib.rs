//! Rampart's controller: keeps the network, compiles it, and tells each node what concerns it.
//!
//! ```text
//! grpc::admin ┐                                              ┌► follow, one task a node ─► grpc::sync
//! grpc::enrol ┼► change: request ─► draft ─► store ─► state ─┤
//! grpc::sync  ┘                    (pure)   (disk)  (memory) └► answers
//! ```
//!
//! Layers, each of which knows only those before it: `store`, `state`, `change`, `follow`, `socket`, `access`, `grpc`, and
//! the program's own: `init`, `serve`.
//!
//! The program is `controllerd` ([`init`], [`serve`]).

pub mod access;
pub mod change;
pub mod clock;
pub mod config;
#[cfg(test)]
mod fixture;
pub mod follow;
pub mod grpc;
pub mod init;
pub mod metrics;
pub mod serve;
pub mod socket;
pub mod state;
pub mod store;

/// Of this build.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
