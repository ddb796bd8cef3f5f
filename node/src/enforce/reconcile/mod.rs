//! From what a node should be and what the kernel says it is, to the steps between them.
//!
//! [`plan`] is pure; [`apply`] is the one place that carries steps out.

pub mod apply;
pub mod holders;
pub mod plan;

pub use apply::{Kernel, Outcome, apply};
pub use holders::Holders;
pub use plan::{Desired, Observed, PeerChange, Step, plan, plan_change};
