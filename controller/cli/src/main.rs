//! `meshctl`: what an admin types. Words become policy types here, before anything is sent; the controller's answers become
//! tables, JSON or YAML.
//!
//! One module per noun. Data goes to stdout, talk to stderr.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use controller_api::ConvertError;
use controller_api::client::ConnectError;
use tonic::{Code, Status};

mod admin;
mod audit;
mod cidr;
mod completion;
mod connection;
mod group;
mod history;
mod identity;
mod matrix;
mod node;
mod output;
mod policy;
mod rule;
mod service;
mod status;
mod time;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

use connection::{ConnectionArgs, Session};

/// Manages the networks of a Rampart controller.
#[derive(Debug, Parser)]
#[command(
    name = "meshctl",
    version,
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "\
Examples:
  meshctl cidr add web 10.42.1.0/24 fd42:0:0:1::/64
  meshctl node invite web1 --cidr web --expires 1h
  meshctl rule add web-to-app --from cidr:web --to cidr:app --service tcp/8080
  meshctl policy show
  meshctl policy explain node:web1 node:app1 tcp/8080

Exit status: 0 done, 1 failed, 2 usage, 3 difference found, 4 denied, 5 controller unreachable."
)]
struct Cli {
    #[command(flatten)]
    connection: ConnectionArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The named prefixes that form the network's trees
    #[command(subcommand)]
    Cidr(cidr::Command),
    /// The machines of the mesh
    #[command(subcommand)]
    Node(node::Command),
    /// Sets of nodes and cidrs, for rules to name
    #[command(subcommand)]
    Group(group::Command),
    /// Named sets of protocols and ports
    #[command(subcommand)]
    Service(service::Command),
    /// Who may, or may not, open what to whom
    #[command(subcommand)]
    Rule(rule::Command),
    /// What the rules come to
    #[command(subcommand)]
    Policy(policy::Command),
    /// Which nodes are connected, and which revision each enforces
    Status(status::Arguments),
    /// Who changed what
    #[command(subcommand)]
    Audit(audit::Command),
    /// The revisions of the policy: when, who and what
    History(history::Arguments),
    /// Who may use this tool from elsewhere
    #[command(subcommand)]
    Admin(admin::Command),
    /// Print what a shell needs to complete commands and options
    Completion(completion::Arguments),
}

impl Command {
    async fn run(self, connection: &ConnectionArgs) -> Result<(), Failure> {
        let command = match self {
            Self::Admin(admin::Command::Join(join)) => return admin::join(join, connection).await,
            Self::Completion(arguments) => return arguments.run(),
            command => command,
        };
        let mut session = Session::open(connection).await?;
        match command {
            Self::Cidr(command) => command.run(&mut session).await,
            Self::Node(command) => command.run(&mut session).await,
            Self::Group(command) => command.run(&mut session).await,
            Self::Service(command) => command.run(&mut session).await,
            Self::Rule(command) => command.run(&mut session).await,
            Self::Policy(command) => command.run(&mut session).await,
            Self::Status(arguments) => arguments.run(&mut session).await,
            Self::Audit(command) => command.run(&mut session).await,
            Self::History(arguments) => arguments.run(&mut session).await,
            Self::Admin(command) => command.run(&mut session).await,
            // It needs no session, and was taken care of before there was one.
            Self::Completion(_) => Ok(()),
        }
    }
}

/// How a command ends other than well: the exit status and the one text that is printed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// 1.
    Failed(String),
    /// 2: the words do not make sense together.
    Usage(String),
    /// 3: two things that must be equal are not.
    Difference(String),
    /// 4.
    Denied(String),
    /// 4: the answer has been printed, and it is that a flow is denied.
    DeniedFlow,
    /// 5.
    Unreachable(String),
    /// Whoever read our output has gone: nothing to say, and nothing went wrong.
    Gone,
}

impl Failure {
    pub(crate) fn failed(text: impl ToString) -> Self {
        Self::Failed(text.to_string())
    }

    pub(crate) fn usage(text: impl ToString) -> Self {
        Self::Usage(text.to_string())
    }

    fn text(&self) -> Option<&str> {
        match self {
            Self::Failed(text)
            | Self::Usage(text)
            | Self::Difference(text)
            | Self::Denied(text)
            | Self::Unreachable(text) => Some(text),
            Self::DeniedFlow | Self::Gone => None,
        }
    }

    fn code(&self) -> u8 {
        match self {
            Self::Gone => 0,
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Difference(_) => 3,
            Self::Denied(_) | Self::DeniedFlow => 4,
            Self::Unreachable(_) => 5,
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let text = with_sources(&error);
        match error {
            ConnectError::Unreachable { .. } | ConnectError::Socket { .. } => Self::Unreachable(text),
            ConnectError::SocketDenied { .. } | ConnectError::Refused { .. } => Self::Denied(text),
            ConnectError::NoEndpoint | ConnectError::Endpoint(_) => Self::Usage(text),
            ConnectError::OtherAuthority { .. } | ConnectError::Untrusted { .. } | ConnectError::Tls(_) => {
                Self::Failed(text)
            }
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let text = status.message().to_owned();
        match status.code() {
            Code::PermissionDenied | Code::Unauthenticated => Self::Denied(text),
            Code::Unavailable => Self::Unreachable(format!("controller went away: {text}; try again")),
            Code::DeadlineExceeded | Code::Cancelled => Self::Unreachable(
                "controller did not answer in time; a change may have been made all the same: look before you try again".to_owned(),
            ),
            Code::Unimplemented => {
                Self::Failed("controller does not know this request; bring `meshctl` and `controllerd` to one version".to_owned())
            }
            code if text.is_empty() => Self::Failed(format!("controller failed: {}", code.description())),
            _ => Self::Failed(text),
        }
    }
}

impl From<ConvertError> for Failure {
    fn from(error: ConvertError) -> Self {
        Self::Failed(with_sources(&error))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::Gone,
            _ => Self::Failed(format!("cannot write: {error}")),
        }
    }
}

/// An error with its causes, each once.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // To stdout when help was asked for, to stderr otherwise.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(cli.command.run(&cli.connection)),
        Err(error) => Err(Failure::failed(format!("cannot start: {error}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(text) = failure.text() {
                complain("error", "31", text);
            }
            ExitCode::from(failure.code())
        }
    }
}

/// Says that something was done.
pub(crate) fn say(text: impl AsRef<str>) {
    let _ = writeln!(io::stderr(), "{}", text.as_ref());
}

/// Says something that should be looked at.
pub(crate) fn warn(text: impl AsRef<str>) {
    complain("warning", "33", text.as_ref());
}

/// In colour on a terminal, unless NO_COLOR says otherwise.
fn complain(label: &str, colour: &str, text: &str) {
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let label = if colours { format!("\x1b[1;{colour}m{label}:\x1b[0m") } else { format!("{label}:") };
    let _ = writeln!(io::stderr(), "{label} {text}");
}
