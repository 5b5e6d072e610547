//! The whole tool, from a model to nodes that answer: in one process, and in real ones.
//!
//! One crate, so that the libraries are linked once. Models come from the compiler's `fixtures`, the
//! truth from its `reference`, which knows nothing of graphs or nodes.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../compiler/tests/fixtures/mod.rs"]
mod fixtures;
#[path = "../../compiler/tests/reference/mod.rs"]
mod reference;

mod cluster;
mod site;

mod agents;
mod boards;
mod coldstart;
mod commands;
mod degrade;
mod deploy;
mod devices;
mod equality;
mod faults;
mod garbage;
mod guests;
mod http;
mod https;
mod limits;
mod overlap;
mod processes;
mod render;
mod routers;
mod segment;
mod survival;
mod traces;
mod trained;
mod trust;

use std::io::Write as _;
use std::path::Path;

use fixtures::{Net, TOLERANCE, policy, ring, rounded, style};
use snn::run::input::Array;
use snn_compiler::{Nodes, Options, PolicySource, Source, Split, compile, sha256};
use snn_runtime::Tensor;
use snn_schemas::Policy;

/// Says that something is not tested here, and why. Not with `eprintln!`, which is shown only for tests that
/// fail.
fn not_tested(what: &str, why: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "not tested: {what}: {why}");
}

fn split(net: &Net, policy: Option<&Policy>, nodes: Nodes) -> Split {
    let source = Source::from_bytes(net.onnx(style("burn")).into()).unwrap();
    let options = Options { nodes, ..Options::default() };
    let policy =
        policy.map(|policy| PolicySource::from_bytes(policy.to_json().as_bytes()).unwrap());
    compile(&source, policy.as_ref(), &options).unwrap()
}

/// A folder with the split of `net`, as `snnc split` writes it.
fn folder(net: &Net, policy: Option<&Policy>, nodes: Nodes) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(&split(net, policy, nodes), folder.path());
    folder
}

fn write(split: &Split, folder: &Path) {
    let mut manifest = split.manifest.clone();
    for (node, shard) in manifest.nodes.iter_mut().zip(&split.shards) {
        let bytes = shard.to_bytes();
        node.sha256 = sha256(&bytes);
        std::fs::write(folder.join(&node.shard), bytes).unwrap();
    }
    std::fs::write(folder.join("cluster.json"), manifest.to_json()).unwrap();
}

fn shape(net: &Net) -> Vec<usize> {
    let [channels, height, width] = net.image;
    vec![1, channels, height, width]
}

/// An input for `net`, different for each seed.
fn image(net: &Net, seed: usize) -> Tensor {
    Tensor::new(shape(net), fixtures::image(net, seed)).unwrap()
}

fn array(tensor: &Tensor) -> Array {
    Array { shape: tensor.shape().to_vec(), data: tensor.data().to_vec() }
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
        let allowed = tolerance * expected.abs().max(1.0);
        assert!(difference <= allowed, "{what}: {found} for {expected}, off by {difference}");
    }
    // Two nets that give nothing but zeros would be equal too.
    assert!(expected.iter().any(|value| value.abs() > 0.01), "{what}: {expected:?} tell nothing");
}
