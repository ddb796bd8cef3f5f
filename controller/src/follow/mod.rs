//! What nodes are told.
//!
//! ```text
//! state ─► dispatcher, one thread ─► a queue for each stream ─► grpc::sync
//!            ▲ who is affected (policy)      ▲ parts, encoded once for all who get them (message)
//! ```
//!
//! A node that says which revision and digest it holds gets a delta to the newest policy, also from a controller that has
//! only just started; a stranger, and one that was away for longer than the history goes back, gets everything.

pub mod dispatcher;
mod message;
pub mod report;
#[cfg(test)]
mod tests;
