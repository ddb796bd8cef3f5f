//! Records of connection tracking and of fragments, and the quota of each sender.

pub(crate) mod filter;
pub(crate) mod flows;
pub(crate) mod fragments;
pub(crate) mod quota;
