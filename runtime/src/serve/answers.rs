//! What a rank is asked, and what it answers, as long as it is computed here.
//!
//! Every rank reports what it has counted, and what its clock shows, and records for whoever asks. The entry rank says what
//! the model takes and gives, and answers inferences; one that a loss interrupts is run again from its
//! inputs, and one that ran out of time while nodes came and went once more ([`Reruns`]).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_schemas::wire;

use super::ServeError;
use crate::client::{self, Asked, ClusterInfo, Way, infer_key, info_key, own_key, report_key};
use crate::node::{InferError, Node};
use crate::questions::{Questions, answer_questions, queryable, reply};
use crate::shard::Shard;
use crate::transport::zenoh::Link;
use crate::watch::{clock, recording};

/// How often a request is begun again after a node was lost: each time another must have died.
const MAX_ATTEMPTS: usize = 8;
/// How long after a node came or went its peers may still disagree about their links, and lose frames
/// by it: a handshake's time, twice.
const SETTLE: Duration = Duration::from_secs(3);

/// When a request that failed is run again from its inputs.
#[derive(Clone)]
pub(super) struct Reruns {
    /// Whether anything can have changed for the better once a node is lost.
    can_go_on: bool,
    /// When a node came or went, if one ever did.
    changed: Arc<Mutex<Option<Instant>>>,
}

impl Reruns {
    /// Runs again where that `can_go_on`: where others stand in for those lost, or go on without them.
    pub(super) fn new(can_go_on: bool) -> Reruns {
        Reruns { can_go_on, changed: Arc::default() }
    }

    /// Notes that a node came or went.
    pub(super) fn note_change(&self) {
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a node has come or gone since shortly before `start`.
    fn unsettled_since(&self, start: Instant) -> bool {
        let changed = *self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        changed.is_some_and(|changed| changed + SETTLE > start)
    }
}

/// Answers whoever asks a rank, as long as it is computed here.
pub(super) async fn answer(link: Link, shard: Shard, node: Arc<Node>, reruns: Reruns) {
    if let Err(error) = try_answer(&link, &shard, &node, reruns).await {
        tracing::warn!(%error, "nobody can ask this rank");
    }
}

async fn try_answer(
    link: &Link,
    shard: &Shard,
    node: &Arc<Node>,
    reruns: Reruns,
) -> Result<(), ServeError> {
    let info = shard.identity();
    let own = |key: String| own_key(&key, &link.id());
    let reports = queryable(link, &own(report_key(&info.split, info.rank))).await?;
    let rank = info.rank.to_string();
    let times = queryable(link, &own(clock::clock_key(&info.split, &rank))).await?;
    let lanes = queryable(link, &own(recording::trace_key(&info.split, &rank))).await?;
    let watched = async {
        tokio::join!(
            answer_reports(reports, node),
            clock::answer(times, node.recorder()),
            recording::answer(lanes, node.recorder(), recording::UNHEARD),
        );
    };
    if info.rank != info.entry {
        watched.await;
        return Ok(());
    }
    let described = ClusterInfo {
        split: info.split.clone(),
        nodes: info.nodes,
        inputs: node.inputs().to_vec(),
        outputs: node.outputs().to_vec(),
        metadata: shard.metadata().to_vec(),
    };
    let limit = described.question_bytes();
    let described = Bytes::from(serde_json::to_vec(&described)?);
    let about = queryable(link, &own(info_key(&info.split))).await?;
    let asked = queryable(link, &own(infer_key(&info.split))).await?;
    let asks = Arc::clone(node);
    let limit = move || std::future::ready(limit);
    let answered = answer_questions(asked, limit, move |inputs, within| {
        let (node, reruns) = (Arc::clone(&asks), reruns.clone());
        async move { infer(&node, inputs, within, &reruns).await }
    });
    tokio::join!(watched, answer_info(about, described), answered);
    Ok(())
}

/// Asks the cluster for those who are connected to this process alone: what they say may be larger than
/// what a process can pass on.
pub(super) async fn ask_for_others(link: Link, split: String, questions: Questions) {
    let cluster = Asked::new(link.session().clone(), split);
    let asked = cluster.clone();
    let limit = move || {
        let asked = asked.clone();
        async move { asked.question_bytes().await }
    };
    let ask = move |inputs, within| {
        let cluster = cluster.clone();
        async move { client::infer(&cluster, Way::Straight, inputs, within).await }
    };
    answer_questions(questions, limit, ask).await;
}

async fn answer_info(questions: Questions, described: Bytes) {
    while let Ok(query) = questions.recv_async().await {
        reply(&query, questions.key_expr().to_string(), described.clone()).await;
    }
}

async fn answer_reports(questions: Questions, node: &Node) {
    while let Ok(query) = questions.recv_async().await {
        match serde_json::to_vec(&node.report()) {
            Ok(report) => reply(&query, questions.key_expr().to_string(), report.into()).await,
            Err(error) => tracing::warn!(%error, "report not written"),
        }
    }
}

/// Runs a request; from its inputs again where a node was lost meanwhile, and another stands in or
/// the others may go on without it. A request that ran out of time while nodes came and went is given
/// its time once more: frames are lost, too, where two nodes disagree on whether their link stands.
async fn infer(
    node: &Node,
    inputs: Vec<wire::Tensor>,
    within: Duration,
    reruns: &Reruns,
) -> Result<wire::Answer, InferError> {
    let start = Instant::now();
    let mut attempts = 1;
    let mut was_late = false;
    loop {
        let error = match node.infer(inputs.clone(), within).await {
            Err(error) if reruns.can_go_on && attempts < MAX_ATTEMPTS => error,
            answer => return answer,
        };
        let late = matches!(error, InferError::Late { .. } | InferError::Missing { .. });
        match error {
            InferError::PeerLost { .. } => {}
            _ if late && !was_late && reruns.unsettled_since(start) => was_late = true,
            _ => return Err(error),
        }
        tracing::debug!(%error, "request is run again");
        attempts += 1;
    }
}
