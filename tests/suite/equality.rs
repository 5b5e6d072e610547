//! However a net is spread over nodes, its answer is that of the exchange rule.

use std::path::PathBuf;

use snn::run::local::{LocalCluster, LocalOptions};
use snn_compiler::{Nodes, Options, PolicySource, Source, Split, compile};
use snn_runtime::Tensor;
use snn_schemas::metadata::Normalisation;
use snn_schemas::wire::TENSOR_HEADER;
use snn_schemas::{Dtype, Manifest, Packing, Policy};

use crate::cluster::Cluster;
use crate::fixtures::{Net, chain, residual, style};
use crate::{
    array, assert_close, assert_within, folder, image, policy, reference, ring, rounded, split,
};

/// Images a case is tried on.
const IMAGES: usize = 3;

async fn check(net: &Net, staleness: usize, dtype: Dtype) {
    let mut policy = policy(net, staleness, dtype, 3 * net.groups + staleness);
    if staleness == 2 {
        policy.packing = Packing::Zeros;
    }
    let mut fused: Vec<Vec<f32>> = Vec::new();
    for nodes in (1..=net.groups).map(Nodes::Even) {
        let what = format!("G = {}, α = {staleness}, {dtype}, {nodes:?}", net.groups);
        let cluster = Cluster::start(&split(net, Some(&policy), nodes)).await;
        for seed in 0..IMAGES {
            let input = image(net, seed);
            let expected = reference::logits(net, Some(&policy), input.data());
            let logits = cluster.logits(input).await;
            assert_within(rounded(dtype), &logits, &expected, &what);
            // On one node it is the fused model's ops that round, on several the codec.
            match fused.get(seed) {
                Some(fused) => assert_close(&logits, fused, &what),
                None => fused.push(logits),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_computes_the_exchange_rule() {
    for groups in [2, 3, 4] {
        for (staleness, dtype) in
            [(1, Dtype::I8), (2, Dtype::F32), (2, Dtype::I8), (2, Dtype::F16), (4, Dtype::I4)]
        {
            check(&residual(groups, &[4, 4], 8), staleness, dtype).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_groups_compute_the_exchange_rule() {
    check(&residual(8, &[4], 8), 1, Dtype::F32).await;
    check(&residual(8, &[4], 8), 4, Dtype::I8).await;
    check(&residual(8, &[2, 2], 8), 2, Dtype::F16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_computes_the_exchange_rule() {
    check(&chain(4, 6), 2, Dtype::F16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_flight_at_once_do_not_mix() {
    let net = residual(4, &[4, 4], 8);
    let policy = policy(&net, 2, Dtype::F16, 9);
    let cluster = Cluster::start(&split(&net, Some(&policy), Nodes::PerGroup)).await;
    let cluster = std::sync::Arc::new(cluster);
    let mut asked = tokio::task::JoinSet::new();
    for seed in 0..40 {
        let (cluster, input) = (cluster.clone(), image(&net, seed));
        asked.spawn(async move { (seed, cluster.logits(input).await) });
    }
    while let Some(answer) = asked.join_next().await {
        let (seed, logits) = answer.unwrap();
        let expected = reference::logits(&net, Some(&policy), image(&net, seed).data());
        assert_close(&logits, &expected, &format!("image {seed}"));
    }
}

/// The split of `net` with the metadata `entries` in its model.
fn split_with(net: &Net, policy: &Policy, entries: &[(String, String)]) -> Split {
    let mut source = Source::from_bytes(net.onnx(style("burn")).into()).unwrap();
    entries.iter().for_each(|(key, value)| source.model.set_metadata(key, value));
    let policy = PolicySource::from_bytes(policy.to_json().as_bytes()).unwrap();
    compile(&source, Some(&policy), &Options::default()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_travels_as_its_pixels_and_gives_the_very_same_answer() {
    let net = residual(4, &[4, 4], 8);
    let policy = ring(&net, 2, Dtype::F32);
    let [channels, height, width] = net.image;
    let plane = height * width;
    let (mean, std) = (vec![0.1; channels], vec![0.3; channels]);
    let normalisation = Normalisation { mean, std };
    let split = split_with(&net, &policy, &normalisation.entries());
    assert_eq!(Manifest::from_json(split.manifest.to_json().as_bytes()).unwrap(), split.manifest);
    let cluster = Cluster::start(&split).await;
    let plain = Cluster::start(&split_with(&net, &policy, &[])).await;
    let inputs: Vec<_> = split.manifest.transfers.iter().filter(|t| t.step.is_none()).collect();
    assert!(!inputs.is_empty());
    for transfer in inputs {
        assert_eq!((transfer.packing, transfer.from), (Packing::Pixels, 0));
        assert_eq!(transfer.bytes, 1 + (channels * plane) as u64);
    }
    // A picture, then numbers that are none: the input's bytes, without the frame's header.
    let mut sent = 0;
    let pixel = |at: usize| normalisation.value(at / plane, (at * 7919 % 256) as u8);
    let picture = (0..channels * plane).map(pixel).collect();
    let picture = Tensor::new(crate::shape(&net), picture).unwrap();
    for (input, element) in [(picture, 1), (image(&net, 1), 4)] {
        let expected = reference::logits(&net, Some(&policy), input.data());
        let logits = cluster.logits(input.clone()).await;
        assert_close(&logits, &expected, "pixels");
        assert_eq!(logits, plain.logits(input).await);
        let report = cluster.entry().report();
        let input = report.sends.iter().find(|send| send.step.is_none()).unwrap();
        assert_eq!(input.bytes - sent, (TENSOR_HEADER + 1 + element * channels * plane) as u64);
        sent = input.bytes;
    }
}

/// `snn-run` becomes the nodes.
pub(crate) fn options() -> LocalOptions {
    let executable = Some(PathBuf::from(env!("CARGO_BIN_EXE_snn-run")));
    LocalOptions { executable, ..LocalOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_compute_the_exchange_rule_and_send_what_the_manifest_says() {
    for (net, staleness, nodes) in [
        (residual(4, &[4, 4], 8), 2, Nodes::PerGroup),
        (residual(3, &[4], 8), 1, Nodes::Even(2)),
        (residual(2, &[2, 2], 8), 2, Nodes::Even(1)),
    ] {
        let dtype = if staleness == 1 { Dtype::I8 } else { Dtype::F16 };
        let policy = ring(&net, staleness, dtype);
        let manifest = split(&net, Some(&policy), nodes.clone()).manifest;
        let folder = folder(&net, Some(&policy), nodes);
        let cluster = LocalCluster::start(folder.path(), options()).await.unwrap();
        for seed in 0..IMAGES {
            let input = image(&net, seed);
            let expected = reference::logits(&net, Some(&policy), input.data());
            let output = cluster.infer(&[array(&input)]).await.unwrap().remove(0);
            assert_within(rounded(dtype), &output.data, &expected, &format!("G = {}", net.groups));
        }
        for report in cluster.reports().await.unwrap() {
            let (sent, _) = manifest.traffic(report.rank);
            let planned = sent * IMAGES as u64;
            let frames = manifest.transfers.iter().filter(|t| t.from == report.rank).count();
            assert_eq!(report.frames_sent, (frames * IMAGES) as u64);
            assert!(report.bytes_sent >= planned);
            assert!(report.bytes_sent <= planned + 64 * report.frames_sent, "{report:?}");
        }
        cluster.stop().await.unwrap();
    }
}
