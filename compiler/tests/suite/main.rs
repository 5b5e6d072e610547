//! The compiler's tests: what its shards compute, what they cost, how they read, what is refused.
//!
//! One crate, so that tract is linked once. Models come from `fixtures`, the truth from `reference`,
//! tract runs behind `engine`.

#[path = "../engine/mod.rs"]
mod engine;
#[path = "../fixtures/mod.rs"]
mod fixtures;
#[path = "../reference/mod.rs"]
mod reference;

mod cost;
mod equality;
mod errors;
mod exporters;
mod mutants;
mod numbers;
mod placements;
mod snapshots;
mod torch;

use fixtures::{Net, TOLERANCE, policy, rounded};
use snn_compiler::{CompileError, Nodes, Options, PolicySource, Source, Split, compile};
use snn_schemas::Policy;

fn policy_source(policy: &Policy) -> PolicySource {
    PolicySource::from_bytes(policy.to_json().as_bytes()).expect("a valid policy")
}

fn try_split(model: Vec<u8>, policy: Option<&Policy>, nodes: Nodes) -> Result<Split, CompileError> {
    let source = Source::from_bytes(model.into())?;
    let options = Options { nodes, ..Options::default() };
    compile(&source, policy.map(policy_source).as_ref(), &options)
}

fn split(model: Vec<u8>, policy: Option<&Policy>, nodes: Nodes) -> Split {
    try_split(model, policy, nodes).unwrap_or_else(|error| panic!("{error}"))
}

/// The only shard of a split on one node, run in tract.
fn run_fused(split: &Split, net: &Net, image: &[f32]) -> Vec<f32> {
    assert_eq!(split.shards.len(), 1);
    engine::run(&split.shards[0].model, &shape(net), image)
}

fn shape(net: &Net) -> [usize; 4] {
    let [channels, height, width] = net.image;
    [1, channels, height, width]
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_within(TOLERANCE, found, expected, what);
}

#[track_caller]
fn assert_within(tolerance: f32, found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let difference = (found - expected).abs();
        assert!(difference <= tolerance, "{what}: {found} for {expected}, off by {difference}");
    }
    // Two nets that give nothing but zeros would be equal too.
    assert!(expected.iter().any(|value| value.abs() > 0.01), "{what}: {expected:?} tell nothing");
}
