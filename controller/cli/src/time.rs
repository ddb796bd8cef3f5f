//! Times and spans as people write and read them.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long something lasts: `90s`, `15m`, `1h`, `7d`, `2w`, or several of them, largest first: `1d12h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lifetime(pub(crate) Duration);

/// A text that is no span.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{value}` is not a span of time: {reason}; write numbers with `s`, `m`, `h`, `d` or `w`, as `90s`, `1h` or `7d`"
)]
pub(crate) struct LifetimeError {
    value: String,
    reason: &'static str,
}

const UNITS: [(char, u64); 5] = [('w', 604_800), ('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];

/// An invitation lasts no longer; refused here, before anything is added for it.
const LONGEST: u64 = controller_api::invitation::INVITATION_MAX;

impl FromStr for Lifetime {
    type Err = LifetimeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |reason| LifetimeError { value: text.to_owned(), reason };
        if text.is_empty() {
            return Err(error("it is empty"));
        }
        let (mut seconds, mut last, mut rest) = (0u64, u64::MAX, text);
        while !rest.is_empty() {
            let digits =
                rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(|| error("its last number has no unit"))?;
            let number: u64 = rest[..digits].parse().map_err(|_| error("a unit has no number"))?;
            let unit = rest[digits..].chars().next().unwrap_or_default();
            let (_, size) =
                UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(|| error("it has an unknown unit"))?;
            if size >= last {
                return Err(error("its units are not in order, the largest first"));
            }
            last = size;
            seconds = number
                .checked_mul(size)
                .and_then(|part| seconds.checked_add(part))
                .filter(|seconds| *seconds <= LONGEST)
                .ok_or_else(|| error("it is longer than 30 days"))?;
            rest = &rest[digits + unit.len_utf8()..];
        }
        if seconds == 0 {
            return Err(error("it is over at once"));
        }
        Ok(Self(Duration::from_secs(seconds)))
    }
}

impl fmt::Display for Lifetime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_secs();
        for (unit, size) in UNITS {
            if rest >= size {
                write!(f, "{}{unit}", rest / size)?;
                rest %= size;
            }
        }
        Ok(())
    }
}

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// `2026-01-31T12:00:00Z`, from seconds since the epoch.
pub(crate) fn timestamp(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
        .map_or_else(|| seconds.to_string(), |time| time.to_string())
}

/// As [`timestamp`]; 0 is never.
pub(crate) fn timestamp_or_none(seconds: u64) -> Option<String> {
    (seconds != 0).then(|| timestamp(seconds))
}

/// How long ago, in the largest unit: `5m ago`.
pub(crate) fn ago(now: u64, then: u64) -> String {
    let seconds = now.saturating_sub(then);
    let (unit, size) = UNITS.into_iter().find(|(_, size)| seconds >= *size).unwrap_or(('s', 1));
    match seconds {
        0 => "now".to_owned(),
        _ => format!("{}{unit} ago", seconds / size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_parse_as_they_print() {
        for (text, seconds) in
            [("90s", 90), ("1h", 3_600), ("7d", 604_800), ("2w", 1_209_600), ("1d12h", 129_600), ("30m", 1_800)]
        {
            let span: Lifetime = text.parse().expect(text);
            assert_eq!(span.0.as_secs(), seconds);
            assert_eq!(span.to_string().parse(), Ok(span));
        }
        assert_eq!(Lifetime(Duration::from_secs(90)).to_string(), "1m30s");
    }

    #[test]
    fn what_is_no_span_says_why() {
        for (text, reason) in [
            ("", "empty"),
            ("5", "no unit"),
            ("h", "no number"),
            ("1x", "unknown unit"),
            ("1h1d", "in order"),
            ("1h1h", "in order"),
            ("0s", "at once"),
            ("4w999999999999999999999s", "no number"),
            ("99999999d", "30 days"),
            ("-1h", "no number"),
            ("1 h", "unknown unit"),
            ("1µ", "unknown unit"),
        ] {
            let error = text.parse::<Lifetime>().expect_err(text).to_string();
            assert!(error.contains(reason) && error.contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn times_are_printed_for_their_readers() {
        assert_eq!(timestamp(1_800_000_000), "2027-01-15T08:00:00Z");
        assert_eq!(timestamp_or_none(0), None);
        for (seconds, text) in [(0, "now"), (59, "59s ago"), (60, "1m ago"), (7_300, "2h ago"), (200_000, "2d ago")] {
            assert_eq!(ago(1_000_000, 1_000_000 - seconds), text);
        }
        assert_eq!(ago(5, 9), "now");
    }
}
