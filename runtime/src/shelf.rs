//! The shards of a cluster, kept by every node, so that any can stand in for any other.
//!
//! Takes shards from wherever they are found: the node's own folder, or peers. Gives them by rank. A
//! shard is kept only if it is of the same split and of the rank it is offered for, whoever offers it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::shard::Shard;

/// Shards of one split, as the bytes of their files.
#[derive(Debug)]
pub struct Shelf {
    split: String,
    nodes: usize,
    shards: Mutex<BTreeMap<usize, Bytes>>,
}

impl Shelf {
    /// A shelf with one shard, for all of its split.
    pub fn new(shard: &Shard, bytes: Bytes) -> Shelf {
        let info = shard.identity();
        let shards = Mutex::new(BTreeMap::from([(info.rank, bytes)]));
        Shelf { split: info.split.clone(), nodes: info.nodes, shards }
    }

    fn shards(&self) -> MutexGuard<'_, BTreeMap<usize, Bytes>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a shard, if it is the one of `rank`; whether it is.
    pub fn offer(&self, rank: usize, bytes: Bytes) -> bool {
        let fits = self.rank_of(&bytes).is_ok_and(|found| found == rank);
        if fits {
            self.shards().entry(rank).or_insert(bytes);
        }
        fits
    }

    /// Keeps a shard of whichever rank.
    ///
    /// # Errors
    /// Why it is none of this split's.
    pub fn take(&self, bytes: Bytes) -> Result<(), String> {
        let rank = self.rank_of(&bytes)?;
        self.shards().entry(rank).or_insert(bytes);
        Ok(())
    }

    fn rank_of(&self, bytes: &Bytes) -> Result<usize, String> {
        let shard = Shard::from_bytes(bytes.clone()).map_err(|error| error.to_string())?;
        let info = shard.identity();
        match info.split == self.split {
            true => Ok(info.rank),
            false => Err("a shard of another split".to_owned()),
        }
    }

    /// The file of a rank's shard.
    pub fn get(&self, rank: usize) -> Option<Bytes> {
        self.shards().get(&rank).cloned()
    }

    /// Ranks whose shards are not here.
    pub fn missing(&self) -> Vec<usize> {
        let shards = self.shards();
        (0..self.nodes).filter(|rank| !shards.contains_key(rank)).collect()
    }
}
