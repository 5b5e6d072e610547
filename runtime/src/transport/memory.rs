//! A transport within one process, for tests and for trying things out.
//!
//! A [`Network`] connects any number of ranks; [`Network::join`] gives a rank's transport. Frames
//! reach the other rank's sink before `send` is done, without being copied.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::{BoxFuture, Event, Sink, Transport, TransportError};
use crate::membership::Role;

/// The ranks of one process.
#[derive(Clone, Default)]
pub struct Network {
    members: Arc<Mutex<BTreeMap<usize, Member>>>,
}

#[derive(Clone)]
struct Member {
    split: String,
    sink: Sink,
}

impl Network {
    /// A network nobody has joined.
    pub fn new() -> Network {
        Network::default()
    }

    /// Joins as `rank` of the split `split`: the members so far hear of it, and it of them.
    pub fn join(&self, rank: usize, split: &str, sink: Sink) -> MemoryTransport {
        let member = Member { split: split.to_owned(), sink };
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        for (&other, known) in members.iter() {
            (known.sink)(Event::PeerUp { rank, split: member.split.clone() });
            (member.sink)(Event::PeerUp { rank: other, split: known.split.clone() });
        }
        members.insert(rank, member);
        MemoryTransport { network: self.clone(), rank }
    }

    fn leave(&self, rank: usize) {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.remove(&rank);
        for member in members.values() {
            (member.sink)(Event::PeerDown { rank, role: Role::Home });
        }
    }
}

/// One rank's side of a [`Network`]; dropping it leaves the network.
pub struct MemoryTransport {
    network: Network,
    rank: usize,
}

impl Transport for MemoryTransport {
    fn send(&self, to: usize, frame: Bytes) -> BoxFuture<'_, Result<(), TransportError>> {
        let sink = {
            let members = self.network.members.lock().unwrap_or_else(PoisonError::into_inner);
            members.get(&to).map(|member| Arc::clone(&member.sink))
        };
        Box::pin(async move {
            let sink = sink.ok_or(TransportError::Unreachable { rank: to })?;
            sink(Event::Frame { bytes: frame });
            Ok(())
        })
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        self.network.leave(self.rank);
    }
}
