//! A remote admin's key, certificate and endpoints, in a directory of their own.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use controller_api::defaults::renew_after;
use controller_api::identity::validity;
use controller_api::tls::{self, ClientIdentity, Trust};
use controller_api::v1;
use controller_api::v1::sync_client::SyncClient;
use rcgen::{CertificateParams, KeyPair};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tonic::transport::Channel;
use zeroize::Zeroizing;

use super::connection::timed;
use super::{Failure, time, warn, with_sources};

const PROFILE: &str = "admin.toml";
const KEY: &str = "key.pem";
const CERTIFICATE: &str = "certificate.pem";
const AUTHORITY: &str = "authority.pem";

/// What is not secret and not a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Profile {
    /// The network's name.
    pub(crate) network: String,
    /// The admin's name.
    pub(crate) name: String,
    /// The controller's, as `host:port`.
    pub(crate) endpoints: Vec<String>,
}

/// An identity as loaded.
#[derive(Debug)]
pub(crate) struct AdminIdentity {
    dir: PathBuf,
    pub(crate) endpoints: Vec<String>,
    pub(crate) credentials: ClientIdentity,
    authority: Vec<u8>,
    key: Zeroizing<String>,
}

impl AdminIdentity {
    /// The directory that was named, or the usual one.
    pub(crate) fn dir(named: Option<&Path>) -> Result<PathBuf, Failure> {
        if let Some(dir) = named {
            return Ok(dir.to_owned());
        }
        let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
        config
            .or_else(home)
            .map(|config| config.join("rampart"))
            .ok_or_else(|| Failure::usage("there is no home directory; name one with `--identity DIR`"))
    }

    pub(crate) fn is_in(dir: &Path) -> bool {
        dir.join(PROFILE).exists()
    }

    pub(crate) fn load(dir: &Path) -> Result<Self, Failure> {
        if !Self::is_in(dir) {
            return Err(Failure::Denied(format!(
                "there is no admin's identity in `{}`; ask an admin for `meshctl admin invite NAME`, then use \
                 `meshctl admin join`",
                dir.display()
            )));
        }
        let profile: Profile = toml::from_str(&read(&dir.join(PROFILE))?).map_err(|error| {
            Failure::failed(format!("`{}` is damaged: {}; join again", dir.join(PROFILE).display(), error.message()))
        })?;
        let key = Zeroizing::new(read(&dir.join(KEY))?);
        let credentials = ClientIdentity::from_pem(&read(&dir.join(CERTIFICATE))?, &key).map_err(|error| broken(dir, &error))?;
        let authority = tls::certificates_from_pem(&read(&dir.join(AUTHORITY))?).map_err(|error| broken(dir, &error))?;
        let authority = authority.first().map(|certificate| certificate.to_vec()).unwrap_or_default();
        Ok(Self { dir: dir.to_owned(), endpoints: profile.endpoints, credentials, authority, key })
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::authority(self.authority.clone())
    }

    /// Asks for a new certificate once the present one has used up most of its time. That it fails is no reason not to
    /// do what was asked for.
    pub(crate) async fn renew_if_due(&self, channel: Channel) {
        let Ok((begins, ends)) = validity(self.credentials.certificate()) else { return };
        let due = begins + renew_after(Duration::from_secs(ends.saturating_sub(begins))).as_secs();
        if time::now() < due {
            return;
        }
        if let Err(reason) = self.renew(channel).await {
            let until = time::timestamp(ends);
            warn(format!("certificate is good until {until} and could not be renewed: {reason}; have an admin invite you again"));
        }
    }

    async fn renew(&self, channel: Channel) -> Result<(), String> {
        let key = KeyPair::from_pem(&self.key).map_err(|error| error.to_string())?;
        let request = v1::RenewRequest { certificate_request: certificate_request(&key).map_err(|error| error.to_string())? };
        let answer = SyncClient::new(channel).renew(timed(request)).await.map_err(|status| status.message().to_owned())?;
        let certificate = pem(&answer.into_inner().certificate);
        write(&self.dir.join(CERTIFICATE), certificate.as_bytes(), 0o644).map_err(|error| error.to_string())
    }
}

/// A new identity's files, private ones for their owner only.
pub(crate) fn store(dir: &Path, profile: &Profile, key: &str, certificate: &[u8], authority: &[u8]) -> Result<(), Failure> {
    let profile = toml::to_string(profile).map_err(Failure::failed)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| unwritable(dir, &error))?;
    // The profile last: it is what says that an identity is there.
    for (name, content, mode) in [
        (KEY, key, 0o600),
        (CERTIFICATE, &pem(certificate), 0o644),
        (AUTHORITY, &pem(authority), 0o644),
        (PROFILE, &profile, 0o644),
    ] {
        let path = dir.join(name);
        write(&path, content.as_bytes(), mode).map_err(|error| unwritable(&path, &error))?;
    }
    Ok(())
}

/// PKCS #10 in DER. The names are the controller's to give.
pub(crate) fn certificate_request(key: &KeyPair) -> Result<Vec<u8>, rcgen::Error> {
    Ok(CertificateParams::default().serialize_request(key)?.der().to_vec())
}

/// A whole file or none: written beside, then renamed.
fn write(path: &Path, content: &[u8], mode: u32) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    let _ = fs::remove_file(&beside);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

fn pem(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| Failure::failed(format!("cannot read `{}`: {error}", path.display())))
}

fn unwritable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::failed(format!("cannot write `{}`: {error}; name another directory with `--identity DIR`", path.display()))
}

fn broken(dir: &Path, error: &tls::TlsError) -> Failure {
    Failure::failed(format!("identity in `{}` cannot be used: {}", dir.display(), with_sources(error)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn an_identity_is_stored_for_its_owner_and_loaded_again() {
        let home = tempfile::tempdir().expect("a directory");
        let dir = home.path().join("a/b");
        assert!(!AdminIdentity::is_in(&dir));
        assert!(matches!(AdminIdentity::load(&dir), Err(Failure::Denied(text)) if text.contains("meshctl admin join")));

        let key = KeyPair::generate().expect("a key");
        let certificate = CertificateParams::default().self_signed(&key).expect("a certificate");
        let profile =
            Profile { network: "corp".to_owned(), name: "alice".to_owned(), endpoints: vec!["host:7443".to_owned()] };
        store(&dir, &profile, &key.serialize_pem(), certificate.der(), certificate.der()).expect("stored");
        let identity = AdminIdentity::load(&dir).expect("loaded");
        assert_eq!(identity.endpoints, profile.endpoints);
        assert_eq!(identity.credentials.certificate(), certificate.der().as_ref());
        assert_eq!(identity.trust(), Trust::authority(certificate.der().to_vec()));
        let mode = |name: &str| fs::metadata(dir.join(name)).expect("a file").permissions().mode() & 0o777;
        assert_eq!(mode(KEY), 0o600);
        assert_eq!(mode(""), 0o700);

        fs::write(dir.join(CERTIFICATE), "garbage").expect("written");
        assert!(matches!(AdminIdentity::load(&dir), Err(Failure::Failed(text)) if text.contains("cannot be used")));
    }
}
