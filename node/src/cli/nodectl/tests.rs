//! What `nodectl` prints, word for word: `snapshots/`.

use std::io;

use clap::CommandFactory;
use insta::assert_snapshot;

use super::*;
use crate::view::{example, verified::Differing};

/// Columns of a help text, whatever the terminal.
const WIDTH: usize = 100;

fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string_pretty(value).unwrap()
}

#[test]
fn the_command_line_is_sound_and_each_verb_has_an_example() {
    fn check(command: &clap::Command) {
        for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
            assert!(
                verb.get_after_help().is_some_and(|help| help.to_string().contains("Example")),
                "{}",
                verb.get_name()
            );
            check(verb);
        }
    }
    let mut command = Cli::command();
    command.build();
    command.clone().debug_assert();
    check(&command);
}

/// The options of the whole program are printed once.
#[test]
fn the_help_of_each_command() {
    fn write(command: &clap::Command, text: &mut String) {
        let own = |argument: clap::Arg| if argument.is_global_set() { argument.hide(true) } else { argument };
        let help = command.clone().mut_args(own).render_long_help().to_string();
        text.push_str(&format!("==> {}\n", command.get_bin_name().unwrap_or("nodectl")));
        help.lines().for_each(|line| text.push_str(&format!("{}\n", line.trim_end())));
        text.push('\n');
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            write(sub, text);
        }
    }
    let mut command = Cli::command().term_width(WIDTH);
    command.build();
    assert_snapshot!("help", command.render_long_help());
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
        let mut text = String::new();
        write(sub, &mut text);
        assert_snapshot!(format!("help-{}", sub.get_name()), text);
    }
}

#[test]
fn bad_words_are_usage_errors_that_name_them() {
    let mut said = String::new();
    for (words, part) in [
        (&["policy", "explain", "10.0.0.1", "10.0.0.2", "tcp/70000"][..], "70000"),
        (&["policy", "explain", "10.0.0.300", "10.0.0.2", "tcp/1"], "10.0.0.300"),
        (&["peers", "-o", "xml"], "xml"),
        (&["drops", "--reason", "whim"], "no-rule"),
        (&["drops", "--reason", "rule"], "no-rule"),
        (&["drops", "--source", "10.42.1.0/33"], "10.42.1.0/33"),
        (&["flows", "--limit", "0"], "0"),
        (&["flows", "--limit", "-1"], "-1"),
        (&["flows", "--address", "web"], "web"),
    ] {
        let command = Cli::command().term_width(WIDTH);
        let error = command.try_get_matches_from([&["nodectl"], words].concat()).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(part), "{error}");
        said.push_str(&format!("==> nodectl {}\n{error}\n", words.join(" ")));
    }
    assert_snapshot!("usage-errors", said);
}

#[test]
fn errors_name_the_socket_and_the_remedy() {
    let path = || PathBuf::from("/run/rampart/rampart0.sock");
    let errors = [
        AskError::Unreachable { path: path(), source: io::Error::from(io::ErrorKind::NotFound) },
        AskError::Denied { path: path() },
        AskError::Broken { path: path(), reason: "connection reset".to_owned() },
        AskError::Silent,
        AskError::Older { question: "ShowPolicy" },
        AskError::Answered { code: tonic::Code::FailedPrecondition, text: "this node has no policy yet".to_owned() },
    ];
    let said: Vec<String> = errors
        .into_iter()
        .map(|error| {
            let error = anyhow::Error::from(error);
            format!("{} nodectl: {error:#}", code(&error))
        })
        .collect();
    assert_snapshot!("errors", said.join("\n").replace(env!("CARGO_PKG_VERSION"), "VERSION"));
}

#[test]
fn the_status() {
    assert_snapshot!("status", status(&example::status()));
    assert_snapshot!("status-fresh", status(&example::fresh_status()));
    assert_snapshot!("status-json", json(&example::status()));
}

#[test]
fn the_peers() {
    assert_snapshot!("peers", peers_table(&example::peers(), example::NOW));
    assert_snapshot!("peers-none", peers_table(&[], example::NOW));
    assert_snapshot!("peers-json", json(&example::peers()));
}

#[test]
fn the_policy_in_force() {
    assert_snapshot!("policy", policy(&example::policy()));
    let fresh = Policy { status: example::fresh_status(), differences: Vec::new(), entries: Vec::new() };
    assert_snapshot!("policy-none", policy(&fresh));
    assert_snapshot!("policy-json", json(&example::policy()));
}

#[test]
fn what_was_verified() {
    let found = example::verified();
    assert_snapshot!("verified", verified(&found));
    assert_snapshot!("verified-json", json(&found));
    let none: Vec<Differing> = Vec::new();
    assert_snapshot!("verified-equal", verified(&Verified { equal: true, differences: none, more: 0, ..found }));
}

#[test]
fn an_explanation_says_who_says_what() {
    let example = example::explanation();
    assert_snapshot!("explanation", explanation(&example));
    assert_snapshot!("explanation-json", json(&example));
    assert_snapshot!("explanation-differs", explanation(&example::contradiction()));
    let text = serde_yaml_ng::to_string(&example).unwrap();
    assert_snapshot!("explanation-yaml", text);
    assert_eq!(serde_yaml_ng::from_str::<Explanation>(&text).unwrap(), example);
}
