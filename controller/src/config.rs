//! `controller.toml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use controller_api::defaults::{
    CONTROLLER_CONFIG, CONTROLLER_LISTEN, CONTROLLER_METRICS, CONTROLLER_SOCKET, CONTROLLER_STATE_DIR, HISTORY_AGE,
    HISTORY_REVISIONS,
};
use controller_api::nearest::nearest;
use controller_api::time::Span;
use serde::Deserialize;

use crate::store::Keep;

/// One setting, for the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Setting {
    name: &'static str,
    default: &'static str,
    meaning: &'static [&'static str],
}

macro_rules! settings {
    ($($(#[doc = $doc:literal])* $name:literal $field:ident: $type:ty = $default:expr;)*) => {
        /// What the file says; every setting may be left out.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            $(#[serde(rename = $name)] $field: Option<$type>,)*
        }

        const SETTINGS: &[Setting] =
            &[$(Setting { name: $name, default: $default, meaning: &[$($doc),*] },)*];
    };
}

settings! {
    /// Where nodes and admins connect to: gRPC over TLS 1.3. `[::]` takes IPv4 too.
    "listen" listen: SocketAddr = CONTROLLER_LISTEN;
    /// The Unix socket for root on this machine, which needs no certificate.
    "socket" socket: PathBuf = CONTROLLER_SOCKET;
    /// Where `/metrics` is served, for Prometheus. Anybody who reaches it may read it.
    "metrics" metrics: SocketAddr = CONTROLLER_METRICS;
    /// The database, and the authority's key. Whoever reads it can let anybody into the network.
    "state-dir" state_dir: PathBuf = CONTROLLER_STATE_DIR;
    /// How many of the newest revisions are kept, for `meshctl history` and `meshctl policy show --at`; at least 1024. What
    /// is older than `history-age` is not kept either.
    "history-revisions" history_revisions: u64 = "16384";
    /// How old a revision may be that is kept; at least `1h`.
    "history-age" history_age: Span = "90d";
}

/// Fewer revisions would not do: by them a request that is repeated is known.
const REVISIONS_MIN: u64 = 1_024;
/// As above.
const AGE_MIN: Duration = Duration::from_secs(3_600);

/// Where `controllerd serve` listens and what it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub listen: SocketAddr,
    pub socket: PathBuf,
    pub metrics: SocketAddr,
    pub state_dir: PathBuf,
    /// How much of the store's history is kept.
    pub keep: Keep,
}

/// What the command line says, which goes before the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    pub listen: Option<SocketAddr>,
    pub socket: Option<PathBuf>,
    pub metrics: Option<SocketAddr>,
    pub state_dir: Option<PathBuf>,
}

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("failed to read configuration `{}`", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("configuration `{}` is not valid: {reason}", path.display())]
    Syntax { path: PathBuf, reason: String },
    #[error("configuration `{}` has a `{name}` of `{value}`; it must be at least `{min}`", path.display())]
    TooSmall { path: PathBuf, name: &'static str, value: String, min: String },
    #[error("configuration `{}` has an unknown setting `{name}`{hint}; known are {known}", path.display())]
    Unknown { path: PathBuf, name: String, hint: String, known: String },
}

impl Config {
    /// `path`: a file that must exist; `None`: the usual one, if it exists.
    pub fn load(path: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let file = match path {
            Some(path) => read(path)?,
            None if Path::new(CONTROLLER_CONFIG).exists() => read(Path::new(CONTROLLER_CONFIG))?,
            None => File::default(),
        };
        let address = |default: &str| default.parse().expect("defaults are addresses; tested below");
        Ok(Self {
            listen: overrides.listen.or(file.listen).unwrap_or_else(|| address(CONTROLLER_LISTEN)),
            socket: overrides.socket.or(file.socket).unwrap_or_else(|| CONTROLLER_SOCKET.into()),
            metrics: overrides.metrics.or(file.metrics).unwrap_or_else(|| address(CONTROLLER_METRICS)),
            state_dir: overrides.state_dir.or(file.state_dir).unwrap_or_else(|| CONTROLLER_STATE_DIR.into()),
            keep: Keep {
                revisions: file.history_revisions.unwrap_or(HISTORY_REVISIONS as u64),
                age: file.history_age.map_or(HISTORY_AGE, |Span(age)| age),
            },
        })
    }
}

fn read(path: &Path) -> Result<File, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    let syntax = |error: toml::de::Error| {
        let reason = error.to_string().trim().replace('\n', " ");
        ConfigError::Syntax { path: path.to_owned(), reason }
    };
    let table: toml::Table = text.parse().map_err(syntax)?;
    let known = || SETTINGS.iter().map(|setting| setting.name);
    if let Some(name) = table.keys().find(|name| known().all(|known| known != name.as_str())) {
        let hint = nearest(name, known()).map(|near| format!(" (did you mean `{near}`?)")).unwrap_or_default();
        let known = known().map(|known| format!("`{known}`")).collect::<Vec<_>>().join(", ");
        return Err(ConfigError::Unknown { path: path.to_owned(), name: name.clone(), hint, known });
    }
    let file: File = toml::from_str(text).map_err(syntax)?;
    let too_small =
        |name, value: String, min: String| ConfigError::TooSmall { path: path.to_owned(), name, value, min };
    if let Some(revisions) = file.history_revisions.filter(|revisions| *revisions < REVISIONS_MIN) {
        return Err(too_small("history-revisions", revisions.to_string(), REVISIONS_MIN.to_string()));
    }
    if let Some(Span(age)) = file.history_age.filter(|Span(age)| *age < AGE_MIN) {
        return Err(too_small("history-age", format!("{}s", age.as_secs()), "1h".to_owned()));
    }
    Ok(file)
}

/// The commented sample: every setting with its default.
pub fn sample() -> String {
    let mut text = String::from(
        "# controllerd, as it is without this file. A flag of `controllerd serve` goes before a setting here.\n",
    );
    for Setting { name, default, meaning } in SETTINGS {
        text.push('\n');
        for line in *meaning {
            text.push_str(&format!("#{line}\n"));
        }
        let is_number = default.bytes().all(|byte| byte.is_ascii_digit());
        let value = if is_number { default.to_string() } else { format!("\"{default}\"") };
        text.push_str(&format!("# {name} = {value}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_sample_is_the_generated_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("controller.toml");
        if std::env::var_os("RAMPART_WRITE_SAMPLES").is_some() {
            std::fs::write(&path, sample()).expect("written");
        }
        let committed = std::fs::read_to_string(&path).expect("the sample");
        assert_eq!(committed, sample(), "run this test with RAMPART_WRITE_SAMPLES=1 and commit the file");
    }

    #[test]
    fn the_sample_uncommented_says_the_defaults() {
        let text: String = sample()
            .lines()
            .filter_map(|line| line.strip_prefix("# ").filter(|line| line.contains(" = ")))
            .map(|line| format!("{line}\n"))
            .collect();
        let file = parse(Path::new("sample"), &text).expect("a configuration");
        let defaults = Config::load(Some(Path::new("/dev/null")), Overrides::default()).expect("defaults");
        assert_eq!(file.listen, Some(defaults.listen));
        assert_eq!(file.socket, Some(defaults.socket));
        assert_eq!(file.metrics, Some(defaults.metrics));
        assert_eq!(file.state_dir, Some(defaults.state_dir));
        assert_eq!(file.history_revisions, Some(defaults.keep.revisions));
        assert_eq!(file.history_age, Some(Span(defaults.keep.age)));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("lisen = \"[::]:1\"", "`lisen` (did you mean `listen`?)"),
            ("state_dir = \"/x\"", "`state_dir` (did you mean `state-dir`?)"),
            (
                "colour = 1",
                "unknown setting `colour`; known are `listen`, `socket`, `metrics`, `state-dir`, `history-revisions`, `history-age`",
            ),
            ("listen = \"nowhere\"", "invalid socket address"),
            ("listen = ", "is not valid"),
            ("history-age = \"soon\"", "`soon` is not a span of time"),
            ("history-age = \"-3d\"", "it is negative"),
            ("history-age = \"10m\"", "`history-age` of `600s`; it must be at least `1h`"),
            ("history-age = 90", "`history-age` of `90s`; it must be at least `1h`"),
            ("history-age = true", "expected a span of time like `90s`, `1h` or `7d`, or a number of seconds"),
            ("history-age = \"90\"", "write it like `90s`, `1h` or `7d`"),
            ("history-revisions = -1", "integer `-1`, expected u64"),
            ("history-revisions = 1.5", "floating point `1.5`, expected u64"),
            ("history-revisions = \"many\"", "string \"many\", expected u64"),
            ("history-revisions = 5", "`history-revisions` of `5`; it must be at least `1024`"),
        ] {
            let error = parse(Path::new("controller.toml"), text).expect_err(text).to_string();
            assert!(error.contains(expected) && error.contains("`controller.toml`"), "{error}");
        }
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("controller.toml");
        std::fs::write(&path, "state-dir = \"/file\"\nsocket = \"/file.sock\"\n").expect("written");
        let overrides = Overrides { state_dir: Some("/flag".into()), ..Overrides::default() };
        let config = Config::load(Some(&path), overrides).expect("a configuration");
        assert_eq!((config.state_dir, config.socket), ("/flag".into(), "/file.sock".into()));
        let missing = Config::load(Some(&directory.path().join("other")), Overrides::default());
        assert!(matches!(missing, Err(ConfigError::Read { .. })));
    }
}
