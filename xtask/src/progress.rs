//! What a slow step shows while it works: a spinner on a terminal, else a plain line now and then.

use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::process::{Running, shown};

/// How often a plain log hears that a step is still at it.
const PLAIN_EVERY: Duration = Duration::from_secs(15);
/// How much of a failed step's log is shown.
const TAIL: usize = 30;

/// One slow step.
#[derive(Debug)]
pub(crate) struct Progress {
    what: String,
    bar: Option<ProgressBar>,
    started: Instant,
    spoke: Instant,
}

impl Progress {
    pub(crate) fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})").expect("the template is valid");
            let bar = ProgressBar::new_spinner().with_style(style).with_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        if bar.is_none() {
            eprintln!("{what} ...");
        }
        Self { what, bar, started: Instant::now(), spoke: Instant::now() }
    }

    /// To be called now and then while the step works.
    pub(crate) fn tick(&mut self) {
        if self.bar.is_none() && self.spoke.elapsed() > PLAIN_EVERY {
            self.spoke = Instant::now();
            eprintln!("{} ... {} s so far", self.what, self.started.elapsed().as_secs());
        }
    }

    pub(crate) fn done(self) {
        let text = format!("{}: done in {}", self.what, seconds(self.started.elapsed()));
        match &self.bar {
            Some(bar) => {
                bar.finish_and_clear();
                eprintln!("{text}");
            }
            None => eprintln!("{text}"),
        }
    }

    /// Runs a command as this step; its output goes to the file `log`, whose end a failure shows.
    pub(crate) fn run(&mut self, command: &mut Command, limit: Duration, log: &Path) -> Result<()> {
        if let Some(dir) = log.parent() {
            fs::create_dir_all(dir).with_context(|| format!("failed to create `{}`", dir.display()))?;
        }
        let file = File::create(log).with_context(|| format!("failed to create `{}`", log.display()))?;
        let errors = file.try_clone().with_context(|| format!("failed to open `{}` twice", log.display()))?;
        let ended = Running::spawn(command.stdout(file).stderr(errors))?.wait(limit, || self.tick())?;
        if !ended.success() {
            bail!("`{}` failed ({ended}); the end of `{}`:\n{}", shown(command), log.display(), tail(log));
        }
        Ok(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

/// A duration as people read it: `0.4 s`, `12.0 s`, `3 min 20 s`.
pub(crate) fn seconds(duration: Duration) -> String {
    match duration.as_secs() {
        0..100 => format!("{:.1} s", duration.as_secs_f64()),
        whole => format!("{} min {:02} s", whole / 60, whole % 60),
    }
}
