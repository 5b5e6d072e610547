//! How shards get around: every process asks its peers for those it lacks, hands out those it has, and keeps
//! on disk what it was given, where it has a folder for that.
//!
//! A shard travels in pieces ([`chunk`]), from a holder that is asked under a key of its own; what comes is
//! checked ([`fetch`](super::fetch)) before the shelf is offered it.

use std::sync::Arc;
use std::time::Duration;

use super::Process;
use super::chunk::{self, Piece};
use super::fetch::{Fetched, Fetcher};
use crate::client::{own_key, shard_key};
use crate::kept::Kept;
use crate::questions::{Questions, reply};
use crate::transport::zenoh::one_line;

/// Pause before missing shards are asked for again, where nobody has come or gone meanwhile.
const FETCH_AGAIN: Duration = Duration::from_millis(500);
/// Pause before what could not be written to disk is tried again: a full disk may be emptied.
const KEEP_AGAIN: Duration = Duration::from_secs(60);

impl Process {
    /// Fetches the shards of all ranks from whoever has them, as soon as he is there: should he be gone
    /// before, nobody could stand in for him.
    pub(super) async fn gather_shards(self: Arc<Self>) {
        let mut members = self.members.clone();
        let session = self.link.session().clone();
        let mut fetcher = Fetcher::new(session, self.info.split.clone(), self.info.rank);
        loop {
            // What has come by now is looked for at once.
            members.mark_unchanged();
            let missing = self.shelf().missing();
            if missing.is_empty() {
                return;
            }
            for rank in missing {
                if let Err(error) = self.gather(rank, &mut fetcher).await {
                    tracing::debug!(rank, reason = one_line(&error), "shard not fetched");
                }
            }
            let changed = tokio::time::timeout(FETCH_AGAIN, members.changed()).await;
            if let Ok(Err(_)) = changed {
                return;
            }
        }
    }

    /// Fetches one shard to the shelf, and to the disk where shards are kept there.
    async fn gather(&self, rank: usize, fetcher: &mut Fetcher) -> zenoh::Result<()> {
        let expected = self.shelf().expected(rank);
        // To read and hash it takes a while.
        let accept = |file| tokio::task::block_in_place(|| self.shelf().offer(rank, file));
        match fetcher.fetch(rank, expected, accept).await? {
            Fetched::File(file) => {
                self.sought().remove(&rank);
                if let Some(kept) = self.knowledge.kept() {
                    kept.shard(rank, file);
                }
            }
            Fetched::Nowhere => drop(self.sought().insert(rank)),
            Fetched::Later => {}
        }
        Ok(())
    }

    /// Writes to disk what is to be kept, as long as the server lives.
    pub(super) async fn keep_on_disk(self: Arc<Self>) {
        let Some(kept) = self.knowledge.kept() else { return };
        let mut was_told = false;
        loop {
            let knowledge = Arc::clone(&self.knowledge);
            let write = move || knowledge.kept().map_or(Ok(()), Kept::write);
            // A panic has been reported by its hook.
            let written = tokio::task::spawn_blocking(write).await.unwrap_or(Ok(()));
            let failed = written.is_err();
            match written {
                Err(error) if !was_told => {
                    tracing::warn!(%error, "not kept: tried again every minute")
                }
                Err(error) => tracing::debug!(%error, "not kept"),
                Ok(()) => {}
            }
            was_told = failed;
            tokio::select! {
                () = kept.wait() => {}
                () = tokio::time::sleep(KEEP_AGAIN), if failed => {}
            }
        }
    }

    /// Gives shards to those who ask for them.
    pub(super) async fn hand_out_shards(self: Arc<Self>, questions: Questions) {
        while let Ok(query) = questions.recv_async().await {
            if let Some(rank) = asked_rank(query.key_expr().as_str())
                && let Some(piece) = query.payload().and_then(Piece::read)
                && let Some((digest, file)) = self.shelf().held(rank)
            {
                let key = shard_key(&self.info.split, &rank.to_string());
                let answer = chunk::answer(digest, &file, piece);
                reply(&query, own_key(&key, &self.link.id()), answer).await;
            }
        }
    }
}

/// The rank that a question for a shard names: everybody's `snn/<split>/shard/<rank>/*`, or one holder's.
fn asked_rank(key: &str) -> Option<usize> {
    key.split('/').nth(3).and_then(|rank| rank.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::all_keys;

    #[test]
    fn the_rank_stands_in_the_question() {
        let split = "ab".repeat(32);
        let key = shard_key(&split, "3");
        assert_eq!(asked_rank(&all_keys(&key)), Some(3));
        assert_eq!(asked_rank(&own_key(&key, "7f3a")), Some(3));
        for other in ["snn/**", &shard_key(&split, "*"), &shard_key(&split, "-1"), ""] {
            assert_eq!(asked_rank(other), None, "{other}");
        }
    }
}
