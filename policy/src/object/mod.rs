//! The objects of a policy, each by itself: what the operator writes, parsed.

pub(crate) mod cidr;
pub(crate) mod digest;
pub(crate) mod group;
pub(crate) mod id;
pub(crate) mod key;
pub(crate) mod node;
pub(crate) mod prefix;
pub(crate) mod rule;
pub(crate) mod selector;
pub(crate) mod service;
pub(crate) mod verdict;
