//! Tables, JSON and YAML from one type.

use std::io::{self, Write as _};

use clap::{Args, ValueEnum};
use comfy_table::{Table, presets};
use serde::Serialize;

use crate::Failure;
use controller_api::nearest::nearest;

/// How to print data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
    /// For both
    Yaml,
}

#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// How to print it
    #[arg(short = 'o', long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) format: Format,
}

/// A row of a table, and an object of JSON and YAML.
pub(crate) trait Row: Serialize {
    const HEADINGS: &'static [&'static str];

    /// One text for each heading.
    fn cells(&self) -> Vec<String>;
}

/// Prints rows under their headings.
pub(crate) fn list<R: Row>(rows: &[R], format: Format) -> Result<(), Failure> {
    print(&rows, format, || table(R::HEADINGS, rows.iter().map(Row::cells)))
}

/// Prints one row, a line for each heading.
pub(crate) fn show<R: Row>(row: &R, format: Format) -> Result<(), Failure> {
    print(row, format, || lines(row))
}

/// A line for each heading.
pub(crate) fn lines<R: Row>(row: &R) -> String {
    plain_table(R::HEADINGS.iter().zip(row.cells()).map(|(heading, cell)| vec![heading.to_lowercase(), cell]))
}

/// Prints `value`, which has a form of its own for people.
pub(crate) fn print<T: Serialize>(value: &T, format: Format, text: impl FnOnce() -> String) -> Result<(), Failure> {
    let text = render(value, format, text)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{}", text.trim_end())?;
    out.flush()?;
    Ok(())
}

fn render<T: Serialize>(value: &T, format: Format, text: impl FnOnce() -> String) -> Result<String, Failure> {
    match format {
        Format::Table => Ok(text()),
        Format::Json => serde_json::to_string_pretty(value).map_err(Failure::failed),
        Format::Yaml => serde_yaml_ng::to_string(value).map_err(Failure::failed),
    }
}

/// As `-o json` prints it.
#[cfg(test)]
pub(crate) fn json<T: Serialize>(value: &T) -> String {
    render(value, Format::Json, String::new).expect("JSON")
}

/// Columns without rules, two spaces apart.
pub(crate) fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let headings = headings.iter().map(|&heading| heading.to_owned()).collect();
    plain_table(std::iter::once(headings).chain(rows))
}

fn plain_table(rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for row in rows {
        table.add_row(row.into_iter().map(|cell| if cell.is_empty() { NONE.to_owned() } else { harmless(&cell) }));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// The text without characters that a terminal would obey: what nodes and other admins wrote is shown, not played.
fn harmless(text: &str) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escaped).collect()
}

/// Prints one line that is the whole answer.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()?;
    Ok(())
}

/// There is no object of this name: says so, with the nearest that there is.
pub(crate) fn unknown<'a, N: AsRef<str> + 'a>(kind: &str, name: &N, known: impl IntoIterator<Item = &'a N>) -> Failure {
    let name = name.as_ref();
    let hint = match nearest(name, known.into_iter().map(AsRef::as_ref)) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("`meshctl {kind} list` shows what there is"),
    };
    Failure::failed(format!("there is no {kind} `{name}`; {hint}"))
}

/// What stands where there is nothing to show.
pub(crate) const NONE: &str = "-";

/// Joins names with spaces.
pub(crate) fn words(items: impl IntoIterator<Item = impl ToString>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

/// The names of those flags that are set.
pub(crate) fn flags(flags: &[(&str, bool)]) -> String {
    words(flags.iter().filter(|(_, set)| *set).map(|(name, _)| name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Sample {
        name: String,
        note: Option<u32>,
    }

    impl Row for Sample {
        const HEADINGS: &'static [&'static str] = &["NAME", "NOTE"];

        fn cells(&self) -> Vec<String> {
            vec![self.name.clone(), self.note.map(|note| note.to_string()).unwrap_or_default()]
        }
    }

    #[test]
    fn one_type_serves_every_format() {
        let rows = [Sample { name: "a".to_owned(), note: Some(1) }, Sample { name: "longer".to_owned(), note: None }];
        let text = table(Sample::HEADINGS, rows.iter().map(Row::cells));
        assert_eq!(text, "NAME    NOTE\na       1\nlonger  -");
        let json = render(&rows, Format::Json, String::new).expect("JSON");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).expect("JSON")[1]["note"], serde_json::Value::Null);
        assert_eq!(
            render(&rows, Format::Yaml, String::new).expect("YAML"),
            "- name: a\n  note: 1\n- name: longer\n  note: null\n"
        );
    }

    #[test]
    fn a_cell_moves_no_cursor_and_makes_no_row() {
        assert_eq!(table(&["A"], [vec!["\u{1b}[2J\nfake é".to_owned()]]), "A\n\\u{1b}[2J\\nfake é");
    }

    #[test]
    fn a_table_without_rows_has_its_headings() {
        assert_eq!(table(&["A", "B"], []), "A  B");
    }
}
