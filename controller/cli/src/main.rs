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

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use controller_api::invitation::{Invitation, Secret, Subject};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_teaches_by_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            for argument in command.get_arguments().filter(|argument| !argument.is_global_set()) {
                assert!(argument.get_help().is_some(), "`{path}` does not say what `{}` is", argument.get_id());
            }
            let subcommands: Vec<_> = command.get_subcommands().filter(|sub| sub.get_name() != "help").collect();
            if subcommands.is_empty() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.lines().all(|line| line.chars().count() <= 96), "`{path}` has long lines: {help}");
                assert!(help.contains(&format!("meshctl {path}")), "`{path}` has no example of itself: {help}");
                assert!(command.get_about().is_some(), "`{path}` has no description");
            }
            for sub in subcommands {
                walk(sub, format!("{path} {}", sub.get_name()).trim());
            }
        }
        walk(&Cli::command(), "");
    }

    #[test]
    fn examples_in_the_help_are_accepted() {
        let invitation = Invitation {
            network: fixture::name("corp"),
            subject: Subject::Admin("alice".to_owned()),
            endpoints: vec!["controller.example:7443".to_owned()],
            fingerprint: [1; 32],
            secret: Secret::new([2; 32]),
            expires_at: 1_800_000_000,
        };
        walk(&Cli::command(), &invitation.to_string());

        fn walk(command: &clap::Command, invitation: &str) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines().map(str::trim).filter(|line| line.starts_with("meshctl ")) {
                let line = line.split("  #").next().unwrap_or(line).replace("\"$INVITATION\"", invitation);
                let words: Vec<&str> = line.split_whitespace().collect();
                if let Err(error) = Cli::try_parse_from(&words) {
                    panic!("{line}\n{error}");
                }
            }
            command.get_subcommands().for_each(|sub| walk(sub, invitation));
        }
    }

    /// It holds a secret, which a refused argument would put on the screen and into logs.
    #[tokio::test]
    async fn a_refused_invitation_is_not_echoed() {
        for (line, expected) in
            [("rampart2:secret", "version 2"), ("hello-secret", "rampart1:"), ("rampart1:secret", "cut off")]
        {
            let cli = Cli::try_parse_from(["meshctl", "admin", "join", line]).expect("a line");
            assert!(!format!("{cli:?}").contains("secret"));
            let failure = cli.command.run(&cli.connection).await.expect_err(line);
            assert_eq!(failure.code(), 2);
            let text = failure.text().expect("a reason");
            assert!(text.contains(expected) && !text.contains("secret"), "{text}");
        }
    }

    /// What does not parse is refused before anything is sent, with the value, the reason and the remedy.
    #[test]
    fn bad_words_are_refused_at_the_edge() {
        for (line, expected) in [
            ("cidr add web 10.42.1.1/24", &["10.42.1.1/24", "host bits", "10.42.1.0/24"][..]),
            ("cidr add web 10.42.1.0", &["10.42.1.0", "10.42.1.0/32"]),
            ("cidr add web 10.42.1.0/33", &["10.42.1.0/33"]),
            ("cidr add web 127.0.0.0/8", &["loopback"]),
            ("cidr add Web 10.42.1.0/24", &["Web", "a-z"]),
            ("cidr add web", &["PREFIX"]),
            ("cidr set web", &["--isolated"]),
            ("cidr lsit", &["lsit", "list"]),
            ("node invite web1 --cidr web --expires 1x", &["1x", "1h"]),
            ("node invite web1 --cidr web --expires 0s", &["0s"]),
            ("node invite web1 --cidr web --address 10.42.1.0/24", &["10.42.1.0/24"]),
            ("node invite web1 --cidr web --endpoint https://x", &["https://x", "HOST:PORT"]),
            ("node endpoint web1 example", &["example", "192.0.2.1:51820"]),
            ("node endpoint web1", &["ADDRESS"]),
            ("rule add r --from web --to any --service tcp/80", &["web", "cidr:"]),
            ("rule add r --from cdir:web --to any --service tcp/80", &["cdir:web", "cidr:web"]),
            ("rule add r --from any --to any --service tcp/65536", &["65536", "65535"]),
            ("rule add r --from any --to any --service tcp/20-10", &["tcp/20-10", "reversed", "10-20"]),
            ("rule add r --from any --to any --service tpc/80", &["tpc", "tcp"]),
            ("rule add r --from any --to any", &["--service"]),
            ("rule add r --from any --to any --service any --priority 1000001", &["1000001", "1000000"]),
            ("group add g --member web1", &["web1", "node:"]),
            ("group member add g group:other", &["group:other", "node:"]),
            ("service add web", &["SERVICE"]),
            ("service add web service:other", &["service:other"]),
            ("policy explain 10.42.1.2 10.42.2.2 tcp", &["tcp", "one port"]),
            ("policy explain 10.42.1 10.42.2.2 tcp/80", &["10.42.1", "node:"]),
            ("policy default open", &["open", "lineage"]),
            ("admin invite Alice", &["Alice", "a-z"]),
            ("cidr list -o xml", &["xml", "yaml"]),
            ("audit list --limit 0", &["0"]),
            ("history --limit 0", &["0"]),
            ("policy show --at 0", &["0"]),
            ("status --controller host:0", &["host:0", "65535"]),
        ] {
            let words = std::iter::once("meshctl").chain(line.split_whitespace());
            let error = Cli::try_parse_from(words).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
            let text = error.to_string();
            for part in expected {
                assert!(text.contains(part), "`{line}` does not say `{part}`:\n{text}");
            }
        }
    }

    proptest! {
        /// Breaks if the audit log has words that `meshctl` does not know.
        #[test]
        fn changes_are_what_meshctl_takes(change in ::policy::arbitrary::change()) {
            let line = controller_api::command::describe(&change);
            let asked = !line.starts_with("node join ") && !line.starts_with("node seen ");
            let words = std::iter::once("meshctl").chain(line.split_whitespace());
            let parsed = Cli::try_parse_from(words);
            prop_assert!(!asked || parsed.is_ok(), "{}: {:?}", line, parsed.err());
        }
    }
}
