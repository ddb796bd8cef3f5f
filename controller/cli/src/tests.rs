//! The command line as a whole, and what is printed of it word for word: `snapshots/`.

use clap::CommandFactory as _;
use controller_api::invitation::{Invitation, Secret, Subject};
use insta::assert_snapshot;
use proptest::prelude::*;

use super::*;

/// The command, as wide on every terminal and without what the environment says.
fn command() -> clap::Command {
    Cli::command().term_width(100).mut_args(|argument| argument.hide_env_values(true))
}

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

/// The options of the whole program are printed once.
#[test]
fn the_help_of_each_command() {
    fn write(command: &clap::Command, text: &mut String) {
        let own = |argument: clap::Arg| if argument.is_global_set() { argument.hide(true) } else { argument };
        let help = command.clone().mut_args(own).render_long_help().to_string();
        text.push_str(&format!("==> {}\n", command.get_bin_name().unwrap_or("meshctl")));
        help.lines().for_each(|line| text.push_str(&format!("{}\n", line.trim_end())));
        text.push('\n');
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            write(sub, text);
        }
    }
    let mut command = command();
    command.build();
    assert_snapshot!("help", command.render_long_help());
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let mut text = String::new();
        write(sub, &mut text);
        assert_snapshot!(format!("help-{}", sub.get_name()), text);
    }
}

#[test]
fn failures_have_a_text_and_an_exit_status() {
    let path = || std::path::PathBuf::from("/run/rampart/controller.sock");
    let failures = [
        Failure::from(ConnectError::NoEndpoint),
        ConnectError::Unreachable { attempts: "`192.0.2.1:7443` refused the connection".to_owned() }.into(),
        ConnectError::Socket { path: path(), reason: "it does not exist".to_owned() }.into(),
        ConnectError::SocketDenied { path: path() }.into(),
        ConnectError::OtherAuthority { endpoint: "192.0.2.1:7443".to_owned() }.into(),
        ConnectError::Refused { endpoint: "192.0.2.1:7443".to_owned(), reason: "it has been revoked" }.into(),
        ConnectError::Untrusted { endpoint: "192.0.2.1:7443".to_owned(), reason: "TLS failed".to_owned() }.into(),
        Status::permission_denied("admin `alice` may only read").into(),
        Status::unavailable("connection reset").into(),
        Status::deadline_exceeded("").into(),
        Status::unimplemented("").into(),
        Status::internal("").into(),
        Status::failed_precondition("node `web1` is not active").into(),
        ConvertError::Missing { field: "cidr.prefixes" }.into(),
        output::unknown("node", &fixture::name::<::policy::NodeName>("web3"), [&fixture::name("web1")]),
        Failure::DeniedFlow,
        io::Error::from(io::ErrorKind::BrokenPipe).into(),
        io::Error::from(io::ErrorKind::StorageFull).into(),
    ];
    let said: Vec<_> = failures.iter().map(|one| format!("{} {}", one.code(), one.text().unwrap_or("-"))).collect();
    assert_snapshot!("failures", said.join("\n"));
}

/// What does not parse is refused before anything is sent, with the value, the reason and the remedy.
#[test]
fn bad_words_are_refused_at_the_edge() {
    let mut said = String::new();
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
        let error = command().try_get_matches_from(words).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
        let text = error.to_string();
        said.push_str(&format!("==> meshctl {line}\n{text}\n"));
        for part in expected {
            assert!(text.contains(part), "`{line}` does not say `{part}`:\n{text}");
        }
    }
    assert_snapshot!("usage-errors", said);
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
