//! Nodes die, freeze and return while requests are made: every one is answered, and rightly.

use snn_compiler::Nodes;

use crate::devices::{Devices, any_rank, ask_through, die_and_return, net, policy_of};
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
