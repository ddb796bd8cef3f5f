//! `meshctl service …`

use clap::Subcommand;
use policy::{Change, NamedService, Network, Rule, Service, ServiceName, ServiceRef};
use serde::Serialize;

use crate::output::{self, OutputArgs, Row, words};
use crate::{Failure, Session};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Name a set of protocols and ports, for rules to use as `service:NAME`
    #[command(after_help = "\
Examples:
  meshctl service add web tcp/80,443 udp/443
  meshctl service add ping icmp/8 icmpv6/128")]
    Add {
        /// Its name
        name: ServiceName,
        /// `any`, `tcp/443`, `udp/1000-2000`, `tcp/80,443`, `icmp/8`, `icmpv6/128`, `proto/47`
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<Service>,
    },
    /// List the named services
    #[command(after_help = "Example:\n  meshctl service list")]
    List(OutputArgs),
    /// Delete a named service that no rule uses
    #[command(after_help = "Example:\n  meshctl service delete web")]
    Delete {
        /// Its name
        name: ServiceName,
    },
}

impl Command {
    pub(crate) async fn run(self, session: &mut Session) -> Result<(), Failure> {
        match self {
            Self::Add { name, services } => {
                let done = format!("service `{name}` added");
                session.change(Change::AddService { name, services }, done).await
            }
            Self::List(OutputArgs { format }) => {
                let (_, network) = session.network().await?;
                output::list(&rows(&network), format)
            }
            Self::Delete { name } => {
                let done = format!("service `{name}` deleted");
                session.change(Change::DeleteService { name }, done).await
            }
        }
    }
}

#[derive(Debug, Serialize)]
struct ServiceRow {
    id: u32,
    name: String,
    services: Vec<String>,
    /// Rules that name it.
    rules: Vec<String>,
}

impl ServiceRow {
    fn of(network: &Network, service: &NamedService) -> Self {
        let NamedService { id, name, services } = service;
        let names = |rule: &&Rule| rule.services.contains(&ServiceRef::Named(*id));
        Self {
            id: id.0,
            name: name.to_string(),
            services: services.iter().map(Service::to_string).collect(),
            rules: network.rules().values().filter(names).map(|rule| rule.name.to_string()).collect(),
        }
    }
}

/// By name.
fn rows(network: &Network) -> Vec<ServiceRow> {
    let mut rows: Vec<_> = network.services().values().map(|service| ServiceRow::of(network, service)).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}

impl Row for ServiceRow {
    const HEADINGS: &'static [&'static str] = &["NAME", "SERVICES", "RULES"];

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone(), words(&self.services), words(&self.rules)]
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::fixture;

    #[test]
    fn a_service_shows_what_it_stands_for_and_who_names_it() {
        let text = output::table(ServiceRow::HEADINGS, rows(&fixture::network()).iter().map(Row::cells));
        assert_snapshot!(text, @r"
        NAME  SERVICES           RULES
        ping  icmp/8 icmpv6/128  web-to-app
        ");
    }
}
