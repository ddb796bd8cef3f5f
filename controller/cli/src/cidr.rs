//! `meshctl cidr …`

use std::collections::BTreeMap;

use clap::{ArgAction, Subcommand};
use ipnet::IpNet;
use policy::{Change, Cidr, CidrId, CidrName, Network, Prefixes, parse_prefix};
use serde::Serialize;

use crate::output::{self, OutputArgs, Row, flags, words};
use crate::{Failure, Session};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Name a prefix, or one of each family
    #[command(after_help = "\
Examples:
  meshctl cidr add web 10.42.1.0/24 fd42:0:0:1::/64
  meshctl cidr add lab 10.42.9.0/24 --isolated       # no lineage among its members
  meshctl cidr add office 192.168.7.0/24 --external  # behind a gateway, outside the roots")]
    Add {
        /// Its name
        name: CidrName,
        /// At most one IPv4 and one IPv6 prefix
        #[arg(required = true, value_name = "PREFIX", value_parser = parse_prefix)]
        prefixes: Vec<IpNet>,
        /// No lineage passes through it, not even among its own members
        #[arg(long)]
        isolated: bool,
        /// A network behind gateway nodes, outside the roots
        #[arg(long)]
        external: bool,
    },
    /// List the cidrs
    #[command(after_help = "Example:\n  meshctl cidr list -o json")]
    List(OutputArgs),
    /// Show the trees that the cidrs form
    #[command(after_help = "Example:\n  meshctl cidr tree")]
    Tree(OutputArgs),
    /// Give a cidr another name; rules and groups that name it follow
    #[command(after_help = "Example:\n  meshctl cidr rename web frontend")]
    Rename {
        /// Its name
        from: CidrName,
        /// Its name from now on
        to: CidrName,
    },
    /// Give a cidr other prefixes, which must still contain its nodes
    #[command(after_help = "Example:\n  meshctl cidr move web 10.42.0.0/23 fd42:0:0:1::/64")]
    Move {
        /// Its name
        name: CidrName,
        /// At most one IPv4 and one IPv6 prefix
        #[arg(required = true, value_name = "PREFIX", value_parser = parse_prefix)]
        prefixes: Vec<IpNet>,
    },
    /// Change a cidr's properties
    #[command(after_help = "Example:\n  meshctl cidr set web --isolated true")]
    Set {
        /// Its name
        name: CidrName,
        /// Whether lineage is kept from passing through it
        #[arg(long, required = true, action = ArgAction::Set, value_name = "true|false")]
        isolated: bool,
    },
    /// Delete a cidr that nothing is in and nothing names
    #[command(after_help = "Example:\n  meshctl cidr delete web")]
    Delete {
        /// Its name
        name: CidrName,
    },
}

impl Command {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        match self {
            Self::Add { name, prefixes, isolated, external } => {
                let prefixes = Prefixes::from_nets(prefixes).map_err(Failure::usage)?;
                let done = format!("cidr `{name}` added");
                session.change(Change::AddCidr { name, prefixes, isolated, external }, done).await
            }
            Self::List(OutputArgs { format }) => {
                let (_, network) = session.network().await?;
                output::list(&rows(&network), format)
            }
            Self::Tree(OutputArgs { format }) => {
                let (_, network) = session.network().await?;
                let tree = Tree::of(&network);
                output::print(&tree, format, || tree.text())
            }
            Self::Rename { from, to } => {
                let done = format!("cidr `{from}` renamed to `{to}`");
                session.change(Change::RenameCidr { from, to }, done).await
            }
            Self::Move { name, prefixes } => {
                let prefixes = Prefixes::from_nets(prefixes).map_err(Failure::usage)?;
                let done = format!("cidr `{name}` moved to {prefixes}");
                session.change(Change::MoveCidr { name, prefixes }, done).await
            }
            Self::Set { name, isolated } => {
                let done = format!("cidr `{name}` is {}isolated", if isolated { "" } else { "not " });
                session.change(Change::SetCidr { name, isolated }, done).await
            }
            Self::Delete { name } => {
                let done = format!("cidr `{name}` deleted");
                session.change(Change::DeleteCidr { name }, done).await
            }
        }
    }
}

#[derive(Debug, Serialize)]
struct CidrRow {
    id: u32,
    name: String,
    prefixes: Vec<String>,
    parent: Option<String>,
    /// Nodes whose deepest cidr this is.
    nodes: usize,
    isolated: bool,
    external: bool,
}

impl Row for CidrRow {
    const HEADINGS: &'static [&'static str] = &["NAME", "PREFIXES", "PARENT", "NODES", "FLAGS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            words(&self.prefixes),
            self.parent.clone().unwrap_or_default(),
            self.nodes.to_string(),
            flags(&[("isolated", self.isolated), ("external", self.external)]),
        ]
    }
}

/// How many nodes each cidr has, of those whose deepest cidr it is.
fn populations(network: &Network) -> BTreeMap<CidrId, usize> {
    let mut nodes = BTreeMap::new();
    for cidr in network.nodes().keys().filter_map(|node| network.cidr_of_node(*node)) {
        *nodes.entry(cidr.id).or_default() += 1;
    }
    nodes
}

impl CidrRow {
    fn of(network: &Network, nodes: &BTreeMap<CidrId, usize>, cidr: &Cidr) -> Self {
        let Cidr { id, name, prefixes, isolated, external } = cidr;
        let parent = network.parent_of(*id).and_then(|parent| network.cidrs().get(&parent));
        Self {
            id: id.0,
            name: name.to_string(),
            prefixes: prefixes.iter().map(|prefix| prefix.to_string()).collect(),
            parent: parent.map(|parent| parent.name.to_string()),
            nodes: nodes.get(id).copied().unwrap_or(0),
            isolated: *isolated,
            external: *external,
        }
    }
}

/// In the order of their addresses.
fn rows(network: &Network) -> Vec<CidrRow> {
    let nodes = populations(network);
    let cidrs = in_order(network, network.cidrs().keys().copied());
    cidrs.into_iter().map(|cidr| CidrRow::of(network, &nodes, cidr)).collect()
}

/// Cidrs by their first prefix: the order in which people think of addresses.
pub(crate) fn in_order(network: &Network, ids: impl IntoIterator<Item = CidrId>) -> Vec<&Cidr> {
    let mut cidrs: Vec<&Cidr> = ids.into_iter().filter_map(|id| network.cidrs().get(&id)).collect();
    cidrs.sort_by_key(|cidr| {
        (cidr.external, cidr.prefixes.iter().next().map(|prefix| (prefix.addr(), prefix.prefix_len())))
    });
    cidrs
}

#[derive(Debug, Serialize)]
struct Tree {
    network: String,
    roots: Vec<String>,
    default: String,
    cidrs: Vec<Branch>,
}

#[derive(Debug, Serialize)]
struct Branch {
    #[serde(flatten)]
    row: CidrRow,
    children: Vec<Branch>,
}

impl Tree {
    fn of(network: &Network) -> Self {
        let nodes = populations(network);
        let tops = network.cidrs().keys().copied().filter(|id| network.parent_of(*id).is_none());
        Self {
            network: network.name().to_string(),
            roots: network.roots().iter().map(|root| root.to_string()).collect(),
            default: network.default().to_string(),
            cidrs: in_order(network, tops).into_iter().map(|cidr| Branch::of(network, &nodes, cidr)).collect(),
        }
    }

    fn text(&self) -> String {
        let mut lines = vec![format!("{}  {}  default {}", self.network, words(&self.roots), self.default)];
        branch_lines(&self.cidrs, "", &mut lines);
        lines.join("\n")
    }
}

impl Branch {
    fn of(network: &Network, nodes: &BTreeMap<CidrId, usize>, cidr: &Cidr) -> Self {
        let children = in_order(network, network.children_of(cidr.id));
        Self {
            row: CidrRow::of(network, nodes, cidr),
            children: children.into_iter().map(|child| Self::of(network, nodes, child)).collect(),
        }
    }
}

fn branch_lines(branches: &[Branch], indent: &str, lines: &mut Vec<String>) {
    for (index, Branch { row, children }) in branches.iter().enumerate() {
        let (fork, below) = if index + 1 < branches.len() { ("├─ ", "│  ") } else { ("└─ ", "   ") };
        let mut line = format!("{indent}{fork}{}  {}", row.name, words(&row.prefixes));
        if row.nodes > 0 {
            line += &format!("  {} node{}", row.nodes, if row.nodes == 1 { "" } else { "s" });
        }
        for (flag, set) in [("isolated", row.isolated), ("external", row.external)] {
            if set {
                line += &format!("  {flag}");
            }
        }
        lines.push(line);
        branch_lines(children, &format!("{indent}{below}"), lines);
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::fixture;

    #[test]
    fn a_list_is_in_the_order_of_addresses() {
        let text = output::table(CidrRow::HEADINGS, rows(&fixture::network()).iter().map(Row::cells));
        assert_snapshot!(text, @r"
        NAME    PREFIXES                      PARENT  NODES  FLAGS
        corp    10.42.0.0/16 fd42::/48        -       0      -
        web     10.42.1.0/24 fd42:0:0:1::/64  corp    2      -
        app     10.42.2.0/24 fd42:0:0:2::/64  corp    1      -
        db      10.42.3.0/24 fd42:0:0:3::/64  corp    1      isolated
        office  192.168.7.0/24                -       0      external
        ");
    }

    #[test]
    fn a_tree_shows_who_contains_whom() {
        assert_snapshot!(Tree::of(&fixture::network()).text(), @r"
        corp  10.42.0.0/16 fd42::/48  default deny
        ├─ corp  10.42.0.0/16 fd42::/48
        │  ├─ web  10.42.1.0/24 fd42:0:0:1::/64  2 nodes
        │  ├─ app  10.42.2.0/24 fd42:0:0:2::/64  1 node
        │  └─ db  10.42.3.0/24 fd42:0:0:3::/64  1 node  isolated
        └─ office  192.168.7.0/24  external
        ");
    }

    #[test]
    fn programs_get_the_same_with_types() {
        assert_snapshot!("cidr-list-json", output::json(&rows(&fixture::network())));
        assert_snapshot!("cidr-tree-json", output::json(&Tree::of(&fixture::network())));
        let json = serde_json::to_value(Tree::of(&fixture::network())).expect("JSON");
        assert_eq!(json["cidrs"][0]["children"][0]["name"], "web");
        assert_eq!(json["cidrs"][0]["children"][0]["nodes"], 2);
        assert_eq!(json["cidrs"][1]["external"], true);
    }
}
