//! Real nodes on one machine: namespaces joined by a routed underlay, the daemons in them, and traffic between them.
//!
//! The demo (`cargo xtask demo`), the namespace tests and the VM tests are made of these.

pub mod bench;
pub mod conformance;
pub mod flood;
pub mod forge;
pub mod mesh;
pub mod metrics;
pub mod namespace;
pub mod probe;
pub mod scenario;
pub mod underlay;
