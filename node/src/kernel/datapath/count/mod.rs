//! What the programs count, and the counts inherited from other versions.

pub(crate) mod counters;
pub(crate) mod inherited;
pub(crate) mod pairs;
