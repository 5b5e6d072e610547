//! What a process knows of its cluster, whatever becomes of its session.
//!
//! Takes the file of the process's own shard; gives the shard, the shelf with those of all ranks as far
//! as they have been found, and whether the cluster has ever been complete. A process that joins again as
//! a new one hands it on: what all of its peers have forgotten by then, because they do the same, nobody
//! else could tell it.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use crate::shard::{Shard, ShardError};
use crate::shelf::Shelf;

/// What a process knows of its cluster.
#[derive(Debug)]
pub struct Knowledge {
    shard: Shard,
    shelf: Shelf,
    complete: AtomicBool,
}

impl Knowledge {
    /// What a process knows that has been given its shard, as the bytes of the file.
    ///
    /// # Errors
    /// A file that is no shard.
    pub fn new(bytes: Bytes) -> Result<Knowledge, ShardError> {
        let shard = Shard::from_bytes(bytes.clone())?;
        let shelf = Shelf::new(&shard, bytes);
        Ok(Knowledge { shard, shelf, complete: AtomicBool::new(false) })
    }

    /// The process's own shard.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// The shards of all ranks.
    pub fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    /// Whether the cluster has ever been complete.
    pub fn has_been_complete(&self) -> bool {
        self.complete.load(Ordering::Relaxed)
    }

    /// Notes that it has.
    pub fn note_complete(&self) {
        self.complete.store(true, Ordering::Relaxed);
    }
}
