//! Times and spans of time as people write and read them: the same in files, on command lines and in tables.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::fmt::friendly::{Direction, Spacing, SpanPrinter};
use jiff::{SpanRelativeTo, SpanRound, Timestamp, Unit};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};

/// A span of time, in whole seconds: `90s`, `15m`, `1h`, `7d`, `2w`, or several of them, largest first: `1d12h`. A day has 24
/// hours. In files a number is one of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A text that is not a span of time, or not one that is taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{value}` is not a span of time that can be used: {reason}; write it like `90s`, `1h` or `7d`")]
pub struct SpanError {
    value: String,
    reason: String,
}

impl SpanError {
    pub fn new(value: impl ToString, reason: impl ToString) -> Self {
        Self { value: value.to_string(), reason: reason.to_string() }
    }
}

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let wrong = |error: jiff::Error| {
            // It names its own format first, which the remedy shows better.
            let reason = error.to_string();
            SpanError::new(text, reason.rsplit("duration format: ").next().unwrap_or(&reason))
        };
        let span: jiff::Span = text.parse().map_err(wrong)?;
        let span = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(wrong)?;
        let span = Duration::try_from(span).map_err(|_| SpanError::new(text, "it is negative"))?;
        match span.subsec_nanos() {
            0 => Ok(Self(span)),
            _ => Err(SpanError::new(text, "it is not a whole number of seconds")),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let round = SpanRound::new().largest(Unit::Week).days_are_24_hours();
        let seconds = i64::try_from(self.0.as_secs()).ok();
        let span = seconds.and_then(|seconds| jiff::Span::new().try_seconds(seconds).ok()?.round(round).ok());
        match span {
            Some(span) => f.write_str(&PRINTER.span_to_string(&span)),
            None => write!(f, "{}s", self.0.as_secs()),
        }
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Span;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a span of time like `90s`, `1h` or `7d`, or a number of seconds")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Span, E> {
                Ok(Span(Duration::from_secs(seconds)))
            }

            fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Span, E> {
                let span = u64::try_from(seconds).map(Duration::from_secs).map(Span);
                span.map_err(|_| E::custom(SpanError::new(seconds, "it is negative")))
            }
        }

        deserializer.deserialize_any(Text)
    }
}

const PRINTER: SpanPrinter = SpanPrinter::new().spacing(Spacing::None).direction(Direction::Sign);
const AGO: SpanPrinter = SpanPrinter::new().direction(Direction::Suffix);

/// In the largest unit of which there are two: `119s`, `2m`.
pub fn short(seconds: u64) -> String {
    PRINTER.span_to_string(&in_largest_unit(seconds))
}

/// How long ago, as [`short`]: `2m ago`. Both in seconds since the epoch; what is to come is now.
pub fn ago(now: u64, then: u64) -> String {
    match now.saturating_sub(then) {
        0 => "now".to_owned(),
        seconds => AGO.span_to_string(&in_largest_unit(seconds).negate()),
    }
}

fn in_largest_unit(seconds: u64) -> jiff::Span {
    let at_least_two = |size: u64| seconds >= 2 * size;
    // As many as a span can have: nobody reads further.
    let number = |size: u64| i64::try_from(seconds / size).unwrap_or(i64::MAX);
    let span = match () {
        () if at_least_two(604_800) => jiff::Span::new().try_weeks(number(604_800)),
        () if at_least_two(86_400) => jiff::Span::new().try_days(number(86_400)),
        () if at_least_two(3_600) => jiff::Span::new().try_hours(number(3_600)),
        () if at_least_two(60) => jiff::Span::new().try_minutes(number(60)),
        () => jiff::Span::new().try_seconds(number(1)),
    };
    span.unwrap_or_default()
}

/// `2026-01-31T12:00:00Z`, from seconds since the epoch.
pub fn timestamp(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    time.map_or_else(|| seconds.to_string(), |time| time.to_string())
}

/// As [`timestamp`]; 0 is never.
pub fn timestamp_or_none(seconds: u64) -> Option<String> {
    (seconds != 0).then(|| timestamp(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(text: &str) -> Result<Span, SpanError> {
        text.parse()
    }

    #[test]
    fn spans_parse_as_they_print() {
        for (text, seconds) in [
            ("90s", 90),
            ("1h", 3_600),
            ("7d", 604_800),
            ("2w", 1_209_600),
            ("1d12h", 129_600),
            ("30m", 1_800),
            ("0s", 0),
            ("2 hours", 7_200),
        ] {
            let parsed = span(text).expect(text);
            assert_eq!(parsed.0.as_secs(), seconds);
            assert_eq!(parsed.to_string().parse(), Ok(parsed));
        }
        let printed = |seconds| Span(Duration::from_secs(seconds)).to_string();
        assert_eq!([90, 129_600, 0].map(printed), ["1m30s", "1d12h", "0s"]);
        assert_eq!(printed(u64::MAX), format!("{}s", u64::MAX));
    }

    #[test]
    fn what_is_not_a_span_says_why() {
        for (text, reason) in [
            ("", "empty"),
            ("5", "unit"),
            ("h", "integer"),
            ("1x", "unit"),
            ("1h1d", "hour"),
            ("1h1h", "hour"),
            ("4w999999999999999999999s", "999999999999999999999"),
            ("1µ", "unit"),
            ("soon", "soon"),
            ("1y", "year"),
            ("-1h", "negative"),
            ("1.5s", "whole number"),
        ] {
            let error = span(text).expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(error.contains(&format!("`{text}`")) && error.contains("`1h`"), "{error}");
        }
    }

    #[test]
    fn in_a_file_a_number_is_one_of_seconds() {
        let read = |json: &str| serde_json::from_str::<Span>(json).map_err(|error| error.to_string());
        assert_eq!(read("90"), Ok(Span(Duration::from_secs(90))));
        assert_eq!(read("\"2m\""), Ok(Span(Duration::from_secs(120))));
        for (json, part) in [("-1", "`-1`"), ("1.5", "number of seconds"), ("\"soon\"", "`soon`"), ("true", "boolean")]
        {
            let error = read(json).expect_err(json);
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn ages_are_short() {
        for (seconds, text) in [
            (1, "1s"),
            (59, "59s"),
            (61, "61s"),
            (119, "119s"),
            (120, "2m"),
            (7_300, "2h"),
            (172_800, "2d"),
            (1_209_600, "2w"),
        ] {
            assert_eq!(short(seconds), text);
            assert_eq!(ago(2_000_000, 2_000_000 - seconds), format!("{text} ago"));
        }
        assert_eq!((short(0), ago(5, 5), ago(5, 9)), ("0s".to_owned(), "now".to_owned(), "now".to_owned()));
        assert!(short(u64::MAX).ends_with('w') || short(u64::MAX) == "0s");
    }

    #[test]
    fn times_are_printed_for_their_readers() {
        assert_eq!(timestamp(1_800_000_000), "2027-01-15T08:00:00Z");
        assert_eq!(timestamp_or_none(0), None);
        assert_eq!(timestamp(u64::MAX), u64::MAX.to_string());
    }
}
