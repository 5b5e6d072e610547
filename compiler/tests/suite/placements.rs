//! Where ops go: what is dropped, what is copied, what is the same each time.

use snn_compiler::{Nodes, Split};
use snn_schemas::Dtype;

use crate::fixtures::{residual, ring, style};
use crate::{policy, split};

fn bytes(split: &Split) -> Vec<Vec<u8>> {
    let mut files: Vec<Vec<u8>> = split.shards.iter().map(|shard| shard.to_bytes()).collect();
    files.push(split.manifest.to_json().into_bytes());
    files
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let net = residual(4, &[2, 2], 8);
    let policy = policy(&net, 2, Dtype::F16, 3);
    let once = || bytes(&split(net.onnx(style("old")), Some(&policy), Nodes::PerGroup));
    let first = once();
    for _ in 0..3 {
        assert!(once() == first);
    }
}

#[test]
fn features_that_cannot_reach_the_output_are_neither_computed_nor_sent() {
    // In a ring of four groups group 0 is reached from group 3 in the last step, from group 2 in
    // the last two, from group 1 in the last three.
    let net = residual(4, &[5], 8);
    let split = split(net.onnx(style("burn")), Some(&ring(&net, 1, Dtype::F32)), Nodes::PerGroup);
    let groups: Vec<&[usize]> =
        split.manifest.blocks.iter().map(|block| block.groups.as_slice()).collect();
    // Group 3 computes block 5 too: with α = 1 it sends what that very block gives.
    let expected: [&[usize]; 5] =
        [&[0, 1, 2, 3], &[0, 1, 2, 3], &[0, 1, 2, 3], &[0, 2, 3], &[0, 3]];
    assert_eq!(groups, expected);
    let senders: Vec<usize> = (0..5)
        .map(|step| split.manifest.transfers.iter().filter(|t| t.step == Some(step)).count())
        .collect();
    assert_eq!(senders, [4, 4, 3, 2, 1]);
}

#[test]
fn without_a_policy_only_the_first_group_is_left() {
    let net = residual(4, &[2], 8);
    let split = split(net.onnx(style("burn")), None, Nodes::PerGroup);
    assert_eq!(split.manifest.transfers.len(), 0);
    let work: Vec<bool> = split.work.iter().map(|work| work.ops > 0).collect();
    assert_eq!(work, [true, false, false, false]);
}

#[test]
fn groups_on_one_node_exchange_for_free() {
    let net = residual(4, &[4], 8);
    let policy = ring(&net, 1, Dtype::F32);
    let sent = |nodes| {
        split(net.onnx(style("burn")), Some(&policy), nodes).manifest.cost.wire.exchange_bytes
    };
    let [one, two, four] = [1, 2, 4].map(|nodes| sent(Nodes::Even(nodes)));
    assert_eq!(one, 0);
    assert!(two < four, "{two} < {four}");
    // All that is left of the ring: 1 → 2 and 3 → 0.
    let crossing = split(net.onnx(style("burn")), Some(&policy), Nodes::Explicit(vec![0, 0, 1, 1]));
    let pairs: std::collections::BTreeSet<_> = crossing
        .manifest
        .transfers
        .iter()
        .filter(|transfer| transfer.step.is_some())
        .map(|transfer| (transfer.from_group, transfer.to_group))
        .collect();
    assert_eq!(pairs.into_iter().collect::<Vec<_>>(), [(Some(1), Some(2)), (Some(3), Some(0))]);
}

#[test]
fn a_sent_tensor_is_awaited_only_where_it_is_added() {
    use snn_compiler::schedule::Action;
    // With α = 2 every node computes block 2 between a send and the receive of the same step.
    let net = residual(2, &[4], 8);
    let split = split(net.onnx(style("burn")), Some(&ring(&net, 2, Dtype::F32)), Nodes::PerGroup);
    let step = |number: &usize| split.cuts[*number].taker.exchange.map(|exchange| exchange.step);
    for shard in &split.shards {
        let position = |wanted: &dyn Fn(&Action) -> bool| shard.actions.iter().position(wanted);
        let sent = position(&|a| matches!(a, Action::Send(n) if step(n) == Some(0)));
        let received = position(&|a| matches!(a, Action::Receive(n) if step(n) == Some(0)));
        let (sent, received) = (sent.expect("a send"), received.expect("a receive"));
        let convolutions = shard.actions[sent..received]
            .iter()
            .filter(|action| {
                matches!(action, Action::Compute(op) if split.placed.graph.op(*op).op_type() == "Conv")
            })
            .count();
        assert_eq!(convolutions, 3, "node {}", shard.rank);
    }
}
