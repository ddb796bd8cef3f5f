//! `nodectl drops` and `nodectl flows`: what was denied, and what lives.

use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use clap::Args;
use controller_api::time::short;
use ebpf_common::{reason, underlay};
use ipnet::IpNet;
use tokio::time::interval;

use super::super::table::{bytes, loud, table};
use super::super::{UNREACHABLE, colour};
use super::{Client, Output};
use crate::serve::local::client;
use crate::view::{DropFilter, DropRecord, Drops, Event, FlowFilter, Flows, LiveFlow, Suppressed};

/// Flows shown where no number is given: more than anybody reads, less than slows a terminal.
const FLOWS: usize = 1_000;
/// How often a reader that has gone is looked for while nothing is to be written.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(super) struct DropsArguments {
    /// Go on with each as it comes, until interrupted; with `-o json` one object a line
    #[arg(long, short)]
    follow: bool,
    /// Only those denied for this reason, such as no-rule, or wrong-mac of the guard's
    #[arg(long, value_name = "REASON", value_parser = parse_reason)]
    reason: Option<String>,
    /// Only those from this address or prefix
    #[arg(long, value_name = "PREFIX", value_parser = parse_prefix)]
    source: Option<IpNet>,
    /// Only those to this address or prefix
    #[arg(long, value_name = "PREFIX", value_parser = parse_prefix)]
    destination: Option<IpNet>,
}

#[derive(Debug, Args)]
pub(super) struct FlowsArguments {
    /// Only those with an end in this address or prefix
    #[arg(long, value_name = "PREFIX", value_parser = parse_prefix)]
    address: Option<IpNet>,
    /// The most that are shown
    #[arg(long, value_name = "NUMBER", default_value_t = FLOWS as u64, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
}

fn parse_reason(text: &str) -> Result<String, String> {
    // Packets of `scope` are never reported.
    let reported = reason::ALL.iter().filter(|(number, _, passes)| !passes && *number != reason::SCOPE);
    let guards = underlay::reason::ALL.iter().filter(|(_, _, passes)| !passes);
    let names: Vec<_> = reported.chain(guards).map(|(_, name, _)| *name).collect();
    if names.contains(&text) {
        return Ok(text.to_owned());
    }
    Err(format!("no packet is reported as denied for this; reasons are {}", names.join(", ")))
}

fn parse_prefix(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse().or_else(|_| address()).map_err(|_| "neither an address nor a prefix such as 10.42.1.0/24".to_owned())
}

pub(super) fn drops(client: &Client, arguments: &DropsArguments) -> anyhow::Result<u8> {
    let DropsArguments { follow, reason, source, destination } = arguments;
    let filter = DropFilter { reason: reason.clone(), source: *source, destination: *destination };
    if *follow {
        return follow_drops(&client.socket, client.output, filter);
    }
    client.show(async |noded| noded.list_drops(filter).await, drops_table, |_| 0)
}

fn drops_table(drops: &Drops) -> String {
    let rows = drops.drops.iter().map(cells);
    let mut lines = vec![table(HEAD, rows)];
    let what = if drops.forgotten == 1 { "one is" } else { "ones are" };
    if drops.forgotten > 0 {
        lines.push(format!("{} older {what} no longer remembered", drops.forgotten));
    }
    if !drops.suppressed.is_empty() {
        lines.push(loud(&suppressed_line(&drops.suppressed), colour()));
    }
    lines.join("\n")
}

fn suppressed_line<'a>(suppressed: impl IntoIterator<Item = &'a Suppressed>) -> String {
    let counts: Vec<_> = suppressed.into_iter().map(|one| format!("{} {}", one.events, one.reason)).collect();
    format!("denied but not reported, too many at a time: {}", counts.join(", "))
}

const HEAD: [&str; 10] =
    ["TIME", "DIRECTION", "INTERFACE", "SOURCE", "DESTINATION", "SERVICE", "CIDRS", "REASON", "RULE", "REVISION"];
/// Least widths of the columns of lines that come one by one: enough for IPv4; longer ones push the rest to the right.
const WIDTHS: [usize; 10] = [27, 9, 9, 21, 15, 11, 23, 16, 16, 8];

fn cells(event: &Event) -> [String; 10] {
    let source = match event.source_port {
        Some(port) => SocketAddr::new(event.source, port).to_string(),
        None => event.source.to_string(),
    };
    [
        event.time.clone(),
        event.direction.to_string(),
        event.interface.clone(),
        source,
        event.destination.to_string(),
        event.service.clone(),
        cidrs(event.source_cidr.as_deref(), event.destination_cidr.as_deref()),
        event.reason.clone(),
        event.rule.clone().unwrap_or_else(|| "-".to_owned()),
        event.revision.map_or_else(|| "-".to_owned(), |revision| revision.to_string()),
    ]
}

fn cidrs(source: Option<&str>, destination: Option<&str>) -> String {
    format!("{}>{}", source.unwrap_or("-"), destination.unwrap_or("-"))
}

fn padded(cells: &[String; 10]) -> String {
    let line: Vec<_> = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:<width$}")).collect();
    line.join("  ").trim_end().to_owned()
}

/// A record as one who reads along sees it.
fn line(record: &DropRecord) -> String {
    match record {
        DropRecord::Drop(event) => padded(&cells(event)),
        DropRecord::Suppressed(Suppressed { reason, events, since_last: None }) => {
            format!("-- denied but not reported before, too many at a time: {events} {reason}")
        }
        DropRecord::Suppressed(Suppressed { reason, events, since_last: Some(new) }) => {
            format!("-- denied but not reported, too many at a time: {new} {reason} ({events} in all)")
        }
        DropRecord::Forgotten { events } => format!("-- {events} older no longer remembered"),
        DropRecord::Missed { records } => format!("-- {records} records missed: they came faster than they were read"),
    }
}

fn follow_drops(socket: &Path, output: Output, filter: DropFilter) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut following = client::Client::connect(socket).await?.follow_drops(filter).await?;
        let mut interrupted = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        let mut look = interval(LOOK);
        let mut totals = Totals::default();
        if output == Output::Table {
            write_line(&padded(&HEAD.map(str::to_owned)))?;
        }
        loop {
            tokio::select! {
                record = following.next() => {
                    let Some(record) = record? else {
                        totals.say();
                        eprintln!("nodectl: `noded` has ended");
                        return Ok(UNREACHABLE);
                    };
                    totals.add(&record);
                    if !write_record(output, &record)? {
                        return Ok(0);
                    }
                }
                _ = interrupted.recv() => {
                    totals.say();
                    return Ok(0);
                }
                _ = look.tick() => if reader_is_gone() {
                    return Ok(0);
                }
            }
        }
    })
}

/// `false`: nobody reads any more.
fn write_record(output: Output, record: &DropRecord) -> anyhow::Result<bool> {
    match output {
        Output::Table => {
            let quiet = matches!(record, DropRecord::Drop(_));
            write_line(&if quiet { line(record) } else { loud(&line(record), colour()) })
        }
        Output::Json => write_line(&serde_json::to_string(record)?),
        // One document each.
        Output::Yaml => write_line(&format!("---\n{}", serde_yaml_ng::to_string(record)?.trim_end())),
    }
}

fn write_line(text: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout();
    // A pipe's reader sees each line when it is written.
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        other => Ok(other.map(|()| true)?),
    }
}

/// Whether stdout is a pipe that nobody reads.
fn reader_is_gone() -> bool {
    use std::os::fd::AsFd;
    let stdout = io::stdout();
    let mut poll = [nix::poll::PollFd::new(stdout.as_fd(), nix::poll::PollFlags::empty())];
    let polled = nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO);
    let gone = nix::poll::PollFlags::POLLERR;
    polled.is_ok() && poll[0].revents().is_some_and(|events| events.contains(gone))
}

/// What a follower has seen, and what nobody has.
#[derive(Debug, Default)]
struct Totals {
    shown: u64,
    missed: u64,
    suppressed: std::collections::BTreeMap<String, u64>,
}

impl Totals {
    fn add(&mut self, record: &DropRecord) {
        match record {
            DropRecord::Drop(_) => self.shown += 1,
            DropRecord::Missed { records } => self.missed += records,
            DropRecord::Suppressed(one) => drop(self.suppressed.insert(one.reason.clone(), one.events)),
            DropRecord::Forgotten { .. } => {}
        }
    }

    /// To stderr, where it is in nobody's way.
    fn say(&self) {
        let mut text = format!("{} shown", self.shown);
        if self.missed > 0 {
            text.push_str(&format!("; {} records missed", self.missed));
        }
        if !self.suppressed.is_empty() {
            let counts: Vec<_> = self.suppressed.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            text.push_str(&format!("; not reported since the daemon started: {}", counts.join(", ")));
        }
        let newline = if io::stderr().is_terminal() { "\n" } else { "" };
        eprintln!("{newline}nodectl: {text}");
    }
}

pub(super) fn flows(client: &Client, arguments: &FlowsArguments) -> anyhow::Result<u8> {
    let limit = usize::try_from(arguments.limit).unwrap_or(usize::MAX);
    let filter = FlowFilter { address: arguments.address, limit };
    client.show(async |noded| noded.list_flows(filter).await, flows_table, |_| 0)
}

fn flows_table(flows: &Flows) -> String {
    let rows = flows.flows.iter().map(|flow: &LiveFlow| {
        let with_port = |address, port| match port {
            Some(port) => SocketAddr::new(address, port).to_string(),
            None => address.to_string(),
        };
        let direction = flow.direction.map_or_else(|| "-".to_owned(), |direction| direction.to_string());
        [
            direction,
            with_port(flow.source, flow.source_port),
            flow.destination.to_string(),
            flow.service.clone(),
            cidrs(flow.source_cidr.as_deref(), flow.destination_cidr.as_deref()),
            flow.state.to_string(),
            short(flow.age),
            short(flow.idle),
            short(flow.expires_in),
            format!("{} / {}", flow.packets, bytes(flow.bytes)),
            format!("{} / {}", flow.reply_packets, bytes(flow.reply_bytes)),
            flow.rule.clone().unwrap_or_else(|| flow.reason.clone()),
        ]
    });
    let head = [
        "OPENED",
        "SOURCE",
        "DESTINATION",
        "SERVICE",
        "CIDRS",
        "STATE",
        "AGE",
        "IDLE",
        "EXPIRES",
        "SENT",
        "ANSWERED",
        "BY",
    ];
    let mut text = table(head, rows);
    let (shown, Flows { total, matching, .. }) = (flows.flows.len(), flows);
    text.push_str(&match (shown == *matching, matching == total) {
        (true, true) => format!("\n{total} in all"),
        (true, false) => format!("\n{matching} of {total} in all"),
        (false, true) => format!("\n{shown} of {total} in all; `--limit` shows more"),
        (false, false) => format!("\n{shown} of {matching} that match, {total} in all; `--limit` shows more"),
    });
    text
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::view::example;

    fn json<T: serde::Serialize>(value: &T) -> String {
        serde_json::to_string_pretty(value).unwrap()
    }

    #[test]
    fn drops_end_with_what_is_not_among_them() {
        assert_snapshot!("drops", drops_table(&example::drops()));
        assert_snapshot!("drops-none", drops_table(&Drops::default()));
        assert_snapshot!("drops-json", json(&example::drops()));
    }

    #[test]
    fn a_record_of_a_stream_says_what_it_is() {
        let records = example::records();
        for record in &records {
            let text = serde_json::to_string(record).unwrap();
            assert_eq!(serde_json::from_str::<DropRecord>(&text).unwrap(), *record);
        }
        let lines: Vec<String> = records.iter().map(line).collect();
        assert_snapshot!("records", lines.join("\n"));
        let lines: Vec<String> = records.iter().map(|record| serde_json::to_string(record).unwrap()).collect();
        assert_snapshot!("records-json", lines.join("\n"));
    }

    #[test]
    fn flows_say_how_many_there_are() {
        assert_snapshot!("flows", flows_table(&example::flows()));
        assert_snapshot!("flows-json", json(&example::flows()));
        let flows = example::flows().flows[..1].to_vec();
        let table = |matching, total| flows_table(&Flows { total, matching, flows: flows.clone() });
        for (matching, total, last) in [
            (1, 1, "1 in all"),
            (1, 9, "1 of 9 in all"),
            (9, 9, "1 of 9 in all; `--limit` shows more"),
            (5, 9, "1 of 5 that match, 9 in all; `--limit` shows more"),
        ] {
            assert_eq!(table(matching, total).lines().last(), Some(last));
        }
    }
}
