//! Nets as PyTorch exports them compute what PyTorch computes, exchange and all.
//!
//! `data/torch_separable.py` makes the files: a seeded net, a policy, and PyTorch's own answers.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use snn_compiler::{Nodes, Options, PolicySource, Source, Split, compile};

use crate::{assert_close, engine};

/// Height and width of the image.
const SIZE: usize = 8;

fn numbers(value: &Value) -> Vec<f32> {
    let list = value.as_array().expect("a list");
    list.iter().map(|number| number.as_f64().expect("a number") as f32).collect()
}

/// Splits the model at `path` in several ways and compares with the answers beside it.
fn check(path: &Path) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let json = fs::read(path.with_extension("json")).expect("answers beside the model");
    let answers: Value = serde_json::from_slice(&json).expect("the answers are JSON");
    let policy =
        PolicySource::from_bytes(answers["policy"].to_string().as_bytes()).expect("a policy");
    let source = Source::from_bytes(fs::read(path).expect("a model").into()).expect("a model");
    let shape = [1, 3, SIZE, SIZE];
    let image: Vec<f32> = (0..3 * SIZE * SIZE).map(|index| (0.1 * index as f32).sin()).collect();
    let split = |policy: Option<&PolicySource>, nodes| -> Split {
        let options = Options { nodes, input_shape: Some(shape.to_vec()), ..Options::default() };
        compile(&source, policy, &options).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let plain = split(None, Nodes::Even(1));
    let found = engine::run(&plain.shards[0].model, &shape, &image);
    assert_close(&found, &numbers(&answers["plain"]), &name);
    for nodes in [Nodes::Even(1), Nodes::Even(2), Nodes::PerGroup] {
        let what = format!("{name}, {nodes:?}");
        let split = split(Some(&policy), nodes);
        let found = engine::play(&split, &shape, &image);
        assert_close(&found, &numbers(&answers["exchanged"]), &what);
        assert_eq!(split.manifest.groups, policy.policy.groups);
    }
}

#[test]
fn an_exported_net_computes_what_pytorch_does() {
    check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch_separable.onnx"));
}

#[test]
#[ignore = "needs the folder that torch_separable.py DIR writes, named by TORCH_VARIANTS"]
fn every_variant_computes_what_pytorch_does() {
    let folder = std::env::var_os("TORCH_VARIANTS").expect("TORCH_VARIANTS names a folder");
    let entries = fs::read_dir(folder).expect("a folder");
    let mut models: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    models.retain(|path| path.extension().is_some_and(|extension| extension == "onnx"));
    models.sort();
    assert!(!models.is_empty(), "the folder has no models");
    let failed: Vec<PathBuf> = models
        .into_iter()
        .filter(|path| std::panic::catch_unwind(|| check(path)).is_err())
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
}
