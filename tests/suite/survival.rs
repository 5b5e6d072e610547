//! Nodes die, freeze and return while requests are made: every one is answered, and rightly.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use snn_compiler::Nodes;
use snn_runtime::Tensor;
use snn_runtime::client::Client;
use tokio::task::JoinSet;

use crate::cluster::PATIENCE;
use crate::devices::{Devices, WITHIN, any_rank, ask, ask_through, die_and_return, net, policy_of};
use crate::site::{connect, infer};
use crate::{assert_close, folder, image, reference};

/// Longer than a node may stand still before it joins again as a new one.
const FREEZE: Duration = Duration::from_millis(1_500);

/// Those who ask without pause while nodes die.
const ASKERS: usize = 3;
/// Inputs of each.
const INPUTS: usize = 8;
/// How long a node lives before it is killed, and how long it is dead.
const ALIVE: Duration = Duration::from_millis(700);
const DEAD: Duration = Duration::from_millis(300);
/// Answers and deaths at least: with one answer after another, each death falls into requests.
const ANSWERS: usize = 200;
const DEATHS: usize = 12;

fn devices() -> Devices {
    let net = net();
    Devices::start(folder(&net, Some(&policy_of(&net)), Nodes::PerGroup))
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_nodes_that_die_and_return() {
    ask_through(&net(), &mut devices(), 200, die_and_return).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_nodes_that_freeze_and_thaw() {
    ask_through(&net(), &mut devices(), 200, |devices, number| {
        // The node with the head, and the one the client talks to, are among them.
        let rank = any_rank(number / 40);
        match number % 40 {
            5 => devices.signal(rank, "-STOP"),
            25 => devices.signal(rank, "-CONT"),
            _ => {}
        }
    })
    .await;
}

/// Inputs, each with what is expected of it: others for each asker.
fn known(asker: usize) -> Vec<(Tensor, Vec<f32>)> {
    let net = net();
    let policy = policy_of(&net);
    let with_expected = |seed: usize| {
        let input = image(&net, seed);
        let expected = reference::logits(&net, Some(&policy), input.data());
        (input, expected)
    };
    (asker * INPUTS..(asker + 1) * INPUTS).map(with_expected).collect()
}

/// Asks until the end, and counts the answers; every one must be right and in time.
async fn ask_without_pause(
    client: Client,
    asker: usize,
    answers: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
) {
    let known = known(asker);
    for (number, (input, expected)) in known.iter().cycle().enumerate() {
        if ended.load(Ordering::Relaxed) {
            return;
        }
        let what = format!("request {number} of asker {asker}");
        ask(&client, input.clone(), expected, &what).await;
        answers.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_survive_deaths_that_fall_into_them() {
    let mut devices = devices();
    let (answers, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let mut askers = JoinSet::new();
    for asker in 0..ASKERS {
        let client = devices.client().await;
        // The first answer shows that the cluster has been complete.
        client.infer(vec![image(&net(), 0)], PATIENCE).await.unwrap();
        askers.spawn(ask_without_pause(client, asker, Arc::clone(&answers), Arc::clone(&ended)));
    }
    let mut deaths = 0;
    while deaths < DEATHS || answers.load(Ordering::Relaxed) < ANSWERS {
        tokio::time::sleep(ALIVE).await;
        let rank = any_rank(deaths);
        devices.kill(rank);
        tokio::time::sleep(DEAD).await;
        devices.restart(rank);
        // Its life begins when it listens: on a machine with much to do all might be dead at once.
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(&devices.addresses[rank]).is_err() {
            assert!(Instant::now() < deadline, "rank {rank} does not return");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        deaths += 1;
        // Before the end one ends only with an answer that was wrong, or lost.
        if let Some(asker) = askers.try_join_next() {
            asker.unwrap();
        }
    }
    ended.store(true, Ordering::Relaxed);
    while let Some(asker) = askers.join_next().await {
        asker.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_of_four_still_answers() {
    ask_through(&net(), &mut devices(), 30, |devices, number| match number {
        5 => devices.kill(0),
        12 => devices.kill(3),
        20 => devices.kill(1),
        _ => {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn survivors_that_freeze_together_still_stand_in_for_the_dead() {
    let (net, mut devices) = (net(), devices());
    // Of four that answer each has looked at the folder for shards. Then that of the dead is gone.
    ask_through(&net, &mut devices, 30, |devices, number| match number {
        10 => devices.kill(2),
        20 => devices.lose_shard(2),
        _ => {}
    })
    .await;
    for rank in [0, 1, 3] {
        devices.signal(rank, "-STOP");
    }
    tokio::time::sleep(FREEZE).await;
    for rank in [0, 1, 3] {
        devices.signal(rank, "-CONT");
    }
    let input = image(&net, 1);
    let expected = reference::logits(&net, Some(&policy_of(&net)), input.data());
    let deadline = Instant::now() + PATIENCE;
    let answer = loop {
        let client = devices.client().await;
        match client.infer(vec![input.clone()], WITHIN).await {
            Ok(answer) => break answer,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    assert_close(answer.outputs[0].data(), &expected, "afterwards");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_returns_stands_in_for_another_that_does_not() {
    ask_through(&net(), &mut devices(), 60, |devices, number| match number {
        5 => devices.kill(3),
        15 => devices.kill(0),
        25 => devices.restart(0),
        // Of two with as much to do the lower one stands in: by now it is the one that returned.
        45 => devices.kill(2),
        _ => {}
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_stays_open_while_a_node_that_was_frozen_joins_again() {
    let net = net();
    let split = folder(&net, Some(&policy_of(&net)), Nodes::PerGroup);
    let (devices, http) = Devices::start_with_http(split);
    devices.client().await.infer(vec![image(&net, 0)], PATIENCE).await.unwrap();
    let input = image(&net, 1);
    let ask = |connection: &mut _| {
        let (status, answer) = infer(connection, input.data(), &net);
        assert_eq!(status, 200, "{answer}");
    };
    let mut open = connect(http[1]);
    ask(&mut open);
    devices.signal(1, "-STOP");
    tokio::time::sleep(FREEZE).await;
    devices.signal(1, "-CONT");
    // Long enough to find out that it was frozen, leave, and join.
    let end = Instant::now() + 2 * FREEZE;
    while Instant::now() < end {
        ask(&mut open);
        ask(&mut connect(http[1]));
    }
}

/// Asked over HTTP, since two tasks of this process would use a TLS link at once: [`snn::threads`] has why, and
/// spares nodes that.
#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_deaths_among_nodes_with_a_key() {
    let net = net();
    let split = folder(&net, Some(&policy_of(&net)), Nodes::PerGroup);
    let (mut devices, http) = Devices::start_with_key(split);
    let policy = policy_of(&net);
    for number in 0..200 {
        die_and_return(&mut devices, number);
        // Not the one that dies in these 25, nor the one that has just returned.
        let (dying, returned) = (any_rank(number / 25), any_rank((number / 25).saturating_sub(1)));
        let alive: Vec<usize> = (0..4).filter(|&rank| ![dying, returned].contains(&rank)).collect();
        let rank = alive[number % alive.len()];
        let deadline = Instant::now() + PATIENCE;
        // The first of all are asked while they start.
        while number < 4 && TcpStream::connect(http[rank]).is_err() {
            assert!(Instant::now() < deadline, "rank {rank} does not start");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let input = image(&net, number);
        let expected = reference::logits(&net, Some(&policy), input.data());
        let (status, answer) = infer(&mut connect(http[rank]), input.data(), &net);
        assert_eq!(status, 200, "request {number}: {answer}");
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        let data = answer["outputs"][0]["data"].as_array().unwrap();
        let logits: Vec<f32> = data.iter().map(|x| x.as_f64().unwrap() as f32).collect();
        assert_close(&logits, &expected, &format!("request {number}"));
    }
}
