//! Questions that are lost, answered twice, late, or refused.

use std::sync::atomic::{AtomicUsize, Ordering};

use snn_schemas::manifest::Port;

use super::*;
use crate::client::own_key;
use crate::questions::{Questions, answer_questions, queryable, reply};
use crate::transport::zenoh::{Link, Options};

const SPLIT: &str = "0123456789abcdef";
/// Time given for an answer: what ends within less has not waited for it to pass.
const WITHIN: Duration = Duration::from_secs(20);
/// How long a machine with other work may take for what takes milliseconds.
const SOON: Duration = Duration::from_secs(5);

async fn link(peers: &[&Link]) -> Link {
    let peers = peers.iter().map(|link| link.address().to_owned()).collect();
    Link::open(&Options { peers, ..Options::default() }).await.unwrap()
}

async fn asked(link: &Link, name: &str) -> Questions {
    queryable(link, &own_key(&infer_key(SPLIT), name)).await.unwrap()
}

fn answer_of(number: f32) -> wire::Answer {
    let outputs = vec![Tensor::new(vec![1], vec![number]).unwrap()];
    wire::Answer { outputs, degraded: false }
}

async fn any_size() -> usize {
    wire::MAX_FRAME
}

/// Answers every question in its own time; counts them.
fn answering(questions: Questions, number: f32, after: Duration) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(answer_questions(questions, any_size, move |_, _| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            tokio::time::sleep(after).await;
            Ok::<_, String>(answer_of(number))
        }
    }));
    count
}

/// Keeps questions as somebody does to whom they are sent in vain; after so many answers.
fn losing(questions: Questions, lost: usize) {
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok(query) = questions.recv_async().await {
            if kept.len() < lost {
                kept.push(query);
                continue;
            }
            let key = questions.key_expr().to_string();
            reply(&query, key, wire::Reply::Answer(answer_of(2.0)).encode()).await;
        }
    });
}

fn cluster(link: &Link) -> Asked {
    Asked::new(link.session().clone(), SPLIT.to_owned())
}

async fn infer_through(link: &Link) -> (Result<f32, String>, Duration) {
    let start = Instant::now();
    let answer = infer(&cluster(link), Way::Straight, Vec::new(), WITHIN).await;
    let answer = answer.map(|answer| answer.outputs[0].data()[0]);
    (answer.map_err(|error| error.to_string()), start.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_is_lost_is_asked_again() {
    let link = link(&[]).await;
    losing(asked(&link, "a").await, 2);
    let (answer, took) = infer_through(&link).await;
    assert_eq!(answer, Ok(2.0));
    assert!((3 * SILENCE..SOON).contains(&took), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answer_counts_where_another_is_lost() {
    let link = link(&[]).await;
    losing(asked(&link, "a").await, usize::MAX);
    answering(asked(&link, "b").await, 3.0, Duration::ZERO);
    let (answer, took) = infer_through(&link).await;
    assert_eq!(answer, Ok(3.0));
    assert!(took < SILENCE, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_works_for_long_is_not_asked_again() {
    let link = link(&[]).await;
    let count = answering(asked(&link, "a").await, 4.0, 3 * SILENCE);
    assert_eq!(infer_through(&link).await.0, Ok(4.0));
    assert_eq!(count.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_counts_once_nobody_else_works() {
    let link = link(&[]).await;
    losing(asked(&link, "a").await, usize::MAX);
    let refusing = asked(&link, "b").await;
    tokio::spawn(answer_questions(refusing, any_size, |_, _| async {
        Err::<wire::Answer, _>("no")
    }));
    let (answer, took) = infer_through(&link).await;
    assert_eq!(answer, Err("no".to_owned()));
    assert!(took < SOON, "{took:?}");
    let slow = answering(asked(&link, "c").await, 5.0, 2 * SILENCE);
    assert_eq!(infer_through(&link).await.0, Ok(5.0));
    assert_eq!(slow.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_stopped_answering_and_dies_takes_no_question_along() {
    let (home, guest) = (link(&[]).await, link(&[]).await);
    let asker = link(&[&home, &guest]).await;
    answering(asked(&home, "home").await, 1.0, Duration::ZERO);
    let guests = asked(&guest, "guest").await;
    let stop = tokio::spawn(answer_questions(guests, any_size, |_, _| async {
        Ok::<_, String>(answer_of(1.0))
    }));
    // As inferences are asked for: zenoh keeps a route for a declared key.
    let key = cluster(&asker).everybody().await.unwrap();
    let question = wire::Infer { within: WITHIN, inputs: Vec::new() }.encode(None);
    let answers = async || {
        let start = Instant::now();
        let (hear, mut heard) = mpsc::unbounded_channel();
        ask_once(asker.session(), &key, question.clone(), SOON, hear).await.unwrap();
        let mut answers = 0;
        while let Some(Heard::Reply(_)) = heard.recv().await {
            answers += 1;
        }
        assert!(start.elapsed() < SOON, "{answers} answers after {:?}", start.elapsed());
        answers
    };
    let until = async |count: usize| {
        let deadline = Instant::now() + SOON;
        while answers().await != count {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(ASK_AGAIN).await;
        }
    };
    until(2).await;
    stop.abort();
    until(1).await;
    guest.close().await.unwrap();
    for _ in 0..20 {
        assert_eq!(answers().await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_is_asked_about_by_its_pixels() {
    let model = |shape: Vec<usize>| ClusterInfo {
        split: SPLIT.to_owned(),
        nodes: 1,
        inputs: vec![Port { name: "x".to_owned(), shape }],
        outputs: vec![],
        metadata: vec![
            ("snn.mean".to_owned(), "0.5".to_owned()),
            ("snn.std".to_owned(), "0.25".to_owned()),
        ],
    };
    let link = link(&[]).await;
    let cluster = |shape| Asked::described(link.session().clone(), model(shape));
    let grey = (100.0 / 255.0 - 0.5) / 0.25;
    let inputs = |shape| vec![Tensor::new(shape, vec![grey; 4096]).unwrap()];
    let picture = vec![1, 1, 64, 64];
    let question = cluster(picture.clone()).question(inputs(picture.clone()), WITHIN);
    assert!((4096..4200).contains(&question.len()), "{}", question.len());
    assert_eq!(
        wire::Infer::decode(question, wire::MAX_FRAME).unwrap().inputs,
        inputs(picture.clone())
    );
    // What is no picture, and a model that is not known.
    let plain = cluster(vec![1, 4096]).question(inputs(vec![1, 4096]), WITHIN);
    assert!(plain.len() > 4 * 4096, "{}", plain.len());
    let unknown = Asked::new(link.session().clone(), SPLIT.to_owned());
    assert!(unknown.question(inputs(picture), WITHIN).len() > 4 * 4096);
}
