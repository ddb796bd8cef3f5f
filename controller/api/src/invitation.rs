//! The one line that lets a node or an admin into a network: where the controller is, how to know it, and a secret that can
//! be used once.
//!
//! `rampart1:` and base64url, without padding, of a length-delimited protobuf message and the first 4 bytes of the SHA-256
//! of everything before them. A line that was cut off or changed is refused before anything is sent anywhere.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use policy::{NetworkName, NodeName};
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::endpoint::ControllerEndpoint;
use crate::tls::Fingerprint;

const PREFIX: &str = "rampart";
const VERSION: u32 = 1;
/// Bytes of the SHA-256 that end the line.
const CHECKSUM: usize = 4;
/// More endpoints than this are nobody's invitation.
const ENDPOINTS_MAX: usize = 16;
/// Longest life of an invitation, seconds: 30 days.
pub const INVITATION_MAX: u64 = 30 * 86_400;

/// An invitation of a node or an admin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    pub network: NetworkName,
    pub subject: Subject,
    /// Where the controller answers, as `host:port`, the first to be tried first.
    pub endpoints: Vec<String>,
    /// SHA-256 of the certificate of the network's authority.
    pub fingerprint: Fingerprint,
    pub secret: Secret,
    /// Seconds since the epoch.
    pub expires_at: u64,
}

/// Who is invited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Node(NodeName),
    /// The admin's name.
    Admin(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node:{name}"),
            Self::Admin(name) => write!(f, "admin:{name}"),
        }
    }
}

/// What the invited one shows to the controller, once. Not printed, compared in constant time, wiped when dropped.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// From 32 random bytes.
    pub fn new(random: [u8; 32]) -> Self {
        Self(random)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What the controller stores in its place: its SHA-256. (It is random, so nothing slower is needed.)
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.0).into()
    }
}

impl TryFrom<&[u8]> for Secret {
    type Error = InvitationError;

    fn try_from(bytes: &[u8]) -> Result<Self, Self::Error> {
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| InvitationError::Malformed {
            field: "secret",
            reason: format!("it has {} bytes, not 32", bytes.len()),
        })?;
        Ok(Self(bytes))
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }
}

impl Eq for Secret {}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

/// Why a line is no invitation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvitationError {
    #[error("invitation is empty; paste the whole line that `meshctl node invite` or `meshctl admin invite` printed")]
    Empty,
    #[error(
        "invitation begins with `{found}`, not with `rampart1:`; paste the whole line that `meshctl node invite` or \
         `meshctl admin invite` printed"
    )]
    OtherPrefix { found: String },
    #[error(
        "invitation has version {found}, and this program knows version 1; upgrade this machine's Rampart to the controller's"
    )]
    NewerVersion { found: u32 },
    #[error("invitation is cut off; paste the whole line, from `rampart1:` to its end")]
    Truncated,
    #[error(
        "invitation was changed on its way: {reason}; paste the line again, or make a new one with `meshctl node invite`"
    )]
    Tampered { reason: &'static str },
    #[error("invitation has a wrong `{field}`: {reason}; make a new one with `meshctl node invite`")]
    Malformed { field: &'static str, reason: String },
}

impl Invitation {
    /// Whether it has expired at `now`, in seconds since the epoch.
    pub fn is_expired(&self, now: u64) -> bool {
        now >= self.expires_at
    }
}

/// What the line carries.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct Wire {
    #[prost(string, tag = "1")]
    network: String,
    #[prost(oneof = "wire::Subject", tags = "2, 3")]
    subject: Option<wire::Subject>,
    #[prost(string, repeated, tag = "4")]
    endpoints: Vec<String>,
    #[prost(bytes = "vec", tag = "5")]
    fingerprint: Vec<u8>,
    #[prost(bytes = "vec", tag = "6")]
    secret: Vec<u8>,
    #[prost(uint64, tag = "7")]
    expires_at: u64,
}

mod wire {
    #[derive(Clone, PartialEq, Eq, prost::Oneof)]
    pub(super) enum Subject {
        #[prost(string, tag = "2")]
        Node(String),
        #[prost(string, tag = "3")]
        Admin(String),
    }
}

impl fmt::Display for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { network, subject, endpoints, fingerprint, secret, expires_at } = self;
        let mut wire = Wire {
            network: network.to_string(),
            subject: Some(match subject {
                Subject::Node(name) => wire::Subject::Node(name.to_string()),
                Subject::Admin(name) => wire::Subject::Admin(name.clone()),
            }),
            endpoints: endpoints.clone(),
            fingerprint: fingerprint.to_vec(),
            secret: secret.as_bytes().to_vec(),
            expires_at: *expires_at,
        };
        let mut bytes = Zeroizing::new(wire.encode_length_delimited_to_vec());
        wire.secret.zeroize();
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        let text = Zeroizing::new(URL_SAFE_NO_PAD.encode(&*bytes));
        write!(f, "{PREFIX}{VERSION}:{}", *text)
    }
}

impl FromStr for Invitation {
    type Err = InvitationError;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let bytes = decode(body(line.trim())?)?;
        let mut wire = Wire::decode_length_delimited(&bytes[..bytes.len() - CHECKSUM])
            .map_err(|_| InvitationError::Tampered { reason: "its fields cannot be read" })?;
        let invitation = from_wire(&wire);
        wire.secret.zeroize();
        invitation
    }
}

/// The base64 after `rampart1:`.
fn body(line: &str) -> Result<&str, InvitationError> {
    if line.is_empty() {
        return Err(InvitationError::Empty);
    }
    let other = || InvitationError::OtherPrefix { found: line.chars().take(9).collect() };
    let Some((head, body)) = line.split_once(':') else {
        let whole = format!("{PREFIX}{VERSION}:");
        return Err(if whole.starts_with(line) { InvitationError::Truncated } else { other() });
    };
    let version = head.strip_prefix(PREFIX).ok_or_else(other)?;
    match version.parse::<u32>() {
        Ok(VERSION) if version == "1" => Ok(body),
        Ok(found) if found > VERSION && !version.starts_with(['0', '+']) => {
            Err(InvitationError::NewerVersion { found })
        }
        _ => Err(other()),
    }
}

/// The length-delimited message and its checksum, which has been checked.
fn decode(body: &str) -> Result<Zeroizing<Vec<u8>>, InvitationError> {
    let tampered = |reason| Err(InvitationError::Tampered { reason });
    if body.chars().any(char::is_whitespace) {
        return tampered("there is white space in it");
    }
    let bytes = match URL_SAFE_NO_PAD.decode(body) {
        Ok(bytes) => Zeroizing::new(bytes),
        // A character too many or too few at the end shows as one of these.
        Err(base64::DecodeError::InvalidLength(_) | base64::DecodeError::InvalidLastSymbol(..)) => {
            return Err(InvitationError::Truncated);
        }
        Err(_) => return tampered("there are characters in it that no invitation has"),
    };
    let Ok(length) = prost::decode_length_delimiter(&bytes[..]) else {
        return Err(InvitationError::Truncated);
    };
    let expected = prost::length_delimiter_len(length).saturating_add(length).saturating_add(CHECKSUM);
    if bytes.len() < expected {
        return Err(InvitationError::Truncated);
    }
    if bytes.len() > expected {
        return tampered("there is something after its end");
    }
    let (message, sum) = bytes.split_at(bytes.len() - CHECKSUM);
    if checksum(message) != sum {
        return tampered("its checksum is wrong");
    }
    Ok(bytes)
}

fn checksum(message: &[u8]) -> [u8; CHECKSUM] {
    let mut hash = Sha256::new();
    hash.update(format!("{PREFIX}{VERSION}:"));
    hash.update(message);
    let [a, b, c, d, ..] = <[u8; 32]>::from(hash.finalize());
    [a, b, c, d]
}

fn from_wire(wire: &Wire) -> Result<Invitation, InvitationError> {
    let malformed = |field, reason: String| InvitationError::Malformed { field, reason };
    let Wire { network, subject, endpoints, fingerprint, secret, expires_at } = wire;
    if endpoints.is_empty() || endpoints.len() > ENDPOINTS_MAX {
        return Err(malformed("endpoints", format!("there are {}, not 1 to {ENDPOINTS_MAX}", endpoints.len())));
    }
    for endpoint in endpoints {
        endpoint.parse::<ControllerEndpoint>().map_err(|error| malformed("endpoints", error.to_string()))?;
    }
    Ok(Invitation {
        network: network.parse().map_err(|error: policy::NameError| malformed("network", error.to_string()))?,
        subject: match subject {
            Some(wire::Subject::Node(name)) => {
                Subject::Node(name.parse().map_err(|error: policy::NameError| malformed("node", error.to_string()))?)
            }
            Some(wire::Subject::Admin(name)) if crate::identity::is_admin_name(name) => Subject::Admin(name.clone()),
            Some(wire::Subject::Admin(name)) => return Err(malformed("admin", format!("`{name}` is no name"))),
            None => return Err(malformed("subject", "it is missing".to_owned())),
        },
        endpoints: endpoints.clone(),
        fingerprint: fingerprint
            .as_slice()
            .try_into()
            .map_err(|_| malformed("fingerprint", format!("it has {} bytes, not 32", fingerprint.len())))?,
        secret: Secret::try_from(secret.as_slice())?,
        expires_at: *expires_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation(subject: Subject) -> Invitation {
        Invitation {
            network: "corp".parse().expect("a name"),
            subject,
            endpoints: vec!["controller.example:7443".to_owned(), "[2001:db8::1]:7443".to_owned()],
            fingerprint: std::array::from_fn(|i| i as u8),
            secret: Secret::new(std::array::from_fn(|i| 0xff - i as u8)),
            expires_at: 1_800_000_000,
        }
    }

    fn node() -> Invitation {
        invitation(Subject::Node("web1".parse().expect("a name")))
    }

    #[test]
    fn an_invitation_parses_as_it_prints() {
        for invitation in [node(), invitation(Subject::Admin("alice".to_owned()))] {
            let line = invitation.to_string();
            assert!(line.starts_with("rampart1:") && !line.contains(char::is_whitespace) && line.len() < 260, "{line}");
            assert_eq!(line.parse(), Ok(invitation.clone()));
            assert_eq!(format!("  {line}\n").parse(), Ok(invitation));
        }
    }

    #[test]
    fn a_change_of_any_character_is_refused() {
        let line = node().to_string();
        for at in 0..line.len() {
            for other in ["A", "b", "7", "_", "-", " ", ":", "="] {
                if line[at..=at] == *other {
                    continue;
                }
                let changed = format!("{}{other}{}", &line[..at], &line[at + 1..]);
                assert!(changed.parse::<Invitation>().is_err(), "`{other}` at {at}");
            }
        }
    }

    #[test]
    fn a_line_cut_off_anywhere_is_refused_as_such() {
        let line = node().to_string();
        assert_eq!("".parse::<Invitation>(), Err(InvitationError::Empty));
        for end in 1..line.len() {
            assert_eq!(line[..end].parse::<Invitation>(), Err(InvitationError::Truncated), "{end}");
        }
        for extra in ["A", "AAAA", "rampart1:"] {
            assert!(format!("{line}{extra}").parse::<Invitation>().is_err());
        }
        let middle = format!("{} {}", &line[..60], &line[60..]);
        assert!(matches!(middle.parse::<Invitation>(), Err(InvitationError::Tampered { .. })));
    }

    #[test]
    fn other_lines_say_what_they_are() {
        let line = node().to_string();
        let newer = line.replacen("rampart1:", "rampart2:", 1);
        assert_eq!(newer.parse::<Invitation>(), Err(InvitationError::NewerVersion { found: 2 }));
        for other in ["hello", "wg1:abc", "Rampart1:abc", "rampart01:abc", "rampart:abc", "rampart+1:a", "rampart0:a"] {
            let error = other.parse::<Invitation>().expect_err(other);
            assert!(matches!(error, InvitationError::OtherPrefix { .. }), "{other}: {error}");
        }
    }

    #[test]
    fn the_secret_is_not_printed() {
        let text = format!("{:?}", node());
        assert!(text.contains("redacted") && !text.contains("255, 254"), "{text}");
    }

    #[test]
    fn a_well_sealed_line_is_checked_all_the_same() {
        let mut bad = node();
        bad.endpoints = vec!["https://controller".to_owned()];
        assert!(matches!(
            bad.to_string().parse::<Invitation>(),
            Err(InvitationError::Malformed { field: "endpoints", .. })
        ));
        bad.endpoints.clear();
        assert!(matches!(
            bad.to_string().parse::<Invitation>(),
            Err(InvitationError::Malformed { field: "endpoints", .. })
        ));
        assert!(bad.is_expired(1_800_000_000) && !bad.is_expired(1_799_999_999));
    }
}
