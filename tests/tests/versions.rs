//! Nodes and controllers of different versions understand each other, over real TLS and gRPC: an earlier one reads what a
//! later one writes, in both directions, and what must not be misunderstood is denied.
//!
//! Both ends are of this version; a gateway between them makes of each message what another version would have sent.

#[path = "versions/agent.rs"]
mod agent;
#[path = "../../controller/tests/common/mod.rs"]
mod common;
#[path = "versions/gateway.rs"]
mod gateway;
#[path = "versions/wire.rs"]
mod wire;

use std::sync::{Arc, Mutex};

use agent::Agent;
use common::{Follower, TestController, allow};
use controller_api::convert::{Followed, endpoints_to_wire};
use controller_api::v1::follow_request::Kind;
use controller_api::{client, v1};
use gateway::{Rewrite, Versions, unchanged};
use policy::Revision;
use policy::arbitrary::sealed;
use prost::Message as _;
use prost::bytes::Bytes;
use wire::{Newer, without};

/// What no node of this version understands.
const FEATURE: &str = "moon-phase";

/// As a later controller writes an answer: an update's parts are messages too. A strange answer comes before it.
fn later_answer(newer: &Newer, message: &Bytes) -> Vec<Bytes> {
    let v1::FollowResponse { update, endpoints } = v1::FollowResponse::decode(message.clone()).expect("an answer");
    let whole = |name: &str, parts: &[Bytes]| match parts {
        [] => Vec::new(),
        parts => vec![newer.write(name, &parts.concat())],
    };
    let answer = v1::FollowResponse { update: whole("Update", &update), endpoints: whole("Endpoints", &endpoints) };
    vec![newer.strange("FollowResponse"), newer.write("FollowResponse", &answer.encode_to_vec())]
}

/// The answer, with a rule in its snapshot that asks for more than a node understands.
fn requiring(message: &Bytes, rule: &str) -> Bytes {
    let answer = v1::FollowResponse::decode(message.clone()).expect("an answer");
    let Followed { update, endpoints } = Followed::try_from(answer).expect("converts");
    let Some(mut delta) = update.filter(|delta| delta.from == Revision(0)) else { return message.clone() };
    for row in delta.rules.values_mut().filter(|row| row.name.as_str() == rule) {
        row.requires.insert(FEATURE.to_owned());
    }
    let update = v1::Update::from(&sealed(None, delta)).encode_to_vec();
    let endpoints = endpoints_to_wire(endpoints).encode_to_vec();
    v1::FollowResponse { update: vec![update.into()], endpoints: vec![endpoints.into()] }.encode_to_vec().into()
}

/// As a later node says it: with features of its own, and with strange words in between.
fn later_request(newer: &Newer, message: &Bytes) -> Vec<Bytes> {
    let mut request = v1::FollowRequest::decode(message.clone()).expect("a request");
    let is_hello = matches!(request.kind, Some(Kind::Hello(_)));
    if let Some(Kind::Hello(hello)) = &mut request.kind {
        hello.features.push(FEATURE.to_owned());
    }
    let request = newer.write("FollowRequest", &request.encode_to_vec());
    // A stream begins with its hello.
    if is_hello { vec![request, newer.strange("FollowRequest")] } else { vec![newer.strange("FollowRequest"), request] }
}

async fn follow(agent: &mut Agent, controller: &TestController, versions: Versions) {
    let upstream = controller.connect(Some(&agent.identity())).await;
    agent.start(gateway::start(controller, upstream, versions).await);
}

#[tokio::test]
async fn each_side_ignores_what_a_later_version_of_the_other_adds() {
    let controller = TestController::start().await;
    controller.join("web1", "web", 1).await;
    let mut app = Agent::join(&controller, "app1", "app").await;
    let newer = Newer::new();
    let (to, from) = (newer.clone(), newer);
    let versions = Versions {
        to_controller: Arc::new(move |message| later_request(&to, &message)),
        to_node: Arc::new(move |message| later_answer(&from, &message)),
    };
    follow(&mut app, &controller, versions).await;
    let ahead = |status: &v1::NodeStatus| status.connected && status.enforced != 0 && status.enforced == status.sent;
    controller.wait_for_status(app.id, ahead).await;
    assert!(app.lets_in("10.42.1.1", "10.42.2.1", 8_080) && !app.lets_in("10.42.1.1", "10.42.2.1", 8_081));
    // A delta too, onto the same digest as ever.
    let revision = controller.change(&[allow("web-more", "cidr:web", "cidr:app", "tcp/8081")]).await;
    let status = controller.wait_for_status(app.id, |status| status.enforced == revision).await;
    assert!(status.error.is_empty() && status.lacks.is_empty(), "{status:?}");
    assert!(app.lets_in("10.42.1.1", "10.42.2.1", 8_081));
    let text = controller.context.metrics.encode();
    assert!(
        text.contains("updates_total{kind=\"snapshot\"} 1\n") && text.contains("updates_total{kind=\"delta\"} 1\n"),
        "{text}"
    );
}

#[tokio::test]
async fn what_a_node_does_not_understand_it_denies_and_both_sides_say_so() {
    let controller = TestController::start().await;
    controller.join("web1", "web", 1).await;
    controller.change(&[allow("web-more", "cidr:web", "cidr:app", "tcp/8081")]).await;
    let mut app = Agent::join(&controller, "app1", "app").await;
    let newer = Newer::new();
    let to_node: Rewrite = Arc::new(move |message| later_answer(&newer, &requiring(&message, "web-more")));
    follow(&mut app, &controller, Versions { to_controller: unchanged(), to_node }).await;
    let status = controller.wait_for_status(app.id, |status| !status.lacks.is_empty()).await;
    assert_eq!((status.lacks, status.enforced), (vec![FEATURE.to_owned()], status.sent));
    assert!(app.lets_in("10.42.1.1", "10.42.2.1", 8_080), "what is understood goes on");
    assert!(!app.lets_in("10.42.1.1", "10.42.2.1", 8_081), "what is not understood is let in");
    let received = app.received().expect("a slice");
    assert_eq!(received.lacks(&[]).into_iter().collect::<Vec<_>>(), [FEATURE], "the node knows what it lacks");
    // The next delta is for a slice that this node does not hold: it asks for all, and still denies.
    let revision = controller.change(&[allow("web-last", "cidr:web", "cidr:app", "tcp/8082")]).await;
    let status = controller.wait_for_status(app.id, |status| status.enforced == revision).await;
    assert_eq!(status.lacks, [FEATURE]);
    assert!(app.lets_in("10.42.1.1", "10.42.2.1", 8_082) && !app.lets_in("10.42.1.1", "10.42.2.1", 8_081));
}

/// It has no digest to say what it holds, and no features.
#[tokio::test]
async fn an_earlier_node_gets_everything_instead_of_a_delta() {
    let controller = TestController::start().await;
    controller.join("web1", "web", 1).await;
    let mut app = Agent::join(&controller, "app1", "app").await;
    let upstream = controller.connect(Some(&app.identity())).await;
    let mut follower = Follower::open(upstream.clone(), None, "").await.expect("a stream");
    follower.hear().await.expect("a snapshot");
    let held = follower.slice.clone();
    drop(follower);
    controller.wait_for_status(app.id, |status| !status.connected).await;
    let lacks = [("Hello", "digest"), ("Hello", "features"), ("Acknowledgement", "lacks")];
    let said = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&said);
    let versions = Versions {
        to_controller: Arc::new(move |message| vec![without("FollowRequest", &message, &lacks)]),
        to_node: Arc::new(move |message| {
            heard.lock().expect("a list").push(message.clone());
            vec![message]
        }),
    };
    let address = gateway::start(&controller, upstream, versions).await;
    let (endpoints, identity) = ([address.to_string()], app.identity());
    let channel = client::connect(&endpoints, &controller.trust(), Some(&identity)).await.expect("connected");
    let mut follower = Follower::open(channel, held.clone(), "").await.expect("a stream");
    let greeting = follower.hear().await.expect("an update");
    assert_eq!(greeting.from, Revision(0), "it was taken to hold what it cannot name");
    assert_eq!(follower.slice, held, "and it is the same");
    // From here on it is told what changes, as what it holds is known.
    let revision = controller.change(&[allow("web-more", "cidr:web", "cidr:app", "tcp/8081")]).await;
    let delta = follower.hear().await.expect("a delta");
    assert_eq!((delta.from, delta.revision), (greeting.revision, Revision(revision)));
    drop(follower);
    controller.wait_for_status(app.id, |status| !status.connected).await;
    // The real agent likewise.
    app.start(address);
    let status = controller.wait_for_status(app.id, |status| status.enforced == revision).await;
    assert!(status.error.is_empty(), "{status:?}");
    assert!(app.lets_in("10.42.1.1", "10.42.2.1", 8_081));
    assert!(!said.lock().expect("a list").is_empty());
}

/// One without the directory: nothing is said of where peers were seen.
#[tokio::test]
async fn a_node_follows_a_controller_that_says_less() {
    let controller = TestController::start().await;
    controller.join("web1", "web", 1).await;
    let mut app = Agent::join(&controller, "app1", "app").await;
    let lacks = [("FollowResponse", "endpoints")];
    let to_node: Rewrite = Arc::new(move |message| vec![without("FollowResponse", &message, &lacks)]);
    follow(&mut app, &controller, Versions { to_controller: unchanged(), to_node }).await;
    let revision = controller.change(&[allow("web-more", "cidr:web", "cidr:app", "tcp/8081")]).await;
    let status = controller.wait_for_status(app.id, |status| status.enforced == revision).await;
    assert!(status.error.is_empty(), "{status:?}");
    assert!(app.lets_in("10.42.1.1", "10.42.2.1", 8_081));
    assert!(app.received().expect("a slice").seen().next().is_none());
}

/// An action of a later version, and no feature that says so: nothing of the update is put in force.
#[tokio::test]
async fn an_action_that_is_not_known_leaves_the_policy_as_it_was() {
    let controller = TestController::start().await;
    controller.join("web1", "web", 1).await;
    let mut app = Agent::join(&controller, "app1", "app").await;
    let to_node: Rewrite = Arc::new(|message| {
        let answer = v1::FollowResponse::decode(message.clone()).expect("an answer");
        let mut update = v1::Update::decode(&answer.update.concat()[..]).expect("an update");
        let strange = update.rules.iter_mut().find(|rule| rule.name == "web-more");
        strange.into_iter().for_each(|rule| rule.action = 99);
        let update = if answer.update.is_empty() { Vec::new() } else { vec![update.encode_to_vec().into()] };
        vec![v1::FollowResponse { update, ..answer }.encode_to_vec().into()]
    });
    follow(&mut app, &controller, Versions { to_controller: unchanged(), to_node }).await;
    controller.wait_for_status(app.id, |status| status.enforced != 0 && status.enforced == status.sent).await;
    let held = app.received();
    let revision = controller.change(&[allow("web-more", "cidr:web", "cidr:app", "tcp/8081")]).await;
    let why = app.disconnected().await;
    assert!(why.contains("no sense") && why.contains("99"), "{why}");
    assert_eq!(app.received(), held, "something of it was used");
    assert!(app.lets_in("10.42.1.1", "10.42.2.1", 8_080) && !app.lets_in("10.42.1.1", "10.42.2.1", 8_081));
    let status = controller.wait_for_status(app.id, |_| true).await;
    assert!(status.enforced < revision, "{status:?}");
}

/// The first version of the stream sent bare updates: nothing of them is taken for what it is not.
#[tokio::test]
async fn a_node_keeps_its_policy_beside_a_controller_of_the_first_version_and_says_why() {
    let controller = TestController::start().await;
    controller.join("web1", "web", 1).await;
    let mut app = Agent::join(&controller, "app1", "app").await;
    let is_first = Arc::new(Mutex::new(false));
    let becomes_first = Arc::clone(&is_first);
    let to_node: Rewrite = Arc::new(move |message| {
        let answer = v1::FollowResponse::decode(message.clone()).expect("an answer");
        match *is_first.lock().expect("a version") {
            true => vec![answer.update.concat().into()],
            false => vec![message],
        }
    });
    follow(&mut app, &controller, Versions { to_controller: unchanged(), to_node }).await;
    controller.wait_for_status(app.id, |status| status.enforced != 0 && status.enforced == status.sent).await;
    let held = app.received();
    *becomes_first.lock().expect("a version") = true;
    controller.change(&[allow("web-more", "cidr:web", "cidr:app", "tcp/8081")]).await;
    let why = app.disconnected().await;
    assert!(why.contains("stream broke") || why.contains("no sense"), "{why}");
    assert_eq!(app.received(), held, "something of it was used");
    assert!(app.lets_in("10.42.1.1", "10.42.2.1", 8_080) && !app.lets_in("10.42.1.1", "10.42.2.1", 8_081));
}
