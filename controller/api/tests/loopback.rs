//! Who meets whom: real TLS over loopback, a gRPC health service behind it.

use std::net::SocketAddr;
use std::sync::Arc;

use controller_api::client::{self, ConnectError};
use controller_api::identity::{self, Identity};
use controller_api::tls::{self, ClientIdentity, ServerIdentity, Trust};
use policy::{NetworkName, NodeId};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType, date_time_ymd};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tonic::transport::Server;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

struct Authority {
    certificate: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate").der().to_vec();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    fn trust(&self) -> Trust {
        Trust::authority(self.certificate.clone())
    }

    fn fingerprint(&self) -> Trust {
        Trust::Fingerprint(tls::fingerprint(&self.certificate))
    }

    fn sign(&self, params: CertificateParams, presented: Option<&[u8]>) -> ServerIdentity {
        let key = KeyPair::generate().expect("a key");
        let leaf = params.signed_by(&key, &self.issuer).expect("a certificate").der().to_vec();
        let chain = [Some(leaf), presented.map(<[u8]>::to_vec)].into_iter().flatten();
        ServerIdentity::from_der(chain, key.serialize_der()).expect("credentials")
    }

    fn server(&self) -> ServerIdentity {
        self.sign(server_params(tls::SERVER_NAME), Some(&self.certificate))
    }

    fn client(&self, expired: bool) -> ClientIdentity {
        let network: NetworkName = "corp".parse().expect("a name");
        let uri = Identity::Node(NodeId(7)).to_uri(&network);
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.subject_alt_names.push(SanType::URI(uri.try_into().expect("ASCII")));
        if expired {
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        self.sign(params, None)
    }

    /// A controller of this authority.
    async fn serve(&self) -> String {
        serve(&self.server(), &self.certificate).await
    }
}

fn server_params(name: &str) -> CertificateParams {
    CertificateParams::new(vec![name.to_owned()]).expect("a DNS name")
}

async fn serve(identity: &ServerIdentity, authority: &[u8]) -> String {
    let config = tls::server_config(identity, &authority.to_vec().into()).expect("a configuration");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = listener.local_addr().expect("an address").to_string();
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(tcp).await {
                let _ = sender.send(Ok::<_, std::io::Error>(stream)).await;
            }
        }
    });
    let (_, health) = tonic_health::server::health_reporter();
    let incoming = tokio_stream::wrappers::ReceiverStream::new(receiver);
    tokio::spawn(Server::builder().add_service(health).serve_with_incoming(incoming));
    endpoint
}

async fn connect(endpoint: &str, trust: &Trust, identity: Option<&ClientIdentity>) -> Result<(), ConnectError> {
    let channel = client::connect(&[endpoint.to_owned()], trust, identity).await?;
    HealthClient::new(channel).check(HealthCheckRequest::default()).await.expect("an answer on a good connection");
    Ok(())
}

/// An address that nobody listens on.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("an address").to_string()
}

#[tokio::test]
async fn a_client_meets_the_controller_of_its_authority() {
    let authority = Authority::new();
    let endpoint = authority.serve().await;
    connect(&endpoint, &authority.trust(), None).await.expect("without a certificate");
    connect(&endpoint, &authority.trust(), Some(&authority.client(false))).await.expect("with one");
    connect(&endpoint, &authority.fingerprint(), None).await.expect("by fingerprint");
}

#[tokio::test]
async fn a_controller_of_another_authority_is_told_apart() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let endpoint = theirs.serve().await;
    for trust in [ours.trust(), ours.fingerprint()] {
        let error = connect(&endpoint, &trust, None).await.expect_err("another authority");
        assert!(matches!(&error, ConnectError::OtherAuthority { endpoint: named } if *named == endpoint), "{error}");
    }
}

#[tokio::test]
async fn showing_the_authority_does_not_make_a_certificate_its_own() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    // Somebody in the middle: a certificate of their own, and our authority's public one beside it.
    let forged = theirs.sign(server_params(tls::SERVER_NAME), Some(&ours.certificate));
    let endpoint = serve(&forged, &theirs.certificate).await;
    for trust in [ours.fingerprint(), ours.trust()] {
        let error = connect(&endpoint, &trust, None).await.expect_err("a forged chain");
        assert!(matches!(error, ConnectError::OtherAuthority { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_node_cannot_pose_as_the_controller() {
    let authority = Authority::new();
    let posing = authority.sign(server_params("node.rampart"), Some(&authority.certificate));
    let endpoint = serve(&posing, &authority.certificate).await;
    for trust in [authority.trust(), authority.fingerprint()] {
        let error = connect(&endpoint, &trust, None).await.expect_err("another name");
        assert!(matches!(error, ConnectError::OtherAuthority { .. }), "{error}");
    }
    let mut expired = server_params(tls::SERVER_NAME);
    expired.not_after = date_time_ymd(2001, 1, 1);
    let endpoint = serve(&authority.sign(expired, Some(&authority.certificate)), &authority.certificate).await;
    let error = connect(&endpoint, &authority.trust(), None).await.expect_err("expired");
    assert!(error.to_string().contains("has expired"), "{error}");
}

#[tokio::test]
async fn a_refused_certificate_is_an_error_of_connecting() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let endpoint = ours.serve().await;
    for (identity, reason) in
        [(theirs.client(false), "not of this controller's network"), (ours.client(true), "has expired")]
    {
        let error = connect(&endpoint, &ours.trust(), Some(&identity)).await.expect_err("refused");
        assert!(matches!(error, ConnectError::Refused { .. }), "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
        assert!(!error.is_unreachable());
    }
}

#[tokio::test]
async fn the_first_endpoint_that_answers_is_taken() {
    let authority = Authority::new();
    let endpoints = [nobody().await, Authority::new().serve().await, authority.serve().await];
    client::connect(&endpoints, &authority.trust(), None).await.expect("the third answers");
    let error = client::connect(&endpoints[..2], &authority.trust(), None).await.expect_err("none answers");
    assert!(matches!(error, ConnectError::OtherAuthority { .. }), "what tells most: {error}");
    let error = client::connect(&endpoints[..1], &authority.trust(), None).await.expect_err("nobody there");
    assert!(error.is_unreachable() && error.to_string().contains("refused the connection"), "{error}");
}

#[tokio::test]
async fn what_does_not_speak_tls_is_not_trusted() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let _ = tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let error = connect(&endpoint, &Authority::new().trust(), None).await.expect_err("not TLS");
    assert!(matches!(error, ConnectError::Untrusted { .. }), "{error:?}");
}

#[tokio::test]
async fn nothing_older_than_tls_1_3_is_spoken() {
    let authority = Authority::new();
    let address: SocketAddr = authority.serve().await.parse().expect("an address");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.certificate.clone().into()).expect("an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .expect("TLS 1.2")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(address).await.expect("a connection");
    let name = tls::SERVER_NAME.try_into().expect("a name");
    let result = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await;
    assert!(result.is_err(), "the server agreed to TLS 1.2");
}

#[tokio::test]
async fn a_socket_that_is_not_there_says_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("controller.sock");
    let error = client::connect_unix(&path).await.expect_err("no socket");
    assert!(error.is_unreachable() && error.to_string().contains("does not exist"), "{error}");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    let error = client::connect_unix(&path).await.expect_err("nobody listens");
    assert!(error.to_string().contains("nobody listens"), "{error}");
}

#[test]
fn a_certificate_names_its_holder() {
    let authority = Authority::new();
    let client = authority.client(false);
    let (network, identity) = Identity::of_certificate(client.certificate()).expect("a name");
    assert_eq!((network.as_ref(), identity), ("corp", Identity::Node(NodeId(7))));
    let (begins, ends) = identity::validity(client.certificate()).expect("a validity");
    assert!(begins < ends);
    let nobody = Identity::of_certificate(authority.server().certificate());
    assert!(nobody.is_err(), "{nobody:?}");
    assert!(!format!("{client:?}").contains("30"), "a private key is not printed: {client:?}");
}
