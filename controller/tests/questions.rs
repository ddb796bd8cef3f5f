//! Who asks much is refused, and holds up nobody else.

mod common;

use common::{Follower, LIMIT, TestController, allow, parse};
use controller_api::v1;
use controller_api::v1::sync_client::SyncClient;
use policy::Change;
use tokio::task::JoinSet;
use tonic::Code;

fn question() -> v1::ExplainRequest {
    v1::ExplainRequest { source: vec![10, 42, 1, 1], destination: vec![10, 42, 1, 2], protocol: 6, port: 8_080 }
}

#[tokio::test]
async fn a_node_that_floods_is_refused_and_others_are_answered() {
    let controller = TestController::start().await;
    let (flooding, _) = controller.join("web1", "web", 1).await;
    let (other, _) = controller.join("web2", "web", 2).await;
    let flooding = SyncClient::new(controller.connect(Some(&flooding)).await);
    let mut other = SyncClient::new(controller.connect(Some(&other)).await);
    let mut flood = JoinSet::new();
    for _ in 0..16 {
        let mut client = flooding.clone();
        flood.spawn(async move {
            let (mut answered, mut refusals) = (0, Vec::new());
            for _ in 0..40 {
                match client.explain(question()).await {
                    Ok(_) => answered += 1,
                    Err(status) => refusals.push(status),
                }
            }
            (answered, refusals)
        });
    }
    let meanwhile = async {
        let mut root = controller.root().await;
        for port in 1..=20 {
            let answer = other.explain(question()).await.expect("an answer").into_inner();
            assert_eq!(answer.source_cidr, "web");
            let rule = allow(&format!("r{port}"), "cidr:app", "cidr:db", &format!("tcp/{port}"));
            let revision = controller.change(&[rule]).await;
            let network = root.get_network(v1::GetNetworkRequest::default()).await.expect("a network").into_inner();
            assert_eq!(network.revision, revision);
        }
    };
    tokio::time::timeout(LIMIT, meanwhile).await.expect("in time");
    let (mut answered, mut refusals) = (0, Vec::new());
    while let Some(flooded) = flood.join_next().await {
        let (more, refused) = flooded.expect("no panic");
        answered += more;
        refusals.extend(refused);
    }
    assert!(answered > 0 && !refusals.is_empty(), "{answered}");
    for refusal in &refusals {
        assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal:?}");
        assert!(
            refusal.message().starts_with("node `web1` ") && refusal.message().contains("try again"),
            "{refusal:?}"
        );
    }
    let counted = controller.context.metrics.encode();
    assert!(counted.contains(&format!("questions_total{{result=\"refused\"}} {}\n", refusals.len())), "{counted}");
    assert!(counted.contains("rampart_controller_open_questions 0\n"), "{counted}");
}

#[tokio::test]
async fn a_dry_run_says_what_a_change_would_and_waits_for_no_writer() {
    let controller = TestController::start().await;
    let mut root = controller.root().await;
    let revision = controller.change(&[allow("one", "cidr:app", "cidr:db", "tcp/1")]).await;
    let request = |expected_revision, changes: &[Change]| v1::ChangeRequest {
        dry_run: true,
        expected_revision,
        ..common::change_request("", changes)
    };
    let delete = [Change::DeleteRule { name: parse("one") }];
    let commits = |controller: &TestController| {
        let encoded = controller.context.metrics.encode();
        encoded.lines().filter(|line| line.contains("commits_total")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = commits(&controller);
    for expected in [0, revision] {
        let answer = root.change(request(expected, &delete)).await.expect("it would be done").into_inner();
        assert_eq!(answer.revision, revision, "nothing was changed");
    }
    let refused = root.change(request(revision - 1, &delete)).await.expect_err("another revision");
    assert_eq!(refused.code(), Code::Aborted, "{refused:?}");
    let refused = root.change(request(0, &[Change::DeleteRule { name: parse("two") }])).await.expect_err("no rule");
    assert!(refused.message().contains("`two`"), "{refused:?}");
    assert_eq!(commits(&controller), before, "the writer was asked");
    assert_eq!(controller.change(&delete).await, revision + 1);
}

/// A stream can cost a snapshot each time.
#[tokio::test]
async fn a_node_that_opens_streams_all_the_time_is_refused() {
    let controller = TestController::start().await;
    let (identity, _) = controller.join("web1", "web", 1).await;
    let channel = controller.connect(Some(&identity)).await;
    let opened = async {
        loop {
            if let Err(refused) = Follower::open(channel.clone(), None, "").await {
                return refused;
            }
        }
    };
    let refused = tokio::time::timeout(LIMIT, opened).await.expect("refused in time");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().starts_with("node `web1` calls too often: "), "{refused:?}");
    let (other, _) = controller.join("web2", "web", 2).await;
    let mut other = Follower::open(controller.connect(Some(&other)).await, None, "").await.expect("a stream");
    other.hear().await.expect("a snapshot");
}
