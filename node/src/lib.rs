//! The agent of one node: it takes its slice of the policy from the controller or from disk, configures WireGuard, and
//! keeps the kernel's tables equal to the slice.
//!
//! From the outside in: [`cli`] and [`control`] speak to people, [`controller`] to the controller; [`agent`] joins them to
//! the [`enforcer`], the one thread that owns the traits of [`kernel`]; [`reconcile`] is pure and says what must be done.

pub mod agent;
pub mod answers;
pub mod cli;
pub mod config;
pub mod control;
pub mod controller;
pub mod disk;
pub mod drops;
pub mod enforcer;
pub mod events;
#[cfg(test)]
mod fixture;
pub mod guard;
pub mod identity;
pub mod join;
pub mod kernel;
pub mod key;
pub mod leave;
pub mod lock;
pub mod lower;
pub mod metrics;
pub mod reconcile;
pub mod report;
pub mod startup;
pub mod state;
pub mod verification;
pub mod verify;
