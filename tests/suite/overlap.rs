//! Computing goes on while tensors travel: what is waited for is only what computing does not cover.

use std::sync::Arc;
use std::time::Duration;

use snn_compiler::Nodes;
use snn_runtime::engine::slowed::{Pace, Slowed};
use snn_runtime::transport::Transport;
use snn_runtime::transport::shaped::{Link, Shaped};
use snn_runtime::{NodeReport, TractEngine};
use snn_schemas::Dtype;

use crate::cluster::Cluster;
use crate::fixtures::residual;
use crate::{assert_close, image, reference, ring, split};

/// What every segment takes: far more than the machine's own noise.
const SEGMENT: Duration = Duration::from_millis(60);
/// What every tensor travels.
const TRAVEL: Duration = Duration::from_millis(150);

/// What a node waits at each step in the middle of the net, in ms, as the mean of both nodes: one
/// starts later by the input's travel, so that they take turns in waiting for both ways.
async fn waits(staleness: usize) -> Vec<f64> {
    let net = residual(2, &[12], 8);
    let policy = ring(&net, staleness, Dtype::F32);
    let split = split(&net, Some(&policy), Nodes::PerGroup);
    let engine = || Slowed { engine: TractEngine::new(1), pace: Pace::AtLeast(SEGMENT) };
    let link = Link { bits_per_second: 1e12, round_trip: 2 * TRAVEL };
    let transport =
        move |member| Arc::new(Shaped::new(Arc::new(member), link).unwrap()) as Arc<dyn Transport>;
    let cluster = Cluster::start_with(&split, engine, transport).await;
    let input = image(&net, 0);
    let expected = reference::logits(&net, Some(&policy), input.data());
    assert_close(&cluster.logits(input).await, &expected, "a slow cluster");
    let steps = policy.steps.len();
    // The first step still carries the start of the second node, the last ones have dead ends.
    let waited = |step: usize| -> f64 {
        let reports = cluster.nodes.iter().map(|node| node.report());
        let of_step = |report: NodeReport| {
            let mut receives = report.receives.into_iter();
            receives.find(|receive| receive.step == Some(step)).unwrap().waited_ms
        };
        reports.map(of_step).sum::<f64>() / 2.0
    };
    (1..steps - 2).map(waited).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn staleness_hides_the_travel_behind_a_block() {
    let (travel, block) = (1e3 * TRAVEL.as_secs_f64(), 1e3 * SEGMENT.as_secs_f64());
    // Both computed at once, each under the other's noise. α = 1: nothing is computed meanwhile.
    let (whole, rest) = tokio::join!(waits(1), waits(2));
    assert!(whole.len() == 9 && rest.len() == 3, "{whole:?} {rest:?}");
    for waited in &whole {
        assert!((travel - 40.0..travel + 40.0).contains(waited), "α = 1: {whole:?}");
    }
    // α = 2: one block, here one segment, is computed while the tensor travels.
    for waited in &rest {
        let expected = travel - block;
        assert!((expected - 40.0..expected + 40.0).contains(waited), "α = 2: {rest:?}");
    }
}
