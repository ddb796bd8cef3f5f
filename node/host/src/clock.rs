//! The wall clock, for the shells; what decides gets the time as an argument.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since the epoch.
pub fn now() -> u64 {
    seconds(SystemTime::now()).unwrap_or(0)
}

/// Seconds since the epoch; `None`: the time is before it.
pub fn seconds(time: SystemTime) -> Option<u64> {
    time.duration_since(UNIX_EPOCH).ok().map(|elapsed| elapsed.as_secs())
}
