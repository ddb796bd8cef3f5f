//! `meshctl audit …`

use clap::Subcommand;
use controller_api::time::timestamp;
use controller_api::v1;
use serde::Serialize;

use crate::connection::Range;
use crate::output::{self, OutputArgs, Row};
use crate::{Failure, Session};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List who changed what, newest first
    #[command(after_help = "Example:\n  meshctl audit list --limit 20")]
    List {
        #[command(flatten)]
        range: Range,
        #[command(flatten)]
        output: OutputArgs,
    },
}

impl Command {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        let Self::List { range, output: OutputArgs { format } } = self;
        let rows: Vec<_> = session.audit(range).await?.into_iter().map(AuditRow::from).collect();
        output::list(&rows, format)
    }
}

#[derive(Debug, Serialize)]
struct AuditRow {
    revision: u64,
    time: String,
    actor: String,
    change: String,
}

impl From<v1::AuditEntry> for AuditRow {
    fn from(entry: v1::AuditEntry) -> Self {
        let v1::AuditEntry { revision, time, actor, change } = entry;
        Self { revision, time: timestamp(time), actor, change }
    }
}

impl Row for AuditRow {
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
    fn an_entry_says_who_changed_what_and_when() {
        let entry = |revision, actor: &str, change: &str| v1::AuditEntry {
            revision,
            time: 1_800_000_000,
            actor: actor.to_owned(),
            change: change.to_owned(),
        };
        let entries = [entry(8, "root", "rule delete old"), entry(7, "admin:alice", "node invite web1")];
        let rows: Vec<AuditRow> = entries.into_iter().map(AuditRow::from).collect();
        assert_snapshot!(output::table(AuditRow::HEADINGS, rows.iter().map(Row::cells)), @r"
        REVISION  TIME                  ACTOR        CHANGE
        8         2027-01-15T08:00:00Z  root         rule delete old
        7         2027-01-15T08:00:00Z  admin:alice  node invite web1
        ");
        assert_snapshot!("audit-json", output::json(&rows));
    }
}
