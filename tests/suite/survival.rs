//! Nodes die, freeze and return while requests are made: every one is answered, and rightly.

use snn_compiler::Nodes;

use crate::devices::{Devices, ask_through, die_and_return, net, policy_of};
use crate::folder;

fn devices() -> Devices {
    let net = net();
    Devices::start(folder(&net, Some(&policy_of(&net)), Nodes::PerGroup))
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_nodes_that_die_and_return() {
    ask_through(&net(), &mut devices(), 200, die_and_return).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_survive_a_node_that_freezes_and_thaws() {
    ask_through(&net(), &mut devices(), 60, |devices, number| {
        let rank = 1 + number / 30;
        match number % 30 {
            5 => devices.signal(rank, "-STOP"),
            20 => devices.signal(rank, "-CONT"),
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
