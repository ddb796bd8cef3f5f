//! The agent of one node: it takes its slice of the policy from the controller or from disk, configures WireGuard, and
//! keeps the kernel's tables equal to the slice.
//!
//! From the outside in: [`cli`] and [`serve`] speak to people, [`uplink`] to the controller; [`enforce`] is the one thread
//! that owns the traits of [`kernel`]. [`lower`] makes tables of a slice, [`verify`] compares the two, and [`view`] is what
//! is shown.

pub mod cli;
pub mod config;
mod difference;
pub mod enforce;
#[cfg(test)]
mod fixture;
pub mod kernel;
pub mod key;
pub mod lower;
pub mod serve;
pub mod uplink;
pub mod verify;
pub mod view;
