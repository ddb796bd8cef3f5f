//! How long what is asked for lasts.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use controller_api::invitation::INVITATION_MAX;
use controller_api::time::{Span, SpanError};

/// How long an invitation lasts: some time, and no longer than any may; refused here, before anything is added for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lifetime(pub(crate) Duration);

impl FromStr for Lifetime {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Span(span) = text.parse()?;
        match span.as_secs() {
            0 => Err(SpanError::new(text, "it is over at once")),
            seconds if seconds > INVITATION_MAX => {
                Err(SpanError::new(text, format!("it is longer than {} days", INVITATION_MAX / 86_400)))
            }
            _ => Ok(Self(span)),
        }
    }
}

impl fmt::Display for Lifetime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Span(self.0).fmt(f)
    }
}

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_ends_and_not_at_once() {
        for (text, seconds) in [("90s", 90), ("1d12h", 129_600), ("30d", 2_592_000)] {
            let lifetime: Lifetime = text.parse().expect(text);
            assert_eq!(lifetime.0.as_secs(), seconds);
            assert_eq!(lifetime.to_string().parse(), Ok(lifetime));
        }
        for (text, reason) in
            [("0s", "at once"), ("99999999d", "99999999"), ("31d", "30 days"), ("-1h", "negative"), ("5", "unit")]
        {
            let error = text.parse::<Lifetime>().expect_err(text).to_string();
            assert!(error.contains(reason) && error.contains(&format!("`{text}`")), "{error}");
        }
    }
}
