//! TLS 1.3 by certificates of the network's own authority, and nothing else.
//!
//! The controller's certificate always names [`SERVER_NAME`], so an endpoint may be any address or name. A client trusts
//! either the authority's certificate, or, when all it has is an invitation, the certificate with the invitation's
//! fingerprint in the chain that the controller presents.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroize as _;

/// The DNS name in the controller's certificate, whatever its endpoints are.
pub const SERVER_NAME: &str = "controller.rampart";

/// The only application protocol: gRPC is HTTP/2.
const ALPN: &[u8] = b"h2";

/// SHA-256 of a certificate's DER.
pub type Fingerprint = [u8; 32];

/// A certificate chain, leaf first, and the leaf's private key.
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// The controller's: its chain ends with the authority's own certificate, for those who know only the fingerprint.
pub type ServerIdentity = Credentials;
/// A node's or an admin's.
pub type ClientIdentity = Credentials;

/// Keys or certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{what} is not PEM; the file is damaged: restore it, or ask for a new invitation")]
    Pem {
        what: &'static str,
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    #[error("there is no certificate in {what}")]
    NoCertificate { what: &'static str },
    #[error("the authority's certificate cannot be used")]
    Authority(#[source] rustls::Error),
    #[error("client certificates cannot be verified")]
    Verifier(#[source] rustls::client::VerifierBuilderError),
    #[error("certificate and private key do not serve together; restore both from one source")]
    Credentials(#[source] rustls::Error),
}

impl Credentials {
    /// `chain`: certificates in DER, leaf first. `key`: PKCS #8 in DER.
    pub fn from_der(chain: impl IntoIterator<Item = Vec<u8>>, key: Vec<u8>) -> Result<Self, TlsError> {
        let chain: Vec<_> = chain.into_iter().map(CertificateDer::from).collect();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        Self::new(chain, key)
    }

    /// `chain`: one or more PEM certificates, leaf first. `key`: a PEM private key.
    pub fn from_pem(chain: &str, key: &str) -> Result<Self, TlsError> {
        let chain = certificates_from_pem(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|source| TlsError::Pem { what: "the private key", source })?;
        Self::new(chain, key)
    }

    fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, TlsError> {
        let credentials = Self { chain, key };
        if credentials.chain.is_empty() {
            return Err(TlsError::NoCertificate { what: "the certificate chain" });
        }
        Ok(credentials)
    }

    /// The leaf's DER.
    pub fn certificate(&self) -> &[u8] {
        self.chain[0].as_ref()
    }

    /// All certificates, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("certificates", &self.chain.len()).field("key", &"redacted").finish()
    }
}

impl Drop for Credentials {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// The certificates of a PEM text, in its order.
pub fn certificates_from_pem(text: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|source| TlsError::Pem { what: "the certificate", source })?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate { what: "the PEM text" });
    }
    Ok(certificates)
}

/// SHA-256 of a certificate's DER.
pub fn fingerprint(certificate: &[u8]) -> Fingerprint {
    Sha256::digest(certificate).into()
}

/// What a client knows of the controller that it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The authority's certificate.
    Authority(CertificateDer<'static>),
    /// At enrolment: the fingerprint of the authority's certificate, which the controller must present.
    Fingerprint(Fingerprint),
}

impl Trust {
    /// From the authority's certificate in DER.
    pub fn authority(der: impl Into<Vec<u8>>) -> Self {
        Self::Authority(CertificateDer::from(der.into()))
    }
}

/// A server that asks for a client certificate and verifies it against `authority`, and also answers callers who have none:
/// what they may call is for the services to decide. Sessions are never resumed, so that every connection shows a
/// certificate that is good now.
pub fn server_config(identity: &ServerIdentity, authority: &CertificateDer<'_>) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(authority)?), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(TlsError::Verifier)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Credentials)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .map_err(TlsError::Credentials)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A client that trusts `trust` and nothing else, and shows `identity` if it has one.
pub fn client_config(trust: &Trust, identity: Option<&ClientIdentity>) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        Trust::Authority(authority) => pinned(authority, &provider)?,
        Trust::Fingerprint(fingerprint) => {
            Arc::new(FingerprintVerifier { fingerprint: *fingerprint, provider: Arc::clone(&provider) })
        }
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Credentials)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some(identity) => builder
            .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
            .map_err(TlsError::Credentials)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// The name that every client verifies.
pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("a constant DNS name")
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(authority: &CertificateDer<'_>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone().into_owned()).map_err(TlsError::Authority)?;
    Ok(roots)
}

fn pinned(
    authority: &CertificateDer<'_>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots(authority)?), Arc::clone(provider))
        .build()
        .map_err(TlsError::Verifier)
}

/// Accepts a chain that holds the certificate with the fingerprint and is good by that certificate alone.
#[derive(Debug)]
struct FingerprintVerifier {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for FingerprintVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| fingerprint(certificate) == self.fingerprint)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        pinned(authority, &self.provider)
            .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}
