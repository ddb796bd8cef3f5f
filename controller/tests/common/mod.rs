//! A controller in this process, over the memory store, on real TLS and a real Unix socket.

#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use controller::access::authority::{Authority, CertificateRequest};
use controller::clock;
use controller::grpc::{self, Context};
use controller::init;
use controller::serve::Controller;
use controller::socket::tls as tls_socket;
use controller::socket::tls::Tls;
use controller::socket::unix::{self, PrivateSocket, SocketFile};
use controller::store::Store;
use controller::store::account::Settings;
use controller::store::memory::MemoryStore;
use controller_api::client;
use controller_api::convert::{Followed, digest_to_wire};
use controller_api::defaults::ADMIN_CERTIFICATE_LIFETIME;
use controller_api::identity::Identity;
use controller_api::invitation::Invitation;
use controller_api::tls::{self, ClientIdentity, Trust};
use controller_api::v1;
use controller_api::v1::admin_client::AdminClient;
use controller_api::v1::enrol_client::EnrolClient;
use controller_api::v1::sync_client::SyncClient;
use policy::{Change, DefaultPolicy, Network, NodeId, Prefixes, Revision, Slice, SliceDelta};
use rcgen::{CertificateParams, KeyPair};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// Nothing in these tests takes this long, unless it fails.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
/// Seconds.
pub(crate) const DAY: u64 = 86_400;

pub(crate) fn parse<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect(text)
}

pub(crate) struct TestController {
    pub(crate) context: Context,
    pub(crate) address: SocketAddr,
    pub(crate) socket: PathBuf,
    _stop: watch::Sender<bool>,
    _socket: SocketFile,
    _directory: tempfile::TempDir,
}

/// Keys of a machine or an admin that is to be let in.
pub(crate) struct Keys {
    pub(crate) tls: KeyPair,
    pub(crate) wireguard: Vec<u8>,
}

impl Keys {
    pub(crate) fn new(wireguard: u8) -> Self {
        let tls = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
        Self { tls, wireguard: vec![wireguard; 32] }
    }

    pub(crate) fn admin() -> Self {
        Self { wireguard: Vec::new(), ..Self::new(0) }
    }

    pub(crate) fn request(&self) -> Vec<u8> {
        CertificateParams::default().serialize_request(&self.tls).expect("a request").der().to_vec()
    }

    pub(crate) fn identity(&self, certificate: Vec<u8>) -> ClientIdentity {
        ClientIdentity::from_der([certificate], self.tls.serialize_der()).expect("an identity")
    }
}

impl TestController {
    /// Network `corp` with cidrs `web`, `app`, `db` and the rule `web-to-app` on tcp/8080, and nobody else.
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Arc::new(MemoryStore::new());
        let roots = Prefixes::from_nets([parse("10.42.0.0/16"), parse("fd42::/48")]).expect("roots");
        let network = Network::new(parse("corp"), roots, DefaultPolicy::Deny).expect("a network");
        let authority = Authority::create(directory.path(), &parse("corp"), clock::now()).expect("an authority");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let settings = Settings { endpoints: vec![address.to_string()], authority: authority.fingerprint().to_vec() };
        init::found(&*store, &network, settings, clock::now()).expect("founded");
        let (stopper, stop) = watch::channel(false);
        let store: Arc<dyn Store> = store;
        let controller = Controller::start(store, |_| Ok(authority), clock::now, stop.clone()).await.expect("started");
        let context = controller.context.clone();
        let server = context.authority.server_identity(clock::now()).expect("an identity");
        let config = tls::server_config(&server, context.authority.certificate()).expect("a configuration");
        let socket = directory.path().join("controller.sock");
        let PrivateSocket { listener: root, file } = unix::bind(&socket).expect("a socket");
        let incoming = vec![
            tls_socket::accept(listener, Tls::new(config), context.accepts(), &context.metrics),
            unix::accept(root, Arc::clone(&context.metrics)),
        ];
        let routes = grpc::routes(&context).await.expect("routes");
        tokio::spawn(grpc::serve(routes, incoming, stop));
        let this = Self { context, address, socket, _stop: stopper, _socket: file, _directory: directory };
        let cidr = |name: &str, v4: &str, v6: &str| Change::AddCidr {
            name: parse(name),
            prefixes: Prefixes::from_nets([parse(v4), parse(v6)]).expect("prefixes"),
            isolated: false,
            external: false,
        };
        this.change(&[
            cidr("web", "10.42.1.0/24", "fd42:0:0:1::/64"),
            cidr("app", "10.42.2.0/24", "fd42:0:0:2::/64"),
            cidr("db", "10.42.3.0/24", "fd42:0:0:3::/64"),
            allow("web-to-app", "cidr:web", "cidr:app", "tcp/8080"),
        ])
        .await;
        this
    }

    pub(crate) async fn root(&self) -> AdminClient<Channel> {
        AdminClient::new(client::connect_unix(&self.socket).await.expect("connected"))
    }

    /// As root; the new revision.
    pub(crate) async fn change(&self, changes: &[Change]) -> u64 {
        let request = change_request("", changes);
        self.root().await.change(request).await.expect("changed").into_inner().revision
    }

    pub(crate) async fn invite(&self, subject: v1::invite_request::Subject) -> Invitation {
        let request = v1::InviteRequest { subject: Some(subject), expires_in: 3_600, endpoints: Vec::new() };
        parse(&self.root().await.invite(request).await.expect("invited").into_inner().invitation)
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust::authority(self.context.authority.certificate().to_vec())
    }

    pub(crate) async fn connect(&self, identity: Option<&ClientIdentity>) -> Channel {
        client::connect(&[self.address.to_string()], &self.trust(), identity).await.expect("connected")
    }

    /// As an invited one does it: by nothing but the invitation.
    pub(crate) async fn redeem(
        &self,
        invitation: &Invitation,
        keys: &Keys,
    ) -> Result<v1::RedeemResponse, tonic::Status> {
        let trust = Trust::Fingerprint(invitation.fingerprint);
        let channel = client::connect(&invitation.endpoints, &trust, None).await.expect("connected");
        let request = v1::RedeemRequest {
            secret: invitation.secret.as_bytes().to_vec(),
            certificate_request: keys.request(),
            wireguard_public_key: keys.wireguard.clone(),
        };
        EnrolClient::new(channel).redeem(request).await.map(tonic::Response::into_inner)
    }

    /// A new node that is active, with its certificate.
    pub(crate) async fn join(&self, name: &str, cidr: &str, wireguard: u8) -> (ClientIdentity, u32) {
        let node = Change::AddNode {
            name: parse(name),
            cidr: parse(cidr),
            addresses: None,
            groups: Vec::new(),
            gateway_for: Vec::new(),
        };
        self.change(&[node]).await;
        let invitation = self.invite(v1::invite_request::Subject::Node(name.to_owned())).await;
        let keys = Keys::new(wireguard);
        let response = self.redeem(&invitation, &keys).await.expect("let in");
        (keys.identity(response.certificate), response.node)
    }

    pub(crate) async fn join_admin(&self, name: &str) -> ClientIdentity {
        let invitation = self.invite(v1::invite_request::Subject::Admin(name.to_owned())).await;
        let keys = Keys::admin();
        let response = self.redeem(&invitation, &keys).await.expect("let in");
        keys.identity(response.certificate)
    }

    /// Admin `alice`, with a certificate that was signed so many days ago.
    pub(crate) async fn join_alice(&self, days: u64) -> (Keys, Vec<u8>) {
        let keys = Keys::admin();
        let invitation = self.invite(v1::invite_request::Subject::Admin("alice".to_owned())).await;
        self.redeem(&invitation, &keys).await.expect("let in");
        let request = CertificateRequest::parse(&keys.request()).expect("a request");
        let identity = Identity::Admin("alice".to_owned());
        let begin = clock::now() - days * DAY;
        let authority = &self.context.authority;
        let certificate = authority.sign(&request, &identity, begin, ADMIN_CERTIFICATE_LIFETIME).expect("signed");
        (keys, certificate)
    }

    /// A certificate that the network's authority signs without asking anybody.
    pub(crate) fn sign(&self, identity: &Identity, now: u64, lifetime: Duration) -> ClientIdentity {
        let keys = Keys::admin();
        let request = CertificateRequest::parse(&keys.request()).expect("a request");
        let certificate = self.context.authority.sign(&request, identity, now, lifetime).expect("signed");
        keys.identity(certificate)
    }

    /// Waits until the status of a node is as wanted.
    pub(crate) async fn wait_for_status(&self, node: u32, wanted: impl Fn(&v1::NodeStatus) -> bool) -> v1::NodeStatus {
        let mut root = self.root().await;
        let poll = async {
            loop {
                let status = root.get_status(v1::GetStatusRequest {}).await.expect("status").into_inner();
                let found = status.nodes.into_iter().find(|status| status.node == node);
                match found {
                    Some(status) if wanted(&status) => return status,
                    _ => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        tokio::time::timeout(LIMIT, poll).await.expect("the status in time")
    }
}

pub(crate) fn allow(name: &str, from: &str, to: &str, service: &str) -> Change {
    Change::AddRule(policy::RuleSpec {
        name: parse(name),
        action: policy::Action::Allow,
        from: vec![parse(from)],
        to: vec![parse(to)],
        services: vec![parse(service)],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    })
}

pub(crate) fn change_request(id: &str, changes: &[Change]) -> v1::ChangeRequest {
    v1::ChangeRequest {
        request_id: id.to_owned(),
        expected_revision: 0,
        changes: changes.iter().map(|change| change.try_into().expect("an admin's change")).collect(),
        dry_run: false,
    }
}

/// One stream of one node, with the slice that it makes of what it hears.
pub(crate) struct Follower {
    pub(crate) requests: mpsc::Sender<v1::FollowRequest>,
    pub(crate) updates: Streaming<v1::FollowResponse>,
    /// Where peers were seen, as heard.
    pub(crate) endpoints: BTreeMap<NodeId, SocketAddr>,
    pub(crate) slice: Option<Slice>,
}

impl Follower {
    pub(crate) async fn open(channel: Channel, held: Option<Slice>, endpoint: &str) -> Result<Self, tonic::Status> {
        let (requests, receiver) = mpsc::channel(16);
        let hello = v1::Hello {
            revision: held.as_ref().map_or(0, |slice| slice.revision.0),
            listen_port: 51_820,
            endpoint: endpoint.to_owned(),
            version: "test".to_owned(),
            digest: held.as_ref().map(|slice| digest_to_wire(slice.digest)).unwrap_or_default(),
            features: Vec::new(),
        };
        let kind = Some(v1::follow_request::Kind::Hello(hello));
        requests.send(v1::FollowRequest { kind }).await.expect("room");
        let updates = SyncClient::new(channel).follow(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { requests, updates, endpoints: BTreeMap::new(), slice: held })
    }

    /// The next update, applied.
    pub(crate) async fn hear(&mut self) -> Result<SliceDelta, tonic::Status> {
        let delta = loop {
            if let Some(update) = self.hear_anything().await? {
                break update;
            }
        };
        match &mut self.slice {
            Some(slice) if delta.from != Revision(0) => slice.apply(delta.clone()).expect("applies"),
            slice => *slice = Some(Slice::from_snapshot(delta.clone()).expect("a snapshot")),
        }
        Ok(delta)
    }

    /// The next answer: an update, which is not applied yet, or endpoints.
    pub(crate) async fn hear_anything(&mut self) -> Result<Option<SliceDelta>, tonic::Status> {
        let message = tokio::time::timeout(LIMIT, self.updates.message()).await.expect("an answer in time")?;
        let response = message.ok_or_else(|| tonic::Status::cancelled("the stream has ended"))?;
        let Followed { update, endpoints } = Followed::try_from(response).expect("converts");
        self.endpoints.extend(endpoints);
        Ok(update)
    }

    /// No update comes for a while. Only for what is proven otherwise too.
    pub(crate) async fn hears_nothing(&mut self) -> bool {
        let update = async { while self.hear_anything().await.expect("a stream").is_none() {} };
        tokio::time::timeout(Duration::from_millis(50), update).await.is_err()
    }

    pub(crate) async fn acknowledge(&self, revision: u64) {
        let acknowledgement = v1::Acknowledgement { revision, generation: 1, error: String::new(), lacks: Vec::new() };
        let kind = Some(v1::follow_request::Kind::Acknowledgement(acknowledgement));
        self.requests.send(v1::FollowRequest { kind }).await.expect("room");
    }
}
