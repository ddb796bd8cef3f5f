//! One table of one run, as text, as JSON and for the README.

use std::fmt::Write as _;
use std::fs;

use serde_json::{Value, json};

use super::statistics::Estimate;

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    fn is_met(self, value: Option<f64>) -> bool {
        value.is_some_and(|value| match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        })
    }

    fn number(self) -> f64 {
        match self {
            Self::AtMost(number) | Self::AtLeast(number) => number,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(number) => format!("<= {}", figure(number)),
            Self::AtLeast(number) => format!(">= {}", figure(number)),
        }
    }
}

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub name: String,
    /// `None`: it could not be had on this machine, or with these tables; the note says why. Never meets a target.
    pub value: Option<f64>,
    pub unit: &'static str,
    pub target: Option<Target>,
    /// Figures of the same measurement, by what they are: its minimum, the ends of its interval.
    pub also: Vec<(&'static str, f64)>,
    pub note: String,
}

impl Row {
    pub fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value: Some(value), unit, target: None, also: Vec::new(), note: String::new() }
    }

    /// A missing figure, and why it is missing.
    pub fn missing(name: impl Into<String>, why: impl Into<String>, unit: &'static str) -> Self {
        Self { value: None, note: why.into(), ..Self::new(name, f64::NAN, unit) }
    }

    /// With its interval.
    pub fn estimate(name: impl Into<String>, estimate: Estimate, unit: &'static str) -> Self {
        Self::new(name, estimate.middle, unit).also("95 % low", estimate.low).also("95 % high", estimate.high)
    }

    pub fn also(mut self, what: &'static str, value: f64) -> Self {
        self.also.push((what, value));
        self
    }

    pub fn target(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    pub fn at_most(self, most: Option<f64>) -> Self {
        Self { target: most.map(Target::AtMost).or(self.target), ..self }
    }

    fn is_met(&self) -> Option<bool> {
        self.target.map(|target| target.is_met(self.value))
    }

    fn verdict(&self) -> &'static str {
        match self.is_met() {
            None => "",
            Some(true) => "met",
            Some(false) => "MISSED",
        }
    }

    fn value_text(&self) -> String {
        self.value.map_or_else(|| "-".to_owned(), figure)
    }

    fn also_text(&self) -> String {
        match self.also[..] {
            [("95 % low", low), ("95 % high", high)] => format!("[{}, {}]", figure(low), figure(high)),
            [] => self.note.clone(),
            _ => self
                .also
                .iter()
                .map(|(what, value)| format!("{what} {}", figure(*value)))
                .collect::<Vec<_>>()
                .join(", "),
        }
    }
}

/// All rows of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The machine, when, and how it was built.
    pub heading: Vec<String>,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new(what: &str) -> Self {
        Self { heading: heading(what), rows: Vec::new() }
    }

    /// Adds a row and prints it at once.
    pub fn push(&mut self, row: Row) {
        eprintln!("  {}: {} {} {} {}", row.name, row.value_text(), row.unit, row.also_text(), row.verdict());
        self.rows.push(row);
    }

    /// The table. Below it stands why a figure is missing.
    pub fn to_text(&self) -> String {
        let cells: Vec<[String; 6]> = self
            .rows
            .iter()
            .map(|row| {
                let target = row.target.map(Target::text).unwrap_or_default();
                let others = if row.note.is_empty() { row.also_text() } else { "see below".to_owned() };
                [row.name.clone(), row.value_text(), row.unit.into(), others, target, row.verdict().into()]
            })
            .collect();
        let titles = ["", "median", "unit", "[95 %] or others", "target", ""].map(str::to_owned);
        let width = |column: usize| {
            cells.iter().chain([&titles]).map(|row| row[column].chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..6).map(width).collect();
        let mut text = self.heading.join("\n") + "\n\n";
        for row in [&titles].into_iter().chain(&cells) {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _infallible = match column {
                    1 => write!(line, "{cell:>width$}  "),
                    _ => write!(line, "{cell:<width$}  "),
                };
            }
            text += line.trim_end();
            text.push('\n');
        }
        for row in self.rows.iter().filter(|row| !row.note.is_empty()) {
            let _infallible = writeln!(text, "\n{}: {}", row.name, row.note);
        }
        let missed = self.rows.iter().filter(|row| row.is_met() == Some(false)).count();
        let targets = self.rows.iter().filter(|row| row.target.is_some()).count();
        let _infallible = writeln!(text, "\n{} of {targets} targets met, {missed} missed", targets - missed);
        text
    }

    /// The rows that have a target, as a table in Markdown.
    pub fn to_markdown(&self) -> String {
        let mut text = format!(
            "{}\n\n| | measured | 95 % | target | |\n| --- | --- | --- | --- | --- |\n",
            self.heading.join("; ")
        );
        for row in self.rows.iter().filter(|row| row.target.is_some()) {
            let target = row.target.map(Target::text).unwrap_or_default();
            let _infallible = writeln!(
                text,
                "| {} | {} {} | {} | {target} | {} |",
                row.name,
                row.value_text(),
                row.unit,
                row.also_text(),
                row.verdict()
            );
        }
        text
    }

    /// An array of objects: `name`, `value`, `unit`, `target` and `met`, null where there is none.
    pub fn to_json(&self) -> Value {
        let objects = self.rows.iter().flat_map(|row| {
            let main = json!({
                "name": row.name, "value": row.value, "unit": row.unit,
                "target": row.target.map(Target::number), "met": row.is_met(),
            });
            let others = row.also.iter().map(|(what, value)| {
                json!({
                    "name": format!("{}, {what}", row.name), "value": value, "unit": row.unit,
                    "target": Value::Null, "met": Value::Null,
                })
            });
            [main].into_iter().chain(others).collect::<Vec<_>>()
        });
        objects.collect()
    }
}

/// Three digits, or all that stand before the point.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value == value.trunc() => grouped(value.round()),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    }
}

fn grouped(whole: f64) -> String {
    let digits = format!("{:.0}", whole.abs());
    let mut text = String::from(if whole < 0.0 { "-" } else { "" });
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn heading(what: &str) -> Vec<String> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("an unknown processor", |(_, model)| model.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    let profile =
        if cfg!(debug_assertions) { "NOT optimised (dev): userspace figures say nothing" } else { "optimised" };
    vec![
        format!("{what}, {}", today()),
        format!("{model}, {cores} processors, Linux {}, load {load} at the start", kernel.unwrap_or_default()),
        format!("userspace built {profile}; the eBPF programs are always built for release"),
    ]
}

/// The day in UTC. By the civil calendar: days since March of year 0 in eras of 400 years.
fn today() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    date(since.as_secs() / 86_400)
}

fn date(days_since_1970: u64) -> String {
    let days = days_since_1970 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(rows: Vec<Row>) -> Report {
        Report { heading: vec!["a bench".to_owned()], rows }
    }

    #[test]
    fn a_missed_target_is_missed_everywhere() {
        let report = report(vec![
            Row::new("lookup", 31.0, "ns").also("minimum", 29.0).target(Target::AtMost(30.0)),
            Row::missing("sparse", "no room", "ns").target(Target::AtMost(30.0)),
            Row::new("ratio", 0.99, "").target(Target::AtLeast(0.99)),
            Row::new("plain", 1234567.0, "packets/s"),
        ]);
        let json = report.to_json();
        let rows = json.as_array().expect("an array");
        let met: Vec<&Value> = rows.iter().map(|row| &row["met"]).collect();
        let null = Value::Null;
        assert_eq!(met, [&json!(false), &null, &json!(false), &json!(true), &null]);
        assert_eq!(rows[1]["name"], "lookup, minimum");
        assert_eq!(rows[0]["target"], 30.0);
        assert!(rows[2]["value"].is_null() && rows[4]["target"].is_null());
        for row in rows {
            let keys: Vec<&String> = row.as_object().expect("an object").keys().collect();
            assert_eq!(keys, ["met", "name", "target", "unit", "value"]);
        }
        let text = report.to_text();
        assert!(text.contains("1 of 3 targets met, 2 missed") && text.contains("1,234,567"), "{text}");
        assert_eq!(report.to_markdown().matches("MISSED").count(), 2);
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let seen = [0, 59, 11_016, 20_783, 47_540].map(date);
        assert_eq!(seen, ["1970-01-01", "1970-03-01", "2000-02-29", "2026-11-26", "2100-02-28"]);
    }
}
