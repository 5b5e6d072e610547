//! What a process knows of its cluster, whatever becomes of its session, and where it is kept what becomes of
//! the process.
//!
//! Takes the file of the process's own shard; gives the shard, the shelf with those of all ranks as far
//! as they have been found, and whether the cluster has ever been complete. A process that joins again as
//! a new one hands it on: what all of its peers have forgotten by then, because they do the same, nobody
//! else could tell it. With a folder ([`Knowledge::keep_in`]) the next process knows it too: the shards at
//! once, that the cluster has been complete once the others have been waited for. Where a manifest says which
//! files the shards are ([`Knowledge::expect`]), no others count.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::digest::{Digest, OtherFile};
use crate::kept::{self, Kept};
use crate::shard::{Shard, ShardError};
use crate::shelf::Shelf;

/// What a process knows of its cluster.
#[derive(Debug)]
pub struct Knowledge {
    shard: Shard,
    shelf: Shelf,
    complete: AtomicBool,
    since: Instant,
    kept: Option<Kept>,
}

impl Knowledge {
    /// What a process knows that has been given its shard, as the bytes of the file.
    ///
    /// # Errors
    /// A file that is no shard.
    pub fn new(bytes: Bytes) -> Result<Knowledge, ShardError> {
        let shard = Shard::from_bytes(bytes.clone())?;
        let shelf = Shelf::new(&shard, bytes);
        let (complete, since) = (AtomicBool::new(false), Instant::now());
        Ok(Knowledge { shard, shelf, complete, since, kept: None })
    }

    /// Counts from now on only these files as the shards of their ranks: what is found later, on disk or with
    /// peers, must be one of them.
    ///
    /// # Errors
    /// The process's own shard is another file.
    pub fn expect(&mut self, shards: BTreeMap<usize, Digest>) -> Result<(), OtherFile> {
        self.shelf.expect(shards)
    }

    /// Keeps from now on in a folder what peers hand over and whether the cluster has been complete, and
    /// takes what was kept there before. Absent nodes are then waited for for `grace` from now on.
    pub fn keep_in(&mut self, dir: &Path, grace: Duration) {
        let info = self.shard.identity();
        // A node by itself has nobody to stand in for.
        if info.nodes > 1 {
            let (kept, shards) = Kept::open(dir, info, grace);
            for (file, bytes) in shards {
                if let Err(reason) = self.shelf.take(bytes) {
                    kept::ignored(&file, &reason.to_string());
                }
            }
            self.since = Instant::now();
            self.kept = Some(kept);
        }
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
        if let Some(kept) = &self.kept {
            kept.complete();
        }
    }

    /// What is kept on disk, where anything is.
    pub(crate) fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    /// Whether a note on disk said at the start that the cluster has been complete.
    pub fn was_complete(&self) -> bool {
        self.kept.as_ref().is_some_and(Kept::was_complete)
    }

    /// Until when absent nodes are waited for after a start; never where nothing is kept.
    pub fn waits_until(&self) -> Option<Instant> {
        self.kept.as_ref().map(|kept| self.since + kept.grace())
    }
}
