//! Why a node does not start, why a request has no answer, and why a frame is dropped.
//!
//! Each prints as one sentence.

use std::time::Duration;

use snn_schemas::wire::WireError;

use crate::engine::EngineError;
use crate::mailbox::Refused;

/// Why a frame from a peer is dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{reason}")]
    Refused {
        /// The rank that sent it, as it says.
        from: usize,
        reason: Refused,
    },
}

impl FrameError {
    /// The rank that sent the frame, where the frame says so.
    pub(super) fn sender(&self) -> Option<usize> {
        match self {
            FrameError::Wire(_) => None,
            FrameError::Refused { from, .. } => Some(*from),
        }
    }
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The engine cannot load the shard.
    #[error(transparent)]
    Engine(EngineError),
    /// The system gives no thread.
    #[error("no thread to compute on: {0}")]
    Thread(#[source] std::io::Error),
    /// The compute thread ended while loading.
    #[error("the engine ended while loading")]
    Ended,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// Another node takes requests.
    #[error("rank {entry} answers requests, this node does not")]
    NotEntry {
        /// The rank that does.
        entry: usize,
    },
    /// Too few or too many inputs.
    #[error("{found} inputs, expected {expected}")]
    InputCount {
        /// Inputs given.
        found: usize,
        /// Inputs of the model.
        expected: usize,
    },
    /// An input of another shape.
    #[error("input \"{name}\" has shape {found:?}, expected {expected:?}")]
    InputShape {
        /// The input.
        name: String,
        /// Shape given.
        found: Vec<usize>,
        /// Shape of the model's.
        expected: Vec<usize>,
    },
    /// Nodes that were not there in time.
    #[error("{} missing for {} s", in_words(ranks), within.as_secs_f64())]
    Missing {
        /// Their ranks.
        ranks: Vec<usize>,
        /// How long they were waited for.
        within: Duration,
    },
    /// A node died meanwhile; the request may be run again.
    #[error("{reason}")]
    PeerLost {
        /// Which one, in the words of whoever noticed.
        reason: String,
    },
    /// A node could not do its part.
    #[error("rank {rank}: {reason}")]
    Peer {
        /// Its rank.
        rank: usize,
        /// In its own words.
        reason: String,
    },
    /// No answer by the deadline.
    #[error("no answer in time{}{waiting}", if waiting.is_empty() { "" } else { ": " })]
    Late {
        /// What was waited for, where that is known.
        waiting: String,
    },
    /// Too many requests at once, or the node is ending.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The node is ending.
    #[error("the node is stopping")]
    Stopped,
}

/// Ranks in words: `rank 2`, `ranks 2, 3`.
pub(crate) fn in_words(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
    format!("{noun} {}", list.join(", "))
}
