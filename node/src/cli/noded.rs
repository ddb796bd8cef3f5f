//! `noded`: join, run, leave.

use std::io::{IsTerminal, Read};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use controller_api::client::ConnectError;
use controller_api::invitation::Invitation;
use tracing_subscriber::EnvFilter;

use super::{FAILED, UNREACHABLE, fail};
use crate::config::{self, Flags, Settings};
use crate::kernel::wireguard::{UserspaceArgs, run_userspace};
use crate::serve::agent::{self, Machine};
use crate::serve::lock::Lock;
use crate::uplink::identity::{Identity, IdentityError};
use crate::uplink::join::{self, JoinError, Joined};
use crate::uplink::leave::{self, LeaveError};
use host::clock::now;

/// Joins this machine to a Rampart network and enforces the network's policy in its kernel
#[derive(Debug, Parser)]
#[command(
    name = "noded",
    version,
    after_help = "Examples:
  noded join 'rampart1:…'    once, with the line that `meshctl node invite` printed
  noded run                  from then on; `nodectl status` shows what it does"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Join(Join),
    Run(Run),
    Leave(Leave),
    /// Serves a TUN device; called by `noded run`
    #[command(hide = true)]
    Wireguard(UserspaceArgs),
}

/// Join a network by an invitation
///
/// Makes this machine's keys, which never leave it, and has the controller certify them. The line is shown once by
/// `meshctl node invite`. Joining again with the same line is harmless.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  noded join 'rampart1:CgRjb3Jw…'
  ssh controller meshctl node invite web1 --cidr web | noded join -")]
struct Join {
    /// The invitation, or `-` to read it from stdin, where no other user of this machine can see it
    invitation: String,
    #[command(flatten)]
    flags: Flags,
}

/// Run the agent in the foreground
///
/// Takes the policy from the controller, or where that cannot be reached from disk, and keeps the kernel equal to it. When
/// it ends, by whatever, the kernel goes on enforcing and WireGuard goes on carrying; started again, it takes over.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  noded run
  RUST_LOG=debug noded run --wireguard userspace --metrics off")]
struct Run {
    /// Report every packet that the programs see (slow; for debugging)
    #[arg(long)]
    trace_datapath: bool,
    #[command(flatten)]
    flags: Flags,
}

/// Leave the network for good
///
/// Has the controller delete this node, then removes interface, programs, keys and state. Stop `noded run` first.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  noded leave
  noded leave --force        when the controller is gone: an admin should delete the node then")]
struct Leave {
    /// Leave even if the controller cannot be told
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    flags: Flags,
}

/// The program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Verb::Wireguard(args) = &cli.verb {
        // It sets up its own log, and says itself why it could not start.
        return match run_userspace(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail("noded wireguard", &error.into(), FAILED),
        };
    }
    log_to_stderr();
    let result = match cli.verb {
        Verb::Join(verb) => verb.run(),
        Verb::Run(verb) => config::load(&verb.flags)
            .map_err(anyhow::Error::from)
            .and_then(|settings| agent::run(settings, verb.trace_datapath)),
        Verb::Leave(verb) => verb.run(),
        Verb::Wireguard(_) => Ok(()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail("noded", &error, exit_code(&error)),
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).init();
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let connect = match error.downcast_ref::<JoinError>() {
        Some(JoinError::Connect(error)) => Some(error),
        _ => None,
    };
    let untold = matches!(error.downcast_ref::<LeaveError>(), Some(LeaveError::Untold { .. }));
    if connect.is_some_and(ConnectError::is_unreachable) || untold { UNREACHABLE } else { FAILED }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start a runtime")
}

impl Join {
    fn run(self) -> anyhow::Result<()> {
        let settings = config::load(&self.flags)?;
        let mut line = self.invitation;
        if line == "-" {
            line.clear();
            std::io::stdin()
                .take(LINE_MAX)
                .read_to_string(&mut line)
                .context("failed to read the invitation from stdin")?;
        }
        let invitation: Invitation = line.trim().parse()?;
        let joined = runtime()?.block_on(join::join(&settings, &invitation, now()))?;
        match joined {
            Joined::Now(Identity { network, name, .. }) => {
                eprintln!("joined `{network}` as node `{name}`; start it with `noded run`");
            }
            Joined::Already { identity: Identity { network, name, .. }, reason } => {
                eprintln!(
                    "this machine is node `{name}` of `{network}` already (the invitation was not needed: {reason})"
                );
            }
        }
        Ok(())
    }
}

/// Longer than any invitation.
const LINE_MAX: u64 = 64 * 1024;

impl Leave {
    fn run(self) -> anyhow::Result<()> {
        let settings = config::load(&self.flags)?;
        let name = match Identity::load(&settings.state_dir) {
            Ok(identity) => format!("node `{}` of `{}`", identity.name, identity.network),
            Err(IdentityError::NotJoined) if !self.force => return Err(IdentityError::NotJoined.into()),
            Err(_) => "this machine".to_owned(),
        };
        let _lock = Lock::take(&settings)?;
        // Whatever would keep the interface from being removed comes before the controller forgets the node.
        let machine = Machine::prepare(&settings)?;
        let told = runtime()?.block_on(leave::tell(&settings, self.force))?;
        remove(&settings, machine)?;
        if told {
            eprintln!("{name} has left");
        } else {
            eprintln!("{name} has left; the controller was not told: an admin should run `meshctl node delete`");
        }
        Ok(())
    }
}

fn remove(settings: &Settings, machine: Machine) -> anyhow::Result<()> {
    let Machine { mut wireguard, mut link, mut datapath, mut guard } = machine;
    for prefix in link.barriers()? {
        link.remove_barrier(prefix)?;
    }
    leave::remove(settings, &mut *wireguard, &mut *link, &mut datapath, &mut guard)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound_and_each_verb_has_an_example() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
            assert!(
                verb.get_after_help().is_some_and(|help| help.to_string().contains("Example")),
                "{}",
                verb.get_name()
            );
        }
    }

    #[test]
    fn flags_follow_the_verb() {
        let cli = Cli::try_parse_from([
            "noded",
            "run",
            "--interface",
            "wg7",
            "--state-dir",
            "/tmp/x",
            "--wireguard",
            "userspace",
            "--metrics",
            "off",
        ]);
        let Verb::Run(run) = cli.unwrap().verb else { panic!("another verb") };
        let settings = config::load(&run.flags).unwrap();
        assert_eq!(settings.interface.as_str(), "wg7");
    }
}
