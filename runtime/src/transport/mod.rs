//! What carries frames between nodes: a trait, and three implementations.
//!
//! A transport sends whole frames to ranks, and gives what arrives to its node's [`Sink`].
//! Implementations: [`zenoh`] between devices, [`memory`] within a process, and [`shaped`], which
//! makes another one as slow as a given link.

pub mod memory;
pub mod shaped;
pub mod zenoh;

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use crate::membership::Role;

/// A future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Takes what a transport has for its node. Returns soon and never blocks: transports call it from
/// the threads that read the network.
pub type Sink = Arc<dyn Fn(Event) + Send + Sync>;

/// What a transport has for its node.
#[derive(Clone, Debug)]
pub enum Event {
    /// Frames to this rank arrive from now on.
    PeerUp {
        /// The peer's rank.
        rank: usize,
        /// Identity of its split.
        split: String,
    },
    /// Nobody computes the rank any more.
    PeerDown {
        /// The peer's rank.
        rank: usize,
        /// In what role the last one did.
        role: Role,
    },
    /// One of several who computed the rank has left it; another goes on.
    PeerChanged {
        /// The peer's rank.
        rank: usize,
    },
    /// A whole frame.
    Frame {
        /// Its bytes, as they arrived.
        bytes: Bytes,
    },
}

/// Carries frames to other nodes.
pub trait Transport: Send + Sync {
    /// Sends a frame to a rank. Frames to one rank arrive in the order in which they were sent, or
    /// not at all. Done when the transport has taken the frame, not when it has arrived.
    fn send(&self, to: usize, frame: Bytes) -> BoxFuture<'_, Result<(), TransportError>>;
}

/// Why a frame was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// No such rank, or nobody there.
    #[error("rank {rank} cannot be reached")]
    Unreachable {
        /// The rank.
        rank: usize,
    },
    /// The transport's own reason.
    #[error("rank {rank}: {reason}")]
    Send {
        /// The rank.
        rank: usize,
        /// In one sentence.
        reason: String,
    },
}
