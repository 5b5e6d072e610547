//! A trained network after the compiler: as many images told right as training reported.

use bytes::Bytes;
use snn_compiler::{Nodes, Options, PolicySource, Source, compile};
use snn_schemas::cost::Plan;
use snn_schemas::{Dtype, Policy};
use snn_trainer::{
    Config, Data, Weights, classify, judge_onnx, latency, read_network, write_exchanging,
    write_onnx,
};

fn model(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/examples/models/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// The model with the exchanges of `policy` in it, as `snnc split --nodes 1` writes it.
fn fused(model: &[u8], policy: &Policy) -> Vec<u8> {
    let source = Source::from_bytes(Bytes::copy_from_slice(model)).unwrap();
    let policy = PolicySource::from_bytes(policy.to_json().as_bytes()).unwrap();
    let options = Options { nodes: Nodes::Even(1), ..Options::default() };
    compile(&source, Some(&policy), &options).unwrap().shards[0].to_bytes().to_vec()
}

#[test]
fn a_fused_model_tells_as_many_digits_right_as_training_did() {
    let (model, json) = (model("digits.onnx"), model("digits.json"));
    let policy = Policy::from_json(&json).unwrap();
    let provenance = policy.provenance.clone().unwrap();
    let reported = provenance["accuracy"]["searched"]["test"].as_f64().unwrap();
    let config = Config { seed: 2, ..Config::digits() };
    let data = Data::load(&config, None).unwrap();
    let by_compiler = judge_onnx(&fused(&model, &policy), &data.test, 10).unwrap();
    assert_eq!(by_compiler.correct as f64, (reported * by_compiler.images as f64).round());

    // The trainer's own way to write exchanges agrees with the compiler's.
    let network = read_network(model.clone(), &config).unwrap();
    let exchanging = write_exchanging(&network, &policy, &data).unwrap();
    let by_trainer = judge_onnx(&exchanging, &data.test, 10).unwrap();
    assert_eq!(by_trainer.correct, by_compiler.correct);
    assert!((by_trainer.loss - by_compiler.loss).abs() < 1e-4);

    // Codes are worth what training simulates, whoever of the two writes them.
    for dtype in [Dtype::I8, Dtype::I4] {
        let policy = Policy { dtype, ..policy.clone() };
        let told = classify(&network, &policy, &data.test).unwrap();
        let right = told.iter().zip(data.test.labels()).filter(|(told, label)| told == label);
        let by_compiler = judge_onnx(&fused(&model, &policy), &data.test, 10).unwrap();
        assert_eq!(by_compiler.correct, right.count(), "{dtype}");
        let exchanging = write_exchanging(&network, &policy, &data).unwrap();
        let by_trainer = judge_onnx(&exchanging, &data.test, 10).unwrap();
        assert_eq!(by_trainer.correct, by_compiler.correct, "{dtype}");
        assert!((by_trainer.loss - by_compiler.loss).abs() < 1e-3, "{dtype}");
    }
}

/// Weights of half precision are widened before groups are looked for.
#[test]
fn a_model_of_half_precision_is_split_as_the_network_that_it_stores() {
    let (model, json) = (model("digits.onnx"), model("digits.json"));
    let policy = Policy::from_json(&json).unwrap();
    let config = Config { seed: 2, ..Config::digits() };
    let data = Data::load(&config, None).unwrap();
    let network = read_network(model.clone(), &config).unwrap();
    let half = write_onnx(&network, &data, Weights::F16).unwrap();
    assert!(half.len() * 3 < model.len() * 2, "{} of {} bytes", half.len(), model.len());
    let network = read_network(half.clone(), &config).unwrap();
    let told = classify(&network, &policy, &data.test).unwrap();
    let right = told.iter().zip(data.test.labels()).filter(|(told, label)| told == label);
    let by_compiler = judge_onnx(&fused(&half, &policy), &data.test, 10).unwrap();
    assert_eq!(by_compiler.correct, right.count());
}

/// The digits travel to the other nodes as their pixels, a byte each.
#[test]
fn the_trainer_predicts_the_latency_of_the_compiled_model() {
    let (model, json) = (model("digits.onnx"), model("digits.json"));
    let policy = Policy::from_json(&json).unwrap();
    let source = Source::from_bytes(Bytes::from(model)).unwrap();
    let exchanges = PolicySource::from_bytes(&json).unwrap();
    let split = compile(&source, Some(&exchanges), &Options::default()).unwrap();
    let plan = Plan::of_manifest(&split.manifest).unwrap();
    let mut config = Config::digits();
    for link in ["100kbit,1ms", "1mbit,1ms", "100mbit,0.3ms", "1gbit,0.3ms"] {
        for device in ["1gflops", "5gflops"] {
            (config.search.link, config.search.device) = (link.to_owned(), device.to_owned());
            let (device, link) = config.search.cluster().unwrap();
            let compiled = 1e3 * plan.predict(&[device], &link).unwrap().latency;
            let predicted = latency(&config, &policy).unwrap();
            let apart = (predicted / compiled - 1.0).abs();
            assert!(apart < 0.002, "{link:?}: {predicted} ms, compiled {compiled} ms");
        }
    }
}
