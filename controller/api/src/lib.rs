//! What the controller, its nodes and its admins say to each other, and how they know each other.
//!
//! - [`v1`]: the wire, generated from `proto/`; [`convert`]: between the wire and `policy`'s types, where everything that
//!   arrives is checked.
//! - [`tls`], [`identity`]: certificates of the network's own authority, and whom they name.
//! - [`invitation`]: the one line that lets a machine or an admin in; [`refusal`]: what keeps a node out.
//! - [`client`], [`endpoint`]: how to reach a controller; `codec`: the buffers of a call.
//! - [`command`]: a change in an admin's words; [`nearest`]: the word that was meant.
//! - [`time`]: spans, ages and times as people write and read them.
//! - [`defaults`]: every number and path that both sides take for granted.

/// Generated from `proto/rampart/v1`.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    missing_debug_implementations,
    rust_2018_idioms,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("rampart.v1");
}

pub mod client;
mod codec;
pub mod command;
pub mod convert;
pub mod defaults;
pub mod endpoint;
pub mod identity;
pub mod invitation;
pub mod nearest;
pub mod refusal;
pub mod time;
pub mod tls;

pub use convert::ConvertError;

/// The descriptors of [`v1`], for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("rampart_descriptor");
