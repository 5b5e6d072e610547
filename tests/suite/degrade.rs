//! What is not waited for: `--degrade` trades tensors that are late for an answer that is not.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_compiler::{Nodes, Split};
use snn_runtime::client::Client;
use snn_runtime::transport::memory::Network;
use snn_runtime::transport::shaped::{Link, Shaped};
use snn_runtime::transport::{Event, Transport};
use snn_runtime::{Answer, Node, TractEngine};
use snn_schemas::Dtype;
use snn_schemas::wire::{Frame, TensorFrame};

use crate::cluster::{Cluster, PATIENCE, outsider, shard};
use crate::fixtures::{Net, residual};
use crate::processes::{NodeProcess, SNN_RUN};
use crate::{assert_close, folder, image, reference, ring, split};

/// How long tensors are waited for here.
const WAIT: Duration = Duration::from_millis(20);
/// What a tensor travels on the slow link: far longer.
const TRAVEL: Duration = Duration::from_millis(250);

fn net() -> Net {
    residual(2, &[4], 8)
}

/// The answer of rank 0 beside a rank 1 that does `reply` with the number of each request.
async fn beside(
    split: &Split,
    net: &Net,
    degrade: Option<Duration>,
    reply: impl Fn(&dyn Fn(Bytes), u64) + Send + Sync + 'static,
) -> Answer {
    let network = Network::new();
    let mut node = Node::load(&shard(split, 0), || TractEngine::new(1)).await.unwrap();
    let entry = node.sink();
    let known = Mutex::new(None);
    let sink = Arc::new(move |event: Event| {
        let Event::Frame { bytes } = event else { return };
        let Ok(Frame::Tensor(frame)) = Frame::decode(bytes) else { return };
        // Once a request, however many frames of it come.
        if known.lock().unwrap().replace(frame.request) != Some(frame.request) {
            reply(&|bytes| entry(Event::Frame { bytes }), frame.request);
        }
    });
    let _other = outsider(&network, 1, &split.manifest.split, sink);
    let member = network.join(0, &split.manifest.split, node.sink());
    node.connect(Arc::new(member));
    if let Some(wait) = degrade {
        node.degrade_after(wait);
    }
    node.infer(vec![image(net, 0)], PATIENCE).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_waited_for_counts_as_zero() {
    let net = net();
    let split = split(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let silent = beside(&split, &net, Some(WAIT), |_, _| {}).await;
    let transfers = split.manifest.transfers.clone();
    let zeros = beside(&split, &net, None, move |send, request| {
        for transfer in transfers.iter().filter(|transfer| transfer.to == 0) {
            let payload = Bytes::from(vec![0; transfer.bytes as usize]);
            let (dtype, transfer) = (transfer.dtype, transfer.id);
            let (from, within, degraded) = (1, PATIENCE, false);
            let frame = TensorFrame { dtype, from, request, transfer, within, degraded, payload };
            send(frame.encode());
        }
    })
    .await;
    assert_eq!(silent.outputs, zeros.outputs);
    assert_eq!((silent.degraded, zeros.degraded), (true, false));
    assert!(zeros.outputs[0].data().iter().any(|value| value.abs() > 0.01));
}

/// A cluster of `groups` in which everything that rank `slow` sends travels for long.
async fn with_slow_link(net: &Net, slow: usize) -> Cluster {
    let split = split(net, Some(&ring(net, 2, Dtype::F32)), Nodes::PerGroup);
    let link = Link { bits_per_second: 1e12, round_trip: 2 * TRAVEL };
    let rank = AtomicUsize::new(0);
    Cluster::start_with(
        &split,
        || TractEngine::new(1),
        move |member| {
            let member: Arc<dyn Transport> = Arc::new(member);
            match rank.fetch_add(1, Ordering::Relaxed) == slow {
                true => Arc::new(Shaped::new(member, link).unwrap()),
                false => member,
            }
        },
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_costs_what_it_carries_and_not_the_answer() {
    let net = net();
    let cluster = with_slow_link(&net, 1).await;
    let patient = cluster.logits(image(&net, 0)).await;
    let expected = reference::logits(&net, Some(&ring(&net, 2, Dtype::F32)), image(&net, 0).data());
    assert_close(&patient, &expected, "while everything is waited for");
    let entry = cluster.entry();
    assert_eq!((entry.report().missed, entry.report().degraded), (0, 0));
    cluster.nodes.iter().for_each(|node| node.degrade_after(WAIT));
    // Late frames of the requests before open nothing and disturb nobody.
    for number in 1..=20 {
        let answer = cluster.infer(image(&net, number)).await.unwrap();
        assert!(answer.degraded, "request {number}");
    }
    let report = entry.report();
    assert!(report.missed >= 20, "{report:?}");
    assert_eq!((report.degraded, report.failures, report.requests), (20, 0, 21));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_marked_wherever_on_the_way_a_tensor_was_missed() {
    let net = residual(4, &[4], 8);
    let cluster = with_slow_link(&net, 2).await;
    // Rank 3 goes on without what rank 2 sends it; the others, the entry node too, wait.
    cluster.nodes[3].degrade_after(WAIT);
    let answer = cluster.infer(image(&net, 0)).await.unwrap();
    assert!(answer.degraded);
    assert!(cluster.nodes[3].report().missed > 0);
    assert_eq!((cluster.entry().report().missed, cluster.entry().report().degraded), (0, 1));
}

/// A process that is killed with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_takeover_the_dead_are_gone_without_until_they_return() {
    let net = net();
    let policy = ring(&net, 2, Dtype::F16);
    let folder = folder(&net, Some(&policy), Nodes::PerGroup);
    let arguments = ["--degrade", "50", "--no-takeover"];
    let mut first = NodeProcess::start(&folder.path().join("shard_0.onnx"), &arguments);
    let address = first.address();
    let other = || {
        let shard = folder.path().join("shard_1.onnx");
        let mut command = Command::new(SNN_RUN);
        command.arg(shard).args(arguments).args(["--peer", &address]).stderr(Stdio::null());
        Killed(command.spawn().unwrap())
    };
    let second = other();
    while first.line() != "ready" {}
    let client = Client::connect(std::slice::from_ref(&address), None, PATIENCE).await.unwrap();
    let expected = reference::logits(&net, Some(&policy), image(&net, 1).data());
    let ask = async || client.infer(vec![image(&net, 1)], PATIENCE).await.unwrap();
    drop(second);
    assert_eq!(first.line(), "waiting for rank 1");
    assert!(ask().await.degraded);
    let _second = other();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask().await;
        if !answer.degraded {
            return assert_close(answer.outputs[0].data(), &expected, "afterwards");
        }
        assert!(Instant::now() < deadline);
    }
}
