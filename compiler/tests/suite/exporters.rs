//! Whatever exporter wrote a net, it is split in the same way and computes the same.

use snn_compiler::{Nodes, Options, Source, compile, groups, read};
use snn_schemas::Dtype;

use crate::fixtures::{Net, chain, image, residual, styles};
use crate::{assert_close, engine, policy, policy_source, reference, run_fused, shape, split};

fn nets() -> Vec<(&'static str, Net)> {
    vec![("residual", residual(4, &[2, 2], 8)), ("chain", chain(3, 4))]
}

#[test]
fn every_style_is_one_function_on_one_node_and_on_many() {
    for (what, net) in nets() {
        let image = image(&net, 5);
        let policy = policy(&net, 2, Dtype::F16, 11);
        let expected = reference::logits(&net, Some(&policy), &image);
        for (name, style) in styles() {
            let what = format!("{what} in {name}");
            let source = Source::from_bytes(net.onnx(style).into()).expect("a model");
            let input_shape = style.dynamic.then(|| shape(&net).to_vec());
            let policy = policy_source(&policy);
            for nodes in [1, 2, net.groups] {
                let options = Options {
                    nodes: Nodes::Even(nodes),
                    input_shape: input_shape.clone(),
                    ..Options::default()
                };
                let split = compile(&source, Some(&policy), &options)
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_close(&engine::play(&split, &shape(&net), &image), &expected, &what);
            }
        }
    }
}

#[test]
fn without_a_policy_the_fused_model_is_the_source() {
    for (what, net) in nets() {
        let image = image(&net, 6);
        let expected = reference::logits(&net, None, &image);
        for (name, style) in styles().into_iter().filter(|(_, style)| !style.dynamic) {
            let what = format!("{what} in {name}");
            let source = engine::run(&net.model(style), &shape(&net), &image);
            assert_close(&source, &expected, &what);
            let fused = split(net.onnx(style), None, Nodes::Even(1));
            assert_close(&run_fused(&fused, &net, &image), &expected, &what);
        }
    }
}

#[test]
fn every_style_has_the_same_groups_and_blocks() {
    for (what, net) in nets() {
        for (name, style) in styles() {
            let source = Source::from_bytes(net.onnx(style).into()).expect("a model");
            let model = read(&source, Some(&shape(&net))).unwrap_or_else(|e| panic!("{name}: {e}"));
            let found =
                groups::find(&model, None).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(found.count, net.groups, "{what} in {name}");
            let ends: Vec<&str> =
                found.blocks.iter().map(|b| model.graph.tensor(b.out).name.as_str()).collect();
            let expected: Vec<String> =
                net.blocks.iter().map(|block| format!("{}/out", block.name)).collect();
            assert_eq!(ends, expected, "{what} in {name}");
        }
    }
}

#[test]
fn a_shard_names_what_it_holds() {
    let net = residual(2, &[2], 8);
    let policy = policy(&net, 1, Dtype::F16, 2);
    let split = split(net.onnx(crate::fixtures::style("torch")), Some(&policy), Nodes::PerGroup);
    for shard in &split.shards {
        let graph = shard.model.graph.as_ref().expect("a graph");
        // Every tensor has its shape written down, every weight is used.
        for node in graph.node.iter().filter(|node| node.op_type() != "SnnSend") {
            let known = graph.value_info.iter().chain(&graph.output);
            let described = known.clone().any(|value| value.name() == node.output[0]);
            assert!(described, "{}", node.name());
        }
        for weight in &graph.initializer {
            let used = graph.node.iter().any(|node| node.input.iter().any(|n| n == weight.name()));
            assert!(used, "{}", weight.name());
        }
        assert_eq!(shard.model.metadata("snn.rank"), Some(shard.rank.to_string().as_str()));
    }
}
