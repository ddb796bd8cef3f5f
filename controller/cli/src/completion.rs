//! `meshctl completion …`

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::{Cli, Failure, output};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  meshctl completion bash   # into /etc/bash_completion.d/meshctl
  meshctl completion zsh    # into a directory of $fpath, as _meshctl")]
pub(crate) struct Arguments {
    /// Which shell
    shell: Shell,
}

impl Arguments {
    pub(crate) fn run(self) -> Result<(), Failure> {
        output::line(script(self.shell).trim_end())
    }
}

fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "meshctl", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_shell_completes_every_noun() {
        for shell in Shell::value_variants() {
            let script = script(*shell);
            for noun in Cli::command().get_subcommands() {
                assert!(script.contains(noun.get_name()), "{shell} does not know `{}`", noun.get_name());
            }
        }
    }
}
