//! What the threads of a node share: its mailbox, its peers, and those who wait for answers.
//!
//! Takes what a transport has for the node (frames, peers that come and go); gives answers to those
//! who asked, and news to the compute thread through the mailbox. A frame that makes no sense is dropped,
//! with its reason logged, of each sender once a second at most; a lost peer ends every request at hand.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_schemas::metadata::ShardInfo;
use snn_schemas::wire::{Answer, Cancel, Frame};
use tokio::sync::{oneshot, watch};

use super::error::{FrameError, InferError};
use super::outbox::Outbox;
use super::report::NodeReport;
use crate::mailbox::Mailbox;
use crate::membership::Role;
use crate::shard::Shard;
use crate::transport::Event;
use crate::watch::{Kind, Log, Recorder, Seldom};

/// Everything of a node that other threads touch.
pub(super) struct Core {
    pub(super) identity: ShardInfo,
    pub(super) mailbox: Mailbox,
    pub(super) outbox: Outbox,
    /// Ranks that are not there.
    pub(super) missing: watch::Sender<BTreeSet<usize>>,
    pub(super) fault: Mutex<Option<String>>,
    /// Why the compute thread is there no more, if it panicked.
    pub(super) crash: OnceLock<String>,
    /// What is said of dropped frames, by the rank that sent them, where that is one.
    dropped: Mutex<BTreeMap<Option<usize>, Seldom>>,
    pub(super) asked: Mutex<HashMap<u64, oneshot::Sender<Result<Answer, InferError>>>>,
    pub(super) report: Mutex<NodeReport>,
    pub(super) next_request: AtomicU64,
    /// How long a tensor is waited for at most, where that is less than the request may take.
    pub(super) degrade: OnceLock<Duration>,
    pub(super) recorder: Recorder,
    pub(super) log: Log,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done where a thread could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub(super) fn new(shard: &Shard, outbox: Outbox) -> Core {
        let identity = shard.identity().clone();
        let others = (0..identity.nodes).filter(|&rank| rank != identity.rank);
        let (missing, _) = watch::channel(others.collect());
        // Numbers begin anywhere, so that those of a restarted node are new to its peers.
        let start = RandomState::new().hash_one(identity.rank) >> 1;
        Core {
            mailbox: Mailbox::new(shard.program()),
            outbox,
            identity,
            missing,
            fault: Mutex::new(None),
            crash: OnceLock::new(),
            dropped: Mutex::default(),
            asked: Mutex::new(HashMap::new()),
            report: Mutex::new(NodeReport::new(shard)),
            next_request: AtomicU64::new(start),
            degrade: OnceLock::new(),
            recorder: Recorder::default(),
            log: Log::default(),
        }
    }

    pub(super) fn take(&self, event: Event) {
        match event {
            Event::Frame { bytes } => {
                if let Err(reason) = self.take_frame(bytes) {
                    self.tell_dropped(&reason);
                }
            }
            Event::PeerUp { rank, split } if split != self.identity.split => {
                let fault = format!(
                    "rank {rank} is of split {}, this node of {}",
                    short(&split),
                    short(&self.identity.split)
                );
                tracing::warn!(%fault, "foreign node refused");
                self.log.note(format!("refused: {fault}"));
                lock(&self.fault).get_or_insert(fault);
            }
            Event::PeerUp { rank, .. } => {
                tracing::debug!(rank, "peer is there");
                if self.missing.send_if_modified(|missing| missing.remove(&rank)) {
                    // Its own process, or one that stands in.
                    self.log.note(format!("rank {rank} is computed"));
                }
            }
            Event::PeerDown { rank, role } => self.lose(rank, role),
            Event::PeerChanged { rank } if self.is_other(rank) => {
                tracing::debug!(rank, "peer is another");
                self.give_up_requests(&format!("rank {rank} has changed hands"));
            }
            Event::PeerChanged { .. } => {}
        }
    }

    fn is_other(&self, rank: usize) -> bool {
        rank < self.identity.nodes && rank != self.identity.rank
    }

    fn take_frame(&self, bytes: Bytes) -> Result<(), FrameError> {
        match Frame::decode(bytes)? {
            Frame::Tensor(frame) => {
                let (request, transfer, from) =
                    (frame.request, frame.transfer, usize::from(frame.from));
                let posted = self.mailbox.post(frame);
                posted.map_err(|reason| FrameError::Refused { from, reason })?;
                self.recorder.instant(Kind::Arrived, transfer, request);
            }
            Frame::Cancel(Cancel { from, request, again, reason }) => {
                self.mailbox.cancel(request, &reason);
                // The entry node tells others; where it is told, the asker must hear of it.
                let rank = from.into();
                self.answer(
                    request,
                    Err(match again {
                        true => InferError::PeerLost { reason },
                        false => InferError::Peer { rank, reason },
                    }),
                );
            }
        }
        Ok(())
    }

    /// Says why a frame was dropped, unless one of the same sender was just now.
    fn tell_dropped(&self, reason: &FrameError) {
        // Senders that cannot be are one: a peer may make up any number of them.
        let sender = reason.sender().filter(|&rank| self.is_other(rank));
        let said = lock(&self.dropped).entry(sender).or_default().say(Instant::now());
        if let Some(left_out) = said {
            tracing::warn!(%reason, left_out, "frame dropped");
        }
    }

    fn lose(&self, rank: usize, role: Role) {
        if self.is_other(rank) && self.missing.send_if_modified(|missing| missing.insert(rank)) {
            tracing::debug!(rank, %role, "peer is gone");
            self.log.note(match role {
                Role::Home => format!("rank {rank} is gone"),
                // Its own process has returned, and will be heard of at any moment; or this one died, too.
                Role::Guest => format!("nobody stands in for rank {rank} any more"),
            });
            self.give_up_requests(&format!("rank {rank} is gone"));
        }
    }

    /// Ends all requests at hand, to be run again: what somebody who has left knew of them is lost.
    fn give_up_requests(&self, reason: &str) {
        let from = self.identity.rank as u16;
        for request in self.mailbox.cancel_all(reason) {
            // The entry node may have noticed earlier, and begun this one since.
            let frame = Cancel { from, request, again: true, reason: reason.to_owned() };
            self.outbox.send(self.identity.entry, frame.encode(), None);
        }
        let asked: Vec<u64> = lock(&self.asked).keys().copied().collect();
        for request in asked {
            self.answer(request, Err(InferError::PeerLost { reason: reason.to_owned() }));
        }
    }

    /// Ends a request of which this node cannot do its part, and tells everybody.
    pub(super) fn fail(&self, request: u64, reason: String) {
        tracing::warn!(reason, request, "cannot compute");
        self.mailbox.cancel(request, &reason);
        self.outbox.cancel(request, &reason);
        let rank = self.identity.rank;
        self.answer(request, Err(InferError::Peer { rank, reason }));
    }

    pub(super) fn answer(&self, request: u64, answer: Result<Answer, InferError>) {
        if let Some(asker) = lock(&self.asked).remove(&request) {
            // Whoever asked may have left; then nobody needs the answer.
            let _ = asker.send(answer);
        }
    }
}

/// The beginning of a split's identity, enough to tell two apart.
fn short(split: &str) -> &str {
    split.get(..8).unwrap_or(split)
}
