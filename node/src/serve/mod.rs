//! The daemon, and whom it serves: `nodectl` on a local socket, scrapes, and those who read events.

pub mod agent;
pub mod drops;
pub mod events;
pub mod local;
pub mod lock;
pub mod scrape;
pub mod startup;
