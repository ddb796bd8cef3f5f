//! What nodes hear, over real TLS.

mod common;

use common::{Follower, LIMIT, TestController, allow, change_request, parse};
use controller_api::v1;
use policy::{Change, Revision};
use tonic::Code;

#[tokio::test]
async fn a_change_reaches_the_nodes_it_affects_and_status_sees_them_converge() {
    let controller = TestController::start().await;
    let (web, web_id) = controller.join("web1", "web", 1).await;
    let (app, app_id) = controller.join("app1", "app", 2).await;
    let (db, db_id) = controller.join("db1", "db", 3).await;
    let mut followers = Vec::new();
    for identity in [&web, &app, &db] {
        let channel = controller.connect(Some(identity)).await;
        let mut follower = Follower::open(channel, None, "").await.expect("a stream");
        let snapshot = follower.hear().await.expect("a snapshot");
        assert_eq!(snapshot.from, Revision(0));
        follower.acknowledge(snapshot.revision.0).await;
        followers.push(follower);
    }
    for id in [web_id, app_id, db_id] {
        controller.wait_for_status(id, |status| status.connected && status.enforced == status.sent).await;
    }

    let revision = controller.change(&[allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432")]).await;
    for follower in &mut followers[1..] {
        let delta = follower.hear().await.expect("a delta");
        assert_eq!((delta.revision.0, delta.peers.len(), delta.rules.len()), (revision, 1, 1));
        assert_ne!(delta.from, Revision(0));
        follower.acknowledge(revision).await;
    }
    controller.wait_for_status(db_id, |status| status.enforced == revision && status.version == "test").await;
    // web1's task has seen the revision by now: it is told of the next one that concerns it, on top of what it holds.
    assert!(followers[0].hears_nothing().await);
    let status = controller.wait_for_status(web_id, |status| status.enforced == status.sent).await;
    assert!(status.sent < revision);
    let revision = controller.change(&[allow("web-ping", "cidr:web", "cidr:app", "icmp/8")]).await;
    assert_eq!(followers[0].hear().await.expect("a delta").revision.0, revision);
    let text = controller.context.metrics.encode();
    assert!(text.contains("rampart_controller_updates_total{kind=\"snapshot\"} 3"), "{text}");
}

#[tokio::test]
async fn a_rule_between_two_nodes_costs_less_than_200_bytes_each() {
    use prost::Message as _;
    let controller = TestController::start().await;
    let (app, _) = controller.join("app1", "app", 2).await;
    controller.join("db1", "db", 3).await;
    let mut follower = Follower::open(controller.connect(Some(&app)).await, None, "").await.expect("a stream");
    follower.hear().await.expect("a snapshot");
    controller.change(&[allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432")]).await;
    follower.hear().await.expect("the first: a peer, its prefixes, cells and the rule");
    controller.change(&[allow("app-to-db-ping", "cidr:app", "cidr:db", "icmp/8")]).await;
    let delta = follower.hear().await.expect("a delta");
    let bytes = v1::Update::from(&delta).encoded_len();
    assert!(bytes <= 200, "{bytes} bytes: {delta:?}");
}

#[tokio::test]
async fn a_node_resumes_where_it_was() {
    let controller = TestController::start().await;
    let (app, app_id) = controller.join("app1", "app", 2).await;
    let mut follower = Follower::open(controller.connect(Some(&app)).await, None, "").await.expect("a stream");
    follower.hear().await.expect("a snapshot");
    let held = follower.slice.clone();
    drop(follower);
    controller.wait_for_status(app_id, |status| !status.connected).await;
    controller.change(&[allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432")]).await;
    let channel = controller.connect(Some(&app)).await;
    let mut follower = Follower::open(channel, held.clone(), "").await.expect("a stream");
    let delta = follower.hear().await.expect("a delta");
    assert_eq!(delta.from, held.as_ref().expect("held").revision);
    let held = follower.slice.clone();
    drop(follower);
    let mut follower = Follower::open(controller.connect(Some(&app)).await, held, "").await.expect("a stream");
    let delta = follower.hear().await.expect("a word that nothing has changed");
    assert!(delta.is_empty() && delta.from == delta.revision, "{delta:?}");
    // What it holds is unknown here: everything.
    let mut unknown = follower.slice.clone().expect("a slice");
    unknown.digest = policy::Digest::from_bytes([1; 16]);
    let mut follower = Follower::open(controller.connect(Some(&app)).await, Some(unknown), "").await.expect("a stream");
    assert_eq!(follower.hear().await.expect("a snapshot").from, Revision(0));
}

/// Rules that make a delta of some 10 KB, and the changes that take them away again.
fn many_rules() -> (Vec<Change>, Vec<Change>) {
    let name = |number: u16| format!("rule-{number:03}-{}", "x".repeat(50));
    let add = (1..=100).map(|number| allow(&name(number), "cidr:app", "cidr:db", &format!("tcp/{number}"))).collect();
    let delete = (1..=100).map(|number| Change::DeleteRule { name: parse(&name(number)) }).collect();
    (add, delete)
}

#[tokio::test]
async fn a_node_that_does_not_read_holds_up_nobody() {
    const ROUNDS: usize = 60;
    let controller = TestController::start().await;
    let (app, app_id) = controller.join("app1", "app", 2).await;
    let (db, db_id) = controller.join("db1", "db", 3).await;
    controller.change(&[allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432")]).await;
    let mut slow = Follower::open(controller.connect(Some(&db)).await, None, "").await.expect("a stream");
    slow.hear().await.expect("a snapshot");
    let mut quick = Follower::open(controller.connect(Some(&app)).await, None, "").await.expect("a stream");
    let reader = tokio::spawn(async move {
        while quick.hear().await.is_ok() {
            quick.acknowledge(quick.slice.as_ref().expect("a slice").revision.0).await;
        }
    });
    let (add, delete) = many_rules();
    let mut revision = 0;
    for _ in 0..ROUNDS {
        controller.change(&add).await;
        revision = controller.change(&delete).await;
        controller.wait_for_status(app_id, |status| status.enforced == revision).await;
    }
    assert!(controller.context.metrics.slow_nodes.get() > 0, "the slow one's queue was never full");
    let status = controller.wait_for_status(db_id, |_| true).await;
    assert!(status.sent < revision, "{status:?}");
    // When it reads again, it gets to where the others are, in fewer steps.
    let mut updates = 0;
    controller.change(&[allow("last", "cidr:app", "cidr:db", "icmp/8")]).await;
    while !slow.slice.as_ref().expect("a slice").rules.values().any(|rule| rule.name == parse("last")) {
        slow.hear().await.expect("a delta");
        updates += 1;
    }
    assert!(updates < 2 * ROUNDS, "{updates} updates");
    assert_eq!(slow.slice.expect("a slice").rules.len(), 2);
    reader.abort();
}

#[tokio::test]
async fn a_disabled_node_that_does_not_read_loses_its_stream() {
    let controller = TestController::start().await;
    let (db, node) = controller.join("db1", "db", 3).await;
    controller.join("app1", "app", 2).await;
    let _slow = Follower::open(controller.connect(Some(&db)).await, None, "").await.expect("a stream");
    let (add, delete) = many_rules();
    while controller.context.metrics.slow_nodes.get() == 0 {
        controller.change(&add).await;
        controller.change(&delete).await;
    }
    controller.change(&[Change::DisableNode { name: parse("db1") }]).await;
    controller.wait_for_status(node, |status| !status.connected).await;
}

#[tokio::test]
async fn where_a_node_is_reached_is_told_to_its_peers() {
    let controller = TestController::start().await;
    let (web, web_id) = controller.join("web1", "web", 1).await;
    let (app, app_id) = controller.join("app1", "app", 2).await;
    let mut follower = Follower::open(controller.connect(Some(&web)).await, None, "").await.expect("a stream");
    let snapshot = follower.hear().await.expect("a snapshot");
    assert_eq!(snapshot.peers.values().next().expect("app1").endpoint, None);
    follower.acknowledge(snapshot.revision.0).await;
    // Loopback is no endpoint for others, so the node says one.
    let seen = |follower: &Follower| follower.endpoints.get(&policy::NodeId(app_id)).copied();
    for endpoint in ["192.0.2.7:51820", "192.0.2.8:51820"] {
        let _app = Follower::open(controller.connect(Some(&app)).await, None, endpoint).await.expect("a stream");
        while seen(&follower) != Some(parse(endpoint)) {
            assert_eq!(follower.hear_anything().await.expect("endpoints"), None, "an endpoint is no revision");
        }
    }
    // One that connects later hears it too, and an operator's word is part of the policy.
    let mut late = Follower::open(controller.connect(Some(&web)).await, None, "").await.expect("a stream");
    while seen(&late) != Some(parse("192.0.2.8:51820")) {
        late.hear_anything().await.expect("a snapshot, and endpoints");
    }
    let mut root = controller.root().await;
    let audit = root.list_audit(v1::ListAuditRequest { limit: 1, before: 0 }).await.expect("audit").into_inner();
    assert!(audit.entries[0].change.starts_with("node join"), "{audit:?}");
    let status = controller.wait_for_status(app_id, |status| !status.endpoint.is_empty()).await;
    assert_eq!(status.endpoint, "192.0.2.8:51820");
    let endpoint = Some(parse("192.0.2.9:1"));
    controller.change(&[Change::SetEndpoint { name: parse("app1"), endpoint }]).await;
    let mut late = Follower::open(controller.connect(Some(&web)).await, None, "").await.expect("a stream");
    assert_eq!(late.hear().await.expect("a snapshot").peers.values().next().expect("app1").endpoint, endpoint);
    let status = controller.wait_for_status(web_id, |status| status.connected).await;
    assert!(status.sent > snapshot.revision.0);
}

#[tokio::test]
async fn what_a_node_must_not_say_ends_its_stream() {
    let controller = TestController::start().await;
    let (web, _) = controller.join("web1", "web", 1).await;
    let channel = controller.connect(Some(&web)).await;
    let mut follower = Follower::open(channel.clone(), None, "").await.expect("a stream");
    let snapshot = follower.hear().await.expect("a snapshot");
    follower.acknowledge(snapshot.revision.0 + 1).await;
    let status = follower.hear().await.expect_err("ended");
    assert_eq!((status.code(), status.message().contains("newest that was sent")), (Code::InvalidArgument, true));
    let mut follower = Follower::open(channel.clone(), None, "nowhere").await.expect("a stream");
    let status = follower.hear().await.expect_err("ended");
    assert!(status.message().contains("`nowhere`") && status.code() == Code::InvalidArgument, "{status:?}");
    // A second stream of the same node takes over.
    let mut old = Follower::open(channel.clone(), None, "").await.expect("a stream");
    old.hear().await.expect("a snapshot");
    let mut new = Follower::open(channel, None, "").await.expect("a stream");
    new.hear().await.expect("a snapshot");
    assert_eq!(old.hear().await.expect_err("ended").code(), Code::Aborted);
}

#[tokio::test]
async fn a_request_is_done_once_and_conflicts_are_told() {
    let controller = TestController::start().await;
    let mut root = controller.root().await;
    let add = |name: &str| [Change::AddGroup { name: parse(name), members: Vec::new() }];
    let first = root.change(change_request("r1", &add("one"))).await.expect("changed").into_inner();
    let again = root.change(change_request("r1", &add("one"))).await.expect("the same").into_inner();
    assert_eq!(first.revision, again.revision);
    let other = root.change(change_request("r1", &add("two"))).await.expect_err("another request");
    assert_eq!(other.code(), Code::AlreadyExists, "{other:?}");
    let mut stale = change_request("", &add("two"));
    stale.expected_revision = first.revision - 1;
    let stale = root.change(stale).await.expect_err("stale");
    assert!(stale.code() == Code::Aborted && stale.message().contains(&format!("`{}`", first.revision)), "{stale:?}");
    let mut dry = change_request("r2", &add("two"));
    dry.dry_run = true;
    let dry = root.change(dry).await.expect("would do").into_inner();
    assert_eq!(dry.revision, first.revision);
    let network = root.get_network(v1::GetNetworkRequest::default()).await.expect("a network").into_inner();
    assert_eq!((network.revision, network.network.expect("one").groups.len()), (first.revision, 1));
    let taken = root.change(change_request("", &add("one"))).await.expect_err("taken");
    assert!(taken.code() == Code::FailedPrecondition && taken.message().contains("`one`"), "{taken:?}");
    let nothing = root.change(change_request("", &[])).await.expect_err("no changes");
    assert_eq!(nothing.code(), Code::InvalidArgument);
    tokio::time::timeout(LIMIT, controller.root()).await.expect("still there");
}
