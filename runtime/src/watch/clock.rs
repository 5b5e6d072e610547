//! Compares the clocks of nodes, and gathers what they have recorded.
//!
//! Every node answers two questions on the network: what its clock shows, and what it has recorded.
//! [`gather`] asks each node for its clock [`ROUNDS`] times and takes the quickest answer: the node's
//! clock then showed what it said at the middle of the round trip, give or take half of it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use zenoh::Session;

use super::recorder::Lane;
use super::trace::Aligned;
use crate::client::{AskError, all_keys, ask};
use crate::node::Node;
use crate::transport::zenoh::split_prefix;

/// Questions a node: the quickest of them meets no other traffic.
const ROUNDS: usize = 16;
/// How long a clock may take to answer: a network in which that takes longer shows nothing anyway.
const CLOCK_WITHIN: Duration = Duration::from_secs(2);

/// Key under which a node tells its time.
pub(crate) fn clock_key(split: &str, rank: usize) -> String {
    format!("snn/{}/clock/{rank}", split_prefix(split))
}

/// Key under which a node gives what it has recorded.
pub(crate) fn trace_key(split: &str, rank: usize) -> String {
    format!("snn/{}/trace/{rank}", split_prefix(split))
}

/// A node's time, as it answers.
pub(crate) fn time_of(node: &Node) -> Option<Bytes> {
    let now = node.recorder().now();
    Some(Bytes::copy_from_slice(&now.to_le_bytes()))
}

/// What a node has recorded, as it answers.
pub(crate) fn lane_of(node: &Node) -> Option<Bytes> {
    serde_json::to_vec(&node.recorder().lane(node.rank())).ok().map(Bytes::from)
}

/// What the nodes of a cluster have recorded, on the time axis of the asker; nodes that do not
/// answer are left out.
pub(crate) async fn gather(
    session: &Session,
    (split, nodes): (&str, usize),
    within: Duration,
) -> Result<Vec<Aligned>, AskError> {
    let epoch = Instant::now();
    let mut lanes = Vec::with_capacity(nodes);
    for rank in 0..nodes {
        let Some((offset, uncertainty)) =
            compare(session, &all_keys(&clock_key(split, rank)), epoch).await?
        else {
            continue;
        };
        let key = all_keys(&trace_key(split, rank));
        let answers = ask(session, &key, Bytes::new(), within).await?;
        if let Some(answer) = answers.first() {
            let lane: Lane = serde_json::from_slice(answer).map_err(AskError::Json)?;
            lanes.push(Aligned { lane, offset, uncertainty });
        }
    }
    Ok(lanes)
}

/// What is to be added to a node's time, and how far that may be off, in ns.
async fn compare(
    session: &Session,
    key: &str,
    epoch: Instant,
) -> Result<Option<(i64, u64)>, AskError> {
    let mut best: Option<(i64, u64)> = None;
    for _ in 0..ROUNDS {
        let asked = epoch.elapsed();
        let answers = ask(session, key, Bytes::new(), CLOCK_WITHIN).await?;
        let answered = epoch.elapsed();
        let Some(time) = answers.first().and_then(|bytes| bytes[..].try_into().ok()) else {
            break;
        };
        let middle = (asked + answered).as_nanos() as i64 / 2;
        let half = (answered - asked).as_nanos() as u64 / 2;
        let offset = middle.saturating_sub_unsigned(u64::from_le_bytes(time));
        if best.is_none_or(|(_, uncertainty)| half < uncertainty) {
            best = Some((offset, half));
        }
    }
    Ok(best)
}
