//! `meshctl history`

use clap::Args;
use controller_api::time::timestamp;
use controller_api::v1;
use serde::Serialize;

use crate::connection::Range;
use crate::output::{self, OutputArgs, Row};
use crate::{Failure, Session};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  meshctl history
  meshctl history --limit 20 -o json
  meshctl history --before 120   # the next page
  meshctl policy show --at 120   # what the policy was then")]
pub(crate) struct Arguments {
    #[command(flatten)]
    range: Range,
    #[command(flatten)]
    output: OutputArgs,
}

impl Arguments {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        output::list(&rows(session.history(self.range).await?), self.output.format)
    }
}

/// One change of one revision of the policy.
#[derive(Debug, Serialize)]
struct HistoryRow {
    revision: u64,
    time: String,
    actor: String,
    change: String,
}

/// Newest first; the changes of one revision in their order.
fn rows(revisions: Vec<v1::PastRevision>) -> Vec<HistoryRow> {
    let rows = |past: v1::PastRevision| {
        let v1::PastRevision { revision, time, mut changes } = past;
        if changes.is_empty() {
            changes.push(v1::PastChange::default());
        }
        changes.into_iter().map(move |v1::PastChange { actor, change }| HistoryRow {
            revision,
            time: timestamp(time),
            actor,
            change,
        })
    };
    revisions.into_iter().flat_map(rows).collect()
}

impl Row for HistoryRow {
    const HEADINGS: &'static [&'static str] = &["REVISION", "TIME", "ACTOR", "CHANGE"];

    fn cells(&self) -> Vec<String> {
        vec![self.revision.to_string(), self.time.clone(), self.actor.clone(), self.change.clone()]
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;

    #[test]
    fn each_change_of_a_revision_has_a_row() {
        let change = |actor: &str, change: &str| v1::PastChange { actor: actor.to_owned(), change: change.to_owned() };
        let two = vec![change("admin:alice", "cidr add web 10.42.1.0/24"), change("admin:alice", "rule delete old")];
        let revisions = vec![
            v1::PastRevision { revision: 7, time: 1_800_000_000, changes: two },
            v1::PastRevision { revision: 3, time: 1_800_000_000, changes: Vec::new() },
        ];
        let rows = rows(revisions);
        assert_snapshot!(output::table(HistoryRow::HEADINGS, rows.iter().map(Row::cells)), @r"
        REVISION  TIME                  ACTOR        CHANGE
        7         2027-01-15T08:00:00Z  admin:alice  cidr add web 10.42.1.0/24
        7         2027-01-15T08:00:00Z  admin:alice  rule delete old
        3         2027-01-15T08:00:00Z  -            -
        ");
        assert_snapshot!("history-json", output::json(&rows));
    }
}
