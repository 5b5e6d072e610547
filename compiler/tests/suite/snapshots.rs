//! How groups, transfers and shards read: one file a fixture and stage, under sixty lines each.
//!
//! Accept changes with `INSTA_UPDATE=always cargo test -p snn-compiler`.

use insta::assert_snapshot;
use snn_compiler::{Nodes, Source, groups, picture, read, show};
use snn_schemas::{Dtype, Policy};

use crate::fixtures::{Net, Style, chain, residual, style};
use crate::{policy, split};

/// Longest snapshot that somebody will really read.
const LINES: usize = 60;

fn snapshot(name: &str, stage: &str, text: String) {
    assert!(text.lines().count() < LINES, "{name} {stage} has {} lines", text.lines().count());
    assert_snapshot!(format!("{name}__{stage}"), text);
}

/// Every text form of one fixture.
fn snapshots(name: &str, net: &Net, style: Style, policy: &Policy, nodes: Nodes) {
    let source = Source::from_bytes(net.onnx(style).into()).expect("a model");
    let model = read(&source, None).unwrap_or_else(|error| panic!("{error}"));
    let found = groups::find(&model, None).unwrap_or_else(|error| panic!("{error}"));
    snapshot(name, "groups", show::groups(&model, &found));
    let split = split(net.onnx(style), Some(policy), nodes);
    let costs = show::costs(&split.manifest);
    snapshot(name, "transfers", show::transfers(&split.manifest) + &costs);
    snapshot(name, "picture", picture::text(&split.manifest));
    for rank in 0..split.shards.len() {
        snapshot(name, &format!("shard_{rank}"), show::shard(&split, rank));
    }
}

#[test]
fn residual_in_two_groups() {
    let net = residual(2, &[1, 1], 4);
    snapshots("residual_2", &net, style("burn"), &policy(&net, 1, Dtype::F16, 1), Nodes::PerGroup);
}

#[test]
fn residual_folded_with_staleness_2() {
    let net = residual(2, &[4], 4);
    snapshots("stale_2", &net, style("torch"), &policy(&net, 2, Dtype::F32, 4), Nodes::PerGroup);
}

#[test]
fn chain_in_four_groups_on_two_nodes() {
    let net = chain(4, 2);
    let nodes = Nodes::Explicit(vec![0, 1, 0, 1]);
    snapshots("chain_4", &net, style("old"), &policy(&net, 1, Dtype::F16, 2), nodes);
}

#[test]
fn chain_in_three_groups_from_constant_nodes() {
    let net = chain(3, 4);
    snapshots(
        "chain_3",
        &net,
        style("constants"),
        &policy(&net, 2, Dtype::F16, 3),
        Nodes::PerGroup,
    );
}

#[test]
fn eight_groups_on_four_nodes() {
    let net = chain(8, 2);
    snapshots("chain_8", &net, style("latest"), &policy(&net, 1, Dtype::F32, 5), Nodes::Even(4));
}

#[test]
fn pictures() {
    let net = residual(3, &[2, 2], 4);
    let split =
        split(net.onnx(style("torch")), Some(&policy(&net, 2, Dtype::F16, 6)), Nodes::PerGroup);
    snapshot("residual_3", "page", picture::page(&split.manifest));
    snapshot("residual_3", "dot", picture::dot(&split.manifest));
}
