//! What an operator can set: `node.toml`, and a flag for each of its fields that matters on a command line.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use controller_api::defaults;
use controller_api::time::Span;
use serde::Deserialize;

use crate::kernel::datapath::DEFAULT_ROOT;
use crate::kernel::wireguard::Preference;

/// In the state directory: what the userspace WireGuard last said.
pub const WIREGUARD_LOG: &str = "wireguard.log";
/// In the state directory: held by the daemon that uses it.
pub const LOCK: &str = "lock";

/// One field of the file, for the sample.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub name: &'static str,
    /// The doc comment, one line each.
    pub doc: &'static [&'static str],
    /// A TOML value; the default where there is one.
    pub sample: &'static str,
}

macro_rules! section {
    (
        $(#[$about:meta])* $section:ident, $fields:ident $(, $part:ident: $part_type:ty)*;
        $($(#[doc = $doc:literal])+ $field:ident $name:literal: $type:ty = $sample:literal;)*
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields)]
        pub struct $section {
            $($(#[doc = $doc])+ pub $field: Option<$type>,)*
            $(pub $part: Option<$part_type>,)*
        }

        /// The fields, in the order of the sample.
        pub const $fields: &[Field] = &[$(Field { name: $name, doc: &[$($doc),+], sample: $sample },)*];
    };
}

mod guard;

pub use guard::{GUARD_FIELDS, Guard, GuardFile};

section! {
    /// `node.toml`. Every field may be left out.
    File, FIELDS, guard: GuardFile;

    /// The WireGuard interface that the daemon creates. It never touches one that it did not make.
    interface "interface": Interface = "\"rampart0\"";
    /// Where keys, certificate and last good state are kept.
    state_dir "state-dir": PathBuf = "\"/var/lib/rampart/node\"";
    /// The Unix socket for `nodectl`; unless set, named after the interface. The daemon's lock is beside it.
    socket "socket": PathBuf = "\"/run/rampart/rampart0.sock\"";
    /// Where Prometheus fetches metrics: an address and port, or "off".
    metrics "metrics": Metrics = "\"127.0.0.1:9586\"";
    /// The UDP port of WireGuard.
    listen_port "listen-port": Port = "51820";
    /// Where other nodes reach this one, address and port. Unless set, the controller uses the address that it sees this
    /// node come from, with `listen-port`.
    endpoint "endpoint": SocketAddr = "\"192.0.2.1:51820\"";
    /// Which WireGuard carries the packets: "kernel", "userspace", or "auto": the kernel's where it has one.
    wireguard "wireguard": Preference = "\"auto\"";
    /// Where the BPF file system is mounted.
    bpffs "bpffs": PathBuf = "\"/sys/fs/bpf\"";
    /// The MTU of the interface: that of the network below, less 80 (60 if no outer packet is IPv6).
    mtu "mtu": u32 = "1420";
    /// How often a packet keeps the way to each peer open through address translation, so that others can speak first; "0s":
    /// never, which is quieter where every node has an address of its own. A number is one of seconds, here and below.
    persistent_keepalive "persistent-keepalive": Span = "\"25s\"";
    /// How often the kernel is looked at, to repair what others changed.
    reconcile_interval "reconcile-interval": Span = "\"2s\"";
    /// How often the kernel's tables are read back whole and held against the policy.
    verify_interval "verify-interval": Span = "\"60s\"";
    /// Also drop arriving packets at XDP that no rule and no flow could let in. A flood of such packets costs less then, and
    /// everything else more: the kernel no longer aggregates what arrives.
    early_drop "early-drop": bool = "false";
}

/// The same fields as flags; a flag beats the file.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Settings (each beats its field in the configuration file)")]
pub struct Flags {
    /// Configuration file [default: /etc/rampart/node.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where keys, certificate and last good state are kept [default: /var/lib/rampart/node]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// WireGuard interface [default: rampart0]
    #[arg(long, short, value_name = "NAME")]
    pub interface: Option<Interface>,
    /// Unix socket for nodectl [default: /run/rampart/<interface>.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Address and port for metrics, or `off` [default: 127.0.0.1:9586]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<Metrics>,
    /// UDP port of WireGuard [default: 51820]
    #[arg(long, value_name = "PORT")]
    pub listen_port: Option<Port>,
    /// Where other nodes reach this one [default: as the controller sees it]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub endpoint: Option<SocketAddr>,
    /// Which WireGuard carries the packets: auto, kernel, userspace [default: auto]
    #[arg(long, value_name = "WHICH")]
    pub wireguard: Option<Preference>,
    /// Where the BPF file system is mounted [default: /sys/fs/bpf]
    #[arg(long, value_name = "DIR")]
    pub bpffs: Option<PathBuf>,
}

/// Everything, decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub interface: Interface,
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub metrics: Metrics,
    pub listen_port: u16,
    pub endpoint: Option<SocketAddr>,
    pub wireguard: Preference,
    pub bpffs: PathBuf,
    pub mtu: u32,
    pub persistent_keepalive: Option<Duration>,
    pub reconcile_interval: Duration,
    pub verify_interval: Duration,
    pub early_drop: bool,
    /// `None`: there is none.
    pub guard: Option<Guard>,
}

/// Where metrics are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metrics {
    Off,
    At(SocketAddr),
}

/// The name of a network interface that can also name a directory of pins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface(String);

/// A port that can be listened on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port(pub u16);

/// A value that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{value}` {reason}")]
pub struct ValueError {
    value: String,
    reason: &'static str,
}

/// Why the settings could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("failed to read the configuration file `{}`", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("configuration file `{}`: {message}", path.display())]
    Parse { path: PathBuf, message: String },
    #[error("configuration file `{}`: unknown field `{field}`; {}", path.display(), hint(nearest.as_deref(), known))]
    UnknownField { path: PathBuf, field: String, nearest: Option<String>, known: Vec<&'static str> },
    #[error("{0}")]
    Value(String),
}

fn hint(nearest: Option<&str>, known: &[&str]) -> String {
    match nearest {
        Some(name) => format!("did you mean `{name}`?"),
        None => format!("known are {}", known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")),
    }
}

/// Longest interface name: `IFNAMSIZ` less its terminator.
const INTERFACE_MAX: usize = 15;
/// Smallest MTU: what IPv6 needs.
const MTU_MIN: u32 = 1_280;
/// Largest MTU that WireGuard accepts, rounded down.
const MTU_MAX: u32 = 65_440;
/// The longest that WireGuard takes for a keepalive; nobody looks at the kernel less often.
const SPAN_MAX: Duration = Duration::from_secs(65_535);
/// Names further away than this are not offered as a correction.
const NEAREST: f64 = 0.6;

/// Reads the file and lets the flags beat it.
pub fn load(flags: &Flags) -> Result<Settings, ConfigError> {
    let path = flags.config.clone().unwrap_or_else(|| PathBuf::from(defaults::NODE_CONFIG));
    let file = match std::fs::read_to_string(&path) {
        Ok(text) => parse(&path, &text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound && flags.config.is_none() => File::default(),
        Err(source) => return Err(ConfigError::Read { path, source }),
    };
    resolve(flags, file)
}

/// One file's text; `path` is for the messages.
pub fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    let error = |message: String| ConfigError::Parse { path: path.to_owned(), message };
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| error(e.to_string().trim_end().to_owned()))?;
    refuse_unknown(path, &table, FIELDS, &["guard"])?;
    if let Some(toml::Value::Table(guard)) = table.get("guard") {
        refuse_unknown(path, guard, GUARD_FIELDS, &[])?;
    }
    toml::from_str(text).map_err(|e| error(e.to_string().trim_end().to_owned()))
}

/// `sections`: known beside the fields.
fn refuse_unknown(
    path: &Path,
    table: &toml::Table,
    fields: &'static [Field],
    sections: &[&'static str],
) -> Result<(), ConfigError> {
    let known: Vec<_> = fields.iter().map(|field| field.name).chain(sections.iter().copied()).collect();
    match table.keys().find(|field| !known.contains(&field.as_str())) {
        None => Ok(()),
        Some(field) => Err(ConfigError::UnknownField {
            path: path.to_owned(),
            field: field.clone(),
            nearest: nearest(field, &known),
            known,
        }),
    }
}

fn nearest(field: &str, known: &[&'static str]) -> Option<String> {
    let likeness = |known: &str| strsim::jaro_winkler(known, &field.to_lowercase().replace('_', "-"));
    let best = known.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(best) >= NEAREST).then(|| best.to_owned())
}

fn resolve(flags: &Flags, file: File) -> Result<Settings, ConfigError> {
    let flags = flags.clone();
    let interface = flags.interface.or(file.interface).unwrap_or_default();
    let mtu = file.mtu.unwrap_or(defaults::MTU);
    if !(MTU_MIN..=MTU_MAX).contains(&mtu) {
        return Err(ConfigError::Value(format!("mtu `{mtu}` is not from {MTU_MIN} (what IPv6 needs) to {MTU_MAX}")));
    }
    let span = |name: &str, given: Option<Span>, default| match given {
        Some(span @ Span(given)) if given > SPAN_MAX => {
            Err(ConfigError::Value(format!("{name} `{span}` is too long; the longest is `{}`", Span(SPAN_MAX))))
        }
        given => Ok(given.map_or(default, |Span(given)| given)),
    };
    let interval = |name: &str, given: Option<Span>, default| match span(name, given, default)? {
        Duration::ZERO => {
            Err(ConfigError::Value(format!("{name} `0s` would leave no time for anything else; the least is `1s`")))
        }
        interval => Ok(interval),
    };
    let keepalive = span("persistent-keepalive", file.persistent_keepalive, defaults::PERSISTENT_KEEPALIVE)?;
    Ok(Settings {
        socket: flags.socket.or(file.socket).unwrap_or_else(|| defaults::node_socket(interface.as_str())),
        interface,
        state_dir: flags.state_dir.or(file.state_dir).unwrap_or_else(|| PathBuf::from(defaults::NODE_STATE_DIR)),
        metrics: flags.metrics.or(file.metrics).unwrap_or_default(),
        listen_port: flags.listen_port.or(file.listen_port).map_or(defaults::WIREGUARD_PORT, |port| port.0),
        endpoint: flags.endpoint.or(file.endpoint),
        wireguard: flags.wireguard.or(file.wireguard).unwrap_or_default(),
        bpffs: flags.bpffs.or(file.bpffs).unwrap_or_else(|| PathBuf::from(DEFAULT_ROOT)),
        mtu,
        persistent_keepalive: (!keepalive.is_zero()).then_some(keepalive),
        reconcile_interval: interval("reconcile-interval", file.reconcile_interval, defaults::RECONCILE_INTERVAL)?,
        verify_interval: interval("verify-interval", file.verify_interval, defaults::VERIFY_INTERVAL)?,
        early_drop: file.early_drop.unwrap_or_default(),
        guard: file.guard.unwrap_or_default().resolve(),
    })
}

/// The sample file: every field with its comment, commented out.
pub fn sample() -> String {
    let mut text = String::from(
        "# Configuration of `noded`. Every line that is commented out shows the default, except `endpoint`, which has none.\n",
    );
    write_fields(&mut text, FIELDS);
    text.push_str("\n# The guard on the underlay. Without it a flood of forged handshakes keeps WireGuard from answering peers.\n[guard]\n");
    write_fields(&mut text, GUARD_FIELDS);
    text
}

fn write_fields(text: &mut String, fields: &[Field]) {
    for Field { name, doc, sample } in fields {
        text.push('\n');
        for line in *doc {
            text.push_str(&format!("#{line}\n"));
        }
        text.push_str(&format!("# {name} = {sample}\n"));
    }
}

impl Interface {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Interface {
    fn default() -> Self {
        Self(defaults::INTERFACE.to_owned())
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Interface {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |reason| Err(ValueError { value: text.to_owned(), reason });
        if text.is_empty() || text.len() > INTERFACE_MAX {
            return fail("is no interface name: it must have 1 to 15 characters");
        }
        if !text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
            return fail("is no interface name that can be used here: letters, digits, `-` and `_` only");
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for Port {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<u16>() {
            Ok(port) if port > 0 => Ok(Self(port)),
            _ => Err(ValueError { value: text.to_owned(), reason: "is no port: it must be a number from 1 to 65535" }),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        defaults::NODE_METRICS.parse().unwrap_or(Self::Off)
    }
}

impl FromStr for Metrics {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "off" => Ok(Self::Off),
            _ => text.parse().map(Self::At).map_err(|_| ValueError {
                value: text.to_owned(),
                reason: "is neither an address with a port, as `127.0.0.1:9586`, nor `off`",
            }),
        }
    }
}

macro_rules! deserialize_by_text {
    ($($type:ty),*) => {
        $(impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        })*
    };
}

deserialize_by_text!(Interface, Metrics);

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        i64::deserialize(deserializer)?.to_string().parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Result<Settings, ConfigError> {
        resolve(&Flags::default(), parse(Path::new("node.toml"), text)?)
    }

    #[test]
    fn the_sample_in_the_repository_is_the_generated_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("node.toml");
        if std::env::var_os("UPDATE_SAMPLES").is_some() {
            std::fs::write(&path, sample()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap_or_default(), sample(), "run the test with UPDATE_SAMPLES=1");
    }

    #[test]
    fn the_sample_shows_the_defaults() {
        let uncommented: String = sample()
            .lines()
            .filter_map(|line| line.strip_prefix("# "))
            .filter(|line| FIELDS.iter().any(|field| line.starts_with(&format!("{} = ", field.name))))
            .filter(|line| !line.starts_with("endpoint"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(uncommented.lines().count(), FIELDS.len() - 1);
        assert_eq!(file(&uncommented).unwrap(), file("").unwrap());
        assert_eq!(file("").unwrap().socket, Path::new("/run/rampart/rampart0.sock"));
    }

    #[test]
    fn the_sample_shows_the_guards_defaults() {
        let sample = sample();
        let (_, guard) = sample.split_once("\n[guard]\n").unwrap();
        let shown = |line: &&str| GUARD_FIELDS.iter().any(|field| line.starts_with(&format!("{} = ", field.name)));
        let lines: Vec<_> = guard.lines().filter_map(|line| line.strip_prefix("# ")).filter(shown).collect();
        assert_eq!(lines.len(), GUARD_FIELDS.len());
        assert_eq!(file(&format!("[guard]\n{}", lines.join("\n"))).unwrap(), file("").unwrap());
        assert_eq!(file("[guard]\nenabled = false").unwrap().guard, None);
    }

    #[test]
    fn a_span_of_time_has_a_unit_or_is_seconds() {
        for text in ["verify-interval = 90", "verify-interval = \"90s\"", "verify-interval = \"1m30s\""] {
            assert_eq!(file(text).unwrap().verify_interval, Duration::from_secs(90), "{text}");
        }
        for text in ["persistent-keepalive = 0", "persistent-keepalive = \"0s\""] {
            assert_eq!(file(text).unwrap().persistent_keepalive, None, "{text}");
        }
    }

    #[test]
    fn a_flag_beats_the_file() {
        let flags = Flags { interface: Some("wg7".parse().unwrap()), metrics: Some(Metrics::Off), ..Flags::default() };
        let parsed = parse(Path::new("x"), "interface = \"wg1\"\nlisten-port = 7").unwrap();
        let settings = resolve(&flags, parsed).unwrap();
        assert_eq!(settings.interface.as_str(), "wg7");
        assert_eq!(settings.socket, Path::new("/run/rampart/wg7.sock"));
        assert_eq!((settings.listen_port, settings.metrics), (7, Metrics::Off));
    }

    #[test]
    fn bad_values_are_refused_with_value_and_remedy() {
        for (text, words) in [
            ("listen_port = 1", &["`listen_port`", "did you mean `listen-port`"][..]),
            ("interfac = \"a\"", &["did you mean `interface`"]),
            ("zzzz = 1", &["`zzzz`", "known are `interface`"]),
            ("listen-port = 0", &["`0`", "1 to 65535"]),
            ("listen-port = 65536", &["`65536`", "1 to 65535"]),
            ("interface = \"a.b\"", &["`a.b`", "letters"]),
            ("interface = \"sixteencharacter\"", &["1 to 15"]),
            ("wireguard = \"fast\"", &["`fast`", "`userspace`"]),
            ("metrics = \"9586\"", &["`9586`", "`off`"]),
            ("mtu = 576", &["`576`", "1280"]),
            ("reconcile-interval = 0", &["reconcile-interval `0s`", "`1s`"]),
            ("verify-interval = \"0s\"", &["verify-interval `0s`", "`1s`"]),
            ("verify-interval = \"1d\"", &["verify-interval `1d`", "too long", "18h12m15s"]),
            ("persistent-keepalive = 65536", &["persistent-keepalive `18h12m16s`", "18h12m15s"]),
            ("reconcile-interval = -1", &["`-1`", "negative"]),
            ("reconcile-interval = \"soon\"", &["`soon`", "`90s`"]),
            ("endpoint = \"host:1\"", &["endpoint"]),
            ("listen-port", &["node.toml"]),
            ("guard = 1", &["guard"]),
            ("[gard]", &["`gard`", "did you mean `guard`"]),
            ("[guard]\nmodes = 1", &["`modes`", "did you mean `mode`"]),
            ("[guard]\nmode = \"skb\"", &["`skb`", "`xdp`"]),
            ("[guard]\ninterfaces = \"eth0\"", &["`eth0`", "`auto`"]),
            ("[guard]\ninterfaces = []", &["enabled = false"]),
            ("[guard]\nhandshakes-in-all = 0", &["`0`", "from 1"]),
        ] {
            let error = file(text).expect_err(text).to_string();
            for word in words {
                assert!(error.contains(word), "{text}: {error}");
            }
        }
    }

    #[test]
    fn a_named_file_must_be_there() {
        let flags = Flags { config: Some("/nonexistent/node.toml".into()), ..Flags::default() };
        assert!(load(&flags).unwrap_err().to_string().contains("`/nonexistent/node.toml`"));
    }
}
