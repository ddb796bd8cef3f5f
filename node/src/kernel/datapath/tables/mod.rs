//! The two copies of the tables, and the maps that hold them.

pub(crate) mod copies;
pub(crate) mod map;
pub(crate) mod mapping;
