//! The node's end of its stream from the controller, and what it keeps on disk of what came.

mod compaction;
mod entry;
pub mod follow;
pub mod identity;
pub mod join;
pub mod journal;
pub mod leave;
mod renewal;
pub mod state;
mod version1;
