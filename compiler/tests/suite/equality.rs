//! The fused model computes the exchange rule; the shards together compute what the fused model does.

use snn_compiler::Nodes;
use snn_schemas::policy::Wire;
use snn_schemas::{Dtype, Packing};

use crate::fixtures::{Activation, Net, chain, image, residual, style, styles};
use crate::{
    assert_close, assert_within, engine, policy, reference, rounded, run_fused, shape, split,
};

/// Images a case is tried on.
const IMAGES: usize = 2;

/// The net with G groups that has four blocks of one shape in a row, so that α = 4 fits.
fn two_stages(groups: usize) -> Net {
    residual(groups, &[4, 4], 8)
}

fn check_fused(net: &Net, staleness: usize, dtype: Dtype) {
    let policy = policy(net, staleness, dtype, net.groups);
    assert!(policy.steps.iter().any(|step| step.decision.sends().count() > 0), "nothing is sent");
    let fused = split(net.onnx(style("burn")), Some(&policy), Nodes::Even(1));
    for seed in 0..IMAGES {
        let image = image(net, seed);
        let expected = reference::logits(net, Some(&policy), &image);
        let what = format!("G = {}, α = {staleness}, {dtype}", net.groups);
        assert_within(rounded(dtype), &run_fused(&fused, net, &image), &expected, &what);
    }
}

#[test]
fn fused_model_computes_the_exchange_rule() {
    for groups in [2, 3, 4, 8] {
        for staleness in [1, 2, 4] {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::I8, Dtype::I4] {
                check_fused(&two_stages(groups), staleness, dtype);
            }
        }
    }
}

#[test]
fn fused_chain_computes_the_exchange_rule() {
    for (groups, staleness) in [(2, 1), (3, 2), (4, 3), (8, 1)] {
        check_fused(&chain(groups, 6), staleness, Dtype::F16);
    }
}

#[test]
fn an_exchange_changes_the_answer() {
    // Else the tests above would prove nothing.
    let net = two_stages(4);
    let policy = policy(&net, 2, Dtype::F32, 4);
    let image = image(&net, 0);
    let with = reference::logits(&net, Some(&policy), &image);
    let without = reference::logits(&net, None, &image);
    let moved = with.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(moved > 0.01, "{moved}");
}

#[test]
fn steps_travel_each_in_its_own_way() {
    let net = two_stages(3);
    let mut policy = policy(&net, 1, Dtype::I8, 6);
    let packing = Some(Packing::Zeros);
    for step in &mut policy.steps {
        step.wire = Wire { dtype: Some(Dtype::F16), packing };
    }
    policy.steps[0].wire = Wire { dtype: Some(Dtype::I4), packing };
    policy.steps[1].wire = Wire { dtype: None, packing };
    policy.steps[2].wire = Wire::default();
    let image = image(&net, 2);
    let expected = reference::logits(&net, Some(&policy), &image);
    let split = split(net.onnx(style("burn")), Some(&policy), Nodes::PerGroup);
    let played = engine::play(&split, &shape(&net), &image);
    assert_within(rounded(Dtype::I4), &played, &expected, "four ways");
    let text = snn_compiler::show::transfers(&split.manifest);
    for way in [" f16 zeros packed ", " i4 zeros packed ", " i8 zeros packed ", " i8  g"] {
        assert!(text.contains(way), "{way} is not in:\n{text}");
    }
}

#[test]
fn every_activation_closes_a_block() {
    use Activation::{HardSigmoid, HardSwish, LeakyRelu, Relu6, Sigmoid, Silu};
    for activation in [LeakyRelu, Relu6, Sigmoid, HardSigmoid, HardSwish, Silu] {
        for (name, style) in
            styles().into_iter().filter(|(n, _)| ["old", "opset13", "torch"].contains(n))
        {
            for staleness in [1, 2] {
                let net = Net { activation, ..residual(3, &[2, 2], 8) };
                let dtype = if staleness == 1 { Dtype::F16 } else { Dtype::I8 };
                let policy = policy(&net, staleness, dtype, 1);
                let fused = split(net.onnx(style), Some(&policy), Nodes::Even(1));
                let image = image(&net, 3);
                let expected = reference::logits(&net, Some(&policy), &image);
                let what = format!("{activation:?} in {name}, α = {staleness}");
                let fused = run_fused(&fused, &net, &image);
                assert_within(rounded(dtype), &fused, &expected, &what);
                let split = split(net.onnx(style), Some(&policy), Nodes::PerGroup);
                assert_close(&engine::play(&split, &shape(&net), &image), &fused, &what);
            }
        }
    }
}

/// Ranks that no even spread gives: the head elsewhere, neighbours apart.
fn scattered(groups: usize) -> Vec<usize> {
    (0..groups).map(|group| (groups - 1 - group) % groups.div_ceil(2).max(2)).collect()
}

fn check_shards(net: &Net, staleness: usize, dtype: Dtype) {
    let policy = policy(net, staleness, dtype, 7 * net.groups + staleness);
    let model = net.onnx(style("burn"));
    let image = image(net, 1);
    let fused = split(model.clone(), Some(&policy), Nodes::Even(1));
    let expected = run_fused(&fused, net, &image);
    let even = (1..=net.groups).map(Nodes::Even);
    for nodes in even.chain([Nodes::Explicit(scattered(net.groups))]) {
        let what = format!("G = {}, α = {staleness}, {dtype}, {nodes:?}", net.groups);
        let split = split(model.clone(), Some(&policy), nodes);
        assert_close(&engine::play(&split, &shape(net), &image), &expected, &what);
    }
}

#[test]
fn shards_compute_what_the_fused_model_does() {
    for groups in [2, 3, 4] {
        for (staleness, dtype) in
            [(1, Dtype::I8), (1, Dtype::F16), (2, Dtype::F16), (2, Dtype::I4), (4, Dtype::F32)]
        {
            check_shards(&two_stages(groups), staleness, dtype);
        }
    }
}

#[test]
fn eight_shards_compute_what_the_fused_model_does() {
    check_shards(&residual(8, &[2, 2], 8), 2, Dtype::I8);
    check_shards(&residual(8, &[2, 1], 8), 1, Dtype::F32);
}

#[test]
fn shards_of_a_chain_compute_what_the_fused_model_does() {
    check_shards(&chain(4, 6), 2, Dtype::F16);
    check_shards(&chain(3, 4), 1, Dtype::F16);
}

/// Pooled features of all groups meet at the classifier: nothing is dropped, and a number a channel is
/// gathered from every other node.
#[test]
fn a_classifier_may_read_all_groups() {
    for groups in [2, 4] {
        let net = Net { classified: groups, ..two_stages(groups) };
        check_fused(&net, 2, Dtype::F16);
        check_shards(&net, 2, Dtype::F16);
        let policy = policy(&net, 2, Dtype::F16, 3);
        for (name, style) in styles().into_iter().filter(|(_, style)| !style.dynamic) {
            let split = split(net.onnx(style), Some(&policy), Nodes::PerGroup);
            let all: Vec<usize> = (0..groups).collect();
            assert!(split.manifest.blocks.iter().all(|block| block.groups == all), "{name}");
            let image = image(&net, 0);
            let expected = reference::logits(&net, Some(&policy), &image);
            let found = engine::play(&split, &shape(&net), &image);
            assert_within(rounded(Dtype::F16), &found, &expected, name);
            let gathered = split.manifest.transfers.iter();
            let gathered =
                gathered.filter(|t| t.to == 0 && t.from_group.is_some() && t.step.is_none());
            assert_eq!(gathered.map(|t| t.bytes).collect::<Vec<_>>(), vec![4 * 16; groups - 1]);
        }
    }
}
