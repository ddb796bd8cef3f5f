//! `nodectl`: what the node's daemon and kernel say.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use controller_api::time::{ago, timestamp};
use policy::parse_flow_service;
use serde::Serialize;

use super::table::{bytes, loud, table};
use super::{DENIED, DIFFERS, FAILED, UNREACHABLE, colour, fail};
use crate::config::{self, Flags, Interface};
use crate::serve::local::client::{self, AskError};
use crate::view::{Answer, Entry, Explanation, Guard, Peer, PeerState, Policy, Program, Question, Status, Verified};
use host::clock::now;

#[cfg(test)]
mod tests;
mod traffic;

/// Shows what this node does and what its kernel enforces
#[derive(Debug, Parser)]
#[command(
    name = "nodectl",
    version,
    after_help = "Examples:
  nodectl status
  nodectl policy explain 10.42.1.2 10.42.2.2 tcp/8080

Exit status: 0 done, 1 failed, 2 usage, 3 kernel and intent differ, 4 denied, 5 no daemon answers"
)]
struct Cli {
    #[command(subcommand)]
    noun: Noun,
    #[command(flatten)]
    target: Target,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table, value_name = "FORMAT")]
    output: Output,
}

#[derive(Debug, Args)]
struct Target {
    /// Configuration file of the daemon [default: /etc/rampart/node.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// WireGuard interface of the daemon [default: rampart0]
    #[arg(long, short, global = true, value_name = "NAME")]
    interface: Option<Interface>,
    /// Unix socket of the daemon [default: /run/rampart/<interface>.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
    Yaml,
}

#[derive(Debug, Subcommand)]
enum Noun {
    /// Show the node as a whole: who it is, what it enforces, whom it hears
    #[command(after_help = "Example:\n  nodectl status -o json")]
    Status,
    /// Show the peers, their endpoints and traffic, as WireGuard has them
    #[command(after_help = "Example:\n  nodectl peers")]
    Peers,
    /// Show denied packets: who to whom, why, when; the last 1,024, and with --follow each as it comes
    ///
    /// The kernel reports so many a second for each reason; what it did not report is counted and said. Packets that
    /// interfaces emit by themselves (scope) are only counted.
    #[command(after_help = "Examples:
  nodectl drops
  nodectl drops --follow --reason no-rule -o json
  nodectl drops --destination 10.42.3.0/24")]
    Drops(traffic::DropsArguments),
    /// List the flows that the kernel has a record of: who opened them, how they stand, what decided
    ///
    /// Flows that need no record, because every service is allowed both ways, are not in it.
    #[command(after_help = "Examples:\n  nodectl flows --limit 20\n  nodectl flows --address 10.42.1.2")]
    Flows(traffic::FlowsArguments),
    /// Show or explain the policy that the kernel enforces
    #[command(subcommand, after_help = "Example:\n  nodectl policy show")]
    Policy(PolicyVerb),
}

#[derive(Debug, Subcommand)]
enum PolicyVerb {
    /// Read back the kernel's tables: for each pair of cidrs what passes, why, and how much has
    ///
    /// Exit status 3 if the kernel's tables are not what the policy says.
    #[command(after_help = "Example:\n  nodectl policy show -o yaml")]
    Show,
    /// Read every table back from the kernel, rebuild the matrix, and hold it against the policy cell by cell
    ///
    /// The daemon does so by itself at intervals (`verify-interval`). Exit status 3 if they differ; then the cells are
    /// named, and the daemon writes the tables anew.
    #[command(after_help = "Example:\n  nodectl policy verify")]
    Verify,
    /// Ask the kernel's tables, the compiled policy and the controller's interpreter about one flow
    ///
    /// Nothing is counted and nobody is disturbed. Exit status 4 if the flow is denied, 3 if the answers differ.
    #[command(after_help = "Examples:
  nodectl policy explain 10.42.1.2 10.42.2.2 tcp/8080
  nodectl policy explain fd42:0:0:1::2 fd42:0:0:2::2 icmpv6")]
    Explain {
        /// Who opens the flow
        source: IpAddr,
        /// Who is to answer
        destination: IpAddr,
        /// Such as tcp/8080, udp/53, icmp, icmp/8, icmpv6/128, proto/47
        #[arg(value_parser = |text: &str| parse_flow_service(text).map_err(|error| error.to_string()))]
        service: (u8, u16),
    },
}

/// The program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail("nodectl", &error, code(&error)),
    }
}

fn code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<AskError>() {
        Some(AskError::Unreachable { .. } | AskError::Denied { .. } | AskError::Broken { .. } | AskError::Silent) => {
            UNREACHABLE
        }
        _ => FAILED,
    }
}

fn run(cli: &Cli) -> anyhow::Result<u8> {
    let Target { config, interface, socket } = &cli.target;
    let flags =
        Flags { config: config.clone(), interface: interface.clone(), socket: socket.clone(), ..Flags::default() };
    let client = Client { socket: config::load(&flags)?.socket, output: cli.output };
    match &cli.noun {
        Noun::Status => client.show(async |noded| noded.status().await, status, |_| 0),
        Noun::Peers => client.show(
            async |noded| noded.peers().await,
            |peers: &Vec<Peer>| peers_table(peers, now()),
            |peers| differ(peers.iter().any(|peer| peer.state != PeerState::Ok)),
        ),
        Noun::Drops(arguments) => traffic::drops(&client, arguments),
        Noun::Flows(arguments) => traffic::flows(&client, arguments),
        Noun::Policy(PolicyVerb::Show) => client.show(
            async |noded| noded.show_policy().await,
            policy,
            |policy| differ(!policy.differences.is_empty()),
        ),
        Noun::Policy(PolicyVerb::Verify) => {
            client.show(async |noded| noded.verify_policy().await, verified, |verified| differ(!verified.equal))
        }
        Noun::Policy(PolicyVerb::Explain { source, destination, service: (protocol, port) }) => {
            let flow = Question { source: *source, destination: *destination, protocol: *protocol, port: *port };
            client.show(
                async |noded| noded.explain(flow).await,
                explanation,
                |explanation| match explanation {
                    Explanation { agree: false, .. } => DIFFERS,
                    Explanation { allowed: false, .. } => DENIED,
                    _ => 0,
                },
            )
        }
    }
}

fn differ(differs: bool) -> u8 {
    if differs { DIFFERS } else { 0 }
}

struct Client {
    socket: PathBuf,
    output: Output,
}

impl Client {
    fn show<T: Serialize>(
        &self,
        question: impl AsyncFnOnce(&mut client::Client) -> Result<T, AskError>,
        print: impl Fn(&T) -> String,
        code: impl Fn(&T) -> u8,
    ) -> anyhow::Result<u8> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let answer = runtime.block_on(async { question(&mut client::Client::connect(&self.socket).await?).await })?;
        let text = match self.output {
            Output::Table => print(&answer),
            Output::Json => serde_json::to_string_pretty(&answer)?,
            Output::Yaml => serde_yaml_ng::to_string(&answer)?,
        };
        write_out(text.trim_end())?;
        Ok(code(&answer))
    }
}

/// To stdout; a reader that has seen enough is no error.
fn write_out(text: &str) -> std::io::Result<()> {
    use std::io::Write;
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn status(status: &Status) -> String {
    let mut lines = head(status);
    let mut line = |name: &str, value: String| lines.push(format!("{name:<13}{value}"));
    line("addresses", list(&status.addresses));
    line("listen port", status.listen_port.to_string());
    line("public key", status.public_key.clone());
    for program in status.programs.iter().filter(|program| !program.ours) {
        line("also there", other_program(program));
    }
    line("peers", status.peers.to_string());
    line("flow records", status.flow_records.to_string());
    if status.early_drop != "off" {
        line("early drop", status.early_drop.clone());
    }
    for (index, text) in guard(&status.guard).into_iter().enumerate() {
        line(if index == 0 { "guard" } else { "" }, text);
    }
    line("repairs", format!("{} since the daemon started", status.drift_repairs));
    line("certificate", until(status.certificate_expires_at));
    if !status.lacks.is_empty() {
        let features = status.lacks.join(", ");
        line("lacks", loud(&format!("{features}: denied until `noded` is a newer version"), colour()));
    }
    if let Some(error) = &status.error {
        line("error", loud(error, colour()));
    }
    lines.join("\n")
}

/// A line for each interface.
fn guard(guard: &Guard) -> Vec<String> {
    if !guard.enabled {
        return vec!["off".to_owned()];
    }
    let places = guard.attachments.iter().map(|place| {
        let note = place.note.as_ref().map(|note| format!("; {note}")).unwrap_or_default();
        let Some(hook) = &place.hook else {
            return format!("{}: {}{note}", place.interface, loud("not there", colour()));
        };
        let ahead = if place.ahead > 0 { format!(", {} others ahead", place.ahead) } else { String::new() };
        let dropped: Vec<_> = place.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        let dropped = if dropped.is_empty() { "nothing".to_owned() } else { dropped.join(", ") };
        format!("{}: {hook}{ahead}; passed {}, dropped {dropped}{note}", place.interface, place.passed)
    });
    guard.error.iter().map(|error| loud(error, colour())).chain(places).collect()
}

fn other_program(program: &Program) -> String {
    let Program { hook, position, id, name, ours: _ } = program;
    match (name, id) {
        (Some(name), Some(id)) => format!("`{name}` (id {id}) at {hook}, number {position}"),
        (None, Some(id)) => format!("id {id} at {hook}, number {position}"),
        (name, None) => format!("a filter ({}) at {hook}, number {position}", name.as_deref().unwrap_or("of no kind")),
    }
}

/// What `status` and `policy show` begin with.
fn head(status: &Status) -> Vec<String> {
    let up = if status.link_up { "up" } else { "down" };
    let attachment = match &status.attachment {
        Some(attachment) => format!("programs attached by {attachment}"),
        None => loud("programs not attached", colour()),
    };
    let revision = match (status.generation, status.received_revision) {
        (0, _) => "no policy yet: everything is denied".to_owned(),
        (generation, received) if received == status.revision || received == 0 => {
            format!("revision {}, generation {generation}", status.revision)
        }
        (generation, received) => {
            format!("revision {}, generation {generation} (received: {received})", status.revision)
        }
    };
    let controller = &status.controller;
    let reached = match (controller.connected, &controller.error) {
        (true, _) => format!("connected since {}", timestamp(controller.since)),
        (false, Some(error)) => format!("{}: {error}", loud("away", colour())),
        (false, None) => "not connected yet".to_owned(),
    };
    vec![
        format!("{:<13}{}", "network", status.network),
        format!("{:<13}{}", "node", status.node),
        format!(
            "{:<13}{} ({up}), WireGuard in {}, {attachment}",
            "interface",
            status.interface,
            in_words(&status.wireguard)
        ),
        format!("{:<13}{revision}", "policy"),
        format!("{:<13}{reached}", "controller"),
    ]
}

fn in_words(backend: &str) -> &str {
    if backend == "kernel" { "the kernel" } else { backend }
}

fn until(seconds: u64) -> String {
    if seconds == 0 { "-".to_owned() } else { format!("good until {}", timestamp(seconds)) }
}

fn list<T: ToString>(items: &[T]) -> String {
    if items.is_empty() { "-".to_owned() } else { items.iter().map(T::to_string).collect::<Vec<_>>().join(" ") }
}

fn peers_table(peers: &[Peer], now: u64) -> String {
    let rows = peers.iter().map(|peer| {
        let state = match peer.state {
            PeerState::Ok => "ok".to_owned(),
            PeerState::Missing => loud("missing", colour()),
            PeerState::Unknown => loud("not of the policy", colour()),
            PeerState::Differs => loud("differs", colour()),
        };
        [
            peer.name.clone().unwrap_or_else(|| "-".to_owned()),
            peer.endpoint.map_or_else(|| "-".to_owned(), |endpoint| endpoint.to_string()),
            list(&peer.allowed_ips),
            peer.latest_handshake.map_or_else(|| "never".to_owned(), |then| ago(now, then)),
            bytes(peer.received_bytes),
            bytes(peer.sent_bytes),
            peer.public_key.clone(),
            state,
        ]
    });
    table(["NAME", "ENDPOINT", "ALLOWED-IPS", "HANDSHAKE", "RECEIVED", "SENT", "PUBLIC-KEY", "STATE"], rows)
}

fn policy(policy: &Policy) -> String {
    let mut text = head(&policy.status).join("\n");
    text.push_str("\n\n");
    if !policy.differences.is_empty() {
        text.push_str(&loud("KERNEL AND INTENT DIFFER", colour()));
        for difference in &policy.differences {
            text.push_str(&format!("\n  {difference}"));
        }
        text.push_str("\n\n");
    }
    if policy.status.generation == 0 {
        return text;
    }
    let rows = policy.entries.iter().map(|entry: &Entry| {
        let count = |count: Option<u64>| count.map_or_else(|| "\"".to_owned(), |count| count.to_string());
        let services = if entry.services.is_empty() { "-".to_owned() } else { entry.services.join(" ") };
        [
            entry.direction.to_string(),
            entry.source.to_string(),
            entry.destination.to_string(),
            services,
            entry.verdict.clone(),
            entry.decided_by.clone(),
            count(entry.packets),
            count(entry.bytes),
        ]
    });
    text.push_str(&table(
        ["DIRECTION", "SOURCE", "DESTINATION", "SERVICES", "VERDICT", "BY", "PACKETS", "BYTES"],
        rows,
    ));
    text.push_str("\n\nEverything else is denied (no-rule). Replies of allowed flows pass.");
    text
}

fn verified(verified: &Verified) -> String {
    let Verified { equal, revision, generation, prefixes, cells, differences, more } = verified;
    let what = format!("revision {revision}, generation {generation}: {cells} cells and {prefixes} prefixes");
    if *equal {
        return format!("{what} read back, all as the policy says");
    }
    let mut lines = vec![loud("KERNEL AND INTENT DIFFER", colour())];
    lines.extend(differences.iter().map(|difference| format!("  {}", difference.text)));
    if *more > 0 {
        lines.push(format!("  and {more} more"));
    }
    lines.push(format!("{what} read back; the tables are being written anew"));
    lines.join("\n")
}

fn explanation(explanation: &Explanation) -> String {
    let cidr =
        |cidr: &Option<String>| cidr.as_ref().map_or_else(|| "no cidr".to_owned(), |cidr| format!("cidr {cidr}"));
    let mut lines = vec![format!(
        "{} ({}) -> {} ({}) {}",
        explanation.source,
        cidr(&explanation.source_cidr),
        explanation.destination,
        cidr(&explanation.destination_cidr),
        explanation.service
    )];
    for kernel in &explanation.kernel {
        lines.push(format!("{:<26}{}", format!("kernel, {}", kernel.direction), answer(&kernel.answer)));
    }
    if let Some(compiled) = &explanation.compiled {
        lines.push(format!("{:<26}{}", format!("compiled, revision {}", explanation.revision), answer(compiled)));
    }
    let interpreted = &explanation.interpreted;
    let said = match (&interpreted.answer, interpreted.revision, &interpreted.unavailable) {
        (Some(said), Some(revision), _) if revision >= explanation.revision => answer(said),
        (Some(said), Some(_), _) => format!("{} (older than this node's policy: not compared)", answer(said)),
        (_, _, reason) => format!("not asked: {}", reason.as_deref().unwrap_or("-")),
    };
    let who = interpreted
        .revision
        .map_or_else(|| "interpreter".to_owned(), |revision| format!("interpreter, revision {revision}"));
    lines.push(format!("{who:<26}{said}"));
    lines.push(match explanation.agree {
        true => "all agree".to_owned(),
        false => loud("KERNEL AND INTENT DIFFER", colour()),
    });
    lines.join("\n")
}

fn answer(answer: &Answer) -> String {
    let verdict = if answer.allowed { "allow" } else { "deny" };
    match &answer.rule {
        Some(rule) => format!("{verdict} ({} {rule})", answer.reason),
        None => format!("{verdict} ({})", answer.reason),
    }
}
