//! Where frames leave: a queue for each peer, and a task that empties it.
//!
//! Takes whole frames from the compute thread, which never waits for the network, nor one peer for
//! another. A frame for a peer that is gone is kept for a moment, should another stand in for it; one
//! whose request has run out of time is dropped.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_schemas::metadata::ShardInfo;
use snn_schemas::wire::Cancel;
use tokio::sync::{mpsc, watch};

use crate::transport::Transport;

/// How long a frame for a peer that is gone is kept, should another stand in for it.
const WAIT_FOR_PEER: Duration = Duration::from_secs(2);

/// Where frames leave: a queue for each peer.
///
/// The queues have no limit of their own: what is in them was computed for one of at most
/// [`MAX_REQUESTS`](crate::mailbox::MAX_REQUESTS) open requests, or for one that was answered without
/// all its tensors and whose time is not over yet.
#[derive(Clone)]
pub(super) struct Outbox {
    rank: usize,
    queues: Vec<mpsc::UnboundedSender<Leaving>>,
}

/// A frame on its way to a transport.
pub(super) struct Leaving {
    frame: Bytes,
    /// When nobody needs it any more.
    until: Option<Instant>,
}

impl Outbox {
    pub(super) fn new(identity: &ShardInfo) -> (Outbox, Vec<mpsc::UnboundedReceiver<Leaving>>) {
        let (queues, leaving) = (0..identity.nodes).map(|_| mpsc::unbounded_channel()).unzip();
        (Outbox { rank: identity.rank, queues }, leaving)
    }

    /// Sends a frame to a peer, unless that takes until `until`.
    pub(super) fn send(&self, peer: usize, frame: Bytes, until: Option<Instant>) {
        if let Some(queue) = self.queues.get(peer) {
            // A queue without a task is one of a node that is ending.
            let _ = queue.send(Leaving { frame, until });
        }
    }

    /// Tells every peer that a request has ended.
    pub(super) fn cancel(&self, request: u64, reason: &str) {
        let (from, reason) = (self.rank as u16, reason.to_owned());
        let frame = Cancel { from, request, again: false, reason }.encode();
        for peer in (0..self.queues.len()).filter(|&peer| peer != self.rank) {
            self.send(peer, frame.clone(), None);
        }
    }
}

/// Sends one peer's frames until the node ends.
pub(super) async fn send_all(
    peer: usize,
    mut frames: mpsc::UnboundedReceiver<Leaving>,
    mut missing: watch::Receiver<BTreeSet<usize>>,
    transport: Arc<dyn Transport>,
) {
    // While nobody comes, one frame has waited, and those behind it need not as well.
    let mut given_up = false;
    while let Some(Leaving { frame, until }) = frames.recv().await {
        // Others may have heard earlier than we that somebody stands in for the peer.
        let there = missing.wait_for(|missing| !missing.contains(&peer));
        let patience = if given_up { Duration::ZERO } else { WAIT_FOR_PEER };
        given_up = tokio::time::timeout(patience, there).await.is_err();
        let is_late = until.is_some_and(|until| Instant::now() >= until);
        if given_up || is_late {
            tracing::debug!(peer, is_late, "frame dropped");
            continue;
        }
        // Who waits for it hears of a lost peer, or at its deadline.
        if let Err(error) = transport.send(peer, frame).await {
            tracing::warn!(%error, "frame not sent");
        }
    }
}
