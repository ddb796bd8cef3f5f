//! A controller and three nodes on this machine, and the policy between them shown with real traffic.
//!
//! `cargo xtask demo` builds and runs this.

use std::io::{IsTerminal, Write};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use nix::sys::signal::Signal;
use tests::mesh::{Family, Mesh, kernel_has_wireguard};
use tests::namespace::{self, Lifetime};
use tests::scenario;

/// Runs a real mesh of three nodes on this machine and shows that the kernel enforces its policy.
#[derive(Debug, Parser)]
struct Options {
    /// Leave the mesh running and print how to enter each node.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    namespace::end_all_on_signal(|| {});
    let mut story = Story::new();
    match tell(&options, &mut story) {
        Ok(()) if story.failed == 0 => {
            println!("\n{} lines, all as expected, in {:.1} s", story.lines, story.start.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Ok(()) => {
            println!("\n{} of {} lines are not as expected", story.failed, story.lines);
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tell(options: &Options, story: &mut Story) -> Result<()> {
    let lifetime = if options.keep { Lifetime::Keepable } else { Lifetime::Bound };
    story.chapter("A controller and three nodes, each in a network namespace of its own");
    story.progress("controllerd init, controllerd serve");
    let mut mesh = Mesh::new(lifetime, "deny")?;
    let told = tell_of(&mut mesh, story);
    if told.is_err() || story.failed > 0 {
        eprintln!("\n{}", mesh.logs());
    } else if options.keep {
        print_doors(&mesh);
        std::mem::forget(mesh);
    }
    told
}

fn tell_of(mesh: &mut Mesh, story: &mut Story) -> Result<()> {
    let backend = if kernel_has_wireguard(mesh.controller())? { "kernel" } else { "userspace" };
    scenario::build(mesh, |step| story.progress(step))?;
    story.say(&format!("WireGuard: {backend} ({})", release()?));

    story.chapter("The policy: web -> app tcp/8080 and ping, app -> db tcp/5432, default deny");
    scenario::allow(mesh)?;
    println!("{}", mesh.meshctl_ok(&["policy", "show"])?.trim_end());
    let servers = scenario::serve(mesh)?;

    story.chapter("Real traffic");
    show_lines(mesh, story)?;

    story.chapter("Changes under traffic, from the start of `meshctl`");
    for family in [Family::V4, Family::V6] {
        show_change(story, "a rule added lets udp/9000 pass", family, scenario::time_to_allow(mesh, family));
        show_change(story, "a rule deleted cuts a running TCP flow", family, scenario::time_to_revoke(mesh, family));
    }
    mesh.converge()?;

    story.chapter("The controller killed: traffic goes on, and so does the policy");
    mesh.stop_controller(Signal::SIGKILL)?;
    show_lines(mesh, story)?;
    story.chapter("And noded on app1 killed and started again, still without a controller");
    mesh.stop_node("app1", Signal::SIGKILL)?;
    mesh.start_node("app1")?;
    mesh.wait_until_up("app1")?;
    show_lines(mesh, story)?;
    mesh.start_controller()?;
    mesh.converge()?;
    story.check("the controller is back", "converged", "converged");

    story.chapter("What app1 says");
    for verb in [&["status"][..], &["peers"], &["policy", "show"]] {
        println!("$ nodectl {}\n{}\n", verb.join(" "), mesh.nodectl_ok("app1", verb)?.trim_end());
    }
    show_explanations(mesh, story)?;
    show_counters(mesh, story)?;
    drop(servers);
    Ok(())
}

fn show_lines(mesh: &Mesh, story: &mut Story) -> Result<()> {
    let lines = scenario::lines();
    story.progress("trying every flow");
    let outcomes = scenario::run(mesh, &lines)?;
    for (line, outcome) in lines.iter().zip(&outcomes) {
        story.line(line.holds(outcome), &line.to_string(), &line.expected.to_string(), &outcome.to_string());
    }
    Ok(())
}

fn show_change(story: &mut Story, what: &str, family: Family, took: Result<Duration>) {
    let name = format!("{what} {family:?}");
    match took {
        Ok(took) => story.line(true, &name, "takes effect", &format!("{:.1} ms", took.as_secs_f64() * 1e3)),
        Err(error) => story.line(false, &name, "takes effect", &format!("{error:#}")),
    }
}

fn show_explanations(mesh: &Mesh, story: &mut Story) -> Result<()> {
    let (web, app) = (mesh.node("web1")?.v4.to_string(), mesh.node("app1")?.v4.to_string());
    for (service, code) in [("tcp/8080", 0), ("tcp/8081", 4)] {
        let output = mesh.nodectl("app1", &["policy", "explain", &web, &app, service])?;
        println!(
            "$ nodectl policy explain {web} {app} {service}\n{}",
            String::from_utf8_lossy(&output.stdout).trim_end()
        );
        let seen = output.status.code().map_or_else(|| "a signal".to_owned(), |code| code.to_string());
        story.check(&format!("explain {service}: exit status"), &code.to_string(), &seen);
    }
    Ok(())
}

fn show_counters(mesh: &Mesh, story: &mut Story) -> Result<()> {
    story.chapter("Prometheus counters of app1 that moved");
    let page = mesh.scrape_node("app1")?;
    for sample in page.samples.iter().filter(|sample| sample.value > 0.0) {
        if ["rampart_packets_total", "rampart_rule_packets_total", "wireguard_received_bytes_total"]
            .contains(&sample.name.as_str())
        {
            let labels: Vec<_> = sample.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            println!("  {} {{{}}} {}", sample.name, labels.join(" "), sample.value);
        }
    }
    let rules = page.sum("rampart_rule_packets_total", &[("rule", "web-to-app")]);
    story.line(rules > 0.0, "packets that rule web-to-app let through", "> 0", &rules.to_string());
    Ok(())
}

fn print_doors(mesh: &Mesh) {
    let programs = tests::mesh::program_folder().map(|folder| folder.display().to_string()).unwrap_or_default();
    println!("\nThe mesh stays. Enter a host, then try `nodectl status`, `meshctl status` or `ping`:");
    let namespaces = mesh.nodes().map(|(_, node)| node.namespace()).chain([mesh.controller()]);
    for namespace in namespaces {
        let (name, holder) = (namespace.name(), namespace.holder());
        println!("  {name:<10} nsenter --target {holder} --net --mount --pid env PATH={programs}:$PATH sh");
    }
    let nodes: Vec<_> = mesh.nodes().map(|(name, node)| format!("{name} {}", IpAddr::from(node.v4))).collect();
    println!("Addresses: {}", nodes.join(", "));
    let holders: Vec<_> = mesh.holders().iter().map(u32::to_string).collect();
    println!("End it: kill -9 {}", holders.join(" "));
}

fn release() -> Result<String> {
    let name = nix::sys::utsname::uname()?;
    Ok(format!("Linux {}", name.release().to_str().context("the kernel's release is not UTF-8")?))
}

/// Prints the story and counts what is not as expected.
struct Story {
    start: Instant,
    lines: usize,
    failed: usize,
    terminal: bool,
    colour: bool,
}

impl Story {
    fn new() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none();
        Self { start: Instant::now(), lines: 0, failed: 0, terminal, colour }
    }

    fn chapter(&self, title: &str) {
        println!("\n== {title} ({:.1} s)", self.start.elapsed().as_secs_f64());
    }

    fn say(&self, text: &str) {
        println!("  {text}");
    }

    /// A line that the next one overwrites on a terminal.
    fn progress(&self, step: &str) {
        if self.terminal {
            print!("\r\x1b[2K  {step} …\r");
            let _ = std::io::stdout().flush();
        } else {
            println!("  {step} …");
        }
    }

    fn check(&mut self, name: &str, expected: &str, seen: &str) {
        self.line(expected == seen, name, expected, seen);
    }

    fn line(&mut self, holds: bool, name: &str, expected: &str, seen: &str) {
        self.lines += 1;
        self.failed += usize::from(!holds);
        let (mark, colour) = if holds { ("ok  ", "\x1b[32m") } else { ("FAIL", "\x1b[31m") };
        let (on, off) = if self.colour { (colour, "\x1b[0m") } else { ("", "") };
        println!("{on}{mark}{off} {name:<46} expected {expected:<34} seen {seen}");
    }
}
