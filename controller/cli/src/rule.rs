//! `meshctl rule …`

use clap::{Args, Subcommand};
use controller_api::time::timestamp_or_none;
use policy::{Action, Change, Mode, Network, Rule, RuleName, RuleSpec, Selector, SelectorSpec, ServiceSpec};
use serde::Serialize;

use crate::output::{self, OutputArgs, Row, flags, unknown, words};
use crate::{Failure, Session};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Allow, or deny, new flows; replies to an allowed flow need no rule
    #[command(after_help = "\
Examples:
  meshctl rule add web-to-app --from cidr:web --to cidr:app --service tcp/8080
  meshctl rule add ping --from any --to any --service icmp/8 icmpv6/128
  meshctl rule add no-ssh --deny --from cidr:web --to any --service tcp/22 --priority 10
  meshctl rule add dba --from group:dba --to node:db1 10.42.9.0/24 --service service:sql

Selectors: cidr:NAME (with its descendants), node:NAME, group:NAME, any, or a prefix.
Of the rules that match a flow, those of the highest priority decide; among them a deny wins.")]
    Add(Add),
    /// List the rules
    #[command(after_help = "Example:\n  meshctl rule list")]
    List(OutputArgs),
    /// Show one rule
    #[command(after_help = "Example:\n  meshctl rule show web-to-app")]
    Show {
        /// Its name
        name: RuleName,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Delete a rule; flows that it alone allowed are cut
    #[command(after_help = "Example:\n  meshctl rule delete web-to-app")]
    Delete {
        /// Its name
        name: RuleName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// Its name
    name: RuleName,
    /// Who may open
    #[arg(long, required = true, num_args = 1.., value_name = "SELECTOR")]
    from: Vec<SelectorSpec>,
    /// To whom
    #[arg(long, required = true, num_args = 1.., value_name = "SELECTOR")]
    to: Vec<SelectorSpec>,
    /// What: `any`, `tcp/443`, `udp/1000-2000`, `tcp/80,443`, `icmp/8`, `proto/47` or `service:NAME`
    #[arg(long = "service", required = true, num_args = 1.., value_name = "SERVICE")]
    services: Vec<ServiceSpec>,
    /// Deny instead of allow
    #[arg(long)]
    deny: bool,
    /// Rules of a higher priority decide before those of a lower one
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-1_000_000..=1_000_000))]
    priority: i32,
    /// Also the other way round, to the same services
    #[arg(long)]
    both: bool,
    /// Report the packets that it decides
    #[arg(long)]
    log: bool,
    /// Why it is there
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    comment: String,
}

impl Command {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        match self {
            Self::Add(add) => {
                let done = format!("rule `{}` added", add.name);
                session.change(Change::AddRule(add.into()), done).await
            }
            Self::List(OutputArgs { format }) => {
                let (_, network) = session.network().await?;
                output::list(&rows(&network), format)
            }
            Self::Show { name, output: OutputArgs { format } } => {
                let (_, network) = session.network().await?;
                let rule = network
                    .rule_named(&name)
                    .ok_or_else(|| unknown("rule", &name, network.rules().values().map(|rule| &rule.name)))?;
                output::show(&RuleDetails(RuleRow::of(&network, rule)), format)
            }
            Self::Delete { name } => {
                let done = format!("rule `{name}` deleted");
                session.change(Change::DeleteRule { name }, done).await
            }
        }
    }
}

impl From<Add> for RuleSpec {
    fn from(add: Add) -> Self {
        let Add { name, from, to, services, deny, priority, both, log, comment } = add;
        let action = if deny { Action::Deny } else { Action::Allow };
        Self { name, action, from, to, services, priority, both, log, comment }
    }
}

#[derive(Debug, Serialize)]
struct RuleRow {
    id: u32,
    name: String,
    action: String,
    from: Vec<String>,
    to: Vec<String>,
    services: Vec<String>,
    priority: i32,
    both: bool,
    /// Counts only, decides nothing.
    audit: bool,
    log: bool,
    expires_at: Option<String>,
    schedule: Option<String>,
    comment: String,
}

impl RuleRow {
    fn of(network: &Network, rule: &Rule) -> Self {
        let Rule { id, name, action, from, to, services, priority, both, mode, log, expires_at, schedule, comment } =
            rule;
        let selector = |selector: &Selector| network.selector_spec(selector).map(|spec| spec.to_string());
        Self {
            id: id.0,
            name: name.to_string(),
            action: action.to_string(),
            from: from.iter().filter_map(selector).collect(),
            to: to.iter().filter_map(selector).collect(),
            services: services
                .iter()
                .filter_map(|service| network.service_spec(service))
                .map(|spec| spec.to_string())
                .collect(),
            priority: *priority,
            both: *both,
            audit: *mode == Mode::Audit,
            log: *log,
            expires_at: expires_at.and_then(timestamp_or_none),
            schedule: schedule.clone(),
            comment: comment.clone(),
        }
    }

    fn flags(&self) -> String {
        flags(&[("both", self.both), ("audit", self.audit), ("log", self.log)])
    }
}

/// In the order in which they decide: by priority, highest first, then by name.
fn rows(network: &Network) -> Vec<RuleRow> {
    let mut rows: Vec<_> = network.rules().values().map(|rule| RuleRow::of(network, rule)).collect();
    rows.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name.cmp(&b.name)));
    rows
}

impl Row for RuleRow {
    const HEADINGS: &'static [&'static str] = &["PRIORITY", "NAME", "ACTION", "FROM", "TO", "SERVICES", "FLAGS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.priority.to_string(),
            self.name.clone(),
            self.action.clone(),
            words(&self.from),
            words(&self.to),
            words(&self.services),
            self.flags(),
        ]
    }
}

/// All there is to know of one rule.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct RuleDetails(RuleRow);

impl Row for RuleDetails {
    const HEADINGS: &'static [&'static str] =
        &["NAME", "ACTION", "FROM", "TO", "SERVICES", "PRIORITY", "FLAGS", "EXPIRES", "SCHEDULE", "COMMENT"];

    fn cells(&self) -> Vec<String> {
        let row = &self.0;
        vec![
            row.name.clone(),
            row.action.clone(),
            words(&row.from),
            words(&row.to),
            words(&row.services),
            row.priority.to_string(),
            row.flags(),
            row.expires_at.clone().unwrap_or_default(),
            row.schedule.clone().unwrap_or_default(),
            row.comment.clone(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::fixture;

    #[test]
    fn a_list_is_in_the_order_in_which_rules_decide() {
        let text = output::table(RuleRow::HEADINGS, rows(&fixture::network()).iter().map(Row::cells));
        assert_snapshot!(text, @r"
        PRIORITY  NAME        ACTION  FROM         TO        SERVICES               FLAGS
        10        no-web2     deny    node:web2    cidr:app  tcp/8080               log
        0         app-to-db   allow   cidr:app     cidr:db   tcp/5432               -
        0         web-to-app  allow   group:front  cidr:app  tcp/8080 service:ping  -
        ");
    }

    #[test]
    fn programs_get_lists_and_booleans() {
        assert_snapshot!("rule-list-json", output::json(&rows(&fixture::network())));
        let json = serde_json::to_value(rows(&fixture::network())).expect("JSON");
        assert_eq!(json[0]["log"], true);
        assert_eq!(json[2]["services"], serde_json::json!(["tcp/8080", "service:ping"]));
    }
}
