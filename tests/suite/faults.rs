//! What goes wrong on the way: foreign frames, foreign nodes, nodes that are missing or die.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_compiler::Nodes;
use snn_runtime::InferError;
use snn_runtime::transport::{Event, Transport};
use snn_schemas::Dtype;
use snn_schemas::wire::{Cancel, MAX_FRAME, TensorFrame};

use crate::cluster::{Cluster, PATIENCE, outsider, shard};
use crate::fixtures::{Net, residual};
use crate::{assert_close, image, reference, ring, split};

fn net() -> Net {
    residual(2, &[4], 8)
}

async fn assert_answers(cluster: &Cluster, net: &Net) {
    let policy = ring(net, 2, Dtype::F16);
    let input = image(net, 5);
    let expected = reference::logits(net, Some(&policy), input.data());
    assert_close(&cluster.logits(input).await, &expected, "afterwards");
}

fn frame(request: u64, transfer: u32, payload: usize) -> TensorFrame {
    let (dtype, from, within) = (Dtype::F16, 1, Duration::from_secs(5));
    let payload = Bytes::from(vec![0; payload]);
    TensorFrame { dtype, from, request, transfer, within, degraded: false, payload }
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_frames_harm_no_request() {
    let net = net();
    let policy = ring(&net, 2, Dtype::F16);
    let cluster = Cluster::start(&split(&net, Some(&policy), Nodes::PerGroup)).await;
    let sinks: Vec<_> = cluster.nodes.iter().map(|node| node.sink()).collect();
    let good = frame(7, 1, 64).encode();
    let give = |bytes: Bytes| {
        for sink in &sinks {
            sink(Event::Frame { bytes: bytes.clone() });
        }
    };
    for length in 0..good.len() {
        give(good.slice(..length));
    }
    for at in 0..24 {
        for bit in 0..8 {
            let mut changed = good.to_vec();
            changed[at] ^= 1 << bit;
            give(changed.into());
        }
    }
    for transfer in 0..1000 {
        give(frame(transfer.into(), transfer, 0).encode());
    }
    give(Bytes::from(vec![0; MAX_FRAME + 1]));
    give(Cancel { from: 1, request: 99, again: false, reason: "nobody asked".into() }.encode());
    assert_answers(&cluster, &net).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_ends_the_request_with_its_rank() {
    let net = net();
    let policy = ring(&net, 2, Dtype::F16);
    let split = split(&net, Some(&policy), Nodes::PerGroup);
    let cluster = Cluster::start(&split).await;
    let Cluster { mut nodes, network } = cluster;
    nodes.pop().unwrap().shutdown().await;
    // Somebody takes the place of rank 1 who never sends anything, and leaves.
    let silent = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&silent);
    let sink = Arc::new(move |event: Event| heard.lock().unwrap().push(event));
    let member = outsider(&network, 1, &split.manifest.split, sink);
    let cluster = Cluster { nodes, network };
    let start = Instant::now();
    let (answer, ()) = tokio::join!(cluster.infer(image(&net, 0)), async {
        while silent.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(member);
    });
    assert_eq!(answer.unwrap_err().to_string(), "rank 1 is gone");
    assert!(start.elapsed() < PATIENCE / 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_ends_at_its_deadline_and_says_what_it_waited_for() {
    let net = net();
    let policy = ring(&net, 2, Dtype::F16);
    let split = split(&net, Some(&policy), Nodes::PerGroup);
    let Cluster { mut nodes, network } = Cluster::start(&split).await;
    nodes.pop().unwrap().shutdown().await;
    let _member = outsider(&network, 1, &split.manifest.split, Arc::new(|_| {}));
    let within = Duration::from_millis(200);
    let error = nodes[0].infer(vec![image(&net, 0)], within).await.unwrap_err().to_string();
    assert!(error.starts_with("no answer in time: rank 0 waited for t"), "{error}");
    assert!(error.ends_with(" of rank 1"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_node_is_named() {
    let net = net();
    let policy = ring(&net, 2, Dtype::F16);
    let split = split(&net, Some(&policy), Nodes::PerGroup);
    let Cluster { mut nodes, network: _network } = Cluster::start(&split).await;
    nodes.pop().unwrap().shutdown().await;
    let within = Duration::from_millis(100);
    let error = nodes[0].infer(vec![image(&net, 0)], within).await.unwrap_err();
    assert!(matches!(&error, InferError::Missing { ranks, .. } if ranks == &[1]));
    assert_eq!(error.to_string(), "rank 1 missing for 0.1 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_another_split_is_refused() {
    let net = net();
    let policy = ring(&net, 2, Dtype::F16);
    let split = split(&net, Some(&policy), Nodes::PerGroup);
    let Cluster { mut nodes, network } = Cluster::start(&split).await;
    nodes.pop().unwrap().shutdown().await;
    let _member = outsider(&network, 1, &"ab".repeat(32), Arc::new(|_| {}));
    let own = &split.manifest.split[..8];
    let expected = format!("rank 1 is of split abababab, this node of {own}");
    assert_eq!(nodes[0].fault(), Some(expected));
    assert_eq!(nodes[0].missing().into_iter().collect::<Vec<_>>(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_that_do_not_fit_are_refused_at_once() {
    let net = net();
    let cluster = Cluster::start(&split(&net, None, Nodes::Even(1))).await;
    let small = snn_runtime::Tensor::new(vec![1, 3, 4, 4], vec![0.0; 48]).unwrap();
    let error = cluster.infer(small).await.unwrap_err().to_string();
    assert_eq!(error, "input \"image\" has shape [1, 3, 4, 4], expected [1, 3, 8, 8]");
    let error = cluster.entry().infer(vec![], PATIENCE).await.unwrap_err().to_string();
    assert_eq!(error, "0 inputs, expected 1");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_entry_node_takes_requests() {
    let net = net();
    let policy = ring(&net, 2, Dtype::F16);
    let cluster = Cluster::start(&split(&net, Some(&policy), Nodes::PerGroup)).await;
    let error = cluster.nodes[1].infer(vec![image(&net, 0)], PATIENCE).await.unwrap_err();
    assert_eq!(error.to_string(), "rank 0 answers requests, this node does not");
}

#[test]
fn a_shard_that_makes_no_sense_is_refused() {
    use snn_runtime::Shard;
    use snn_schemas::onnx;

    let net = net();
    let split = split(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let refused = |change: &dyn Fn(&mut onnx::ModelProto)| {
        let mut model = split.shards[0].model.clone();
        change(&mut model);
        Shard::from_bytes(onnx::encode(&model).into()).unwrap_err().to_string()
    };
    let nodes = |model: &mut onnx::ModelProto, change: &dyn Fn(&mut onnx::NodeProto)| {
        for node in &mut model.graph.as_mut().unwrap().node {
            if node.op_type() == "SnnRecv" {
                change(node);
                break;
            }
        }
    };
    let message = refused(&|model| nodes(model, &|node| node.attribute.clear()));
    assert!(message.ends_with("(SnnRecv) has no usable transfer"), "{message}");
    let message = refused(&|model| {
        nodes(model, &|node| {
            let peer = node.attribute.iter_mut().find(|a| a.name() == "peer").unwrap();
            peer.i = Some(5);
        });
    });
    assert!(message.ends_with("(SnnRecv) names a peer that is not in the cluster"), "{message}");
    let message = refused(&|model| {
        model.graph.as_mut().unwrap().node.retain(|node| node.op_type() != "SnnRecv");
    });
    assert!(message.ends_with("is taken before it is made"), "{message}");
    let message = refused(&|model| model.set_metadata("snn.rank", "7"));
    assert_eq!(message, "metadata \"snn.rank\" has the unusable value \"7\"");
    // The original is taken.
    assert_eq!(shard(&split, 0).identity().nodes, 2);
}

/// Keeps `Transport` in use by name: the outsider's side is one.
#[tokio::test]
async fn nobody_is_reached_where_nobody_is() {
    let network = snn_runtime::transport::memory::Network::new();
    let member = outsider(&network, 0, "", Arc::new(|_| {}));
    let error = member.send(3, Bytes::new()).await.unwrap_err();
    assert_eq!(error.to_string(), "rank 3 cannot be reached");
}
