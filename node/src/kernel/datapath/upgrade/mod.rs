//! What another version left, and what this one leaves for the next.

pub(crate) mod description;
pub(crate) mod predecessor;
