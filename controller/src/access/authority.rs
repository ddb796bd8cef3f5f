//! The network's own certificate authority: an ECDSA P-256 key that never leaves the state directory.
//!
//! What a certificate says (network, identity) is for the caller to check against the state of the network at every call:
//! a signature and a date alone let nobody in.

use std::fmt;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use controller_api::defaults::{AUTHORITY_LIFETIME, CLOCK_TOLERANCE, CONTROLLER_CERTIFICATE_LIFETIME};
use controller_api::identity::Identity;
use controller_api::tls::{self, Fingerprint, SERVER_NAME, ServerIdentity, TlsError};
use policy::NetworkName;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509CertificationRequest};
use zeroize::Zeroizing;

use crate::store::account::KeyHash;

/// Within the state directory.
pub const KEY_FILE: &str = "authority.key";
/// Within the state directory.
pub const CERTIFICATE_FILE: &str = "authority.crt";
/// Largest certificate request that is looked at: a P-256 one has about 250 bytes.
const REQUEST_MAX: usize = 8_192;

/// Why the authority cannot be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("failed to {what} `{}`", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`{}` can be read by others (mode `{mode:o}`); if nobody did, `chmod 600` it, else make a new network", path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("`{}` is no {what}; restore a copy of the state directory", path.display())]
    Unreadable {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("`{}` is not the authority that the database was made with; restore both from one copy of the state directory", path.display())]
    Other { path: PathBuf },
    #[error("failed to {what}")]
    Certificate {
        what: &'static str,
        #[source]
        source: rcgen::Error,
    },
    #[error("failed to set up TLS")]
    Tls(#[source] TlsError),
}

/// A certificate request that is not signed, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("certificate request has {found} bytes, more than the {max} that are looked at; send one of an ECDSA P-256 key", max = REQUEST_MAX)]
    TooLong { found: usize },
    #[error(
        "certificate request cannot be used: {reason}; send PKCS #10 in DER, of an ECDSA P-256 key, signed by that key"
    )]
    Malformed { reason: String },
}

/// A request whose signature was checked: whoever sent it has the private key.
#[derive(Clone)]
pub struct CertificateRequest {
    parsed: CertificateSigningRequestParams,
    key: KeyHash,
}

impl CertificateRequest {
    /// Parses PKCS #10 in DER. Names, usages and dates in it are ignored.
    pub fn parse(der: &[u8]) -> Result<Self, RequestError> {
        if der.len() > REQUEST_MAX {
            return Err(RequestError::TooLong { found: der.len() });
        }
        let malformed = |reason: String| RequestError::Malformed { reason };
        let (rest, raw) = X509CertificationRequest::from_der(der).map_err(|error| malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed(format!("{} bytes follow it", rest.len())));
        }
        let key = KeyHash(Sha256::digest(raw.certification_request_info.subject_pki.raw).into());
        let parsed = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
            .map_err(|error| malformed(error.to_string()))?;
        if parsed.public_key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(malformed("its key is not ECDSA P-256".to_owned()));
        }
        Ok(Self { parsed, key })
    }

    pub fn key(&self) -> KeyHash {
        self.key
    }
}

impl fmt::Debug for CertificateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateRequest").field("key", &self.key).finish_non_exhaustive()
    }
}

/// The authority of one network.
pub struct Authority {
    network: NetworkName,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("network", &self.network).field("key", &"redacted").finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority in an existing directory. `now`: seconds since the epoch.
    pub fn create(directory: &Path, network: &NetworkName, now: u64) -> Result<Self, AuthorityError> {
        let fail = |what| move |source| AuthorityError::Certificate { what, source };
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(fail("make the authority's key"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name(&format!("rampart {network}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        set_validity(&mut params, now, AUTHORITY_LIFETIME);
        let certificate = params.self_signed(&key).map_err(fail("sign the authority's certificate"))?;
        let pem = Zeroizing::new(key.serialize_pem());
        write_new(&directory.join(KEY_FILE), pem.as_bytes(), 0o600)?;
        write_new(&directory.join(CERTIFICATE_FILE), certificate.pem().as_bytes(), 0o644)?;
        Self::open(directory, network, None)
    }

    /// Reads an authority. `expected`: the fingerprint that it must have.
    pub fn open(directory: &Path, network: &NetworkName, expected: Option<&[u8]>) -> Result<Self, AuthorityError> {
        let path = directory.join(KEY_FILE);
        let mode = std::fs::metadata(&path).map_err(io("read", &path))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(AuthorityError::Exposed { path, mode });
        }
        let pem = Zeroizing::new(std::fs::read_to_string(&path).map_err(io("read", &path))?);
        let key = KeyPair::from_pem(&pem).map_err(unreadable("private key", &path))?;
        let path = directory.join(CERTIFICATE_FILE);
        let pem = std::fs::read_to_string(&path).map_err(io("read", &path))?;
        let certificates = tls::certificates_from_pem(&pem).map_err(unreadable("certificate", &path))?;
        let [certificate] = &certificates[..] else {
            return Err(AuthorityError::Other { path });
        };
        let belongs = X509Certificate::from_der(certificate)
            .is_ok_and(|(_, parsed)| parsed.public_key().subject_public_key.data.as_ref() == key.public_key_raw());
        if !belongs || expected.is_some_and(|expected| tls::fingerprint(certificate) != expected) {
            return Err(AuthorityError::Other { path });
        }
        let issuer = Issuer::from_ca_cert_der(certificate, key).map_err(unreadable("certificate", &path))?;
        Ok(Self { network: network.clone(), certificate: certificate.clone(), issuer })
    }

    pub fn network(&self) -> &NetworkName {
        &self.network
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What invitations carry.
    pub fn fingerprint(&self) -> Fingerprint {
        tls::fingerprint(&self.certificate)
    }

    /// A certificate (DER) for a node or an admin.
    pub fn sign(
        &self,
        request: &CertificateRequest,
        identity: &Identity,
        now: u64,
        lifetime: Duration,
    ) -> Result<Vec<u8>, AuthorityError> {
        let mut params = self.leaf(identity, ExtendedKeyUsagePurpose::ClientAuth, now, lifetime)?;
        params.use_authority_key_identifier_extension = true;
        let signed = params
            .signed_by(&request.parsed.public_key, &self.issuer)
            .map_err(|source| AuthorityError::Certificate { what: "sign a certificate", source })?;
        Ok(signed.der().to_vec())
    }

    /// A new key and certificate for the controller's own listener.
    pub fn server_identity(&self, now: u64) -> Result<ServerIdentity, AuthorityError> {
        let fail = |what| move |source| AuthorityError::Certificate { what, source };
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(fail("make the controller's key"))?;
        let lifetime = CONTROLLER_CERTIFICATE_LIFETIME;
        let mut params = self.leaf(&Identity::Controller, ExtendedKeyUsagePurpose::ServerAuth, now, lifetime)?;
        let dns = SERVER_NAME.try_into().map_err(fail("name the controller"))?;
        params.subject_alt_names.push(SanType::DnsName(dns));
        let leaf = params.signed_by(&key, &self.issuer).map_err(fail("sign the controller's certificate"))?;
        let chain = [leaf.der().to_vec(), self.certificate.to_vec()];
        ServerIdentity::from_der(chain, key.serialize_der()).map_err(AuthorityError::Tls)
    }

    fn leaf(
        &self,
        identity: &Identity,
        usage: ExtendedKeyUsagePurpose,
        now: u64,
        lifetime: Duration,
    ) -> Result<CertificateParams, AuthorityError> {
        let uri = identity.to_uri(&self.network);
        let mut params = CertificateParams::default();
        params.distinguished_name = name(&uri);
        let uri = uri.as_str().try_into();
        let uri = uri.map_err(|source| AuthorityError::Certificate { what: "name a certificate's holder", source })?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.serial_number = Some(random_serial()?);
        set_validity(&mut params, now, lifetime);
        Ok(params)
    }
}

/// 16 random bytes, positive.
fn random_serial() -> Result<SerialNumber, AuthorityError> {
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(|_| AuthorityError::Certificate {
        what: "draw a serial number",
        source: rcgen::Error::RingUnspecified,
    })?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&serial))
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

/// From a little before `now`, for clocks that differ, to `lifetime` after it.
fn set_validity(params: &mut CertificateParams, now: u64, lifetime: Duration) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(now.saturating_sub(CLOCK_TOLERANCE.as_secs()));
    params.not_after = epoch + Duration::from_secs(now) + lifetime;
}

fn io(what: &'static str, path: &Path) -> impl Fn(std::io::Error) -> AuthorityError + use<> {
    let path = path.to_owned();
    move |source| AuthorityError::Io { what, path: path.clone(), source }
}

fn unreadable<E>(what: &'static str, path: &Path) -> impl Fn(E) -> AuthorityError + use<E>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let path = path.to_owned();
    move |source| AuthorityError::Unreadable { what, path: path.clone(), source: Box::new(source) }
}

/// A file that was not there, on the disk when this returns.
fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), AuthorityError> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(path).map_err(io("create", path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::principal::key_of_certificate;
    use controller_api::identity::validity;
    use policy::NodeId;

    const NOW: u64 = 1_700_000_000;

    fn network() -> NetworkName {
        "corp".parse().expect("a name")
    }

    fn request() -> (KeyPair, Vec<u8>) {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
        let mut params = CertificateParams::new(vec!["controller.rampart".to_owned()]).expect("params");
        params.distinguished_name = name("rampart://corp/admin/mallory");
        let der = params.serialize_request(&key).expect("a request").der().to_vec();
        (key, der)
    }

    #[test]
    fn a_certificate_names_the_identity_and_nothing_the_request_asked_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let authority = Authority::create(directory.path(), &network(), NOW).expect("an authority");
        let (key, der) = request();
        let request = CertificateRequest::parse(&der).expect("a request");
        let day = Duration::from_secs(86_400);
        let certificate = authority.sign(&request, &Identity::Node(NodeId(7)), NOW, day).expect("signed");
        assert_eq!(Identity::of_certificate(&certificate), Ok((network(), Identity::Node(NodeId(7)))));
        assert_eq!(validity(&certificate), Ok((NOW - 300, NOW + 86_400)));
        assert_eq!(key_of_certificate(&certificate), Some(request.key()));
        let (_, parsed) = X509Certificate::from_der(&certificate).expect("a certificate");
        assert_eq!(parsed.public_key().subject_public_key.data.as_ref(), key.public_key_raw());
        assert!(!parsed.is_ca());
        let names = parsed.subject_alternative_name().expect("parses").expect("names");
        assert_eq!(names.value.general_names.len(), 1);
        parsed
            .verify_signature(Some(X509Certificate::from_der(authority.certificate()).expect("ca").1.public_key()))
            .expect("ours");
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let (_, mut der) = request();
        let last = der.len() - 1;
        der[last] ^= 1;
        assert!(matches!(CertificateRequest::parse(&der), Err(RequestError::Malformed { .. })));
        assert!(matches!(CertificateRequest::parse(b"garbage"), Err(RequestError::Malformed { .. })));
        assert!(matches!(CertificateRequest::parse(&[]), Err(RequestError::Malformed { .. })));
        assert!(matches!(CertificateRequest::parse(&[0x30; 9_000]), Err(RequestError::TooLong { found: 9_000 })));
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("a key");
        let other = CertificateParams::default().serialize_request(&key).expect("a request");
        assert!(matches!(CertificateRequest::parse(other.der()), Err(RequestError::Malformed { .. })));
    }

    #[test]
    fn an_authority_is_the_same_after_a_restart_and_its_key_is_private() {
        let directory = tempfile::tempdir().expect("a directory");
        let made = Authority::create(directory.path(), &network(), NOW).expect("an authority");
        let fingerprint = made.fingerprint();
        let read = Authority::open(directory.path(), &network(), Some(&fingerprint)).expect("the authority");
        assert_eq!(read.fingerprint(), fingerprint);
        let key = directory.path().join(KEY_FILE);
        assert_eq!(std::fs::metadata(&key).expect("a file").permissions().mode() & 0o777, 0o600);

        let other = Authority::open(directory.path(), &network(), Some(&[0; 32]));
        assert!(matches!(other, Err(AuthorityError::Other { .. })));
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).expect("chmod");
        let exposed = Authority::open(directory.path(), &network(), None);
        assert!(matches!(exposed, Err(AuthorityError::Exposed { mode: 0o640, .. })));
    }

    #[test]
    fn a_key_of_another_authority_is_refused() {
        let (one, two) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        Authority::create(one.path(), &network(), NOW).expect("an authority");
        Authority::create(two.path(), &network(), NOW).expect("an authority");
        std::fs::copy(two.path().join(KEY_FILE), one.path().join(KEY_FILE)).expect("copied");
        assert!(matches!(Authority::open(one.path(), &network(), None), Err(AuthorityError::Other { .. })));
    }

    #[test]
    fn the_controllers_chain_ends_with_the_authority() {
        let directory = tempfile::tempdir().expect("a directory");
        let authority = Authority::create(directory.path(), &network(), NOW).expect("an authority");
        let server = authority.server_identity(NOW).expect("an identity");
        assert_eq!(server.chain().last(), Some(authority.certificate()));
        assert_eq!(Identity::of_certificate(server.certificate()), Ok((network(), Identity::Controller)));
        tls::server_config(&server, authority.certificate()).expect("a configuration");
    }
}
