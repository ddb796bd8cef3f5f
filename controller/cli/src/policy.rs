//! `meshctl policy …`

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use clap::{Args, Subcommand};
use policy::{
    Change, CidrName, DefaultPolicy, Flow, Matrix, Network, NodeName, Revision, interpret, parse_flow_service, protocol,
};
use serde::Serialize;

use crate::connection::revision;
use crate::matrix::{Table, VerdictText};
use crate::output::{self, OutputArgs, unknown};
use crate::{Failure, Session};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show which cidr may open what to which
    #[command(after_help = "\
Examples:
  meshctl policy show
  meshctl policy show --from web --to app -o yaml
  meshctl policy show --at 120   # as it was; `meshctl history` lists the revisions")]
    Show(Show),
    /// Say what happens to a flow, and why
    #[command(after_help = "\
Examples:
  meshctl policy explain 10.42.1.2 10.42.2.2 tcp/8080
  meshctl policy explain node:web1 node:app1 icmp
  meshctl policy explain node:web1 node:app1 tcp/8080 --at 120   # by the policy of then

The interpreter and the compiled matrix are both asked; exit status 3 if they ever differ.")]
    Explain(Explain),
    /// Set what happens to flows that no rule speaks of
    #[command(after_help = "\
Examples:
  meshctl policy default deny
  meshctl policy default lineage   # a cidr reaches itself, its ancestors and its descendants")]
    Default {
        /// `lineage` or `deny`
        default: DefaultPolicy,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// Only from these cidrs
    #[arg(long, value_name = "CIDR", num_args = 1..)]
    from: Vec<CidrName>,
    /// Only to these cidrs
    #[arg(long, value_name = "CIDR", num_args = 1..)]
    to: Vec<CidrName>,
    #[command(flatten)]
    past: Past,
    #[command(flatten)]
    output: OutputArgs,
}

/// Of which policy it is asked.
#[derive(Clone, Copy, Debug, Args)]
struct Past {
    /// As it was at this revision; `meshctl history` lists them
    #[arg(long, value_name = "REVISION", value_parser = revision)]
    at: Option<u64>,
}

impl Past {
    async fn network(self, session: &mut Session) -> Result<(Revision, Network), Failure> {
        session.network_at(self.at.map(Revision)).await
    }
}

#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// Who opens: an address, or `node:NAME`
    source: End,
    /// To whom: an address, or `node:NAME`
    destination: End,
    /// One port or type: `tcp/8080`, `udp/53`, `icmp` (ping, in either family), `icmp/13`, `proto/47`
    #[arg(value_parser = FlowService::from_str)]
    service: FlowService,
    #[command(flatten)]
    past: Past,
    #[command(flatten)]
    output: OutputArgs,
}

impl Command {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        match self {
            Self::Show(Show { from, to, past, output: OutputArgs { format } }) => {
                let (revision, network) = past.network(session).await?;
                for name in from.iter().chain(&to) {
                    if network.cidr_named(name).is_none() {
                        return Err(unknown("cidr", name, network.cidrs().values().map(|cidr| &cidr.name)));
                    }
                }
                let matrix = compile(&network)?;
                let table = Table::of(&network, &matrix, revision, &from, &to);
                output::print(&table, format, || table.text())
            }
            Self::Explain(explain) => {
                let (revision, network) = explain.past.network(session).await?;
                explain.run(&network, revision)
            }
            Self::Default { default } => {
                session.change(Change::SetDefault(default), format!("default set to {default}")).await
            }
        }
    }
}

fn compile(network: &Network) -> Result<Matrix, Failure> {
    Matrix::compile(network).map_err(Failure::failed)
}

impl Explain {
    fn run(self, network: &Network, revision: Revision) -> Result<(), Failure> {
        let flows = self.flows(network)?;
        let matrix = compile(network)?;
        let answers: Vec<_> = flows.iter().map(|flow| Answer::of(network, &matrix, revision, flow)).collect();
        output::print(&answers, self.output.format, || {
            answers.iter().map(Answer::text).collect::<Vec<_>>().join("\n\n")
        })?;
        match answers.iter().find(|answer| !answer.agree) {
            None if answers.iter().any(|answer| answer.verdict.is_denied()) => Err(Failure::DeniedFlow),
            None => Ok(()),
            Some(answer) => Err(Failure::Difference(format!(
                "interpreter and compiled matrix differ on `{}`: this is a bug; please report it with `meshctl policy explain -o json`",
                answer.flow
            ))),
        }
    }

    /// One flow, or one for each family that two nodes share.
    fn flows(&self, network: &Network) -> Result<Vec<Flow>, Failure> {
        let Self { source, destination, service, past: _, output: _ } = self;
        let (sources, destinations) = (source.addresses(network)?, destination.addresses(network)?);
        let flows: Vec<Flow> = sources
            .iter()
            .flat_map(|source| destinations.iter().map(move |destination| (*source, *destination)))
            .filter(|(source, destination)| source.is_ipv4() == destination.is_ipv4())
            .map(|(source, destination)| {
                let FlowService { protocol, port } = service.in_family(&source);
                Flow { source, destination, protocol, port }
            })
            .collect();
        if flows.is_empty() {
            return Err(Failure::usage(format!(
                "`{source}` and `{destination}` have no address family in common; choose two of one family"
            )));
        }
        Ok(flows)
    }
}

/// An end of a flow, as typed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Address(IpAddr),
    Node(NodeName),
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("node:") {
            Some(name) => name.parse().map(Self::Node).map_err(|error: policy::NameError| error.to_string()),
            None => text.parse().map(Self::Address).map_err(|_| {
                format!("`{text}` is not an address; write one like `10.42.1.2` or `fd42:0:0:1::2`, or `node:NAME`")
            }),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Node(name) => write!(f, "node:{name}"),
        }
    }
}

impl End {
    fn addresses(&self, network: &Network) -> Result<Vec<IpAddr>, Failure> {
        match self {
            Self::Address(address) => Ok(vec![*address]),
            Self::Node(name) => match network.node_named(name) {
                Some(node) => Ok(node.addresses.iter().collect()),
                None => Err(unknown("node", name, network.nodes().values().map(|node| &node.name))),
            },
        }
    }
}

/// The service of one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FlowService {
    protocol: u8,
    port: u16,
}

impl FlowService {
    const PING: Self = Self { protocol: protocol::ICMP, port: 8 };
    const PING6: Self = Self { protocol: protocol::ICMPV6, port: 128 };

    /// A ping is one in either family.
    fn in_family(self, address: &IpAddr) -> Self {
        match (self == Self::PING || self == Self::PING6, address) {
            (true, IpAddr::V4(_)) => Self::PING,
            (true, IpAddr::V6(_)) => Self::PING6,
            (false, _) => self,
        }
    }
}

impl FromStr for FlowService {
    type Err = policy::ServiceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_flow_service(text).map(|(protocol, port)| Self { protocol, port })
    }
}

#[derive(Debug, Serialize)]
struct Answer {
    flow: String,
    revision: u64,
    source: String,
    destination: String,
    source_cidr: Option<String>,
    destination_cidr: Option<String>,
    #[serde(flatten)]
    verdict: VerdictText,
    /// What the compiled matrix says.
    compiled: VerdictText,
    agree: bool,
    #[serde(skip)]
    explanation: String,
}

impl Answer {
    fn of(network: &Network, matrix: &Matrix, revision: Revision, flow: &Flow) -> Self {
        let (interpreted, compiled) = (interpret(network, flow), matrix.verdict(flow));
        let cidr = |address| network.cidr_of(address).map(|cidr| cidr.name.to_string());
        Self {
            flow: flow.to_string(),
            revision: revision.0,
            source: flow.source.to_string(),
            destination: flow.destination.to_string(),
            source_cidr: cidr(flow.source),
            destination_cidr: cidr(flow.destination),
            verdict: VerdictText::of(network, &interpreted),
            compiled: VerdictText::of(network, &compiled),
            agree: interpreted == compiled,
            explanation: policy::explain(network, flow).to_string(),
        }
    }

    fn text(&self) -> String {
        let agreement = match self.agree {
            true => "agrees".to_owned(),
            false => format!("DIFFERS: {}", self.compiled),
        };
        format!("{}\n{:<12} {agreement}", self.explanation.trim_end(), "compiled")
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::fixture;

    fn explain(words: &[&str]) -> Explain {
        #[derive(clap::Parser)]
        struct Words {
            #[command(flatten)]
            explain: Explain,
        }
        let words = std::iter::once(&"explain").chain(words);
        <Words as clap::Parser>::try_parse_from(words).expect("words").explain
    }

    fn answers(words: &[&str]) -> Vec<Answer> {
        let network = fixture::network();
        let matrix = compile(&network).expect("a matrix");
        let flows = explain(words).flows(&network).expect("flows");
        flows.iter().map(|flow| Answer::of(&network, &matrix, Revision(7), flow)).collect()
    }

    #[test]
    fn a_flow_is_explained_by_both() {
        let mut said = Vec::new();
        for (words, verdict) in [
            (["10.42.1.1", "10.42.2.1", "tcp/8080"], "allow (rule web-to-app)"),
            (["10.42.1.2", "10.42.2.1", "tcp/8080"], "deny (rule no-web2)"),
            (["10.42.1.1", "10.42.3.1", "tcp/5432"], "deny (no-rule)"),
            (["fd42:0:0:1::1", "fd42:0:0:2::1", "icmpv6"], "allow (rule web-to-app)"),
            (["10.43.0.1", "10.42.3.1", "tcp/5432"], "deny (unknown-source)"),
        ] {
            let [answer] = &answers(&words)[..] else { panic!("one flow") };
            assert_eq!((answer.verdict.to_string(), answer.agree), (verdict.to_owned(), true), "{words:?}");
            assert!(answer.text().contains("agrees"), "{}", answer.text());
            said.push(format!("==> {}\n{}", words.join(" "), answer.text()));
        }
        assert_snapshot!("policy-explain", said.join("\n\n"));
    }

    #[test]
    fn two_nodes_are_explained_in_each_family() {
        let answers = answers(&["node:web1", "node:app1", "tcp/8080"]);
        let flows: Vec<_> = answers.iter().map(|answer| answer.flow.as_str()).collect();
        assert_eq!(flows, ["10.42.1.1 -> 10.42.2.1 tcp/8080", "fd42:0:0:1::1 -> fd42:0:0:2::1 tcp/8080"]);
        assert_snapshot!("policy-explain-json", output::json(&answers));
        assert_eq!(serde_json::to_value(&answers[0]).expect("JSON")["rule"], "web-to-app");
        let pings = super::tests::answers(&["node:web1", "node:app1", "icmp"]);
        assert!(pings[0].flow.ends_with("icmp/8") && pings[1].flow.ends_with("icmpv6/128"), "{pings:?}");
    }

    #[test]
    fn ends_that_make_no_flow_are_refused() {
        let network = fixture::network();
        let error = explain(&["10.42.1.1", "fd42:0:0:2::1", "tcp/1"]).flows(&network).expect_err("two families");
        assert!(matches!(error, Failure::Usage(text) if text.contains("family")));
        let error = explain(&["node:web9", "10.42.1.1", "tcp/1"]).flows(&network).expect_err("no such node");
        assert!(matches!(error, Failure::Failed(text) if text.contains("`web9`") && text.contains("`web1`")));
    }
}
