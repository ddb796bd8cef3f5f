//! A remote admin's key, certificate and endpoints, in a directory of their own.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use controller_api::defaults::renew_after;
use controller_api::identity::{Identity, validity};
use controller_api::time::timestamp;
use controller_api::tls::{self, ClientIdentity, Trust};
use controller_api::v1;
use controller_api::v1::admin_client::AdminClient;
use rcgen::{CertificateParams, KeyPair};
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;
use zeroize::Zeroizing;

use crate::connection::timed;
use crate::{Failure, with_sources};

const PROFILE: &str = "admin.toml";
const KEY: &str = "key.pem";
const PENDING_KEY: &str = "pending-key.pem";
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
    pub(crate) endpoints: Vec<String>,
    pub(crate) credentials: ClientIdentity,
    dir: PathBuf,
    name: String,
    authority: Vec<u8>,
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
        dir.join(PROFILE).exists() && dir.join(KEY).exists()
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
        let credentials =
            ClientIdentity::from_pem(&read(&dir.join(CERTIFICATE))?, &key).map_err(|error| broken(dir, &error))?;
        let authority =
            tls::certificates_from_pem(&read(&dir.join(AUTHORITY))?).map_err(|error| broken(dir, &error))?;
        let authority = authority.first().map(|certificate| certificate.to_vec()).unwrap_or_default();
        Ok(Self { dir: dir.to_owned(), name: profile.name, endpoints: profile.endpoints, credentials, authority })
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::authority(self.authority.clone())
    }

    /// Gets a new certificate when this one has used up most of its time. What goes wrong comes back as a warning: it is no
    /// reason to leave undone what was asked for. `now`: seconds since the epoch.
    pub(crate) async fn renew_if_due(&self, client: &mut AdminClient<Channel>, now: u64) -> Option<String> {
        let (begins, ends) = validity(self.credentials.certificate()).ok()?;
        if now < begins + renew_after(Duration::from_secs(ends.saturating_sub(begins))).as_secs() {
            return None;
        }
        match self.renew(client).await {
            // Whoever is not let in hears so from the call that was meant.
            Ok(()) | Err(Failure::Denied(_)) => None,
            Err(failure) => Some(format!(
                "this admin's certificate, good until {}, could not be renewed: {}; if that stays so, get a new one with \
                 `meshctl admin invite {}` and `meshctl admin join --replace`",
                timestamp(ends),
                failure.text().unwrap_or("nothing can be written"),
                self.name
            )),
        }
    }

    async fn renew(&self, client: &mut AdminClient<Channel>) -> Result<(), Failure> {
        let key = Zeroizing::new(read(&self.dir.join(KEY))?);
        let pair = KeyPair::from_pem(&key).map_err(|_| Failure::failed("private key cannot be read"))?;
        let certificate_request = certificate_request(&pair)
            .map_err(|error| Failure::failed(format!("cannot make a certificate request: {error}")))?;
        let request = timed(v1::RenewRequest { certificate_request });
        let v1::RenewResponse { certificate } = client.renew(request).await?.into_inner();
        let old = self.credentials.certificate();
        let names = |certificate: &[u8]| Identity::of_certificate(certificate).ok();
        let ends = |certificate: &[u8]| validity(certificate).map_or(0, |(_, ends)| ends);
        let usable = ClientIdentity::from_pem(&pem(&certificate), &key).is_ok();
        if !usable || names(&certificate) != names(old) || ends(&certificate) <= ends(old) {
            return Err(Failure::failed("controller sent a certificate that is of no use here"));
        }
        let path = self.dir.join(CERTIFICATE);
        write(&path, pem(&certificate).as_bytes()).map_err(|error| unwritable(&path, &error))
    }
}

/// The key to join with. It is on disk before the invitation is redeemed, and a second attempt uses the same: an
/// invitation can be redeemed again by the same key only.
pub(crate) fn pending_key(dir: &Path) -> Result<KeyPair, Failure> {
    let path = dir.join(PENDING_KEY);
    if let Ok(text) = fs::read_to_string(&path).map(Zeroizing::new)
        && let Ok(key) = KeyPair::from_pem(&text)
    {
        return Ok(key);
    }
    let key = KeyPair::generate().map_err(|error| Failure::failed(format!("cannot make a key: {error}")))?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| unwritable(dir, &error))?;
    let text = Zeroizing::new(key.serialize_pem());
    write(&path, text.as_bytes()).map_err(|error| unwritable(&path, &error))?;
    Ok(key)
}

/// What came back for the pending key, which becomes the identity's key.
pub(crate) fn store(dir: &Path, profile: &Profile, certificate: &[u8], authority: &[u8]) -> Result<(), Failure> {
    let profile = toml::to_string(profile).map_err(Failure::failed)?;
    for (name, content) in [(CERTIFICATE, &pem(certificate)), (AUTHORITY, &pem(authority)), (PROFILE, &profile)] {
        let path = dir.join(name);
        write(&path, content.as_bytes()).map_err(|error| unwritable(&path, &error))?;
    }
    let path = dir.join(KEY);
    fs::rename(dir.join(PENDING_KEY), &path).map_err(|error| unwritable(&path, &error))
}

/// PKCS #10 in DER. The names are the controller's to give.
pub(crate) fn certificate_request(key: &KeyPair) -> Result<Vec<u8>, rcgen::Error> {
    Ok(CertificateParams::default().serialize_request(key)?.der().to_vec())
}

/// A whole file or none, for its owner alone: written beside, under a name that no other process uses, then renamed.
fn write(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_file(&beside);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    let written = file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
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

    /// An identity in `dir`, its certificate signed by itself.
    fn stored(dir: &Path) -> Vec<u8> {
        let key = pending_key(dir).expect("a key");
        let certificate = CertificateParams::default().self_signed(&key).expect("a certificate");
        let profile =
            Profile { network: "corp".to_owned(), name: "alice".to_owned(), endpoints: vec!["host:7443".to_owned()] };
        store(dir, &profile, certificate.der(), certificate.der()).expect("stored");
        certificate.der().to_vec()
    }

    /// Breaks if a controller that cannot renew keeps an admin from working.
    #[tokio::test]
    async fn a_renewal_that_fails_is_a_warning() {
        let dir = tempfile::tempdir().expect("a directory");
        let certificate = stored(dir.path());
        let identity = AdminIdentity::load(dir.path()).expect("loaded");
        let nobody = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let mut client = AdminClient::new(nobody);
        let (begins, ends) = validity(&certificate).expect("a validity");
        assert_eq!(identity.renew_if_due(&mut client, begins).await, None);
        let warning = identity.renew_if_due(&mut client, ends).await.expect("a warning");
        for words in ["could not be renewed: controller went away", "good until", "meshctl admin invite alice"] {
            assert!(warning.contains(words), "{warning}");
        }
        assert_eq!(AdminIdentity::load(dir.path()).expect("as before").credentials.certificate(), certificate);
    }

    #[test]
    fn an_identity_is_stored_for_its_owner_and_loaded_again() {
        let home = tempfile::tempdir().expect("a directory");
        let dir = home.path().join("a/b");
        assert!(!AdminIdentity::is_in(&dir));
        assert!(matches!(AdminIdentity::load(&dir), Err(Failure::Denied(text)) if text.contains("meshctl admin join")));

        let key = pending_key(&dir).expect("a key");
        assert_eq!(pending_key(&dir).expect("the same key").serialize_pem(), key.serialize_pem());
        assert!(!AdminIdentity::is_in(&dir));
        let certificate = CertificateParams::default().self_signed(&key).expect("a certificate");
        let profile =
            Profile { network: "corp".to_owned(), name: "alice".to_owned(), endpoints: vec!["host:7443".to_owned()] };
        store(&dir, &profile, certificate.der(), certificate.der()).expect("stored");
        let identity = AdminIdentity::load(&dir).expect("loaded");
        assert_eq!(identity.endpoints, profile.endpoints);
        assert_eq!(identity.credentials.certificate(), certificate.der().as_ref());
        assert_eq!(identity.trust(), Trust::authority(certificate.der().to_vec()));
        let mode = |name: &str| fs::metadata(dir.join(name)).expect("a file").permissions().mode() & 0o777;
        assert_eq!(mode(KEY), 0o600);
        assert!(!dir.join(PENDING_KEY).exists());
        assert_eq!(mode(""), 0o700);

        fs::write(dir.join(CERTIFICATE), "garbage").expect("written");
        assert!(matches!(AdminIdentity::load(&dir), Err(Failure::Failed(text)) if text.contains("cannot be used")));
    }
}
