//! Who this node is: its keys, and the certificate that its network gave it for them.
//!
//! The keys are on disk before anybody hears of them, so that redeeming an invitation a second time shows the same ones.

use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use controller_api::identity as names;
use controller_api::invitation::Invitation;
use controller_api::tls::{self, ClientIdentity, Fingerprint, TlsError, Trust};
use policy::{NetworkName, NodeId, NodeName};
use rcgen::{CertificateParams, KeyPair};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::key::{KeyError, PrivateKey};
use host::file::{self, FileError};

const WIREGUARD_KEY: &str = "wireguard.key";
const TLS_KEY: &str = "tls.key";
const IDENTITY: &str = "identity.toml";
const INVITATION: &str = "invitation";
/// Longer than any of these files.
const FILE_MAX: u64 = 256 * 1024;

/// Both private keys. Made here, they never leave this machine.
pub struct Keys {
    pub wireguard: PrivateKey,
    tls: KeyPair,
}

/// What the network said when the invitation was redeemed, and since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub network: NetworkName,
    pub node: NodeId,
    pub name: NodeName,
    /// Where the controller answers.
    pub endpoints: Vec<String>,
    /// DER.
    pub certificate: Vec<u8>,
    /// DER.
    pub authority: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(
        "this machine has not joined a network: `noded join INVITATION`, with the line that `meshctl node invite` printed"
    )]
    NotJoined,
    #[error(transparent)]
    Disk(#[from] FileError),
    #[error("`{}` {reason}: `noded leave --force` and join anew", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("failed to make a key")]
    Key(#[from] KeyError),
    #[error("failed to make a TLS key or certificate request")]
    Tls(#[from] rcgen::Error),
    #[error(transparent)]
    Credentials(#[from] TlsError),
}

impl Keys {
    /// The keys of this state directory; made and written first where there are none.
    pub fn load_or_make(state_dir: &Path) -> Result<Self, IdentityError> {
        file::make_private_dir(state_dir)?;
        let path = state_dir.join(WIREGUARD_KEY);
        if is_missing(&path)? {
            file::write_private(&path, PrivateKey::generate()?.to_base64().as_bytes())?;
        }
        let path = state_dir.join(TLS_KEY);
        if is_missing(&path)? {
            let pem = Zeroizing::new(KeyPair::generate()?.serialize_pem());
            file::write_private(&path, pem.as_bytes())?;
        }
        Self::load(state_dir)
    }

    pub fn load(state_dir: &Path) -> Result<Self, IdentityError> {
        let path = state_dir.join(WIREGUARD_KEY);
        let text = read_text(&path)?;
        let wireguard = PrivateKey::from_base64(&text).map_err(|error| damaged(&path, error))?;
        let path = state_dir.join(TLS_KEY);
        let text = read_text(&path)?;
        let tls = KeyPair::from_pem(&text).map_err(|error| damaged(&path, error))?;
        Ok(Self { wireguard, tls })
    }

    /// PKCS #10, DER. The names in it do not matter: the certificate says whom the invitation was for.
    pub fn certificate_request(&self) -> Result<Vec<u8>, IdentityError> {
        let request = CertificateParams::default().serialize_request(&self.tls)?;
        Ok(request.der().to_vec())
    }

    /// What this node shows to its controller.
    pub fn client_identity(&self, identity: &Identity) -> Result<ClientIdentity, IdentityError> {
        Ok(ClientIdentity::from_der([identity.certificate.clone()], self.tls.serialize_der())?)
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("wireguard", &self.wireguard.public()).finish_non_exhaustive()
    }
}

/// As it lies on disk.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    network: String,
    node: u32,
    name: String,
    endpoints: Vec<String>,
    certificate: String,
    authority: String,
}

impl Identity {
    /// `NotJoined` where there is none.
    pub fn load(state_dir: &Path) -> Result<Self, IdentityError> {
        let path = state_dir.join(IDENTITY);
        if is_missing(&path)? {
            return Err(IdentityError::NotJoined);
        }
        let text = read_text(&path)?;
        let file: File = toml::from_str(&text).map_err(|error| damaged(&path, error.message()))?;
        Self::from_file(file).map_err(|reason| damaged(&path, reason))
    }

    pub fn store(&self, state_dir: &Path) -> Result<(), IdentityError> {
        let Self { network, node, name, endpoints, certificate, authority } = self;
        let file = File {
            network: network.to_string(),
            node: node.0,
            name: name.to_string(),
            endpoints: endpoints.clone(),
            certificate: pem(certificate),
            authority: pem(authority),
        };
        let path = state_dir.join(IDENTITY);
        let text = toml::to_string(&file).map_err(|error| damaged(&path, error))?;
        Ok(file::write_private(&path, text.as_bytes())?)
    }

    fn from_file(file: File) -> Result<Self, String> {
        let File { network, node, name, endpoints, certificate, authority } = file;
        let one = |text: &str| match tls::certificates_from_pem(text) {
            Ok(certificates) if certificates.len() == 1 => Ok(certificates[0].to_vec()),
            Ok(_) => Err("has more than one certificate in a place".to_owned()),
            Err(error) => Err(format!("is damaged ({error})")),
        };
        Ok(Self {
            network: network.parse().map_err(|error| format!("has no valid network ({error})"))?,
            node: NodeId(node),
            name: name.parse().map_err(|error| format!("has no valid name ({error})"))?,
            endpoints,
            certificate: one(&certificate)?,
            authority: one(&authority)?,
        })
    }

    /// How the controller is known.
    pub fn trust(&self) -> Trust {
        Trust::authority(self.authority.clone())
    }

    pub fn fingerprint(&self) -> Fingerprint {
        tls::fingerprint(&self.authority)
    }

    /// When the certificate begins and ends, in seconds since the epoch.
    pub fn validity(&self) -> Result<(u64, u64), names::IdentityError> {
        names::validity(&self.certificate)
    }
}

/// Keeps the invitation that this machine was let in by: with the same keys, and no others, it is good for a new
/// certificate when the old one has expired.
pub fn keep_invitation(state_dir: &Path, invitation: &Invitation) -> Result<(), FileError> {
    let line = Zeroizing::new(invitation.to_string());
    file::write_private(&state_dir.join(INVITATION), line.as_bytes())
}

/// What [`keep_invitation`] kept; `None` where there is nothing.
pub fn kept_invitation(state_dir: &Path) -> Result<Option<Invitation>, IdentityError> {
    let path = state_dir.join(INVITATION);
    if is_missing(&path)? {
        return Ok(None);
    }
    read_text(&path)?.parse().map(Some).map_err(|error| damaged(&path, error))
}

/// Removes keys, invitation and identity for good.
pub fn remove(state_dir: &Path) -> Result<(), FileError> {
    // The identity last: as long as it is there, `noded leave` can be repeated.
    for file in [TLS_KEY, WIREGUARD_KEY, INVITATION, IDENTITY] {
        file::remove(&state_dir.join(file))?;
    }
    Ok(())
}

fn is_missing(path: &Path) -> Result<bool, FileError> {
    match file::read(path, FILE_MAX) {
        Ok(_) => Ok(false),
        Err(error) if error.is_missing() => Ok(true),
        Err(error) => Err(error),
    }
}

fn read_text(path: &Path) -> Result<Zeroizing<String>, IdentityError> {
    let bytes = file::read(path, FILE_MAX)?;
    String::from_utf8(bytes).map(Zeroizing::new).map_err(|_| damaged(path, "is no text"))
}

fn damaged(path: &Path, reason: impl fmt::Display) -> IdentityError {
    let reason = reason.to_string();
    let reason =
        if reason.starts_with("is ") || reason.starts_with("has ") { reason } else { format!("is damaged ({reason})") };
    IdentityError::Damaged { path: path.to_owned(), reason }
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned() + "\n");
    format!("-----BEGIN CERTIFICATE-----\n{}-----END CERTIFICATE-----\n", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::default().self_signed(&key).unwrap().der().to_vec();
        Identity {
            network: "corp".parse().unwrap(),
            node: NodeId(7),
            name: "web1".parse().unwrap(),
            endpoints: vec!["192.0.2.1:7443".to_owned()],
            authority: certificate.clone(),
            certificate,
        }
    }

    #[test]
    fn keys_are_made_once() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("node");
        let first = Keys::load_or_make(&state_dir).unwrap();
        let second = Keys::load_or_make(&state_dir).unwrap();
        assert_eq!(first.wireguard, second.wireguard);
        assert_eq!(first.tls.serialize_der(), second.tls.serialize_der());
        assert!(!format!("{first:?}").contains(&*first.wireguard.to_base64()));
    }

    #[test]
    fn an_identity_reads_back_and_can_be_removed() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(Identity::load(directory.path()), Err(IdentityError::NotJoined)));
        let identity = identity();
        identity.store(directory.path()).unwrap();
        assert_eq!(Identity::load(directory.path()).unwrap(), identity);
        remove(directory.path()).unwrap();
        assert!(matches!(Identity::load(directory.path()), Err(IdentityError::NotJoined)));
    }

    #[test]
    fn damaged_files_are_named_with_a_remedy() {
        let directory = tempfile::tempdir().unwrap();
        for (file, content) in [(IDENTITY, "network = 1"), (IDENTITY, "\u{0}"), (IDENTITY, "")] {
            std::fs::write(directory.path().join(file), content).unwrap();
            let error = Identity::load(directory.path()).unwrap_err().to_string();
            assert!(error.contains("identity.toml` ") && error.contains("noded leave --force"), "{error}");
        }
        std::fs::write(directory.path().join(WIREGUARD_KEY), "short").unwrap();
        let error = Keys::load_or_make(directory.path()).unwrap_err().to_string();
        assert!(error.contains("wireguard.key`"), "{error}");
    }
}
