//! `meshctl status`

use std::collections::BTreeMap;

use clap::Args;
use controller_api::time::{ago, timestamp_or_none};
use controller_api::v1;
use policy::{Network, NodeId, NodeState};
use serde::Serialize;

use crate::output::{self, OutputArgs, Row};
use crate::time;
use crate::{Failure, Session};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  meshctl status
  meshctl status -o json

A node is behind while it has not enforced what was last sent to it.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    output: OutputArgs,
}

impl Arguments {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        let (_, network) = session.network().await?;
        let report = Report::of(&network, session.status().await?, time::now());
        output::print(&report, self.output.format, || report.text())
    }
}

#[derive(Debug, Serialize)]
struct Report {
    network: String,
    revision: u64,
    version: String,
    nodes: Vec<StatusRow>,
}

#[derive(Debug, Serialize)]
struct StatusRow {
    node: String,
    state: String,
    connected: bool,
    last_seen: Option<String>,
    #[serde(skip)]
    last_seen_ago: Option<String>,
    /// Revisions.
    sent: Option<u64>,
    enforced: Option<u64>,
    generation: u64,
    behind: bool,
    error: Option<String>,
    version: Option<String>,
}

impl Report {
    fn of(network: &Network, answer: v1::GetStatusResponse, now: u64) -> Self {
        let v1::GetStatusResponse { revision, version, nodes } = answer;
        let mut known: BTreeMap<_, _> = nodes.into_iter().map(|status| (NodeId(status.node), status)).collect();
        let mut rows: Vec<_> = network
            .nodes()
            .values()
            .map(|node| StatusRow::of(&node.name, node.state, known.remove(&node.id).unwrap_or_default(), now))
            .collect();
        rows.sort_by(|a, b| a.node.cmp(&b.node));
        Self { network: network.name().to_string(), revision, version, nodes: rows }
    }

    fn text(&self) -> String {
        let connected = self.nodes.iter().filter(|node| node.connected).count();
        let behind = self.nodes.iter().filter(|node| node.behind).count();
        let summary = format!(
            "network {}  revision {}  controller {}  {connected} of {} nodes connected, {behind} behind",
            self.network,
            self.revision,
            self.version,
            self.nodes.len()
        );
        let table = output::table(StatusRow::HEADINGS, self.nodes.iter().map(Row::cells));
        format!("{summary}\n\n{table}")
    }
}

impl StatusRow {
    fn of(node: &impl ToString, state: NodeState, status: v1::NodeStatus, now: u64) -> Self {
        let v1::NodeStatus {
            node: _,
            connected,
            last_seen,
            sent,
            enforced,
            generation,
            error,
            version,
            endpoint: _,
            lacks,
        } = status;
        let error = match (lacks.is_empty(), error.is_empty()) {
            (true, _) => error,
            (false, true) => lacking(&lacks),
            (false, false) => format!("{error}; {}", lacking(&lacks)),
        };
        let some = |text: String| (!text.is_empty()).then_some(text);
        Self {
            node: node.to_string(),
            state: state.to_string(),
            connected,
            last_seen: timestamp_or_none(last_seen),
            last_seen_ago: (last_seen != 0).then(|| ago(now, last_seen)),
            sent: (sent != 0).then_some(sent),
            enforced: (enforced != 0).then_some(enforced),
            generation,
            behind: state == NodeState::Active && (enforced < sent || !error.is_empty()),
            error: some(error),
            version: some(version),
        }
    }
}

fn lacking(features: &[String]) -> String {
    let features: Vec<String> = features.iter().map(|feature| format!("`{feature}`")).collect();
    format!("it denies what requires {}, which it does not know: upgrade `noded`", features.join(" and "))
}

impl Row for StatusRow {
    const HEADINGS: &'static [&'static str] =
        &["NODE", "STATE", "CONNECTED", "LAST SEEN", "SENT", "ENFORCED", "BEHIND", "VERSION", "ERROR"];

    fn cells(&self) -> Vec<String> {
        let yes_no = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        let number = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
        vec![
            self.node.clone(),
            self.state.clone(),
            yes_no(self.connected),
            self.last_seen_ago.clone().unwrap_or_else(|| "never".to_owned()),
            number(self.sent),
            number(self.enforced),
            yes_no(self.behind),
            self.version.clone().unwrap_or_default(),
            self.error.clone().unwrap_or_default(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::fixture::{self, name};

    #[test]
    fn a_node_that_has_not_enforced_what_it_was_sent_is_behind() {
        let network = fixture::network();
        let id = |node: &str| network.node_named(&name(node)).expect("a node").id.0;
        let status = |node: &str, connected, sent, enforced, error: &str| v1::NodeStatus {
            node: id(node),
            connected,
            last_seen: 1_000_000,
            sent,
            enforced,
            generation: 3,
            error: error.to_owned(),
            version: "0.1.0".to_owned(),
            ..v1::NodeStatus::default()
        };
        let nodes = vec![status("web1", true, 17, 17, ""), status("app1", false, 18, 17, "no room")];
        let answer = v1::GetStatusResponse { revision: 18, version: "0.1.0".to_owned(), nodes };
        let report = Report::of(&network, answer, 1_000_005);
        assert_snapshot!(report.text(), @r"
        network corp  revision 18  controller 0.1.0  1 of 4 nodes connected, 1 behind

        NODE  STATE    CONNECTED  LAST SEEN  SENT  ENFORCED  BEHIND  VERSION  ERROR
        app1  active   no         5s ago     18    17        yes     0.1.0    no room
        db1   invited  no         never      -     -         no      -        -
        web1  active   yes        5s ago     17    17        no      0.1.0    -
        web2  invited  no         never      -     -         no      -        -
        ");
        assert_snapshot!("status-json", output::json(&report));
        let json = serde_json::to_value(&report).expect("JSON");
        assert_eq!(json["nodes"][0]["behind"], true);
        assert_eq!(json["nodes"][0]["last_seen"], "1970-01-12T13:46:40Z");
        assert_eq!(json["nodes"][1]["sent"], serde_json::Value::Null);
    }
}
