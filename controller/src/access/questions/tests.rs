use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use tonic::Code;

use super::*;

fn admin(name: &str) -> Caller {
    Caller::Admin { name: name.to_owned() }
}

/// A question that says that it has begun, and is answered when the test says so.
fn held(
    begun: Sender<&'static str>,
    name: &'static str,
    end: Receiver<()>,
) -> impl FnOnce(&Wanted) -> Result<(), Status> {
    move |_| {
        begun.send(name).expect("the test");
        end.recv().map_err(|_| Status::internal("the test is over"))
    }
}

#[tokio::test]
async fn one_caller_takes_one_place_and_others_are_answered_meanwhile() {
    let metrics = Metrics::new();
    let questions = Questions::new(Arc::clone(&metrics));
    let (begun, begins) = channel();
    let mut open = Vec::new();
    // More than there are places, and each takes as long as the test wants.
    for _ in 0..8 {
        let (questions, begun, (end, held_until)) = (questions.clone(), begun.clone(), channel());
        let asked = tokio::spawn(async move {
            questions.ask(&admin("mallory"), Cost::High, held(begun, "mallory", held_until)).await
        });
        open.push((end, asked));
    }
    let (first, begins) = tokio::task::spawn_blocking(move || (begins.recv(), begins)).await.expect("no panic");
    assert_eq!(first, Ok("mallory"));
    for _ in 0..100 {
        let answer = questions.ask(&admin("alice"), Cost::High, |_| Ok("answered")).await.expect("an answer");
        assert_eq!(answer, "answered");
    }
    assert_eq!(questions.ask(&Caller::Root, Cost::Low, |_| Ok(7)).await.expect("an answer"), 7);
    assert!(begins.try_recv().is_err(), "a second question of one caller has begun");
    assert_eq!(metrics.questions_open.get(), 8);
    for (end, _) in &open {
        end.send(()).expect("the question");
    }
    for (_, asked) in open {
        asked.await.expect("no panic").expect("an answer");
    }
    assert_eq!(metrics.questions_open.get(), 0);
}

#[tokio::test]
async fn who_has_too_many_open_or_asks_too_often_is_told_when_to_try_again() {
    let questions = Questions::new(Metrics::new());
    let now = Instant::now();
    let open: Vec<_> =
        (0..OPERATOR.asked).map(|_| questions.enter(&Caller::Root, Cost::Low, now).expect("room")).collect();
    let Err(refused) = questions.enter(&Caller::Root, Cost::Low, now) else { panic!("one too many") };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(
        refused.message(),
        "root has 256 questions open, which is as many as one caller may have; try again when one of them is answered"
    );
    assert!(questions.enter(&admin("alice"), Cost::High, now).is_ok(), "others have their own");
    drop(open);
    for _ in 0..OPERATOR.rate.burst {
        questions.enter(&Caller::Root, Cost::High, now).expect("a burst");
    }
    let Err(refused) = questions.enter(&Caller::Root, Cost::High, now) else { panic!("too often") };
    assert_eq!(
        refused.message(),
        "root calls too often: one caller may call 2000 times at once, and then 500 times a second; try again in 2 ms"
    );
    assert!(questions.enter(&Caller::Root, Cost::Low, now).is_ok(), "what costs little has no rate");
    assert!(questions.enter(&Caller::Root, Cost::High, now + Duration::from_millis(20)).is_ok());
    // Streams are paced likewise, and take nothing from questions.
    let alice = admin("alice");
    let paced = (0..2_500).filter(|_| questions.pace_at(&alice, now).is_ok()).count();
    assert_eq!(paced, OPERATOR.rate.burst as usize);
    assert!(questions.enter(&alice, Cost::High, now).is_ok());
    let encoded = questions.0.metrics.encode();
    assert!(encoded.contains("questions_total{result=\"refused\"} 502"), "{encoded}");
}

#[tokio::test]
async fn a_question_whose_caller_is_gone_ends_and_one_that_waits_is_not_begun() {
    let metrics = Metrics::new();
    let questions = Questions::new(Arc::clone(&metrics));
    let (begun, begins) = channel();
    let (over, ended) = channel();
    let running = {
        let questions = questions.clone();
        tokio::spawn(async move {
            let question = move |wanted: &Wanted| {
                begun.send(()).expect("the test");
                while !wanted.is_over() {
                    std::thread::yield_now();
                }
                over.send(()).expect("the test");
                Ok(())
            };
            questions.ask(&admin("alice"), Cost::High, question).await
        })
    };
    tokio::task::spawn_blocking(move || begins.recv()).await.expect("no panic").expect("begun");
    let never = |_: &Wanted| -> Result<(), Status> { panic!("nobody waits for this") };
    let alice = admin("alice");
    let waiting = tokio::time::timeout(Duration::ZERO, questions.ask(&alice, Cost::High, never));
    assert!(waiting.await.is_err());
    running.abort();
    tokio::task::spawn_blocking(move || ended.recv()).await.expect("no panic").expect("it saw that it is over");
    // Its turn comes after the one that was given up.
    questions.ask(&admin("alice"), Cost::High, |_| Ok(())).await.expect("an answer");
    let encoded = metrics.encode();
    assert!(encoded.contains("questions_total{result=\"given-up\"} 2"), "{encoded}");
    assert!(encoded.contains("questions_total{result=\"answered\"} 1"), "{encoded}");
}

#[test]
fn callers_that_ask_no_more_are_forgotten() {
    let questions = Questions::new(Metrics::new());
    let start = Instant::now();
    let ask = |name: &str, cost| questions.enter(&admin(name), cost, start).expect("room");
    let open = ask("alice", Cost::Low);
    drop((ask("bob", Cost::High), ask("carol", Cost::Low)));
    let known = || questions.0.operators.callers().keys().cloned().collect::<Vec<_>>();
    questions.sweep(start);
    assert_eq!(known(), [Asker::Admin("alice".to_owned()), Asker::Admin("bob".to_owned())]);
    questions.sweep(start + Duration::from_secs(1));
    assert_eq!(known(), [Asker::Admin("alice".to_owned())]);
    drop(open);
    questions.sweep(start + Duration::from_secs(1));
    assert_eq!(known(), []);
}
