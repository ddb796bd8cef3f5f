//! Rampart's controller.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use controller::config::{Config, Overrides};
use controller::{clock, init, serve};
use controller_api::defaults::{CONTROLLER_CONFIG, CONTROLLER_STATE_DIR};
use controller_api::endpoint::ControllerEndpoint;
use ipnet::IpNet;
use policy::{DefaultPolicy, NetworkName, Prefixes, parse_prefix};
use tracing_subscriber::EnvFilter;

/// Keeps a network, and tells its nodes what they need to know.
#[derive(Debug, Parser)]
#[command(
    name = "controllerd",
    version,
    arg_required_else_help = true,
    after_help = "Examples:
  controllerd init --network corp --root 10.42.0.0/16 --root fd42::/48 --endpoint controller.example:7443
  controllerd serve
  meshctl cidr add web 10.42.1.0/24 fd42:0:0:1::/64

Exit status: 0 done, 1 failed, 2 usage."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Makes a new network: its database and its certificate authority
    Init(Init),
    /// Serves nodes, admins and root until it is told to stop
    Serve(Serve),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  controllerd init --network corp --root 10.42.0.0/16 --root fd42::/48 --endpoint controller.example:7443")]
struct Init {
    /// The network's name
    #[arg(long, value_name = "NAME")]
    network: NetworkName,
    /// The prefix that all cidrs lie in; once for each family
    #[arg(long = "root", value_name = "PREFIX", required = true, value_parser = parse_prefix)]
    roots: Vec<IpNet>,
    /// Where nodes and admins reach this controller; can be given several times
    #[arg(long = "endpoint", value_name = "HOST:PORT", required = true)]
    endpoints: Vec<ControllerEndpoint>,
    /// What holds where no rule matches: `lineage` lets a cidr talk with itself, its ancestors and its descendants;
    /// `deny` lets nobody
    #[arg(long, value_name = "lineage|deny", default_value = "lineage")]
    default: DefaultPolicy,
    /// Where the network is kept
    #[arg(long, value_name = "PATH", default_value = CONTROLLER_STATE_DIR)]
    state_dir: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:
  controllerd serve --listen 192.0.2.1:7443")]
struct Serve {
    /// The configuration file; if not given, the usual one is read where it exists
    #[arg(long, value_name = "PATH", help = format!("The configuration file [default: {CONTROLLER_CONFIG}, where it exists]"))]
    config: Option<PathBuf>,
    /// Where the network is kept
    #[arg(long, value_name = "PATH")]
    state_dir: Option<PathBuf>,
    /// Where nodes and admins connect to
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The Unix socket for root
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Where metrics are served
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .init();
    let result = match cli.verb {
        Verb::Init(arguments) => make(arguments),
        Verb::Serve(arguments) => run(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("controllerd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn make(arguments: Init) -> Result<()> {
    let Init { network, roots, endpoints, default, state_dir } = arguments;
    let roots = Prefixes::from_nets(roots)?;
    let endpoints = endpoints.iter().map(ToString::to_string).collect();
    let plan = init::Plan { network, roots, default, endpoints };
    init::init(&state_dir, &plan, clock::now())?;
    eprintln!("network `{}` made in `{}`; start it with `controllerd serve`", plan.network, state_dir.display());
    Ok(())
}

fn run(arguments: Serve) -> Result<()> {
    let Serve { config, state_dir, listen, socket, metrics } = arguments;
    let config = Config::load(config.as_deref(), Overrides { listen, socket, metrics, state_dir })?;
    serve::serve(&config)
}
