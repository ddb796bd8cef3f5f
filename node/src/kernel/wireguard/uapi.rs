//! The text that userspace WireGuard implementations are configured by (wireguard.com/xplatform), which `wg` speaks
//! too: lines of `key=value`, ended by an empty one. One codec for both ends of the socket.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, BufRead};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use policy::PublicKey;
use zeroize::Zeroizing;

use crate::key::{KEY_LENGTH, PrivateKey};

/// Bytes of one message. 10,000 peers with twenty prefixes each stay below it.
const MESSAGE_LENGTH: usize = 16 << 20;

/// Bytes of one line; a key with its name is the longest and takes 79.
const LINE_LENGTH: usize = 256;

/// What a client asks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Get,
    Set(Set),
}

/// Changes to a device; what is `None` stays.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) private_key: Option<PrivateKey>,
    pub(super) listen_port: Option<u16>,
    /// 0 takes the mark away.
    pub(super) fwmark: Option<u32>,
    /// Peers that are not named are removed.
    pub(super) replace_peers: bool,
    pub(super) peers: Vec<SetPeer>,
}

/// Changes to one peer; what is `None` stays.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SetPeer {
    pub(super) public_key: PublicKey,
    pub(super) remove: bool,
    /// A peer that is not there is not added.
    pub(super) update_only: bool,
    pub(super) preshared_key: Option<SharedKey>,
    pub(super) endpoint: Option<SocketAddr>,
    /// Seconds, 0 for none.
    pub(super) persistent_keepalive: Option<u16>,
    pub(super) replace_allowed_ips: bool,
    pub(super) add_allowed_ips: BTreeSet<IpNet>,
    pub(super) remove_allowed_ips: BTreeSet<IpNet>,
}

/// A preshared key; zeros stand for none.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct SharedKey(pub(super) Zeroizing<[u8; KEY_LENGTH]>);

/// A device as it answers `get=1`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) private_key: Option<PrivateKey>,
    pub(super) listen_port: u16,
    pub(super) fwmark: u32,
    pub(super) peers: Vec<AnswerPeer>,
}

/// One peer of an [`Answer`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct AnswerPeer {
    pub(super) public_key: PublicKey,
    pub(super) preshared_key: Option<SharedKey>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) persistent_keepalive: u16,
    pub(super) last_handshake: Option<SystemTime>,
    pub(super) received_bytes: u64,
    pub(super) sent_bytes: u64,
    pub(super) allowed_ips: BTreeSet<IpNet>,
}

impl SetPeer {
    pub(super) fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            replace_allowed_ips: false,
            add_allowed_ips: BTreeSet::new(),
            remove_allowed_ips: BTreeSet::new(),
        }
    }
}

impl AnswerPeer {
    fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: 0,
            last_handshake: None,
            received_bytes: 0,
            sent_bytes: 0,
            allowed_ips: BTreeSet::new(),
        }
    }
}

impl std::fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SharedKey(redacted)")
    }
}

/// Reads one message without its empty line; `None` at the end of the stream. The text may hold private keys.
pub(super) fn read_message(reader: &mut impl BufRead) -> io::Result<Option<Zeroizing<String>>> {
    let mut text = Zeroizing::new(String::new());
    loop {
        let start = text.len();
        reserve(&mut text);
        let read = io::Read::take(&mut *reader, LINE_LENGTH as u64).read_line(&mut text)?;
        if read == 0 {
            return if text.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        match &text[start..] {
            "\n" if start == 0 => text.clear(),
            "\n" => {
                text.truncate(start);
                return Ok(Some(text));
            }
            _ if read == LINE_LENGTH => return Err(too_long("line is longer than 256 bytes")),
            _ if text.len() > MESSAGE_LENGTH => return Err(too_long("message is longer than 16 MiB")),
            _ => {}
        }
    }
}

fn too_long(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Makes room for one line. A string that grows by itself leaves its old buffer behind, and what is in it; this copies
/// and wipes.
fn reserve(text: &mut Zeroizing<String>) {
    if text.capacity() - text.len() < LINE_LENGTH {
        let mut larger = Zeroizing::new(String::with_capacity(text.capacity() * 2 + LINE_LENGTH));
        larger.push_str(text);
        *text = larger;
    }
}

/// A line that is not understood. Values are left out: they may be keys.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ParseError {
    #[error("line {0} is not `key=value`")]
    NoValue(usize),
    #[error("key `{0}` is unknown or in the wrong place")]
    Key(String),
    #[error("the value of `{0}` is malformed")]
    Value(&'static str),
    #[error("the request begins with neither `get=1` nor `set=1`")]
    Verb,
}

impl Request {
    pub(super) fn parse(text: &str) -> Result<Self, ParseError> {
        match text.split_once('\n').map_or((text, ""), |parts| parts) {
            ("get=1", "") => Ok(Self::Get),
            ("set=1", rest) => Set::parse(rest).map(Self::Set),
            _ => Err(ParseError::Verb),
        }
    }

    pub(super) fn print(&self) -> Zeroizing<String> {
        match self {
            Self::Get => Zeroizing::new("get=1\n\n".into()),
            Self::Set(set) => set.print(),
        }
    }
}

impl Set {
    fn parse(text: &str) -> Result<Self, ParseError> {
        let mut set = Self::default();
        for line in lines(text) {
            let (key, value) = line?;
            match (key, set.peers.last_mut()) {
                ("public_key", _) => set.peers.push(SetPeer::new(parse_public(value)?)),
                (_, Some(peer)) => peer.set(key, value)?,
                ("private_key", None) => set.private_key = Some(parse_private(value)?),
                ("listen_port", None) => set.listen_port = Some(number(value, "listen_port")?),
                ("fwmark", None) => set.fwmark = Some(number(value, "fwmark")?),
                ("replace_peers", None) => set.replace_peers = flag(value, "replace_peers")?,
                _ => return Err(ParseError::Key(key.into())),
            }
        }
        Ok(set)
    }

    fn print(&self) -> Zeroizing<String> {
        let mut text = Printer::new();
        text.line("set", 1);
        if let Some(key) = &self.private_key {
            text.key("private_key", key.as_bytes());
        }
        text.option("listen_port", self.listen_port);
        text.option("fwmark", self.fwmark);
        text.flag("replace_peers", self.replace_peers);
        for peer in &self.peers {
            text.key("public_key", peer.public_key.as_bytes());
            text.flag("remove", peer.remove);
            text.flag("update_only", peer.update_only);
            if let Some(key) = &peer.preshared_key {
                text.key("preshared_key", &key.0);
            }
            text.option("endpoint", peer.endpoint);
            text.option("persistent_keepalive_interval", peer.persistent_keepalive);
            text.flag("replace_allowed_ips", peer.replace_allowed_ips);
            for allowed in &peer.add_allowed_ips {
                text.line("allowed_ip", allowed);
            }
            for allowed in &peer.remove_allowed_ips {
                text.line("allowed_ip", format_args!("-{allowed}"));
            }
        }
        text.end()
    }
}

impl SetPeer {
    fn set(&mut self, key: &str, value: &str) -> Result<(), ParseError> {
        match key {
            "remove" => self.remove = flag(value, "remove")?,
            "update_only" => self.update_only = flag(value, "update_only")?,
            "preshared_key" => self.preshared_key = Some(parse_shared(value)?),
            "endpoint" => self.endpoint = Some(number(value, "endpoint")?),
            "persistent_keepalive_interval" => {
                self.persistent_keepalive = Some(number(value, "persistent_keepalive_interval")?);
            }
            "replace_allowed_ips" => self.replace_allowed_ips = flag(value, "replace_allowed_ips")?,
            "allowed_ip" => match value.strip_prefix('-') {
                Some(removed) => self.remove_allowed_ips.extend([prefix(removed)?]),
                None => self.add_allowed_ips.extend([prefix(value)?]),
            },
            "protocol_version" if value == "1" => {}
            _ => return Err(ParseError::Key(key.into())),
        }
        Ok(())
    }
}

impl Answer {
    /// Parses the answer to `get=1`; the inner error is the `errno` that it gives instead of a device.
    pub(super) fn parse(text: &str) -> Result<Result<Self, i32>, ParseError> {
        let mut answer = Self::default();
        let mut handshake = (0, 0);
        let mut errno = 0;
        for line in lines(text) {
            let (key, value) = line?;
            match (key, answer.peers.last_mut()) {
                ("errno", _) => errno = number::<i32>(value, "errno")?,
                ("public_key", _) => {
                    handshake = (0, 0);
                    answer.peers.push(AnswerPeer::new(parse_public(value)?));
                }
                ("last_handshake_time_sec", Some(peer)) => {
                    handshake.0 = number(value, "last_handshake_time_sec")?;
                    peer.last_handshake = time(handshake);
                }
                ("last_handshake_time_nsec", Some(peer)) => {
                    handshake.1 = number(value, "last_handshake_time_nsec")?;
                    peer.last_handshake = time(handshake);
                }
                (_, Some(peer)) => peer.set(key, value)?,
                ("private_key", None) => answer.private_key = Some(parse_private(value)?),
                ("listen_port", None) => answer.listen_port = number(value, "listen_port")?,
                ("fwmark", None) => answer.fwmark = number(value, "fwmark")?,
                _ => return Err(ParseError::Key(key.into())),
            }
        }
        Ok(if errno == 0 { Ok(answer) } else { Err(errno.abs()) })
    }

    /// As `wg` wants it, with `errno=0`.
    pub(super) fn print(&self) -> Zeroizing<String> {
        let mut text = Printer::new();
        if let Some(key) = &self.private_key {
            text.key("private_key", key.as_bytes());
        }
        text.line("listen_port", self.listen_port);
        text.option("fwmark", Some(self.fwmark).filter(|mark| *mark != 0));
        for peer in &self.peers {
            text.key("public_key", peer.public_key.as_bytes());
            if let Some(key) = &peer.preshared_key {
                text.key("preshared_key", &key.0);
            }
            text.option("endpoint", peer.endpoint);
            text.line("persistent_keepalive_interval", peer.persistent_keepalive);
            let handshake = peer.last_handshake.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            let handshake = handshake.unwrap_or_default();
            text.line("last_handshake_time_sec", handshake.as_secs());
            text.line("last_handshake_time_nsec", handshake.subsec_nanos());
            text.line("rx_bytes", peer.received_bytes);
            text.line("tx_bytes", peer.sent_bytes);
            for allowed in &peer.allowed_ips {
                text.line("allowed_ip", allowed);
            }
        }
        text.line("errno", 0);
        text.end()
    }
}

impl AnswerPeer {
    fn set(&mut self, key: &str, value: &str) -> Result<(), ParseError> {
        match key {
            "preshared_key" => self.preshared_key = Some(parse_shared(value)?).filter(|key| *key.0 != [0; KEY_LENGTH]),
            "endpoint" => self.endpoint = Some(number(value, "endpoint")?),
            "persistent_keepalive_interval" => {
                self.persistent_keepalive = number(value, "persistent_keepalive_interval")?;
            }
            "rx_bytes" => self.received_bytes = number(value, "rx_bytes")?,
            "tx_bytes" => self.sent_bytes = number(value, "tx_bytes")?,
            "allowed_ip" => self.allowed_ips.extend([prefix(value)?]),
            "protocol_version" if value == "1" => {}
            _ => return Err(ParseError::Key(key.into())),
        }
        Ok(())
    }
}

/// The answer to `set=1`, and to what is not understood. `errno` is positive; on the wire it is negative.
pub(super) fn print_errno(errno: i32) -> String {
    format!("errno={}\n\n", -errno.abs())
}

/// A message as it grows, wiped when it is dropped.
struct Printer(Zeroizing<String>);

impl Printer {
    fn new() -> Self {
        Self(Zeroizing::new(String::new()))
    }

    fn line(&mut self, key: &str, value: impl std::fmt::Display) {
        reserve(&mut self.0);
        writeln!(self.0, "{key}={value}").expect("a string takes all text");
    }

    fn option(&mut self, key: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.line(key, value);
        }
    }

    fn flag(&mut self, key: &str, value: bool) {
        if value {
            self.line(key, "true");
        }
    }

    fn key(&mut self, key: &str, bytes: &[u8; KEY_LENGTH]) {
        reserve(&mut self.0);
        self.0.push_str(key);
        self.0.push('=');
        let mut digits = Zeroizing::new([0; 2 * KEY_LENGTH]);
        hex::encode_to_slice(bytes, digits.as_mut_slice()).expect("two digits a byte");
        self.0.push_str(std::str::from_utf8(digits.as_slice()).expect("hexadecimal digits are ASCII"));
        self.0.push('\n');
    }

    fn end(mut self) -> Zeroizing<String> {
        reserve(&mut self.0);
        self.0.push('\n');
        self.0
    }
}

fn lines(text: &str) -> impl Iterator<Item = Result<(&str, &str), ParseError>> {
    text.lines().enumerate().map(|(line, text)| text.split_once('=').ok_or(ParseError::NoValue(line + 1)))
}

fn number<T: std::str::FromStr>(value: &str, key: &'static str) -> Result<T, ParseError> {
    value.parse().map_err(|_| ParseError::Value(key))
}

fn flag(value: &str, key: &'static str) -> Result<bool, ParseError> {
    if value == "true" { Ok(true) } else { Err(ParseError::Value(key)) }
}

/// Host bits are dropped, as the kernel drops them.
fn prefix(value: &str) -> Result<IpNet, ParseError> {
    number::<IpNet>(value, "allowed_ip").map(|net| net.trunc())
}

fn time((seconds, nanoseconds): (u64, u32)) -> Option<SystemTime> {
    let since = Duration::from_secs(seconds).checked_add(Duration::from_nanos(nanoseconds.into()))?;
    if since.is_zero() { None } else { SystemTime::UNIX_EPOCH.checked_add(since) }
}

fn parse_public(value: &str) -> Result<PublicKey, ParseError> {
    let bytes = key(value, "public_key")?;
    PublicKey::try_from(bytes.as_slice()).map_err(|_| ParseError::Value("public_key"))
}

fn parse_private(value: &str) -> Result<PrivateKey, ParseError> {
    let bytes = key(value, "private_key")?;
    PrivateKey::from_bytes(bytes.as_slice()).map_err(|_| ParseError::Value("private_key"))
}

fn parse_shared(value: &str) -> Result<SharedKey, ParseError> {
    key(value, "preshared_key").map(SharedKey)
}

fn key(text: &str, name: &'static str) -> Result<Zeroizing<[u8; KEY_LENGTH]>, ParseError> {
    let mut bytes = Zeroizing::new([0; KEY_LENGTH]);
    hex::decode_to_slice(text, bytes.as_mut_slice()).map_err(|_| ParseError::Value(name))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
