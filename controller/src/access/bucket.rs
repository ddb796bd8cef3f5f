//! How often something may be done: so often at once, and so often a second after that.

use std::time::{Duration, Instant};

/// How fast a [`Bucket`] fills, and how much it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub per_second: u32,
    pub burst: u32,
}

/// A token bucket as one time (the generic cell rate algorithm): when it will be full. The default is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket(Option<Instant>);

impl Bucket {
    /// Takes one token; else says when there is one.
    pub fn take(&mut self, rate: Rate, now: Instant) -> Result<(), Duration> {
        let token = Duration::from_secs(1) / rate.per_second;
        let full_at = self.0.map_or(now, |full_at| full_at.max(now)) + token;
        match full_at.saturating_duration_since(now + token * rate.burst) {
            Duration::ZERO => {
                self.0 = Some(full_at);
                Ok(())
            }
            wait => Err(wait),
        }
    }

    pub fn is_full(&self, now: Instant) -> bool {
        self.0.is_none_or(|full_at| full_at <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let (rate, start) = (Rate { per_second: 10, burst: 3 }, Instant::now());
        let mut bucket = Bucket::default();
        let ms = |ms| start + Duration::from_millis(ms);
        for _ in 0..3 {
            assert_eq!(bucket.take(rate, start), Ok(()));
        }
        assert_eq!(bucket.take(rate, start), Err(Duration::from_millis(100)));
        assert_eq!(bucket.take(rate, ms(40)), Err(Duration::from_millis(60)), "asking in vain costs nothing");
        assert_eq!(bucket.take(rate, ms(100)), Ok(()));
        assert!(bucket.take(rate, ms(100)).is_err() && !bucket.is_full(ms(399)) && bucket.is_full(ms(400)));
        let after: usize = (0..10).filter(|_| bucket.take(rate, ms(60_000)).is_ok()).count();
        assert_eq!(after, 3, "it holds no more than the burst");
    }
}
