//! What a node has counted: requests, time, bytes, and how long each transfer was waited for.
//!
//! Counts only grow, from the node's start on. A report travels as JSON to those who watch.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::shard::{Crossing, Shard};
use crate::watch::Histogram;

/// What a node has counted since it started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The node's rank.
    pub rank: usize,
    /// The rank its process was started for, where it stands in for another process.
    #[serde(default)]
    pub guest_of: Option<usize>,
    /// Requests it has done its part of.
    pub requests: u64,
    /// Requests that ended before it was done.
    pub failures: u64,
    /// Time in the engine, in ms.
    pub compute_ms: f64,
    /// Time in which every request at hand waited for a tensor, in ms.
    pub waiting_ms: f64,
    /// Time in turning tensors into frames and back, in ms.
    pub codec_ms: f64,
    /// Bytes of the frames sent, their headers included.
    pub bytes_sent: u64,
    /// Frames sent.
    pub frames_sent: u64,
    /// Tensors it went on without.
    #[serde(default)]
    pub missed: u64,
    /// Answers marked as degraded, on the node that gives them.
    #[serde(default)]
    pub degraded: u64,
    /// Ranks its process has taken over, in the report of the rank the process was started for.
    #[serde(default)]
    pub takeovers: u64,
    /// What each receive was waited for, in the order of the shard.
    pub receives: Vec<ReceiveReport>,
    /// What has been sent by each send, in the order of the shard.
    #[serde(default)]
    pub sends: Vec<SendReport>,
    /// How long answered requests took, on the node that takes them.
    #[serde(default)]
    pub latency: Histogram,
}

/// How long a node has waited for one transfer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReceiveReport {
    /// The transfer.
    pub transfer: u32,
    /// The policy's step, where one asks for it.
    pub step: Option<usize>,
    /// Time between the request coming to the receive and the tensor being there, in ms.
    pub waited_ms: f64,
    /// Rank of the sender.
    #[serde(default)]
    pub from: usize,
}

/// What a node has sent by one transfer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SendReport {
    /// The transfer.
    pub transfer: u32,
    /// The policy's step, where one asks for it.
    pub step: Option<usize>,
    /// Rank of the receiver.
    pub to: usize,
    /// Bytes of its frames, their headers included.
    pub bytes: u64,
    /// Its frames.
    pub frames: u64,
}

impl NodeReport {
    /// A report of nothing yet, with a place for each receive and send of the shard.
    pub(super) fn new(shard: &Shard) -> NodeReport {
        let receive = |crossing: &Crossing| ReceiveReport {
            transfer: crossing.transfer,
            step: crossing.step,
            waited_ms: 0.0,
            from: crossing.peer,
        };
        let send = |crossing: &Crossing| SendReport {
            transfer: crossing.transfer,
            step: crossing.step,
            to: crossing.peer,
            ..SendReport::default()
        };
        NodeReport {
            rank: shard.identity().rank,
            receives: shard.program().receives().map(receive).collect(),
            sends: shard.program().sends().map(send).collect(),
            ..NodeReport::default()
        }
    }
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
