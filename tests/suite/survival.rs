//! Nodes die, freeze and return while requests are made: every one is answered, and rightly.

use std::time::{Duration, Instant};

use snn_compiler::Nodes;

use crate::cluster::PATIENCE;
use crate::devices::{Devices, WITHIN, any_rank, ask_through, die_and_return, net, policy_of};
use crate::site::{connect, infer};
use crate::{assert_close, folder, image, reference};

/// Longer than a node may stand still before it joins again as a new one.
const FREEZE: Duration = Duration::from_millis(1_500);

fn devices() -> Devices {
    let net = net();
    Devices::start(folder(&net, Some(&policy_of(&net)), Nodes::PerGroup))
}

fn devices_with_key() -> Devices {
    let net = net();
    Devices::start_with_key(folder(&net, Some(&policy_of(&net)), Nodes::PerGroup))
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_nodes_that_die_and_return() {
    ask_through(&net(), &mut devices_with_key(), 200, die_and_return).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_nodes_that_freeze_and_thaw() {
    ask_through(&net(), &mut devices_with_key(), 200, |devices, number| {
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
