//! The two programs' command lines.

pub mod nodectl;
pub mod noded;
