//! Where frames leave: a queue for each peer, and a thread that empties it.
//!
//! Takes tensors from the compute thread, which neither encodes them nor waits for the network, nor one
//! peer for another; and frames that are whole already. What is for a peer that is gone is kept for a
//! moment, should another stand in for it; what belongs to a request that has run out of time is dropped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use snn_schemas::codec::Pixels;
use snn_schemas::metadata::ShardInfo;
use snn_schemas::wire::{Cancel, TensorFrame};
use tokio::sync::mpsc;

use super::core::{Core, lock};
use super::report::milliseconds;
use crate::engine::Outgoing;
use crate::shard::Crossing;
use crate::transport::Transport;
use crate::watch::Kind;

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

/// What is on its way to a transport.
pub(super) enum Leaving {
    /// A whole frame, until nobody needs it any more.
    Frame(Bytes, Option<Instant>),
    /// A tensor that is not a frame yet.
    Features(Features),
}

impl Leaving {
    fn until(&self) -> Option<Instant> {
        match self {
            Leaving::Frame(_, until) => *until,
            Leaving::Features(features) => Some(features.deadline),
        }
    }
}

/// A tensor of a request, for one peer.
pub(super) struct Features {
    pub(super) tensor: Arc<dyn Outgoing>,
    pub(super) departure: Arc<Departure>,
    pub(super) request: u64,
    pub(super) deadline: Instant,
    /// Whether it was computed without all that was sent.
    pub(super) degraded: bool,
}

/// What a send of the program asks for.
pub(super) struct Departure {
    pub(super) crossing: Crossing,
    /// What pixels are worth, where it is a picture that leaves.
    pub(super) pixels: Option<Arc<Pixels>>,
    /// Its place among the report's sends.
    pub(super) place: usize,
}

impl Features {
    /// The frame, in `room`. Its span ends before it leaves, so that it arrives later.
    fn encode(&self, core: &Core, room: &mut BytesMut) -> Result<Bytes, String> {
        room.clear();
        let Departure { crossing, pixels, place } = &*self.departure;
        let start = Instant::now();
        let within = self.deadline.saturating_duration_since(start);
        let about = (crossing.transfer, within);
        let (rank, dtype) = (core.identity.rank as u16, crossing.codec.dtype);
        TensorFrame::begin(room, dtype, rank, self.request, about, crossing.bytes);
        match pixels {
            None => self.tensor.put(crossing.codec, room)?,
            Some(pixels) => pixels.put(self.tensor.numbers()?, &crossing.shape, room),
        }
        if self.degraded {
            TensorFrame::mark_degraded(room);
        }
        core.recorder.span(Kind::Encode, crossing.transfer, self.request, start);
        let bytes = room.len() as u64;
        let mut report = lock(&core.report);
        report.codec_ms += milliseconds(start.elapsed());
        report.bytes_sent += bytes;
        report.frames_sent += 1;
        if let Some(send) = report.sends.get_mut(*place) {
            send.bytes += bytes;
            send.frames += 1;
        }
        Ok(room.split().freeze())
    }
}

impl Outbox {
    pub(super) fn new(identity: &ShardInfo) -> (Outbox, Vec<mpsc::UnboundedReceiver<Leaving>>) {
        let (queues, leaving) = (0..identity.nodes).map(|_| mpsc::unbounded_channel()).unzip();
        (Outbox { rank: identity.rank, queues }, leaving)
    }

    /// Sends a frame to a peer, unless that takes until `until`.
    pub(super) fn send(&self, peer: usize, frame: Bytes, until: Option<Instant>) {
        self.leave(peer, Leaving::Frame(frame, until));
    }

    /// Encodes a tensor and sends it to its peer, unless that takes until the request's deadline.
    pub(super) fn send_features(&self, features: Features) {
        self.leave(features.departure.crossing.peer, Leaving::Features(features));
    }

    fn leave(&self, peer: usize, leaving: Leaving) {
        if let Some(queue) = self.queues.get(peer) {
            // A queue without a thread is one of a node that is ending.
            let _ = queue.send(leaving);
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

/// Sends what leaves for one peer until the node ends.
pub(super) async fn send_all(
    core: Arc<Core>,
    peer: usize,
    mut leaving: mpsc::UnboundedReceiver<Leaving>,
    transport: Arc<dyn Transport>,
) {
    let mut missing = core.missing.subscribe();
    // While nobody comes, one frame has waited, and those behind it need not as well.
    let mut given_up = false;
    // Of a frame that has left: the next one is encoded where it was.
    let mut room = BytesMut::new();
    while let Some(next) = leaving.recv().await {
        // Others may have heard earlier than we that somebody stands in for the peer.
        let there = missing.wait_for(|missing| !missing.contains(&peer));
        let patience = if given_up { Duration::ZERO } else { WAIT_FOR_PEER };
        given_up = tokio::time::timeout(patience, there).await.is_err();
        let is_late = next.until().is_some_and(|until| Instant::now() >= until);
        if given_up || is_late {
            tracing::debug!(peer, is_late, "frame dropped");
            continue;
        }
        let frame = match next {
            Leaving::Frame(frame, _) => frame,
            Leaving::Features(features) => match features.encode(&core, &mut room) {
                Ok(frame) => frame,
                Err(reason) => {
                    let transfer = features.departure.crossing.transfer;
                    core.fail(features.request, format!("t{transfer}: {reason}"));
                    continue;
                }
            },
        };
        // Who waits for it hears of a lost peer, or at its deadline.
        if let Err(error) = transport.send(peer, frame).await {
            tracing::warn!(%error, "frame not sent");
        }
    }
}
