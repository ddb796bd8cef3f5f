//! Log lines that strangers can cause: so many in a while, and the next one says how many were left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in one [`WINDOW`]: enough to see what happens.
const LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(60);

/// Lines of one kind.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    since: Option<Instant>,
    written: u32,
    suppressed: u64,
}

impl Throttle {
    /// Whether to write a line, and how many were suppressed before it.
    pub fn pass(&self, now: Instant) -> Option<u64> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            lines.since = Some(now);
            lines.written = 0;
        }
        if lines.written == LINES {
            lines.suppressed += 1;
            return None;
        }
        lines.written += 1;
        Some(std::mem::take(&mut lines.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_number() {
        let (throttle, start) = (Throttle::default(), Instant::now());
        let passed = (0..100).filter_map(|_| throttle.pass(start)).collect::<Vec<_>>();
        assert_eq!(passed, [0; 10]);
        assert_eq!(throttle.pass(start + WINDOW), Some(90));
        assert_eq!(throttle.pass(start + WINDOW), Some(0));
    }
}
