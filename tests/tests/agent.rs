//! The node's end of the protocol against this controller: it joins, follows, is dismissed, and comes back.

#[path = "../../controller/tests/common/mod.rs"]
mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use common::{Follower, LIMIT, TestController, parse};
use controller::access::authority::CertificateRequest;
use controller::clock;
use controller_api::identity as names;
use controller_api::v1::invite_request::Subject;
use node::config::{self, Flags, Settings};
use node::uplink::follow::{self as following, Connection, Enforced, Handle};
use node::uplink::identity::{Identity, Keys};
use node::uplink::{join, leave};
use policy::{Change, Revision, Slice};
use tokio::sync::watch;

const DAY: u64 = 86_400;

/// A machine with a state directory, whose agent this program is.
struct Machine {
    settings: Settings,
    _directory: tempfile::TempDir,
}

impl Machine {
    async fn join(controller: &TestController, name: &str, cidr: &str) -> Self {
        let node = Change::AddNode {
            name: parse(name),
            cidr: parse(cidr),
            addresses: None,
            groups: Vec::new(),
            gateway_for: Vec::new(),
        };
        controller.change(&[node]).await;
        let invitation = controller.invite(Subject::Node(name.to_owned())).await;
        let directory = tempfile::tempdir().expect("a directory");
        let flags = Flags { state_dir: Some(directory.path().join("node")), ..Flags::default() };
        let settings = config::load(&flags).expect("settings");
        join::join(&settings, &invitation, clock::now()).await.expect("joined");
        Self { settings, _directory: directory }
    }

    fn identity(&self) -> Identity {
        Identity::load(&self.settings.state_dir).expect("an identity")
    }

    fn keys(&self) -> Keys {
        Keys::load(&self.settings.state_dir).expect("keys")
    }

    /// Its slice, as if its agent had heard it and ended.
    async fn slice(&self, controller: &TestController) -> Slice {
        let shown = self.keys().client_identity(&self.identity()).expect("credentials");
        let mut follower = Follower::open(controller.connect(Some(&shown)).await, None, "").await.expect("a stream");
        follower.hear().await.expect("a snapshot");
        follower.slice.expect("was told")
    }

    /// Makes its certificate one that ended yesterday.
    fn age(&self, controller: &TestController) {
        let mut identity = self.identity();
        let request = CertificateRequest::parse(&self.keys().certificate_request().expect("a request")).expect("good");
        let (node, begin) = (names::Identity::Node(identity.node), clock::now() - 2 * DAY);
        let authority = &controller.context.authority;
        identity.certificate = authority.sign(&request, &node, begin, Duration::from_secs(DAY)).expect("signed");
        identity.store(&self.settings.state_dir).expect("stored");
    }

    fn follow(&self, held: Option<Slice>) -> Agent {
        let (enforced, receiver) = watch::channel(Enforced::default());
        Agent { handle: following::start(&self.settings, held.map(Arc::new), receiver), enforced }
    }
}

struct Agent {
    handle: Handle,
    enforced: watch::Sender<Enforced>,
}

impl Agent {
    async fn wait_for_slice(&mut self, wanted: impl Fn(&Slice) -> bool) -> Slice {
        let wanted = |slice: &Option<Arc<Slice>>| slice.as_ref().is_some_and(|slice| wanted(slice));
        let found = tokio::time::timeout(LIMIT, self.handle.received.wait_for(wanted)).await.expect("in time");
        found.expect("a following task").as_deref().expect("a slice").clone()
    }

    async fn wait_for_connection(&mut self, wanted: impl Fn(&Connection) -> bool) {
        let found = tokio::time::timeout(LIMIT, self.handle.connection.wait_for(wanted)).await;
        found.expect("in time").expect("a following task");
    }

    async fn wait_for_error(&mut self, word: &str) {
        self.wait_for_connection(|connection| connection.error.as_ref().is_some_and(|error| error.contains(word)))
            .await;
    }
}

fn is_empty(slice: &Slice) -> bool {
    slice.peers.is_empty() && slice.prefixes.is_empty() && slice.cells.is_empty() && slice.rules.is_empty()
}

fn has_peers(slice: &Slice) -> bool {
    !slice.peers.is_empty()
}

#[tokio::test]
async fn a_node_that_is_disabled_while_it_follows_lets_go_and_comes_back() {
    let controller = TestController::start().await;
    let (web, _app) =
        (Machine::join(&controller, "web1", "web").await, Machine::join(&controller, "app1", "app").await);
    let mut agent = web.follow(None);
    let first = agent.wait_for_slice(has_peers).await;
    let disabled = controller.change(&[Change::DisableNode { name: parse("web1") }]).await;
    let empty = agent.wait_for_slice(is_empty).await;
    assert_eq!((empty.revision, &empty.local), (Revision(disabled), &first.local));
    agent.wait_for_error("`web1` is disabled").await;
    controller.change(&[Change::EnableNode { name: parse("web1") }]).await;
    let back = agent.wait_for_slice(has_peers).await;
    assert_eq!((back.local, back.peers), (first.local, first.peers));
    // And it goes on from there.
    agent.enforced.send_replace(Enforced { revision: back.revision, ..Enforced::default() });
    let node = web.identity().node.0;
    controller.wait_for_status(node, |status| status.connected && status.enforced == back.revision.0).await;
    controller.change(&[Change::DeleteRule { name: parse("web-to-app") }]).await;
    agent.wait_for_slice(|slice| slice.peers.is_empty() && !slice.prefixes.is_empty()).await;
}

#[tokio::test]
async fn a_node_that_was_away_when_it_was_disabled_or_deleted_lets_go_too() {
    let controller = TestController::start().await;
    let (web, _app) =
        (Machine::join(&controller, "web1", "web").await, Machine::join(&controller, "app1", "app").await);
    let held = web.slice(&controller).await;
    assert!(has_peers(&held));
    controller.change(&[Change::DisableNode { name: parse("web1") }]).await;
    let mut agent = web.follow(Some(held.clone()));
    let empty = agent.wait_for_slice(is_empty).await;
    assert_eq!((empty.revision.0, &empty.local), (held.revision.0 + 1, &held.local));
    agent.wait_for_error("no part in the network").await;
    // The controller remembers what it sent before; the node does not.
    controller.change(&[Change::EnableNode { name: parse("web1") }]).await;
    let back = agent.wait_for_slice(has_peers).await;
    assert_eq!((back.peers, back.rules), (held.peers, held.rules));
    controller.change(&[Change::DeleteNode { name: parse("web1") }]).await;
    agent.wait_for_slice(is_empty).await;
    agent.wait_for_error("was deleted").await;
    assert!(leave::tell(&web.settings, false).await.expect("nothing is left to be told"));
}

#[tokio::test]
async fn a_disabled_node_cannot_leave_in_order() {
    let controller = TestController::start().await;
    let web = Machine::join(&controller, "web1", "web").await;
    controller.change(&[Change::DisableNode { name: parse("web1") }]).await;
    let error = leave::tell(&web.settings, false).await.expect_err("the controller still has it").to_string();
    assert!(error.contains("`web1` is disabled") && error.contains("meshctl node delete web1"), "{error}");
    assert!(!leave::tell(&web.settings, true).await.expect("forced"));
}

#[tokio::test]
async fn a_node_that_was_away_for_days_gets_a_new_certificate_for_its_keys() {
    let controller = TestController::start().await;
    let web = Machine::join(&controller, "web1", "web").await;
    let kept = web.settings.state_dir.join("invitation");
    assert_eq!(std::fs::metadata(&kept).expect("is kept").permissions().mode() & 0o777, 0o600);
    web.age(&controller);
    let mut agent = web.follow(None);
    agent.wait_for_slice(|slice| !slice.prefixes.is_empty()).await;
    let expires_at = web.identity().validity().expect("a certificate").1;
    assert!(expires_at > clock::now());
    agent.wait_for_connection(|connection| connection.certificate_expires_at == expires_at).await;

    // To leave it needs one as well.
    web.age(&controller);
    assert!(leave::tell(&web.settings, false).await.expect("told"));
}

#[tokio::test]
async fn an_invitation_gives_a_new_certificate_to_nobody_else() {
    let controller = TestController::start().await;
    let (web, app) = (Machine::join(&controller, "web1", "web").await, Machine::join(&controller, "app1", "app").await);
    // With other keys.
    let kept = |machine: &Machine| machine.settings.state_dir.join("invitation");
    std::fs::copy(kept(&app), kept(&web)).expect("copied");
    web.age(&controller);
    let held = app.slice(&controller).await;
    let mut agent = web.follow(Some(held.clone()));
    agent.wait_for_error("used already, by other keys").await;
    assert!(!is_empty(agent.handle.received.borrow().as_ref().expect("a slice")), "that is no reason to let go");
    // And without one there is only an admin's help.
    std::fs::remove_file(kept(&app)).expect("removed");
    app.age(&controller);
    let mut agent = app.follow(Some(held));
    agent.wait_for_error("it has expired; ask for a new invitation").await;
    assert!(!is_empty(agent.handle.received.borrow().as_ref().expect("a slice")));
}

#[tokio::test]
async fn a_node_that_was_away_for_days_hears_that_it_has_no_part() {
    let controller = TestController::start().await;
    let (web, app) = (Machine::join(&controller, "web1", "web").await, Machine::join(&controller, "app1", "app").await);
    let held = (web.slice(&controller).await, app.slice(&controller).await);
    controller.change(&[Change::DisableNode { name: parse("web1") }, Change::DeleteNode { name: parse("app1") }]).await;
    web.age(&controller);
    app.age(&controller);
    let (mut disabled, mut deleted) = (web.follow(Some(held.0)), app.follow(Some(held.1)));
    disabled.wait_for_slice(is_empty).await;
    deleted.wait_for_slice(is_empty).await;
    assert!(leave::tell(&app.settings, false).await.expect("nothing is left to be told"));
    controller.change(&[Change::EnableNode { name: parse("web1") }]).await;
    disabled.wait_for_slice(|slice| !slice.prefixes.is_empty()).await;
}
