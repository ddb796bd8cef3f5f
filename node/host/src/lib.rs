//! What both daemons need of the machine that they run on.

pub mod clock;
pub mod error;
pub mod file;
pub mod limit;
pub mod lock;
pub mod scrape;
pub mod socket;
