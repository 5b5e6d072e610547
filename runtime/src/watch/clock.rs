//! Compares the clocks of nodes.
//!
//! Every node answers on the network what its clock shows. [`compare`] asks a node [`ROUNDS`] times and
//! takes the quickest answer: the node's clock then showed what it said at the middle of the round
//! trip, give or take half of it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use zenoh::Session;

use super::recorder::Recorder;
use crate::client::{AskError, ask};
use crate::questions::{Questions, reply};
use crate::transport::zenoh::split_prefix;

/// Questions a node: the quickest of them meets no other traffic.
const ROUNDS: usize = 16;
/// How long a clock may take to answer: a network in which that takes longer shows nothing anyway.
const CLOCK_WITHIN: Duration = Duration::from_secs(2);

/// Key under which a node tells its time.
pub(crate) fn clock_key(split: &str, rank: &str) -> String {
    format!("snn/{}/clock/{rank}", split_prefix(split))
}

/// Tells the time of a node, by which it records, to whoever asks.
pub(crate) async fn answer(questions: Questions, recorder: &Recorder) {
    while let Ok(query) = questions.recv_async().await {
        let now = Bytes::copy_from_slice(&recorder.now().to_le_bytes());
        reply(&query, questions.key_expr().to_string(), now).await;
    }
}

/// What is to be added to the time of the node asked under `key` for the time since `epoch`, and how far
/// that may be off, in ns; `None` where no node answers.
pub(super) async fn compare(
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
