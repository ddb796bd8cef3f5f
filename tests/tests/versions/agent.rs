//! A node: the code of `noded` that follows the controller and enforces, and a kernel that only remembers.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use controller_api::tls::ClientIdentity;
use controller_api::v1::invite_request::Subject;
use node::config::{self, Flags, Metrics, Port};
use node::enforce::guard::Watch;
use node::enforce::{self, Setup};
use node::kernel::Backend;
use node::kernel::fake::FakeKernel;
use node::lower::RuleSlots;
use node::uplink::follow;
use node::uplink::identity::{Identity, Keys};
use node::uplink::{join, journal::Journal};
use policy::{Change, Flow, Slice};
use tokio::task::JoinHandle;

use crate::common::{LIMIT, TestController, parse};

/// A node's state directory, and what it runs.
pub(crate) struct Agent {
    directory: tempfile::TempDir,
    pub(crate) id: u32,
    pub(crate) kernel: FakeKernel,
    pub(crate) uplink: Option<follow::Handle>,
    passing: Option<JoinHandle<()>>,
}

impl Agent {
    /// Joins the network; nothing runs.
    pub(crate) async fn join(controller: &TestController, name: &str, cidr: &str) -> Self {
        controller
            .change(&[Change::AddNode {
                name: parse(name),
                cidr: parse(cidr),
                addresses: None,
                groups: Vec::new(),
                gateway_for: Vec::new(),
            }])
            .await;
        let invitation = controller.invite(Subject::Node(name.to_owned())).await;
        let directory = tempfile::tempdir().expect("a directory");
        let settings = settings(directory.path());
        join::join(&settings, &invitation, controller::clock::now()).await.expect("joined");
        let id = Identity::load(directory.path()).expect("an identity").node.0;
        let kernel = FakeKernel::new(Backend::Userspace);
        Self { directory, id, kernel, uplink: None, passing: None }
    }

    /// What the node calls with.
    pub(crate) fn identity(&self) -> ClientIdentity {
        let identity = Identity::load(self.directory.path()).expect("an identity");
        Keys::load(self.directory.path()).expect("keys").client_identity(&identity).expect("an identity")
    }

    /// Follows whoever is at this address, as the daemon does from its start.
    pub(crate) fn start(&mut self, controller: SocketAddr) {
        let path = self.directory.path();
        let mut identity = Identity::load(path).expect("an identity");
        identity.endpoints = vec![controller.to_string()];
        identity.store(path).expect("stored");
        let opened = Journal::open(path, identity.node);
        let held = opened.state.as_ref().map(|state| Arc::clone(&state.slice));
        let setup = Setup {
            wireguard: Box::new(self.kernel.wireguard()),
            link: Box::new(self.kernel.link()),
            datapath: Box::new(self.kernel.datapath()),
            guard: Watch::none(),
            key: Keys::load(path).expect("keys").wireguard,
            journal: opened.journal,
            listen_port: 51_820,
            mtu: 1_420,
            persistent_keepalive: None,
            reconcile_interval: Duration::from_secs(60),
            slots: opened.state.map(|state| state.slots).or_else(|| Some(RuleSlots::new())),
            holders: Default::default(),
            time: 0,
        };
        let enforcer = enforce::start(setup);
        let uplink = follow::start(&settings(path), held, enforcer.enforced.clone());
        let mut received = uplink.received.clone();
        self.uplink = Some(uplink);
        self.passing = Some(tokio::spawn(async move {
            while received.changed().await.is_ok() {
                let slice: Option<Arc<Slice>> = received.borrow_and_update().clone();
                if slice.is_some_and(|slice| enforcer.enforce(slice).is_err()) {
                    return;
                }
            }
        }));
    }

    pub(crate) fn received(&self) -> Option<Arc<Slice>> {
        self.uplink.as_ref().and_then(|uplink| uplink.received.borrow().clone())
    }

    /// Whether the kernel's tables let a packet come in.
    pub(crate) fn lets_in(&self, source: &str, destination: &str, port: u16) -> bool {
        let flow = Flow { source: parse(source), destination: parse(destination), protocol: 6, port };
        let world = self.kernel.world();
        world.tables.as_ref().is_some_and(|tables| tables.verdict(&flow, ebpf_common::INGRESS).passes)
    }

    /// Why the controller is away, once it is.
    pub(crate) async fn disconnected(&self) -> String {
        let mut connection = self.uplink.as_ref().expect("it follows").connection.clone();
        let away = async {
            let connection = connection.wait_for(|connection| connection.error.is_some()).await.expect("it follows");
            connection.error.clone().unwrap_or_default()
        };
        tokio::time::timeout(LIMIT, away).await.expect("away in time")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(passing) = &self.passing {
            passing.abort();
        }
    }
}

fn settings(state_dir: &Path) -> config::Settings {
    let flags = Flags {
        config: Some("/dev/null".into()),
        state_dir: Some(state_dir.to_owned()),
        listen_port: Some(Port(51_820)),
        metrics: Some(Metrics::Off),
        ..Flags::default()
    };
    config::load(&flags).expect("settings")
}
