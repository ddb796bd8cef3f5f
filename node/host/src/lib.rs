//! What both daemons need of the machine that they run on.

pub mod clock;
pub mod error;
pub mod file;
