//! `meshctl node …`

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use clap::{Args, Subcommand};
use controller_api::defaults::INVITATION_LIFETIME;
use controller_api::endpoint::ControllerEndpoint;
use controller_api::time::{timestamp, timestamp_or_none};
use controller_api::v1;
use policy::{Addresses, Change, CidrName, GroupName, Network, Node, NodeName};
use serde::Serialize;

use crate::output::{self, OutputArgs, Row, unknown, words};
use crate::time::Lifetime;
use crate::{Failure, Session, say};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Give a machine its place and print its invitation, one line
    #[command(after_help = "\
Examples:
  meshctl node invite web1 --cidr web --expires 1h
  meshctl node invite gw1 --cidr infra --gateway-for office --address 10.42.0.1
  meshctl node invite web1     # not joined yet: a new invitation, and the old one is void

On the machine itself: noded join 'rampart1:…'")]
    Invite(Invite),
    /// List the nodes
    #[command(after_help = "Example:\n  meshctl node list -o yaml")]
    List(OutputArgs),
    /// Show one node
    #[command(after_help = "Example:\n  meshctl node show web1")]
    Show {
        /// Its name
        name: NodeName,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Give a node another name; rules and groups that name it follow
    #[command(after_help = "Example:\n  meshctl node rename web1 web-old")]
    Rename {
        /// Its name
        from: NodeName,
        /// Its name from now on
        to: NodeName,
    },
    /// Say where a node's WireGuard is reached, or go back to what is observed
    #[command(after_help = "\
Examples:
  meshctl node endpoint web1 192.0.2.1:51820
  meshctl node endpoint web1 --observed")]
    Endpoint {
        /// Its name
        name: NodeName,
        /// Address and UDP port
        #[arg(value_name = "ADDRESS:PORT", value_parser = parse_endpoint, required_unless_present = "observed")]
        address: Option<SocketAddr>,
        /// Forget what was set, and use the address that the node is seen at
        #[arg(long, conflicts_with = "address")]
        observed: bool,
    },
    /// Cut a node off until it is enabled again
    #[command(after_help = "Example:\n  meshctl node disable web1")]
    Disable {
        /// Its name
        name: NodeName,
    },
    /// Let a disabled node in again
    #[command(after_help = "Example:\n  meshctl node enable web1")]
    Enable {
        /// Its name
        name: NodeName,
    },
    /// Delete a node for good
    #[command(after_help = "Example:\n  meshctl node delete web1")]
    Delete {
        /// Its name
        name: NodeName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Invite {
    /// Its name
    name: NodeName,
    /// The cidr that it belongs to; needed for a node that is new
    #[arg(long)]
    cidr: Option<CidrName>,
    /// Its address, one per family of the cidr [default: the lowest free ones]
    #[arg(long = "address", value_name = "ADDRESS", value_parser = parse_address)]
    addresses: Vec<IpAddr>,
    /// A group to put it into
    #[arg(long = "group", value_name = "GROUP")]
    groups: Vec<GroupName>,
    /// An external cidr that it is a gateway of
    #[arg(long, value_name = "CIDR")]
    gateway_for: Vec<CidrName>,
    /// How long the invitation can be redeemed
    #[arg(long, value_name = "SPAN", default_value_t = Lifetime(INVITATION_LIFETIME))]
    expires: Lifetime,
    /// The controller's endpoint to write into the invitation [default: what `controllerd` is configured with]
    #[arg(long = "endpoint", value_name = "HOST:PORT")]
    endpoints: Vec<ControllerEndpoint>,
}

impl Command {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        match self {
            Self::Invite(invite) => invite.run(session).await,
            Self::List(OutputArgs { format }) => {
                let (_, network) = session.network().await?;
                let mut rows = rows(&network);
                let seen = session.endpoints().await?;
                rows.iter_mut().for_each(|row| row.see(&seen));
                output::list(&rows, format)
            }
            Self::Show { name, output: OutputArgs { format } } => {
                let (_, network) = session.network().await?;
                let mut row = NodeRow::of(&network, find(&network, &name)?);
                row.see(&session.endpoints().await?);
                output::show(&NodeDetails(row), format)
            }
            Self::Rename { from, to } => {
                let done = format!("node `{from}` renamed to `{to}`");
                session.change(Change::RenameNode { from, to }, done).await
            }
            Self::Endpoint { name, address, observed: _ } => {
                let done = match address {
                    Some(address) => format!("node `{name}` is reached at {address}"),
                    None => format!("node `{name}` is reached where it is seen"),
                };
                session.change(Change::SetEndpoint { name, endpoint: address }, done).await
            }
            Self::Disable { name } => {
                let done = format!("node `{name}` disabled");
                session.change(Change::DisableNode { name }, done).await
            }
            Self::Enable { name } => {
                let done = format!("node `{name}` enabled");
                session.change(Change::EnableNode { name }, done).await
            }
            Self::Delete { name } => {
                let done = format!("node `{name}` deleted");
                session.change(Change::DeleteNode { name }, done).await
            }
        }
    }
}

impl Invite {
    async fn run(self, session: &mut Session) -> Result<(), Failure> {
        let (_, network) = session.network().await?;
        match network.node_named(&self.name) {
            Some(node) => self.check_against(&network, node)?,
            None => self.add(session).await?,
        }
        if session.dry_run {
            say(format!("dry run, no invitation was made: node `{}`", self.name));
            return Ok(());
        }
        let request = v1::InviteRequest {
            subject: Some(v1::invite_request::Subject::Node(self.name.to_string())),
            expires_in: self.expires.0.as_secs(),
            endpoints: self.endpoints.iter().map(ControllerEndpoint::to_string).collect(),
        };
        let v1::InviteResponse { invitation, expires_at } = session.invite(request).await?;
        say(format!(
            "invitation of node `{}`, good until {}; on that machine: noded join '…'",
            self.name,
            timestamp(expires_at)
        ));
        output::line(&invitation)
    }

    /// The node is new.
    async fn add(&self, session: &mut Session) -> Result<(), Failure> {
        let name = self.name.clone();
        let cidr = self.cidr.clone().ok_or_else(|| {
            Failure::usage(format!("there is no node `{name}` yet, and a new one needs a place; add `--cidr CIDR`"))
        })?;
        let addresses = match self.addresses.is_empty() {
            true => None,
            false => Some(Addresses::from_addresses(self.addresses.iter().copied()).map_err(Failure::usage)?),
        };
        let change = Change::AddNode {
            name,
            cidr,
            addresses,
            groups: self.groups.clone(),
            gateway_for: self.gateway_for.clone(),
        };
        session.change(change, format!("node `{}` added", self.name)).await
    }

    /// The node is there: an invitation changes nothing about it, so what was said of it must be so.
    fn check_against(&self, network: &Network, node: &Node) -> Result<(), Failure> {
        let row = NodeRow::of(network, node);
        let differs = |what: &str, is: &str, remedy: &str| {
            Err(Failure::failed(format!("node `{}` is already there, and its {what} is `{is}`; {remedy}", self.name)))
        };
        if let Some(cidr) = &self.cidr
            && cidr.as_ref() != row.cidr
        {
            return differs("cidr", &row.cidr, "leave `--cidr` out, or choose another name");
        }
        if !self.addresses.iter().all(|address| node.addresses.iter().any(|own| own == *address)) {
            return differs("address", &words(&row.addresses), "leave `--address` out, or delete the node first");
        }
        if !self.groups.iter().all(|group| row.groups.iter().any(|own| own == group.as_ref())) {
            return differs("group", &words(&row.groups), "use `meshctl group member add`");
        }
        if !self.gateway_for.iter().all(|cidr| row.gateway_for.iter().any(|own| own == cidr.as_ref())) {
            return differs("gateway-for", &words(&row.gateway_for), "delete the node first");
        }
        Ok(())
    }
}

fn parse_address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("`{text}` is not an address; write one like `10.42.1.7` or `fd42:0:0:1::7`"))
}

fn parse_endpoint(text: &str) -> Result<SocketAddr, String> {
    text.parse::<SocketAddr>().ok().filter(|address| address.port() != 0).ok_or_else(|| {
        format!("`{text}` is not an address and a port; write them like `192.0.2.1:51820` or `[2001:db8::1]:51820`")
    })
}

fn find<'a>(network: &'a Network, name: &NodeName) -> Result<&'a Node, Failure> {
    network.node_named(name).ok_or_else(|| unknown("node", name, network.nodes().values().map(|node| &node.name)))
}

#[derive(Debug, Serialize)]
struct NodeRow {
    id: u32,
    name: String,
    state: String,
    addresses: Vec<String>,
    cidr: String,
    groups: Vec<String>,
    gateway_for: Vec<String>,
    endpoint: Option<String>,
    /// Set by an operator, not observed.
    endpoint_fixed: bool,
    public_key: Option<String>,
    expires_at: Option<String>,
}

impl NodeRow {
    fn of(network: &Network, node: &Node) -> Self {
        let Node { id, name, addresses, public_key, state, gateway_for, endpoint, expires_at } = node;
        let groups = network.groups().values().filter(|group| group.nodes.contains(id));
        Self {
            id: id.0,
            name: name.to_string(),
            state: state.to_string(),
            addresses: addresses.iter().map(|address| address.to_string()).collect(),
            cidr: network.cidr_of_node(*id).map(|cidr| cidr.name.to_string()).unwrap_or_default(),
            groups: groups.map(|group| group.name.to_string()).collect(),
            gateway_for: gateway_for
                .iter()
                .filter_map(|id| network.cidrs().get(id))
                .map(|cidr| cidr.name.to_string())
                .collect(),
            endpoint: endpoint.map(|endpoint| endpoint.to_string()),
            endpoint_fixed: endpoint.is_some(),
            public_key: public_key.map(|key| key.to_string()),
            expires_at: expires_at.and_then(timestamp_or_none),
        }
    }
}

impl NodeRow {
    /// Where the node was seen counts where no operator has said more.
    fn see(&mut self, seen: &BTreeMap<u32, String>) {
        if self.endpoint.is_none() {
            self.endpoint = seen.get(&self.id).cloned();
        }
    }
}

/// By name.
fn rows(network: &Network) -> Vec<NodeRow> {
    let mut rows: Vec<_> = network.nodes().values().map(|node| NodeRow::of(network, node)).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}

impl Row for NodeRow {
    const HEADINGS: &'static [&'static str] = &["NAME", "STATE", "CIDR", "ADDRESSES", "GROUPS", "ENDPOINT"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.state.clone(),
            self.cidr.clone(),
            words(&self.addresses),
            words(&self.groups),
            self.endpoint.clone().unwrap_or_default(),
        ]
    }
}

/// All there is to know of one node.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct NodeDetails(NodeRow);

impl Row for NodeDetails {
    const HEADINGS: &'static [&'static str] =
        &["NAME", "STATE", "CIDR", "ADDRESSES", "GROUPS", "GATEWAY FOR", "ENDPOINT", "PUBLIC KEY", "EXPIRES"];

    fn cells(&self) -> Vec<String> {
        let row = &self.0;
        let endpoint = row.endpoint.as_ref().map(|endpoint| {
            format!("{endpoint} ({})", if row.endpoint_fixed { "set by an operator" } else { "observed" })
        });
        vec![
            row.name.clone(),
            row.state.clone(),
            row.cidr.clone(),
            words(&row.addresses),
            words(&row.groups),
            words(&row.gateway_for),
            endpoint.unwrap_or_default(),
            row.public_key.clone().unwrap_or_default(),
            row.expires_at.clone().unwrap_or_default(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::fixture::{self, name};

    #[test]
    fn a_list_is_in_the_order_of_names() {
        let text = output::table(NodeRow::HEADINGS, rows(&fixture::network()).iter().map(Row::cells));
        assert_snapshot!(text, @r"
        NAME  STATE    CIDR  ADDRESSES                GROUPS  ENDPOINT
        app1  active   app   10.42.2.1 fd42:0:0:2::1  -       -
        db1   invited  db    10.42.3.1 fd42:0:0:3::1  -       -
        web1  active   web   10.42.1.1 fd42:0:0:1::1  front   192.0.2.1:51820
        web2  invited  web   10.42.1.2 fd42:0:0:1::2  -       -
        ");
    }

    #[test]
    fn all_there_is_to_know_of_one_node() {
        let network = fixture::network();
        let show = |node: &str| NodeDetails(NodeRow::of(&network, find(&network, &name(node)).expect("a node")));
        let mut app1 = show("app1");
        app1.0.see(&[(app1.0.id, "198.51.100.7:51820".to_owned())].into());
        assert_snapshot!("node-show", output::lines(&app1));
        assert_snapshot!("node-show-fixed", output::lines(&show("web1")));
        assert_snapshot!("node-show-json", output::json(&app1));
    }

    #[test]
    fn an_unknown_node_gets_the_nearest_name() {
        let network = fixture::network();
        let Err(Failure::Failed(text)) = find(&network, &name("web3")) else { panic!("there is no web3") };
        assert!(text.contains("`web3`") && text.contains("`web1`"), "{text}");
    }

    #[test]
    fn inviting_again_must_not_contradict() {
        let network = fixture::network();
        let invite = |flags: &[&str]| {
            #[derive(clap::Parser)]
            struct Words {
                #[command(flatten)]
                invite: Invite,
            }
            let words = ["invite", "web1"].iter().chain(flags);
            let words = <Words as clap::Parser>::try_parse_from(words).expect("words");
            words.invite.check_against(&network, find(&network, &name("web1")).expect("web1"))
        };
        for same in [&[][..], &["--cidr", "web"], &["--address", "10.42.1.1"], &["--group", "front"]] {
            assert!(invite(same).is_ok(), "{same:?}");
        }
        for (other, word) in [
            (&["--cidr", "app"][..], "`web`"),
            (&["--address", "10.42.1.9"], "10.42.1.1"),
            (&["--group", "back"], "group member add"),
            (&["--gateway-for", "office"], "gateway-for"),
        ] {
            assert!(matches!(invite(other), Err(Failure::Failed(text)) if text.contains(word)), "{other:?}");
        }
    }
}
