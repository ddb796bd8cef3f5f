//! `meshctl group …`

use clap::Subcommand;
use policy::{Change, Group, GroupName, MemberSpec, Network, Rule, Selector};
use serde::Serialize;

use crate::output::{self, OutputArgs, Row, unknown, words};
use crate::{Failure, Session};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a group
    #[command(after_help = "Example:\n  meshctl group add dba --member node:db1 --member cidr:admins")]
    Add {
        /// Its name
        name: GroupName,
        /// `node:NAME` or `cidr:NAME`
        #[arg(long = "member", value_name = "MEMBER")]
        members: Vec<MemberSpec>,
    },
    /// List the groups
    #[command(after_help = "Example:\n  meshctl group list")]
    List(OutputArgs),
    /// Show one group
    #[command(after_help = "Example:\n  meshctl group show dba")]
    Show {
        /// Its name
        name: GroupName,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Give a group another name; rules that name it follow
    #[command(after_help = "Example:\n  meshctl group rename dba database-admins")]
    Rename {
        /// Its name
        from: GroupName,
        /// Its name from now on
        to: GroupName,
    },
    /// Delete a group that no rule names
    #[command(after_help = "Example:\n  meshctl group delete dba")]
    Delete {
        /// Its name
        name: GroupName,
    },
    /// Who is in a group
    #[command(subcommand)]
    Member(Member),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Member {
    /// Put a node or a cidr into a group
    #[command(after_help = "Example:\n  meshctl group member add dba node:db1")]
    Add {
        /// The group
        group: GroupName,
        /// `node:NAME` or `cidr:NAME`
        member: MemberSpec,
    },
    /// Take a node or a cidr out of a group
    #[command(after_help = "Example:\n  meshctl group member remove dba node:db1")]
    Remove {
        /// The group
        group: GroupName,
        /// `node:NAME` or `cidr:NAME`
        member: MemberSpec,
    },
}

impl Command {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        match self {
            Self::Add { name, members } => {
                let done = format!("group `{name}` added");
                session.change(Change::AddGroup { name, members }, done).await
            }
            Self::List(OutputArgs { format }) => {
                let (_, network) = session.network().await?;
                output::list(&rows(&network), format)
            }
            Self::Show { name, output: OutputArgs { format } } => {
                let (_, network) = session.network().await?;
                let group = network
                    .group_named(&name)
                    .ok_or_else(|| unknown("group", &name, network.groups().values().map(|group| &group.name)))?;
                output::show(&GroupRow::of(&network, group), format)
            }
            Self::Rename { from, to } => {
                let done = format!("group `{from}` renamed to `{to}`");
                session.change(Change::RenameGroup { from, to }, done).await
            }
            Self::Delete { name } => {
                let done = format!("group `{name}` deleted");
                session.change(Change::DeleteGroup { name }, done).await
            }
            Self::Member(Member::Add { group, member }) => {
                let done = format!("{member} put into group `{group}`");
                session.change(Change::AddMember { group, member }, done).await
            }
            Self::Member(Member::Remove { group, member }) => {
                let done = format!("{member} taken out of group `{group}`");
                session.change(Change::RemoveMember { group, member }, done).await
            }
        }
    }
}

#[derive(Debug, Serialize)]
struct GroupRow {
    id: u32,
    name: String,
    members: Vec<String>,
    /// Rules that name it.
    rules: Vec<String>,
}

impl GroupRow {
    fn of(network: &Network, group: &Group) -> Self {
        let names =
            |rule: &&Rule| rule.from.iter().chain(&rule.to).any(|selector| *selector == Selector::Group(group.id));
        Self {
            id: group.id.0,
            name: group.name.to_string(),
            members: network.member_specs(group).iter().map(MemberSpec::to_string).collect(),
            rules: network.rules().values().filter(names).map(|rule| rule.name.to_string()).collect(),
        }
    }
}

/// By name.
fn rows(network: &Network) -> Vec<GroupRow> {
    let mut rows: Vec<_> = network.groups().values().map(|group| GroupRow::of(network, group)).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}

impl Row for GroupRow {
    const HEADINGS: &'static [&'static str] = &["NAME", "MEMBERS", "RULES"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone(), words(&self.members), words(&self.rules)]
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::fixture;

    #[test]
    fn a_group_shows_its_members_and_who_names_it() {
        let text = output::table(GroupRow::HEADINGS, rows(&fixture::network()).iter().map(Row::cells));
        assert_snapshot!(text, @r"
        NAME   MEMBERS             RULES
        front  node:web1 cidr:web  web-to-app
        ");
    }
}
